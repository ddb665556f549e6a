//! The agent: makes the guests of this host equal to the permits that it may act on (DESIGN §5).
//!
//! The path: applied state and a confirmed grant -> [`plan`] (pure) -> [`reconcile`] (the loop) -> [`work`] and [`guest`]
//! (threads and tasks that touch files, processes and control sockets) -> [`reports`] back into the log.
//!
//! - [`plan`]: what is due, as a function of a view. The rules of R1 and R4 are there.
//! - [`launcher`], [`run_dir`], [`marks`], [`group`]: one vmm a VM, started at most once an epoch, that outlives hostd.
//! - [`adopt`]: what an earlier hostd left.
//! - [`guest_files`]: definition -> configuration, inside the allowed paths.
//! - [`asleep`]: guests that are files.
//! - [`cluster`]: the door to consensus.
//!
//! Start reading at [`plan::plan`]; the product starts at [`spawn`].

pub mod adopt;
mod asleep;
pub mod cluster;
#[cfg(test)]
mod fake_vmm;
mod first_boot;
pub mod group;
pub mod guest;
pub mod guest_files;
pub mod launcher;
pub mod marks;
pub mod plan;
mod plug;
mod processor;
pub mod reconcile;
pub mod reports;
pub mod run_dir;
mod user;
pub mod vmm_client;
pub mod work;

use std::path::PathBuf;
use std::sync::Arc;

use statemachine::command::HostFacts;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::ReleaseClass;
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::asleep::Asleep;
use self::cluster::Cluster;
use self::group::Groups;
use self::launcher::Launcher;
use self::marks::MarkError;
use self::marks::Marks;
use self::plan::Phase;
use self::plan::StopTimers;
use self::reconcile::Reconciler;
use self::run_dir::RunDir;
use self::run_dir::RunDirError;
use self::work::Processes;
use crate::config::Config;
use crate::guest_agent::agents::Agent;
use crate::guest_agent::agents::Agents;
use crate::lease::clock::Boottime;
use crate::lease::record::ConfirmedGrant;
use crate::migration::Road;

#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// `<run_dir>/vm`.
    pub vms_dir: PathBuf,
    pub marks_dir: PathBuf,
    pub asleep_dir: PathBuf,
    pub vmm: PathBuf,
    pub allowed_paths: Vec<PathBuf>,
    pub stop: StopTimers,
}

impl From<&Config> for AgentConfig {
    fn from(config: &Config) -> Self {
        AgentConfig {
            vms_dir: config.vms_run_dir(),
            marks_dir: config.marks_dir(),
            asleep_dir: config.asleep_dir(),
            vmm: config.vmm.clone(),
            allowed_paths: config.allowed_paths.clone(),
            stop: StopTimers { power_off_ms: config.timers.shutdown_ms, ..StopTimers::default() },
        }
    }
}

#[derive(Debug, Error)]
pub enum AgentError {
    /// Without them an epoch could be started twice.
    #[error("the marks of started guests cannot be read; guests are left as they are")]
    Marks(#[from] MarkError),
    #[error("the run directories of guests cannot be read; guests are left as they are")]
    RunDirs(#[from] RunDirError),
    #[error("the files of sleeping guests cannot be read: {0}; guests are left as they are")]
    Asleep(#[source] std::io::Error),
    #[error("hostd is stopping")]
    Stopping,
}

/// A guest of this host as others may see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestView {
    pub vm: VmId,
    pub epoch: Epoch,
    pub release: ReleaseClass,
    pub phase: Phase,
    /// Of a `lease` guest: the newest deadline that its process was given.
    pub deadline: Option<Boottime>,
    pub pid: Option<i32>,
    /// Resident memory of its process that is not guest RAM.
    pub overhead_bytes: Option<u64>,
    /// It comes by this migration, and does not run here yet.
    pub incoming: Option<MigrationId>,
}

impl GuestView {
    /// Its process lives, running or paused.
    pub fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Gone(_))
    }

