//! Which pages of a running guest are still to be sent: what it wrote itself, as KVM logs it, and what devices wrote for it, which KVM
//! does not see (rule 2 of reference peers-vmm §4.2).
//!
//! Both are asked for and cleared in one step, before a page is copied (rule 6): a write that comes in between is noted for the next time.
//! What was taken from them stays in here until it is sent (rule 3), and with a copy that fails all of it is worthless: the next one
//! begins with all of memory.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::frame::PAGE_BYTES;
use crate::machine::kvm::{KvmError, KvmVm};
use crate::memory::{GuestMemory, GuestRegion};

const WORD_PAGES: u64 = u64::BITS as u64;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    pub address: u64,
    pub pages: u64,
}

/// Some pages of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PageSet {
    base: u64,
    pages: u64,
    /// One bit a page, the lowest first.
    bits: Vec<u64>,
}

impl PageSet {
    fn new(base: u64, pages: u64) -> Self {
        Self { base, pages, bits: vec![0; pages.div_ceil(WORD_PAGES) as usize] }
    }

    /// Bits beyond the last page, and words beyond the last one, mean nothing.
    fn add(&mut self, bits: &[u64]) {
        for (word, more) in self.bits.iter_mut().zip(bits) {
            *word |= more;
        }
        let beyond = self.pages % WORD_PAGES;
        if let (Some(last), 1..) = (self.bits.last_mut(), beyond) {
            *last &= (1 << beyond) - 1;
        }
    }

    fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn has(&self, page: u64) -> bool {
        self.bits[(page / WORD_PAGES) as usize] >> (page % WORD_PAGES) & 1 == 1
    }

    /// The first page from `page` on that is in the set.
    fn next(&self, page: u64) -> Option<u64> {
        let mut at = page;
        while at < self.pages {
            let word = self.bits[(at / WORD_PAGES) as usize] >> (at % WORD_PAGES);
            if word != 0 {
                return Some(at + u64::from(word.trailing_zeros()));
            }
            at = (at / WORD_PAGES + 1) * WORD_PAGES;
        }
        None
    }

    /// Takes some neighbours out, from `page` on. Returns the first of them and their number.
    fn take_run(&mut self, page: u64, most: u64) -> Option<(u64, u64)> {
        let first = self.next(page)?;
        let mut end = first;
        while end < self.pages && end - first < most && self.has(end) {
            self.bits[(end / WORD_PAGES) as usize] &= !(1 << (end % WORD_PAGES));
            end += 1;
        }
        Some((first, end - first))
    }
}

/// The log of one copy. KVM's part of it is off again when this is dropped.
pub struct DirtyLog<'a> {
    vm: &'a KvmVm,
    memory: &'a GuestMemory,
    /// Found and not sent.
    pending: Vec<PageSet>,
}

impl<'a> DirtyLog<'a> {
    /// From here on every write is noted. What was written before is the first pass's part.
    pub fn start(vm: &'a KvmVm, memory: &'a GuestMemory) -> Result<Self, KvmError> {
        let sets = memory.iter().map(|region| PageSet::new(region.start_addr().raw_value(), region.len() / PAGE_BYTES));
        // Made first: it ends the log also where that was begun for a part of memory.
        let log = Self { vm, memory, pending: sets.collect() };
        vm.log_dirty_pages(memory, true)?;
        for region in memory.iter() {
            drop(device_writes(region));
        }
        Ok(log)
    }

    /// Asks for all that was written since. After an error nothing is lost but the order of time: ask again, or give up.
    pub fn collect(&mut self) -> Result<(), KvmError> {
        for (nth, (region, set)) in self.memory.iter().zip(&mut self.pending).enumerate() {
            set.add(&device_writes(region));
            set.add(&self.vm.take_dirty_pages(nth, region.len())?);
        }
        Ok(())
    }

    /// That are to be sent.
    pub fn pages(&self) -> u64 {
        self.pending.iter().map(PageSet::count).sum()
    }

