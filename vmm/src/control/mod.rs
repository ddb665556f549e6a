//! The control side of the process: what hostd may ask ([`Control::answer`]) and the socket that it asks over ([`server`]).
//!
//! The control thread does no disk I/O and waits for nobody, so it answers while storage hangs. Nothing depends on it: without it
//! leases end and vCPUs stop all the same.

pub mod client;
mod devices;
pub mod server;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_control::{
    Call, ErrorCode, Hello, Notice, PauseReason, Reply, Request, RunState, Status, VmmConfig,
    protocol::PROTOCOL_VERSION,
};

use crate::agent_channel::AgentChannel;
use crate::bell::Bell;
use crate::console_hub::ConsoleHub;
use crate::cpu::gate::{RunGate, Stop};
use crate::devices::legacy::boot_timer::BootTime;
use crate::devices::legacy::pm::PowerManagement;
use crate::devices::legacy::serial::SerialPort;
use crate::io_stop::IoStop;
use crate::lease::{ConfirmError, Lease, LeaseChange, Phase};
use crate::machine::device_manager::DeviceManager;
use crate::machine::{Ending, Endings, Machine};
use crate::metrics::{self, ExitCounters};

pub use server::ControlServer;

/// Notices that wait for the control thread. The oldest go first: a client that cares asks for the status.
const MAX_NOTICES: usize = 64;
/// How old the figure of resident memory may be.
const OVERHEAD_AGE: Duration = Duration::from_secs(30);

/// What the control thread needs of the rest.
pub struct Control {
    hello: Hello,
    vcpus: u16,
    console: Arc<ConsoleHub>,
    agent: Arc<AgentChannel>,
    endings: Arc<Endings>,
    running: OnceLock<Running>,
    machine: Mutex<Option<MachineHandle>>,
    notices: Mutex<VecDeque<Notice>>,
    bell: Bell,
    ending: AtomicBool,
    resets: AtomicU64,
    last_reset_id: Mutex<Option<u64>>,
    overhead: Mutex<Option<(Instant, u64)>>,
}

/// What lives as long as the process.
pub struct Running {
    pub lease: Arc<Lease>,
    pub gate: Arc<RunGate>,
    pub io_stop: Arc<IoStop>,
    pub boot_time: Arc<BootTime>,
    pub exits: Arc<ExitCounters>,
    pub devices: Arc<DeviceManager>,
}

/// What belongs to the machine of now.
#[derive(Clone)]
struct MachineHandle {
    pm: Arc<Mutex<PowerManagement>>,
    serial: Arc<Mutex<SerialPort>>,
    ram: Vec<(u64, u64)>,
}

/// An answer, and what happens to the connection.
pub(crate) enum Answer {
    Reply(Reply),
    /// The connection becomes a stream of raw bytes after the reply.
    Stream(Stream, Reply),
}

