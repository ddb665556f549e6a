//! A site of a few hosts in one process, whose links and disks obey the test.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use consensus::decider::ProposeError;
use consensus::node::Node;
use consensus::node::NodeConfig;
use consensus::node::Timers;
use consensus::pki::ClusterCa;
use consensus::pki::HostKey;
use consensus::pki::Identity;
use consensus::platform::Exit;
use consensus::platform::Platform;
use consensus::store::memory_disk::MemoryDisk;
use consensus::transport::Peer;
use consensus::transport::Transport;
use consensus::transport::memory::Switchboard;
use consensus::transport::quic::QuicTransport;
use consensus::transport::quic::keys::KEYS_FILE;
use consensus::transport::quic::keys::TransportKeys;
use statemachine::BootId;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::TokenId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::command::IdempotencyKey;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::fold::Answer;
use statemachine::state::Capacity;
use statemachine::state::Created;
use statemachine::state::Fingerprint;
use statemachine::state::RunStrategy;
use statemachine::state::TokenPurpose;
use statemachine::state::VmSpec;
use uuid::Uuid;

pub const FIRST: HostId = HostId(1);
/// Nothing on a loaded machine takes longer than this; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(40);

/// Remembers why a host had to stop, instead of ending the test process.
#[derive(Clone, Default)]
pub struct Exits(Arc<Mutex<Vec<String>>>);

impl Exit for Exits {
    fn fatal(&self, why: &dyn Display) {
        self.0.lock().unwrap().push(why.to_string());
    }
}

