//! A cluster of a few hosts for stories: the fold, and a clock.

use pnet_base::MacAddr;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::command::IdempotencyKey;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::fold::Answer;
use statemachine::fold::Decision;
use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::SiteId;
use statemachine::ids::VmId;
use statemachine::planner;
use statemachine::rejection::Rejection;
use statemachine::state::Capacity;
use statemachine::state::Disk;
use statemachine::state::ExitReason;
use statemachine::state::Fingerprint;
use statemachine::state::Nic;
use statemachine::state::Permit;
use statemachine::state::RunStrategy;
use statemachine::state::TokenPurpose;
use statemachine::state::VmSpec;
use statemachine::view;
use statemachine::view::VmStatus;
use uuid::Uuid;

pub struct Cluster {
    pub fold: Fold,
    pub clock_ms: u64,
    counter: u64,
    secrets: u8,
}

pub fn boot(number: u128) -> BootId {
    BootId(Uuid::from_u128(number))
}

type Said = Result<Answer, Rejection>;

impl Cluster {
    /// A site with so many hosts, all of which have reported.
    pub fn of(hosts: u16) -> Cluster {
        let mut cluster = Cluster { fold: Fold::default(), clock_ms: 1_000_000, counter: 0, secrets: 100 };
        cluster.root(Cluster::init_command()).expect("a new site");
        for number in 2..=hosts {
            let secret_hash = cluster.token(TokenPurpose::Join, 60_000);
            let join = Command::HostJoin { secret_hash, candidate: Cluster::candidate(number) };
            cluster.ask(Actor::Joiner, HostId(1), join).expect("a fresh token");
        }
        for index in 0..usize::from(hosts) {
            let host = cluster.host(index);
            let facts = cluster.fold.state.hosts.get(&host).expect("joined").facts.clone();
            let report = cluster.report(host);
            cluster.ask(Actor::Host(host), host, Command::ReportHost { report, facts }).expect("its first word");
        }
        cluster
    }

    pub fn init_command() -> Command {
        Command::SiteInit {
            site: SiteId(Uuid::from_u128(7)),
            name: "test".to_owned(),
            ca: Fingerprint([9; 32]),
            first_host: Cluster::candidate(1),
        }
    }

    /// 4 CPU threads, 2048 MiB.
    pub fn candidate(number: u16) -> HostCandidate {
        HostCandidate {
            name: format!("host{number}"),
            address: format!("10.0.0.{number}:7443"),
            public_key: Fingerprint([number as u8; 32]),
            facts: HostFacts {
                boot: boot(u128::from(number)),
                capacity: Capacity { cpu_threads: 4, memory_mib: 2048 },
                feature_level: FEATURE_LEVEL,
                version: "0.1.0".to_owned(),
                clock_runs_while_stopped: true,
                watchdog_timeout_ms: None,
            },
        }
    }

    fn spec(vcpus: u32, memory_mib: u64) -> VmSpec {
        VmSpec {
            vcpus,
            memory_mib,
            kernel: "/srv/vmlinuz".to_owned(),
            cmdline: "console=ttyS0".to_owned(),
            ..VmSpec::default()
        }
    }

    fn definition(name: &str, spec: VmSpec, run_strategy: RunStrategy) -> Command {
        Command::VmDefine { name: name.to_owned(), cluster: None, spec, run_strategy }
    }

    pub fn define(name: &str, vcpus: u32, memory_mib: u64, run_strategy: RunStrategy) -> Command {
        Cluster::definition(name, Cluster::spec(vcpus, memory_mib), run_strategy)
    }

    pub fn define_ha(name: &str, vcpus: u32, memory_mib: u64) -> Command {
        let spec = VmSpec { highly_available: true, ..Cluster::spec(vcpus, memory_mib) };
        Cluster::definition(name, spec, RunStrategy::Manual)
    }

    pub fn define_on_disk(name: &str, path: &str, shareable: bool) -> Command {
        Cluster::define_with_disks(name, vec![Disk { shareable, ..Disk::raw("root", path) }])
    }

    pub fn define_with_disks(name: &str, disks: Vec<Disk>) -> Command {
        Cluster::define_with(name, disks, 0)
    }

    /// With so many network cards.
    pub fn define_with(name: &str, disks: Vec<Disk>, nics: usize) -> Command {
        let nic = |number| Nic { id: format!("n{number}"), bridge: "br0".to_owned(), mac: None, slot: None };
        let spec = VmSpec { disks, nics: (0..nics).map(nic).collect(), ..Cluster::spec(1, 64) };
        Cluster::definition(name, spec, RunStrategy::Manual)
    }

    /// On one network, with the address that is given or made.
    pub fn define_with_nic(name: &str, mac: Option<MacAddr>) -> Command {
        Cluster::define_on_network(name, Nic { id: "lan".to_owned(), bridge: "br0".to_owned(), mac, slot: None })
    }

    pub fn define_on_bridge(name: &str, bridge: &str) -> Command {
        Cluster::define_on_network(name, Nic { id: "lan".to_owned(), bridge: bridge.to_owned(), mac: None, slot: None })
    }

