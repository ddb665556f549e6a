//! The observer under a clock that a test turns by hand.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use statemachine::state::GuestFacts;
use statemachine::state::GuestOs;

use super::commands::Command;
use super::observer::*;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn everything() -> BTreeSet<Command> {
    let asks = [Ask::Info, Ask::Interfaces, Ask::HostName, Ask::Os, Ask::Filesystems, Ask::Ping];
    asks.map(Ask::command).into()
}

fn answer(ask: Ask, name: &str) -> Answer {
    match ask {
        Ask::Info => Answer::Info(everything()),
        Ask::Interfaces => Answer::Interfaces(BTreeSet::new()),
        Ask::HostName => Answer::HostName(Some(name.to_owned())),
        Ask::Os => Answer::Os(GuestOs::default()),
        Ask::Filesystems => Answer::Filesystems(BTreeSet::new()),
        Ask::Ping => Answer::Pong,
    }
}

/// Asks until nothing is due, and answers at once.
fn round(observer: &mut Observer, name: &str, now: Duration) -> Vec<Ask> {
    let mut asked = Vec::new();
    while let Some(ask) = observer.ask(now) {
        asked.push(ask);
        assert!(asked.len() < 10, "it asks without end: {asked:?}");
        observer.answered(answer(ask, name), now);
    }
    asked
}

fn connected() -> Observer {
    let mut observer = Observer::new(None);
    observer.connected(s(0));
    observer
}

#[test]
fn a_new_agent_is_asked_everything_and_reported_once_whole() {
    let mut observer = Observer::new(None);
    assert_eq!((observer.ask(s(0)), observer.next()), (None, None), "nobody is there");
    observer.connected(s(0));
    let mut asked = Vec::new();
    while let Some(ask) = observer.ask(s(0)) {
        assert_eq!(observer.report(s(0)), None, "facts are reported whole");
        asked.push(ask);
        observer.answered(answer(ask, "web"), s(0));
    }
    assert_eq!(asked, [Ask::Info, Ask::Interfaces, Ask::HostName, Ask::Os, Ask::Filesystems]);
    assert_eq!(observer.next(), Some(s(0)), "a report is due");
    let facts = observer.report(s(0)).unwrap();
    assert_eq!(facts.hostname.as_deref(), Some("web"));
    assert_eq!(observer.report(s(500)), None, "nothing changed");
}

#[test]
fn each_question_has_its_period() {
    let mut observer = connected();
    let mut times: BTreeMap<Ask, Vec<u64>> = BTreeMap::new();
    for second in 0..=600 {
        for ask in round(&mut observer, "web", s(second)) {
            times.entry(ask).or_default().push(second);
        }
    }
    assert_eq!(times[&Ask::HostName], [0, 300, 600]);
    assert_eq!(times[&Ask::Info], [0, 300, 600]);
    assert_eq!(times[&Ask::Interfaces].len(), 21);
    assert_eq!(times[&Ask::Ping][..4], [10, 20, 40, 50], "an answer is as good as a ping");
}

#[test]
fn changes_are_reported_at_most_every_half_minute_and_none_is_lost() {
    let mut observer = connected();
    round(&mut observer, "one", s(0));
    observer.report(s(0)).unwrap();
    observer.answered(answer(Ask::HostName, "two"), s(5));
    observer.answered(answer(Ask::HostName, "three"), s(6));
    assert_eq!(observer.report(s(29)), None);
    assert_eq!(observer.next(), Some(s(16)), "a ping");
    round(&mut observer, "three", s(29));
    assert_eq!(observer.next(), Some(s(30)));
    assert_eq!(observer.report(s(30)).unwrap().hostname.as_deref(), Some("three"));
    observer.answered(answer(Ask::HostName, "four"), s(31));
    observer.answered(answer(Ask::HostName, "three"), s(32));
    assert_eq!(observer.report(s(100)), None, "it is as it was reported");
}

#[test]
fn what_an_earlier_process_reported_is_not_reported_again() {
    let known = GuestFacts { hostname: Some("web".into()), os: Some(GuestOs::default()), ..GuestFacts::default() };
    let mut observer = Observer::new(Some(known));
    observer.connected(s(0));
    round(&mut observer, "web", s(0));
    assert_eq!(observer.report(s(0)), None);
    observer.answered(answer(Ask::HostName, "other"), s(1));
    assert!(observer.report(s(1)).is_some());
}

