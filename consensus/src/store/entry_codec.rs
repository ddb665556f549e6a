//! A log entry as bytes, for the write-ahead log and for the wire.
//!
//! ```text
//! head length u32 LE | head (log id, kind, lengths of the batches) | the batches' original bytes, one after another
//! ```
//!
//! Batches are copied as they are: encoding them again, byte by byte, would cost more than all the rest of an append.
//! No checksum here: both users wrap the result in a record (`statemachine::codec`), which has one.

use serde::Deserialize;
use serde::Serialize;
use statemachine::batch::MAX_BATCH_LEN;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::CodecError;

use crate::types::Entry;
use crate::types::LogId;
use crate::types::Membership;
use crate::types::Payload;
use crate::types::Proposal;

/// Most batches in one entry: the decider's group commit stops far below (DESIGN §3).
pub const MAX_BATCHES: usize = 4096;

#[derive(Serialize, Deserialize)]
struct EntryHead {
    log_id: LogId,
    body: Body,
}

#[derive(Serialize, Deserialize)]
enum Body {
    Blank,
    Normal { batch_lens: Vec<u32> },
    Membership(Membership),
}

/// Appends the encoded entry to `out`.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    let body = match &entry.payload {
        Payload::Blank => Body::Blank,
        Payload::Normal(proposal) => {
            Body::Normal { batch_lens: proposal.batches.iter().map(|batch| batch.as_bytes().len() as u32).collect() }
        }
        Payload::Membership(membership) => Body::Membership(membership.clone()),
    };
    let head = codec::encode(&EntryHead { log_id: entry.log_id, body });
    out.extend_from_slice(&(head.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    if let Payload::Normal(proposal) = &entry.payload {
        for batch in proposal.batches.iter() {
            out.extend_from_slice(batch.as_bytes());
        }
    }
}

/// Decodes an entry that fills `bytes` exactly. The batches inside are not opened.
pub fn decode_entry(bytes: &[u8]) -> Result<Entry, CodecError> {
    let (head, mut rest) = split_head(bytes)?;
    let payload = match head.body {
        Body::Blank => Payload::Blank,
        Body::Membership(membership) => Payload::Membership(membership),
        Body::Normal { batch_lens } => {
            if batch_lens.len() > MAX_BATCHES {
                return Err(CodecError::TooLong { len: batch_lens.len(), limit: MAX_BATCHES });
            }
            let mut batches = Vec::with_capacity(batch_lens.len());
            for len in batch_lens {
                let len = len as usize;
                let limit = MAX_BATCH_LEN + codec::HEADER_LEN;
                if len > limit {
                    return Err(CodecError::TooLong { len, limit });
                }
                let Some((batch, left)) = rest.split_at_checked(len) else {
                    return Err(CodecError::Truncated { have: rest.len(), need: len });
                };
                batches.push(SealedBatch::from_bytes(batch.to_vec()));
                rest = left;
            }
            Payload::Normal(Proposal::new(batches))
        }
    };
    match rest.len() {
        0 => Ok(Entry { log_id: head.log_id, payload }),
        left => Err(CodecError::TrailingBytes(left)),
    }
}

/// The log id alone, without copying the batches.
pub fn decode_log_id(bytes: &[u8]) -> Result<LogId, CodecError> {
    Ok(split_head(bytes)?.0.log_id)
}

fn split_head(bytes: &[u8]) -> Result<(EntryHead, &[u8]), CodecError> {
    let Some((len, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(CodecError::Truncated { have: bytes.len(), need: 4 });
    };
    let len = u32::from_le_bytes(*len) as usize;
    let Some((head, rest)) = rest.split_at_checked(len) else {
        return Err(CodecError::Truncated { have: rest.len(), need: len });
    };
    Ok((codec::decode(head)?, rest))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::BTreeSet;

    use openraft::vote::RaftLeaderId;

    use super::*;
    use crate::types::LeaderId;
    use crate::types::PeerAddress;

    fn entry(payload: Payload) -> Entry {
        Entry { log_id: LogId::new(LeaderId::new(3, 7).to_committed(), 42), payload }
    }

    fn round_trip(entry: &Entry) {
        let mut bytes = Vec::new();
        encode_entry(entry, &mut bytes);
        assert_eq!(&decode_entry(&bytes).expect("what was encoded decodes"), entry);
        assert_eq!(decode_log_id(&bytes), Ok(entry.log_id));
        for cut in 0..bytes.len() {
            assert!(decode_entry(&bytes[..cut]).is_err(), "an entry cut at {cut} is refused");
        }
        bytes.push(0);
        assert!(decode_entry(&bytes).is_err(), "bytes after the entry are refused");
    }

    #[test]
    fn every_kind_of_entry_survives_its_encoding() {
        let batches = vec![SealedBatch::from_bytes(vec![1; 100]), SealedBatch::from_bytes(vec![2; 3])];
        round_trip(&entry(Payload::Blank));
        round_trip(&entry(Payload::Normal(Proposal::barrier())));
        round_trip(&entry(Payload::Normal(Proposal::new(batches))));
        let nodes = BTreeMap::from([(1, PeerAddress { address: "10.0.0.1:7442".into() }), (2, PeerAddress::default())]);
        let membership = Membership::new(vec![BTreeSet::from([1])], nodes).expect("a valid membership");
        round_trip(&entry(Payload::Membership(membership)));
    }
}
