//! The thread of a network card, and the handle by which others reach it.
//!
//! The thread waits for a command, a doorbell, and the tap. Each pass is made inside of the guest's gate; shut out, it waits for
//! commands alone until its bell rings.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::NetError;
use super::config::{Agreed, NetConfig};
use super::engine::{Engine, Waits};
use super::metrics::NetMetrics;
use super::tap::Tap;
use crate::bell::Bell;
use crate::cpu::gate::RunGate;
use crate::sandbox::Role;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{DeviceQueue, QueueError, VirtioInterrupt, locked};

const DEVICE: &str = "net";
/// How long a caller waits for an answer. A pass takes milliseconds; settings of the tap wait for the host's network.
const ANSWER: Duration = Duration::from_secs(2);
/// Pause after an error of `poll`, which only a broken descriptor table gives.
const AFTER_ERROR: Duration = Duration::from_millis(100);

pub(super) enum Command {
    Activate(Box<Start>),
    /// The reset with this number.
    Reset(u64),
    Positions(Sender<Option<[QueuePosition; 2]>>),
    Link(bool),
    /// A saved state was taken over.
    Restored {
        link_up: bool,
    },
    Stop(Sender<()>),
}

/// What a driver brings.
pub(super) struct Start {
    pub receive: DeviceQueue,
    pub transmit: DeviceQueue,
    pub agreed: Agreed,
    pub driver: Driver,
}

/// The driver, as the thread reaches it.
pub(super) struct Driver {
    pub kicks: [EventFd; 2],
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// Reaches the thread.
pub(super) struct Link {
    commands: Mutex<Sender<Command>>,
    wake: Arc<Bell>,
    metrics: Arc<NetMetrics>,
    link_up: AtomicBool,
    resets_asked: AtomicU64,
    resets_done: AtomicU64,
}

impl Link {
    pub(super) fn send(&self, command: Command) -> Result<(), DeviceError> {
        // Bounded by its senders: the transport waits for a reset before it activates again, and the others are rare.
        let sent = locked(&self.commands).send(command);
        self.wake.ring();
        sent.map_err(|_| DeviceError::ThreadGone { device: DEVICE })
    }

    pub(super) fn begin_reset(&self) {
        let number = self.resets_asked.fetch_add(1, Ordering::SeqCst) + 1;
        if self.send(Command::Reset(number)).is_err() {
            // A thread that has ended holds no guest memory.
            self.resets_done.fetch_max(number, Ordering::SeqCst);
        }
    }

    pub(super) fn is_reset(&self) -> bool {
        self.resets_done.load(Ordering::SeqCst) >= self.resets_asked.load(Ordering::SeqCst)
    }

    pub(super) fn positions(&self) -> Result<Option<[QueuePosition; 2]>, DeviceError> {
        let (answer, positions) = channel();
        self.send(Command::Positions(answer))?;
        positions.recv_timeout(ANSWER).map_err(|_| DeviceError::NoAnswer { device: DEVICE })
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::SeqCst)
    }

    /// What the driver reads from now on. It is not told here.
    pub(super) fn show_link(&self, up: bool) {
        self.link_up.store(up, Ordering::SeqCst);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Nobody waits for the answer.
        let _ = self.send(Command::Stop(channel().0));
    }
}

/// Starts the thread of a card.
pub(super) fn start(name: &str, tap: Box<dyn Tap>, gate: Arc<RunGate>) -> Result<Arc<Link>, NetError> {
    let failed = |source| NetError::Thread { nic: name.to_owned(), source };
    let metrics = Arc::new(NetMetrics::default());
    let (commands, received) = channel();
    let wake = Arc::new(Bell::new().map_err(failed)?);
    gate.ring_when_open(&wake);
    let link = Arc::new(Link {
        commands: Mutex::new(commands),
        wake: Arc::clone(&wake),
        metrics: Arc::clone(&metrics),
        link_up: AtomicBool::new(true),
        resets_asked: AtomicU64::new(0),
        resets_done: AtomicU64::new(0),
    });
    let thread = NicThread {
        name: name.to_owned(),
        engine: Engine::new(tap, metrics),
        gate,
        received,
        wake,
        link: Arc::downgrade(&link),
        driver: None,
    };
    Role::Nic.spawn(name, move || thread.run()).map_err(failed)?;
    Ok(link)
}

struct NicThread {
    name: String,
    engine: Engine,
    gate: Arc<RunGate>,
    received: Receiver<Command>,
    wake: Arc<Bell>,
    link: Weak<Link>,
    driver: Option<Driver>,
}

impl NicThread {
    fn run(mut self) {
        // `None` while the guest stands still.
        let mut waits = Some(Waits::default());
        loop {
            self.wait(waits.as_ref());
            if let Some(asked) = self.obey() {
                self.end(asked);
                return;
            }
            waits = self.pass();
        }
    }

