//! The NBD protocol's frames: newstyle fixed handshake and simple replies. Pure parsing of bytes
//! that a peer sent; every length is bounded before anything is allocated.
//! Source: the protocol document of the NetworkBlockDevice project.

use thiserror::Error;

use super::overlay::SECTOR;

const MAGIC: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;

/// Has flags, sends FLUSH, sends FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8;

pub const OPTION_HEADER: usize = 16;
pub const REQUEST_HEADER: usize = 28;
/// Names are short; nothing else of an option's data is used.
pub const MAX_OPTION_DATA: u32 = 4096;
/// Told to clients as the maximum block size.
pub const MAX_REQUEST: u32 = 32 << 20;

pub const REPLY_ACK: u32 = 1;
pub const REPLY_INFO: u32 = 3;
pub const ERROR_UNSUPPORTED: u32 = 0x8000_0001;
pub const ERROR_INVALID: u32 = 0x8000_0003;
pub const ERROR_UNKNOWN: u32 = 0x8000_0006;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ProtocolError {
    #[error("option magic {0:#x} is not IHAVEOPT")]
    OptionMagic(u64),
    #[error("option data of {0} bytes is over the limit of {MAX_OPTION_DATA}")]
    OptionTooLong(u32),
    #[error("option data ends early or names the export wrongly")]
    OptionData,
    #[error("client flags {0:#x} ask for what the server did not offer")]
    ClientFlags(u32),
    #[error("request magic {0:#x} is wrong")]
    RequestMagic(u32),
    #[error("write of {0} bytes is over the limit of {MAX_REQUEST}")]
    WriteTooLong(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    Abort,
    Info,
    Go,
    Other(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    pub raw: u32,
    pub kind: OptionKind,
    pub length: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    Write { force: bool },
    Disconnect,
    Flush,
    Other(u16),
}

/// A request of the transmission phase. `offset` and `length` are as the client sent them; ask
/// [`Request::fits`] before using them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

/// Error numbers of simple replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyError {
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Unsupported = 95,
}

pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// Checks what the client answered to the greeting.
pub fn check_client_flags(bytes: [u8; 4]) -> Result<(), ProtocolError> {
    let flags = u32::from_be_bytes(bytes);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(ProtocolError::ClientFlags(flags));
    }
    Ok(())
}

pub fn parse_option_header(bytes: &[u8; OPTION_HEADER]) -> Result<OptionHeader, ProtocolError> {
    let magic = u64_at(bytes, 0);
    if magic != OPTION_MAGIC {
        return Err(ProtocolError::OptionMagic(magic));
    }
    let (raw, length) = (u32_at(bytes, 8), u32_at(bytes, 12));
    if length > MAX_OPTION_DATA {
        return Err(ProtocolError::OptionTooLong(length));
    }
    let kind = match raw {
        2 => OptionKind::Abort,
        6 => OptionKind::Info,
        7 => OptionKind::Go,
        other => OptionKind::Other(other),
    };
    Ok(OptionHeader { raw, kind, length })
}

/// The export's name in the data of INFO and GO: length, name, count of information requests, those.
pub fn parse_export_name(data: &[u8]) -> Result<&str, ProtocolError> {
    let (length, rest) = data.split_first_chunk::<4>().ok_or(ProtocolError::OptionData)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| ProtocolError::OptionData)?;
    let (name, rest) = rest.split_at_checked(length).ok_or(ProtocolError::OptionData)?;
    let (count, requests) = rest.split_first_chunk::<2>().ok_or(ProtocolError::OptionData)?;
    if requests.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
        return Err(ProtocolError::OptionData);
    }
    std::str::from_utf8(name).map_err(|_| ProtocolError::OptionData)
}

pub fn option_reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&reply.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Information about an export: size and flags, then block sizes (least, preferred, most).
pub fn export_information(size: u64) -> [Vec<u8>; 2] {
    let mut export = vec![0, 0];
    export.extend_from_slice(&size.to_be_bytes());
    export.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
    let mut blocks = vec![0, 3];
    for bytes in [SECTOR as u32, 4096, MAX_REQUEST] {
        blocks.extend_from_slice(&bytes.to_be_bytes());
    }
    [export, blocks]
}