    fn define_on_network(name: &str, nic: Nic) -> Command {
        let spec = VmSpec { nics: vec![nic], ..Cluster::spec(1, 64) };
        Cluster::definition(name, spec, RunStrategy::Manual)
    }

    pub fn request(&self, actor: Actor, origin: HostId, command: Command) -> Request {
        Request { actor, origin, idempotency: None, command }
    }

    pub fn ask(&mut self, actor: Actor, origin: HostId, command: Command) -> Said {
        let request = self.request(actor, origin, command);
        self.say(&request)
    }

    pub fn root(&mut self, command: Command) -> Said {
        self.ask(Actor::Root(HostId(1)), HostId(1), command)
    }

    pub fn duty(&mut self, command: Command) -> Said {
        let leader = self.host(0);
        self.ask(Actor::Duty(leader), leader, command)
    }

    pub fn keyed(&mut self, key: &str, body: u8, command: Command) -> Said {
        let mut request = self.request(Actor::Root(HostId(1)), HostId(1), command);
        request.idempotency = Some(IdempotencyKey { key: key.to_owned(), body_hash: [body; 32] });
        self.say(&request)
    }

    fn say(&mut self, request: &Request) -> Said {
        self.clock_ms += 1;
        match self.fold.decide(request, self.clock_ms) {
            Decision::Batch { batch, sealed, answer } => {
                self.fold.append(&batch, &sealed);
                Ok(answer)
            }
            Decision::Settled(answer) => Ok(answer),
            Decision::Rejected(rejection) => Err(rejection),
        }
    }

    /// Makes a token and returns the hash of its secret.
    pub fn token(&mut self, purpose: TokenPurpose, ttl_ms: u64) -> [u8; 32] {
        self.secrets += 1;
        let secret_hash = [self.secrets; 32];
        self.root(Command::TokenCreate { purpose, secret_hash, ttl_ms, note: String::new() }).expect("a token");
        secret_hash
    }

    /// A machine with a fresh token becomes a host.
    pub fn join(&mut self, number: u16) -> HostId {
        let secret_hash = self.token(TokenPurpose::Join, 60_000);
        let join = Command::HostJoin { secret_hash, candidate: Cluster::candidate(number) };
        let by = self.host(0);
        let joined = self.ask(Actor::Joiner, by, join).expect("a fresh token");
        match joined.created {
            Some(statemachine::state::Created::Host(host)) => host,
            other => panic!("a join creates a host, not {other:?}"),
        }
    }

    pub fn host(&self, index: usize) -> HostId {
        *self.fold.state.hosts.iter().nth(index).expect("so many hosts").0
    }

    pub fn vm(&self, name: &str) -> VmId {
        self.fold.state.vm_by_name(name).expect("defined").0
    }

    pub fn report(&mut self, host: HostId) -> ReportId {
        self.counter += 1;
        let boot = self.fold.state.hosts.get(&host).map_or(boot(0), |host| host.facts.boot);
        ReportId { host, boot, counter: self.counter }
    }

    pub fn grow(&mut self, host: HostId, memory_mib: u64) {
        let mut facts = self.fold.state.hosts.get(&host).expect("joined").facts.clone();
        facts.capacity.memory_mib = memory_mib;
        let report = self.report(host);
        self.ask(Actor::Host(host), host, Command::ReportHost { report, facts }).expect("changed facts");
    }

    pub fn reboot(&mut self, host: HostId, boot: BootId) -> Said {
        let mut facts = self.fold.state.hosts.get(&host).expect("joined").facts.clone();
        facts.boot = boot;
        let report = ReportId { boot, ..self.report(host) };
        self.ask(Actor::Host(host), host, Command::ReportHost { report, facts })
    }

    pub fn start(&mut self, name: &str) -> Said {
        let vm = self.vm(name);
        self.root(Command::VmStart { vm, host: None })
    }

    pub fn exit(&mut self, name: &str, reason: ExitReason) {
        let (vm, permit) = (self.vm(name), self.permit(name));
        let report = self.report(permit.host);
        let exited = Command::ReportVmExited { report, vm, epoch: permit.epoch, reason, detail: String::new() };
        self.ask(Actor::Host(permit.host), permit.host, exited).expect("its own guest");
    }

    pub fn permit(&self, name: &str) -> Permit {
        self.fold.state.vm_by_name(name).and_then(|(_, vm)| vm.permit).expect("it holds a permit")
    }

    pub fn last_epoch(&self, name: &str) -> Epoch {
        let (_, vm) = self.fold.state.vm_by_name(name).expect("defined");
        vm.last_exit.as_ref().expect("it ran before").epoch
    }

    pub fn status(&self, name: &str) -> VmStatus {
        let (id, vm) = self.fold.state.vm_by_name(name).expect("defined");
        view::vm_status(&self.fold.state, id, vm)
    }

    /// What the leader's planner owes, once.
    pub fn run_duties(&mut self) {
        for command in planner::due(&self.fold.state, self.host(0)) {
            self.duty(command).expect("what is due is possible here");
        }
    }
}
