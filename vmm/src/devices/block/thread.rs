//! The thread of a disk, and the handle by which others reach it.
//!
//! The thread waits for four things at once: a command, a doorbell, a completion, and the gate. It never waits for the
//! disk itself, so a disk that hangs leaves it able to answer; opening a file, which can hang, happens in the caller.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::BlockError;
use super::backend::Backend;
use super::config::{BlockConfig, Geometry};
use super::disk::{self, FileFacts, ReopenError};
use super::engine::{Engine, Served, Standing};
use super::fault::DiskFaults;
use super::files::DiskFiles;
use super::metrics::BlockMetrics;
use super::request::Request;
use crate::lease::quiesce::{DiskGate, Drained, Quiesce, QuiesceError};
use crate::sandbox::Role;
use crate::virtio::device::DeviceError;
use crate::virtio::{DeviceQueue, QueueError, VirtioInterrupt, locked};

/// How often requests that wait look at the gate. The gate has no bell of its own: vCPU threads close and open it.
const GATE_LOOK: Duration = Duration::from_millis(10);
/// How long a caller waits for an answer that needs no disk.
const ANSWER: Duration = Duration::from_secs(2);
/// Past its deadline nobody waits for a drain any more, and who asked has found out by itself.
const AFTER_DEADLINE: Duration = Duration::from_secs(1);
/// How long the thread stays for requests in the kernel when the machine ends.
const FAREWELL: Duration = Duration::from_secs(2);

pub(super) enum Command {
    Activate {
        queue: DeviceQueue,
        kick: EventFd,
        interrupt: Arc<dyn VirtioInterrupt>,
        write_through: bool,
        /// Of a guest that was saved.
        pending: Vec<Request>,
    },
    /// The reset with this number.
    Reset(u64),
    /// The caller waits until then.
    Drain {
        until: Instant,
        answer: Sender<Drained>,
    },
    Close(Sender<bool>),
    Open {
        backend: Box<dyn Backend>,
        direct: Option<usize>,
        done: Sender<()>,
    },
    Standing(Sender<Option<Standing>>),
    /// Requests that failed are tried again.
    Retry,
    Look,
    Stop,
    /// The disk leaves its guest: answered when nothing of it is open.
    End(Sender<()>),
}

/// Reaches the thread.
pub(super) struct Link {
    commands: Mutex<Sender<Command>>,
    wake: EventFd,
    metrics: Arc<BlockMetrics>,
    resets_asked: AtomicU64,
    resets_done: AtomicU64,
    /// The thread has ended and left nothing in the kernel.
    ended: AtomicBool,
}

impl Link {
    pub(super) fn send(&self, command: Command) -> Result<(), DeviceError> {
        // Bounded by its senders: the transport waits for a reset before it activates again, and every other command
        // is answered before its sender goes on.
        let sent = locked(&self.commands).send(command);
        let _ = self.wake.write(1);
        sent.map_err(|_| DeviceError::ThreadGone { device: "block" })
    }

    pub(super) fn begin_reset(&self) {
        let number = self.resets_asked.fetch_add(1, Ordering::SeqCst) + 1;
        if self.send(Command::Reset(number)).is_err() {
            // A thread that has ended has nothing in the kernel.
            self.resets_done.store(number, Ordering::SeqCst);
        }
    }

    pub(super) fn is_reset(&self) -> bool {
        self.resets_done.load(Ordering::SeqCst) >= self.resets_asked.load(Ordering::SeqCst)
    }

    /// `None` while the kernel has requests.
    pub(super) fn standing(&self) -> Result<Option<Standing>, DeviceError> {
        let (answer, standing) = channel();
        self.send(Command::Standing(answer))?;
        standing.recv_timeout(ANSWER).map_err(|_| DeviceError::NoAnswer { device: "block" })
    }

    pub(super) fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.metrics
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
    }
}

/// Starts the thread of a disk: on a file, with the alignment of its O_DIRECT, or on none before it is opened.
pub(super) fn start(
    config: &BlockConfig,
    geometry: Geometry,
    gate: Arc<DiskGate>,
    backend: Option<(Box<dyn Backend>, Option<usize>)>,
    faults: Arc<dyn DiskFaults>,
) -> Result<Arc<Link>, BlockError> {
    let name = config.name.as_str();
    let failed = |source| BlockError::Thread { disk: name.to_owned(), source };
    let metrics = Arc::new(BlockMetrics::default());
    let mut engine = Engine::new(config, geometry, gate, Arc::clone(&metrics));
    if let Some((backend, direct)) = backend {
        engine.open(backend, direct);
    }
    let (commands, received) = channel();
    let wake = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
    let thread_wake = wake.try_clone().map_err(failed)?;
    let link = Arc::new(Link {
        commands: Mutex::new(commands),
        wake,
        metrics,
        resets_asked: AtomicU64::new(0),
        resets_done: AtomicU64::new(0),
        ended: AtomicBool::new(false),
    });
    let thread = DiskThread {
        name: name.to_owned(),
        engine,
        received,
        wake: thread_wake,
        link: Arc::downgrade(&link),
        active: None,
        drains: Vec::new(),
        reset: None,
        end: None,
        faults,
        started: Instant::now(),
    };
    Role::Disk.spawn(name, move || thread.run()).map_err(failed)?;
    Ok(link)
}

