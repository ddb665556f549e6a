//! What a member does besides serving: its guests, its leases, and the leader's duties.
//!
//! They know each other through channels that are made here: the lease names the agent's guests in its heartbeats, the
//! agent acts on the lease's grants, the watchdog looks at the guests.

use std::sync::Arc;

use consensus::node::PeerHandler;
use statemachine::command::HostFacts;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent;
use crate::agent::AgentConfig;
use crate::agent::AgentError;
use crate::agent::AgentHandle;
use crate::agent::cluster::Cluster;
use crate::config::Config;
use crate::duties;
use crate::duties::DutiesHandle;
use crate::facts;
use crate::facts::FactsError;
use crate::grants;
use crate::grants::Grants;
use crate::grants::wire::HEARTBEAT;
use crate::lease;
use crate::lease::LeaseConfig;
use crate::lease::LeaseHandle;
use crate::member::Member;
use crate::migration::MemberRoad;
use crate::migration::door::Arrivals;
use crate::watchdog::Watchdog;
use crate::watchdog::WatchdogError;

#[derive(Debug, Error)]
pub enum WorkError {
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
}

/// Everything that runs while this host is a member.
pub struct Work {
    pub agent: AgentHandle,
    pub lease: LeaseHandle,
    pub grants: Arc<Grants>,
    pub duties: DutiesHandle,
    /// Guests from other hosts that are on their way in.
    pub arrivals: Arc<Arrivals>,
    /// Feeds the watchdog until cancelled.
    pub watchdog: Option<CancellationToken>,
    /// Open as long as the agent may ask.
    _facts: watch::Sender<HostFacts>,
}

/// Starts all of it, and opens the door for other hosts' requests.
pub async fn start(config: &Config, member: &Arc<Member>) -> Result<Work, WorkError> {
    let cluster: Arc<dyn Cluster> = Arc::new(member.node().clone());
    let grants = Grants::spawn(grants::keeper::Timers::from(config), cluster.clone());
    let heartbeats: Arc<dyn PeerHandler> = Arc::new(grants::Door(grants.clone()));
    member.node().set_peer_handler(Arc::new(member.peer_router().route(HEARTBEAT, heartbeats)));

    let watchdog = config.watchdog.as_ref().map(|watchdog| Watchdog::arm(&watchdog.device)).transpose()?;
    let facts = facts::collect(config, watchdog.as_ref().map(Watchdog::timeout_ms))?;
    let (publish, guests) = agent::guest_channel();
    let lease_config = LeaseConfig::new(config, facts.boot, watchdog.is_some());
    let lease = lease::spawn(lease_config, cluster.clone(), guests.clone());
    let (facts_sender, facts) = watch::channel(facts);
    let road = Arc::new(MemberRoad { member: member.clone(), lanes: config.migration.connections });
    let agent = agent::spawn(AgentConfig::from(config), road, cluster.clone(), facts, lease.grant(), publish).await?;
    let watchdog = watchdog.map(|watchdog| watchdog.spawn(guests));
    Ok(Work {
        agent,
        lease,
        grants,
        duties: duties::spawn(cluster, config.events.retention()),
        arrivals: Arc::default(),
        watchdog,
        _facts: facts_sender,
    })
}

impl Work {
    /// Stops everything but the guests.
    pub async fn stop(&self) {
        self.duties.shutdown();
        self.grants.shutdown();
        self.lease.shutdown();
        self.agent.shutdown().await;
        if let Some(watchdog) = &self.watchdog {
            watchdog.cancel();
        }
    }
}
