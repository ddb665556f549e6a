use std::collections::BTreeMap;
use std::collections::BTreeSet;

use proptest::prelude::*;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::state::ReleaseClass;

use super::super::wire::Nonce;
use super::*;
use crate::test_site::Site;
use crate::test_site::boot;
use crate::test_site::spec;

fn secs(s: u64) -> Mono {
    Duration::from_secs(s)
}

fn beat(host: HostId, boot: BootId) -> Heartbeat {
    Heartbeat {
        host,
        boot,
        nonce: Nonce(host.0),
        applied: Seq(0),
        wall_ms: 0,
        watchdog_armed: false,
        running: Vec::new(),
    }
}

/// A keeper that leads and is ready since 100 s.
fn leading() -> Keeper {
    let mut keeper = Keeper::new(Timers::default());
    keeper.lead(1, true, secs(100));
    keeper
}

fn answer(keeper: &mut Keeper, site: &Site, now: Mono) -> Vec<Result<Grant, Refusal>> {
    let (round, _) = keeper.begin_round(now).expect("a round is due");
    let fold = site.now();
    keeper.end_round(round, Some(fold.head.seq), &fold, now).into_iter().map(|verdict| verdict.outcome).collect()
}

#[test]
fn a_grant_names_the_permits_of_this_host_and_this_boot() {
    let site = Site::with_hosts(2);
    let [h1, h2] = site.hosts[..] else { panic!() };
    let on_h1 = site.start(site.define("a", spec(ReleaseClass::Lease)), h1);
    site.start(site.define("b", spec(ReleaseClass::Lease)), h2);
    let mut keeper = leading();
    keeper.heartbeat(beat(h1, boot(1)), secs(101), 0);
    let grants = answer(&mut keeper, &site, secs(101));
    let grant = grants[0].as_ref().unwrap();
    assert_eq!(grant.epochs, [on_h1]);
    assert_eq!(grant.applied, site.now().head.seq);

    keeper.heartbeat(beat(h1, boot(77)), secs(102), 0);
    let other_boot = answer(&mut keeper, &site, secs(102));
    assert_eq!(other_boot[0].as_ref().unwrap().epochs, [], "a permit belongs to the incarnation it was granted to");
}

#[test]
fn a_heartbeat_that_arrives_during_a_round_waits_for_the_next() {
    let site = Site::with_hosts(2);
    let [h1, h2] = site.hosts[..] else { panic!() };
    let fold = site.now();
    let mut keeper = leading();
    let (early, _) = keeper.heartbeat(beat(h1, boot(1)), secs(101), 0);
    let (round, _) = keeper.begin_round(secs(101)).unwrap();
    let (late, _) = keeper.heartbeat(beat(h2, boot(2)), secs(101), 0);
    assert_eq!(keeper.begin_round(secs(109)), None, "one round at a time");
    let served: Vec<Ticket> =
        keeper.end_round(round, Some(fold.head.seq), &fold, secs(102)).iter().map(|verdict| verdict.ticket).collect();
    assert_eq!(served, [early]);
    let (round, _) = keeper.begin_round(secs(102)).unwrap();
    let verdicts = keeper.end_round(round, Some(fold.head.seq), &fold, secs(102));
    assert_eq!(verdicts[0].ticket, late);
    assert!(verdicts[0].outcome.is_ok());
}

#[test]
fn rounds_are_a_quarter_of_a_second_apart() {
    let site = Site::with_hosts(1);
    let mut keeper = leading();
    keeper.heartbeat(beat(site.hosts[0], boot(1)), secs(101), 0);
    answer(&mut keeper, &site, secs(101));
    keeper.heartbeat(beat(site.hosts[0], boot(1)), secs(101), 0);
    assert_eq!(keeper.begin_round(secs(101) + Duration::from_millis(249)), None);
    assert!(keeper.begin_round(secs(101) + Duration::from_millis(250)).is_some());
}

