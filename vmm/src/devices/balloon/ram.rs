//! Which memory is the guest's to give, and how the host takes it.

use std::io;

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::config::PAGE_BYTES;
use crate::machine::layout::{Layout, RangeKind, Window};
use crate::memory::GuestMemory;

/// What the memory map calls RAM, in order. Tables, the hole below 1 MiB and everything that is not memory are not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram(Vec<Window>);

/// Neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub base: u64,
    pub bytes: u64,
}

impl Ram {
    pub fn of(layout: &Layout) -> Self {
        Self(layout.memory_map().into_iter().filter(|(_, kind)| *kind == RangeKind::Ram).map(|(w, _)| w).collect())
    }

    #[cfg(test)]
    pub fn of_ranges(ranges: Vec<Window>) -> Self {
        Self(ranges)
    }

    /// Whether all of it is the guest's.
    pub fn holds(&self, run: Run) -> bool {
        let Some(end) = run.base.checked_add(run.bytes) else {
            return false;
        };
        self.0.iter().any(|range| run.base >= range.base && end <= range.end())
    }

    /// The pages among these that the guest may give, in runs; and how many it may not. A page that is named twice counts once.
    pub fn runs(&self, pages: &mut [u32]) -> (Vec<Run>, u64) {
        pages.sort_unstable();
        let (mut runs, mut refused): (Vec<Run>, u64) = (Vec::new(), 0);
        for (at, page) in pages.iter().enumerate() {
            if at > 0 && pages[at - 1] == *page {
                continue;
            }
            let run = Run { base: u64::from(*page) * PAGE_BYTES, bytes: PAGE_BYTES };
            if !self.holds(run) {
                refused += 1;
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.base + last.bytes == run.base => last.bytes += PAGE_BYTES,
                _ => runs.push(run),
            }
        }
        (runs, refused)
    }

    /// The whole pages of a range that the guest says is free, if all of it is the guest's.
    pub fn whole_pages(&self, base: u64, bytes: u64) -> Option<Run> {
        let end = base.checked_add(bytes)?;
        let first = base.checked_next_multiple_of(PAGE_BYTES)?;
        let bytes = (end / PAGE_BYTES * PAGE_BYTES).checked_sub(first).filter(|bytes| *bytes > 0)?;
        Some(Run { base: first, bytes }).filter(|run| self.holds(*run))
    }
}

/// Gives a run of guest memory back to the host. It reads as zeros afterwards.
pub fn discard(memory: &GuestMemory, run: Run) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::NotFound);
    let slices = memory.get_slices(GuestAddress(run.base), run.bytes as usize, Permissions::Write).map_err(gone)?;
    for slice in slices {
        let slice = slice.map_err(gone)?;
        let start = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the range is inside of a mapping that is guest RAM and nothing else, private and anonymous: it is filled with zeros
        // again when it is touched. References into guest RAM are volatile, so nothing of ours relies on what was there.
        unsafe { madvise(start, slice.len(), Advice::LinuxDontNeed) }?;
        // After the fact: who collects the bits in between sees this page again, and sends zeros then.
        slice.bitmap().mark_dirty(0, slice.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn tables_and_holes_are_not_the_guests_to_give() {
        let ram = Ram::of(&Layout::new(4096 * MIB, 4096 * MIB));
        let page = |address: u64| (address / PAGE_BYTES) as u32;
        for (address, given) in [
            (0, true),
            (0x9_e000, true),
            // Partly reserved.
            (0x9_f000, false),
            (0xa_0000, false),
            (0xe_0000, false),
            (crate::machine::layout::VM_GENERATION_ID, false),
            (0xf_f000, false),
            (MIB, true),
            (2048 * MIB - PAGE_BYTES, true),
            (2048 * MIB, false),
            (0xfec0_0000, false),
            (4096 * MIB, true),
            (6144 * MIB - PAGE_BYTES, true),
            (6144 * MIB, false),
            (u64::from(u32::MAX) * PAGE_BYTES, false),
        ] {
            let (runs, refused) = ram.runs(&mut [page(address)]);
            assert_eq!((runs.len() == 1, refused == 0), (given, given), "{address:#x}");
        }
    }

    #[test]
    fn neighbours_become_one_run_in_whatever_order_they_come() {
        let ram = Ram::of(&Layout::new(64 * MIB, 64 * MIB));
        let mut pages = [0x203, 0x200, 0x201, 0x203, 0x202, 0x300, 0x9f, 0x9f];
        let (runs, refused) = ram.runs(&mut pages);
        let run = |page: u64, pages: u64| Run { base: page * PAGE_BYTES, bytes: pages * PAGE_BYTES };
        assert_eq!((runs, refused), (vec![run(0x200, 4), run(0x300, 1)], 1));
    }

    #[test]
    fn of_a_range_only_whole_pages_are_taken() {
        let ram = Ram::of(&Layout::new(64 * MIB, 64 * MIB));
        let run = |base, bytes| Some(Run { base, bytes });
        assert_eq!(ram.whole_pages(MIB, 2 * MIB), run(MIB, 2 * MIB));
        assert_eq!(ram.whole_pages(MIB + 1, 3 * PAGE_BYTES), run(MIB + PAGE_BYTES, 2 * PAGE_BYTES));
        for (base, bytes) in
            [(MIB + 1, PAGE_BYTES), (MIB, 0), (0, MIB), (63 * MIB, 2 * MIB), (u64::MAX, 1), (1, u64::MAX)]
        {
            assert_eq!(ram.whole_pages(base, bytes), None, "{base:#x}+{bytes:#x}");
        }
    }

    proptest! {
        /// Whatever pages are named: the runs are in RAM, apart from each other, and hold each good page once.
        #[test]
        fn every_good_page_is_in_one_run(mut pages in prop::collection::vec(prop_oneof![0u32..0x2200, any::<u32>()], 0..300)) {
            let ram = Ram::of(&Layout::new(32 * MIB, 32 * MIB));
            let wanted: std::collections::BTreeSet<u32> = pages.iter().copied().collect();
            let (runs, refused) = ram.runs(&mut pages);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].base + pair[0].bytes < pair[1].base);
            }
            prop_assert!(runs.iter().all(|run| ram.holds(*run)));
            let given: Vec<u32> = runs
                .iter()
                .flat_map(|run| (0..run.bytes / PAGE_BYTES).map(|i| (run.base / PAGE_BYTES + i) as u32))
                .collect();
            prop_assert_eq!(given.len() as u64 + refused, wanted.len() as u64);
            prop_assert!(given.iter().all(|page| wanted.contains(page)));
        }
    }
}
