//! One simulated host: hardware, and the life of a hostd on it. Each life has a tokio runtime of its own, whose clock is the
//! host's; dropping it is a SIGKILL.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use consensus::node::NodeConfig;
use consensus::node::NodeOn;
use consensus::node::Timers;
use consensus::platform::Blocking;
use consensus::platform::Exit;
use consensus::platform::Platform;
use consensus::store::StoreConfig;
use consensus::transport::Peer;
use hostd::agent;
use hostd::agent::AgentHandle;
use hostd::agent::cluster::Cluster;
use hostd::agent::plan::StopTimers;
use hostd::duties;
use hostd::duties::DutiesHandle;
use hostd::duties::retention::Retention;
use hostd::grants;
use hostd::grants::Grants;
use hostd::lease;
use hostd::lease::LeaseConfig;
use hostd::lease::LeaseHandle;
use statemachine::BootId;
use statemachine::HostId;
use statemachine::command::HostFacts;
use statemachine::command::Request;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::state::Capacity;
use tokio::runtime::RngSeed;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use uuid::Uuid;

use super::clock::Oscillator;
use super::hardware::Hardware;
use super::network::Life;
use super::network::Network;
use super::processes::StandIns;
use super::random::Seeded;
use super::roads::Roads;
use super::runtime::SimRuntime;

pub type SimNode = NodeOn<SimRuntime>;

/// The lease of the product (DESIGN §5).
pub const LEASE: Duration = Duration::from_secs(12);
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Short, so that a short life trims.
const RETENTION: Retention =
    Retention { keep_for: Duration::from_secs(25), keep_batches: 250, look_every: Duration::from_secs(3) };

/// Why the process had to end, if it had to.
#[derive(Clone, Default)]
pub struct Ending(Arc<Mutex<Option<String>>>);

impl Exit for Ending {
    fn fatal(&self, why: &dyn Display) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| why.to_string());
    }
}

