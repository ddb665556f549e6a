//! One host's member of the cluster: the door through which hostd proposes, reads, listens and calls its peers.
//!
//! - [`proposals`]: a command reaches the leader and comes back with its seq; [`forward`]: many of them in one message.
//! - [`reads`]: the applied fold, waiting for a seq, linearizable reads from any host.
//! - [`members`]: membership steps, one at a time; leader transfer.
//! - [`handler`]: what this host answers its peers. [`pull`]: a host that is no member asks for what was committed.
//! - [`guard`]: the leader that can no longer lead well gives up; snapshots and purges.
//! - [`status`]: what people and `/metrics` see.
//!
//! Start at [`NodeOn::bootstrap`] for the first host of a site and [`NodeOn::start`] for every other start.

pub mod config;
mod forward;
mod guard;
mod handler;
mod members;
mod proposals;
mod pull;
mod reads;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::AsyncRuntime;
use openraft::Raft;
use openraft::async_runtime::WatchReceiver;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::command::Request;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::config::NodeConfig;
pub use self::config::Timers;
pub use self::guard::GuardReport;
pub use self::handler::PeerHandler;
pub use self::members::MemberError;
pub use self::reads::ReadError;
pub use self::status::NodeMetrics;
pub use self::status::NodeStatus;
pub use self::status::PeerMetrics;
pub use self::status::Role;
use crate::decider::Decider;
use crate::decider::DeciderLimits;
use crate::decider::Leadership;
use crate::decider::ProposeError;
use crate::feed::Outlook;
use crate::network::AddressBook;
use crate::network::Network;
use crate::network::NetworkLimits;
use crate::network::serve::RaftService;
use crate::pki::Identity;
use crate::pki::PkiError;
use crate::platform::Platform;
use crate::store::Closing;
use crate::store::Store;
use crate::store::StoreError;
use crate::store::event_store::EventStore;
use crate::store::health::Health;
use crate::store::snapshot::Snapshots;
use crate::store::state_machine::StateMachine;
use crate::transport::Peer;
use crate::transport::Transport;
use crate::transport::quic::QuicError;
use crate::transport::quic::QuicTransport;
use crate::transport::quic::keys::KEYS_FILE;
use crate::transport::quic::keys::TransportKeys;
use crate::types::LogId;
use crate::types::PeerAddress;
use crate::types::TokioRuntime;
use crate::types::TypeConfig;

/// The product's node. A simulation brings its own runtime: [`NodeOn`].
pub type Node = NodeOn<TokioRuntime>;
pub(crate) type RaftOn<R> = Raft<TypeConfig<R>, StateMachine>;

/// How long the first host waits to lead itself.
const FIRST_ELECTION: Duration = Duration::from_secs(30);