struct Active {
    kick: EventFd,
    interrupt: Arc<dyn VirtioInterrupt>,
}

struct DiskThread {
    name: String,
    engine: Engine,
    received: Receiver<Command>,
    wake: EventFd,
    link: std::sync::Weak<Link>,
    active: Option<Active>,
    /// Who waits for a drain: the lease, the end of the machine and an unplug may meet.
    drains: Vec<(Instant, Sender<Drained>)>,
    /// A reset that waits for the kernel.
    reset: Option<u64>,
    /// Who waits for the end.
    end: Option<Sender<()>>,
    faults: Arc<dyn DiskFaults>,
    /// The engine's time begins here.
    started: Instant,
}

impl DiskThread {
    fn run(mut self) {
        let mut look_again = None;
        loop {
            self.wait(look_again);
            if !self.obey() {
                break;
            }
            let reaped = self.engine.reap();
            self.judge(reaped);
            self.drains.retain(|(until, _)| until.elapsed() < AFTER_DEADLINE);
            // A disk that leaves its guest is drained while the gate is open for the others: it begins nothing before it has answered.
            let served =
                if self.drains.is_empty() { self.engine.serve(self.started.elapsed()) } else { Ok(Served::Stalled) };
            look_again = match served {
                Ok(Served::Stalled) => Some(GATE_LOOK),
                Ok(Served::Throttled(wait)) => Some(wait),
                Ok(Served::Idle) | Err(_) => None,
            };
            self.judge(served.map(|_| ()));
            if let Some(fault) = self.engine.take_fault() {
                tracing::error!(disk = %self.name, what = fault.what, "an I/O error stops the guest");
                self.faults.stopped(fault);
            }
            self.answer_those_who_wait();
        }
        self.farewell();
    }

    /// Sleeps until there is something to do.
    fn wait(&self, look_again: Option<Duration>) {
        // Whole milliseconds, rounded up: earlier is too early. What is longer than a poll can be is looked at in between.
        let timeout = look_again.map_or(PollTimeout::NONE, |wait| {
            let millis = u32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![readable(&self.wake)];
        if let Some(active) = &self.active {
            fds.push(readable(&active.kick));
        }
        if let Some(backend) = self.engine.backend() {
            fds.push(readable(backend.completions()));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                // Only a broken descriptor table gets here. Slow, but the disk goes on.
                tracing::error!(disk = %self.name, %error, "the disk's thread cannot wait");
                std::thread::sleep(GATE_LOOK);
            }
        }
        let _ = self.wake.read();
        if let Some(active) = &self.active {
            let _ = active.kick.read();
        }
    }

    /// Carries out what was asked. False at the end.
    fn obey(&mut self) -> bool {
        loop {
            match self.received.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Ok(Command::End(answer)) => {
                    self.end = Some(answer);
                    return false;
                }
                Err(TryRecvError::Empty) => return true,
                Ok(command) => self.carry_out(command),
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Activate { queue, kick, interrupt, write_through, pending } => {
                self.engine.activate(queue, write_through);
                self.active = Some(Active { kick, interrupt });
                self.engine.adopt(pending);
            }
            Command::Reset(number) => {
                self.active = None;
                self.engine.reset();
                self.reset = Some(number);
            }
            Command::Drain { until, answer } => {
                self.engine.begin_drain();
                self.drains.push((until, answer));
            }
            Command::Close(answer) => {
                let closed = self.engine.close();
                // Nobody there: the caller has given up waiting.
                let _ = answer.send(closed);
            }
            Command::Open { backend, direct, done } => {
                self.engine.open(backend, direct);
                let _ = done.send(());
            }
            Command::Standing(answer) => {
                let _ = answer.send(self.engine.standing());
            }
            Command::Retry => self.engine.retry(),
            Command::Look | Command::Stop | Command::End(_) => {}
        }
    }

    /// A driver's error stops the device until the driver resets it.
    fn judge(&mut self, result: Result<(), QueueError>) {
        let Err(error) = result else {
            return;
        };
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        tracing::warn!(disk = %self.name, %error, cause, "the guest's driver broke the protocol; the disk waits for its reset");
        self.engine.stop_serving();
        if let Some(active) = self.active.take() {
            active.interrupt.needs_reset();
        }
    }

    fn answer_those_who_wait(&mut self) {
        if let Some(drain) = self.engine.drained() {
            for (_, answer) in self.drains.drain(..) {
                // Nobody there: the caller has given up waiting.
                let _ = answer.send(Drained { completed: drain.completed, cancelled: drain.cancelled });
            }
        }
        if self.engine.in_flight() == 0
            && let Some(number) = self.reset.take()
            && let Some(link) = self.link.upgrade()
        {
            link.resets_done.fetch_max(number, Ordering::SeqCst);
        }
    }

    /// The machine ends: gives requests in the kernel a moment.
    fn farewell(mut self) {
        let until = Instant::now() + FAREWELL;
        self.engine.stop_serving();
        while self.engine.in_flight() > 0 && Instant::now() < until {
            self.wait(Some(GATE_LOOK));
            let reaped = self.engine.reap();
            self.judge(reaped);
        }
        let clean = self.engine.in_flight() == 0;
        self.engine.abandon();
        if let Some(link) = self.link.upgrade() {
            // Commands that come from now on, an open file among them, are dropped with their channel.
            link.ended.store(clean, Ordering::SeqCst);
        }
        drop(self.received);
        if let Some(answer) = self.end {
            let _ = answer.send(());
        }
    }
}

fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor lives as long as the borrow of `event`.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}

