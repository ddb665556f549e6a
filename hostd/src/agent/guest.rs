//! The task beside one guest: keeps a connection to its vmm, carries orders there, tells what it sees, and tells its end only
//! when the lock is free and the control group empty.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::process::pidfd_open;
use rustix::process::pidfd_send_signal;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::DiskFault;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::MigrationProgress;
use statemachine::state::ReleaseClass;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use vmm_control::Call;
use vmm_control::DeviceState;
use vmm_control::IncomingState;
use vmm_control::Notice;
use vmm_control::PauseReason;
use vmm_control::RunState;
use vmm_control::SaveState;
use vmm_control::SaveStatus;
use vmm_control::Status;

use super::adopt;
use super::adopt::Found;
use super::launcher::Launcher;
use super::plan::Ended;
use super::plan::Order;
use super::run_dir::RunDir;
use super::vmm_client::ClientError;
use super::vmm_client::VmmClient;
use super::vmm_client::raw_stream;
use super::work::Attended;
use crate::guest_agent::agents::Agents;
use crate::guest_agent::agents::Entry;
use crate::guest_agent::task::AgentOrders;
use crate::guest_agent::task::Attendant;
use crate::lease::clock::Boottime;

/// Orders under way to one guest.
pub const ORDERS_MAX: usize = 16;
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

/// What the task tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    Seen(Seen),
    /// What its agent says of the guest, when that is worth an event.
    Facts(Arc<GuestFacts>),
    /// The guest that this process took in runs, under this permit; from here on it goes by that.
    RunsAs(Epoch),
    /// It did not get away by this migration; the words say why.
    NotCarried(MigrationId, String),
    /// It is written down, in so many bytes; or the words say why not.
    Saved(MigrationId, Result<u64, String>),
    /// The process that is to take it in does not get its file.
    NotFed(String),
    /// Why one of its devices is not as it should be.
    Device(String, String),
    /// Its process was asked to take a device, and has answered; the words say why it does not, if so.
    PlugAnswered(String, Option<String>),
    /// The files of a disk are with its process; or the words say why not.
    FilesHanded(String, Option<String>),
    /// An order did not take effect; it may be planned again.
    Undone(Order),
    Gone {
        ended: Ended,
        /// The epochs of its VM that are marked, read when nothing of it was left.
        marked: Vec<Epoch>,
    },
}

/// A guest as its vmm describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub status: GuestStatus,
    pub quiesced: bool,
    pub deadline_ns: Option<u64>,
    pub pid: Option<i32>,
    pub overhead_bytes: Option<u64>,
    /// The error of a disk that holds it.
    pub fault: Option<DiskFault>,
    /// Of a process that takes in a guest: whether it has all of it.
    pub loaded: Option<bool>,
    /// The migration for which it was sent, or was to be: it may stand still for that, and waits to hear what became of it.
    pub stands_for: Option<MigrationId>,
    /// How far that is.
    pub progress: Option<MigrationProgress>,
    pub devices: BTreeMap<String, DeviceState>,
    /// The disks whose files it wants.
    pub files_wanted: BTreeSet<String>,
}

impl Seen {
    fn of(status: &Status, pid: Option<i32>) -> Seen {
        let seen = match status.run {
            RunState::Running => GuestStatus::Up,
            RunState::Paused { reason: PauseReason::LeaseExpired } => GuestStatus::PausedLease,
            RunState::Paused { reason: PauseReason::Requested } => GuestStatus::PausedUser,
            // Policies that no definition can choose yet.
            RunState::Paused { reason: PauseReason::GuestPanicked | PauseReason::Watchdog } => GuestStatus::PausedUser,
            RunState::Paused { reason: PauseReason::IoError } => GuestStatus::PausedIo,
            // For the moment in which it goes over; the log says that it moves.
            RunState::Paused { reason: PauseReason::Saved } => GuestStatus::Up,
            RunState::Paused { reason: PauseReason::Incoming } => GuestStatus::PoweringUp,
            RunState::ShuttingDown => GuestStatus::PoweringDown,
        };
        let Status { quiesced, deadline_ns, overhead_bytes, .. } = *status;
        let fault = status.io_error.as_ref().filter(|_| seen == GuestStatus::PausedIo).map(disk_fault);
        let loaded = status.incoming.map(|incoming| incoming.state == IncomingState::Loaded);
        let ended = status.saving.as_ref().filter(|saving| saving.state != SaveState::Saving);
        let stands_for = ended.and_then(|saving| saving.migration).map(MigrationId);
        let progress = status.saving.as_ref().map(progress);
        let devices = status.devices.iter().map(|device| (device.id.clone(), device.state)).collect();
        let files_wanted = status.files_wanted.iter().cloned().collect();
        Seen {
            status: seen,
            quiesced,
            deadline_ns,
            pid,
            overhead_bytes,
            fault,
            loaded,
            stands_for,
            progress,
            devices,
            files_wanted,
        }
    }
}

