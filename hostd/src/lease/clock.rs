//! The clock of leases: `CLOCK_BOOTTIME` of this host, which runs while the machine sleeps and starts anew at each boot.

use std::fmt;

use consensus::platform::Clock;
use rustix::time::ClockId;
use rustix::time::clock_gettime;

/// A moment of this host's `CLOCK_BOOTTIME`, in nanoseconds. It means nothing on another host or in another boot,
/// so it never travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Boottime(u64);

impl Boottime {
    /// What a host's clock shows: the machine's, or a simulation's.
    pub fn of(clock: &dyn Clock) -> Boottime {
        Boottime(clock.boottime_ns())
    }

    pub fn now() -> Boottime {
        let now = clock_gettime(ClockId::Boottime);
        Boottime(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    pub const fn from_ns(ns: u64) -> Boottime {
        Boottime(ns)
    }

    pub const fn from_ms(ms: u64) -> Boottime {
        Boottime(ms * 1_000_000)
    }

    pub const fn as_ns(self) -> u64 {
        self.0
    }

    pub const fn plus_ms(self, ms: u64) -> Boottime {
        Boottime(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }

    /// Milliseconds from `earlier` until now; 0 when `earlier` is later.
    pub const fn ms_since(self, earlier: Boottime) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

impl fmt::Display for Boottime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}s since boot", self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000)
    }
}
