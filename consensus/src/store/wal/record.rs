//! What the write-ahead log writes, byte for byte.
//!
//! A segment file is a header record, then log records, then zeros. A log record's payload begins with the offset at
//! which its *write group* began: the writer syncs a group before it writes the next, so a valid record of a later
//! group proves that everything before that group was once durable. That tells a torn tail from damage.

use serde::Deserialize;
use serde::Serialize;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::codec::MAX_PAYLOAD;
use statemachine::codec::RecordKind;

use crate::store::entry_codec;
use crate::types::Entry;
use crate::types::LogId;

/// Version of this layout.
pub const WAL_FORMAT: u16 = 1;

/// First record of a segment file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentHeader {
    pub format: u16,
    /// Segments are numbered from 1 without gaps.
    pub number: u64,
    /// Where the records of the segment before ended: its tail cannot get lost unseen.
    pub previous_end: u64,
}

/// A record's meaning.
#[derive(Debug, Clone, PartialEq)]
pub enum WalRecord {
    Entry(Entry),
    /// Entries after this one are no longer part of the log (a new leader overruled them).
    Truncate(Option<LogId>),
    /// The log is empty and continues after this id (a snapshot was installed beyond its end).
    Reset(LogId),
}

/// The control records, as encoded.
#[derive(Serialize, Deserialize)]
enum Control {
    Truncate(Option<LogId>),
    Reset(LogId),
}

const TAG_ENTRY: u8 = 0;
const TAG_CONTROL: u8 = 1;
/// `group start u32 LE | tag u8`
const PREFIX_LEN: usize = 5;

/// Encodes one record of the group that began at `group_start`.
pub fn encode(group_start: u32, record: RecordRef<'_>) -> Vec<u8> {
    let mut payload = Vec::with_capacity(256);
    payload.extend_from_slice(&group_start.to_le_bytes());
    match record {
        RecordRef::Entry(entry) => {
            payload.push(TAG_ENTRY);
            entry_codec::encode_entry(entry, &mut payload);
        }
        RecordRef::Truncate(last) => {
            payload.push(TAG_CONTROL);
            payload.extend_from_slice(&codec::encode(&Control::Truncate(last)));
        }
        RecordRef::Reset(purged) => {
            payload.push(TAG_CONTROL);
            payload.extend_from_slice(&codec::encode(&Control::Reset(purged)));
        }
    }
    codec::seal(RecordKind::RaftEntry, &payload)
}

/// A record about to be written, borrowed.
#[derive(Debug, Clone, Copy)]
pub enum RecordRef<'a> {
    Entry(&'a Entry),
    Truncate(Option<LogId>),
    Reset(LogId),
}

/// Takes the record at the start of `bytes`: its group's start, its meaning and its length.
pub fn decode_prefix(bytes: &[u8]) -> Result<(u32, WalRecord, usize), CodecError> {
    let (payload, used) = codec::open_prefix(RecordKind::RaftEntry, bytes, MAX_PAYLOAD)?;
    let Some((prefix, body)) = payload.split_first_chunk::<PREFIX_LEN>() else {
        return Err(CodecError::Truncated { have: payload.len(), need: PREFIX_LEN });
    };
    let group_start = u32::from_le_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]);
    let record = match prefix[4] {
        TAG_ENTRY => WalRecord::Entry(entry_codec::decode_entry(body)?),
        TAG_CONTROL => match codec::decode(body)? {
            Control::Truncate(last) => WalRecord::Truncate(last),
            Control::Reset(purged) => WalRecord::Reset(purged),
        },
        tag => return Err(CodecError::BadValue(format!("unknown log record tag {tag}"))),
    };
    Ok((group_start, record, used))
}

/// The group start of a record, if `bytes` begin with a valid one of any meaning.
pub fn group_start_of(bytes: &[u8]) -> Option<u32> {
    let (payload, _) = codec::open_prefix(RecordKind::RaftEntry, bytes, MAX_PAYLOAD).ok()?;
    let prefix = payload.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*prefix))
}