#[test]
fn only_what_is_offered_is_asked_and_awaited() {
    let mut observer = connected();
    observer.answered(Answer::Info(BTreeSet::from([Command::Info, Command::HostName])), s(0));
    assert_eq!(round(&mut observer, "old", s(0)), [Ask::HostName]);
    assert_eq!(observer.report(s(0)).unwrap().hostname.as_deref(), Some("old"));
    assert_eq!(round(&mut observer, "old", s(299)), [], "not even a ping");
    // It refuses what it offered: facts are whole without it.
    let mut observer = connected();
    observer.answered(answer(Ask::Info, ""), s(0));
    observer.failed(Ask::Filesystems, NoAnswer::Refused, s(0));
    assert_eq!(round(&mut observer, "web", s(0)), [Ask::Interfaces, Ask::HostName, Ask::Os]);
    assert!(observer.report(s(0)).is_some());
}

#[test]
fn a_silent_agent_is_only_pinged_and_less_and_less() {
    let mut observer = connected();
    observer.answered(answer(Ask::Info, ""), s(0));
    observer.failed(Ask::Interfaces, NoAnswer::Silent, s(5));
    assert!(!observer.is_silent(), "one answer may be late");
    let mut pings = Vec::new();
    for second in 5..1000 {
        if let Some(ask) = observer.ask(s(second)) {
            assert_eq!(ask, Ask::Ping);
            pings.push(second);
            observer.failed(ask, NoAnswer::Silent, s(second));
        }
    }
    assert_eq!(pings, [15, 35, 75, 155, 315, 615, 915]);
    assert!(observer.is_silent());
    observer.answered(Answer::Pong, s(1000));
    assert!(!observer.is_silent());
    assert_eq!(round(&mut observer, "web", s(1000)).len(), 5, "it is asked what is due");
}

#[test]
fn a_guest_that_restarts_is_asked_anew_and_its_old_facts_are_gone() {
    let mut observer = connected();
    round(&mut observer, "one", s(0));
    observer.report(s(0)).unwrap();
    observer.disconnected();
    assert_eq!((observer.ask(s(100)), observer.report(s(100))), (None, None));
    observer.connected(s(100));
    observer.answered(Answer::Info(BTreeSet::from([Command::Info, Command::OsInfo])), s(100));
    round(&mut observer, "two", s(100));
    assert_eq!(observer.report(s(100)).unwrap().hostname, None);
}

#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Answer { name: u8 },
    Fail(bool),
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u64..40_000).prop_map(Step::Wait),
        8 => (0u8..3).prop_map(|name| Step::Answer { name }),
        2 => any::<bool>().prop_map(Step::Fail),
        1 => Just(Step::Reconnect),
    ]
}

proptest! {
    /// However a guest answers: reports are half a minute apart and differ, no question comes before its time, and what is true in
    /// the end is reported.
    #[test]
    fn reports_are_rare_and_the_last_is_true(steps in prop::collection::vec(step(), 0..300)) {
        let mut observer = connected();
        let mut now = Duration::ZERO;
        let mut last: Option<(Duration, GuestFacts)> = None;
        let mut asked: BTreeMap<Ask, Duration> = BTreeMap::new();
        let mut name = "n0".to_owned();
        for step in steps {
            match step {
                Step::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
                Step::Reconnect => {
                    observer.disconnected();
                    observer.connected(now);
                    asked.clear();
                }
                Step::Answer { .. } | Step::Fail(_) => {
                    let Some(ask) = observer.ask(now) else { continue };
                    if let Some(before) = asked.insert(ask, now) {
                        prop_assert!(now - before >= PING_EVERY, "{ask:?}");
                    }
                    match step {
                        Step::Answer { name: number } => {
                            name = format!("n{number}");
                            observer.answered(answer(ask, &name), now);
                        }
                        Step::Fail(true) => observer.failed(ask, NoAnswer::Silent, now),
                        _ => observer.failed(ask, NoAnswer::Refused, now),
                    }
                }
            }
            if let Some(facts) = observer.report(now) {
                if let Some((at, before)) = &last {
                    prop_assert!(now - *at >= REPORT_EVERY);
                    prop_assert_ne!(before, &facts);
                }
                last = Some((now, facts));
            }
        }
        // From here on it answers: within the longest silence and one period the log has what is so.
        let end = now + SILENCE_MAX + REST_EVERY + REPORT_EVERY;
        while let Some(next) = observer.next().filter(|next| *next <= end) {
            now = now.max(next);
            round(&mut observer, &name, now);
            if let Some(facts) = observer.report(now) {
                last = Some((now, facts));
            }
        }
        prop_assert_eq!(last.map(|(_, facts)| facts.hostname), Some(Some(name)));
    }
}
