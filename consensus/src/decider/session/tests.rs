//! The rules of a session, told without a runtime.

use statemachine::BootId;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::command::IdempotencyKey;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::state::Capacity;
use statemachine::state::Fingerprint;
use statemachine::state::RunStrategy;
use statemachine::state::VmSpec;
use uuid::Uuid;

use super::*;

const NOW_MS: u64 = 1_763_000_000_000;

fn root(command: Command) -> Request {
    Request { actor: Actor::Root(HostId(1)), origin: HostId(1), idempotency: None, command }
}

fn define(name: &str) -> Request {
    let spec = VmSpec { vcpus: 1, memory_mib: 64, kernel: "/srv/vmlinuz".to_owned(), ..VmSpec::default() };
    root(Command::VmDefine { name: name.to_owned(), cluster: None, spec, run_strategy: RunStrategy::Halted })
}

/// A site with its first batch applied.
fn site() -> Fold {
    let facts = HostFacts {
        boot: BootId(Uuid::from_u128(1)),
        capacity: Capacity { cpu_threads: 4, memory_mib: 4096 },
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".to_owned(),
        clock_runs_while_stopped: true,
        watchdog_timeout_ms: None,
    };
    let first_host = HostCandidate {
        name: "host1".to_owned(),
        address: "192.0.2.1:7443".to_owned(),
        public_key: Fingerprint([1; 32]),
        facts,
    };
    let command = Command::SiteInit {
        site: SiteId(Uuid::from_u128(7)),
        name: "site".to_owned(),
        ca: Fingerprint([9; 32]),
        first_host,
    };
    let mut fold = Fold::default();
    match fold.decide(&root(command), NOW_MS) {
        Decision::Batch { batch, sealed, .. } => fold.append(&batch, &sealed),
        other => panic!("a site begins, not {other:?}"),
    }
    fold
}

fn seqs(range: std::ops::RangeInclusive<u64>) -> Vec<Applied> {
    range.map(|seq| Applied::Applied(Seq(seq))).collect()
}

fn released(session: &mut Session<&'static str>) -> Vec<&'static str> {
    std::iter::from_fn(|| session.release()).map(|(waiter, _)| waiter).collect()
}

#[test]
fn an_answer_waits_until_its_own_batch_is_applied() {
    let mut session = Session::begin(&site());
    session.decide(&define("web1"), NOW_MS, "first");
    assert_eq!(session.take_entry().unwrap().len(), 1);
    session.decide(&define("web2"), NOW_MS, "second");
    assert_eq!(session.take_entry().unwrap().len(), 1);
    assert!(released(&mut session).is_empty(), "no seq leaves before it is applied (C13)");
    session.entry_applied(&seqs(2..=2)).unwrap();
    assert_eq!(released(&mut session), ["first"]);
    session.entry_applied(&seqs(3..=3)).unwrap();
    assert_eq!(released(&mut session), ["second"]);
}

#[test]
fn a_rejection_and_a_duplicate_wait_for_the_batch_that_they_rest_on() {
    let mut keyed = define("web1");
    keyed.idempotency = Some(IdempotencyKey { key: "k".to_owned(), body_hash: [1; 32] });
    let mut session = Session::begin(&site());
    session.decide(&keyed, NOW_MS, "creates");
    session.decide(&define("web1"), NOW_MS, "name taken");
    session.decide(&keyed, NOW_MS, "retry");
    assert_eq!(session.take_entry().unwrap().len(), 1);
    assert!(released(&mut session).is_empty(), "web1 may yet be lost with its leader");
    session.entry_applied(&seqs(2..=2)).unwrap();
    let answers: Vec<_> = std::iter::from_fn(|| session.release()).collect();
    assert_eq!(answers.iter().map(|(waiter, _)| *waiter).collect::<Vec<_>>(), ["creates", "name taken", "retry"]);
    assert_eq!(answers[0].1, answers[2].1, "the retry is answered as the first time");
    assert!(matches!(answers[1].1, Err(Rejection::NameTaken { .. })));
}

#[test]
fn what_changes_nothing_waits_for_an_empty_entry_that_proves_the_lead() {
    let mut session = Session::begin(&site());
    assert_eq!(session.take_entry(), None, "nobody asked");
    session.decide(&define("web1"), NOW_MS, "creates");
    assert_eq!(session.take_entry().unwrap().len(), 1);
    session.decide(&root(Command::HostActivate { host: HostId(1) }), NOW_MS, "nothing to change");
    session.decide(&root(Command::HostActivate { host: HostId(9) }), NOW_MS, "no such host");
    assert_eq!(session.take_entry(), Some(Vec::new()), "nothing for the log");
    session.entry_applied(&seqs(2..=2)).unwrap();
    assert_eq!(released(&mut session), ["creates"], "an entry from before the question proves nothing");
    session.entry_applied(&[]).unwrap();
    assert_eq!(released(&mut session), ["nothing to change", "no such host"]);
}

#[test]
fn a_superseded_batch_ends_the_session_and_all_who_wait_must_retry() {
    let mut session = Session::begin(&site());
    for (name, waiter) in [("web1", "one"), ("web2", "two"), ("web3", "three")] {
        session.decide(&define(name), NOW_MS, waiter);
        session.take_entry().unwrap();
    }
    session.entry_applied(&seqs(2..=2)).unwrap();
    assert_eq!(released(&mut session), ["one"]);
    let broken = session.entry_applied(&[Applied::Superseded]).unwrap_err();
    assert_eq!(broken, Broken::Superseded { expected: Seq(3) });
    assert!(released(&mut session).is_empty());
    assert_eq!(session.end().collect::<Vec<_>>(), ["two", "three"]);
}

#[test]
fn a_result_for_other_batches_is_never_taken_for_ours() {
    for results in [seqs(3..=3), Vec::new()] {
        let mut session = Session::begin(&site());
        session.decide(&define("web1"), NOW_MS, "one");
        session.take_entry().unwrap();
        assert!(matches!(session.entry_applied(&results), Err(Broken::Misplaced { .. })));
    }
    let mut idle: Session<&str> = Session::begin(&site());
    assert!(matches!(idle.entry_applied(&seqs(2..=2)), Err(Broken::Misplaced { .. })));
}

#[test]
fn an_entry_is_full_at_its_count_and_holds_its_batches_in_order() {
    let mut session = Session::begin(&site());
    for index in 0..ENTRY_COMMANDS {
        assert!(!session.is_full());
        session.decide(&define(&format!("vm{index}")), NOW_MS, "waits");
    }
    assert!(session.is_full());
    let mut replay = site();
    for sealed in session.take_entry().unwrap() {
        assert!(matches!(replay.apply_sealed(&sealed), Ok(Applied::Applied(_))));
    }
    assert_eq!(replay.head.seq, Seq(1 + ENTRY_COMMANDS as u64));
    assert!(!session.is_full());
}