#[derive(Debug, Error)]
pub enum NodeError {
    #[error("the timers are not acceptable")]
    Timers(#[source] openraft::ConfigError),
    #[error("the store of this host does not open")]
    Store(#[from] StoreError),
    #[error("the transport does not start")]
    Transport(#[from] QuicError),
    #[error("the host's keys cannot be read")]
    Keys(#[from] PkiError),
    #[error("the consensus core stopped: {why}")]
    Core { why: String },
    #[error("this site is initialised already; start this host without `init`, or wipe its data directory first")]
    AlreadyInitialised,
    #[error("the first command of the site was not accepted")]
    Genesis(#[source] ProposeError),
    #[error("this host did not become the leader of its own new site within {after_ms} ms")]
    NoFirstLeader { after_ms: u64 },
}

/// See the module. Cloning is cheap and names the same node.
pub struct NodeOn<R: AsyncRuntime> {
    inner: Arc<Inner<R>>,
}

impl<R: AsyncRuntime> Clone for NodeOn<R> {
    fn clone(&self) -> Self {
        NodeOn { inner: self.inner.clone() }
    }
}

pub(crate) struct Inner<R: AsyncRuntime> {
    host: HostId,
    config: NodeConfig,
    platform: Platform,
    transport: Arc<dyn Transport>,
    raft: RaftOn<R>,
    fold: watch::Receiver<Arc<Fold>>,
    events: Arc<EventStore>,
    snapshots: Arc<Snapshots>,
    health: Arc<Health>,
    closing: Closing,
    decider: Decider,
    /// Commands that wait for a message to their leader.
    lanes: forward::Lanes,
    /// Reads that wait for a ReadIndex round.
    reads: mpsc::Sender<reads::Waiting>,
    service: RaftService<R, StateMachine>,
    addresses: Arc<Addresses>,
    peer_handler: RwLock<Option<Arc<dyn PeerHandler>>>,
    /// When a leader's append or heartbeat last arrived, and when a member that knows the leader last answered a pull:
    /// milliseconds of boottime.
    heard_ms: AtomicU64,
    pulled_ms: AtomicU64,
    /// What members say, while this host is none.
    outlook: watch::Sender<Option<Outlook>>,
    /// The newest entry known that made others the members, without this host: what its own log says of it is older.
    left: Mutex<Option<LogId>>,
    /// Since when a leader knows a host as unreachable: milliseconds of its boottime.
    away_since_ms: Mutex<BTreeMap<HostId, u64>>,
    /// One membership change at a time.
    membership: tokio::sync::Mutex<()>,
    guard: Mutex<GuardReport>,
    stop: CancellationToken,
}

/// Where hosts listen: as the fold knows it, else as the membership entry said.
pub(crate) struct Addresses {
    fold: watch::Receiver<Arc<Fold>>,
    members: Mutex<BTreeMap<HostId, String>>,
}

impl AddressBook for Addresses {
    fn address(&self, host: HostId) -> Option<String> {
        if let Some(known) = self.fold.borrow().state.hosts.get(&host) {
            return Some(known.address.clone());
        }
        self.members.lock().unwrap_or_else(PoisonError::into_inner).get(&host).cloned()
    }
}

impl Node {
    /// Starts the first host of a new site: exactly one host does this, once. `genesis` is its `SiteInit`.
    ///
    /// A host that lost power half-way may do it again; one whose site exists is told so.
    pub async fn bootstrap(config: NodeConfig, identity: Identity, genesis: Request) -> Result<Node, NodeError> {
        let node = Node::start(config, identity).await?;
        node.initialise(genesis).await?;
        Ok(node)
    }

    /// Starts this host's member. A host that has just joined starts empty and is found by its leader.
    pub async fn start(config: NodeConfig, identity: Identity) -> Result<Node, NodeError> {
        let platform = Platform::real();
        std::fs::create_dir_all(&config.data_dir).map_err(|source| PkiError::File {
            operation: "create",
            path: config.data_dir.clone(),
            source,
        })?;
        let keys = TransportKeys::load_or_create(&config.data_dir.join(KEYS_FILE), platform.entropy.as_ref())?;
        let transport = QuicTransport::listen(identity, config.listen, &keys)?;
        Node::start_on(config, platform, transport).await
    }
}

impl<R: AsyncRuntime> NodeOn<R> {
    /// Starts a member on a given platform and transport: what a simulation and tests call.
    pub async fn start_on(
        config: NodeConfig,
        platform: Platform,
        transport: Arc<dyn Transport>,
    ) -> Result<NodeOn<R>, NodeError> {
        let host = transport.local();
        let raft_config = Arc::new(config.raft().map_err(NodeError::Timers)?);
        let store = Store::open_with(platform.clone(), &config.data_dir, config.store.clone()).await?;
        let fold = store.fold;
        let addresses = Arc::new(Addresses { fold: fold.clone(), members: Mutex::default() });
        let limits = NetworkLimits {
            append_answer: Duration::from_millis(2 * config.timers.election_max_ms),
            snapshot: Duration::from_millis(config::SNAPSHOT_MS),
        };
        let network = Network::new(transport.clone(), addresses.clone(), config.address.clone(), limits);
        let raft = Raft::new(host.0, raft_config, network, store.log, store.state_machine)
            .await
            .map_err(|error| NodeError::Core { why: error.to_string() })?;
        let limits = DeciderLimits { entry: config.propose_timeout() };
        let (reads, reads_waiting) = mpsc::channel(reads::READS_WAITING);
        let (outlook, told) = watch::channel(None);
        let started_ms = platform.clock.boottime_ns() / 1_000_000;
        let inner = Arc::new(Inner {
            host,
            lanes: forward::Lanes::default(),
            reads,
            decider: Decider::start(raft.clone(), fold.clone(), told, platform.clock.clone(), limits),
            service: RaftService::new(raft.clone(), store.snapshot_files, transport.clone()),
            snapshots: store.snapshots,
            events: store.events,
            health: store.health,
            closing: store.closing,
            config,
            platform,
            transport,
            raft,
            fold,
            addresses,
            peer_handler: RwLock::default(),
            heard_ms: AtomicU64::new(started_ms),
            pulled_ms: AtomicU64::new(0),
            outlook,
            left: Mutex::default(),
            away_since_ms: Mutex::default(),
            membership: tokio::sync::Mutex::default(),
            guard: Mutex::default(),
            stop: CancellationToken::new(),
        });
        inner.transport.serve(Arc::new(handler::NodeHandler::new(&inner)));
        tokio::spawn(inner.stop.clone().run_until_cancelled_owned(guard::watch_over(Arc::downgrade(&inner))));
        let sharing = reads::share_rounds(Arc::downgrade(&inner), reads_waiting);
        tokio::spawn(inner.stop.clone().run_until_cancelled_owned(sharing));
        let pulling = pull::pull_while_outside(Arc::downgrade(&inner));
        tokio::spawn(inner.stop.clone().run_until_cancelled_owned(pulling));
        Ok(NodeOn { inner })
    }

    /// Makes this host the only voter of a new cluster and proposes the first command.
    pub async fn initialise(&self, genesis: Request) -> Result<(), NodeError> {
        if self.fold().state.site.is_some() {
            return Err(NodeError::AlreadyInitialised);
        }
        let core = |error: String| NodeError::Core { why: error };
        let raft = &self.inner.raft;
        if !raft.is_initialized().await.map_err(|error| core(error.to_string()))? {
            let first = PeerAddress { address: self.inner.config.address.clone() };
            let members = BTreeMap::from([(self.inner.host.0, first)]);
            raft.initialize(members).await.map_err(|error| core(error.to_string()))?;
        }
        self.wait_to_lead(FIRST_ELECTION).await?;
        // A former life may have proposed it and lost power before it was told: the barrier has shown it now.
        if self.fold().state.site.is_some() {
            return Err(NodeError::AlreadyInitialised);
        }
        self.propose(genesis).await.map_err(NodeError::Genesis)?;
        Ok(())
    }

    async fn wait_to_lead(&self, limit: Duration) -> Result<(), NodeError> {
        let mut leadership = self.leadership();
        let leads = leadership.wait_for(|leadership| leadership.ready_session().is_some());
        match tokio::time::timeout(limit, leads).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(NodeError::Core { why: "it stopped while it was elected".to_owned() }),
            Err(_) => Err(NodeError::NoFirstLeader { after_ms: limit.as_millis() as u64 }),
        }
    }

    pub fn host(&self) -> HostId {
        self.inner.host
    }

    pub fn platform(&self) -> &Platform {
        &self.inner.platform
    }

    /// Whether this host leads, in which session, and whether it decides yet. Duties of the leader hang on this.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.decider.leadership()
    }

    /// The committed batches, for the event stream.
    pub fn events(&self) -> &Arc<EventStore> {
        &self.inner.events
    }

    /// Stops the member: no proposal, no answer, no write after this returns.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.transport.shutdown().await;
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!("the consensus core did not stop in order: {error}");
        }
    }

    /// As [`Self::shutdown`], and the data directory may be opened again when this returns. The last holder of the node
    /// calls it: others would keep the store open.
    pub async fn close(self) {
        self.shutdown().await;
        let closing = self.inner.closing.clone();
        drop(self);
        closing.closed().await;
    }
}

impl<R: AsyncRuntime> Inner<R> {
    fn peer(&self, host: HostId) -> Option<Peer> {
        self.note_members();
        self.addresses.address(host).map(|address| Peer { host, address })
    }

