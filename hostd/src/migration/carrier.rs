//! The source's side: carries one guest's stream.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backon::ConstantBuilder;
use backon::Retryable;
use futures::future::try_join_all;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::State;
use statemachine::state::Vm;
use thiserror::Error;
use vmm_control::Call;
use vmm_control::LiveLimits;
use vmm_control::SaveState;
use vmm_control::SaveStatus;

use super::Lane;
use super::Obstacle;
use super::Road;
use super::Stream;
use super::lanes::spread;
use crate::agent::vmm_client::ClientError;
use crate::agent::vmm_client::VmmClient;
use crate::agent::vmm_client::raw_stream;

/// The target hears of the migration from the log and starts a process first.
const READY_EVERY: Duration = Duration::from_millis(100);
const READY_TRIES: usize = 600;
/// A vmm notices within a second that its client is gone.
const SAID_EVERY: Duration = Duration::from_millis(50);
const SAID_TRIES: usize = 600;
/// A small guest needs it too, on a busy host.
const LEAST_TIME_MS: u64 = 30_000;

#[derive(Debug, Error)]
pub enum CarryError {
    #[error("the target is not ready to take it in: {0}")]
    NoRoad(String),
    #[error("its vmm does not give it out: {0}")]
    Vmm(#[from] ClientError),
    #[error("its vmm does not end the copy, though nobody takes it any more")]
    StillSending,
    #[error("{0}")]
    NotHandedOver(String),
}

/// One guest on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Journey {
    pub vm: VmId,
    pub migration: MigrationId,
    pub to: HostId,
    pub limits: LiveLimits,
}

/// What the copy may cost, as the VM or its cluster says.
pub fn limits(state: &State, vm: &Vm) -> LiveLimits {
    let policy = state.migration_policy(vm);
    let memory_mib = vm.granted_spec.as_ref().unwrap_or(&vm.spec).memory_mib;
    let within = |seconds_per_gib: u32| (u64::from(seconds_per_gib) * 1000 * memory_mib / 1024).max(LEAST_TIME_MS);
    let by_default = LiveLimits::default();
    LiveLimits {
        downtime_ms: policy.downtime_ms.map_or(by_default.downtime_ms, u64::from),
        bytes_per_second: policy.mib_per_second.map(|mib| u64::from(mib) << 20),
        timeout_ms: policy.seconds_per_gib.map(within),
    }
}

/// Returns when the stream has ended, and says whether all of the guest went into it. From its end on the guest stands still, and
/// only the log says whether it goes on here.
pub async fn carry(road: Arc<dyn Road>, socket: &Path, journey: Journey) -> Result<(), CarryError> {
    let Journey { vm, migration, to, limits } = journey;
    let of = road.lanes();
    let open = async |lane| {
        let patience = ConstantBuilder::default().with_delay(READY_EVERY).with_max_times(READY_TRIES);
        let opening = (|| road.open(to, vm, migration, Lane { lane, of })).retry(patience);
        let opened = opening.when(|obstacle| matches!(obstacle, Obstacle::NotYet(_))).await;
        opened.map_err(|(Obstacle::NotYet(words) | Obstacle::Never(words))| CarryError::NoRoad(words))
    };
    // The first finds the process that waits; the others find the first.
    let mut lanes: Vec<Box<dyn Stream>> = vec![open(0).await?];
    lanes.extend(try_join_all((1..of).map(open)).await?);
    let call = Call::SaveAttach { migration: Some(migration.0), live: Some(limits) };
    let mut near = raw_stream(socket, call).await?;
    let sent = spread(&mut near, lanes).await;
    // While it is open the vmm may hope that somebody takes the rest.
    drop(near);
    // The vmm that sent it knows best. Whether all of it arrived is the target's to say: it asks for the commit, or reports why not.
    let saved = match (handed_over(socket).await, &sent) {
        // Why nobody takes it any more the vmm does not know.
        (Err(error), Err(broken)) => {
            return Err(CarryError::NotHandedOver(format!("{error} (its connections: {broken})")));
        }
        (saved, _) => saved?,
    };
    let SaveStatus { round, throttle_percent, bytes_sent, settled_us, downtime_us, .. } = saved;
    tracing::info!(
        %vm,
        %migration,
        lanes = of,
        rounds = round,
        throttle_percent,
        sent_mib = bytes_sent >> 20,
        settled_us,
        stood_us = downtime_us,
        "all of the guest was sent"
    );
    if let Err(error) = sent {
        tracing::info!(%vm, %migration, "the stream ended badly after all of the guest was sent: {error}");
    }
    Ok(())
}

/// What the vmm says of it, which knows best; a moment after its stream, which it ends before it says so.
pub async fn handed_over(socket: &Path) -> Result<SaveStatus, CarryError> {
    let said = async || {
        let status = VmmClient::connect(socket).await?.status().await?;
        match status.saving {
            Some(saving) if saving.state == SaveState::Saved => Ok(saving),
            Some(saving) if saving.state == SaveState::Saving => Err(CarryError::StillSending),
            Some(saving) => {
                let words = saving.error.unwrap_or_else(|| "its stream ended before all of it was sent".to_owned());
                Err(CarryError::NotHandedOver(words))
            }
            None => Err(CarryError::NotHandedOver("it runs, and was not sent".to_owned())),
        }
    };
    let patience = ConstantBuilder::default().with_delay(SAID_EVERY).with_max_times(SAID_TRIES);
    said.retry(patience).when(|error| matches!(error, CarryError::StillSending)).await
}
