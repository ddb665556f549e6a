//! A saved guest as a stream: header, memory, states, end, in this order and no other.
//!
//! The same for a file and for a connection to another host. Memory may come more than once: a page that changed after it was sent is
//! sent again, and the last one counts. The target begins with memory of zeros, so a page of zeros is only told when it was something
//! else before. States are read when all memory is there, because they point into it; that they were *taken* before the last pages is
//! the writer's part (reference peers-vmm §4.2, rule 4).

use std::io::{self, Read, Write};

use super::frame::{
    FrameError, FrameKind, FrameReader, FrameWriter, MAX_RUN_PAGES, MAX_STATE_BYTES, PAGE_BYTES, PAGES_HEAD_BYTES,
    RUN_HEAD_BYTES,
};
use super::header::{Header, HeaderError};
use super::payload::Payload;
use crate::machine::layout::{Layout, Window};

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("a frame of kind {kind:?} has no place {place}")]
    OutOfPlace { kind: FrameKind, place: &'static str },
    #[error("a frame of kind {kind:?} has {length} bytes, which is no whole number of what it holds")]
    Length { kind: FrameKind, length: usize },
    #[error("{pages} pages at {address:#x} are not guest memory")]
    NotMemory { address: u64, pages: u64 },
    #[error("a state of {bytes} bytes is the one too many: all together may have {MAX_STATE_BYTES}")]
    TooMuchState { bytes: u64 },
    #[error("a state cannot be read")]
    State(#[source] serde_json::Error),
    #[error("the end counts {said} {what}, {found} have come")]
    Totals { what: &'static str, said: u64, found: u64 },
    #[error("something follows the end of the saved guest")]
    Trailing,
}

/// What has been written or read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages with their content.
    pub pages: u64,
    /// Pages told to be zero.
    pub zeros: u64,
}

fn run_head(address: u64, pages: u64) -> [u8; RUN_HEAD_BYTES] {
    let mut head = [0; RUN_HEAD_BYTES];
    head[..8].copy_from_slice(&address.to_le_bytes());
    head[8..].copy_from_slice(&pages.to_le_bytes());
    head
}

fn two_words(body: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
    Some((word(0)?, word(8)?))
}

/// Writes a guest. Its caller keeps the order.
pub struct GuestWriter<W> {
    frames: FrameWriter<W>,
    totals: Totals,
    state_bytes: u64,
}

impl<W: Write> GuestWriter<W> {
    pub fn start(out: W, header: &Header) -> Result<Self, StreamError> {
        let mut frames = FrameWriter::new(out)?;
        frames.write(FrameKind::Header, &[&header.encode()])?;
        frames.flush()?;
        Ok(Self { frames, totals: Totals::default(), state_bytes: 0 })
    }

    /// At most [`MAX_RUN_PAGES`] whole pages.
    pub fn pages(&mut self, address: u64, data: &[u8]) -> Result<(), StreamError> {
        let pages = data.len() as u64 / PAGE_BYTES;
        self.frames.write_pages(run_head(address, pages), data)?;
        self.totals.pages += pages;
        Ok(())
    }

    pub fn zeros(&mut self, address: u64, pages: u64) -> Result<(), StreamError> {
        self.frames.write(FrameKind::Zeros, &[&run_head(address, pages)])?;
        self.totals.zeros += pages;
        Ok(())
    }

    pub fn state(&mut self, payload: &Payload) -> Result<(), StreamError> {
        let body = serde_json::to_vec(payload).map_err(StreamError::State)?;
        self.state_bytes += body.len() as u64;
        if self.state_bytes > MAX_STATE_BYTES {
            return Err(StreamError::TooMuchState { bytes: body.len() as u64 });
        }
        Ok(self.frames.write(FrameKind::State, &[&body])?)
    }

    /// Hands over what the buffers below hold.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        Ok(self.frames.flush()?)
    }

    pub fn end(&mut self) -> Result<(), StreamError> {
        let Totals { pages, zeros } = self.totals;
        self.frames.write(FrameKind::End, &[&run_head(pages, zeros)])?;
        Ok(self.frames.flush()?)
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn bytes(&self) -> u64 {
        self.frames.bytes()
    }

    pub fn into_inner(self) -> W {
        self.frames.into_inner()
    }
}

/// One piece of a guest.
#[derive(Debug, PartialEq)]
pub enum Item<'a> {
    Pages { address: u64, data: &'a [u8] },
    Zeros { address: u64, pages: u64 },
    State(Payload),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Memory,
    States,
    Ended,
}

impl Place {
    fn words(self) -> &'static str {
        match self {
            Self::Memory => "in the memory",
            Self::States => "behind the first state",
            Self::Ended => "behind the end",
        }
    }
}

