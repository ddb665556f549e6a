//! The one place that knows how bytes look (DESIGN §4, ADR 0003).
//!
//! Values are `bincode` 2 in its standard configuration. Everything that is stored or sent is wrapped in a *record*:
//!
//! ```text
//! magic "Qr" | version u8 | kind u8 | length u32 LE | crc32c u32 LE | payload
//! ```
//!
//! The checksum covers version, kind, length and payload. Decoding is bounded, refuses trailing bytes
//! and never panics, whatever the input.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// First bytes of every record.
pub const MAGIC: [u8; 2] = *b"Qr";
/// Version of the record header itself.
pub const RECORD_VERSION: u8 = 1;
/// Bytes before the payload.
pub const HEADER_LEN: usize = 12;
/// Largest payload of any record: 16 MiB. Bulk travels outside records.
pub const MAX_PAYLOAD: usize = 16 << 20;

/// What a record holds. Append-only: a number is never given a second meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    Batch = 1,
    RaftEntry = 2,
    RaftMeta = 3,
    SegmentHeader = 4,
    SegmentSeal = 5,
    SnapshotManifest = 6,
    SnapshotState = 7,
    PeerRequest = 8,
    PeerResponse = 9,
    WalHeader = 10,
    RaftAppend = 11,
    RaftAppendAck = 12,
}

#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum CodecError {
    #[error("record is cut short: {have} bytes of {need}")]
    Truncated { have: usize, need: usize },
    #[error("record does not begin with the magic bytes of a Quorate record")]
    BadMagic,
    #[error("record version {0} is unknown to this build; upgrade this host")]
    UnknownVersion(u8),
    #[error("record is of kind {found}, expected {expected}")]
    WrongKind { expected: u8, found: u8 },
    #[error("record of {len} bytes exceeds the limit of {limit}")]
    TooLong { len: usize, limit: usize },
    #[error("record checksum does not match: its bytes were damaged")]
    BadChecksum,
    #[error("value does not decode: {0}")]
    BadValue(String),
    #[error("{0} bytes left over after the value")]
    TrailingBytes(usize),
    #[error("event kind {kind} version {version} is unknown to this build; upgrade this host")]
    UnknownEvent { kind: u16, version: u8 },
}

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_PAYLOAD>,
> = bincode::config::standard().with_limit::<MAX_PAYLOAD>();

/// Encodes a value of ours. Our types hold no map with non-string keys, no untagged enum and no
/// unsized sequence, so encoding into memory cannot fail.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).expect("plain values always encode into memory")
}

/// Decodes a value, refusing trailing bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > MAX_PAYLOAD {
        return Err(CodecError::TooLong { len: bytes.len(), limit: MAX_PAYLOAD });
    }
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|error| CodecError::BadValue(error.to_string()))?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(CodecError::TrailingBytes(left)),
    }
}

/// Wraps a payload into a record.
pub fn seal(kind: RecordKind, payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() <= MAX_PAYLOAD, "callers bound what they seal");
    let mut record = Vec::with_capacity(HEADER_LEN + payload.len());
    record.extend_from_slice(&MAGIC);
    record.push(RECORD_VERSION);
    record.push(kind as u8);
    record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    record.extend_from_slice(&checksum(&record[2..8], payload).to_le_bytes());
    record.extend_from_slice(payload);
    record
}

/// Encodes a value and wraps it.
pub fn seal_value<T: Serialize>(kind: RecordKind, value: &T) -> Vec<u8> {
    seal(kind, &encode(value))
}

/// Takes the record at the start of `bytes`: its payload, and how many bytes the record used.
pub fn open_prefix(kind: RecordKind, bytes: &[u8], limit: usize) -> Result<(&[u8], usize), CodecError> {
    let Some(header) = bytes.get(..HEADER_LEN) else {
        return Err(CodecError::Truncated { have: bytes.len(), need: HEADER_LEN });
    };
    if header[..2] != MAGIC {
        return Err(CodecError::BadMagic);
    }
    if header[2] != RECORD_VERSION {
        return Err(CodecError::UnknownVersion(header[2]));
    }
    if header[3] != kind as u8 {
        return Err(CodecError::WrongKind { expected: kind as u8, found: header[3] });
    }
    let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if len > limit.min(MAX_PAYLOAD) {
        return Err(CodecError::TooLong { len, limit: limit.min(MAX_PAYLOAD) });
    }
    let need = HEADER_LEN + len;
    let Some(payload) = bytes.get(HEADER_LEN..need) else {
        return Err(CodecError::Truncated { have: bytes.len(), need });
    };
    let stored = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if stored != checksum(&header[2..8], payload) {
        return Err(CodecError::BadChecksum);
    }
    Ok((payload, need))
}

/// Takes a record that must fill `bytes` exactly.
pub fn open(kind: RecordKind, bytes: &[u8], limit: usize) -> Result<&[u8], CodecError> {
    let (payload, used) = open_prefix(kind, bytes, limit)?;
    match bytes.len() - used {
        0 => Ok(payload),
        left => Err(CodecError::TrailingBytes(left)),
    }
}

/// Takes and decodes a record that must fill `bytes` exactly.
pub fn open_value<T: DeserializeOwned>(kind: RecordKind, bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    decode(open(kind, bytes, limit)?)
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}