#[test]
fn a_round_that_proved_nothing_or_is_ahead_of_applied_state_grants_nothing() {
    let site = Site::with_hosts(1);
    let fold = site.now();
    for read in [None, Some(fold.head.seq.next())] {
        let mut keeper = leading();
        keeper.heartbeat(beat(site.hosts[0], boot(1)), secs(101), 0);
        let (round, _) = keeper.begin_round(secs(101)).unwrap();
        let verdicts = keeper.end_round(round, read, &fold, secs(101));
        assert_eq!(verdicts[0].outcome, Err(Refusal::NoMajority));
    }
}

#[test]
fn a_leader_grants_nothing_before_its_barrier_and_nothing_in_the_name_of_an_earlier_session() {
    let site = Site::with_hosts(1);
    let host = site.hosts[0];
    let fold = site.now();
    let mut keeper = Keeper::new(Timers::default());
    let refused = |verdicts: Vec<Verdict>| verdicts[0].outcome.clone().unwrap_err();
    assert_eq!(refused(keeper.heartbeat(beat(host, boot(1)), secs(1), 0).1), Refusal::NotLeader);
    keeper.lead(1, false, secs(1));
    assert_eq!(refused(keeper.heartbeat(beat(host, boot(1)), secs(1), 0).1), Refusal::NotReady);
    keeper.lead(1, true, secs(2));
    keeper.heartbeat(beat(host, boot(1)), secs(2), 0);
    let (round, _) = keeper.begin_round(secs(2)).unwrap();
    assert_eq!(refused(keeper.lead(2, true, secs(3))), Refusal::NotLeader, "who waited is told");
    assert_eq!(keeper.end_round(round, Some(fold.head.seq), &fold, secs(3)), [], "the round died with its session");
}

#[test]
fn a_silent_host_is_suspected_then_lost_and_returns_by_an_applied_recovery() {
    let site = Site::with_hosts(2);
    let [h1, h2] = site.hosts[..] else { panic!() };
    let mut keeper = leading();
    let mut now = secs(104);
    keeper.heartbeat(beat(h1, boot(1)), now, 0);
    assert_eq!(keeper.due(&site.now(), now), [], "silence counts from the election, 4 s ago");
    now = secs(105);
    assert_eq!(keeper.due(&site.now(), now), [(h2, Word::Suspect)]);
    assert_eq!(keeper.due(&site.now(), now), [], "one word a host is in flight");
    let seq = site.duty(Word::Suspect.command(h2)).seq;
    keeper.settle(h2, Word::Suspect, Outcome::Settled(seq), &site.now(), now);
    assert!(!keeper.in_no_grant(h2, &site.now()), "a suspected host still gets grants");

    now = secs(110);
    keeper.heartbeat(beat(h1, boot(1)), now, 0);
    assert_eq!(keeper.due(&site.now(), now), [(h2, Word::Lost)]);
    // The network heals in the very moment of the proposal: hazard C3.
    keeper.heartbeat(beat(h2, boot(2)), now, 0);
    let verdicts = answer(&mut keeper, &site, now);
    assert_eq!(verdicts[1], Err(Refusal::NoGrant), "though applied state still calls it suspected");

    let seq = site.duty(Word::Lost.command(h2)).seq;
    keeper.settle(h2, Word::Lost, Outcome::Settled(seq), &site.now(), now);
    assert_eq!(keeper.due(&site.now(), now), [(h2, Word::Recover)], "it was heard");
    assert!(keeper.in_no_grant(h2, &site.now()));
    let seq = site.duty(Word::Recover.command(h2)).seq;
    keeper.settle(h2, Word::Recover, Outcome::Settled(seq), &site.now(), now);
    assert!(!keeper.in_no_grant(h2, &site.now()));
}

