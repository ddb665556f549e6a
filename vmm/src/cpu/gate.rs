//! The gate that every vCPU passes before it enters the guest. It is shut while at least one reason to stop holds.
//!
//! Whoever writes to the guest's memory on its own account, as a network card does when a frame arrives, passes it too
//! ([`RunGate::try_enter`]): a guest that stands still changes in nothing.
//!
//! Open, it costs one atomic load. Shut, the vCPU parks on it. Who shuts it also kicks the vCPUs out of the guest; that a kick between
//! the load and `KVM_RUN` is not lost is `sys::ImmediateExit`'s part.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::sys::ThreadId;

/// Why vCPUs must not run. Independent of each other: all must be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Asked for over the control socket.
    Requested,
    /// The lease ended.
    Lease,
    /// The machine is being taken down, for a reset or for good: vCPU threads end.
    End,
    /// A disk met an error that stops the guest.
    IoError,
    /// The guest is being saved, or was.
    Saved,
    /// The guest is one that comes from elsewhere, and nobody has said yet that it may run here.
    Incoming,
    /// The guest panicked, or its watchdog ran out, and somebody is to look at it.
    Incident,
    /// The guest is copied while it runs, and writes too fast: for a part of each tenth of a second. Only vCPUs heed it; for all others the
    /// gate is as open as it is without it.
    Throttled,
}

impl Stop {
    fn bit(self) -> u32 {
        match self {
            Self::Requested => 1 << 0,
            Self::Lease => 1 << 1,
            Self::End => 1 << 2,
            Self::IoError => 1 << 3,
            Self::Saved => 1 << 4,
            Self::Incoming => 1 << 5,
            Self::Incident => 1 << 6,
            Self::Throttled => 1 << 7,
        }
    }
}

/// What a vCPU may do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    Enter,
    End,
    /// The gate is shut, and somebody has work for the threads that stand at it.
    Errand,
}

#[derive(Debug, Default)]
pub struct RunGate {
    reasons: AtomicU32,
    /// Device threads that are at work in the guest's memory.
    inside: AtomicUsize,
    threads: Mutex<Threads>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Threads {
    running: Vec<ThreadId>,
    parked: usize,
    /// How often the threads were sent on errands.
    errands: u64,
    /// Of device threads that wait for the gate.
    bells: Vec<Weak<Bell>>,
    clock: RunClock,
}

/// How long the gate was open.
#[derive(Debug, Default)]
struct RunClock {
    before: Duration,
    open_since: Option<Instant>,
}

impl RunClock {
    fn gate_is(&mut self, open: bool) {
        match self.open_since {
            None if open => self.open_since = Some(Instant::now()),
            Some(since) if !open => {
                self.before += since.elapsed();
                self.open_since = None;
            }
            _ => {}
        }
    }

    fn read(&self) -> Duration {
        self.before + self.open_since.map(|since| since.elapsed()).unwrap_or_default()
    }
}

/// A vCPU thread's place at the gate; given back when it is dropped.
#[derive(Debug)]
pub struct Ticket<'a> {
    gate: &'a RunGate,
    thread: ThreadId,
    /// Errands that this thread has been sent on.
    errands: Cell<u64>,
}

/// Held by a device thread while it works in the guest's memory: for a bounded time, and never while it sleeps.
#[derive(Debug)]
#[must_use = "the guest counts as stopped when this is dropped"]
pub struct Inside<'a> {
    gate: &'a RunGate,
}

impl RunGate {
    /// A gate that is open.
    pub fn new() -> Arc<Self> {
        let gate = Self::default();
        gate.threads().clock.gate_is(true);
        Arc::new(gate)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces the calling thread as one that will run a vCPU.
    pub fn enlist(&self) -> Ticket<'_> {
        let thread = ThreadId::current();
        let mut threads = self.threads();
        threads.running.push(thread);
        Ticket { gate: self, thread, errands: Cell::new(threads.errands) }
    }

    /// Sends each thread that stands at the gate, or comes to it while it is shut, on one errand.
    pub fn send_on_errands(&self) {
        self.threads().errands += 1;
        self.changed.notify_all();
    }