pub fn parse_request(bytes: &[u8; REQUEST_HEADER]) -> Result<Request, ProtocolError> {
    const FORCE_UNIT_ACCESS: u16 = 1;
    let magic = u32_at(bytes, 0);
    if magic != REQUEST_MAGIC {
        return Err(ProtocolError::RequestMagic(magic));
    }
    let (flags, kind) = (u16::from_be_bytes([bytes[4], bytes[5]]), u16::from_be_bytes([bytes[6], bytes[7]]));
    let command = match kind {
        0 => Command::Read,
        1 => Command::Write { force: flags & FORCE_UNIT_ACCESS != 0 },
        2 => Command::Disconnect,
        3 => Command::Flush,
        other => Command::Other(other),
    };
    let request = Request { command, cookie: u64_at(bytes, 8), offset: u64_at(bytes, 16), length: u32_at(bytes, 24) };
    // The data of a write follows on the wire: one that is too long cannot be skipped, only left.
    if matches!(command, Command::Write { .. }) && request.length > MAX_REQUEST {
        return Err(ProtocolError::WriteTooLong(request.length));
    }
    Ok(request)
}

impl Request {
    /// Whether a read or a write lies inside a disk of `size` bytes, in whole sectors.
    pub fn fits(&self, size: u64) -> Result<(), ReplyError> {
        if self.length == 0 || self.length > MAX_REQUEST {
            return Err(ReplyError::Invalid);
        }
        if !self.offset.is_multiple_of(SECTOR as u64) || !self.length.is_multiple_of(SECTOR as u32) {
            return Err(ReplyError::Invalid);
        }
        let end = self.offset.checked_add(u64::from(self.length));
        if end.is_none_or(|end| end > size) {
            let is_write = matches!(self.command, Command::Write { .. });
            return Err(if is_write { ReplyError::NoSpace } else { ReplyError::Invalid });
        }
        Ok(())
    }
}

pub fn reply_header(cookie: u64, error: Option<ReplyError>) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u16, offset: u64, length: u32) -> [u8; REQUEST_HEADER] {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    #[test]
    fn requests_outside_the_disk_or_its_sectors_are_refused() {
        const SIZE: u64 = 1 << 20;
        let fits = |kind, offset, length| parse_request(&request(kind, offset, length)).unwrap().fits(SIZE);
        assert_eq!(fits(0, SIZE - 512, 512), Ok(()));
        assert_eq!(fits(0, SIZE - 512, 1024), Err(ReplyError::Invalid));
        assert_eq!(fits(1, SIZE, 512), Err(ReplyError::NoSpace));
        assert_eq!(fits(0, u64::MAX - 511, 512), Err(ReplyError::Invalid));
        assert_eq!(fits(0, 0, !511), Err(ReplyError::Invalid));
        assert_eq!(fits(0, 1, 512), Err(ReplyError::Invalid));
        assert_eq!(fits(0, 0, 100), Err(ReplyError::Invalid));
        assert_eq!(fits(0, 0, 0), Err(ReplyError::Invalid));
    }

    #[test]
    fn a_write_that_is_too_long_ends_the_connection_before_any_memory_is_taken() {
        assert_eq!(parse_request(&request(1, 0, u32::MAX)), Err(ProtocolError::WriteTooLong(u32::MAX)));
    }

    #[test]
    fn frames_with_wrong_magic_are_refused() {
        assert_eq!(parse_request(&[0; REQUEST_HEADER]), Err(ProtocolError::RequestMagic(0)));
        assert_eq!(parse_option_header(&[0; OPTION_HEADER]), Err(ProtocolError::OptionMagic(0)));
    }

    #[test]
    fn hostile_option_lengths_are_refused() {
        let mut header = [0; OPTION_HEADER];
        header[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(parse_option_header(&header), Err(ProtocolError::OptionTooLong(u32::MAX)));

        let data = |name_length: u32, rest: &[u8]| [&name_length.to_be_bytes()[..], rest].concat();
        assert_eq!(parse_export_name(&data(4, b"disk\0\0")), Ok("disk"));
        assert_eq!(parse_export_name(&data(4, b"disk\0\x01\0\x03")), Ok("disk"));
        for wrong in [
            data(u32::MAX, b"disk\0\0"),
            data(5, b"disk\0\0"),
            data(4, b"disk\0\x02\0\x03"),
            data(4, b"disk"),
            data(4, b"\xff\xff\xff\xff\0\0"),
            vec![],
        ] {
            assert_eq!(parse_export_name(&wrong), Err(ProtocolError::OptionData), "{wrong:?}");
        }
    }
}
