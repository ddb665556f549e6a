//! Decides queued commands on the leader, and holds every answer until its ground is applied (DESIGN §3) and the lead proved
//! since (ADR 10).
//!
//! [`session`] is the pure half: a speculative fold, entries in flight, answers held back; no clock, no runtime. [`shell`]
//! is the task around it: it begins a session with a barrier, feeds it from a bounded queue, proposes what it decides
//! `with_leader`, and ends it at the first error, timeout or `Superseded`. Whoever waited is then told to retry with the
//! same key: what became of a command in flight is unknown, and the key is what makes a retry safe.
//!
//! Why a session: openraft refuses single proposals while it stays leader (hazard C1), and a restarted leader may hold
//! an unapplied tail (C2). Why answers are held: they may rest on batches that are lost with the leader (C13).

pub mod session;
pub mod shell;

use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::Rejection;
use thiserror::Error;

pub use shell::Decider;
pub use shell::DeciderLimits;

/// Why a command was not accepted, or why that is not known.
#[derive(Debug, Clone, PartialEq, Error, Serialize, Deserialize)]
pub enum ProposeError {
    #[error(transparent)]
    Rejected(Box<Rejection>),
    /// The outcome is unknown: it may have been accepted. A retry with the same idempotency key is safe.
    #[error("the outcome is not known: {why}; retry with the same idempotency key")]
    Retry { why: String },
    /// Nothing happened.
    #[error("the leader has {queued} commands waiting and takes no more now; retry in a moment")]
    Busy { queued: usize },
    /// Nothing happened: there is no leader, or this host does not know it.
    #[error("the cluster has no leader now; retry in a second, and see `quorate host list` if it stays so")]
    NoLeader,
    /// Nothing happened: the host that was asked does not lead; `leader` may.
    #[error("this host does not lead{}; retry", .leader.map(|host| format!(", host {host} does")).unwrap_or_default())]
    NotLeader { leader: Option<HostId> },
}

impl ProposeError {
    pub(crate) fn retry(why: impl Into<String>) -> ProposeError {
        ProposeError::Retry { why: why.into() }
    }
}

impl From<Rejection> for ProposeError {
    fn from(rejection: Rejection) -> ProposeError {
        ProposeError::Rejected(Box::new(rejection))
    }
}

/// Whether this host leads. Derived from the full vote, so that two leaderships with a moment of none between them are
/// never taken for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leadership {
    Following {
        leader: Option<HostId>,
    },
    Leading {
        /// Rises with every session of this process; a duty that spans two sessions was interrupted.
        session: u64,
        /// The session's barrier is applied: decisions rest on everything that earlier leaders committed.
        ready: bool,
    },
}

impl Leadership {
    /// The session of a leader that decides.
    pub fn ready_session(self) -> Option<u64> {
        match self {
            Leadership::Leading { session, ready: true } => Some(session),
            _ => None,
        }
    }
}
