//! Everything that a host asks of the machine below it: time, disk, randomness, threads, and the way to end.
//!
//! The crate calls `std::time`, `std::fs`, `std::thread` and a random source here and nowhere else, so that a
//! simulation can give each host a clock that lies, a disk that loses what was not synced, and a seed.

use std::fmt;
use std::fmt::Display;
use std::sync::Arc;

use rustix::time::ClockId;

pub use crate::store::disk::Disk;
pub use crate::store::disk::DiskError;
pub use crate::store::disk::DiskFile;
pub use crate::store::disk::RealDisk;

/// Exit status of a host that may not go on (sysexits' `EX_IOERR`).
pub const EXIT_FATAL: i32 = 74;

pub trait Clock: Send + Sync + 'static {
    /// What the clock on the wall says: milliseconds since the Unix epoch. It may jump.
    fn wall_ms(&self) -> u64;

    /// `CLOCK_BOOTTIME` in nanoseconds: never jumps, and counts while the machine sleeps.
    fn boottime_ns(&self) -> u64;
}

pub trait Entropy: Send + Sync + 'static {
    fn fill(&self, bytes: &mut [u8]);
}

/// A disk error is fatal and never retried: the kernel may have dropped the very pages that a second `fsync`
/// would call clean. So is a batch that fits and does not decode.
pub trait Exit: Send + Sync + 'static {
    /// Ends this host. A simulation returns from it; callers then report an error and do no more I/O.
    fn fatal(&self, why: &dyn Display);
}

/// Where blocking I/O runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocking {
    /// On threads of the runtime's blocking pool.
    Threads,
    /// In place, so that a simulation stays on one thread and in one order.
    Inline,
}

impl Blocking {
    /// Runs work that may block.
    async fn run<T, F>(self, work: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        match self {
            Blocking::Inline => Some(work()),
            Blocking::Threads => tokio::task::spawn_blocking(work).await.ok(),
        }
    }
}

#[derive(Clone)]
pub struct Platform {
    pub clock: Arc<dyn Clock>,
    pub disk: Arc<dyn Disk>,
    pub entropy: Arc<dyn Entropy>,
    pub exit: Arc<dyn Exit>,
    pub blocking: Blocking,
}

impl fmt::Debug for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Platform").field("blocking", &self.blocking).finish_non_exhaustive()
    }
}

impl Platform {
    /// Runs work that reads or writes the disk. `None` when the runtime is shutting down.
    pub async fn on_disk<T, F>(&self, work: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        if let Some(goes_on) = self.disk.hangs() {
            goes_on.await;
        }
        self.blocking.run(work).await
    }

    /// The machine itself.
    pub fn real() -> Platform {
        Platform {
            clock: Arc::new(RealClock),
            disk: Arc::new(RealDisk),
            entropy: Arc::new(RealEntropy),
            exit: Arc::new(ProcessExit),
            blocking: Blocking::Threads,
        }
    }
}

#[derive(Debug)]
pub struct RealClock;

impl Clock for RealClock {
    fn wall_ms(&self) -> u64 {
        let now = rustix::time::clock_gettime(ClockId::Realtime);
        u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + now.tv_nsec as u64 / 1_000_000
    }

    fn boottime_ns(&self) -> u64 {
        let now = rustix::time::clock_gettime(ClockId::Boottime);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

#[derive(Debug)]
pub struct RealEntropy;

impl Entropy for RealEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        rand::Rng::fill(&mut rand::rng(), bytes);
    }
}

#[derive(Debug)]
pub struct ProcessExit;

impl Exit for ProcessExit {
    fn fatal(&self, why: &dyn Display) {
        tracing::error!("this host stops: {why}");
        std::process::exit(EXIT_FATAL);
    }
}