/// Reads a guest, and hands out nothing that is out of place or out of bounds.
pub struct GuestReader<R> {
    frames: FrameReader<R>,
    place: Place,
    /// Empty until the header was accepted.
    ram: Vec<Window>,
    totals: Totals,
    state_bytes: u64,
}

impl<R: Read> GuestReader<R> {
    /// Reads the header, which the caller has to check before anything else.
    pub fn start(input: R) -> Result<(Header, Self), StreamError> {
        let mut frames = FrameReader::new(input)?;
        let header = match frames.read()? {
            (FrameKind::Header, body) => Header::decode(body)?,
            (kind, _) => return Err(StreamError::OutOfPlace { kind, place: "before the header" }),
        };
        let (totals, state_bytes) = (Totals::default(), 0);
        Ok((header, Self { frames, place: Place::Memory, ram: Vec::new(), totals, state_bytes }))
    }

    /// The header was accepted: this is where memory may be.
    pub fn accept(&mut self, layout: &Layout) {
        self.ram = layout.ram();
    }

    pub fn item(&mut self) -> Result<Item<'_>, StreamError> {
        let place = self.place;
        let (kind, body) = self.frames.read()?;
        match (kind, place) {
            (FrameKind::Pages | FrameKind::OldPages, Place::Memory) => {
                let (address, pages) = two_words(body).ok_or(StreamError::Length { kind, length: body.len() })?;
                let data = &body[if kind == FrameKind::Pages { PAGES_HEAD_BYTES } else { RUN_HEAD_BYTES }..];
                if pages > MAX_RUN_PAGES || data.len() as u64 != pages * PAGE_BYTES {
                    return Err(StreamError::Length { kind, length: body.len() });
                }
                check_run(&self.ram, address, pages)?;
                self.totals.pages += pages;
                Ok(Item::Pages { address, data })
            }
            (FrameKind::Zeros, Place::Memory) => {
                let (address, pages) = two_words(body).ok_or(StreamError::Length { kind, length: body.len() })?;
                check_run(&self.ram, address, pages)?;
                // Each run is bounded by memory, and their number by the bytes that came.
                self.totals.zeros = self.totals.zeros.saturating_add(pages);
                Ok(Item::Zeros { address, pages })
            }
            (FrameKind::State, Place::Memory | Place::States) => {
                self.place = Place::States;
                self.state_bytes += body.len() as u64;
                if self.state_bytes > MAX_STATE_BYTES {
                    return Err(StreamError::TooMuchState { bytes: body.len() as u64 });
                }
                serde_json::from_slice(body).map(Item::State).map_err(StreamError::State)
            }
            (FrameKind::End, Place::States) => {
                self.place = Place::Ended;
                let (pages, zeros) = two_words(body).ok_or(StreamError::Length { kind, length: body.len() })?;
                for (what, said, found) in
                    [("pages", pages, self.totals.pages), ("pages of zeros", zeros, self.totals.zeros)]
                {
                    if said != found {
                        return Err(StreamError::Totals { what, said, found });
                    }
                }
                Ok(Item::End)
            }
            (kind, place) => Err(StreamError::OutOfPlace { kind, place: place.words() }),
        }
    }

    /// Whether nothing follows the end: a file is over, and a connection that does not block has nothing to read.
    pub fn nothing_follows(&mut self) -> Result<(), StreamError> {
        match self.frames.input().read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(StreamError::Trailing),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(FrameError::Read(error).into()),
        }
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn bytes(&self) -> u64 {
        self.frames.bytes()
    }

    pub fn input(&mut self) -> &mut R {
        self.frames.input()
    }
}

