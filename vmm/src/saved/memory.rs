//! Guest RAM, to and from a stream.

use std::io::Write;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::dirty::PageRun;
use super::frame::{MAX_RUN_PAGES, PAGE_BYTES};
use super::stream::{GuestWriter, StreamError};
use crate::memory::GuestMemory;

static ZERO_PAGE: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];

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

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    pages: usize,
    is_zero: bool,
}

/// The runs of some whole pages: each as long as it can be.
fn runs(data: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (first, page) in data.chunks_exact(PAGE_BYTES as usize).enumerate() {
        let is_zero = page == ZERO_PAGE;
        match runs.last_mut() {
            Some(run) if run.is_zero == is_zero => run.pages += 1,
            _ => runs.push(Run { first, pages: 1, is_zero }),
        }
    }
    runs
}

/// Sends what some whole pages hold that is not zero: the target's memory is fresh.
fn send_pages<W: Write>(writer: &mut GuestWriter<W>, address: u64, data: &[u8]) -> Result<(), StreamError> {
    for run in runs(data).into_iter().filter(|run| !run.is_zero) {
        let start = run.first * PAGE_BYTES as usize;
        writer.pages(address + start as u64, &data[start..start + run.pages * PAGE_BYTES as usize])?;
    }
    Ok(())
}

/// Sends all of memory. `go_on` is told how many pages were looked at, and says whether somebody still wants them.
pub fn send_all<W: Write>(
    memory: &GuestMemory,
    writer: &mut GuestWriter<W>,
    mut go_on: impl FnMut(u64, &GuestWriter<W>) -> bool,
) -> Result<(), MemoryCopyError> {
    let mut seen = 0;
    let mut buffer = vec![0; (MAX_RUN_PAGES * PAGE_BYTES) as usize];
    for region in memory.iter() {
        let base = region.start_addr().raw_value();
        let pages = region.len() / PAGE_BYTES;
        for first in (0..pages).step_by(MAX_RUN_PAGES as usize) {
            if !go_on(seen, writer) {
                return Err(MemoryCopyError::GivenUp);
            }
            let now = (pages - first).min(MAX_RUN_PAGES);
            let at = base + first * PAGE_BYTES;
            let data = &mut buffer[..(now * PAGE_BYTES) as usize];
            let failed = |source| MemoryCopyError::Memory { address: at, source };
            memory.read_slice(data, GuestAddress(at)).map_err(failed)?;
            send_pages(writer, at, data)?;
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
    let mut buffer = vec![0; (MAX_RUN_PAGES * PAGE_BYTES) as usize];
    for PageRun { address, pages } in pages {
        if !go_on(seen, writer) {
            return Err(MemoryCopyError::GivenUp);
        }
        let data = &mut buffer[..(pages * PAGE_BYTES) as usize];
        let failed = |source| MemoryCopyError::Memory { address, source };
        memory.read_slice(data, GuestAddress(address)).map_err(failed)?;
        for run in runs(data) {
            let start = run.first * PAGE_BYTES as usize;
            match run.is_zero {
                true => writer.zeros(address + start as u64, run.pages as u64)?,
                false => writer.pages(address + start as u64, &data[start..start + run.pages * PAGE_BYTES as usize])?,
            }
        }
        seen += pages;
    }
    go_on(seen, writer);
    Ok(())
}

/// Puts pages in their place. The stream has checked that it is one.
pub fn put_pages(memory: &GuestMemory, address: u64, data: &[u8]) -> Result<(), MemoryCopyError> {
    memory.write_slice(data, GuestAddress(address)).map_err(|source| MemoryCopyError::Memory { address, source })
}

/// Clears pages. One that is zero already is only read, which takes no memory from the host.
pub fn put_zeros(memory: &GuestMemory, address: u64, pages: u64) -> Result<(), MemoryCopyError> {
    let mut page = [0; PAGE_BYTES as usize];
    for at in (0..pages).map(|nth| address + nth * PAGE_BYTES) {
        let failed = |source| MemoryCopyError::Memory { address: at, source };
        memory.read_slice(&mut page, GuestAddress(at)).map_err(failed)?;
        if page != ZERO_PAGE {
            memory.write_slice(&ZERO_PAGE, GuestAddress(at)).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::header::tests::header;
    use super::super::payload::{Payload, PayloadKind};
    use super::super::stream::{GuestReader, Item};
    use super::*;
    use crate::machine::layout::Layout;

    const PAGE: usize = PAGE_BYTES as usize;

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
                    source.write_slice(&[*value; PAGE], GuestAddress((page * PAGE) as u64)).unwrap();
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