    /// Adds a reason to stop and interrupts the vCPUs. Does not wait.
    pub fn shut(&self, reason: Stop) {
        self.reasons.fetch_or(reason.bit(), Ordering::SeqCst);
        let mut threads = self.threads();
        threads.clock.gate_is(self.is_open());
        for thread in &threads.running {
            thread.kick();
        }
        self.changed.notify_all();
    }

    /// Takes a reason away.
    pub fn open(&self, reason: Stop) {
        self.reasons.fetch_and(!reason.bit(), Ordering::SeqCst);
        // Under the lock, so that a vCPU that is about to park sees the change or the wake-up.
        let mut threads = self.threads();
        threads.clock.gate_is(self.is_open());
        self.changed.notify_all();
        threads.bells.retain(|bell| bell.upgrade().inspect(|bell| bell.ring()).is_some());
    }

    /// Lets a device thread work in the guest's memory. `None` while the gate is shut: it sleeps until its bell rings.
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        // Counted before the look: who shuts the gate either is seen here, or sees the count.
        self.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Inside { gate: self };
        self.is_open().then_some(inside)
    }

    /// Rings `bell`, for as long as somebody holds it, whenever a reason to stop is gone.
    pub fn ring_when_open(&self, bell: &Arc<Bell>) {
        self.threads().bells.push(Arc::downgrade(bell));
    }

    /// How long the guest was let run, as far as this gate goes: the clock of what counts the guest's time (peers-vmm §4.2
    /// rule 32). It stands while the gate is shut, and while the host sleeps.
    pub fn ran_for(&self) -> Duration {
        self.threads().clock.read()
    }

    pub fn holds(&self, reason: Stop) -> bool {
        self.reasons.load(Ordering::SeqCst) & reason.bit() != 0
    }

    pub fn is_open(&self) -> bool {
        self.reasons.load(Ordering::SeqCst) & !Stop::Throttled.bit() == 0
    }

    fn lets_vcpus_pass(&self) -> bool {
        self.reasons.load(Ordering::SeqCst) == 0
    }

    /// Waits until no vCPU can be in the guest, and no device thread in its memory, while the gate stays shut. False when
    /// that takes longer than `until`.
    pub fn wait_parked(&self, until: Instant) -> bool {
        let mut threads = self.threads();
        while threads.parked < threads.running.len() || self.inside.load(Ordering::SeqCst) > 0 {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            threads = self.changed.wait_timeout(threads, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Ticket<'_> {
    /// Returns when the vCPU may enter the guest, or must end.
    pub fn pass(&self) -> Passage {
        if self.gate.lets_vcpus_pass() {
            return Passage::Enter;
        }
        let mut threads = self.gate.threads();
        threads.parked += 1;
        self.gate.changed.notify_all();
        let passage = loop {
            if self.gate.holds(Stop::End) {
                break Passage::End;
            }
            if self.gate.lets_vcpus_pass() {
                break Passage::Enter;
            }
            if self.errands.replace(threads.errands) != threads.errands {
                break Passage::Errand;
            }
            threads = self.gate.changed.wait(threads).unwrap_or_else(PoisonError::into_inner);
        };
        threads.parked -= 1;
        passage
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut threads = self.gate.threads();
        if let Some(at) = threads.running.iter().position(|t| *t == self.thread) {
            threads.running.swap_remove(at);
        }
        self.gate.changed.notify_all();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.inside.fetch_sub(1, Ordering::SeqCst);
        if !self.gate.is_open() {
            // Under the lock, so that who waits sees the count or the wake-up.
            let _threads = self.gate.threads();
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_vcpu_passes_only_when_every_reason_is_gone() {
        let gate = RunGate::new();
        gate.shut(Stop::Lease);
        gate.shut(Stop::Requested);
        let (passed, has_passed) = std::sync::mpsc::channel();
        let vcpu = std::thread::spawn({
            let gate = gate.clone();
            move || {
                let ticket = gate.enlist();
                passed.send(ticket.pass()).unwrap();
                // Ends when the gate says so.
                while ticket.pass() == Passage::Enter {
                    std::thread::yield_now();
                }
            }
        });
        let soon = || Instant::now() + Duration::from_secs(20);
        while gate.threads().running.is_empty() {
            std::thread::yield_now();
        }
        assert!(gate.wait_parked(soon()));
        gate.open(Stop::Requested);
        assert!(has_passed.try_recv().is_err());
        gate.open(Stop::Lease);
        assert_eq!(has_passed.recv().unwrap(), Passage::Enter);
        gate.shut(Stop::End);
        vcpu.join().unwrap();
        assert!(gate.wait_parked(soon()), "nobody is left");
    }

    #[test]
    fn who_stands_at_the_gate_goes_on_each_errand_once() {
        let gate = RunGate::new();
        gate.shut(Stop::Saved);
        let (went, has_gone) = std::sync::mpsc::channel();
        let vcpu = std::thread::spawn({
            let gate = gate.clone();
            move || {
                let ticket = gate.enlist();
                loop {
                    let passage = ticket.pass();
                    went.send(passage).unwrap();
                    if passage == Passage::End {
                        return;
                    }
                }
            }
        });
        while gate.threads().running.is_empty() {
            std::thread::yield_now();
        }
        for _ in 0..3 {
            gate.send_on_errands();
            assert_eq!(has_gone.recv().unwrap(), Passage::Errand);
            assert!(gate.wait_parked(Instant::now() + Duration::from_secs(20)));
            assert!(has_gone.try_recv().is_err());
        }
        gate.shut(Stop::End);
        assert_eq!(has_gone.recv().unwrap(), Passage::End);
        vcpu.join().unwrap();
    }

    #[test]
    fn a_throttled_vcpu_waits_and_device_threads_do_not() {
        let gate = RunGate::new();
        gate.shut(Stop::Throttled);
        assert!(gate.is_open() && gate.try_enter().is_some());
        let vcpu = std::thread::spawn({
            let gate = gate.clone();
            move || gate.enlist().pass()
        });
        while gate.threads().parked == 0 {
            std::thread::yield_now();
        }
        assert!(!vcpu.is_finished());
        gate.open(Stop::Throttled);
        assert_eq!(vcpu.join().unwrap(), Passage::Enter);
    }

    #[test]
    fn a_device_thread_is_waited_for_and_kept_out() {
        let gate = RunGate::new();
        let inside = gate.try_enter().expect("open at first");
        gate.shut(Stop::Requested);
        assert!(gate.try_enter().is_none());
        assert!(!gate.wait_parked(Instant::now()));
        let waiter = std::thread::spawn({
            let gate = gate.clone();
            move || gate.wait_parked(Instant::now() + Duration::from_secs(20))
        });
        drop(inside);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn the_guests_time_stands_while_any_reason_holds() {
        let gate = RunGate::new();
        let first = gate.ran_for();
        while gate.ran_for() == first {}
        gate.shut(Stop::Requested);
        let stood = gate.ran_for();
        assert!(stood > first);
        gate.shut(Stop::Lease);
        gate.open(Stop::Requested);
        let until = Instant::now() + Duration::from_millis(20);
        while Instant::now() < until {
            assert_eq!(gate.ran_for(), stood);
        }
        gate.open(Stop::Lease);
        while gate.ran_for() == stood {}
        assert!(gate.ran_for() - stood < Duration::from_millis(20));
    }

    #[test]
    fn the_bell_of_who_waits_rings_when_a_reason_is_gone() {
        let gate = RunGate::new();
        let bell = Arc::new(Bell::new().unwrap());
        gate.ring_when_open(&bell);
        gate.shut(Stop::Requested);
        gate.shut(Stop::Lease);
        gate.open(Stop::Lease);
        assert!(gate.try_enter().is_none());
        gate.open(Stop::Requested);
        assert!(gate.try_enter().is_some());
        let mut rings = [0; 8];
        rustix::io::read(&*bell, &mut rings).unwrap();
        assert_eq!(u64::from_ne_bytes(rings), 2);
        drop(bell);
        gate.open(Stop::Requested);
        assert!(gate.threads().bells.is_empty(), "a bell that nobody holds is forgotten");
    }
}
