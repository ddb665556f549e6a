//! The agent's work on files and processes, each piece on a thread of the blocking pool, at most one a VM at a time.
//!
//! [`Processes`] is all that the agent asks of the machine; the product's is [`Launcher`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::ExitReason;
use statemachine::state::HostProcessor;
use statemachine::state::Permit;
use statemachine::state::ReleaseClass;
use statemachine::state::VmSpec;
use tokio::sync::mpsc;

use super::AgentError;
use super::adopt;
use super::adopt::Found;
use super::guest::GuestTask;
use super::guest::Told;
use super::guest_files::GuestIdentity;
use super::launcher::LaunchError;
use super::launcher::Launcher;
use super::marks::MarkError;
use super::plan::Device;
use super::plan::Ended;
use super::plan::Order;
use super::plug;
use super::processor;
use super::run_dir::RunDir;
use crate::migration::carrier::Journey;
use crate::migration::carrier::carry;

/// Before something that could not be told, or was in the way, is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// How a piece of work ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Worked {
    /// A process has the lock; attend to it.
    Started {
        epoch: Epoch,
    },
    /// Nothing was started and nothing is left: the epoch is as good as before.
    NotStarted {
        epoch: Epoch,
    },
    Ended {
        epoch: Epoch,
        release: ReleaseClass,
        ended: Ended,
    },
    /// What is there now, in place of the epoch that was to be started.
    Found {
        instead_of: Option<Epoch>,
        found: Found,
    },
    Forgotten,
    /// Nothing came of it; it will be planned again.
    Again,
}

/// What is on a host when hostd starts: epochs that were used, and what is left of each VM.
#[derive(Debug, Default)]
pub struct Looked {
    pub marked: BTreeSet<(VmId, Epoch)>,
    /// Guests that sleep here.
    pub asleep: BTreeSet<(VmId, MigrationId)>,
    pub found: Vec<(VmId, Found)>,
}

/// A guest whose process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attended {
    pub vm: VmId,
    /// As [`super::plan::Guest::epoch`].
    pub epoch: Epoch,
    pub release: ReleaseClass,
    pub incoming: Option<MigrationId>,
}

/// News of a guest on their way to the agent's loop.
pub type News = mpsc::Sender<(VmId, Epoch, Told)>;

