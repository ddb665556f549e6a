//! A small site, made by the rules themselves: three hosts, tokens, a VM that runs and one that does not.

use hostd_api::event::StateItem;
use statemachine::BootId;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::State;
use statemachine::batch::SealedBatch;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostChange;
use statemachine::command::HostFacts;
use statemachine::command::IdempotencyKey;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::fold::Decision;
use statemachine::invariants;
use statemachine::planner;
use statemachine::state::Capacity;
use statemachine::state::Disk;
use statemachine::state::ExitReason;
use statemachine::state::Fingerprint;
use statemachine::state::GuestStatus;
use statemachine::state::RunStrategy;
use statemachine::state::StateImage;
use statemachine::state::StopMode;
use statemachine::state::TokenPurpose;
use statemachine::state::VmSpec;
use uuid::Uuid;

/// What the clock says whenever something is decided.
pub const WALL_MS: u64 = 1_700_000_000_000;
/// The first host, which leads and receives everything.
pub const LEADER: HostId = HostId(1);

pub struct SmallSite {
    pub fold: Fold,
    /// Every batch from the first on.
    pub batches: Vec<SealedBatch>,
    /// Every request that made one.
    pub requests: Vec<Request>,
}

impl SmallSite {
    pub fn new() -> SmallSite {
        let mut site = SmallSite { fold: Fold::default(), batches: Vec::new(), requests: Vec::new() };
        let root = Actor::Root(LEADER);
        let ca = Fingerprint([9; 32]);
        let id = SiteId(Uuid::from_u128(7));
        site.take(root.clone(), Command::SiteInit { site: id, name: "site".into(), ca, first_host: candidate(1) });
        site.report(LEADER);
        for number in 2..4 {
            let secret_hash = [number; 32];
            let (purpose, note) = (TokenPurpose::Join, "rack 4".to_owned());
            site.take(root.clone(), Command::TokenCreate { purpose, secret_hash, ttl_ms: 10_800_000, note });
            site.take(Actor::Joiner, Command::HostJoin { secret_hash, candidate: candidate(number) });
            let joined = site.fold.state.hosts.iter().map(|(host, _)| *host).max();
            site.report(joined.expect("a site has hosts"));
        }
        for (purpose, number) in [(TokenPurpose::Admin, 77), (TokenPurpose::Join, 78)] {
            let secret_hash = [number; 32];
            site.take(root.clone(), Command::TokenCreate { purpose, secret_hash, ttl_ms: 1000, note: String::new() });
        }
        for (name, run_strategy) in [("web1", RunStrategy::Always), ("web2", RunStrategy::Manual)] {
            let (name, spec) = (name.to_owned(), spec(name));
            site.take(root.clone(), Command::VmDefine { name, cluster: None, spec, run_strategy });
        }
        for command in planner::due(&site.fold.state, LEADER) {
            site.take(Actor::Duty(LEADER), command);
        }
        site
    }

    /// One request of each kind that the site has not seen yet, and what it would make of it.
    pub fn further(&self) -> Vec<(Request, SealedBatch)> {
        let state = &self.fold.state;
        let vm = |name| state.vm_by_name(name).map(|(vm, _)| vm).expect("it was defined");
        let (running, stopped) = (vm("web1"), vm("web2"));
        let permit = state.vms.get(&running).and_then(|vm| vm.permit).expect("it runs");
        let epoch = permit.epoch;
        let other = *state.hosts.iter().map(|(host, _)| host).max().expect("a site has hosts");
        let token = state.tokens.iter().map(|(token, _)| *token).max().expect("it has tokens");
        let (data_center, manager) = state.data_centers.iter().next().expect("a site has one");
        let (data_center, manager) = (*data_center, Actor::Host(manager.spm.expect("it was granted").host));
        let report = ReportId { host: permit.host, boot: permit.boot, counter: 9 };
        let rebooted = ReportId { boot: BootId(Uuid::from_u128(99)), ..report };
        let facts = |boot| HostFacts { boot, ..candidate(9).facts };
        let moved = HostChange { spm_priority: Some(7), failure_domain: Some("rack4".to_owned()) };
        let change = VmChange {
            name: Some("web3".to_owned()),
            run_strategy: Some(RunStrategy::Halted),
            spec: VmSpecChange { vcpus: Some(4), ..VmSpecChange::default() },
        };
        let (root, duty, holder) = (Actor::Root(LEADER), Actor::Duty(LEADER), Actor::Host(permit.host));
        let detail = "oops".to_owned();
        let (status, reason) = (GuestStatus::Up, ExitReason::GuestFault);
        let serial = "01ab".to_owned();
        let commands = vec![
            (&root, Command::TokenRevoke { token }),
            (
                &duty,
                Command::CertificateIssue { host: other, serial, fingerprint: Fingerprint([4; 32]), not_after_ms: 9 },
            ),
            (&root, Command::HostMaintenance { host: other }),
            (&root, Command::HostChange { host: other, change: moved }),
            (&root, Command::VoterCount { voters: 5 }),
            (&duty, Command::SiteRecover { generation: 1, ca: Fingerprint([8; 32]) }),
            (&holder, Command::ReportHost { report: rebooted, facts: facts(rebooted.boot) }),
            (&duty, Command::HostSuspect { host: other }),
            (&duty, Command::HostLost { host: other }),
            (&root, Command::VmChange { vm: running, change }),
            (&root, Command::VmDelete { vm: stopped }),
            (&root, Command::VmStart { vm: stopped, host: Some(other) }),
            (&root, Command::VmStop { vm: running, mode: StopMode::Shutdown }),
            (&root, Command::VmReset { vm: running }),
            (&holder, Command::ReportVmStatus { report, vm: running, epoch, status }),
            (&holder, Command::ReportVmExited { report, vm: running, epoch, reason, detail }),
            (&duty, Command::EventsTrim { upto: Seq(2) }),
            (&manager, Command::SpmRelease { data_center }),
        ];
        let taken = |(actor, command): (&Actor, Command)| {
            let mut site = SmallSite { fold: self.fold.clone(), batches: Vec::new(), requests: Vec::new() };
            site.take(actor.clone(), command);
            site.requests.pop().zip(site.batches.pop()).expect("it was taken")
        };
        commands.into_iter().map(taken).collect()
    }

