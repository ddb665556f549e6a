//! What a disk does when the guest's lease ends: nothing new leaves, what is under way is cancelled or waited for,
//! the file is closed. After that no write of this process can reach a shared disk any more (hazard C8).
//!
//! The order is fixed and belongs to the lease thread: [`DiskGate::close`], [`Quiesce::cancel_and_drain`],
//! [`Quiesce::close`]; and back: [`Quiesce::want_file`], [`Quiesce::reopen`], [`DiskGate::open`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The end of a drain: all requests that were under way have ended, one way or the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Requests that ended by themselves, with success or with an error.
    pub completed: u64,
    /// Requests that the kernel took back before they were carried out. They stay with the device, which
    /// submits them again after [`Quiesce::reopen`]: the guest never learns of the pause.
    pub cancelled: u64,
}

/// Why a disk is not quiet, or does not come back.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// Requests are still in the kernel. The caller must not report the guest as quiesced.
    #[error("disk {disk}: {in_flight} requests are still in the kernel after the time given to drain them")]
    StillInFlight { disk: String, in_flight: u64 },
    /// The thread that owns the disk's ring does not answer: it may itself hang in the kernel.
    #[error("disk {disk}: its I/O thread does not answer")]
    NoAnswer { disk: String },
    /// The disk's file did not open again.
    #[error("disk {disk}: cannot open {path} again")]
    Reopen {
        disk: String,
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// The file at the path is no longer the disk that the guest had (other size, other kind).
    #[error("disk {disk}: {path} is not the disk that was closed: {what}")]
    Changed { disk: String, path: String, what: String },
}

/// A disk that can be made quiet. Called from the lease thread alone, never from a vCPU or the event loop, so it may wait
/// until `until`; it must not wait longer, even when the storage hangs.
pub trait Quiesce: Send + Sync {
    /// Cancels what can be cancelled and waits for the rest. On success no request of this disk is in the kernel.
    /// The gate is closed before this is called, so nothing new can be submitted meanwhile.
    fn cancel_and_drain(&self, until: Instant) -> Result<Drained, QuiesceError>;

    /// Closes the disk's file, and lets go of it. Only after a successful drain.
    fn close(&self);

    /// Whether the file is open, or can be opened now. If not, it has to be handed over first.
    fn has_file(&self) -> bool;

    /// Asks for the file to be handed over. Does not wait.
    fn want_file(&self);

    /// Opens the file again. Requests that were cancelled or arrived meanwhile are submitted once the gate is open.
    fn reopen(&self) -> Result<(), QuiesceError>;
}

/// The top bits say closed, each for a reason of its own; the rest counts the threads that are inside a submission.
const CLOSED: u64 = 1 << 63;
/// The guest is being saved: what is parked belongs to the saved state.
const HELD: u64 = 1 << 62;
const SHUT: u64 = CLOSED | HELD;

/// The gate before each submission of I/O. All disks of a guest share one.
///
/// A thread passes it around the submission itself, so that after [`close`](Self::close) and
/// [`submitters`](Self::submitters)` == 0` the kernel holds every request that it will ever get.
#[derive(Debug, Default)]
pub struct DiskGate {
    state: AtomicU64,
}

/// Held while a request is handed to the kernel.
#[derive(Debug)]
#[must_use = "the pass must be held until the submission has returned"]
pub struct Pass<'a> {
    gate: &'a DiskGate,
}

impl DiskGate {
    /// A gate that is open.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A pass for one submission, or `None` when the gate is closed: the request then stays queued in the device.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        // One atomic operation decides: an increment after the gate was closed is undone and counts for nothing.
        let before = self.state.fetch_add(1, Ordering::SeqCst);
        if before & SHUT == 0 {
            return Some(Pass { gate: self });
        }
        self.state.fetch_sub(1, Ordering::SeqCst);
        None
    }

    /// Stops new submissions. Cheap and without waiting: vCPU threads call it at the deadline.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
    }

    /// Lets submissions through again. Devices have to be kicked afterwards.
    pub fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::SeqCst);
    }

    /// Stops new submissions like [`close`](Self::close), and independently of it: a lease that is confirmed does not undo it.
    pub fn hold(&self) {
        self.state.fetch_or(HELD, Ordering::SeqCst);
    }

    pub fn release(&self) {
        self.state.fetch_and(!HELD, Ordering::SeqCst);
    }

    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::SeqCst) & SHUT == 0
    }

    /// Threads that are inside a submission now.
    pub fn submitters(&self) -> u64 {
        self.state.load(Ordering::SeqCst) & !SHUT
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.state.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_nobody_in_but_waits_for_those_inside() {
        let gate = DiskGate::new();
        let inside = gate.try_enter().expect("open at first");
        gate.close();
        assert!(gate.try_enter().is_none());
        assert_eq!(gate.submitters(), 1);
        drop(inside);
        assert_eq!(gate.submitters(), 0);
        gate.open();
        assert!(gate.try_enter().is_some());
    }

    #[test]
    fn the_lease_and_a_save_both_have_to_let_requests_through() {
        let gate = DiskGate::new();
        gate.hold();
        gate.close();
        gate.open();
        assert!(gate.try_enter().is_none() && !gate.is_open());
        gate.close();
        gate.release();
        assert!(gate.try_enter().is_none());
        assert_eq!(gate.submitters(), 0);
        gate.open();
        assert!(gate.is_open() && gate.try_enter().is_some());
    }
}
