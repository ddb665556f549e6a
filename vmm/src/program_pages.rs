//! Gives back the pages of the program's own files that it does not need now.
//!
//! Most of a vmm's code runs once, at its start and in the boot of its guest; those pages stay mapped for as long as the guest lives, and
//! count as memory of its process. A guest at rest comes back to a quarter of them. So all are let go now and then, and those that are
//! needed are mapped again from the page cache, a few microseconds for 64 KiB.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use rustix::mm::{Advice, madvise};

/// Of x86-64. The library would ask the kernel, which a sandbox does not allow.
const PAGE_BYTES: usize = 4096;

/// Between two times that they are let go: first when most guests have booted, then ever more rarely.
#[derive(Debug)]
pub struct Intervals(Duration);

impl Intervals {
    const FIRST: Duration = Duration::from_secs(5);
    const MOST: Duration = Duration::from_secs(640);

    pub fn present(&self) -> Duration {
        self.0
    }

    pub fn grow(&mut self) {
        self.0 = (self.0 * 2).min(Self::MOST);
    }
}

impl Default for Intervals {
    fn default() -> Self {
        Self(Self::FIRST)
    }
}

/// Returns how many bytes of mappings were let go, whether or not all of them were in memory.
pub fn let_go() -> usize {
    advise(Advice::LinuxDontNeed)
}

/// What one advice is given on, and how much of that there is.
struct Advised {
    advice: Advice,
    bytes: usize,
}

fn advise(advice: Advice) -> usize {
    let mut advised = Advised { advice, bytes: 0 };
    // SAFETY: the callback gets the pointer that is passed here, which is valid until the call returns, and unwinds never.
    unsafe { libc::dl_iterate_phdr(Some(advise_on), (&raw mut advised).cast()) };
    advised.bytes
}

/// Of one loaded file. What the loader or the program has written to, relocations included, is in segments that are writable by their header,
/// and those are left alone.
unsafe extern "C" fn advise_on(file: *mut libc::dl_phdr_info, _size: usize, advised: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid entry, and `advise` what is its own.
    let (file, advised) = unsafe { (&*file, &mut *advised.cast::<Advised>()) };
    if file.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the loader says that there are so many.
    let segments = unsafe { std::slice::from_raw_parts(file.dlpi_phdr, file.dlpi_phnum.into()) };
    for segment in segments {
        if segment.p_type != libc::PT_LOAD || segment.p_flags & libc::PF_W != 0 {
            continue;
        }
        let at = (file.dlpi_addr + segment.p_vaddr) as usize;
        let Some((start, length)) = whole_pages(at, segment.p_memsz as usize, PAGE_BYTES) else { continue };
        // SAFETY: the pages are mapped from a file and were never written to (text has no relocations in position-independent code), so
        // that what is read from them later is what was read before.
        if unsafe { madvise(start as *mut c_void, length, advised.advice) }.is_ok() {
            advised.bytes += length;
        }
    }
    0
}

/// The pages that lie in the range as a whole: another segment may begin in the page in which this one ends.
fn whole_pages(at: usize, length: usize, page: usize) -> Option<(usize, usize)> {
    let start = at.checked_next_multiple_of(page)?;
    let end = at.checked_add(length)? / page * page;
    (end > start).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of code of this program that are in memory.
    fn resident_code_kib() -> u64 {
        let program = std::env::current_exe().unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut sum) = (false, 0);
        for line in maps.lines() {
            if line.contains("r-xp") {
                inside = line.ends_with(program.to_str().unwrap());
            } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| inside) {
                sum += kib.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap();
                inside = false;
            }
        }
        sum
    }

    #[test]
    fn code_that_is_not_needed_again_leaves_memory() {
        advise(Advice::LinuxPopulateRead);
        let before = resident_code_kib();
        assert!(let_go() as u64 >> 10 >= before);
        let after = resident_code_kib();
        assert!(after < before / 2, "{before} KiB before, {after} KiB after");
    }

    #[test]
    fn a_page_that_is_shared_is_left_alone() {
        assert_eq!(whole_pages(0x1000, 0x2000, 0x1000), Some((0x1000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x2fff, 0x1000), Some((0x2000, 0x2000)));
        assert_eq!(whole_pages(0x1fff, 0x1001, 0x1000), Some((0x2000, 0x1000)));
        assert_eq!(whole_pages(0x1fff, 0x1000, 0x1000), None);
        assert_eq!(whole_pages(usize::MAX - 1, 1, 0x1000), None);
        assert_eq!(whole_pages(0x1000, usize::MAX, 0x1000), None);
    }
}
