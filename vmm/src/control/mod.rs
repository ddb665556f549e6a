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
    Call, ErrorCode, Hello, HugePages, LiveLimits, Notice, PauseReason, ReleaseClass, Reply, Request, RunState, Status,
    VmmConfig, balloon::check_target, protocol::PROTOCOL_VERSION,
};

use crate::agent_channel::AgentChannel;
use crate::bell::Bell;
use crate::console_hub::ConsoleHub;
use crate::cpu::gate::{RunGate, Stop};
use crate::devices::legacy::boot_timer::BootTime;
use crate::devices::legacy::pm::PowerManagement;
use crate::devices::legacy::serial::SerialPort;
use crate::incident::Incidents;
use crate::io_stop::IoStop;
use crate::lease::{self, ConfirmError, Lease, LeaseChange, Phase};
use crate::machine::device_manager::DeviceManager;
use crate::machine::{Ending, Endings, FixedHandles, Machine};
use crate::metrics::{self, ExitCounters};
use crate::saved::incoming::{Incoming, IncomingRefusal, RunOrder};
use crate::saved::parts::Parts;
use crate::saved::session::{Saves, Session};

pub use server::ControlServer;

/// Notices that wait for the control thread. The oldest go first: a client that cares asks for the status.
const MAX_NOTICES: usize = 64;
/// How old the figure of resident memory may be.
const OVERHEAD_AGE: Duration = Duration::from_secs(30);

const NOT_HERE_YET: &str = "the guest does not run here yet";

/// What the control thread needs of the rest.
pub struct Control {
    hello: Hello,
    vcpus: u16,
    release: ReleaseClass,
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
    memory_bytes: u64,
    huge_pages: Option<HugePages>,
    /// What the guest was asked to make do with.
    balloon_target: Mutex<Option<u64>>,
    overhead: Mutex<Option<(Instant, u64)>>,
}

/// What lives as long as the process.
pub struct Running {
    pub lease: Arc<Lease>,
    pub gate: Arc<RunGate>,
    pub io_stop: Arc<IoStop>,
    pub incidents: Arc<Incidents>,
    pub boot_time: Arc<BootTime>,
    pub exits: Arc<ExitCounters>,
    pub saves: Arc<Saves>,
    /// In a process that waits for its guest to come from elsewhere.
    pub incoming: Option<Arc<Incoming>>,
    pub devices: Arc<DeviceManager>,
}

