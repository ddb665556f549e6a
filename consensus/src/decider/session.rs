//! One session of the decider, without clock or runtime: what was decided, what is in flight, who waits for what.

use std::collections::VecDeque;
use std::mem;

use statemachine::Fold;
use statemachine::Rejection;
use statemachine::Seq;
use statemachine::batch::MAX_BATCH_LEN;
use statemachine::batch::SealedBatch;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::fold::Applied;
use statemachine::fold::Decision;
use statemachine::mutant;
use statemachine::mutant::Mutant;

/// A group commit holds at most this many commands and about this many bytes.
pub const ENTRY_COMMANDS: usize = 512;
pub const ENTRY_BYTES: usize = 512 << 10;

/// What a caller is told, once an entry that was proposed after the decision is applied.
pub type Outcome = Result<Answer, Rejection>;

/// Why a session may not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// A batch of ours did not follow the head: somebody else's came first.
    Superseded { expected: Seq },
    /// The log answered for other batches than were proposed.
    Misplaced { expected: Seq, got: Option<Applied> },
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broken::Superseded { expected } => write!(f, "batch {expected} was superseded"),
            Broken::Misplaced { expected, got: Some(got) } => write!(f, "expected batch {expected}, applied {got:?}"),
            Broken::Misplaced { expected, got: None } => write!(f, "batch {expected} came back without a result"),
        }
    }
}

struct Held<W> {
    /// Number of the entry that must be applied first: the one that closes this decision's group. It holds all that was decided
    /// before, or comes after it; and a leader whose entry is applied led when it was decided. A refusal, or a yes that changes
    /// nothing, would else come from a leader that was deposed meanwhile.
    entry: u64,
    waiter: W,
    outcome: Outcome,
}

/// `W` is whoever waits: a oneshot sender in the product, a name in tests.
pub struct Session<W> {
    /// Applied plus everything decided since.
    speculative: Fold,
    applied: Seq,
    /// Decided, not yet proposed.
    open: Vec<SealedBatch>,
    open_bytes: usize,
    open_commands: usize,
    /// Seqs of each proposed entry, oldest first; none in an entry that only proves the lead.
    in_flight: VecDeque<(Seq, Seq)>,
    /// Entries that were applied, since the session began.
    entries_applied: u64,
    /// In the order of decisions, so in order of entries.
    held: VecDeque<Held<W>>,
}

impl<W> Session<W> {
    /// Begins on the fold in which the session's barrier is applied.
    pub fn begin(applied: &Fold) -> Session<W> {
        Session {
            speculative: applied.clone(),
            applied: applied.head.seq,
            open: Vec::new(),
            open_bytes: 0,
            open_commands: 0,
            in_flight: VecDeque::new(),
            entries_applied: 0,
            held: VecDeque::new(),
        }
    }

    /// Decides one request; its waiter is answered by [`Self::release`] when the entry of its group is applied.
    pub fn decide(&mut self, request: &Request, wall_ms: u64, waiter: W) {
        self.open_commands += 1;
        let outcome = match self.speculative.decide(request, wall_ms) {
            Decision::Rejected(rejection) => Err(rejection),
            Decision::Settled(answer) => Ok(answer),
            // A batch that no host would decode must not reach the log.
            Decision::Batch { sealed, .. } if sealed.as_bytes().len() > MAX_BATCH_LEN => Err(too_large(&sealed)),
            Decision::Batch { batch, sealed, answer } => {
                self.speculative.append(&batch, &sealed);
                self.open_bytes += sealed.as_bytes().len();
                self.open.push(sealed);
                Ok(answer)
            }
        };
        let hasty = match outcome {
            Ok(_) => mutant::is_on(Mutant::AcknowledgeBeforeQuorum),
            Err(_) => mutant::is_on(Mutant::AnswerBeforeGround),
        };
        if hasty {
            self.held.push_front(Held { entry: 0, waiter, outcome });
            return;
        }
        let entry = self.entries_applied + self.in_flight.len() as u64 + 1;
        self.held.push_back(Held { entry, waiter, outcome });
    }

    /// The open entry takes no more commands.
    pub fn is_full(&self) -> bool {
        self.open_commands >= ENTRY_COMMANDS || self.open_bytes >= ENTRY_BYTES
    }

    /// Closes the open entry for proposing; `None` if nothing was decided. It is empty when what was decided changes nothing.
    pub fn take_entry(&mut self) -> Option<Vec<SealedBatch>> {
        if mem::take(&mut self.open_commands) == 0 {
            return None;
        }
        self.open_bytes = 0;
        let batches = mem::take(&mut self.open);
        let last = self.speculative.head.seq;
        let first = Seq(last.0 + 1 - batches.len() as u64);
        self.in_flight.push_back((first, last));
        Some(batches)
    }

    pub fn entries_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The oldest entry in flight came out of the log with these results.
    pub fn entry_applied(&mut self, results: &[Applied]) -> Result<(), Broken> {
        let Some((first, last)) = self.in_flight.pop_front() else {
            return Err(Broken::Misplaced { expected: self.applied.next(), got: results.first().copied() });
        };
        let mut expected = first;
        let mut results = results.iter();
        while expected <= last {
            match results.next() {
                Some(Applied::Applied(seq)) if *seq == expected => expected = expected.next(),
                Some(Applied::Superseded) => return Err(Broken::Superseded { expected }),
                got => return Err(Broken::Misplaced { expected, got: got.copied() }),
            }
        }
        self.applied = last;
        self.entries_applied += 1;
        Ok(())
    }

    /// The next waiter whose entry is applied, with its answer.
    pub fn release(&mut self) -> Option<(W, Outcome)> {
        if self.held.front()?.entry > self.entries_applied {
            return None;
        }
        self.held.pop_front().map(|held| (held.waiter, held.outcome))
    }

    /// The session is over: these waiters learn nothing but that they must retry.
    pub fn end(self) -> impl Iterator<Item = W> {
        self.held.into_iter().map(|held| held.waiter)
    }
}

fn too_large(sealed: &SealedBatch) -> Rejection {
    Rejection::Invalid {
        field: "command".to_owned(),
        why: format!("its events take {} bytes, one command may take {MAX_BATCH_LEN}", sealed.as_bytes().len()),
    }
}

#[cfg(test)]
mod tests;
