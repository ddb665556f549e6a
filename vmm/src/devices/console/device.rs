//! The console as the transport sees it, and its thread.
//!
//! Transport and thread share the ports behind a lock that is held for one bounded pass, so a reset is complete when it returns.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ConsoleDeviceError;
use super::active::Active;
use super::config::{AGENT, CONFIG_BYTES, CONSOLE, MAX_NR_PORTS_OFFSET, MULTIPORT, PORTS, QUEUE_SIZES};
use super::control::{Control, Heard};
use super::metrics::ConsoleMetrics;
use super::port::{Pass, Port};
use super::state::{SavedConsole, SavedPort};
use crate::agent_channel::AgentChannel;
use crate::bell::Bell;
use crate::console_hub::{ConsoleSink, ConsoleSource};
use crate::cpu::gate::RunGate;
use crate::sandbox::Role;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{Activation, DeviceKind, QueueError, VirtioDevice, locked};

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
    sources: [Arc<dyn ConsoleSource>; PORTS],
    /// Rung when `state` has other queues, and at the end.
    wake: EventFd,
    /// What is typed waits while the guest stands still: nothing of it changes then.
    gate: Arc<RunGate>,
    opened: Arc<Bell>,
    ending: AtomicBool,
}

struct State {
    ports: [Port; PORTS],
    control: Control,
    agent: Arc<AgentChannel>,
    active: Option<Active>,
    /// Input and ports came with a saved state: they are the guest's, and are not forgotten when its driver starts.
    restored: bool,
}

impl Console {
    /// A console on one device of the hub, with the agent's port beside it. Bytes pass `gate`, as the guest's vCPUs do.
    pub fn open<D>(
        hub_device: Arc<D>,
        agent: Arc<AgentChannel>,
        gate: Arc<RunGate>,
    ) -> Result<Arc<Self>, ConsoleDeviceError>
    where
        D: ConsoleSink + ConsoleSource + 'static,
    {
        let console = Self::without_thread(hub_device, agent, gate)?;
        let thread = Arc::clone(&console.shared);
        Role::Console.spawn("", move || thread.run()).map_err(ConsoleDeviceError::Thread)?;
        Ok(console)
    }

    /// A console that nobody serves: whoever opened it does.
    pub fn without_thread<D>(
        hub_device: Arc<D>,
        agent: Arc<AgentChannel>,
        gate: Arc<RunGate>,
    ) -> Result<Arc<Self>, ConsoleDeviceError>
    where
        D: ConsoleSink + ConsoleSource + 'static,
    {
        let metrics = Arc::new(ConsoleMetrics::default());
        let ports = [
            Port::new(hub_device, CONSOLE, Arc::clone(&metrics)),
            Port::new(Arc::clone(&agent), AGENT, Arc::clone(&metrics)),
        ];
        let opened = Arc::new(Bell::new().map_err(ConsoleDeviceError::EventFd)?);
        gate.ring_when_open(&opened);
        let shared = Arc::new(Shared {
            sources: ports.each_ref().map(|port| Arc::clone(port.source())),
            state: Mutex::new(State { ports, control: Control::default(), agent, active: None, restored: false }),
            metrics,
            wake: EventFd::new(EFD_NONBLOCK).map_err(ConsoleDeviceError::EventFd)?,
            gate,
            opened,
            ending: AtomicBool::new(false),
        });
        Ok(Arc::new(Self { shared }))
    }

    pub fn metrics(&self) -> &ConsoleMetrics {
        &self.shared.metrics
    }

