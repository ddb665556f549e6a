//! Guest RAM, to and from a stream.
//!
//! The guest may write to a page while it is looked at, or copied: what of it arrives then is unimportant, as the dirty log has the page
//! sent again. What is summed and sent is always a copy.

use std::io::Write;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, VolatileMemory,
    VolatileMemoryError, VolatileSlice,
};

use super::dirty::PageRun;
use super::frame::{MAX_RUN_PAGES, PAGE_BYTES};
use super::stream::{GuestWriter, StreamError};
use crate::memory::GuestMemory;

const PAGE: usize = PAGE_BYTES as usize;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];
/// The C library copies more than this in one string instruction, which is as fast as any on a real processor and four times slower than
/// words on an emulated one: 145 ms for 64 MiB, not 32.
const PIECE: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum MemoryCopyError {
    #[error("guest memory at {address:#x} cannot be reached")]
    Memory {
        address: u64,
        #[source]
        source: GuestMemoryError,
    },
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("saving was given up")]
    GivenUp,
}

/// Whole pages of guest memory that follow each other, where they lie.
struct Pages<'a> {
    address: u64,
    slice: VolatileSlice<'a, BS<'a, AtomicBitmap>>,
}

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    pages: usize,
    is_zero: bool,
}

impl<'a> Pages<'a> {
    fn at(memory: &'a GuestMemory, address: u64, bytes: usize) -> Result<Self, MemoryCopyError> {
        let failed = |source| MemoryCopyError::Memory { address, source };
        Ok(Self { address, slice: memory.get_slice(GuestAddress(address), bytes).map_err(failed)? })
    }

    fn part(&self, offset: usize, bytes: usize) -> Result<VolatileSlice<'a, BS<'a, AtomicBitmap>>, MemoryCopyError> {
        let failed = |error: VolatileMemoryError| MemoryCopyError::Memory {
            address: self.address + offset as u64,
            source: error.into(),
        };
        self.slice.subslice(offset, bytes).map_err(failed)
    }

    /// A page that is not zero is mostly known by its first words.
    fn is_zero(&self, page: usize) -> Result<bool, MemoryCopyError> {
        let failed =
            |error: VolatileMemoryError| MemoryCopyError::Memory { address: self.address, source: error.into() };
        let words = self.slice.get_array_ref::<u64>(page * PAGE, PAGE / 8).map_err(failed)?;
        Ok((0..words.len()).all(|nth| words.load(nth) == 0))
    }

    /// The runs of these pages: each as long as it can be.
    fn runs(&self) -> Result<Vec<Run>, MemoryCopyError> {
        let mut runs: Vec<Run> = Vec::new();
        for first in 0..self.slice.len() / PAGE {
            let is_zero = self.is_zero(first)?;
            match runs.last_mut() {
                Some(run) if run.is_zero == is_zero => run.pages += 1,
                _ => runs.push(Run { first, pages: 1, is_zero }),
            }
        }
        Ok(runs)
    }

    /// A copy of a run in `buffer`, which has room for it.
    fn copy<'b>(&self, run: Run, buffer: &'b mut [u8]) -> Result<&'b [u8], MemoryCopyError> {
        let (start, data) = (run.first * PAGE, &mut buffer[..run.pages * PAGE]);
        for (nth, piece) in data.chunks_mut(PIECE).enumerate() {
            self.part(start + nth * PIECE, piece.len())?.copy_to(piece);
        }
        Ok(data)
    }

    fn fill(&self, data: &[u8]) -> Result<(), MemoryCopyError> {
        for (nth, piece) in data.chunks(PIECE).enumerate() {
            self.part(nth * PIECE, piece.len())?.copy_from(piece);
        }
        Ok(())
    }
}

fn buffer() -> Vec<u8> {
    vec![0; (MAX_RUN_PAGES * PAGE_BYTES) as usize]
}

/// Sends all of memory that is not zero: the target's is fresh. `go_on` is told how many pages were looked at, and says whether somebody
/// still wants them.
pub fn send_all<W: Write>(
    memory: &GuestMemory,
    writer: &mut GuestWriter<W>,
    mut go_on: impl FnMut(u64, &GuestWriter<W>) -> bool,
) -> Result<(), MemoryCopyError> {
    let mut seen = 0;
    let mut buffer = buffer();
    for region in memory.iter() {
        let base = region.start_addr().raw_value();
        let pages = region.len() / PAGE_BYTES;
        for first in (0..pages).step_by(MAX_RUN_PAGES as usize) {
            if !go_on(seen, writer) {
                return Err(MemoryCopyError::GivenUp);
            }
            let now = (pages - first).min(MAX_RUN_PAGES);
            let found = Pages::at(memory, base + first * PAGE_BYTES, now as usize * PAGE)?;
            for run in found.runs()?.into_iter().filter(|run| !run.is_zero) {
                writer.pages(found.address + (run.first * PAGE) as u64, found.copy(run, &mut buffer)?)?;
            }
            seen += now;
        }
    }
    go_on(seen, writer);
    Ok(())
}

