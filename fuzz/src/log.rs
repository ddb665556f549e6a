//! Entries of a Raft log.

use consensus::types::Entry;
use consensus::types::LogId;
use consensus::types::Payload;
use consensus::types::Proposal;
use statemachine::batch::SealedBatch;

/// The term of every entry that is made here.
pub const TERM: u64 = 3;

pub fn entry(index: u64, batches: &[SealedBatch]) -> Entry {
    let payload = Payload::Normal(Proposal::new(batches.to_vec()));
    Entry { log_id: LogId::new_term_index(TERM, index), payload }
}
