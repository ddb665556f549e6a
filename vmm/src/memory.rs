//! Guest RAM as devices see it.
//!
//! The dirty bitmap is part of the type from the first day: a write by a device is invisible to KVM's dirty log, and a
//! migration that misses one corrupts the guest in silence (reference peers-vmm §4.2, rule 2). One bit for a page of 4 KiB.

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::layout::Layout;

/// Guest RAM, mapped. Clones share the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// One contiguous range of guest RAM.
pub type GuestRegion = vm_memory::GuestRegionMmap<AtomicBitmap>;

#[derive(Debug, thiserror::Error)]
#[error("cannot map {bytes} bytes of guest memory; does the host have that much?")]
pub struct MemoryError {
    bytes: u64,
    #[source]
    source: vm_memory::mmap::FromRangesError,
}

/// Maps the RAM of a guest: zeroed, private, taken from the host page by page as the guest touches it.
pub fn allocate(layout: &Layout) -> Result<GuestMemory, MemoryError> {
    let ram = layout.ram();
    let ranges: Vec<(GuestAddress, usize)> = ram.iter().map(|w| (GuestAddress(w.base), w.size as usize)).collect();
    let memory = GuestMemory::from_ranges(&ranges)
        .map_err(|source| MemoryError { bytes: ram.iter().map(|w| w.size).sum(), source })?;
    for region in memory.iter() {
        advise(region);
    }
    Ok(memory)
}

/// Huge pages where the host gives them; and no guest RAM in a core dump, which also keeps the kernel from merging the mapping with
/// a neighbour of ours, so that `metrics::overhead_bytes` can tell them apart.
fn advise(region: &GuestRegion) {
    let start = region.as_ptr().cast();
    for advice in [Advice::LinuxDontDump, Advice::LinuxHugepage] {
        // SAFETY: the range is the region's own mapping, and neither advice changes what it holds.
        if let Err(error) = unsafe { madvise(start, region.len() as usize, advice) } {
            tracing::debug!(%error, ?advice, "the host does not take this advice on guest memory");
        }
    }
}
