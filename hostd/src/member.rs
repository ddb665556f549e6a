//! This host as a member of a site: its node, its identity, and what everything else in hostd asks of them.
//!
//! Built by [`Member::start`] after `init`, after `join`, and at every start with an identity on disk. Handlers use
//! [`Member::propose`] for writes and [`Member::read`] for reads.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::Weak;
use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use consensus::decider::Leadership;
use consensus::decider::ProposeError;
use consensus::node::Node;
use consensus::node::NodeConfig;
use consensus::node::NodeError;
use consensus::node::ReadError;
use consensus::node::Timers;
use consensus::pki::Identity;
use consensus::store::event_store::EventStore;
use consensus::store::event_store::EventStoreError;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hostd_api::read::Consistency;
use hostd_api::read::ReadQuery;
use hostd_api::status::Role;
use statemachine::Batch;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::IdempotencyKey;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::state::TokenStatus;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::events::Rendered;
use crate::api::events::Source;
use crate::api::events::SourceError;
use crate::auth::Caller;
use crate::auth::Refusal;
use crate::auth::Right;
use crate::bootstrap::admit::JoinHandler;
use crate::bootstrap::authority::Authority;
use crate::bootstrap::authority::KeyHandler;
use crate::bootstrap::join;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::metrics::Reading;
use crate::peer;
use crate::peer::PeerClients;
use crate::work;
use crate::work::Work;
use crate::work::WorkError;

/// A write waits this long for a leader, failover included.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
const WRITE_PAUSE: Duration = Duration::from_millis(100);
/// `min_seq` is waited for this long, and a write's own seq on the host that answers.
const CATCH_UP: Duration = Duration::from_secs(5);
/// A voter's certificate is a matter for a person when it has less than this left.
const EXPIRY_ALARM_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// Bytes of batches that one read of the event store may return.
const EVENT_READ_BYTES: usize = 1 << 20;

pub struct Member {
    node: Node,
    events: Arc<Rendered<LogSource>>,
    identity: Identity,
    peers: PeerClients,
    authority: Authority,
    pub metrics: Arc<Metrics>,
    work: OnceLock<Work>,
    cancel: CancellationToken,
}

/// Raft as the API shows it.
#[derive(Debug, Clone)]
pub struct RaftView {
    pub role: Role,
    pub leader: Option<HostId>,
    pub voters: Vec<HostId>,
    pub learners: Vec<HostId>,
}

impl Member {
    /// Starts the node: as the first host of a new site when `genesis` is given, else as what the disk says.
    pub async fn start(
        config: &Config,
        identity: Identity,
        genesis: Option<Request>,
        metrics: Arc<Metrics>,
        cancel: CancellationToken,
    ) -> Result<Arc<Member>, NodeError> {
        let node_config = node_config(config);
        let node = match genesis {
            None => Node::start(node_config, identity.clone()).await?,
            Some(genesis) => {
                let node = Node::start(node_config, identity.clone()).await?;
                match node.initialise(genesis).await {
                    // Committed in a former life that lost power before it could note so.
                    Ok(()) | Err(NodeError::AlreadyInitialised) => node,
                    Err(error) => {
                        node.shutdown().await;
                        return Err(error);
                    }
                }
            }
        };
        let authority = Authority::new(config.identity_dir(), identity.clone(), node.clone());
        let member = Member {
            events: Arc::new(Rendered::new(identity.site(), LogSource(EventStore::clone(node.events())))),
            peers: PeerClients::new(identity.clone()),
            authority: authority.clone(),
            node,
            identity,
            metrics,
            work: OnceLock::new(),
            cancel,
        };
        let member = Arc::new(member);
        tokio::spawn(authority.keep(member.cancel.clone()));
        tokio::spawn(count_leaders(member.node.clone(), member.metrics.clone(), member.cancel.clone()));
        Ok(member)
    }

    /// Handlers of the requests between hosts that belong to membership; the agent's side adds its own.
    pub fn peer_router(self: &Arc<Self>) -> peer::Router {
        let member: Weak<Member> = Arc::downgrade(self);
        peer::Router::new()
            .route(peer::kind::JOIN, Arc::new(JoinHandler(member)))
            .route(peer::kind::CA_KEY, Arc::new(KeyHandler(self.authority.clone())))
    }

