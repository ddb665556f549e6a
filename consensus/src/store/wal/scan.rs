//! Reading a segment at start, and telling a torn tail from damage. Pure: bytes in, records out.

use memchr::memmem;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::codec::HEADER_LEN;
use statemachine::codec::MAGIC;
use statemachine::codec::RecordKind;

use super::record;
use super::record::SegmentHeader;
use super::record::WAL_FORMAT;
use super::record::WalRecord;

/// Longest header record that is looked for.
const MAX_SEGMENT_HEADER_LEN: usize = 64;

/// Why a segment cannot be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("its header is unreadable: {0}")]
    Header(CodecError),
    #[error("its layout version {0} is unknown to this build; upgrade this host")]
    Format(u16),
    #[error("the record at byte {offset} is unreadable ({why}) and acknowledged records follow it")]
    Middle { offset: usize, why: CodecError },
    #[error("the record at byte {offset} is intact and cannot be understood ({why}); upgrade this host")]
    Meaning { offset: usize, why: CodecError },
}

/// How the records of a segment end.
#[derive(Debug, PartialEq, Eq)]
pub struct ScanEnd {
    /// First byte after the last good record.
    pub end: usize,
    /// Something was there that never became durable as a whole: to be zeroed.
    pub torn: bool,
}

/// Reads the header record: it and its length.
pub fn header(bytes: &[u8]) -> Result<(SegmentHeader, usize), Damage> {
    let (payload, used) =
        codec::open_prefix(RecordKind::WalHeader, bytes, MAX_SEGMENT_HEADER_LEN).map_err(Damage::Header)?;
    let header: SegmentHeader = codec::decode(payload).map_err(Damage::Header)?;
    match header.format {
        WAL_FORMAT => Ok((header, used)),
        format => Err(Damage::Format(format)),
    }
}

/// Visits every record after the header with its offset and length.
///
/// A record that does not check out ends the log, unless a valid record follows whose group began after it: that group
/// was written only once everything before it was durable, so what is missing was acknowledged and is lost.
pub fn records<E>(
    bytes: &[u8],
    start: usize,
    mut visit: impl FnMut(usize, usize, WalRecord) -> Result<(), E>,
) -> Result<Result<ScanEnd, Damage>, E> {
    let mut offset = start;
    while bytes.len() - offset >= HEADER_LEN {
        match record::decode_prefix(&bytes[offset..]) {
            Ok((_, record, used)) => {
                visit(offset, used, record)?;
                offset += used;
            }
            Err(why) => {
                if record::group_start_of(&bytes[offset..]).is_some() {
                    return Ok(Err(Damage::Meaning { offset, why }));
                }
                return Ok(judge_tail(bytes, offset, why));
            }
        }
    }
    Ok(Ok(ScanEnd { end: offset, torn: !is_zero(&bytes[offset..]) }))
}

fn judge_tail(bytes: &[u8], offset: usize, why: CodecError) -> Result<ScanEnd, Damage> {
    let tail = &bytes[offset..];
    // What every start finds behind the last record: preallocated space, megabytes of it.
    if is_zero(tail) {
        return Ok(ScanEnd { end: offset, torn: false });
    }
    for at in memmem::find_iter(tail, &MAGIC) {
        if let Some(group_start) = record::group_start_of(&tail[at..])
            && group_start as usize > offset
        {
            return Err(Damage::Middle { offset, why });
        }
    }
    Ok(ScanEnd { end: offset, torn: true })
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}