    /// Hands out what is to be sent, in runs of so many pages at most, each page once.
    pub fn take(&mut self, most: u64) -> impl Iterator<Item = PageRun> {
        self.pending.iter_mut().flat_map(move |set| {
            let mut from = 0;
            std::iter::from_fn(move || {
                let (first, pages) = set.take_run(from, most)?;
                from = first + pages;
                Some(PageRun { address: set.base + first * PAGE_BYTES, pages })
            })
        })
    }
}

/// Read and cleared word by word, in one step each.
fn device_writes(region: &GuestRegion) -> Vec<u64> {
    let mapping: &MmapRegion<AtomicBitmap> = region;
    mapping.bitmap().get_and_reset()
}

impl Drop for DirtyLog<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(self.memory, false) {
            let error = crate::process::chain(&error);
            tracing::warn!(error, "the guest goes on slower than it could");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::kvm;
    use crate::machine::layout::Layout;
    use crate::memory;

    fn runs(log: &mut DirtyLog<'_>) -> Vec<(u64, u64)> {
        log.take(256).map(|run| (run.address, run.pages)).collect()
    }

    #[test]
    fn writes_of_devices_are_found_once_and_the_log_is_off_afterwards() {
        let Ok(kvm) = kvm::open() else {
            eprintln!("skipped: no KVM");
            return;
        };
        // Above the hole too: two regions.
        let layout = Layout::new(5 << 30, 5 << 30);
        let memory = memory::allocate(&layout, None).unwrap();
        let vm = KvmVm::new(&kvm, &memory).unwrap();
        let bytes = memory.iter().map(|region| region.len()).collect::<Vec<_>>();
        assert!(bytes.len() > 1);
        let is_logged = |region| vm.take_dirty_pages(region, bytes[region]).is_ok();
        assert!(!is_logged(0) && !is_logged(1));

        let high = memory.iter().nth(1).unwrap().start_addr().raw_value();
        memory.write_slice(b"before", GuestAddress(0x1000)).unwrap();
        let mut log = DirtyLog::start(&vm, &memory).unwrap();
        assert!(is_logged(0) && is_logged(1));
        log.collect().unwrap();
        assert_eq!(log.pages(), 0, "what was written before is sent with all the rest");
        memory.write_slice(&[1; 8192], GuestAddress(0x2800)).unwrap();
        memory.write_slice(b"there", GuestAddress(high + 0x5000)).unwrap();
        log.collect().unwrap();
        memory.write_slice(b"again", GuestAddress(0x3000)).unwrap();
        assert_eq!(log.pages(), 4);
        assert_eq!(runs(&mut log), [(0x2000, 3), (high + 0x5000, 1)]);
        assert_eq!(log.pages(), 0);
        log.collect().unwrap();
        assert_eq!(runs(&mut log), [(0x3000, 1)], "what came after the question is in the next answer");
        // A copy that ends in the middle.
        memory.write_slice(b"lost", GuestAddress(0x3000)).unwrap();
        log.collect().unwrap();
        drop(log);
        assert!(!is_logged(0) && !is_logged(1));
        drop(DirtyLog::start(&vm, &memory).unwrap());
        assert!(!is_logged(0) && !is_logged(1));
    }

    proptest! {
        /// However pages come in and wherever runs are cut: each comes out once, in order, and none beyond the end.
        #[test]
        fn pages_come_out_as_they_went_in(
            pages in 1u64..300,
            marked in proptest::collection::btree_set(0u64..320, 0..200),
            most in 1u64..20,
        ) {
            let mut set = PageSet::new(0, pages);
            let mut words = [0; 6];
            for page in &marked {
                words[(page / 64) as usize] |= 1 << (page % 64);
            }
            set.add(&words);
            let inside: BTreeSet<u64> = marked.into_iter().filter(|page| *page < pages).collect();
            prop_assert_eq!(set.count(), inside.len() as u64);
            let (mut from, mut found) = (0, Vec::new());
            while let Some((first, count)) = set.take_run(from, most) {
                prop_assert!(count >= 1 && count <= most);
                found.extend(first..first + count);
                from = first + count;
            }
            prop_assert_eq!(found, inside.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(set.count(), 0);
        }
    }
}