    /// Moves frames, if the guest may run.
    fn pass(&mut self) -> Option<Waits> {
        let gate = Arc::clone(&self.gate);
        let inside = gate.try_enter()?;
        let served = self.engine.serve();
        drop(inside);
        match served {
            Ok(mut waits) => {
                if let Some(error) = waits.tap_error.take() {
                    tracing::error!(nic = %self.name, %error, "the tap is gone from the host: this network card has no link any more");
                    self.tell_link(false);
                }
                Some(waits)
            }
            Err(error) => {
                self.stop_driver(&error);
                Some(Waits::default())
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self, waits: Option<&Waits>) {
        let timeout = if waits.is_some_and(|w| w.more) { PollTimeout::ZERO } else { PollTimeout::NONE };
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let driver = self.driver.as_ref().filter(|_| waits.is_some());
        if let Some(driver) = driver {
            fds.extend(driver.kicks.iter().map(readable));
        }
        if let Some(waits) = waits {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, waits.tap_readable);
            flags.set(PollFlags::POLLOUT, waits.tap_writable);
            if !flags.is_empty() {
                fds.push(PollFd::new(self.engine.tap().descriptor(), flags));
            }
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(nic = %self.name, %error, "the network card's thread cannot wait");
                std::thread::sleep(AFTER_ERROR);
            }
        }
        // Before anything is looked at: what comes later rings again.
        self.wake.clear();
        if let Some(driver) = driver {
            for kick in &driver.kicks {
                let _ = kick.read();
            }
        }
    }

    /// Carries out what was asked. At the end, who wants to know of it.
    fn obey(&mut self) -> Option<Option<Sender<()>>> {
        loop {
            match self.received.try_recv() {
                Ok(Command::Stop(answer)) => return Some(Some(answer)),
                Err(TryRecvError::Disconnected) => return Some(None),
                Err(TryRecvError::Empty) => return None,
                Ok(command) => self.carry_out(command),
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Activate(start) => {
                let Start { receive, transmit, agreed, driver } = *start;
                self.engine.activate(receive, transmit, agreed);
                self.driver = Some(driver);
            }
            Command::Reset(number) => {
                self.driver = None;
                self.engine.stop_serving();
                // Told before the tap is: that may wait, and guest memory is free already.
                if let Some(link) = self.link.upgrade() {
                    link.resets_done.fetch_max(number, Ordering::SeqCst);
                }
                self.engine.forget_offloads();
            }
            Command::Positions(answer) => {
                // Nobody there: the caller has given up waiting.
                let _ = answer.send(self.engine.positions());
            }
            Command::Link(up) => {
                self.engine.set_link(up);
                self.tell_link(up);
            }
            Command::Restored { link_up } => self.engine.restore(link_up),
            Command::Stop(_) => {}
        }
    }

    fn tell_link(&self, up: bool) {
        if let Some(link) = self.link.upgrade() {
            link.show_link(up);
        }
        if let Some(driver) = &self.driver {
            driver.interrupt.config_changed();
        }
    }

    /// The driver broke the protocol: only its reset helps.
    fn stop_driver(&mut self, error: &QueueError) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(nic = %self.name, %error, cause, "the guest's driver broke the protocol; the network card waits for its reset");
        self.engine.count_driver_error();
        self.engine.stop_serving();
        if let Some(driver) = self.driver.take() {
            driver.interrupt.needs_reset();
        }
    }

    fn end(self, asked: Option<Sender<()>>) {
        let Self { mut engine, link, .. } = self;
        engine.stop_serving();
        engine.forget_offloads();
        drop(engine);
        // A reset that was asked for meanwhile is one that nobody will carry out, and nobody has to.
        if let Some(link) = link.upgrade() {
            link.resets_done.store(u64::MAX, Ordering::SeqCst);
        }
        if let Some(answer) = asked {
            let _ = answer.send(());
        }
    }
}

fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor lives as long as the borrow of `event`.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}

/// A network card from the outside. The machine keeps one for each.
pub struct NetHandle {
    pub(super) config: NetConfig,
    pub(super) link: Arc<Link>,
}

impl NetHandle {
    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn metrics(&self) -> &NetMetrics {
        &self.link.metrics
    }

    /// Whether the guest sees a link.
    pub fn is_link_up(&self) -> bool {
        self.link.is_link_up()
    }

    /// Plugs the cable in, or pulls it: the guest is told, and nothing passes while it is out.
    pub fn set_link(&self, up: bool) -> Result<(), DeviceError> {
        self.link.send(Command::Link(up))
    }

    /// Ends the thread. After it has answered, nothing of this card touches its tap, which the next machine may use.
    pub fn stop(&self) -> Result<(), DeviceError> {
        let (answer, stopped) = channel();
        if self.link.send(Command::Stop(answer)).is_err() {
            return Ok(());
        }
        match stopped.recv_timeout(ANSWER) {
            // Without an answer it was on its way out already.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(DeviceError::NoAnswer { device: DEVICE }),
        }
    }
}
