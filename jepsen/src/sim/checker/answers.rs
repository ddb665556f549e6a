//! What clients were told.

use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::command::Request;
use statemachine::fold::Decision;
use statemachine::rejection::Rejection;

use super::Checker;
use crate::sim::coverage::Met;

impl Checker {
    /// A client was told that its command is in the log (D1, C13).
    pub fn acknowledged(&mut self, key: &str, seq: Seq) {
        self.coverage.add(Met::AcceptedCommands, 1);
        if seq <= self.fold.head.seq {
            self.proven(seq, key);
        } else if let Some(other) = self.unproven.insert(seq, key.to_owned())
            && other != key
        {
            self.violate("D1", format!("seq {seq} was given to {other} and to {key}"));
        }
    }

    pub(super) fn proven(&mut self, seq: Seq, key: &str) {
        let found = self.keys.get(&seq);
        if found.is_none_or(|found| found != key) {
            self.violate("D1", format!("{key} was acknowledged as batch {seq}, which is {found:?}"));
        }
    }

    /// A client was told yes. What changed nothing rests on a state that is no older than the question.
    pub fn answered(&mut self, key: &str, asked_at: Seq, seq: Seq) {
        if seq < asked_at {
            self.violate("D1", format!("{key} was answered as of {seq}, asked when the log was at {asked_at}"));
        }
    }

    /// A client was told no. At some moment since it asked, the log says so too.
    pub fn refused(&mut self, request: &Request, asked_at: Seq, why: &Rejection) {
        let reaches_back = self.recent.front().is_some_and(|oldest| oldest.head.seq <= asked_at);
        let says_so = |fold: &Fold| match fold.decide(request, fold.stamp.wall_ms) {
            Decision::Rejected(said) => said == *why,
            _ => false,
        };
        let since = self.recent.iter().rev().take_while(|fold| fold.head.seq >= asked_at);
        if reaches_back && !since.into_iter().any(says_so) {
            let key = request.idempotency.as_ref().map_or("", |idempotency| &idempotency.key);
            let what = format!("{key} was refused on grounds that never were since it was asked at {asked_at}: {why}");
            self.violate("D1", what);
        }
    }

    /// A linearizable read that began after these acknowledgements must see them.
    pub fn read(&mut self, host: HostId, seen: Seq, acknowledged: Seq) {
        if seen < acknowledged {
            self.violate("D1", format!("a read on host {host} saw {seen} after {acknowledged} was acknowledged"));
        }
    }
}