    /// It has a permit here that a process acts on.
    pub fn is_under_permit(&self) -> bool {
        self.is_alive() && self.incoming.is_none()
    }
}

/// The running agent.
#[derive(Debug)]
pub struct AgentHandle {
    vms_dir: PathBuf,
    guests: watch::Receiver<Arc<Vec<GuestView>>>,
    agents: Agents,
    shutdown: CancellationToken,
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

/// Reads marks, looks for guests of an earlier hostd, and starts the loop. `guests` is published through a channel that the
/// caller makes ([`guest_channel`]), because the lease names running epochs in its heartbeats and the agent acts on its grants.
pub async fn spawn(
    config: AgentConfig,
    road: Arc<dyn Road>,
    cluster: Arc<dyn Cluster>,
    facts: watch::Receiver<HostFacts>,
    grant: watch::Receiver<Option<ConfirmedGrant>>,
    publish: watch::Sender<Arc<Vec<GuestView>>>,
) -> Result<AgentHandle, AgentError> {
    let launcher = Launcher {
        vms_dir: config.vms_dir.clone(),
        marks: Marks::at(config.marks_dir),
        asleep: Asleep::at(config.asleep_dir),
        vmm: config.vmm,
        allowed_paths: config.allowed_paths,
        groups: Groups::detect(),
        agents: Agents::default(),
        road,
    };
    let agents = launcher.agents.clone();
    let handle = spawn_on(Arc::new(launcher), config.vms_dir, config.stop, cluster, facts, grant, publish).await?;
    Ok(AgentHandle { agents, ..handle })
}

/// The same over another machine's processes.
pub async fn spawn_on(
    processes: Arc<dyn Processes>,
    vms_dir: PathBuf,
    stop_timers: StopTimers,
    cluster: Arc<dyn Cluster>,
    facts: watch::Receiver<HostFacts>,
    grant: watch::Receiver<Option<ConfirmedGrant>>,
    publish: watch::Sender<Arc<Vec<GuestView>>>,
) -> Result<AgentHandle, AgentError> {
    let looked = processes.look().await?;
    let shutdown = CancellationToken::new();
    let guests = publish.subscribe();
    let reconciler = Reconciler { cluster, facts, processes, stop_timers, grant, publish, shutdown: shutdown.clone() };
    let task = tokio::sync::Mutex::new(Some(tokio::spawn(reconciler.run(looked))));
    Ok(AgentHandle { vms_dir, guests, agents: Agents::default(), shutdown, task })
}

/// The guests of a moment.
pub type Guests = Arc<Vec<GuestView>>;

/// The channel on which the agent publishes its guests.
pub fn guest_channel() -> (watch::Sender<Guests>, watch::Receiver<Guests>) {
    watch::channel(Arc::new(Vec::new()))
}

impl AgentHandle {
    /// The control socket of a guest that lives here; its `console_attach` turns a connection into the console.
    pub fn console_socket(&self, vm: VmId) -> Option<PathBuf> {
        let lives = self.guests.borrow().iter().any(|guest| guest.vm == vm && guest.is_alive());
        lives.then(|| RunDir::of(&self.vms_dir, vm).control_socket())
    }

    /// The control socket of the process that takes in the guest of this migration.
    pub fn incoming_socket(&self, vm: VmId, migration: MigrationId) -> Option<PathBuf> {
        let waits = |guest: &GuestView| guest.vm == vm && guest.incoming == Some(migration) && guest.is_alive();
        self.guests.borrow().iter().any(waits).then(|| RunDir::of(&self.vms_dir, vm).control_socket())
    }

    /// The agent inside a guest that lives here.
    pub fn guest_agent(&self, vm: VmId) -> Option<Agent> {
        self.agents.of(vm)
    }

    pub fn running(&self) -> Arc<Vec<GuestView>> {
        self.guests.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Vec<GuestView>>> {
        self.guests.clone()
    }

    /// Stops the agent and leaves the guests alone.
    pub async fn shutdown(&self) {
        self.shutdown.cancel();
        if let Some(task) = self.task.lock().await.take() {
            let _ = task.await;
        }
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
