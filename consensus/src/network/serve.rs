//! Answers the Raft messages of other hosts.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use openraft::AsyncRuntime;
use openraft::Raft;
use openraft::raft::AppendEntriesRequest;
use openraft::storage::RaftStateMachine;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::HostId;
use statemachine::codec;
use tokio::sync::MutexGuard;

use super::messages::AppendAnswer;
use super::messages::ChunkRequest;
use super::messages::SnapshotOffer;
use crate::store::snapshot::SnapshotHandle;
use crate::transport::Channel;
use crate::transport::Peer;
use crate::transport::PeerStream;
use crate::transport::Refusal;
use crate::transport::Transport;
use crate::types::TypeConfig;

/// Largest piece of a snapshot in one answer; one piece is in flight at a time, so that bulk stays small beside
/// heartbeats.
pub const CHUNK_BYTES: u32 = 256 << 10;
/// A piece that does not come ends the transfer; the next offer goes on where it stopped.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);

/// Fetches pieces of a snapshot from the host that offered it.
pub trait ChunkSource: Send + Sync {
    /// At most [`CHUNK_BYTES`] of `part` from `offset`; empty when that host no longer keeps it.
    fn chunk(&self, part: &str, offset: u64) -> BoxFuture<'_, Result<Bytes, String>>;
}

/// The parts behind snapshots, by names that mean the same on every host.
pub trait SnapshotFiles: Send + Sync + 'static {
    /// A piece of a part that this host keeps.
    fn read(&self, part: String, offset: u64, len: u32) -> BoxFuture<'static, Result<Bytes, String>>;

    /// Pulls what `manifest` names and this host lacks: verified and durable when it returns.
    fn pull<'a>(
        &'a self,
        manifest: &'a [u8],
        from: &'a dyn ChunkSource,
    ) -> BoxFuture<'a, Result<SnapshotHandle, String>>;
}

/// The part of a handler that speaks Raft.
pub struct RaftService<R: AsyncRuntime, SM: RaftStateMachine<TypeConfig<R>, SnapshotData = SnapshotHandle>> {
    raft: Raft<TypeConfig<R>, SM>,
    files: Arc<dyn SnapshotFiles>,
    transport: Arc<dyn Transport>,
    /// One snapshot at a time: two would write the same files.
    installing: tokio::sync::Mutex<()>,
}

impl<R, SM> RaftService<R, SM>
where
    R: AsyncRuntime,
    SM: RaftStateMachine<TypeConfig<R>, SnapshotData = SnapshotHandle>,
{
    pub fn new(
        raft: Raft<TypeConfig<R>, SM>,
        files: Arc<dyn SnapshotFiles>,
        transport: Arc<dyn Transport>,
    ) -> RaftService<R, SM> {
        RaftService { raft, files, transport, installing: tokio::sync::Mutex::default() }
    }

    pub async fn vote(&self, body: Bytes) -> Result<Bytes, Refusal> {
        answer(self.raft.vote(question(&body)?).await)
    }

    pub async fn pre_vote(&self, body: Bytes) -> Result<Bytes, Refusal> {
        answer(self.raft.pre_vote(question(&body)?).await)
    }

    pub async fn transfer_leader(&self, body: Bytes) -> Result<Bytes, Refusal> {
        answer(self.raft.handle_transfer_leader(question(&body)?).await)
    }

    pub async fn chunk(&self, body: Bytes) -> Result<Bytes, Refusal> {
        let ChunkRequest { part, offset } = question(&body)?;
        self.files.read(part, offset, CHUNK_BYTES).await.map_err(Refusal::new)
    }

    /// Pulls and installs the snapshot that `leader` offers.
    pub async fn install(&self, leader: HostId, body: Bytes) -> Result<Bytes, Refusal> {
        let offer: SnapshotOffer = question(&body)?;
        let peer = Peer { host: leader, address: offer.address };
        let (_turn, handle) = self.fetch(peer, &offer.manifest).await.map_err(Refusal::new)?;
        answer(self.raft.install_full_snapshot(offer.vote, handle.snapshot()).await)
    }

    /// Pulls what `manifest` names and this host lacks. Nobody else does while the guard lives.
    pub async fn fetch(&self, from: Peer, manifest: &[u8]) -> Result<(MutexGuard<'_, ()>, SnapshotHandle), String> {
        let turn = self.installing.try_lock().map_err(|_| "a snapshot is being installed already".to_owned())?;
        let source = PeerParts { transport: self.transport.clone(), peer: from };
        let handle = self.files.pull(manifest, &source).await?;
        Ok((turn, handle))
    }

    /// Serves a stream of appends or heartbeats until it ends. `admits` is asked about each record that arrives.
    pub async fn appends(&self, stream: PeerStream, admits: impl Fn() -> bool + Send + Sync + 'static) {
        let PeerStream { mut sink, source } = stream;
        let requests = futures::stream::unfold((source, admits), |(mut source, admits)| async move {
            // The end of the stream, a lost connection and a damaged record all end the session; the leader opens
            // another one.
            let record = source.next().await.ok()??;
            let request: AppendEntriesRequest<TypeConfig<R>> = codec::decode(&record).ok()?;
            admits().then_some((request, (source, admits)))
        });
        let mut answers = Box::pin(self.raft.stream_append(requests));
        while let Some(Ok(result)) = answers.next().await {
            let record = Bytes::from(codec::encode(&AppendAnswer::of(result)));
            if sink.send(record).await.is_err() {
                return;
            }
        }
    }
}

struct PeerParts {
    transport: Arc<dyn Transport>,
    peer: Peer,
}

impl ChunkSource for PeerParts {
    fn chunk(&self, part: &str, offset: u64) -> BoxFuture<'_, Result<Bytes, String>> {
        let request = Bytes::from(codec::encode(&ChunkRequest { part: part.to_owned(), offset }));
        let call = self.transport.call(self.peer.clone(), Channel::SnapshotChunk, request, CHUNK_TIMEOUT);
        Box::pin(async move { call.await.map_err(|error| error.to_string()) })
    }
}

fn question<Q: DeserializeOwned>(body: &[u8]) -> Result<Q, Refusal> {
    codec::decode(body).map_err(Refusal::new)
}

fn answer<A: Serialize, E: ToString>(result: Result<A, E>) -> Result<Bytes, Refusal> {
    result.map(|answer| Bytes::from(codec::encode(&answer))).map_err(Refusal::new)
}
