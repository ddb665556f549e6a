//! openraft's network on our [`Transport`]: this side asks, [`serve`] answers, [`exchange`] drives a stream of appends,
//! [`reach`] tells the log who falls silent.
//!
//! Pre-vote and leader transfer are implemented because openraft's defaults would grant the one and refuse the other
//! (hazard H25). `soft_ttl` bounds each request; a stream has a bound on the wait for each answer, without which a
//! follower that went silent would wedge replication for ever.

mod exchange;
mod messages;
mod reach;
pub mod serve;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::Stream;
use futures::StreamExt;
use openraft::AsyncRuntime;
use openraft::OptionalSend;
use openraft::base::BoxFuture;
use openraft::base::BoxStream;
use openraft::errors::NetworkError;
use openraft::errors::RPCError;
use openraft::errors::ReplicationClosed;
use openraft::errors::StreamingError;
use openraft::errors::Unreachable;
use openraft::network::Backoff;
use openraft::network::RPCOption;
use openraft::network::RaftNetworkFactory;
use openraft::network::v2::RaftNetworkV2;
use openraft::raft::AppendEntriesRequest;
use openraft::raft::AppendEntriesResponse;
use openraft::raft::SnapshotResponse;
use openraft::raft::StreamAppendResult;
use openraft::raft::TransferLeaderRequest;
use openraft::raft::TransferLeaderResponse;
use openraft::raft::VoteRequest;
use openraft::raft::VoteResponse;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::HostId;
use statemachine::codec;
use tokio::time::Instant;

use self::exchange::Slot;
pub use self::messages::SnapshotOffer;
use self::reach::Reach;
use crate::store::snapshot::SnapshotHandle;
use crate::transport::Channel;
use crate::transport::Peer;
use crate::transport::Transport;
use crate::transport::TransportError;
use crate::types::NodeId;
use crate::types::PeerAddress;
use crate::types::Snapshot;
use crate::types::TypeConfig;
use crate::types::Vote;

/// Pause between attempts at a host that cannot be reached.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Where hosts listen, newest knowledge first.
pub trait AddressBook: Send + Sync + 'static {
    fn address(&self, host: HostId) -> Option<String>;
}

#[derive(Debug, Clone, Copy)]
pub struct NetworkLimits {
    /// A follower that leaves an append unanswered this long has its stream reopened.
    pub append_answer: Duration,
    /// From offering a snapshot to its installation.
    pub snapshot: Duration,
}

/// Makes the clients that openraft sends through.
#[derive(Clone)]
pub struct Network {
    transport: Arc<dyn Transport>,
    addresses: Arc<dyn AddressBook>,
    /// Where this host is reached.
    address: String,
    limits: NetworkLimits,
}

impl Network {
    pub fn new(
        transport: Arc<dyn Transport>,
        addresses: Arc<dyn AddressBook>,
        address: String,
        limits: NetworkLimits,
    ) -> Network {
        Network { transport, addresses, address, limits }
    }

    fn client(&self, target: NodeId, node: &PeerAddress, channel: Channel) -> PeerClient {
        PeerClient {
            network: self.clone(),
            host: HostId(target),
            fallback: node.address.clone(),
            channel,
            slot: Slot::default(),
            reach: Reach::default(),
        }
    }
}

impl<R: AsyncRuntime> RaftNetworkFactory<TypeConfig<R>> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, node: &PeerAddress) -> PeerClient {
        self.client(target, node, Channel::Appends)
    }

    async fn new_heartbeat_client(&mut self, target: NodeId, node: &PeerAddress) -> PeerClient {
        self.client(target, node, Channel::Heartbeats)
    }
}

/// One purpose (appends, or heartbeats), one peer.
pub struct PeerClient {
    network: Network,
    host: HostId,
    /// The address in the membership entry, for a host that the fold does not know yet.
    fallback: String,
    channel: Channel,
    /// The long stream, between two sessions of openraft.
    slot: Slot,
    /// Whether its heartbeats are answered, for the log.
    reach: Reach,
}

