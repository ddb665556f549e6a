//! Why a guest that holds a permit stands still, other than by its lease.

use serde::Deserialize;
use serde::Serialize;

use crate::ids::Seq;

/// Whether a guest is to stand still, and since when. Kept while it holds a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    pub wanted: bool,
    /// A later wish to go on makes the host try at once what an error stopped.
    pub at: Seq,
}

/// The error of a disk that holds a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFault {
    /// The disk's id.
    pub disk: String,
    /// The request and the error, in words of the host.
    pub what: String,
    /// There is no space left: the usual reason, and one that more space ends.
    pub no_space: bool,
}

impl DiskFault {
    pub const MAX_WORDS: usize = 256;
}
