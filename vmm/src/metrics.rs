//! Counters of one vmm process. Cheap enough for every exit: one relaxed addition, on a cache line of their own kind.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why vCPUs left the guest.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub port: Counter,
    pub memory: Counter,
    pub interrupted: Counter,
    pub faults: Counter,
}

/// What the lease did.
#[derive(Debug, Default)]
pub struct LeaseCounters {
    pub confirmed: Counter,
    pub refused: Counter,
    pub expired: Counter,
    pub resumed: Counter,
    /// Attempts to quiesce that ended without success.
    pub drain_failures: Counter,
}

/// This process's memory map. Open for life, because the sandbox leaves no way to it.
static SMAPS: OnceLock<Mutex<File>> = OnceLock::new();

/// Opens what [`overhead_bytes`] reads.
pub fn open() -> io::Result<()> {
    let smaps = File::open("/proc/self/smaps")?;
    let _ = SMAPS.set(Mutex::new(smaps));
    Ok(())
}

/// Resident memory of this process that is not guest RAM. `guest` lists the host address ranges of guest RAM.
/// The kernel walks page tables for this: not for every status.
pub fn overhead_bytes(guest: &[(u64, u64)]) -> io::Result<u64> {
    if SMAPS.get().is_none() {
        open()?;
    }
    let smaps = SMAPS.get().ok_or(io::ErrorKind::NotFound)?;
    let mut smaps = smaps.lock().unwrap_or_else(PoisonError::into_inner);
    let mut text = String::new();
    smaps.rewind()?;
    smaps.read_to_string(&mut text)?;
    Ok(overhead_of(&text, guest))
}

fn overhead_of(smaps: &str, guest: &[(u64, u64)]) -> u64 {
    let mut kib = 0;
    let mut counted = true;
    for line in smaps.lines() {
        if let Some(start) = mapping_start(line) {
            counted = !guest.iter().any(|(from, to)| (*from..*to).contains(&start));
        } else if counted && let Some(rest) = line.strip_prefix("Rss:") {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    kib * 1024
}

/// The start of a mapping, when the line is the head of one.
fn mapping_start(line: &str) -> Option<u64> {
    let (range, _) = line.split_once(' ')?;
    let (start, _) = range.split_once('-')?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_overhead() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 \n\
Rss:              262144 kB\n\
VmFlags: rd wr\n\
55d000000000-55d000100000 r-xp 00000000 08:01 77 /usr/bin/vmm\n\
Rss:                1024 kB\n\
Pss:                 512 kB\n";
        let guest = [(0x7f0000000000, 0x7f0010000000)];
        assert_eq!(overhead_of(smaps, &guest), 1 << 20);
    }
}