impl PeerClient {
    fn peer(&self) -> Result<Peer, TransportError> {
        // A factory that connects a node to itself makes openraft panic (its FAQ): say no instead.
        if self.host == self.network.transport.local() {
            let why = "a host does not send Raft messages to itself".to_owned();
            return Err(TransportError::Unreachable { host: self.host, why });
        }
        let address = self.network.addresses.address(self.host).unwrap_or_else(|| self.fallback.clone());
        Ok(Peer { host: self.host, address })
    }

    async fn ask<Q, A>(&self, channel: Channel, question: &Q, timeout: Duration) -> Result<A, TransportError>
    where
        Q: Serialize,
        A: DeserializeOwned,
    {
        let body = Bytes::from(codec::encode(question));
        let answer = self.network.transport.call(self.peer()?, channel, body, timeout).await?;
        codec::decode(&answer).map_err(|source| TransportError::BadRecord { host: self.host, source })
    }
}

/// What openraft makes of our errors: `Unreachable` pauses it, anything else is tried again at once.
fn rpc_error<R: AsyncRuntime>(error: TransportError) -> RPCError<TypeConfig<R>> {
    match error {
        TransportError::Unreachable { .. } | TransportError::Refused { .. } => Unreachable::new(&error).into(),
        _ => NetworkError::new(&error).into(),
    }
}

impl<R: AsyncRuntime> RaftNetworkV2<TypeConfig<R>> for PeerClient {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        let input = Box::pin(futures::stream::once(async move { request }));
        let mut answers = RaftNetworkV2::<TypeConfig<R>>::stream_append(self, input, option).await?;
        let mut response = None;
        // Polled to its end, so that the long stream is kept.
        while let Some(answer) = answers.next().await {
            response = Some(AppendEntriesResponse::from(answer?));
        }
        response.ok_or_else(|| NetworkError::from_string("the stream ended without an answer").into())
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<
            BoxStream<'s, Result<StreamAppendResult<TypeConfig<R>>, RPCError<TypeConfig<R>>>>,
            RPCError<TypeConfig<R>>,
        >,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig<R>>> + OptionalSend + Unpin + 'static,
    {
        async move {
            // A heartbeat whose answer openraft did not wait for is known as unanswered when the next one leaves.
            let reach = (self.channel == Channel::Heartbeats).then(|| self.reach.clone());
            if let Some(reach) = &reach {
                reach.leaves(self.host, Instant::now());
            }
            let peer = self.peer().map_err(rpc_error)?;
            let kept = self.slot.take();
            let stream = match kept {
                Some(stream) => stream,
                None => {
                    let opening = self.network.transport.open(peer, self.channel, option.soft_ttl());
                    opening.await.map_err(rpc_error)?
                }
            };
            // A heartbeat that is late is worth nothing; an append may wait for the follower's disk.
            let limit = match self.channel {
                Channel::Heartbeats => option.hard_ttl(),
                _ => self.network.limits.append_answer.max(option.soft_ttl()),
            };
            let answers = exchange::exchange(self.host, self.slot.clone(), stream, input, limit);
            let Some(reach) = reach else { return Ok(answers) };
            let host = self.host;
            let noted = move |answer: &Result<_, _>| {
                if answer.is_ok() {
                    reach.answers(host, Instant::now());
                }
            };
            Ok(answers.inspect(noted).boxed())
        }
        .boxed()
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        self.ask(Channel::Vote, &request, option.soft_ttl()).await.map_err(rpc_error)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        self.ask(Channel::PreVote, &request, option.soft_ttl()).await.map_err(rpc_error)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig<R>>, StreamingError<TypeConfig<R>>> {
        let address = self.network.address.clone();
        let offer = SnapshotOffer { address, vote, manifest: snapshot.snapshot.manifest.encode() };
        let offered = self.ask(Channel::SnapshotOffer, &offer, self.network.limits.snapshot);
        tokio::select! {
            biased;
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = offered => answer.map_err(|error| match error {
                TransportError::Unreachable { .. } | TransportError::Refused { .. } => {
                    StreamingError::Unreachable(Unreachable::new(&error))
                }
                _ => StreamingError::Network(NetworkError::new(&error)),
            }),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        self.ask(Channel::TransferLeader, &request, option.soft_ttl()).await.map_err(rpc_error)
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(RETRY_PAUSE)))
    }
}