/// Sends pages that may have been sent before, so that those which are zero by now are told to be. Runs have at most [`MAX_RUN_PAGES`].
/// `go_on` is told how many pages were looked at, and says whether somebody still wants them.
pub fn send_again<W: Write>(
    memory: &GuestMemory,
    writer: &mut GuestWriter<W>,
    pages: impl Iterator<Item = PageRun>,
    mut go_on: impl FnMut(u64, &GuestWriter<W>) -> bool,
) -> Result<(), MemoryCopyError> {
    let mut seen = 0;
    let mut buffer = buffer();
    for PageRun { address, pages } in pages {
        if !go_on(seen, writer) {
            return Err(MemoryCopyError::GivenUp);
        }
        let found = Pages::at(memory, address, pages as usize * PAGE)?;
        for run in found.runs()? {
            let at = address + (run.first * PAGE) as u64;
            match run.is_zero {
                true => writer.zeros(at, run.pages as u64)?,
                false => writer.pages(at, found.copy(run, &mut buffer)?)?,
            }
        }
        seen += pages;
    }
    go_on(seen, writer);
    Ok(())
}

/// Puts pages in their place. The stream has checked that it is one.
pub fn put_pages(memory: &GuestMemory, address: u64, data: &[u8]) -> Result<(), MemoryCopyError> {
    Pages::at(memory, address, data.len())?.fill(data)
}

/// Clears pages. One that is zero already is only read, which takes no memory from the host.
pub fn put_zeros(memory: &GuestMemory, address: u64, pages: u64) -> Result<(), MemoryCopyError> {
    for nth in 0..pages {
        let page = Pages::at(memory, address + nth * PAGE_BYTES, PAGE)?;
        if !page.is_zero(0)? {
            page.fill(&ZERO_PAGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::super::header::tests::header;
    use super::super::payload::{Payload, PayloadKind};
    use super::super::stream::{GuestReader, Item};
    use super::*;
    use crate::machine::layout::Layout;

    fn memory(layout: &Layout) -> GuestMemory {
        let ranges: Vec<_> = layout.ram().iter().map(|w| (GuestAddress(w.base), w.size as usize)).collect();
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    fn contents(memory: &GuestMemory) -> Vec<u8> {
        let mut all = Vec::new();
        for region in memory.iter() {
            let mut data = vec![0; region.len() as usize];
            memory.read_slice(&mut data, region.start_addr()).unwrap();
            all.extend(data);
        }
        all
    }

    fn receive(bytes: &[u8], memory: &GuestMemory, layout: &Layout) {
        let (_, mut reader) = GuestReader::start(bytes).unwrap();
        reader.accept(layout);
        loop {
            match reader.item().unwrap() {
                Item::Pages { address, data } => put_pages(memory, address, data).unwrap(),
                Item::Zeros { address, pages } => put_zeros(memory, address, pages).unwrap(),
                Item::State(_) => {}
                Item::End => return,
            }
        }
    }

    fn end(writer: &mut GuestWriter<Vec<u8>>) {
        writer.state(&Payload::new(PayloadKind::Pit, 0, &0).unwrap()).unwrap();
        writer.end().unwrap();
    }

    #[test]
    fn untouched_memory_costs_nothing() {
        let layout = Layout::new(16 << 20, 16 << 20);
        let source = memory(&layout);
        source.write_slice(b"here", GuestAddress(0x3ffe)).unwrap();
        let mut writer = GuestWriter::start(Vec::new(), &header()).unwrap();
        let mut last = 0;
        send_all(&source, &mut writer, |pages, _| {
            last = pages;
            true
        })
        .unwrap();
        assert_eq!((writer.totals().pages, last), (2, 4096));
        end(&mut writer);
        let target = memory(&layout);
        receive(&writer.into_inner(), &target, &layout);
        assert_eq!(contents(&target), contents(&source));

        let mut writer = GuestWriter::start(Vec::new(), &header()).unwrap();
        assert!(matches!(send_all(&source, &mut writer, |pages, _| pages < 512), Err(MemoryCopyError::GivenUp)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// A first pass, changes that make pages zero and not zero, and a second pass over what changed: equal memories.
        #[test]
        fn memory_comes_back_after_any_changes(
            first in proptest::collection::vec((4000usize..4096, 1u8..), 0..60),
            second in proptest::collection::vec((4000usize..4096, 0u8..4), 0..60),
        ) {
            let layout = Layout::new(16 << 20, 16 << 20);
            let source = memory(&layout);
            let fill = |changes: &[(usize, u8)]| {
                for (page, value) in changes {
                    let content: [u8; PAGE] = std::array::from_fn(|at| value.wrapping_mul((at / 1000 + 1) as u8));
                    source.write_slice(&content, GuestAddress((page * PAGE) as u64)).unwrap();
                }
            };
            fill(&first);
            let mut writer = GuestWriter::start(Vec::new(), &header()).unwrap();
            send_all(&source, &mut writer, |_, _| true).unwrap();
            fill(&second);
            let changed = second.iter().map(|(page, _)| PageRun { address: (page * PAGE) as u64, pages: 1 });
            // And neighbours with them, some of which are zero.
            let changed = changed.chain([PageRun { address: 4032 << 12, pages: 64 }]);
            send_again(&source, &mut writer, changed, |_, _| true).unwrap();
            end(&mut writer);
            let target = memory(&layout);
            receive(&writer.into_inner(), &target, &layout);
            prop_assert!(contents(&target) == contents(&source));
        }
    }
}
