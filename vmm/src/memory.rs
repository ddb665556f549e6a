//! Guest RAM as devices see it.
//!
//! The dirty bitmap is part of the type from the first day: a write by a device is invisible to KVM's dirty log, and a
//! migration that misses one corrupts the guest in silence (reference peers-vmm §4.2, rule 2). One bit for a page of 4 KiB.
//!
//! RAM is of one of two kinds. Plain RAM is private and anonymous: taken from the host page by page as the guest touches it, and given back
//! by the balloon. [Reserved](huge_pages) RAM is a file of huge pages, all of which are there before the guest starts.

pub mod huge_pages;

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use self::huge_pages::{HugePagesError, Reserved};
use crate::machine::layout::Layout;

/// Guest RAM, mapped. Clones share the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// One contiguous range of guest RAM.
pub type GuestRegion = vm_memory::GuestRegionMmap<AtomicBitmap>;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot map {bytes} bytes of guest memory; does the host have that much?")]
    Map {
        bytes: u64,
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
}

/// Maps the RAM of a guest, zeroed: plain, or in what is reserved for it.
pub fn allocate(layout: &Layout, reserved: Option<&Reserved>) -> Result<GuestMemory, MemoryError> {
    let ram = layout.ram();
    let bytes = ram.iter().map(|window| window.size).sum();
    let pages = reserved.map(Reserved::take).transpose()?;
    let mut offset = 0;
    let mut ranges: Vec<(GuestAddress, usize, Option<FileOffset>)> = Vec::with_capacity(ram.len());
    for window in &ram {
        let place = pages.as_ref().map(|pages| FileOffset::from_arc(pages.file.clone(), offset));
        ranges.push((GuestAddress(window.base), window.size as usize, place));
        offset += window.size;
    }
    let memory = GuestMemory::from_ranges_with_files(&ranges).map_err(|source| MemoryError::Map { bytes, source })?;
    for region in memory.iter() {
        advise(region);
        if pages.as_ref().is_some_and(|pages| pages.were_used) {
            huge_pages::clear(region)?;
        }
    }
    Ok(memory)
}

/// Whether the RAM stays the guest's, whatever the guest says that it can spare.
pub fn is_reserved(memory: &GuestMemory) -> bool {
    memory.iter().any(|region| region.file_offset().is_some())
}

/// No guest RAM in a core dump, which also keeps the kernel from merging the mapping with a neighbour of ours, so that
/// `metrics::overhead_bytes` can tell them apart; and huge pages where the host gives them, if they are not huge by themselves.
fn advise(region: &GuestRegion) {
    let start = region.as_ptr().cast();
    let huge = region.file_offset().is_none().then_some(Advice::LinuxHugepage);
    for advice in [Advice::LinuxDontDump].into_iter().chain(huge) {
        // SAFETY: the range is the region's own mapping, and neither advice changes what it holds.
        if let Err(error) = unsafe { madvise(start, region.len() as usize, advice) } {
            tracing::debug!(%error, ?advice, "the host does not take this advice on guest memory");
        }
    }
}
