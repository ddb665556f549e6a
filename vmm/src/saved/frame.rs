//! Frames: how a saved guest is cut into pieces that can be checked one by one.
//!
//! ```text
//! preamble   magic 8 | format version u32 | crc32c u32 of the 12 bytes before
//! frame      kind u32 | sequence u32 | length u32 | crc32c u32 of the 12 bytes before and the body | body
//! pages      address u64 | number u64 | xxh64 u64 of the pages | pages
//! ```
//!
//! Of a body of pages the frame's sum covers what is before them, and the pages' own sum them: xxh64, seed 0. It is made of plain
//! multiplications. CRC-32C has an instruction, which takes half the time on a processor (7 and 14 ms for 64 MiB) and thirty times as long
//! on an emulated one (763 and 26 ms, where copying takes 62), on which every test with a host runs. Format 1 summed all with it.
//!
//! Numbers are little endian. The sequence counts frames from 0, so that one that is missing, repeated or out of place is noticed
//! though each by itself is whole. The sums are against accidents, not against a peer that means harm: what a frame says is checked by
//! who uses it (reference peers-vmm §4.2, rule 24).

use std::io::{self, Read, Write};

use xxhash_rust::xxh64::xxh64;

/// The first bytes of every saved guest.
pub const MAGIC: [u8; 8] = *b"QUORSAVE";
/// Grows when an older reader would misunderstand a newer stream. What devices keep has versions of its own.
pub const FORMAT_VERSION: u32 = 2;
/// The oldest that is still read.
const OLDEST_FORMAT: u32 = 1;
pub const PAGE_BYTES: u64 = 4096;
/// Pages of one frame at most: a mebibyte.
pub const MAX_RUN_PAGES: u64 = 256;
/// All states of devices together.
pub const MAX_STATE_BYTES: u64 = 16 << 20;
pub const MAX_HEADER_BYTES: u64 = 512 << 10;
/// Words of a refusal.
pub const MAX_WORDS_BYTES: u64 = 4 << 10;

const PREAMBLE_BYTES: usize = 16;
const HEAD_BYTES: usize = 16;
/// Address and number of pages.
pub const RUN_HEAD_BYTES: usize = 16;
/// What is before pages: the head of their run, and their sum.
pub const PAGES_HEAD_BYTES: usize = RUN_HEAD_BYTES + 8;

/// Room that a reader makes before anything of a body is here.
const FIRST_ROOM_BYTES: usize = 64 << 10;

/// What is in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// What the guest needs to run: JSON.
    Header,
    /// A run of pages, whole, as format 1 has them: without a sum of their own.
    OldPages,
    /// A run of pages, whole.
    Pages,
    /// A run of pages that hold zeros.
    Zeros,
    /// The state of one device or processor: JSON.
    State,
    /// Totals. Nothing follows.
    End,
    /// From the other side: the header is such that the guest can run there.
    Accepted,
    /// From the other side: everything has arrived and is in its place.
    Loaded,
    /// From the other side: it takes no more, in words.
    Refused,
}

impl FrameKind {
    const ALL: [Self; 9] = [
        Self::Header,
        Self::OldPages,
        Self::Zeros,
        Self::State,
        Self::End,
        Self::Pages,
        Self::Accepted,
        Self::Loaded,
        Self::Refused,
    ];

    fn code(self) -> u32 {
        match self {
            Self::Header => 1,
            Self::OldPages => 2,
            Self::Zeros => 3,
            Self::State => 4,
            Self::End => 5,
            Self::Pages => 6,
            Self::Accepted => 16,
            Self::Loaded => 17,
            Self::Refused => 18,
        }
    }