    /// Starts guests, leases and duties. The node answers other hosts from here on.
    pub async fn start_work(self: &Arc<Self>, config: &Config) -> Result<(), WorkError> {
        let started = work::start(config, self).await?;
        // A second start would be a defect of the caller; the first one stays.
        if let Err(second) = self.work.set(started) {
            second.stop().await;
        }
        Ok(())
    }

    /// `None` for a moment at the start.
    pub fn work(&self) -> Option<&Work> {
        self.work.get()
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn peers(&self) -> &PeerClients {
        &self.peers
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn own(&self) -> HostId {
        self.identity.host()
    }

    pub fn site(&self) -> SiteId {
        self.identity.site()
    }

    /// What this host has applied.
    pub fn fold(&self) -> Arc<Fold> {
        self.node.fold()
    }

    /// For comparisons with stamps; never for a rule.
    pub fn now_ms(&self) -> u64 {
        now_ms()
    }

    /// Cancelled when this host stops being a member, or hostd stops.
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    pub fn events(&self) -> &Arc<Rendered<LogSource>> {
        &self.events
    }

    /// Sends a command to the leader, and goes on through a change of leader. Every command has an idempotency key,
    /// the caller's or one of our own, so that repeating what may have happened already is safe.
    pub async fn propose(
        &self,
        actor: Actor,
        idempotency: Option<IdempotencyKey>,
        command: Command,
    ) -> Result<Answer, Problem> {
        self.refuse_if_removed()?;
        let idempotency = idempotency.or_else(|| Some(own_key()));
        let request = Request { actor, origin: self.own(), idempotency, command };
        let deadline = Instant::now() + WRITE_PATIENCE;
        let outcome = loop {
            let outcome = self.propose_to_this_leader(&request).await;
            let is_final = matches!(outcome, Ok(_) | Err(ProposeError::Rejected(_)));
            if is_final || Instant::now() + WRITE_PAUSE >= deadline {
                break outcome;
            }
            tokio::time::sleep(WRITE_PAUSE).await;
        };
        self.metrics.raft_proposals.with_label_values(&[outcome_name(&outcome)]).inc();
        let answer = outcome.map_err(problem_of_proposal)?;
        // So that the caller's next read here sees it; the log has it already, so being late is no failure.
        if self.node.wait_applied(answer.seq, CATCH_UP).await.is_err() {
            tracing::warn!(seq = %answer.seq, "this host is behind the leader");
        }
        Ok(answer)
    }

    /// A removed host hears of no leader any more; what it should say is why.
    fn refuse_if_removed(&self) -> Result<(), Problem> {
        match self.fold().state.removed_hosts.get(&self.own()) {
            Some(at) => Err(Refusal::Removed { host: self.own(), at: *at }.into()),
            None => Ok(()),
        }
    }

    /// One try. A leader that lost power keeps its connections open until they time out; a new leader ends the wait.
    async fn propose_to_this_leader(&self, request: &Request) -> Result<Answer, ProposeError> {
        let own = self.own();
        let leader_of = |leadership: &Leadership| match leadership {
            Leadership::Leading { .. } => Some(own),
            Leadership::Following { leader } => *leader,
        };
        let mut leadership = self.node.leadership();
        let asked = leader_of(&leadership.borrow());
        tokio::select! {
            biased;
            answered = self.node.propose(request.clone()) => answered,
            changed = leadership.wait_for(|now| asked.is_some() && leader_of(now).is_some_and(|leader| Some(leader) != asked)) => {
                drop(changed);
                Err(ProposeError::Retry { why: "the leader changed".to_owned() })
            }
        }
    }

    /// The fold, as fresh as the caller wants it.
    pub async fn read(&self, query: &ReadQuery) -> Result<Arc<Fold>, Problem> {
        if query.consistency == Some(Consistency::Linearizable) {
            self.read_linearizable().await?;
        }
        if let Some(seq) = query.min_seq {
            self.catch_up(seq).await?;
        }
        Ok(self.fold())
    }

    pub async fn read_linearizable(&self) -> Result<Arc<Fold>, Problem> {
        self.refuse_if_removed()?;
        self.node.read_index().await.map_err(problem_of_read)?;
        Ok(self.fold())
    }

    /// Waits until this host has applied `seq`.
    pub async fn catch_up(&self, seq: Seq) -> Result<Arc<Fold>, Problem> {
        self.node.wait_applied(seq, CATCH_UP).await.map_err(problem_of_read)
    }

    /// Is a caller who was let in still to be served? Long streams ask again and again.
    pub fn still(&self, caller: Caller, right: Right) -> Result<(), Problem> {
        caller.require(right)?;
        let fold = self.fold();
        let refusal = match caller {
            Caller::Root | Caller::Anonymous => return Ok(()),
            Caller::Host(host) => fold.state.removed_hosts.get(&host).map(|at| Refusal::Removed { host, at: *at }),
            Caller::Token { id, .. } => match fold.state.tokens.get(&id) {
                Some(token) if token.status == TokenStatus::Valid && token.expires_ms > self.now_ms() => None,
                _ => Some(Refusal::Token { why: "it was revoked or has expired" }),
            },
        };
        match refusal {
            Some(refusal) => Err(refusal.into()),
            None => Ok(()),
        }
    }

    pub fn raft(&self) -> RaftView {
        let status = self.node.status();
        let role = match status.role {
            consensus::node::Role::Leader => Role::Leader,
            consensus::node::Role::Follower => Role::Follower,
            consensus::node::Role::Candidate => Role::Candidate,
            consensus::node::Role::Learner => Role::Learner,
            consensus::node::Role::Puller => Role::Puller,
        };
        RaftView { role, leader: status.leader, voters: status.voters, learners: status.learners }
    }

    /// Gives the lead to another voter, if this host has it and there is one; waits until another host leads.
    pub async fn hand_over(&self) {
        let raft = self.raft();
        let heir = raft.voters.iter().find(|voter| **voter != self.own());
        let (Role::Leader, Some(heir)) = (raft.role, heir) else { return };
        if let Err(error) = self.node.transfer_leader(*heir).await {
            tracing::warn!(%error, "the lead was not handed over");
            return;
        }
        let mut leadership = self.node.leadership();
        let other_leads = leadership.wait_for(
            |leadership| matches!(leadership, Leadership::Following { leader: Some(leader) } if *leader != self.own()),
        );
        let _ = tokio::time::timeout(Duration::from_secs(5), other_leads).await;
    }

    /// What is wrong now, and what to do, in sentences.
    pub fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        let fold = self.fold();
        let raft = self.node.metrics();
        if let Some(at) = fold.state.removed_hosts.get(&self.own()) {
            alarms.push(format!("this host was removed from its site at seq {at}; to use the machine again, stop hostd, wipe its state and join it with a new token"));
        }
        if !raft.has_leader {
            alarms
                .push("no leader is known: writes wait until a majority of the voters is up and connected".to_owned());
        }
        if let Some(why) = raft.stopped {
            alarms.push(format!("the consensus core of this host stopped ({why}); restart hostd, and see its log"));
        }
        if raft.guard.is_gray {
            alarms.push(
                "the disk or the apply of this leader hangs; it hands over the lead: check the disk under data_dir"
                    .to_owned(),
            );
        }
        if raft.guard.is_refused {
            alarms.push("this leader is not obeyed although its peers answer; it gives up the lead: check clocks and load of the hosts".to_owned());
        }
        if raft.guard.heartbeat_too_short {
            let p99 = raft.guard.round_trip_p99.as_millis();
            alarms.push(format!(
                "round trips between hosts reach {p99} ms; set timers.heartbeat_ms to at least {} on every host",
                3 * p99
            ));
        }
        match self.identity.not_after_ms() {
            Ok(end) if end < self.now_ms() + EXPIRY_ALARM_MS => {
                let days = end.saturating_sub(self.now_ms()) / (24 * 60 * 60 * 1000);
                alarms.push(format!("the certificate of this host expires in {days} days"));
            }
            _ => {}
        }
        let votes = self.raft().voters.contains(&self.own());
        if votes && !self.authority.has_key() {
            alarms.push("this voter does not have the authority's key yet; while it leads, nobody can join".to_owned());
        }
        alarms
    }

    /// The text of `/metrics` at this moment.
    pub fn scrape(&self) -> Result<String, prometheus::Error> {
        let fold = self.fold();
        let reading = Reading {
            own: self.own(),
            fold: &fold,
            raft: &self.node.metrics(),
            oldest: self.node.events().oldest(),
            status: &self.node.status(),
        };
        self.metrics.set(&reading);
        if let Some(work) = self.work() {
            self.metrics.set_work(work);
        }
        self.metrics.text()
    }

    /// Ends the membership of this process. Guests are left alone.
    pub async fn stop(&self) {
        self.cancel.cancel();
        if let Some(work) = self.work() {
            work.stop().await;
        }
        // The handlers hold the node, and the node its handlers.
        self.node.set_peer_handler(Arc::new(peer::Router::new()));
        self.node.shutdown().await;
    }
}

/// A key that nobody else has. The body is this very request, so its hash says nothing.
fn own_key() -> IdempotencyKey {
    IdempotencyKey { key: format!("hostd-{}", uuid::Uuid::new_v4()), body_hash: [0; 32] }
}

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn node_config(config: &Config) -> NodeConfig {
    let mut node = NodeConfig::new(config.raft_dir(), config.address, config.address.to_string());
    node.peers = join::known_peers(&config.identity_dir());
    node.timers = Timers {
        heartbeat_ms: config.timers.heartbeat_ms,
        election_min_ms: config.timers.election_min_ms,
        election_max_ms: config.timers.election_max_ms,
    };
    node.snapshot_every = config.raft.snapshot_every_entries;
    node.keep_behind_snapshot = config.raft.keep_behind_snapshot_entries;
    node
}

async fn count_leaders(node: Node, metrics: Arc<Metrics>, cancel: CancellationToken) {
    let mut leadership = node.leadership();
    let mut last = None;
    loop {
        leadership.borrow_and_update();
        let leader = node.status().leader;
        if leader.is_some() && leader != last {
            metrics.raft_leader_changes.inc();
            last = leader;
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = leadership.changed() => if changed.is_err() { return },
        }
    }
}

fn outcome_name(outcome: &Result<Answer, ProposeError>) -> &'static str {
    match outcome {
        Ok(_) => "ok",
        Err(ProposeError::Rejected(_)) => "rejected",
        Err(ProposeError::Retry { .. }) => "retry",
        Err(ProposeError::Busy { .. }) => "busy",
        Err(ProposeError::NoLeader | ProposeError::NotLeader { .. }) => "no_leader",
    }
}