impl Exits {
    pub fn seen(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// The token that every site of these tests makes first.
const ADMIN: TokenId = TokenId(2);

/// One machine: what outlives its member.
struct Machine {
    address: String,
    disk: MemoryDisk,
    dir: tempfile::TempDir,
    identity: Option<Identity>,
    node: Option<Node>,
}

enum Net {
    Memory(Switchboard),
    Quic(Box<ClusterCa>),
}

pub struct Site {
    net: Net,
    machines: BTreeMap<HostId, Machine>,
    pub exits: Exits,
    pub config: fn(&mut NodeConfig),
    counter: u64,
}

impl Site {
    pub async fn over_memory() -> Site {
        Site::found(Net::Memory(Switchboard::new()), |_| ()).await
    }

    pub async fn over_memory_with(config: fn(&mut NodeConfig)) -> Site {
        Site::found(Net::Memory(Switchboard::new()), config).await
    }

    pub async fn over_quic() -> Site {
        let ca = ClusterCa::create(SiteId(Uuid::from_u128(7)), now_ms()).unwrap();
        Site::found(Net::Quic(Box::new(ca)), |_| ()).await
    }

    /// Three hosts that vote.
    pub async fn of_three(mut self) -> Site {
        self.join().await;
        self.join().await;
        self.settle(3).await;
        self
    }

    async fn found(net: Net, config: fn(&mut NodeConfig)) -> Site {
        let mut site = Site { net, machines: BTreeMap::new(), exits: Exits::default(), config, counter: 0 };
        let address = site.new_address();
        site.add_machine(FIRST, address.clone());
        site.start(FIRST).await;
        site.node(FIRST).initialise(genesis(address)).await.unwrap();
        // Whoever bears it is the same actor on every host, as a client that retries elsewhere is.
        let secret_hash = [255; 32];
        let admin =
            Command::TokenCreate { purpose: TokenPurpose::Admin, secret_hash, ttl_ms: 3_600_000, note: String::new() };
        let made = site.accept(by_root(admin)).await;
        assert_eq!(made.created, Some(Created::Token(ADMIN)));
        site
    }

    /// A new host joins, starts, and reports.
    pub async fn join(&mut self) -> HostId {
        self.counter += 1;
        let number = self.counter + 1;
        let mut secret_hash = [0; 32];
        secret_hash[..8].copy_from_slice(&number.to_le_bytes());
        let token =
            Command::TokenCreate { purpose: TokenPurpose::Join, secret_hash, ttl_ms: 3_600_000, note: String::new() };
        self.accept(root(token)).await;
        let address = self.new_address();
        let candidate = candidate(number, address.clone());
        let facts = candidate.facts.clone();
        let join = Command::HostJoin { secret_hash, candidate };
        let joined =
            self.accept(Request { actor: Actor::Joiner, origin: FIRST, idempotency: None, command: join }).await;
        let Some(Created::Host(host)) = joined.created else {
            panic!("a join creates a host, not {:?}", joined.created);
        };
        self.add_machine(host, address);
        self.start(host).await;
        let report = ReportId { host, boot: facts.boot, counter: 1 };
        let report = Command::ReportHost { report, facts };
        self.accept(Request { actor: Actor::Host(host), origin: host, idempotency: None, command: report }).await;
        host
    }

    /// Runs the membership duty, as a leader's hostd does, until so many hosts vote everywhere.
    pub async fn settle(&self, voters: usize) {
        self.until("the membership settles", async || {
            for node in self.nodes() {
                if node.leadership().borrow().ready_session().is_some() {
                    let _ = node.reconcile_membership().await;
                }
            }
            let agreed = |node: &Node| node.status().voters.len() == voters && node.status().leader.is_some();
            self.nodes().all(|node| agreed(&node))
        })
        .await;
    }

    fn new_address(&self) -> String {
        match &self.net {
            Net::Memory(_) => format!("192.0.2.{}:7443", self.machines.len() + 1),
            Net::Quic(_) => {
                // Free now, and bound again in a moment.
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.local_addr().unwrap().to_string()
            }
        }
    }

    fn add_machine(&mut self, host: HostId, address: String) {
        let identity = match &self.net {
            Net::Memory(_) => None,
            Net::Quic(ca) => Some(identity(ca, host)),
        };
        let machine =
            Machine { address, disk: MemoryDisk::new(), dir: tempfile::tempdir().unwrap(), identity, node: None };
        self.machines.insert(host, machine);
    }

    /// Starts the member of a machine on what its disk holds.
    pub async fn start(&mut self, host: HostId) {
        let machine = &self.machines[&host];
        let mut platform = Platform { exit: Arc::new(self.exits.clone()), ..Platform::real() };
        let mut config = NodeConfig::new("/data", "0.0.0.0:0".parse().unwrap(), machine.address.clone());
        // Two shared cores: slower than the product's timers, so that no election is the scheduler's.
        config.timers = Timers { heartbeat_ms: 150, election_min_ms: 450, election_max_ms: 900 };
        config.propose_timeout_ms = 4_000;
        let others = self.machines.iter().filter(|(other, _)| **other != host);
        config.peers = others.map(|(host, other)| Peer { host: *host, address: other.address.clone() }).collect();
        (self.config)(&mut config);
        let transport: Arc<dyn Transport> = match (&self.net, &machine.identity) {
            (Net::Memory(switchboard), _) => {
                platform.disk = Arc::new(machine.disk.clone());
                switchboard.transport(host)
            }
            (Net::Quic(_), identity) => {
                config.data_dir = machine.dir.path().join("data");
                let keys = machine.dir.path().join(KEYS_FILE);
                let keys = TransportKeys::load_or_create(&keys, platform.entropy.as_ref()).unwrap();
                let address = machine.address.parse().unwrap();
                QuicTransport::listen(identity.clone().unwrap(), address, &keys).unwrap()
            }
        };
        let node = Node::start_on(config, platform, transport).await.unwrap();
        self.machines.get_mut(&host).unwrap().node = Some(node);
    }

    /// What its machine holds, in a site over memory.
    pub fn disk(&self, host: HostId) -> MemoryDisk {
        self.machines[&host].disk.clone()
    }

    /// Its machine is gone for good.
    pub fn forget(&mut self, host: HostId) {
        self.machines.remove(&host);
    }

    pub async fn stop(&mut self, host: HostId) {
        let node = self.machines.get_mut(&host).unwrap().node.take().unwrap();
        tokio::time::timeout(PATIENCE, node.close()).await.unwrap();
    }

    pub fn node(&self, host: HostId) -> Node {
        self.machines[&host].node.clone().unwrap()
    }

    pub fn nodes(&self) -> impl Iterator<Item = Node> {
        self.machines.values().filter_map(|machine| machine.node.clone())
    }

    pub fn hosts(&self) -> Vec<HostId> {
        self.machines.keys().copied().collect()
    }

    pub fn switchboard(&self) -> &Switchboard {
        match &self.net {
            Net::Memory(switchboard) => switchboard,
            Net::Quic(_) => panic!("this site has real links"),
        }
    }

    pub fn ca(&self) -> &ClusterCa {
        match &self.net {
            Net::Quic(ca) => ca,
            Net::Memory(_) => panic!("this site has no certificates"),
        }
    }

    /// The host that leads and decides, once there is one.
    pub async fn leader(&self) -> HostId {
        let mut found = None;
        self.until("somebody leads", async || {
            let ready = |node: &Node| node.leadership().borrow().ready_session().is_some();
            found = self.nodes().find(ready).map(|node| node.host());
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// Proposes through any host until the command is accepted, as a client with a key does.
    pub async fn accept(&self, request: Request) -> Answer {
        let mut answer = None;
        self.until("a command is accepted", async || {
            for node in self.nodes() {
                match node.propose(request.clone()).await {
                    Ok(given) => answer = Some(given),
                    Err(ProposeError::Rejected(why)) => panic!("rejected: {why}"),
                    Err(_) => continue,
                }
                return true;
            }
            false
        })
        .await;
        answer.unwrap()
    }

    /// Has a command decided by way of one host, which asks again like any client while nobody leads.
    pub async fn accept_at(&self, host: HostId, request: Request) -> Answer {
        let mut answer = None;
        self.until("a command is accepted by way of one host", async || {
            match self.node(host).propose(request.clone()).await {
                Ok(given) => answer = Some(given),
                Err(ProposeError::Rejected(why)) => panic!("rejected: {why}"),
                Err(_) => {}
            }
            answer.is_some()
        })
        .await;
        answer.unwrap()
    }

    /// A linearizable read of one host, which asks again while nobody leads.
    pub async fn read_at(&self, host: HostId) -> Seq {
        let mut seq = None;
        self.until("a read is answered", async || {
            seq = self.node(host).read_index().await.ok();
            seq.is_some()
        })
        .await;
        seq.unwrap()
    }

    /// Every running member has applied the same, and it is what the furthest of them had when this was called.
    pub async fn agree(&self) {
        let furthest = self.nodes().map(|node| node.fold().head.seq).max().unwrap();
        self.until("all hosts agree", async || {
            let folds: Vec<_> = self.nodes().map(|node| node.fold()).collect();
            folds.iter().all(|fold| fold.head.seq >= furthest && fold.head == folds[0].head)
        })
        .await;
        let digests: Vec<_> = self.nodes().map(|node| node.fold().state.recompute_digest()).collect();
        assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "equal seq, equal digest (E2)");
        assert_eq!(self.exits.seen(), Vec::<String>::new(), "no host had to stop");
    }

    /// Polls until it holds; fails in words when it does not.
    pub async fn until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !holds().await {
            if tokio::time::Instant::now() > deadline {
                let statuses: Vec<_> = self.nodes().map(|node| node.status()).collect();
                panic!("in vain: {what}; {statuses:#?} {:?}", self.exits.seen());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub fn identity(ca: &ClusterCa, host: HostId) -> Identity {
    let key = HostKey::generate().unwrap();
    let issued = ca.sign_request(&key.signing_request().unwrap(), host, &["127.0.0.1".to_owned()], now_ms()).unwrap();
    Identity::new(ca.certificate_pem(), &issued.certificate_pem, &key.to_pem()).unwrap()
}

pub fn now_ms() -> u64 {
    Platform::real().clock.wall_ms()
}

/// An administrator's command; the leader takes the host that forwards it as its origin.
/// The first word of a site.
pub fn genesis(address: String) -> Request {
    by_root(Command::SiteInit {
        site: SiteId(Uuid::from_u128(7)),
        name: "site".to_owned(),
        ca: Fingerprint([9; 32]),
        first_host: candidate(1, address),
    })
}

fn by_root(command: Command) -> Request {
    Request { actor: Actor::Root(FIRST), origin: FIRST, idempotency: None, command }
}

pub fn root(command: Command) -> Request {
    Request { actor: Actor::Token(ADMIN), origin: FIRST, idempotency: None, command }
}

pub fn define_vm(name: &str) -> Command {
    let spec = VmSpec { vcpus: 1, memory_mib: 64, kernel: "/srv/vmlinuz".to_owned(), ..VmSpec::default() };
    Command::VmDefine { name: name.to_owned(), cluster: None, spec, run_strategy: RunStrategy::Halted }
}

/// A VM to define, under a key: a retry of it is harmless.
pub fn keyed(name: &str) -> Request {
    let idempotency = Some(IdempotencyKey { key: name.to_owned(), body_hash: [1; 32] });
    Request { idempotency, ..root(define_vm(name)) }
}

fn candidate(number: u64, address: String) -> HostCandidate {
    HostCandidate {
        name: format!("host{number}"),
        address,
        public_key: Fingerprint([number as u8; 32]),
        facts: HostFacts {
            boot: BootId(Uuid::from_u128(number.into())),
            capacity: Capacity { cpu_threads: 4, memory_mib: 4096 },
            feature_level: FEATURE_LEVEL,
            version: "0.1.0".to_owned(),
            clock_runs_while_stopped: true,
            watchdog_timeout_ms: None,
        },
    }
}
