//! The lease of a guest on this host (DESIGN §5, *Self-fence*): when its deadline passes, the guest stops by itself, its I/O is
//! taken back from the kernel, its shared disks are closed.
//!
//! Three parties, none of which waits for another:
//! - each vCPU thread compares the clock with the deadline before it enters the guest, and a timer of its own takes it out at the
//!   deadline ([`Lease::watch_this_thread`], [`Lease::is_over`], [`Lease::expire`]);
//! - the lease thread ([`thread`]) makes the disks quiet, and opens them again;
//! - the control thread extends the deadline ([`Lease::confirm`]).
//!
//! ```text
//!            deadline                 drained, closed
//!   Valid ------------> Expired --------------------> Quiesced
//!     ^                    |  confirm                     |  confirm
//!     +---- reopened ---- Reviving <----------------------+
//! ```
//!
//! [`quiesce`] is the part that disks implement.

pub mod quiesce;
pub mod thread;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_control::MAX_LEASE_NS;

use self::quiesce::{DiskGate, Quiesce};
use crate::bell::Bell;
use crate::cpu::gate::{RunGate, Stop};
use crate::metrics::LeaseCounters;
use crate::sys::{KickTimer, ThreadId, boottime_ns};

/// Stands for "no deadline at all": the other release classes.
const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfirmError {
    #[error("this guest has no lease: its release class is not `lease`")]
    NoLease,
    #[error("this process runs under epoch {mine}, not {asked}")]
    WrongEpoch { mine: u64, asked: u64 },
    #[error(
        "the deadline is {ahead_ms} ms ahead, and no lease is longer than {} ms; was it computed from a clock of before a reboot?",
        MAX_LEASE_NS / 1_000_000
    )]
    TooFar { ahead_ms: u64 },
    #[error("the deadline passed {late_ms} ms ago")]
    Passed { late_ms: u64 },
}

/// Whether a deadline is one that a lease can have.
pub fn check_deadline(deadline_ns: u64) -> Result<(), ConfirmError> {
    let now = boottime_ns();
    if deadline_ns <= now {
        return Err(ConfirmError::Passed { late_ms: (now - deadline_ns) / 1_000_000 });
    }
    if deadline_ns - now > MAX_LEASE_NS {
        return Err(ConfirmError::TooFar { ahead_ms: (deadline_ns - now) / 1_000_000 });
    }
    Ok(())
}

/// Why a guest from elsewhere cannot have its permit.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error(transparent)]
    Deadline(#[from] ConfirmError),
    #[error("cannot arm the lease's timer")]
    Timer(#[from] io::Error),
}

/// Where the lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Valid,
    /// vCPUs stop, I/O is being taken back.
    Expired,
    /// Nothing of this guest can reach a shared disk.
    Quiesced,
    /// Confirmed again; disks are being opened, or wait for their files.
    Reviving,
}

/// What others are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    Expired,
    Quiesced,
    Resumed,
}

/// Told from whatever thread causes the change; must not wait.
pub type LeaseListener = Box<dyn Fn(LeaseChange) + Send + Sync>;

pub struct Lease {
    /// 0 until it is known, for a guest that comes from elsewhere.
    epoch: AtomicU64,
    deadline_ns: AtomicU64,
    state: Mutex<State>,
    gate: Arc<RunGate>,
    disk_gate: Arc<DiskGate>,
    /// Wakes the lease thread: by hand, and at the deadline.
    bell: Bell,
    timer: OwnedFd,
    listener: LeaseListener,
    counters: LeaseCounters,
}

struct State {
    phase: Phase,
    ended: bool,
    /// The disks that other hosts can open.
    disks: Vec<Arc<dyn Quiesce>>,
    /// Counts the sets of disks, so that a drain of one set says nothing about the next.
    generation: u64,
    timers: Vec<Weak<KickTimer>>,
}

impl Lease {
    /// `deadline_ns` is `None` for a guest that never stops itself, and for one whose permit is not known yet ([`grant`](Self::grant)).
    pub fn new(
        epoch: u64,
        deadline_ns: Option<u64>,
        gate: Arc<RunGate>,
        disk_gate: Arc<DiskGate>,
        listener: LeaseListener,
    ) -> io::Result<Arc<Self>> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let lease = Self {
            epoch: AtomicU64::new(epoch),
            deadline_ns: AtomicU64::new(deadline_ns.unwrap_or(NEVER)),
            state: Mutex::new(State {
                phase: Phase::Valid,
                ended: false,
                disks: Vec::new(),
                generation: 0,
                timers: Vec::new(),
            }),
            gate,
            disk_gate,
            bell: Bell::new()?,
            timer: timerfd_create(TimerfdClockId::Boottime, flags)?,
            listener,
            counters: LeaseCounters::default(),
        };
        if let Some(deadline_ns) = deadline_ns {
            lease.arm_timer(deadline_ns)?;
        }
        Ok(Arc::new(lease))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Names the permit of a guest that came from elsewhere, with its first deadline if it has a lease. Before its first instruction here.
    pub fn grant(&self, epoch: u64, deadline_ns: Option<u64>) -> Result<(), GrantError> {
        if let Some(deadline_ns) = deadline_ns {
            check_deadline(deadline_ns)?;
            self.arm_timer(deadline_ns)?;
            self.deadline_ns.store(deadline_ns, Ordering::SeqCst);
        }
        self.epoch.store(epoch, Ordering::SeqCst);
        Ok(())
    }

