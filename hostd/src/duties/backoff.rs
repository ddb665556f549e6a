//! Which duty may be tried now: each waits twice as long after every try that did not settle it, from 1 to 30 s.

use std::collections::HashMap;
use std::time::Duration;

use statemachine::codec;
use statemachine::command::Command;

const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(30);

/// A command as a key: its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Duty(Vec<u8>);

impl Duty {
    pub fn of(command: &Command) -> Duty {
        Duty(codec::encode(command))
    }
}

#[derive(Debug, Clone, Copy)]
struct Tried {
    not_before: Duration,
    wait: Duration,
}

/// Times are of any clock that only rises.
#[derive(Debug, Default)]
pub struct Backoff {
    tried: HashMap<Duty, Tried>,
}

impl Backoff {
    /// Takes the duties that may be tried now, and forgets those that are no longer due.
    pub fn take(&mut self, due: Vec<Command>, now: Duration) -> Vec<Command> {
        let keyed: Vec<(Duty, Command)> = due.into_iter().map(|command| (Duty::of(&command), command)).collect();
        let still: std::collections::HashSet<&Duty> = keyed.iter().map(|(duty, _)| duty).collect();
        self.tried.retain(|duty, _| still.contains(duty));
        let mut ready = Vec::new();
        for (duty, command) in keyed {
            let wait = match self.tried.get(&duty) {
                Some(tried) if now < tried.not_before => continue,
                Some(tried) => (tried.wait * 2).min(LAST),
                None => FIRST,
            };
            self.tried.insert(duty, Tried { not_before: now + wait, wait });
            ready.push(command);
        }
        ready
    }

    /// Something changed that may settle what could not be settled: everything may be tried at once.
    pub fn reset(&mut self) {
        self.tried.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use statemachine::ids::VmId;
    use uuid::Uuid;

    fn place(n: u128) -> Command {
        Command::VmPlace { vm: VmId(Uuid::from_u128(n)) }
    }

    #[test]
    fn a_duty_that_stays_due_is_tried_less_and_less() {
        let mut backoff = Backoff::default();
        let mut tries = Vec::new();
        for second in 0..100 {
            if !backoff.take(vec![place(1)], Duration::from_secs(second)).is_empty() {
                tries.push(second);
            }
        }
        assert_eq!(tries, [0, 1, 3, 7, 15, 31, 61, 91]);
    }

    #[test]
    fn duties_wait_apart_and_one_that_was_settled_starts_anew() {
        let mut backoff = Backoff::default();
        let at = Duration::from_secs;
        assert_eq!(backoff.take(vec![place(1)], at(0)), [place(1)]);
        assert_eq!(backoff.take(vec![place(1), place(2)], at(0)), [place(2)]);
        backoff.take(vec![place(2)], at(0));
        assert_eq!(backoff.take(vec![place(1)], at(0)), [place(1)], "it was not due in between");
        backoff.reset();
        assert_eq!(backoff.take(vec![place(1)], at(0)), [place(1)]);
    }
}