fn problem_of_proposal(error: ProposeError) -> Problem {
    let code = match &error {
        ProposeError::Rejected(rejection) => return Problem::from(&**rejection),
        ProposeError::Retry { .. } => Code::Retry,
        ProposeError::Busy { .. } => Code::Busy,
        ProposeError::NoLeader | ProposeError::NotLeader { .. } => Code::NoLeader,
    };
    Problem::new(code, error.to_string())
}

fn problem_of_read(error: ReadError) -> Problem {
    let code = match error {
        ReadError::NoLeader => Code::NoLeader,
        ReadError::NotConfirmed { .. } => Code::Retry,
        ReadError::Lagging { .. } => Code::NotCaughtUp,
    };
    Problem::new(code, error.to_string())
}

/// The event store of this host, as the stream reads it.
#[derive(Clone)]
pub struct LogSource(EventStore);

impl Source for LogSource {
    async fn read(&self, after: Seq, limit: usize) -> Result<Vec<Batch>, SourceError> {
        let stored = match self.0.read(after, limit, EVENT_READ_BYTES).await {
            Ok(stored) => stored,
            Err(EventStoreError::Trimmed { oldest, .. }) => return Err(SourceError::Trimmed { oldest }),
            // A snapshot of the fold may be a moment ahead of the store.
            Err(EventStoreError::Ahead { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(SourceError::Broken(peer::chain(&error))),
        };
        let opened = stored.iter().map(|stored| stored.sealed.open());
        opened.collect::<Result<_, _>>().map_err(|error| SourceError::Broken(error.to_string()))
    }

    fn oldest(&self) -> Seq {
        self.0.oldest()
    }

    fn watch_head(&self) -> watch::Receiver<Seq> {
        self.0.watch_head()
    }
}