    fn of(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// The longest body that a reader makes room for.
    fn limit(self) -> u64 {
        match self {
            Self::Header => MAX_HEADER_BYTES,
            Self::OldPages => RUN_HEAD_BYTES as u64 + MAX_RUN_PAGES * PAGE_BYTES,
            Self::Pages => PAGES_HEAD_BYTES as u64 + MAX_RUN_PAGES * PAGE_BYTES,
            Self::Zeros | Self::End => RUN_HEAD_BYTES as u64,
            Self::State => MAX_STATE_BYTES,
            Self::Accepted | Self::Loaded => 0,
            Self::Refused => MAX_WORDS_BYTES,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("this is not a saved guest: it begins with {found:02x?}")]
    Magic { found: [u8; 8] },
    #[error("the saved guest has format {found}; this program reads {OLDEST_FORMAT} to {FORMAT_VERSION}")]
    Format { found: u32 },
    #[error("the first bytes of the saved guest are damaged")]
    DamagedPreamble,
    #[error("frame {sequence} has the unknown kind {kind:#x}")]
    Kind { sequence: u32, kind: u32 },
    #[error("frame {found} comes where frame {expected} was due: a part is missing, or out of place")]
    Sequence { expected: u32, found: u32 },
    #[error("frame {sequence} ({kind:?}) says that it has {length} bytes; the most is {limit}")]
    TooLong { sequence: u32, kind: FrameKind, length: u64, limit: u64 },
    #[error("frame {sequence} ({kind:?}) is damaged")]
    Damaged { sequence: u32, kind: FrameKind },
    #[error("the saved guest ends in the middle")]
    Truncated,
    #[error("the saved guest cannot be read")]
    Read(#[source] io::Error),
    #[error("the saved guest cannot be written")]
    Write(#[source] io::Error),
}

fn read_error(error: io::Error) -> FrameError {
    if error.kind() == io::ErrorKind::UnexpectedEof { FrameError::Truncated } else { FrameError::Read(error) }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn pages_sum(pages: &[u8]) -> [u8; 8] {
    xxh64(pages, 0).to_le_bytes()
}

/// Writes frames.
pub struct FrameWriter<W> {
    out: W,
    sequence: u32,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Without a preamble: for answers, which travel the other way on a connection that was introduced.
    pub fn answers(out: W) -> Self {
        Self { out, sequence: 0, bytes: 0 }
    }

    /// Begins a saved guest.
    pub fn new(out: W) -> Result<Self, FrameError> {
        let mut preamble = [0; PREAMBLE_BYTES];
        preamble[..8].copy_from_slice(&MAGIC);
        preamble[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        let sum = crc32c::crc32c(&preamble[..12]);
        preamble[12..].copy_from_slice(&sum.to_le_bytes());
        let mut writer = Self::answers(out);
        writer.put(&preamble)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        self.out.write_all(bytes).map_err(FrameError::Write)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes a frame whose body is these parts, one behind the other.
    pub fn write(&mut self, kind: FrameKind, parts: &[&[u8]]) -> Result<(), FrameError> {
        self.frame(kind, parts, &[])
    }

    /// Writes a frame of pages.
    pub fn write_pages(&mut self, run: [u8; RUN_HEAD_BYTES], pages: &[u8]) -> Result<(), FrameError> {
        self.frame(FrameKind::Pages, &[&run, &pages_sum(pages)], pages)
    }

    /// Of the body, the frame's sum covers the parts and not the rest.
    fn frame(&mut self, kind: FrameKind, parts: &[&[u8]], rest: &[u8]) -> Result<(), FrameError> {
        let length = parts.iter().map(|part| part.len() as u64).sum::<u64>() + rest.len() as u64;
        if length > kind.limit() {
            return Err(FrameError::TooLong { sequence: self.sequence, kind, length, limit: kind.limit() });
        }
        let mut head = [0; HEAD_BYTES];
        head[..4].copy_from_slice(&kind.code().to_le_bytes());
        head[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        head[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        let sum = parts.iter().fold(crc32c::crc32c(&head[..12]), |sum, part| crc32c::crc32c_append(sum, part));
        head[12..].copy_from_slice(&sum.to_le_bytes());
        self.put(&head)?;
        for part in parts {
            self.put(part)?;
        }
        self.put(rest)?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    pub fn flush(&mut self) -> Result<(), FrameError> {
        self.out.flush().map_err(FrameError::Write)
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn into_inner(self) -> W {
        self.out
    }
}

/// Reads frames. After an error it is of no use.
pub struct FrameReader<R> {
    input: R,
    sequence: u32,
    /// The last body, and room behind it.
    body: Vec<u8>,
    bytes: u64,
}

impl<R: Read> FrameReader<R> {
    /// Without a preamble, as [`FrameWriter::answers`].
    pub fn answers(input: R) -> Self {
        Self { input, sequence: 0, body: Vec::new(), bytes: 0 }
    }

    /// Reads the preamble.
    pub fn new(input: R) -> Result<Self, FrameError> {
        let mut reader = Self::answers(input);
        let mut preamble = [0; PREAMBLE_BYTES];
        reader.take(&mut preamble)?;
        let mut magic = [0; 8];
        magic.copy_from_slice(&preamble[..8]);
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        if crc32c::crc32c(&preamble[..12]) != word(&preamble, 12) {
            return Err(FrameError::DamagedPreamble);
        }
        match word(&preamble, 8) {
            OLDEST_FORMAT..=FORMAT_VERSION => Ok(reader),
            found => Err(FrameError::Format { found }),
        }
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<(), FrameError> {
        self.input.read_exact(bytes).map_err(read_error)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// The next frame. Its body is the reader's until the next call.
    pub fn read(&mut self) -> Result<(FrameKind, &[u8]), FrameError> {
        let mut head = [0; HEAD_BYTES];
        self.take(&mut head)?;
        let expected = self.sequence;
        let (code, found, length, sum) = (word(&head, 0), word(&head, 4), word(&head, 8), word(&head, 12));
        let Some(kind) = FrameKind::of(code) else {
            return Err(FrameError::Kind { sequence: expected, kind: code });
        };
        let limit = kind.limit();
        if u64::from(length) > limit {
            return Err(FrameError::TooLong { sequence: expected, kind, length: length.into(), limit });
        }
        let mut body = std::mem::take(&mut self.body);
        self.fill(&mut body, length as usize)?;
        let all = &body[..length as usize];
        let is_summed = |part: &[u8]| crc32c::crc32c_append(crc32c::crc32c(&head[..12]), part) == sum;
        let is_whole = match (kind, all.split_at_checked(PAGES_HEAD_BYTES)) {
            (FrameKind::Pages, Some((head, pages))) => is_summed(head) && head[RUN_HEAD_BYTES..] == pages_sum(pages),
            (FrameKind::Pages, None) => false,
            _ => is_summed(all),
        };
        if !is_whole {
            return Err(FrameError::Damaged { sequence: expected, kind });
        }
        if found != expected {
            return Err(FrameError::Sequence { expected, found });
        }
        self.sequence = expected.wrapping_add(1);
        self.body = body;
        Ok((kind, &self.body[..length as usize]))
    }

    /// Reads so many bytes to the front of `body`. Its room grows with what arrives: a length alone takes no memory.
    fn fill(&mut self, body: &mut Vec<u8>, length: usize) -> Result<(), FrameError> {
        let mut got = 0;
        while got < length {
            if body.len() == got {
                body.resize(length.min((2 * got).max(FIRST_ROOM_BYTES)), 0);
            }
            let end = length.min(body.len());
            self.take(&mut body[got..end])?;
            got = end;
        }
        Ok(())
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Some frames of every kind that is not made by itself.
    fn frames() -> impl Strategy<Value = Vec<(FrameKind, Vec<u8>)>> {
        let body = proptest::collection::vec(any::<u8>(), 0..64);
        let kinds: Vec<FrameKind> = FrameKind::ALL.into_iter().filter(|kind| *kind != FrameKind::Pages).collect();
        let frame = (proptest::sample::select(kinds), body).prop_map(|(kind, mut body)| {
            body.truncate(kind.limit() as usize);
            (kind, body)
        });
        proptest::collection::vec(frame, 1..6)
    }

    fn write(frames: &[(FrameKind, Vec<u8>)]) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new()).unwrap();
        for (kind, body) in frames {
            let (front, back) = body.split_at(body.len() / 2);
            writer.write(*kind, &[front, back]).unwrap();
        }
        assert_eq!(writer.bytes(), writer.out.len() as u64);
        writer.into_inner()
    }

    /// As many frames as there are; the error says why there are no more.
    fn read(bytes: &[u8]) -> (Vec<(FrameKind, Vec<u8>)>, FrameError) {
        let mut found = Vec::new();
        let mut reader = match FrameReader::new(bytes) {
            Ok(reader) => reader,
            Err(error) => return (found, error),
        };
        loop {
            match reader.read() {
                Ok((kind, body)) => found.push((kind, body.to_vec())),
                Err(error) => return (found, error),
            }
        }
    }

    #[test]
    fn what_is_no_saved_guest_is_named() {
        assert!(matches!(read(b"\x7fELF and some more").1, FrameError::Magic { .. }));
        let mut other = write(&[]);
        other[8] = 3;
        let sum = crc32c::crc32c(&other[..12]);
        assert!(matches!(read(&other).1, FrameError::DamagedPreamble));
        other[12..16].copy_from_slice(&sum.to_le_bytes());
        assert!(matches!(read(&other).1, FrameError::Format { found: 3 }));
    }

    #[test]
    fn a_length_beyond_the_bound_takes_no_memory() {
        let mut bytes = write(&[(FrameKind::Header, b"{}".to_vec())]);
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&bytes).1, FrameError::TooLong { kind: FrameKind::Header, .. }));
        let too_long = vec![0; MAX_WORDS_BYTES as usize + 1];
        let refused = FrameWriter::answers(Vec::new()).write(FrameKind::Refused, &[&too_long]);
        assert!(matches!(refused, Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_body_that_does_not_arrive_takes_little_memory() {
        let mut bytes = write(&[(FrameKind::State, vec![1; MAX_STATE_BYTES as usize])]);
        for (arrives, most) in [(200 << 10, 512 << 10), (10, FIRST_ROOM_BYTES)] {
            bytes.truncate(PREAMBLE_BYTES + HEAD_BYTES + arrives);
            let mut reader = FrameReader::new(&bytes[..]).unwrap();
            let mut body = Vec::new();
            assert!(matches!(reader.fill(&mut body, MAX_STATE_BYTES as usize), Err(FrameError::Truncated)));
            assert!(body.capacity() <= most, "{} for {arrives}", body.capacity());
        }
    }

    #[test]
    fn frames_of_the_format_before_are_read() {
        let mut bytes = write(&[(FrameKind::OldPages, vec![7; 40])]);
        bytes[8] = 1;
        let sum = crc32c::crc32c(&bytes[..12]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(read(&bytes).0, [(FrameKind::OldPages, vec![7; 40])]);
    }

    #[test]
    fn pages_without_room_for_their_sum_are_damaged() {
        let short = write(&[(FrameKind::Pages, vec![0; PAGES_HEAD_BYTES - 1])]);
        assert!(matches!(read(&short).1, FrameError::Damaged { kind: FrameKind::Pages, .. }));
    }

    proptest! {
        #[test]
        fn pages_come_back_and_every_bit_of_them_counts(
            pages in proptest::collection::vec(any::<u8>(), 0..600), at: prop::sample::Index, bit in 0..8
        ) {
            let mut writer = FrameWriter::new(Vec::new()).unwrap();
            writer.write_pages([3; RUN_HEAD_BYTES], &pages).unwrap();
            let mut bytes = writer.into_inner();
            let (found, _) = read(&bytes);
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(&found[0].1[PAGES_HEAD_BYTES..], &pages[..]);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(read(&bytes).0.is_empty());
        }

        #[test]
        fn frames_come_back(frames in frames()) {
            let (found, end) = read(&write(&frames));
            prop_assert_eq!(found, frames);
            prop_assert!(matches!(end, FrameError::Truncated));
        }

        #[test]
        fn a_flipped_bit_is_an_error_and_what_came_before_it_is_right(frames in frames(), at: prop::sample::Index, bit in 0..8) {
            let mut bytes = write(&frames);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            let (found, end) = read(&bytes);
            prop_assert!(found.len() < frames.len());
            prop_assert_eq!(&found[..], &frames[..found.len()]);
            // A longer length may run into the end; nothing else looks like one.
            prop_assert!(found.len() < frames.len(), "{end}");
        }

        #[test]
        fn a_cut_stream_is_an_error_and_what_came_before_it_is_right(frames in frames(), at: prop::sample::Index) {
            let bytes = write(&frames);
            let (found, end) = read(&bytes[..at.index(bytes.len())]);
            prop_assert!(found.len() < frames.len());
            prop_assert_eq!(&found[..], &frames[..found.len()]);
            prop_assert!(matches!(end, FrameError::Truncated));
        }

        #[test]
        fn frames_out_of_place_are_noticed(frames in frames(), at: prop::sample::Index) {
            let at = at.index(frames.len());
            let one = |sequence: u32, frame: &(FrameKind, Vec<u8>)| {
                let mut writer = FrameWriter { out: Vec::new(), sequence, bytes: 0 };
                writer.write(frame.0, &[&frame.1]).unwrap();
                writer.into_inner()
            };
            // The frame at `at` is left out.
            let mut bytes = write(&frames[..at]);
            bytes.extend(one(at as u32 + 1, &frames[at]));
            let (found, end) = read(&bytes);
            prop_assert_eq!(found.len(), at);
            let noticed = matches!(end, FrameError::Sequence { .. });
            prop_assert!(noticed);
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut introduced = write(&[]);
            introduced.extend(&bytes);
            read(&introduced);
            read(&bytes);
        }
    }
}
