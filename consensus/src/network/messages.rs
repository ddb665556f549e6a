//! What Raft messages look like between hosts, where openraft's own types do not say.

use openraft::AsyncRuntime;
use openraft::raft::StreamAppendError;
use openraft::raft::StreamAppendResult;
use serde::Deserialize;
use serde::Serialize;

use crate::types::LogId;
use crate::types::TypeConfig;
use crate::types::Vote;

/// One answer on a stream of appends. A stream ends after an answer that is not `Matching`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum AppendAnswer {
    /// Everything up to here is on the follower's disk and equal to the leader's.
    Matching(Option<LogId>),
    /// The follower does not have this entry.
    Conflict(LogId),
    HigherVote(Vote),
}

impl AppendAnswer {
    pub(super) fn of<R: AsyncRuntime>(result: StreamAppendResult<TypeConfig<R>>) -> AppendAnswer {
        match result {
            Ok(log_id) => AppendAnswer::Matching(log_id),
            Err(StreamAppendError::Conflict(log_id)) => AppendAnswer::Conflict(log_id),
            Err(StreamAppendError::HigherVote(vote)) => AppendAnswer::HigherVote(vote),
        }
    }

    pub(super) fn into_result<R: AsyncRuntime>(self) -> StreamAppendResult<TypeConfig<R>> {
        match self {
            AppendAnswer::Matching(log_id) => Ok(log_id),
            AppendAnswer::Conflict(log_id) => Err(StreamAppendError::Conflict(log_id)),
            AppendAnswer::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
        }
    }
}

/// A leader offers a snapshot; the receiver pulls the files that it lacks, then installs and answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOffer {
    /// Where the leader serves the files; a host that has just joined may not know it otherwise.
    pub address: String,
    pub vote: Vote,
    #[serde(with = "serde_bytes")]
    pub manifest: Vec<u8>,
}

/// Asks for a piece of a part that a manifest names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChunkRequest {
    pub(super) part: String,
    pub(super) offset: u64,
}
