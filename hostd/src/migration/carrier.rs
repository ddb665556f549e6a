//! The source's side: carries one guest's stream.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backon::ConstantBuilder;
use backon::Retryable;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use thiserror::Error;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::io::copy;
use tokio::io::copy_buf;
use tokio::io::sink;
use vmm_control::Call;
use vmm_control::LiveLimits;
use vmm_control::SaveState;

use super::Obstacle;
use super::Road;
use crate::agent::vmm_client::ClientError;
use crate::agent::vmm_client::VmmClient;
use crate::agent::vmm_client::raw_stream;

/// The target hears of the migration from the log and starts a process first.
const READY_EVERY: Duration = Duration::from_millis(100);
const READY_TRIES: usize = 600;
/// A vmm notices within a second that its client is gone.
const SAID_EVERY: Duration = Duration::from_millis(50);
const SAID_TRIES: usize = 600;
/// Guest memory comes in large frames; answers are a few small ones.
const OUT_BYTES: usize = 1 << 20;
const ANSWERS_MAX: u64 = 64 << 10;

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
}

/// Returns when the stream has ended, and says whether all of the guest went into it. From its end on the guest stands still, and
/// only the log says whether it goes on here.
pub async fn carry(road: Arc<dyn Road>, socket: &Path, journey: Journey) -> Result<(), CarryError> {
    let Journey { vm, migration, to } = journey;
    let open = || road.open(to, vm, migration);
    let patience = ConstantBuilder::default().with_delay(READY_EVERY).with_max_times(READY_TRIES);
    let opened = open.retry(patience).when(|obstacle| matches!(obstacle, Obstacle::NotYet(_))).await;
    let mut far = opened.map_err(|(Obstacle::NotYet(words) | Obstacle::Never(words))| CarryError::NoRoad(words))?;
    let live = Some(LiveLimits::default());
    let mut near = raw_stream(socket, Call::SaveAttach { migration: Some(migration.0), live }).await?;
    let sent = send(&mut near, &mut far).await;
    // While it is open the vmm may hope that somebody takes the rest.
    drop(near);
    // The vmm that sent it knows best. Whether all of it arrived is the target's to say: it asks for the commit, or reports why not.
    handed_over(socket).await?;
    if let Err(error) = sent {
        tracing::info!(%vm, %migration, "the stream ended badly after all of the guest was sent: {error}");
    }
    Ok(())
}

/// Everything that the vmm gives out; then the target's answers until it hangs up, which tell it that nobody waits for more.
async fn send(near: &mut (impl AsyncRead + Unpin), far: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffered = BufReader::with_capacity(OUT_BYTES, near);
    copy_buf(&mut buffered, far).await?;
    far.shutdown().await?;
    copy(&mut far.take(ANSWERS_MAX), &mut sink()).await.map(|_| ())
}

/// What the vmm says of it, which knows best; a moment after its stream, which it ends before it says so.
async fn handed_over(socket: &Path) -> Result<(), CarryError> {
    let said = async || {
        let status = VmmClient::connect(socket).await?.status().await?;
        match status.saving {
            Some(saving) if saving.state == SaveState::Saved => Ok(()),
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
