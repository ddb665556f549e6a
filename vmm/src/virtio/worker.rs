//! The thread of a small device: it waits for doorbells and for time, and makes one bounded pass after the other.
//!
//! Transport and thread share the device behind a lock that is held for one pass, so a reset is complete when it returns. Each pass is
//! made inside of the guest's gate: a guest that stands still changes in nothing (peers-vmm §4.2 rules 25, 26).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::device::VirtioInterrupt;
use super::locked;
use super::queue::QueueError;
use crate::bell::{Bell, poll_timeout};
use crate::cpu::gate::RunGate;
use crate::sandbox::Role;

/// Pause after an error of `poll`, which only a broken descriptor table gives.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// What to wait for after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// A doorbell.
    Idle,
    /// Nothing: there is more to do.
    More,
    /// A doorbell, or this time, whichever comes first.
    At(Duration),
}

impl Pass {
    /// Whichever of two parts of a device wants to go on first.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::More, _) | (_, Self::More) => Self::More,
            (Self::At(a), Self::At(b)) => Self::At(a.min(b)),
            (Self::At(at), Self::Idle) | (Self::Idle, Self::At(at)) => Self::At(at),
            (Self::Idle, Self::Idle) => Self::Idle,
        }
    }
}

/// Why a device stops until its driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error("the guest's driver broke the protocol")]
    Driver(#[from] QueueError),
    #[error("the host does not give what the device needs")]
    Host(#[from] io::Error),
}

/// What a device does on its thread. No method waits.
pub trait Work: Send + 'static {
    /// The doorbells of its driver; none while it has none.
    fn kicks(&self) -> Vec<Arc<EventFd>>;

    /// One bounded pass over the queues. `now` counts from the start of the thread.
    fn serve(&mut self, now: Duration) -> Result<Pass, WorkError>;

    /// Takes the queues away, and returns the way to the driver that had given them.
    fn stop(&mut self) -> Option<Arc<dyn VirtioInterrupt>>;
}

/// A device with its thread. Dropping it ends the thread.
pub struct Worker<W: Work> {
    shared: Arc<Shared<W>>,
}

struct Shared<W> {
    name: &'static str,
    work: Mutex<W>,
    gate: Arc<RunGate>,
    wake: Arc<Bell>,
    ending: AtomicBool,
    started: Instant,
}

impl<W: Work> Worker<W> {
    /// `name` is for the log, and with `virtio-` before it that of the thread.
    pub fn start(name: &'static str, gate: Arc<RunGate>, work: W) -> io::Result<Self> {
        let wake = Arc::new(Bell::new()?);
        gate.ring_when_open(&wake);
        let shared = Arc::new(Shared {
            name,
            work: Mutex::new(work),
            gate,
            wake,
            ending: AtomicBool::new(false),
            started: Instant::now(),
        });
        let thread = Arc::clone(&shared);
        Role::Virtio.spawn(name, move || thread.run())?;
        Ok(Self { shared })
    }

    /// Looks at the device between two passes.
    pub fn look<R>(&self, look: impl FnOnce(&W) -> R) -> R {
        look(&locked(&self.shared.work))
    }

    /// Changes the device between two passes; its thread makes the next one.
    pub fn with<R>(&self, change: impl FnOnce(&mut W) -> R) -> R {
        let result = change(&mut locked(&self.shared.work));
        self.shared.wake.ring();
        result
    }
}

impl<W: Work> Drop for Worker<W> {
    fn drop(&mut self) {
        // Nothing of this device touches guest memory after this, though the thread may live on for a moment.
        locked(&self.shared.work).stop();
        self.shared.ending.store(true, Ordering::Release);
        self.shared.wake.ring();
    }
}

impl<W: Work> Shared<W> {
    fn run(&self) {
        // `None` while the guest stands still.
        let mut pass = Some(Pass::Idle);
        while !self.ending.load(Ordering::Acquire) {
            self.wait(pass);
            pass = self.pass();
        }
    }