/// What a connection can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Console,
    Agent,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    pub fn new(
        config: &VmmConfig,
        console: Arc<ConsoleHub>,
        agent: Arc<AgentChannel>,
        endings: Arc<Endings>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            hello: Hello {
                protocol: PROTOCOL_VERSION,
                vm: config.vm,
                name: config.name.clone(),
                epoch: config.epoch,
                pid: std::process::id(),
            },
            vcpus: config.vcpus,
            console,
            agent,
            endings,
            running: OnceLock::new(),
            machine: Mutex::new(None),
            notices: Mutex::default(),
            bell: Bell::new()?,
            ending: AtomicBool::new(false),
            resets: AtomicU64::new(0),
            last_reset_id: Mutex::new(None),
            overhead: Mutex::new(None),
        }))
    }

    /// Called once, when the rest of the process is there.
    pub fn connect(&self, running: Running) {
        let _ = self.running.set(running);
    }

    /// Tells every client. From any thread; does not wait.
    pub fn notify(&self, notice: Notice) {
        if matches!(notice, Notice::ShuttingDown { .. }) {
            self.ending.store(true, Ordering::SeqCst);
        }
        let mut notices = lock(&self.notices);
        if notices.len() == MAX_NOTICES {
            notices.pop_front();
        }
        notices.push_back(notice);
        drop(notices);
        self.bell.ring();
    }

    pub fn lease_changed(&self, change: LeaseChange) {
        self.notify(crate::process::lease_notice(change));
    }

    pub fn machine_is(&self, machine: &Machine) {
        *lock(&self.machine) =
            Some(MachineHandle { pm: machine.pm(), serial: machine.serial(), ram: machine.ram_in_host() });
        self.bell.ring();
    }

    pub fn machine_was_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.notify(Notice::Reset);
    }

    pub fn machine_is_gone(&self) {
        *lock(&self.machine) = None;
        self.bell.ring();
    }

    fn machine(&self) -> Option<MachineHandle> {
        lock(&self.machine).clone()
    }

    /// A signal asked for the end.
    pub(crate) fn terminate(&self) {
        self.endings.post(Ending::PoweredOff);
    }

    /// `descriptor` came with the request; what does not ask for one closes it.
    pub(crate) fn answer(&self, request: Request, descriptor: Option<OwnedFd>) -> Answer {
        let id = request.id;
        let Some(running) = self.running.get() else {
            let reply = Reply::error(id, ErrorCode::NotNow, "the process is starting");
            return Answer::Reply(reply);
        };
        let reply = match request.call {
            Call::Hello => Reply::ok(id, &self.hello),
            Call::Status => Reply::ok(id, self.status(running)),
            Call::Confirm { epoch, deadline_ns } => match running.lease.confirm(epoch, deadline_ns) {
                Ok(deadline_ns) => Reply::ok(id, json!({ "deadline_ns": deadline_ns })),
                Err(error) => Reply::error(id, code_of(error), error.to_string()),
            },
            Call::Pause => {
                running.gate.shut(Stop::Requested);
                self.notify(Notice::Paused { reason: PauseReason::Requested, quiesced: false });
                Reply::ok(id, json!({}))
            }
            Call::Resume => {
                running.gate.open(Stop::Requested);
                if running.gate.holds(Stop::IoError) {
                    running.io_stop.resume(&running.devices.disks());
                }
                if running.gate.is_open() {
                    self.notify(Notice::Resumed);
                }
                Reply::ok(id, json!({}))
            }
            Call::PowerButton => match self.machine() {
                Some(machine) => {
                    lock(&machine.pm).press_power_button();
                    Reply::ok(id, json!({}))
                }
                None => Reply::error(id, ErrorCode::NotNow, "the guest is restarting or ending"),
            },
            Call::PowerOff => {
                self.endings.post(Ending::PoweredOff);
                Reply::ok(id, json!({}))
            }
            Call::Reset { id: reset_id } => {
                self.reset_once(reset_id);
                Reply::ok(id, json!({}))
            }
            Call::ConsoleAttach => return Answer::Stream(Stream::Console, Reply::ok(id, json!({}))),
            Call::AgentAttach => return Answer::Stream(Stream::Agent, Reply::ok(id, json!({}))),
            Call::Metrics => Reply::ok(id, self.metrics(running)),
            call @ (Call::PlugDisk { .. } | Call::PlugNic { .. } | Call::Unplug { .. } | Call::SetLink { .. }) => {
                devices::answer(&running.devices, id, call, descriptor)
            }
        };
        Answer::Reply(reply)
    }

    fn reset_once(&self, reset_id: u64) {
        let mut last = lock(&self.last_reset_id);
        if *last != Some(reset_id) {
            *last = Some(reset_id);
            self.endings.post(Ending::Reset);
        }
    }

    fn status(&self, running: &Running) -> Status {
        let phase = running.lease.phase();
        let paused = |reason| RunState::Paused { reason };
        let run = if self.ending.load(Ordering::SeqCst) {
            RunState::ShuttingDown
        } else if phase != Phase::Valid {
            paused(PauseReason::LeaseExpired)
        } else if running.gate.holds(Stop::IoError) {
            paused(PauseReason::IoError)
        } else if running.gate.holds(Stop::Requested) {
            paused(PauseReason::Requested)
        } else {
            RunState::Running
        };
        Status {
            run,
            quiesced: phase == Phase::Quiesced,
            deadline_ns: running.lease.deadline_ns(),
            vcpus: self.vcpus,
            boot_time_us: running.boot_time.microseconds(),
            overhead_bytes: self.overhead(),
            resets: self.resets.load(Ordering::Relaxed),
            agent_open: self.agent.guest_open(),
            io_error: running.io_stop.fault(),
            devices: running.devices.status(),
        }
    }

    fn overhead(&self) -> Option<u64> {
        let ram = self.machine()?.ram;
        let mut known = lock(&self.overhead);
        if let Some((when, bytes)) = *known
            && when.elapsed() < OVERHEAD_AGE
        {
            return Some(bytes);
        }
        let bytes = metrics::overhead_bytes(&ram).ok()?;
        *known = Some((Instant::now(), bytes));
        Some(bytes)
    }

    fn metrics(&self, running: &Running) -> Value {
        let exits = &running.exits;
        let lease = running.lease.counters();
        let (console_bytes, console_clients_dropped) = self.console.counters();
        json!({
            "exits_port": exits.port.get(),
            "exits_memory": exits.memory.get(),
            "exits_interrupted": exits.interrupted.get(),
            "guest_faults": exits.faults.get(),
            "resets": self.resets.load(Ordering::Relaxed),
            "lease_confirmed": lease.confirmed.get(),
            "lease_refused": lease.refused.get(),
            "lease_expired": lease.expired.get(),
            "lease_resumed": lease.resumed.get(),
            "drain_failures": lease.drain_failures.get(),
            "console_bytes": console_bytes,
            "console_clients_dropped": console_clients_dropped,
            "agent": self.agent.counters(),
            "log_lines_lost": crate::log::lost_lines(),
            "boot_time_us": running.boot_time.microseconds(),
            "overhead_bytes": self.overhead(),
            "disks": devices::disk_counters(&running.devices),
            "nics": devices::nic_counters(&running.devices),
        })
    }
}

fn code_of(error: ConfirmError) -> ErrorCode {
    match error {
        ConfirmError::NoLease => ErrorCode::NoLease,
        ConfirmError::WrongEpoch { .. } => ErrorCode::WrongEpoch,
        ConfirmError::TooFar { .. } | ConfirmError::Passed { .. } => ErrorCode::BadDeadline,
    }
}