impl Ending {
    pub fn why(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// hostd, once it has started.
#[derive(Clone)]
pub struct Hostd {
    pub node: SimNode,
    pub lease: Arc<LeaseHandle>,
    pub grants: Arc<Grants>,
    _agent: Arc<AgentHandle>,
    _duties: Arc<DutiesHandle>,
    _facts: Arc<watch::Sender<HostFacts>>,
}

/// A process of hostd.
pub struct Process {
    pub life: Life,
    /// `None` while it starts.
    started: Arc<Mutex<Option<Hostd>>>,
    pub ending: Ending,
    runtime: Runtime,
    began: tokio::time::Instant,
    began_local_ns: u64,
    /// The machine did not run since then; its clock did.
    stood_still: bool,
}

pub struct Host {
    pub id: HostId,
    /// Whom it was told of when it joined.
    peers: Vec<HostId>,
    pub hardware: Hardware,
    roads: Roads,
    pub oscillator: Oscillator,
    pub process: Option<Process>,
    pub is_powered: bool,
    /// SIGSTOP of everything on the machine.
    pub is_stopped: bool,
    /// Its disk is failing, or will soon.
    pub disk_fails: bool,
    /// Its disk hung until lately: hostd may end for it.
    pub excused_until_ms: u64,
    pub lives: u64,
    pub boots: u64,
}

pub fn boot_id(host: HostId, boots: u64) -> BootId {
    BootId(Uuid::from_u128((u128::from(host.0) << 64) | u128::from(boots)))
}

pub fn address(host: HostId) -> String {
    format!("192.0.2.{}:7443", host.0)
}

pub fn facts(boot: BootId) -> HostFacts {
    HostFacts {
        boot,
        capacity: Capacity { cpu_threads: 4, memory_mib: 1024 },
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".to_owned(),
        clock_runs_while_stopped: true,
        watchdog_timeout_ms: None,
    }
}

/// The node holds its peer handler, which holds the node: a process that dies must not stay in memory for it.
impl Drop for Process {
    fn drop(&mut self) {
        if let Some(hostd) = &*self.started.lock().unwrap_or_else(PoisonError::into_inner) {
            hostd.node.set_peer_handler(Arc::new(hostd::peer::Router::new()));
        }
    }
}

/// Small stores, so that a short life crosses many segments, snapshots and purges.
fn node_config(host: HostId, peers: &[HostId]) -> NodeConfig {
    let any = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    NodeConfig {
        peers: peers.iter().map(|peer| Peer { host: *peer, address: address(*peer) }).collect(),
        timers: Timers::default(),
        snapshot_every: 60,
        keep_behind_snapshot: 20,
        snapshot_ahead: 150,
        replace_voter_after_ms: 8_000,
        store: StoreConfig {
            wal_segment_bytes: 32 << 10,
            wal_group_bytes: 16 << 10,
            log_cache_bytes: 16 << 10,
            event_segment_bytes: 16 << 10,
        },
        ..NodeConfig::new("/data", any, address(host))
    }
}

impl Host {
    pub fn new(id: HostId, peers: Vec<HostId>, oscillator: Oscillator, roads: Roads) -> Host {
        let hardware = Hardware::new(boot_id(id, 1));
        roads.lead_to(id, hardware.clone());
        Host {
            roads,
            id,
            peers,
            hardware,
            oscillator,
            process: None,
            is_powered: true,
            is_stopped: false,
            disk_fails: false,
            excused_until_ms: 0,
            lives: 0,
            boots: 1,
        }
    }

    pub fn hostd(&self) -> Option<Hostd> {
        let started = &self.process.as_ref()?.started;
        started.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_clock(&self, now_ms: u64) {
        let local_ns = self.oscillator.local_ns(now_ms);
        self.hardware.clock.set(local_ns, self.oscillator.wall_ms(now_ms));
    }

    /// Starts hostd. `genesis` founds the site; the first host's first life alone has it.
    pub fn start(&mut self, network: &Network, now_ms: u64, genesis: Option<Request>) {
        self.lives += 1;
        self.set_clock(now_ms);
        let life = Life { host: self.id, number: self.lives };
        let Ok(runtime) = process_runtime(self.id, self.lives) else { return };
        let began = runtime.block_on(async { tokio::time::Instant::now() });
        let ending = Ending::default();
        let started = Arc::new(Mutex::new(None));
        let transport = network.attach(life, runtime.handle().clone(), self.hardware.clock.clone());
        let platform = Platform {
            clock: self.hardware.clock.clone(),
            disk: Arc::new(self.hardware.disk.clone()),
            entropy: Arc::new(Seeded),
            exit: Arc::new(ending.clone()),
            blocking: Blocking::Inline,
        };
        let stand_ins = StandIns { hardware: self.hardware.clone(), host: self.id, roads: self.roads.clone() };
        let (slot, exit) = (started.clone(), ending.clone());
        let config = node_config(self.id, &self.peers);
        runtime.spawn(async move {
            let starting = async {
                let node = SimNode::start_on(config, platform, transport).await.map_err(|e| chain(&e))?;
                if let Some(genesis) = genesis {
                    node.initialise(genesis).await.map_err(|error| chain(&error))?;
                }
                start_hostd(node, stand_ins).await
            };
            match starting.await {
                Ok(hostd) => *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(hostd),
                Err(why) => exit.fatal(&why),
            }
        });
        let began_local_ns = self.oscillator.local_ns(now_ms);
        self.process = Some(Process { life, started, ending, runtime, began, began_local_ns, stood_still: false });
    }

    /// hostd dies; its runtime goes with every task and handle. Guests live on.
    pub fn kill(&mut self, network: &Network) {
        network.detach(self.id);
        self.hardware.disk.kill();
        self.process = None;
    }

    /// Returns how many unsynced changes were lost.
    pub fn cut_power(&mut self, network: &Network, seed: u64) -> u64 {
        network.detach(self.id);
        self.boots += 1;
        let lost = self.hardware.power_cut(seed, boot_id(self.id, self.boots));
        self.process = None;
        self.is_powered = false;
        self.is_stopped = false;
        self.disk_fails = false;
        lost
    }

    pub fn power_on(&mut self, network: &Network, now_ms: u64) {
        self.is_powered = true;
        self.oscillator.booted_ms = now_ms;
        self.start(network, now_ms, None);
    }

    pub fn stop(&mut self) {
        self.is_stopped = true;
    }

    pub fn go_on(&mut self) {
        self.is_stopped = false;
        if let Some(process) = &mut self.process {
            process.stood_still = true;
        }
    }

    pub fn runs(&self) -> bool {
        self.is_powered && !self.is_stopped
    }

    /// Lets the host run until its clock shows what it shows at `now_ms`.
    pub fn run(&mut self, now_ms: u64) {
        self.set_clock(now_ms);
        if !self.runs() {
            return;
        }
        self.hardware.run(now_ms);
        let local_ns = self.oscillator.local_ns(now_ms);
        let Some(process) = &mut self.process else { return };
        let until = process.began + Duration::from_nanos(local_ns.saturating_sub(process.began_local_ns));
        let stood_still = std::mem::take(&mut process.stood_still);
        process.runtime.block_on(async move {
            if stood_still {
                // All that time passed at once: every timer is late together.
                let gap = until.saturating_duration_since(tokio::time::Instant::now());
                tokio::time::advance(gap).await;
            }
            tokio::time::sleep_until(until).await;
        });
    }

    /// A task on this host's process, for clients that are connected to it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(process) = &self.process {
            process.runtime.spawn(task);
        }
    }
}

/// A clock that stands until it is moved, and wakes in an order that follows from who it is.
fn process_runtime(host: HostId, life: u64) -> std::io::Result<Runtime> {
    let seed = RngSeed::from_bytes(&[host.0.to_le_bytes(), life.to_le_bytes()].concat());
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).rng_seed(seed).build()
}

/// What `hostd::work` starts, over stand-ins.
async fn start_hostd(node: SimNode, stand_ins: StandIns) -> Result<Hostd, String> {
    let cluster: Arc<dyn Cluster> = Arc::new(node.clone());
    let grants = Grants::spawn(grants::keeper::Timers::default(), cluster.clone());
    node.set_peer_handler(Arc::new(grants::Door(grants.clone())));
    let facts = facts(stand_ins.hardware.boot);
    let (publish, guests) = agent::guest_channel();
    let config = LeaseConfig { boot: facts.boot, heartbeat: HEARTBEAT, lease: LEASE, watchdog_armed: false };
    let lease = lease::spawn(config, cluster.clone(), guests);
    let (facts_sender, facts) = watch::channel(facts);
    let processes = Arc::new(stand_ins);
    let stop = StopTimers::default();
    let agent = agent::spawn_on(processes, "/run".into(), stop, cluster.clone(), facts, lease.grant(), publish)
        .await
        .map_err(|error| chain(&error))?;
    Ok(Hostd {
        node,
        lease: Arc::new(lease),
        grants,
        _agent: Arc::new(agent),
        _duties: Arc::new(duties::spawn(cluster, RETENTION)),
        _facts: Arc::new(facts_sender),
    })
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |words, cause| format!("{words}: {cause}"))
}