/// A disk from the outside: quiesce, metrics. The machine keeps one for each disk.
pub struct BlockHandle {
    pub(super) config: BlockConfig,
    pub(super) files: Arc<DiskFiles>,
    pub(super) facts: FileFacts,
    pub(super) link: Arc<Link>,
}

impl BlockHandle {
    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn facts(&self) -> FileFacts {
        self.facts
    }

    pub fn files(&self) -> &Arc<DiskFiles> {
        &self.files
    }

    pub fn metrics(&self) -> &BlockMetrics {
        self.link.metrics()
    }

    /// Has the thread look at gate and ring now, instead of in a few milliseconds.
    pub fn kick(&self) {
        let _ = self.link.send(Command::Look);
    }

    /// Has the requests that failed, if any, tried again.
    pub fn retry(&self) {
        let _ = self.link.send(Command::Retry);
    }

    /// Ends the thread for good, after a drain: once it has, nothing of this disk is open and nobody opens it again. False when its
    /// file system hangs; the thread goes on and ends when it can.
    pub fn end(&self) -> bool {
        let (answer, ended) = channel();
        if self.link.send(Command::End(answer)).is_err() {
            return self.has_ended();
        }
        let _ = ended.recv_timeout(ANSWER);
        self.has_ended()
    }

    fn has_ended(&self) -> bool {
        self.link.ended.load(Ordering::SeqCst)
    }

    fn no_answer(&self) -> QuiesceError {
        QuiesceError::NoAnswer { disk: self.config.name.clone() }
    }
}

impl Quiesce for BlockHandle {
    fn cancel_and_drain(&self, until: Instant) -> Result<Drained, QuiesceError> {
        let (answer, drained) = channel();
        let sent = self.link.send(Command::Drain { until, answer });
        match drained.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(drained) => Ok(drained),
            // A disk that was unplugged meanwhile is as quiet as one can be.
            Err(_) if self.has_ended() => Ok(Drained::default()),
            Err(_) if sent.is_err() => Err(self.no_answer()),
            Err(RecvTimeoutError::Disconnected) => Err(self.no_answer()),
            Err(RecvTimeoutError::Timeout) => match self.metrics().in_flight.load(Ordering::SeqCst) {
                0 => Err(self.no_answer()),
                in_flight => Err(QuiesceError::StillInFlight { disk: self.config.name.clone(), in_flight }),
            },
        }
    }

    fn close(&self) {
        let (answer, closed) = channel();
        if self.link.send(Command::Close(answer)).is_err() {
            return;
        }
        match closed.recv_timeout(ANSWER) {
            Ok(true) => self.files.let_go(),
            Ok(false) => {
                tracing::error!(disk = %self.config.name, "the disk was not closed: it has requests in the kernel");
            }
            Err(_) => {
                tracing::error!(disk = %self.config.name, "the disk was not closed in time: its file system hangs");
            }
        }
    }

    fn has_file(&self) -> bool {
        self.has_ended() || self.files.are_here()
    }

    fn want_file(&self) {
        self.files.want();
    }

    fn reopen(&self) -> Result<(), QuiesceError> {
        // The guest has no such disk any more.
        if self.has_ended() {
            return Ok(());
        }
        let path = || self.config.path.display().to_string();
        let disk = disk::reopen(&self.config, &self.files, self.facts).map_err(|error| match error {
            ReopenError::Open(source) => QuiesceError::Reopen { disk: self.config.name.clone(), path: path(), source },
            ReopenError::Changed(what) => QuiesceError::Changed { disk: self.config.name.clone(), path: path(), what },
        })?;
        let direct = disk.direct;
        let backend = disk.into_backend(&self.config.name).map_err(|error| QuiesceError::Reopen {
            disk: self.config.name.clone(),
            path: path(),
            source: std::io::Error::other(error),
        })?;
        let (done, opened) = channel();
        let sent = self.link.send(Command::Open { backend, direct, done });
        match opened.recv_timeout(ANSWER) {
            Ok(()) => Ok(()),
            Err(_) if sent.is_err() && self.has_ended() => Ok(()),
            Err(_) => Err(self.no_answer()),
        }
    }
}