    fn deadline(&self) -> u64 {
        self.deadline_ns.load(Ordering::SeqCst)
    }

    pub fn deadline_ns(&self) -> Option<u64> {
        Some(self.deadline()).filter(|d| *d != NEVER)
    }

    pub fn phase(&self) -> Phase {
        self.state().phase
    }

    pub fn counters(&self) -> &LeaseCounters {
        &self.counters
    }

    fn arm_timer(&self, deadline_ns: u64) -> io::Result<()> {
        let spec = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: (deadline_ns / 1_000_000_000) as _,
                // 0 in both would disarm.
                tv_nsec: (deadline_ns % 1_000_000_000).max(1) as _,
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)?;
        Ok(())
    }

    /// Gives the calling vCPU thread its timer, to be kept while it runs. `None` when there is no deadline.
    pub fn watch_this_thread(&self) -> io::Result<Option<Arc<KickTimer>>> {
        // Under the lock, so that an extension meets either the old list or the new deadline.
        let mut state = self.state();
        let deadline_ns = self.deadline();
        if deadline_ns == NEVER {
            return Ok(None);
        }
        let timer = Arc::new(KickTimer::new(ThreadId::current())?);
        timer.arm(deadline_ns)?;
        state.timers.retain(|t| t.strong_count() > 0);
        state.timers.push(Arc::downgrade(&timer));
        Ok(Some(timer))
    }

    /// Whether the guest must not run now. Asked before each entry.
    pub fn is_over(&self) -> bool {
        let deadline_ns = self.deadline();
        deadline_ns != NEVER && boottime_ns() >= deadline_ns
    }

    /// Stops the guest, if the lease is over. Called by whoever notices first; does not wait.
    pub fn expire(&self) {
        {
            let mut state = self.state();
            // An extension may have come in between.
            if !self.is_over() || state.phase != Phase::Valid {
                return;
            }
            state.phase = Phase::Expired;
            self.disk_gate.close();
            self.gate.shut(Stop::Lease);
        }
        self.bell.ring();
        self.counters.expired.add(1);
        (self.listener)(LeaseChange::Expired);
    }

    /// Extends the lease. A guest that was stopped by its end goes on once its disks are open again.
    pub fn confirm(&self, epoch: u64, deadline_ns: u64) -> Result<u64, ConfirmError> {
        let result = self.try_confirm(epoch, deadline_ns);
        match &result {
            Ok(_) => self.counters.confirmed.add(1),
            Err(_) => self.counters.refused.add(1),
        }
        result
    }

    fn try_confirm(&self, epoch: u64, deadline_ns: u64) -> Result<u64, ConfirmError> {
        let mine = self.epoch();
        if epoch != mine {
            return Err(ConfirmError::WrongEpoch { mine, asked: epoch });
        }
        let mut state = self.state();
        if self.deadline() == NEVER {
            return Err(ConfirmError::NoLease);
        }
        check_deadline(deadline_ns)?;
        // Answers to heartbeats may arrive out of order; a lease never gets shorter.
        let deadline_ns = deadline_ns.max(self.deadline());
        self.deadline_ns.store(deadline_ns, Ordering::SeqCst);
        self.rearm(&mut state, deadline_ns);
        if matches!(state.phase, Phase::Expired | Phase::Quiesced) {
            state.phase = Phase::Reviving;
            self.bell.ring();
        }
        Ok(deadline_ns)
    }

    fn rearm(&self, state: &mut State, deadline_ns: u64) {
        let vcpus = state.timers.iter().filter_map(Weak::upgrade);
        let results = vcpus.map(|timer| timer.arm(deadline_ns)).chain([self.arm_timer(deadline_ns)]);
        for error in results.filter_map(Result::err) {
            // A timer that kept its old time fires early, finds the lease valid, and is of no use later. The check
            // before each entry and the other timers hold; a person must look.
            tracing::error!(%error, "cannot arm a lease timer");
        }
    }

    /// The shared disks of the machine that is being built. They may have been opened while the lease was over, so
    /// that case starts again. One that had no files then waits for the lease to be confirmed, also when it is meanwhile.
    pub fn guard_disks(&self, disks: Vec<Arc<dyn Quiesce>>) {
        let mut state = self.state();
        state.disks = disks;
        state.generation += 1;
        let waits = self.deadline() != NEVER && state.disks.iter().any(|disk| !disk.has_file());
        match state.phase {
            Phase::Quiesced => state.phase = Phase::Expired,
            Phase::Valid if waits => {
                state.phase = Phase::Reviving;
                self.disk_gate.close();
                self.gate.shut(Stop::Lease);
            }
            _ => return,
        }
        self.bell.ring();
    }

    /// A disk waited for files, and has them.
    pub fn files_came(&self) {
        self.bell.ring();
    }

    /// Lets a new machine's I/O through, unless the lease is over. One step with the check, so that the end of the lease
    /// cannot come in between and find its gate open again.
    pub fn open_disks_if_valid(&self) {
        let state = self.state();
        if state.phase == Phase::Valid {
            self.disk_gate.open();
        }
    }

    /// Ends the lease thread.
    pub fn end(&self) {
        self.state().ended = true;
        self.bell.ring();
    }
}