fn progress(saving: &SaveStatus) -> MigrationProgress {
    MigrationProgress {
        round: u32::try_from(saving.round).unwrap_or(u32::MAX),
        sent_bytes: saving.bytes_sent,
        remaining_bytes: saving.remaining_bytes,
        dirty_bytes_per_second: saving.dirty_bytes_per_second,
        throttle_percent: saving.throttle_percent.min(100),
        downtime_us: saving.downtime_us,
    }
}

/// As the log takes it: short, and without what moves a terminal's cursor.
fn disk_fault(fault: &vmm_control::DiskFault) -> DiskFault {
    let what = adopt::one_line(&fault.what, DiskFault::MAX_WORDS);
    DiskFault { disk: fault.disk.clone(), what, no_space: fault.no_space }
}

pub struct GuestTask {
    vm: VmId,
    epoch: Epoch,
    release: ReleaseClass,
    /// It comes by this migration; then `epoch` is that number until it runs.
    incoming: Option<MigrationId>,
    /// Its files name another permit than the one that it runs under.
    unsettled: bool,
    launcher: Launcher,
    orders: mpsc::Receiver<Order>,
    told: mpsc::Sender<(VmId, Epoch, Told)>,
}

/// The agent is gone; the guest stays.
struct AgentGone;

/// The way to the program in the guest that speaks for it: a task of its own talks with it, from the moment that the vmm says that
/// its port is open, for as long as this lives.
struct GuestAgentLine {
    open: watch::Sender<bool>,
    facts: mpsc::Receiver<GuestFacts>,
    orders: AgentOrders,
    stood: bool,
    _entry: Entry,
}

impl GuestAgentLine {
    fn open(vm: VmId, epoch: Epoch, socket: PathBuf, agents: &Agents) -> GuestAgentLine {
        let (open, is_open) = watch::channel(false);
        let connect = move || {
            let socket = socket.clone();
            async move { raw_stream(&socket, Call::AgentAttach).await }
        };
        let (attendant, ends) = Attendant::new(connect, is_open, None);
        tokio::spawn(attendant.run());
        let entry = agents.enter(vm, epoch, ends.orders.clone(), ends.view);
        GuestAgentLine { open, facts: ends.facts, orders: ends.orders, stood: false, _entry: entry }
    }

    fn see(&mut self, status: &Status) {
        self.open.send_if_modified(|open| std::mem::replace(open, status.agent_open) != status.agent_open);
        let stands = matches!(status.run, RunState::Paused { .. });
        if self.stood && !stands && status.agent_open {
            // Its clock stood still with it.
            let orders = self.orders.clone();
            tokio::spawn(async move {
                if let Err(error) = orders.set_time().await {
                    tracing::debug!("a guest's clock was not set after its pause: {error}");
                }
            });
        }
        self.stood = stands;
    }

    fn lost_sight(&self) {
        self.open.send_if_modified(|open| std::mem::replace(open, false));
    }
}

/// A process that is gone, or that cannot be asked: then the lock and the control group tell.
fn has_exited(process: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(process, PollFlags::IN)];
    rustix::event::poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
}

impl GuestTask {
    pub fn new(
        who: Attended,
        launcher: Launcher,
        orders: mpsc::Receiver<Order>,
        told: mpsc::Sender<(VmId, Epoch, Told)>,
    ) -> GuestTask {
        let Attended { vm, epoch, release, incoming } = who;
        GuestTask { vm, epoch, release, incoming, unsettled: incoming.is_some(), launcher, orders, told }
    }

    pub async fn run(mut self) {
        let _ = self.attend().await;
    }

