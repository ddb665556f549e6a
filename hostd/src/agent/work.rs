//! The agent's work on files and processes, each piece on a thread of the blocking pool, at most one a VM at a time.

use std::sync::Arc;
use std::time::Duration;

use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::state::ExitReason;
use statemachine::state::Permit;
use statemachine::state::ReleaseClass;
use statemachine::state::VmSpec;

use super::adopt;
use super::adopt::Found;
use super::guest_files::GuestIdentity;
use super::launcher::LaunchError;
use super::launcher::Launcher;
use super::marks::MarkError;
use super::plan::Ended;
use super::run_dir::RunDir;

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

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

async fn inspect(launcher: &Launcher, vm: VmId) -> Found {
    let launcher = launcher.clone();
    let found = blocking(move || adopt::inspect(&launcher, vm)).await;
    found.unwrap_or_else(|| Found::Unclear("hostd is stopping".to_owned()))
}

pub async fn start(launcher: Launcher, identity: GuestIdentity, spec: Arc<VmSpec>) -> Worked {
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

/// An epoch that is marked, of which this hostd knows no guest.
pub async fn look_into(launcher: Launcher, vm: VmId, permit: Permit) -> Worked {
    match inspect(&launcher, vm).await {
        Found::Alive { epoch, release } => Worked::Found { instead_of: None, found: Found::Alive { epoch, release } },
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

pub async fn look_again(launcher: Launcher, vm: VmId) -> Worked {
    tokio::time::sleep(AGAIN).await;
    Worked::Found { instead_of: None, found: inspect(&launcher, vm).await }
}

/// Uses up an epoch that was never started.
pub async fn renounce(launcher: Launcher, vm: VmId, permit: Permit) -> Worked {
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

/// Clears what a guest left, once the log knows its end.
pub async fn forget(launcher: Launcher, vm: VmId, vm_exists: bool) -> Worked {
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

/// Marks the epoch of an exit as used before the exit is reported: once the log has released it, a restarted hostd must not find
/// it unused and start it.
pub async fn burn_before(launcher: &Launcher, request: &Request) -> Result<(), MarkError> {
    let Command::ReportVmExited { vm, epoch, .. } = request.command else { return Ok(()) };
    let marks = launcher.marks.clone();
    blocking(move || if marks.contains(vm, epoch) { Ok(()) } else { marks.burn(vm, epoch) }).await.unwrap_or(Ok(()))
}