    fn take(&mut self, actor: Actor, command: Command) {
        // A joiner has no host of its own; a host speaks through itself.
        let origin = match actor {
            Actor::Host(host) => host,
            _ => LEADER,
        };
        let key = IdempotencyKey { key: format!("key-{}", self.fold.head.seq), body_hash: [1; 32] };
        let request = Request { actor, origin, idempotency: Some(key), command };
        match self.fold.decide(&request, WALL_MS) {
            Decision::Batch { batch, sealed, .. } => {
                self.fold.append(&batch, &sealed);
                self.batches.push(sealed);
                self.requests.push(request);
            }
            other => panic!("the small site asks for what the rules allow: {request:?}: {other:?}"),
        }
    }

    fn report(&mut self, host: HostId) {
        let facts = self.fold.state.hosts.get(&host).expect("it has joined").facts.clone();
        let report = ReportId { host, boot: facts.boot, counter: 1 };
        self.take(Actor::Host(host), Command::ReportHost { report, facts });
    }
}

impl Default for SmallSite {
    fn default() -> Self {
        SmallSite::new()
    }
}

/// Decides a request and applies what came of it. Whatever was asked, the invariants hold after it.
pub fn decide(fold: &mut Fold, request: &Request) {
    let Decision::Batch { batch, sealed, .. } = fold.decide(request, WALL_MS) else { return };
    let before = fold.clone();
    fold.append(&batch, &sealed);
    let mut violations = invariants::check(&fold.state);
    violations.extend(invariants::check_step(&before.state, &fold.state));
    assert!(violations.is_empty(), "{request:?} led to {violations:?}");
    assert_eq!(sealed.open().as_ref(), Ok(&batch), "a batch survives being written");
}

/// No rule stands behind events that are only folded, so the state may be odd; every part of it must still be usable.
pub fn look_at(fold: &Fold) {
    let state = &fold.state;
    assert_eq!(state.digest(), state.recompute_digest(), "E2");
    assert_eq!(State::from(StateImage::from(state)), *state, "a state survives being written");
    serde_json::to_string(&StateItem::all(state, fold.head.seq).collect::<Vec<_>>()).expect("a state can be shown");
    for command in planner::due(state, LEADER) {
        let request = Request { actor: Actor::Duty(LEADER), origin: LEADER, idempotency: None, command };
        let _ = fold.decide(&request, WALL_MS);
    }
}

fn candidate(number: u8) -> HostCandidate {
    HostCandidate {
        name: format!("host{number}"),
        address: format!("10.0.0.{number}:7443"),
        public_key: Fingerprint([number; 32]),
        facts: HostFacts {
            boot: BootId(Uuid::from_u128(u128::from(number))),
            capacity: Capacity { cpu_threads: 4, memory_mib: 4096 },
            // More than any site asks for.
            feature_level: 100,
            version: "0.1.0".to_owned(),
            clock_runs_while_stopped: true,
            watchdog_timeout_ms: Some(60_000),
        },
    }
}

fn spec(name: &str) -> VmSpec {
    let disk = Disk::raw("root", &format!("/srv/{name}.raw"));
    VmSpec {
        vcpus: 2,
        memory_mib: 512,
        kernel: "/srv/vmlinuz".to_owned(),
        initrd: Some("/srv/initrd".to_owned()),
        cmdline: "console=ttyS0".to_owned(),
        disks: vec![disk],
        highly_available: true,
        ..VmSpec::default()
    }
}