#[test]
fn a_leader_that_stood_still_calls_nobody_silent_for_it() {
    let site = Site::with_hosts(1);
    let host = site.hosts[0];
    let mut keeper = leading();
    keeper.heartbeat(beat(host, boot(1)), secs(103), 0);
    keeper.stalled(secs(16));
    assert_eq!(keeper.due(&site.now(), secs(120)), [], "one second of silence and sixteen of its own");
    assert_eq!(keeper.due(&site.now(), secs(124)), [(host, Word::Suspect)]);
}

#[test]
fn a_proposal_of_unknown_fate_keeps_the_host_in_no_grant_until_a_recovery_is_applied() {
    let site = Site::with_hosts(1);
    let host = site.hosts[0];
    let mut keeper = leading();
    let now = secs(110);
    assert_eq!(keeper.due(&site.now(), now), [(host, Word::Lost)]);
    keeper.settle(host, Word::Lost, Outcome::Unsettled, &site.now(), now);
    keeper.heartbeat(beat(host, boot(1)), now, 0);
    assert!(keeper.in_no_grant(host, &site.now()));
    assert_eq!(keeper.due(&site.now(), now), [], "after a failure it waits");
    let now = now + RETRY;
    assert_eq!(keeper.due(&site.now(), now), [(host, Word::Recover)], "also when the state says alive");
    let seq = site.duty(Word::Recover.command(host)).seq;
    keeper.settle(host, Word::Recover, Outcome::Settled(seq), &site.now(), now);
    assert!(!keeper.in_no_grant(host, &site.now()));
}

#[test]
fn a_new_leader_refuses_hosts_that_its_predecessor_declared_lost() {
    let site = Site::with_hosts(2);
    let host = site.hosts[1];
    site.duty(Word::Lost.command(host));
    let mut keeper = leading();
    keeper.heartbeat(beat(host, boot(2)), secs(101), 0);
    assert_eq!(answer(&mut keeper, &site, secs(101)), [Err(Refusal::NoGrant)]);
}

#[test]
fn a_removed_host_is_told_so() {
    let site = Site::with_hosts(2);
    let host = site.hosts[1];
    site.root(Command::HostMaintenance { host });
    site.root(Command::HostRemove { host });
    let mut keeper = leading();
    keeper.heartbeat(beat(host, boot(2)), secs(101), 0);
    keeper.heartbeat(beat(HostId(999), boot(2)), secs(101), 0);
    assert_eq!(answer(&mut keeper, &site, secs(101)), [Err(Refusal::Removed), Err(Refusal::Unknown)]);
}

#[test]
fn a_leader_whose_clock_is_off_knows_by_how_much_and_who_is_right() {
    let mut keeper = leading();
    for (host, wall_ms) in [(1, 100_000), (2, 103_000), (3, 103_100)] {
        assert_eq!(keeper.clock_error(secs(101)), None, "two clocks cannot say which of them is wrong");
        keeper.heartbeat(Heartbeat { wall_ms, ..beat(HostId(host), boot(1)) }, secs(101), 100_000);
    }
    assert_eq!(keeper.clock_error(secs(101)), Some((-3_000, HostId(2))));
    assert_eq!(keeper.clock_error(secs(200)), None, "old samples say nothing");
}

#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Beat(usize),
    BeginRound,
    /// Ends the round under way; the ReadIndex may have failed.
    EndRound(bool),
    Due,
    /// Ends the oldest proposal: decided and applied, or lost.
    Settle(bool),
    NewSession,
    /// A proposal that was given up commits after all.
    Late,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_000u64).prop_map(Step::Wait),
        6 => (0..3usize).prop_map(Step::Beat),
        5 => Just(Step::BeginRound),
        5 => any::<bool>().prop_map(Step::EndRound),
        3 => Just(Step::Due),
        3 => any::<bool>().prop_map(Step::Settle),
        1 => Just(Step::NewSession),
        1 => Just(Step::Late),
    ]
}