/// Guests as processes of this host. Each piece of work says how it ended; a failure is never taken for an end.
pub trait Processes: Send + Sync + 'static {
    fn look(&self) -> BoxFuture<'static, Result<Looked, AgentError>>;

    /// What this host's processor can be to guests; `None` when nothing of that is known.
    fn processor(&self) -> BoxFuture<'static, Option<HostProcessor>>;

    /// Starts the process of a permit whose epoch was never used.
    fn start(&self, identity: GuestIdentity, spec: Arc<VmSpec>) -> BoxFuture<'static, Worked>;

    /// Starts a process that takes in the guest of `identity.incoming`, and runs nothing.
    fn receive(&self, identity: GuestIdentity, spec: Arc<VmSpec>) -> BoxFuture<'static, Worked>;

    /// Brings a guest of this host to its new one. Returns when its stream has ended; the words say why not all of it went.
    fn carry(&self, journey: Journey) -> BoxFuture<'static, Result<(), String>>;

    /// Writes a guest of this host down. Returns the bytes of its file; from then on it stands. The words say why there is none.
    fn save(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<u64, String>>;

    /// Gives a file to the process that waits for the guest in it. Returns when that process has taken it, or not.
    fn feed(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>>;

    /// Removes a file.
    fn discard(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>>;

    /// Gives a running guest a device. Returns when its process has taken it on; the words say why it has not.
    fn plug(&self, vm: VmId, epoch: Epoch, device: Device) -> BoxFuture<'static, Result<(), String>>;

    /// Opens the files of one of a guest's disks and gives them to its process, which runs it under this permit and wants them.
    fn hand_files(
        &self,
        vm: VmId,
        epoch: Epoch,
        disk: String,
        spec: Arc<VmSpec>,
    ) -> BoxFuture<'static, Result<(), String>>;

    /// Asks a running guest for a device.
    fn unplug(&self, vm: VmId, epoch: Epoch, device: String) -> BoxFuture<'static, Result<(), String>>;

    /// An epoch that is marked, of which this hostd knows no guest.
    fn look_into(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked>;

    /// What could not be told a moment ago.
    fn look_again(&self, vm: VmId) -> BoxFuture<'static, Worked>;

    /// Uses up an epoch that was never started.
    fn renounce(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked>;

    /// Clears what a guest left, once the log knows its end.
    fn forget(&self, vm: VmId, vm_exists: bool) -> BoxFuture<'static, Worked>;

    /// Marks the epoch of an exit as used before the exit is reported: once the log has released it, a restarted hostd must
    /// not find it unused and start it.
    fn burn_before(&self, request: &Request) -> BoxFuture<'static, Result<(), MarkError>>;

    /// Stays beside a guest: carries orders to it, and tells what becomes of it.
    fn attend(&self, who: Attended, orders: mpsc::Receiver<Order>, told: News) -> BoxFuture<'static, ()>;
}

impl Processes for Launcher {
    fn look(&self) -> BoxFuture<'static, Result<Looked, AgentError>> {
        let launcher = self.clone();
        let looking = blocking(move || -> Result<Looked, AgentError> {
            let marked = launcher.marks.load()?;
            let vms = RunDir::list(&launcher.vms_dir)?;
            let found = vms.into_iter().map(|vm| (vm, adopt::inspect(&launcher, vm))).collect();
            let asleep = launcher.asleep.look().map_err(AgentError::Asleep)?;
            Ok(Looked { marked, asleep, found })
        });
        async move { looking.await.unwrap_or(Err(AgentError::Stopping)) }.boxed()
    }

    fn processor(&self) -> BoxFuture<'static, Option<HostProcessor>> {
        let vmm = self.vmm.clone();
        let looking = blocking(move || processor::look(&vmm));
        let said = async move {
            match looking.await? {
                Ok(processor) => Some(processor),
                Err(error) => {
                    tracing::warn!("guests with a processor of their cluster's model may not find this host: {error}");
                    None
                }
            }
        };
        said.boxed()
    }

    fn start(&self, identity: GuestIdentity, spec: Arc<VmSpec>) -> BoxFuture<'static, Worked> {
        start(self.clone(), identity, spec).boxed()
    }

    fn receive(&self, identity: GuestIdentity, spec: Arc<VmSpec>) -> BoxFuture<'static, Worked> {
        start(self.clone(), identity, spec).boxed()
    }

    fn carry(&self, journey: Journey) -> BoxFuture<'static, Result<(), String>> {
        let socket = RunDir::of(&self.vms_dir, journey.vm).control_socket();
        let road = self.road.clone();
        async move { carry(road, &socket, journey).await.map_err(|error| error.to_string()) }.boxed()
    }

    fn save(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<u64, String>> {
        let (asleep, socket) = (self.asleep.clone(), RunDir::of(&self.vms_dir, vm).control_socket());
        async move { asleep.save(&socket, vm, suspension).await.map_err(|error| error.to_string()) }.boxed()
    }

    fn feed(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>> {
        let (asleep, socket) = (self.asleep.clone(), RunDir::of(&self.vms_dir, vm).control_socket());
        async move { asleep.wake(&socket, vm, suspension).await.map_err(|error| error.to_string()) }.boxed()
    }

    fn discard(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>> {
        let asleep = self.asleep.clone();
        let discarding = blocking(move || asleep.discard(vm, suspension).map_err(|error| error.to_string()));
        async move { discarding.await.unwrap_or_else(|| Err("this hostd ends".to_owned())) }.boxed()
    }

    fn plug(&self, vm: VmId, epoch: Epoch, device: Device) -> BoxFuture<'static, Result<(), String>> {
        let launcher = self.clone();
        let plugging = blocking(move || plug::plug(&launcher, vm, epoch, &device).map_err(|error| error.to_string()));
        async move { plugging.await.unwrap_or_else(|| Err("this hostd ends".to_owned())) }.boxed()
    }

    fn hand_files(
        &self,
        vm: VmId,
        epoch: Epoch,
        disk: String,
        spec: Arc<VmSpec>,
    ) -> BoxFuture<'static, Result<(), String>> {
        let launcher = self.clone();
        let handing =
            blocking(move || plug::hand_files(&launcher, vm, epoch, &disk, &spec).map_err(|error| error.to_string()));
        async move { handing.await.unwrap_or_else(|| Err("this hostd ends".to_owned())) }.boxed()
    }

    fn unplug(&self, vm: VmId, epoch: Epoch, device: String) -> BoxFuture<'static, Result<(), String>> {
        let launcher = self.clone();
        let asking = blocking(move || plug::unplug(&launcher, vm, epoch, &device).map_err(|error| error.to_string()));
        async move { asking.await.unwrap_or_else(|| Err("this hostd ends".to_owned())) }.boxed()
    }

    fn look_into(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked> {
        look_into(self.clone(), vm, permit).boxed()
    }

    fn look_again(&self, vm: VmId) -> BoxFuture<'static, Worked> {
        look_again(self.clone(), vm).boxed()
    }

    fn renounce(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked> {
        renounce(self.clone(), vm, permit).boxed()
    }

    fn forget(&self, vm: VmId, vm_exists: bool) -> BoxFuture<'static, Worked> {
        forget(self.clone(), vm, vm_exists).boxed()
    }

    fn burn_before(&self, request: &Request) -> BoxFuture<'static, Result<(), MarkError>> {
        let Command::ReportVmExited { vm, epoch, .. } = request.command else { return async { Ok(()) }.boxed() };
        let marks = self.marks.clone();
        let burning = blocking(move || if marks.contains(vm, epoch) { Ok(()) } else { marks.burn(vm, epoch) });
        async move {
            match burning.await {
                Some(burnt) => burnt,
                // hostd is stopping: without a mark nothing is reported.
                None => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn attend(&self, who: Attended, orders: mpsc::Receiver<Order>, told: News) -> BoxFuture<'static, ()> {
        GuestTask::new(who, self.clone(), orders, told).run().boxed()
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

async fn inspect(launcher: &Launcher, vm: VmId) -> Found {
    let launcher = launcher.clone();
    let found = blocking(move || adopt::inspect(&launcher, vm)).await;
    found.unwrap_or_else(|| Found::Unclear("hostd is stopping".to_owned()))
}

async fn start(launcher: Launcher, identity: GuestIdentity, spec: Arc<VmSpec>) -> Worked {
    let (vm, epoch, release) = (identity.vm, identity.epoch, identity.release);
    let launched = {
        let launcher = launcher.clone();
        blocking(move || launcher.launch(&identity, &spec)).await
    };
    match launched {
        None => Worked::NotStarted { epoch },
        Some(Ok(())) => Worked::Started { epoch },
        Some(Err(LaunchError::StillThere | LaunchError::Used)) => {
            tracing::warn!(%vm, %epoch, "something of this VM is there already; nothing is started");
            tokio::time::sleep(AGAIN).await;
            match inspect(&launcher, vm).await {
                Found::Nothing | Found::NeverRan { .. } => Worked::NotStarted { epoch },
                found => Worked::Found { instead_of: Some(epoch), found },
            }
        }
        Some(Err(error)) => {
            tracing::error!(%vm, %epoch, "the guest cannot be started: {error}");
            Worked::Ended { epoch, release, ended: adopt::start_failed(&error.to_string()) }
        }
    }
}

async fn look_into(launcher: Launcher, vm: VmId, permit: Permit) -> Worked {
    match inspect(&launcher, vm).await {
        found @ Found::Alive { .. } => Worked::Found { instead_of: None, found },
        Found::Gone { epoch, release, ended } if epoch == permit.epoch => Worked::Ended { epoch, release, ended },
        Found::Unclear(why) => {
            tracing::warn!(%vm, epoch = %permit.epoch, "what became of this guest is not clear yet: {why}");
            tokio::time::sleep(AGAIN).await;
            Worked::Again
        }
        Found::Gone { .. } | Found::NeverRan { .. } | Found::Nothing => {
            Worked::Ended { epoch: permit.epoch, release: permit.release, ended: adopt::lost("") }
        }
    }
}

async fn look_again(launcher: Launcher, vm: VmId) -> Worked {
    tokio::time::sleep(AGAIN).await;
    Worked::Found { instead_of: None, found: inspect(&launcher, vm).await }
}

async fn renounce(launcher: Launcher, vm: VmId, permit: Permit) -> Worked {
    let renounced = {
        let launcher = launcher.clone();
        blocking(move || -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
            let run_dir = RunDir::of(&launcher.vms_dir, vm);
            run_dir.create()?;
            let Some(_lock) = run_dir.try_lock()? else { return Ok(false) };
            launcher.marks.burn(vm, permit.epoch)?;
            Ok(true)
        })
        .await
    };
    match renounced {
        Some(Ok(true)) => {
            let detail = "stopped before it was started".to_owned();
            let ended = Ended { reason: ExitReason::PoweredOff, detail };
            Worked::Ended { epoch: permit.epoch, release: permit.release, ended }
        }
        Some(Ok(false)) => Worked::Found { instead_of: None, found: inspect(&launcher, vm).await },
        Some(Err(error)) => {
            tracing::error!(%vm, epoch = %permit.epoch, "a permit that is not wanted cannot be given back: {error}");
            tokio::time::sleep(AGAIN).await;
            Worked::Again
        }
        None => Worked::Again,
    }
}

async fn forget(launcher: Launcher, vm: VmId, vm_exists: bool) -> Worked {
    let cleared = blocking(move || {
        let run_dir = RunDir::of(&launcher.vms_dir, vm);
        run_dir.create()?;
        let Some(lock) = run_dir.try_lock()? else { return Ok(false) };
        // Under the lock, or a start that is under way would find its group gone in its hands.
        launcher.groups.of(vm).remove();
        run_dir.clear(&lock, vm_exists)?;
        Ok::<bool, super::run_dir::RunDirError>(true)
    });
    match cleared.await {
        Some(Ok(true)) => Worked::Forgotten,
        Some(Ok(false)) => {
            tokio::time::sleep(AGAIN).await;
            Worked::Again
        }
        Some(Err(error)) => {
            tracing::warn!(%vm, "what a guest left cannot be cleared: {error}");
            tokio::time::sleep(AGAIN).await;
            Worked::Again
        }
        None => Worked::Again,
    }
}