    fn boottime_ms(&self) -> u64 {
        self.platform.clock.boottime_ns() / 1_000_000
    }

    fn hear(&self) {
        self.heard_ms.store(self.boottime_ms(), Ordering::Relaxed);
    }

    /// Leads, or follows whom. A leader that was not heard for two election timeouts is unknown: openraft goes on
    /// naming it, since a campaign that gets no pre-vote changes nothing.
    fn leadership_now(&self) -> Leadership {
        let leadership = *self.decider.leadership().borrow();
        let pulled_ms = self.boottime_ms().saturating_sub(self.pulled_ms.load(Ordering::Relaxed));
        let silence_ms = self.silence_ms().min(pulled_ms);
        match leadership {
            Leadership::Following { .. } if silence_ms > 2 * self.config.timers.election_max_ms => {
                Leadership::Following { leader: None }
            }
            known => known,
        }
    }

    /// Since a leader appended to this host.
    fn silence_ms(&self) -> u64 {
        self.boottime_ms().saturating_sub(self.heard_ms.load(Ordering::Relaxed))
    }

    fn leader_now(&self) -> Option<HostId> {
        match self.leadership_now() {
            Leadership::Leading { .. } => Some(self.host),
            Leadership::Following { leader } => leader,
        }
    }

    /// Remembers the addresses of the membership entry, for hosts that the fold does not name yet.
    fn note_members(&self) {
        let metrics = self.raft.metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let members = membership.nodes().map(|(host, node)| (HostId(*host), node.address.clone())).collect();
        *self.addresses.members.lock().unwrap_or_else(PoisonError::into_inner) = members;
    }
}