/// What belongs to the machine of now.
#[derive(Clone)]
struct MachineHandle {
    parts: Arc<Parts>,
    pm: Arc<Mutex<PowerManagement>>,
    serial: Arc<Mutex<SerialPort>>,
    ram: Vec<(u64, u64)>,
    fixed: FixedHandles,
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
    Save { migration: Option<u64>, live: Option<LiveLimits> },
    Restore,
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
            release: config.release,
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
            memory_bytes: config.memory_bytes,
            huge_pages: config.huge_pages,
            balloon_target: Mutex::new(None),
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
        *lock(&self.machine) = Some(MachineHandle {
            parts: machine.parts(),
            pm: machine.pm(),
            serial: machine.serial(),
            ram: machine.ram_in_host(),
            fixed: machine.fixed(),
        });
        let balloon = machine.fixed().balloon;
        // A guest from elsewhere was asked for something there.
        let mut target = lock(&self.balloon_target);
        balloon.set_target(*target.get_or_insert_with(|| balloon.counters().target_bytes));
        drop(target);
        self.bell.ring();
    }

    pub fn machine_was_reset(&self) {
        // Its memory goes with it: the next machine has its own.
        *lock(&self.machine) = None;
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
        if let Some(incoming) = self.running.get().and_then(|running| running.incoming.as_ref()) {
            incoming.end();
        }
    }

    /// `descriptors` came with the request; what does not ask for them closes them.
    pub(crate) fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Answer {
        let id = request.id;
        let Some(running) = self.running.get() else {
            let reply = Reply::error(id, ErrorCode::NotNow, "the process is starting");
            return Answer::Reply(reply);
        };
        let reply = match request.call {
            Call::Hello => Reply::ok(id, Hello { epoch: running.lease.epoch(), ..self.hello.clone() }),
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
                if let Err(refusal) = running.saves.resume(None) {
                    return Answer::Reply(Reply::error(id, ErrorCode::NotNow, refusal.to_string()));
                }
                running.gate.open(Stop::Requested);
                if running.gate.holds(Stop::IoError) {
                    running.io_stop.resume(&running.devices.disks());
                }
                running.incidents.resume();
                if running.gate.is_open() {
                    self.notify(Notice::Resumed);
                }
                Reply::ok(id, json!({}))
            }
            Call::GoOn { migration } => match running.saves.resume(Some(migration)) {
                Ok(went) => {
                    if went && running.gate.is_open() {
                        self.notify(Notice::Resumed);
                    }
                    Reply::ok(id, json!({}))
                }
                Err(refusal) => Reply::error(id, ErrorCode::NotNow, refusal.to_string()),
            },
            Call::PowerButton => match self.machine() {
                Some(machine) => {
                    lock(&machine.pm).press_power_button();
                    Reply::ok(id, json!({}))
                }
                None => Reply::error(id, ErrorCode::NotNow, "the guest is restarting or ending"),
            },
            Call::PowerOff => {
                self.terminate();
                Reply::ok(id, json!({}))
            }
            Call::Reset { .. } if running.incoming.as_ref().is_some_and(|incoming| incoming.status().is_some()) => {
                Reply::error(id, ErrorCode::NotNow, NOT_HERE_YET)
            }
            Call::Reset { id: reset_id } => {
                self.reset_once(reset_id);
                Reply::ok(id, json!({}))
            }
            Call::BalloonSet { bytes } => match self.may_change(running) {
                Ok(()) => self.set_balloon(id, bytes),
                Err(words) => Reply::error(id, ErrorCode::NotNow, words),
            },
            Call::ConsoleAttach => return Answer::Stream(Stream::Console, Reply::ok(id, json!({}))),
            Call::AgentAttach => return Answer::Stream(Stream::Agent, Reply::ok(id, json!({}))),
            Call::SaveAttach { migration, live } => {
                return Answer::Stream(Stream::Save { migration, live }, Reply::ok(id, json!({})));
            }
            Call::RestoreAttach => return Answer::Stream(Stream::Restore, Reply::ok(id, json!({}))),
            Call::Run { epoch, deadline_ns, started_marker } => {
                match self.order(running, RunOrder { epoch, deadline_ns, started_marker }) {
                    Ok(()) => Reply::ok(id, json!({})),
                    Err((code, words)) => Reply::error(id, code, words),
                }
            }
            Call::Metrics => Reply::ok(id, self.metrics(running)),
            Call::DiskFiles { epoch, .. } if epoch != running.lease.epoch() => {
                let wrong = ConfirmError::WrongEpoch { mine: running.lease.epoch(), asked: epoch };
                Reply::error(id, code_of(wrong), wrong.to_string())
            }
            call @ Call::DiskFiles { .. } => devices::answer(&running.devices, id, call, descriptors),
            call @ (Call::PlugDisk { .. } | Call::PlugNic { .. } | Call::Unplug { .. } | Call::SetLink { .. }) => {
                match self.may_change(running) {
                    Ok(()) => devices::answer(&running.devices, id, call, descriptors),
                    Err(words) => Reply::error(id, ErrorCode::NotNow, words),
                }
            }
        };
        Answer::Reply(reply)
    }

    fn order(&self, running: &Running, order: RunOrder) -> Result<(), (ErrorCode, String)> {
        match (self.release, order.deadline_ns) {
            (ReleaseClass::Lease, Some(deadline_ns)) => {
                lease::check_deadline(deadline_ns).map_err(|error| (code_of(error), error.to_string()))?;
            }
            (ReleaseClass::Lease, None) => {
                let words = "a guest of release class lease needs its first deadline";
                return Err((ErrorCode::BadDeadline, words.to_owned()));
            }
            (_, Some(_)) => return Err((ErrorCode::NoLease, ConfirmError::NoLease.to_string())),
            (_, None) => {}
        }
        let incoming = running.incoming.as_ref().ok_or(IncomingRefusal::NotIncoming);
        incoming.and_then(|incoming| incoming.order(order)).map_err(|refusal| (ErrorCode::NotNow, refusal.to_string()))
    }

    /// Begins a save over the connection that asks for it: the guest is stopped, or with `live` copied first.
    pub(crate) fn begin_save(
        &self,
        migration: Option<u64>,
        live: Option<LiveLimits>,
    ) -> Result<(Session, Arc<Parts>), (ErrorCode, String)> {
        let not_now = |words: &str| (ErrorCode::NotNow, words.to_owned());
        let running = self.running.get().ok_or_else(|| not_now("the process is starting"))?;
        if running.incoming.as_ref().is_some_and(|incoming| incoming.status().is_some()) {
            return Err(not_now(NOT_HERE_YET));
        }
        running.devices.check_settled().map_err(|refusal| not_now(&refusal.to_string()))?;
        let machine = self.machine().ok_or_else(|| not_now("the guest is restarting or ending"))?;
        let session =
            running.saves.begin(migration, live).map_err(|refusal| (ErrorCode::Taken, refusal.to_string()))?;
        if live.is_none() {
            self.stands_for_a_save();
        }
        Ok((session, machine.parts))
    }

    /// The guest was stopped by a save.
    pub(crate) fn stands_for_a_save(&self) {
        self.notify(Notice::Paused { reason: PauseReason::Saved, quiesced: false });
    }

    /// Promises the guest's place to the connection that asks for it.
    pub(crate) fn reserve_incoming(&self) -> Result<Arc<Incoming>, (ErrorCode, String)> {
        let incoming = self.running.get().and_then(|running| running.incoming.clone());
        let refused = |refusal: IncomingRefusal| {
            let code = if refusal == IncomingRefusal::Taken { ErrorCode::Taken } else { ErrorCode::NotNow };
            (code, refusal.to_string())
        };
        let incoming = incoming.ok_or_else(|| refused(IncomingRefusal::NotIncoming))?;
        incoming.reserve().map_err(refused)?;
        Ok(incoming)
    }

    /// Whether the guest's devices may change: what is saved, or on its way here, stays what it is.
    fn may_change(&self, running: &Running) -> Result<(), &'static str> {
        if running.incoming.as_ref().is_some_and(|incoming| incoming.status().is_some()) {
            return Err(NOT_HERE_YET);
        }
        match running.saves.status() {
            None => Ok(()),
            Some(_) => Err("the guest is being saved, or was; resume it first"),
        }
    }

    /// A guest that resets is asked for the same afterwards.
    fn set_balloon(&self, id: u64, bytes: u64) -> Reply {
        if let Err(error) = check_target(bytes, self.memory_bytes, self.huge_pages) {
            return Reply::error(id, ErrorCode::BadRequest, error.to_string());
        }
        // Held until the machine knows: a machine that comes now finds either the target here, or itself asked.
        let mut target = lock(&self.balloon_target);
        *target = Some(bytes);
        if let Some(machine) = self.machine() {
            machine.fixed.balloon.set_target(bytes);
        }
        Reply::ok(id, json!({ "target_bytes": bytes }))
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
        let incoming = running.incoming.as_ref().and_then(|incoming| incoming.status());
        let run = if self.ending.load(Ordering::SeqCst) {
            RunState::ShuttingDown
        } else if phase != Phase::Valid {
            paused(PauseReason::LeaseExpired)
        } else if running.gate.holds(Stop::IoError) {
            paused(PauseReason::IoError)
        } else if running.gate.holds(Stop::Saved) {
            paused(PauseReason::Saved)
        } else if incoming.is_some() {
            paused(PauseReason::Incoming)
        } else if let Some(reason) = running.incidents.paused() {
            paused(reason)
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
            saving: running.saves.status(),
            incoming,
            panic: running.incidents.panic(),
            panics: running.incidents.panics(),
            watchdog_expired: running.incidents.watchdog_expired(),
            devices: running.devices.status(),
            files_wanted: running.devices.files_wanted(),
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
            "guest_panics": running.incidents.panics(),
            "watchdog_expired": running.incidents.watchdog_expired(),
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
            "balloon": self.machine().map(|machine| machine.fixed.balloon.counters()),
            "rng": self.machine().map(|machine| machine.fixed.rng.counters()),
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
