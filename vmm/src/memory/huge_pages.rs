//! Huge pages that the host keeps apart (hugetlbfs).
//!
//! All pages of a guest are taken at once, before it starts: it starts with all of them or not at all. A page that is missing when it is
//! touched would be a SIGBUS in the middle of a guest. They stay the guest's through its resets: given back and asked for again, another
//! guest might have them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use vmm_control::HugePages;

use super::GuestRegion;

const POOLS: &str = "/sys/kernel/mm/hugepages";
/// A thread that was told to end does so in milliseconds; ten seconds in all.
const PAUSE: Duration = Duration::from_millis(1);
const LOOKS: u32 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    #[error("this kernel has no huge pages of {size}; start the guest without them, or with another size")]
    NoSuchSize {
        size: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "the guest needs {needed} huge pages of {size} and the host has {} free; \
         add some (nr_hugepages in {}), or start the guest without them", words(*.free), pool(*.pages).display()
    )]
    TooFew {
        pages: HugePages,
        size: &'static str,
        needed: u64,
        free: Option<u64>,
        #[source]
        source: io::Error,
    },
    #[error("the guest's huge pages are still in use by a device of the machine that ended")]
    InUse,
    #[error("the guest's huge pages cannot be cleared")]
    Clear(#[source] vm_memory::GuestMemoryError),
}

fn words(count: Option<u64>) -> String {
    count.map_or_else(|| "an unknown number".to_owned(), |count| count.to_string())
}

fn size(pages: HugePages) -> &'static str {
    match pages {
        HugePages::Mib2 => "2 MiB",
        HugePages::Gib1 => "1 GiB",
    }
}

fn pool(pages: HugePages) -> PathBuf {
    Path::new(POOLS).join(format!("hugepages-{}kB", pages.bytes() / 1024))
}

fn count(pages: HugePages, name: &str) -> Option<u64> {
    std::fs::read_to_string(pool(pages).join(name)).ok()?.trim().parse().ok()
}

/// Pages of this size that nobody has or is promised. `None` where the kernel has no such size.
pub fn free(pages: HugePages) -> Option<u64> {
    Some(count(pages, "free_hugepages")?.saturating_sub(count(pages, "resv_hugepages")?))
}

/// Those, and the ones that the kernel may still make when they are asked for.
fn to_be_had(pages: HugePages) -> Option<u64> {
    let more = count(pages, "nr_overcommit_hugepages")?.saturating_sub(count(pages, "surplus_hugepages")?);
    Some(free(pages)?.saturating_add(more))
}

/// Huge pages for one guest, in all of its lives. They go back to the host when this and the last machine are gone.
pub struct Reserved {
    file: Arc<File>,
    used: AtomicBool,
}

/// What a machine gets.
pub(super) struct Pages {
    pub file: Arc<File>,
    /// They hold what an earlier machine has left.
    pub were_used: bool,
}

impl Reserved {
    /// Takes so many bytes of pages, all of which are there and zero when this returns.
    pub fn take_from_host(pages: HugePages, bytes: u64) -> Result<Self, HugePagesError> {
        Ok(Self { file: Arc::new(reserve(pages, bytes)?), used: AtomicBool::new(false) })
    }

    /// For the next machine, when the last one is gone. Its devices' threads may be on their way out: what one of them still wrote would
    /// be in the new guest's memory.
    pub(super) fn take(&self) -> Result<Pages, HugePagesError> {
        for _ in 0..LOOKS {
            if Arc::strong_count(&self.file) == 1 {
                let were_used = self.used.swap(true, Ordering::Relaxed);
                return Ok(Pages { file: Arc::clone(&self.file), were_used });
            }
            std::thread::sleep(PAUSE);
        }
        Err(HugePagesError::InUse)
    }
}

/// Zeros, piece by piece: a hole would give the pages away.
pub(super) fn clear(region: &GuestRegion) -> Result<(), HugePagesError> {
    let zeros = vec![0; HugePages::Mib2.bytes() as usize];
    for at in (0..region.len()).step_by(zeros.len()) {
        region.write_slice(&zeros, MemoryRegionAddress(at)).map_err(HugePagesError::Clear)?;
    }
    Ok(())
}

fn reserve(pages: HugePages, bytes: u64) -> Result<File, HugePagesError> {
    let no_such_size =
        |error: rustix::io::Errno| HugePagesError::NoSuchSize { size: size(pages), source: error.into() };
    let which = match pages {
        HugePages::Mib2 => MemfdFlags::HUGE_2MB,
        HugePages::Gib1 => MemfdFlags::HUGE_1GB,
    };
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | which).map_err(no_such_size)?;
    ftruncate(&fd, bytes).map_err(no_such_size)?;
    let needed = bytes / pages.bytes();
    let too_few = |error: rustix::io::Errno| HugePagesError::TooFew {
        pages,
        size: size(pages),
        needed,
        free: free(pages),
        source: error.into(),
    };
    // An attempt that must fail would take the last free pages until it does, and others may need them.
    if to_be_had(pages).is_some_and(|there| there < needed) {
        return Err(too_few(rustix::io::Errno::NOSPC));
    }
    rustix::io::retry_on_intr(|| fallocate(&fd, FallocateFlags::empty(), 0, bytes)).map_err(too_few)?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::machine::layout::Layout;
    use crate::memory::{allocate, is_reserved};

    const GIB: u64 = 1 << 30;

    #[test]
    fn more_than_there_is_is_refused_in_words() {
        // More than any host has.
        let Err(error) = Reserved::take_from_host(HugePages::Mib2, 16 << 40) else { panic!("16 TiB of huge pages") };
        let words = error.to_string();
        match error {
            HugePagesError::TooFew { needed, .. } => {
                assert_eq!(needed, 8 << 20);
                assert!(words.contains("needs 8388608 huge pages of 2 MiB and the host has"), "{words}");
                assert!(words.contains("hugepages-2048kB"), "{words}");
            }
            HugePagesError::NoSuchSize { .. } => eprintln!("skipped: {words}"),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn all_pages_are_there_from_the_start_and_clear_for_each_machine() {
        let pages = 8;
        let bytes = pages * HugePages::Mib2.bytes();
        let reserved = match Reserved::take_from_host(HugePages::Mib2, bytes) {
            Ok(reserved) => reserved,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let blocks_of_512 = rustix::fs::fstat(&*reserved.file).unwrap().st_blocks as u64;
        assert_eq!(blocks_of_512 * 512, bytes, "every page is there before it is touched");
        let layout = Layout::new(bytes, bytes);
        for _ in 0..2 {
            let memory = allocate(&layout, Some(&reserved)).unwrap();
            assert!(is_reserved(&memory));
            let last = GuestAddress(bytes - 1);
            assert_eq!(memory.read_obj::<u8>(last).unwrap(), 0, "nothing is left of the last machine");
            memory.write_obj(7u8, last).unwrap();
        }
    }

    #[test]
    fn plain_memory_is_not_reserved() {
        assert!(!is_reserved(&allocate(&Layout::new(GIB, GIB), None).unwrap()));
    }
}