    fn pass(&self) -> Option<Pass> {
        let inside = self.gate.try_enter()?;
        let mut work = locked(&self.work);
        match work.serve(self.started.elapsed()) {
            Ok(pass) => Some(pass),
            Err(error) => {
                let driver = work.stop();
                drop(work);
                drop(inside);
                self.report(&error);
                if let Some(driver) = driver {
                    driver.needs_reset();
                }
                Some(Pass::Idle)
            }
        }
    }

    fn report(&self, error: &WorkError) {
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            causes.push(inner.to_string());
            cause = inner.source();
        }
        tracing::warn!(device = self.name, %error, ?causes, "the device waits for its driver's reset");
    }

    fn wait(&self, pass: Option<Pass>) {
        let timeout = match pass {
            Some(Pass::More) => PollTimeout::ZERO,
            Some(Pass::At(at)) => poll_timeout(at.saturating_sub(self.started.elapsed())),
            Some(Pass::Idle) | None => PollTimeout::NONE,
        };
        // Shared, because the driver may take its queues away while this thread sleeps. Shut out, it leaves the doorbells alone.
        let kicks = if pass.is_some() { locked(&self.work).kicks() } else { Vec::new() };
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(kicks.iter().map(|kick| readable(kick)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(device = self.name, %error, "the device's thread cannot wait");
                std::thread::sleep(AFTER_ERROR);
            }
        }
        // Before anything is looked at: what comes later rings again.
        self.wake.clear();
        for kick in kicks {
            let _ = kick.read();
        }
    }
}

fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor lives as long as the borrow of `event`.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;

    use super::*;

    fn pass() -> impl Strategy<Value = Pass> {
        prop_oneof![
            Just(Pass::Idle),
            Just(Pass::More),
            any::<u32>().prop_map(|s| Pass::At(Duration::from_secs(s.into())))
        ]
    }

    /// When the device wants to go on: at once, at some time, or when it is called.
    fn time_of(pass: Pass) -> Duration {
        match pass {
            Pass::More => Duration::ZERO,
            Pass::At(at) => at,
            Pass::Idle => Duration::MAX,
        }
    }

    proptest! {
        #[test]
        fn the_part_that_wants_to_go_on_first_decides(a in pass(), b in pass()) {
            prop_assert_eq!(time_of(a.and(b)), time_of(a).min(time_of(b)));
        }
    }

    /// Tells of each pass, and asks for what the test says.
    struct Told {
        passes: Sender<Duration>,
        next: Pass,
    }

    impl Work for Told {
        fn kicks(&self) -> Vec<Arc<EventFd>> {
            Vec::new()
        }
        fn serve(&mut self, now: Duration) -> Result<Pass, WorkError> {
            self.passes.send(now).unwrap();
            Ok(std::mem::replace(&mut self.next, Pass::Idle))
        }
        fn stop(&mut self) -> Option<Arc<dyn VirtioInterrupt>> {
            None
        }
    }

    fn worker() -> (Worker<Told>, Arc<RunGate>, Receiver<Duration>) {
        let (passes, told) = channel();
        let gate = RunGate::new();
        let worker = Worker::start("told", Arc::clone(&gate), Told { passes, next: Pass::Idle }).unwrap();
        (worker, gate, told)
    }

    #[test]
    fn a_pass_comes_when_it_was_asked_for_and_not_before() {
        let (worker, _, told) = worker();
        let in_a_moment = worker.shared.started.elapsed() + Duration::from_millis(30);
        worker.with(|work| work.next = Pass::At(in_a_moment));
        told.recv().unwrap();
        assert!(told.recv().unwrap() >= in_a_moment);
        worker.with(|work| work.next = Pass::More);
        told.recv().unwrap();
        told.recv().unwrap();
        drop(worker);
        // Ends with the thread.
        while told.recv().is_ok() {}
    }

    #[test]
    fn a_pass_that_falls_into_a_pause_is_made_after_it() {
        let (worker, gate, told) = worker();
        gate.shut(crate::cpu::gate::Stop::Requested);
        worker.with(|work| work.next = Pass::More);
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        gate.open(crate::cpu::gate::Stop::Requested);
        told.recv().unwrap();
        told.recv().unwrap();
    }
}