    async fn attend(&mut self) -> Result<(), AgentGone> {
        let socket = RunDir::of(&self.launcher.vms_dir, self.vm).control_socket();
        let mut process: Option<OwnedFd> = None;
        let mut line = GuestAgentLine::open(self.vm, self.epoch, socket.clone(), &self.launcher.agents);
        loop {
            if let Ok(mut client) = VmmClient::connect(&socket).await {
                process =
                    client.pid().and_then(Pid::from_raw).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                let ended = self.converse(&mut client, process.as_ref(), &mut line).await?;
                line.lost_sight();
                match ended {
                    // Refused: it is starting.
                    ClientError::Closed | ClientError::Refused(_) => {}
                    error => {
                        tracing::warn!(vm = %self.vm, epoch = %self.epoch, "lost the vmm's control socket: {error}")
                    }
                }
            }
            let exited = process.as_ref().is_none_or(has_exited);
            if exited && let Some((ended, marked)) = self.look_for_end().await {
                self.tell(Told::Gone { ended, marked }).await?;
                return Ok(());
            }
            self.wait_unconnected(process.as_ref()).await?;
        }
    }

    /// Talks until the connection ends; says how it ended.
    async fn converse(
        &mut self,
        client: &mut VmmClient,
        process: Option<&OwnedFd>,
        line: &mut GuestAgentLine,
    ) -> Result<ClientError, AgentGone> {
        if let Err(error) = self.recognise(client).await? {
            return Ok(error);
        }
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let result = tokio::select! {
                order = self.orders.recv() => match order {
                    Some(order) => self.carry_out(client, order, process, line).await?,
                    None => return Err(AgentGone),
                },
                // What the notice says is what the status says, a moment later and whole.
                notice = client.notice() => match notice {
                    Ok(notice) => {
                        self.pass_on(notice).await?;
                        self.look(client, line).await?
                    }
                    Err(error) => Err(error),
                },
                _ = look.tick() => self.look(client, line).await?,
                Some(facts) = line.facts.recv() => {
                    self.tell(Told::Facts(Arc::new(facts))).await?;
                    Ok(())
                }
            };
            match result {
                Err(error) if !error.is_refusal() => return Ok(error),
                _ => {}
            }
        }
    }

    /// What only a notice says.
    async fn pass_on(&self, notice: Notice) -> Result<(), AgentGone> {
        match notice {
            Notice::PlugFailed { id, message } => self.tell(Told::Device(id, message)).await,
            Notice::Kept { id } => {
                let words = "the guest does not give it up".to_owned();
                self.tell(Told::Device(id, words)).await
            }
            _ => Ok(()),
        }
    }

    /// Whether this is the process that was started for this guest; one that took the guest in may run it by now.
    async fn recognise(&mut self, client: &mut VmmClient) -> Result<Result<(), ClientError>, AgentGone> {
        let hello = match client.hello().await {
            Ok(hello) => hello,
            Err(error) => return Ok(Err(error)),
        };
        let same = hello.epoch == self.epoch.0;
        if hello.vm != self.vm.0 || !same && self.incoming.is_none() {
            let who = format!("it is vm {} epoch {}", hello.vm, hello.epoch);
            return Ok(Err(ClientError::Nonsense(who)));
        }
        if !same {
            let runs = Epoch(hello.epoch);
            self.tell(Told::RunsAs(runs)).await?;
            self.epoch = runs;
            self.incoming = None;
        }
        Ok(Ok(()))
    }

    async fn look(
        &mut self,
        client: &mut VmmClient,
        line: &mut GuestAgentLine,
    ) -> Result<Result<(), ClientError>, AgentGone> {
        match client.status().await {
            Ok(status) => {
                if self.incoming.is_some()
                    && status.incoming.is_none()
                    && let Err(error) = self.recognise(client).await?
                {
                    return Ok(Err(error));
                }
                self.settle(&status).await;
                line.see(&status);
                self.tell(Told::Seen(Seen::of(&status, client.pid()))).await?;
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    async fn carry_out(
        &mut self,
        client: &mut VmmClient,
        order: Order,
        process: Option<&OwnedFd>,
        line: &mut GuestAgentLine,
    ) -> Result<Result<(), ClientError>, AgentGone> {
        let call = match order {
            Order::Confirm { deadline } => Call::Confirm { epoch: self.epoch.0, deadline_ns: deadline.as_ns() },
            Order::PowerButton => Call::PowerButton,
            Order::PowerOff => Call::PowerOff,
            Order::Reset { id } => Call::Reset { id: id.0 },
            Order::Pause => Call::Pause,
            Order::Resume { .. } => Call::Resume,
            Order::GoOn { migration } => Call::GoOn { migration: migration.0 },
            Order::Run { epoch, deadline } => Call::Run {
                epoch: epoch.0,
                deadline_ns: (self.release == ReleaseClass::Lease).then(|| deadline.as_ns()),
                started_marker: self.launcher.marks.path(self.vm, epoch),
            },
            Order::Memory { mib } => Call::BalloonSet { bytes: mib << 20 },
            Order::Kill => {
                self.kill(process);
                return Ok(Ok(()));
            }
        };
        let done = client.order(call).await;
        match &done {
            Ok(()) => tracing::debug!(vm = %self.vm, epoch = %self.epoch, ?order, "carried out"),
            Err(error) => {
                tracing::warn!(vm = %self.vm, epoch = %self.epoch, ?order, "not carried out: {error}");
                self.tell(Told::Undone(order)).await?;
            }
        }
        if done.is_ok()
            && matches!(order, Order::Confirm { .. } | Order::Pause | Order::Resume { .. } | Order::GoOn { .. })
        {
            // It may run now, or no longer.
            return self.look(client, line).await;
        }
        Ok(done)
    }

    /// Has the files of a guest that was taken in name the permit that it runs under, once it does.
    async fn settle(&mut self, status: &Status) {
        if !self.unsettled || self.incoming.is_some() {
            return;
        }
        let (launcher, vm, epoch) = (self.launcher.clone(), self.vm, self.epoch);
        let deadline = status.deadline_ns.map(Boottime::from_ns);
        let settled = tokio::task::spawn_blocking(move || launcher.settle(vm, epoch, deadline)).await;
        match settled {
            Ok(Ok(())) => self.unsettled = false,
            Ok(Err(error)) => {
                tracing::warn!(vm = %self.vm, "the files of a guest that came here are not in order: {error}")
            }
            Err(error) => {
                tracing::warn!(vm = %self.vm, "the files of a guest that came here were not put in order: {error}")
            }
        }
    }

    /// Pulls the plug from outside. Its end is seen like any other.
    fn kill(&self, process: Option<&OwnedFd>) {
        tracing::warn!(vm = %self.vm, epoch = %self.epoch, "the vmm does not end by itself; its processes are killed");
        match self.launcher.groups.of(self.vm).kill() {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!(vm = %self.vm, "its control group cannot be killed: {error}"),
        }
        let killed = process.map(|process| pidfd_send_signal(process, Signal::KILL));
        if let Some(Err(error)) = killed {
            tracing::warn!(vm = %self.vm, "its process cannot be killed: {error}");
        }
    }

    /// Its end, if it has ended, and then what is marked.
    async fn look_for_end(&self) -> Option<(Ended, Vec<Epoch>)> {
        let (launcher, vm) = (self.launcher.clone(), self.vm);
        let look = move || (adopt::inspect(&launcher, vm), launcher.marks.of(vm));
        let (found, marked) = tokio::task::spawn_blocking(look).await.ok()?;
        let ended = self.end_of(found)?;
        match marked {
            Ok(marked) => Some((ended, marked)),
            Err(error) => {
                tracing::warn!(%vm, "a guest has ended, and it cannot be told which of its epochs were used: {error}");
                None
            }
        }
    }

    fn end_of(&self, found: Found) -> Option<Ended> {
        match found {
            Found::Alive { .. } => None,
            Found::Unclear(why) => {
                tracing::debug!(vm = %self.vm, epoch = %self.epoch, "its end is not clear yet: {why}");
                None
            }
            Found::Gone { epoch, ended, .. } if epoch == self.epoch => Some(ended),
            Found::NeverRan { epoch, words } if epoch == self.epoch => {
                let words = if words.is_empty() { "the vmm ended before it ran the guest" } else { &words };
                Some(adopt::start_failed(words))
            }
            Found::Gone { .. } | Found::NeverRan { .. } | Found::Nothing => Some(adopt::lost("")),
        }
    }

    async fn wait_unconnected(&mut self, process: Option<&OwnedFd>) -> Result<(), AgentGone> {
        let until = Instant::now() + RECONNECT_EVERY;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                order = self.orders.recv() => match order {
                    Some(Order::Kill) => self.kill(process),
                    Some(order) => self.tell(Told::Undone(order)).await?,
                    None => return Err(AgentGone),
                },
            }
        }
    }

    async fn tell(&self, what: Told) -> Result<(), AgentGone> {
        self.told.send((self.vm, self.epoch, what)).await.map_err(|_| AgentGone)
    }
}