/// Whether a run lies in one range of RAM, on page boundaries, and is not empty.
fn check_run(ram: &[Window], address: u64, pages: u64) -> Result<(), StreamError> {
    let bytes = pages.checked_mul(PAGE_BYTES).filter(|bytes| *bytes > 0);
    let end = bytes.and_then(|bytes| address.checked_add(bytes));
    let inside = end.is_some_and(|end| ram.iter().any(|window| address >= window.base && end <= window.end()));
    if inside && address.is_multiple_of(PAGE_BYTES) { Ok(()) } else { Err(StreamError::NotMemory { address, pages }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::header::tests::header;
    use super::super::payload::PayloadKind;
    use super::*;

    const MEMORY: u64 = 32 << 20;

    fn layout() -> Layout {
        Layout::new(MEMORY, MEMORY)
    }

    fn write(build: impl FnOnce(&mut GuestWriter<Vec<u8>>)) -> Vec<u8> {
        let mut writer = GuestWriter::start(Vec::new(), &header()).unwrap();
        build(&mut writer);
        writer.into_inner()
    }

    fn state() -> Payload {
        Payload::new(PayloadKind::Pit, 0, &1u32).unwrap()
    }

    fn whole() -> Vec<u8> {
        write(|w| {
            w.pages(0x1000, &[7; 8192]).unwrap();
            w.zeros(0x20_0000, 3).unwrap();
            w.pages(0x1000, &[8; 4096]).unwrap();
            w.state(&state()).unwrap();
            w.end().unwrap();
        })
    }

    /// Reads to the end: what came, in words, or why not.
    fn read(bytes: &[u8]) -> Result<Vec<String>, StreamError> {
        let (_, mut reader) = GuestReader::start(bytes)?;
        reader.accept(&layout());
        let mut items = Vec::new();
        loop {
            match reader.item()? {
                Item::Pages { address, data } => items.push(format!("{address:#x}+{:#x} of {}", data.len(), data[0])),
                Item::Zeros { address, pages } => items.push(format!("{address:#x}+{pages} zeros")),
                Item::State(payload) => items.push(payload.kind.to_string()),
                Item::End => break,
            }
        }
        reader.nothing_follows()?;
        Ok(items)
    }

    #[test]
    fn a_guest_comes_back_in_its_order() {
        let items = read(&whole()).unwrap();
        assert_eq!(items, ["0x1000+0x2000 of 7", "0x200000+3 zeros", "0x1000+0x1000 of 8", "timer chip"]);
    }

    #[test]
    fn nothing_is_taken_out_of_its_place() {
        let late = write(|w| {
            w.state(&state()).unwrap();
            w.pages(0, &[0; 4096]).unwrap();
        });
        assert!(matches!(read(&late), Err(StreamError::OutOfPlace { kind: FrameKind::Pages, .. })));
        let no_state = write(|w| w.end().unwrap());
        assert!(matches!(read(&no_state), Err(StreamError::OutOfPlace { kind: FrameKind::End, .. })));
        let two_headers = write(|w| w.frames.write(FrameKind::Header, &[b"{}"]).unwrap());
        assert!(matches!(read(&two_headers), Err(StreamError::OutOfPlace { kind: FrameKind::Header, .. })));
        let mut more = whole();
        more.push(0);
        assert!(matches!(read(&more), Err(StreamError::Trailing)));
        let mut headless = FrameWriter::new(Vec::new()).unwrap();
        headless.write(FrameKind::End, &[]).unwrap();
        let headless = headless.into_inner();
        assert!(matches!(read(&headless), Err(StreamError::OutOfPlace { kind: FrameKind::End, .. })));
    }

    #[test]
    fn memory_is_bounded_by_the_layout() {
        let runs =
            [(MEMORY, 1), (MEMORY - PAGE_BYTES, 2), (0x800, 1), (0, 0), (u64::MAX - 4095, 1), (0x1000, u64::MAX)];
        for (address, pages) in runs {
            let bytes = write(|w| w.zeros(address, pages).unwrap());
            assert!(matches!(read(&bytes), Err(StreamError::NotMemory { .. })), "{address:#x} {pages}");
        }
        let bytes = write(|w| w.pages(MEMORY - PAGE_BYTES, &[1; 8192]).unwrap());
        assert!(matches!(read(&bytes), Err(StreamError::NotMemory { .. })));
        // Before the header was accepted there is no memory at all.
        let whole = whole();
        let (_, mut reader) = GuestReader::start(&whole[..]).unwrap();
        assert!(matches!(reader.item(), Err(StreamError::NotMemory { .. })));
    }

    #[test]
    fn lengths_totals_and_sizes_are_checked() {
        let short = write(|w| w.frames.write_pages(run_head(0, 1), &[0; 4095]).unwrap());
        assert!(matches!(read(&short), Err(StreamError::Length { .. })));
        let short = write(|w| w.frames.write(FrameKind::OldPages, &[&run_head(0, 1), &[0; 4095]]).unwrap());
        assert!(matches!(read(&short), Err(StreamError::Length { .. })));
        let headless = write(|w| w.frames.write(FrameKind::Zeros, &[&[0; 15]]).unwrap());
        assert!(matches!(read(&headless), Err(StreamError::Length { .. })));
        let huge = write(|w| w.frames.write_pages(run_head(0, 1 << 52), &[]).unwrap());
        assert!(matches!(read(&huge), Err(StreamError::Length { .. })));
        let liar = write(|w| {
            w.state(&state()).unwrap();
            w.totals.pages = 1;
            w.end().unwrap();
        });
        assert!(matches!(read(&liar), Err(StreamError::Totals { what: "pages", said: 1, found: 0 })));
        let no_json = write(|w| w.frames.write(FrameKind::State, &[b"{"]).unwrap());
        assert!(matches!(read(&no_json), Err(StreamError::State(_))));
    }

    #[test]
    fn states_are_bounded_together() {
        let half = Payload::new(PayloadKind::Pci, 0, &"x".repeat(MAX_STATE_BYTES as usize / 2)).unwrap();
        let mut writer = GuestWriter::start(Vec::new(), &header()).unwrap();
        writer.state(&half).unwrap();
        assert!(matches!(writer.state(&half), Err(StreamError::TooMuchState { .. })));
        writer.state_bytes = 0;
        writer.state(&half).unwrap();
        assert!(matches!(read(&writer.into_inner()), Err(StreamError::TooMuchState { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Every byte of a saved guest matters.
        #[test]
        fn a_changed_guest_is_refused(at: prop::sample::Index, flip in 1u8..) {
            let mut bytes = whole();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn a_cut_guest_is_refused(at: prop::sample::Index) {
            let bytes = whole();
            prop_assert!(read(&bytes[..at.index(bytes.len())]).is_err());
        }

        /// Frames that are whole but make no sense: an error at the latest at the end, never a panic.
        #[test]
        fn hostile_frames_are_survived(
            frames in proptest::collection::vec((0usize..6, any::<u64>(), 0u64..1 << 14, 0usize..9000), 0..6)
        ) {
            let bytes = write(|w| {
                for (kind, address, pages, len) in frames {
                    use FrameKind::*;
                    let kind = [Header, OldPages, Zeros, State, End, Pages][kind];
                    let head = run_head(address & (MEMORY | 0xfff_ffff), pages);
                    let body = vec![0; if matches!(kind, Pages | OldPages | State) { len } else { 0 }];
                    match kind {
                        Pages => w.frames.write_pages(head, &body).unwrap(),
                        _ => w.frames.write(kind, &[&head, &body]).unwrap(),
                    }
                }
            });
            prop_assert!(read(&bytes).is_err());
        }
    }
}