    /// What the thread does when it wakes, in the thread of a test.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn wake_here(&self) {
        self.shared.serve();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        locked(&self.shared.state).stop();
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
        // Shared, because the driver may take its queues away while this thread sleeps.
        let kicks = locked(&self.state).active.as_ref().map(Active::kicks).unwrap_or_default();
        let mut bells = vec![&self.wake];
        if !kicks.is_empty() {
            bells.extend(kicks.iter().map(|kick| &**kick));
            bells.extend(self.sources.iter().map(|source| source.ready()));
        }
        let mut fds: Vec<PollFd> = bells.iter().map(|bell| readable(bell)).collect();
        fds.push(PollFd::new(self.opened.as_fd(), PollFlags::POLLIN));
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
        for bell in bells {
            let _ = bell.read();
        }
        self.opened.clear();
    }

    fn serve(&self) -> Pass {
        let Some(_inside) = self.gate.try_enter() else {
            // The gate's bell rings when it opens, and then all queues are looked at.
            return Pass::Idle;
        };
        let mut state = locked(&self.state);
        match state.serve(&self.metrics) {
            Ok(pass) => pass,
            Err(error) => {
                self.metrics.driver_errors.fetch_add(1, Ordering::Relaxed);
                report(&error);
                let stopped = state.stop();
                drop(state);
                if let Some(active) = stopped {
                    active.interrupt().needs_reset();
                }
                Pass::Idle
            }
        }
    }
}

impl State {
    /// One bounded pass over all queues.
    fn serve(&mut self, metrics: &ConsoleMetrics) -> Result<Pass, QueueError> {
        let State { ports, control, agent, active, .. } = self;
        let Some(active) = active.as_mut() else {
            return Ok(Pass::Idle);
        };
        if control.agent_host_is(agent.acknowledge()) {
            ports[AGENT].forget_carry();
        }
        let mut pass = Pass::Idle;
        // Ports before control messages: what a program said before it closed its port is read first.
        for (port, queues) in ports.iter_mut().zip(&mut active.ports) {
            if let Some(queues) = queues {
                pass = pass.and(port.serve(queues)?);
            }
        }
        if let Some(queues) = &mut active.control {
            let heard = |message: &[u8]| match control.hear(message) {
                Heard::Noted => true,
                Heard::Opened { port: AGENT, open } => {
                    if !open {
                        ports[AGENT].forget_carry();
                    }
                    agent.set_guest_open(open);
                    true
                }
                Heard::Opened { .. } => true,
                Heard::Ignored => false,
            };
            let listened = queues.listen(heard, metrics)?;
            // Somebody's bytes may have waited for the port to be opened.
            if listened.heard {
                pass = Pass::More;
            }
            pass = pass.and(listened.pass).and(queues.tell(control, metrics)?);
        }
        Ok(pass)
    }

    /// Takes the queues away. The guest's programs have nothing open any more.
    fn stop(&mut self) -> Option<Active> {
        self.ports[AGENT].forget_carry();
        self.agent.set_guest_open(false);
        self.active.take()
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
        MULTIPORT
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        config[MAX_NR_PORTS_OFFSET] = PORTS as u8;
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let active = Active::new(activation);
        let mut state = locked(&self.shared.state);
        if !std::mem::take(&mut state.restored) {
            state.ports[CONSOLE].discard_input();
            state.control = Control::default();
        }
        let guest_open = state.control.guest_open(AGENT);
        state.agent.set_guest_open(guest_open);
        state.active = Some(active);
        drop(state);
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    fn begin_reset(&self) {
        locked(&self.shared.state).stop();
        let _ = self.shared.wake.write(1);
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        // The rings are as they were left after a whole pass: the lock is held for one.
        Ok(locked(&self.shared.state).active.as_ref().map(Active::positions).unwrap_or_default())
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        let state = locked(&self.shared.state);
        let ports = state.ports.iter().zip(state.control.save());
        let ports = ports.map(|(port, control)| SavedPort { unread: port.unread().to_vec(), control }).collect();
        let saved = SavedConsole { version: SavedConsole::VERSION, ports };
        serde_json::to_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedConsole =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        let [console, agent] = saved.into_ports()?;
        let mut state = locked(&self.shared.state);
        state.control = Control::restore([console.control, agent.control]);
        state.ports[CONSOLE].restore(console.unread);
        state.ports[AGENT].restore(agent.unread);
        state.restored = true;
        Ok(())
    }
}