proptest! {
    /// R4, C3, C4: each grant answers a heartbeat that arrived before its round began; it goes to no host whose loss was
    /// proposed in this session without an applied recovery since, nor to one that applied state calls unreachable; it names
    /// exactly the applied permits of that host and boot.
    #[test]
    fn every_grant_has_its_ground(steps in proptest::collection::vec(step(), 1..120)) {
        let site = Site::with_hosts(3);
        let mut permits: BTreeMap<HostId, Epoch> = BTreeMap::new();
        for (n, host) in site.hosts.iter().enumerate() {
            permits.insert(*host, site.start(site.define(&format!("vm{n}"), spec(ReleaseClass::Lease)), *host));
        }
        let mut keeper = leading();
        let mut session = 1;
        let mut now = secs(100);
        let mut arrived: BTreeMap<Ticket, (HostId, u64)> = BTreeMap::new();
        let mut clock = 0u64;
        let mut round: Option<(Round, u64)> = None;
        let mut in_flight: Vec<(HostId, Word)> = Vec::new();
        let mut given_up: Vec<(HostId, Word)> = Vec::new();
        let mut condemned: BTreeSet<HostId> = BTreeSet::new();
        for step in steps {
            clock += 1;
            match step {
                Step::Wait(ms) => now += Duration::from_millis(ms),
                Step::Beat(n) => {
                    let (ticket, verdicts) = keeper.heartbeat(beat(site.hosts[n], boot(n as u128 + 1)), now, 0);
                    prop_assert!(verdicts.iter().all(|verdict| verdict.outcome.is_err()));
                    arrived.insert(ticket, (site.hosts[n], clock));
                }
                Step::BeginRound => {
                    if let Some((begun, of)) = keeper.begin_round(now) {
                        prop_assert_eq!(of, session);
                        round = Some((begun, clock));
                    }
                }
                Step::EndRound(proved) => {
                    let Some((ended, began)) = round.take() else { continue };
                    let fold = site.now();
                    for verdict in keeper.end_round(ended, proved.then_some(fold.head.seq), &fold, now) {
                        let Ok(grant) = verdict.outcome else { continue };
                        let (host, at) = arrived[&verdict.ticket];
                        prop_assert!(proved && at < began, "arrived at {} for a round of {}", at, began);
                        prop_assert!(!condemned.contains(&host));
                        prop_assert!(fold.state.hosts.get(&host).unwrap().liveness != Liveness::Unreachable);
                        prop_assert_eq!(grant.session, session);
                        prop_assert_eq!((grant.host, grant.applied), (host, fold.head.seq));
                        prop_assert_eq!(grant.epochs, vec![permits[&host]]);
                    }
                }
                Step::Due => {
                    for (host, word) in keeper.due(&site.now(), now) {
                        if word == Word::Lost {
                            condemned.insert(host);
                        }
                        in_flight.push((host, word));
                    }
                }
                Step::Settle(decided) => {
                    if in_flight.is_empty() { continue }
                    let (host, word) = in_flight.remove(0);
                    if decided {
                        let seq = site.duty(word.command(host)).seq;
                        keeper.settle(host, word, Outcome::Settled(seq), &site.now(), now);
                        if word == Word::Recover {
                            condemned.remove(&host);
                        }
                    } else {
                        keeper.settle(host, word, Outcome::Unsettled, &site.now(), now);
                        given_up.push((host, word));
                    }
                }
                Step::NewSession => {
                    // The barrier of a session settles whatever its predecessors left.
                    for (host, word) in in_flight.drain(..).chain(given_up.drain(..)) {
                        site.duty(word.command(host));
                    }
                    session += 1;
                    keeper.lead(session, true, now);
                    condemned.clear();
                }
                Step::Late => {
                    // Only while no later word of that host is decided: a decider keeps the order.
                    let alone = |(host, _): &(HostId, Word)| in_flight.iter().all(|(other, _)| other != host);
                    if let Some((host, word)) = given_up.pop().filter(alone) {
                        site.duty(word.command(host));
                    }
                }
            }
        }
    }
}
