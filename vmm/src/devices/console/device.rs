//! The console as the transport sees it, and its thread.
//!
//! Transport and thread share the port behind a lock that is held for one bounded pass, so a reset is complete when it returns.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ConsoleDeviceError;
use super::config::{CONFIG_BYTES, MAX_BUFFERS, QUEUE_SIZES, RECEIVE, TRANSMIT};
use super::metrics::ConsoleMetrics;
use super::port::{Pass, Port, PortQueues};
use super::state::SavedConsole;
use crate::console_hub::{ConsoleSink, ConsoleSource};
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{
    Activation, ActiveQueue, DeviceKind, DeviceQueue, QueueError, VirtioDevice, VirtioInterrupt, locked,
};

const NAME: &str = "console";
/// Pause after an error of `poll`, which only a broken descriptor table gives.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// A virtio console device.
pub struct Console {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    metrics: Arc<ConsoleMetrics>,
    source: Arc<dyn ConsoleSource>,
    /// Rung when `state` has other queues, and at the end.
    wake: EventFd,
    ending: AtomicBool,
}

struct State {
    port: Port,
    active: Option<Active>,
    /// Input came with a saved state: it is the guest's, and is not discarded when its driver starts.
    restored: bool,
}

struct Active {
    queues: PortQueues,
    kicks: [EventFd; 2],
    interrupt: Arc<dyn VirtioInterrupt>,
}

impl Console {
    /// A console on one device of the hub.
    pub fn open<D>(hub_device: Arc<D>) -> Result<Arc<Self>, ConsoleDeviceError>
    where
        D: ConsoleSink + ConsoleSource + 'static,
    {
        let metrics = Arc::new(ConsoleMetrics::default());
        let port = Port::new(Arc::clone(&hub_device) as _, Arc::clone(&hub_device) as _, Arc::clone(&metrics));
        let shared = Arc::new(Shared {
            source: Arc::clone(port.source()),
            state: Mutex::new(State { port, active: None, restored: false }),
            metrics,
            wake: EventFd::new(EFD_NONBLOCK).map_err(ConsoleDeviceError::EventFd)?,
            ending: AtomicBool::new(false),
        });
        let thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("virtio-console".into())
            .spawn(move || thread.run())
            .map_err(ConsoleDeviceError::Thread)?;
        Ok(Arc::new(Self { shared }))
    }

    pub fn metrics(&self) -> &ConsoleMetrics {
        &self.shared.metrics
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        let _ = self.shared.wake.write(1);
    }
}

impl Shared {
    fn run(&self) {
        let mut pass = Pass::Idle;
        while !self.ending.load(Ordering::Acquire) {
            self.wait(pass);
            pass = self.serve();
        }
    }

    fn wait(&self, pass: Pass) {
        // Duplicates, because the driver may take its queues away while this thread sleeps.
        let kicks: Vec<EventFd> = match &locked(&self.state).active {
            Some(active) => active.kicks.iter().filter_map(|kick| kick.try_clone().ok()).collect(),
            None => Vec::new(),
        };
        let mut fds = vec![readable(&self.wake)];
        fds.extend(kicks.iter().map(readable));
        if !kicks.is_empty() {
            fds.push(readable(self.source.ready()));
        }
        let timeout = match pass {
            Pass::Idle => PollTimeout::NONE,
            Pass::More => PollTimeout::ZERO,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the console's thread cannot wait");
                std::thread::sleep(AFTER_ERROR);
            }
        }
        let _ = self.wake.read();
        if !kicks.is_empty() {
            let _ = self.source.ready().read();
        }
        for kick in &kicks {
            let _ = kick.read();
        }
    }

    fn serve(&self) -> Pass {
        let mut state = locked(&self.state);
        let State { port, active, .. } = &mut *state;
        let Some(running) = active.as_mut() else {
            return Pass::Idle;
        };
        match port.serve(&mut running.queues) {
            Ok(pass) => pass,
            Err(error) => {
                self.metrics.driver_errors.fetch_add(1, Ordering::Relaxed);
                report(&error);
                let interrupt = active.take().map(|active| active.interrupt);
                drop(state);
                if let Some(interrupt) = interrupt {
                    interrupt.needs_reset();
                }
                Pass::Idle
            }
        }
    }
}

fn report(error: &QueueError) {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    tracing::warn!(%error, cause, "the guest's driver broke the protocol; the console waits for its reset");
}

fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor lives as long as the borrow of `event`.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, class: [0x07, 0x80, 0x00], name: NAME }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // One port, whatever `max_nr_ports` is worth without MULTIPORT.
        let mut config = [0; CONFIG_BYTES];
        config[4] = 1;
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let mut take = |index: u16| queues.get_mut(usize::from(index)).and_then(Option::take);
        let (Some(receive), Some(transmit)) = (take(RECEIVE), take(TRANSMIT)) else {
            // A console without both directions moves nothing.
            return Ok(());
        };
        let serve = |index: u16, active: ActiveQueue| {
            let queue = DeviceQueue::new(index, active.queue, memory.clone(), Arc::clone(&interrupt), MAX_BUFFERS);
            (queue, active.kick)
        };
        let (receive, receive_kick) = serve(RECEIVE, receive);
        let (transmit, transmit_kick) = serve(TRANSMIT, transmit);
        let mut state = locked(&self.shared.state);
        if !std::mem::take(&mut state.restored) {
            state.port.discard_input();
        }
        state.active = Some(Active {
            queues: PortQueues { receive, transmit },
            kicks: [receive_kick, transmit_kick],
            interrupt: Arc::clone(&interrupt),
        });
        drop(state);
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    fn begin_reset(&self) {
        locked(&self.shared.state).active = None;
        let _ = self.shared.wake.write(1);
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        // The ring is as it was left after a whole pass: the lock is held for one.
        Ok(match &locked(&self.shared.state).active {
            Some(active) => vec![active.queues.receive.position(), active.queues.transmit.position()],
            None => Vec::new(),
        })
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        let saved =
            SavedConsole { version: SavedConsole::VERSION, ports: vec![locked(&self.shared.state).port.save()] };
        serde_json::to_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedConsole =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        let port = saved.into_port()?;
        let mut state = locked(&self.shared.state);
        state.port.restore(port);
        state.restored = true;
        Ok(())
    }
}
