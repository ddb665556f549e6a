//! A site for tests: the pure core behind a handful of words, with no Raft. Every step is a real command that `decide` took.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use consensus::decider::Leadership;
use consensus::decider::ProposeError;
use consensus::platform::Platform;
use consensus::store::event_store::EventStore;
use consensus::transport::PeerKind;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::fold::Answer;
use statemachine::fold::Decision;
use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use statemachine::ids::SiteId;
use statemachine::ids::VmId;
use statemachine::rejection::Rejection;
use statemachine::state::Capacity;
use statemachine::state::Created;
use statemachine::state::ExitReason;
use statemachine::state::Fingerprint;
use statemachine::state::GuestStatus;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::TokenPurpose;
use statemachine::state::VmSpec;
use tokio::sync::watch;
use uuid::Uuid;

use crate::agent::cluster::Cluster;
use crate::agent::cluster::MembershipStep;
use crate::agent::cluster::Unanswered;
use crate::grants::Grants;

pub fn boot(n: u128) -> BootId {
    BootId(Uuid::from_u128(n))
}

pub fn facts(boot: BootId) -> HostFacts {
    HostFacts {
        boot,
        capacity: Capacity { cpu_threads: 8, memory_mib: 8192 },
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".to_owned(),
        clock_runs_while_stopped: true,
        watchdog_timeout_ms: None,
    }
}

pub fn spec(release: ReleaseClass) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib: 64,
        kernel: "/boot/vmlinuz".to_owned(),
        cmdline: "console=ttyS0".to_owned(),
        release: Some(release),
        ..VmSpec::default()
    }
}

/// A site whose hosts are all up. Each host's first incarnation is `boot(number of the host in order)`.
pub struct Site {
    pub fold: Mutex<Fold>,
    publish: watch::Sender<Arc<Fold>>,
    pub hosts: Vec<HostId>,
    reports: Mutex<u64>,
}

impl Site {
    pub fn with_hosts(count: usize) -> Site {
        let (publish, _) = watch::channel(Arc::new(Fold::default()));
        let mut site = Site { fold: Mutex::new(Fold::default()), publish, hosts: Vec::new(), reports: Mutex::new(0) };
        let candidate = |n: usize| HostCandidate {
            name: format!("h{n}"),
            address: format!("10.0.0.{n}:7443"),
            public_key: Fingerprint::of(&[n as u8]),
            facts: facts(boot(n as u128)),
        };
        let init = Command::SiteInit {
            // Its own in every test: ids of VMs follow from it, and control groups are named after them.
            site: SiteId(Uuid::new_v4()),
            name: "lab".to_owned(),
            ca: Fingerprint::of(b"ca"),
            first_host: candidate(1),
        };
        for n in 1..=count {
            let created = if n == 1 {
                site.must(Actor::Root(HostId(1)), init.clone()).created
            } else {
                let secret_hash = [n as u8; 32];
                let token = Command::TokenCreate {
                    purpose: TokenPurpose::Join,
                    secret_hash,
                    ttl_ms: 60_000,
                    note: String::new(),
                };
                site.must(Actor::Root(site.hosts[0]), token);
                site.must(Actor::Joiner, Command::HostJoin { secret_hash, candidate: candidate(n) }).created
            };
            let Some(Created::Host(host)) = created else { panic!("a join creates a host") };
            site.hosts.push(host);
            site.report_boot(host, boot(n as u128));
        }
        site
    }

    pub fn now(&self) -> Fold {
        self.fold.lock().unwrap().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Fold>> {
        self.publish.subscribe()
    }

    pub fn request(&self, request: &Request) -> Result<Answer, Rejection> {
        let mut fold = self.fold.lock().unwrap();
        let answer = match fold.decide(request, 1_000) {
            Decision::Batch { batch, sealed, answer } => {
                fold.append(&batch, &sealed);
                Ok(answer)
            }
            Decision::Settled(answer) => Ok(answer),
            Decision::Rejected(rejection) => Err(rejection),
        };
        self.publish.send_replace(Arc::new(fold.clone()));
        answer
    }

    pub fn try_command(&self, actor: Actor, command: Command) -> Result<Answer, Rejection> {
        let origin = match &actor {
            Actor::Root(host) | Actor::Host(host) | Actor::Duty(host) => *host,
            Actor::Token(_) | Actor::Joiner => self.hosts[0],
        };
        self.request(&Request { actor, origin, idempotency: None, command })
    }

    pub fn must(&self, actor: Actor, command: Command) -> Answer {
        self.try_command(actor, command).expect("the command is accepted")
    }

    pub fn root(&self, command: Command) -> Answer {
        self.must(Actor::Root(self.hosts[0]), command)
    }

    pub fn duty(&self, command: Command) -> Answer {
        self.must(Actor::Duty(self.hosts[0]), command)
    }

    pub fn report_id(&self, host: HostId, boot: BootId) -> ReportId {
        let mut counter = self.reports.lock().unwrap();
        *counter += 1;
        ReportId { host, boot, counter: *counter }
    }

    pub fn report_boot(&self, host: HostId, boot: BootId) {
        let report = self.report_id(host, boot);
        self.must(Actor::Host(host), Command::ReportHost { report, facts: facts(boot) });
    }

    pub fn boot_of(&self, host: HostId) -> BootId {
        self.now().state.hosts.get(&host).expect("a host of the site").facts.boot
    }

    pub fn define(&self, name: &str, spec: VmSpec) -> VmId {
        let define =
            Command::VmDefine { name: name.to_owned(), cluster: None, spec, run_strategy: RunStrategy::Manual };
        let Some(Created::Vm(vm)) = self.root(define).created else { panic!("a definition creates a vm") };
        vm
    }

    /// Starts a VM on that host; answers with the epoch of its permit.
    pub fn start(&self, vm: VmId, host: HostId) -> Epoch {
        Epoch::from(self.root(Command::VmStart { vm, host: Some(host) }).seq)
    }

    /// A host's word about a guest that it runs.
    pub fn status(&self, vm: VmId, host: HostId, status: GuestStatus) {
        let epoch = self.now().state.vms.get(&vm).and_then(|vm| vm.permit).expect("it runs").epoch;
        let report = self.report_id(host, self.boot_of(host));
        self.must(Actor::Host(host), Command::ReportVmStatus { report, vm, epoch, status });
    }

    pub fn exited(&self, vm: VmId, epoch: Epoch, host: HostId) {
        let report = self.report_id(host, self.boot_of(host));
        let reason = ExitReason::GuestPoweredOff;
        let exited = Command::ReportVmExited { report, vm, epoch, reason, detail: String::new() };
        self.must(Actor::Host(host), exited);
    }
}

/// A host of a test site, as its own duties see the cluster: no Raft, one log, a lead and a majority that tests give and take.
pub struct TestCluster {
    pub site: Arc<Site>,
    host: HostId,
    platform: Platform,
    /// What every look at the membership takes as its step.
    pub membership_step: Mutex<Option<MembershipStep>>,
    pub membership_looks: AtomicU64,
    leadership: watch::Sender<Leadership>,
    pub has_majority: AtomicBool,
    /// Where heartbeats to the leader go.
    pub keeper: OnceLock<Arc<Grants>>,
}

impl TestCluster {
    pub fn of(site: &Arc<Site>, host: HostId) -> Arc<TestCluster> {
        let (leadership, _) = watch::channel(Leadership::Following { leader: None });
        let (site, has_majority, keeper) = (site.clone(), AtomicBool::new(true), OnceLock::new());
        let (membership_step, membership_looks) = (Mutex::default(), AtomicU64::new(0));
        let platform = Platform::real();
        Arc::new(TestCluster {
            site,
            host,
            platform,
            membership_step,
            membership_looks,
            leadership,
            has_majority,
            keeper,
        })
    }

    pub fn set_leadership(&self, leadership: Leadership) {
        self.leadership.send_replace(leadership);
    }

    pub fn lead(&self, session: u64) {
        self.set_leadership(Leadership::Leading { session, ready: true });
    }
}

impl Cluster for TestCluster {
    fn host(&self) -> HostId {
        self.host
    }

    fn platform(&self) -> &Platform {
        &self.platform
    }

    fn fold(&self) -> Arc<Fold> {
        Arc::new(self.site.now())
    }

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        self.site.watch()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Answer, ProposeError>> {
        let decided = match self.has_majority.load(Ordering::SeqCst) {
            true => self.site.request(&request).map_err(ProposeError::from),
            false => Err(ProposeError::NoLeader),
        };
        async move { decided }.boxed()
    }

    fn confirm_lead(&self, session: u64) -> BoxFuture<'_, Result<Seq, Unanswered>> {
        let leads = self.leadership.borrow().ready_session() == Some(session);
        let proven = leads && self.has_majority.load(Ordering::SeqCst);
        let seq = self.site.now().head.seq;
        async move { proven.then_some(seq).ok_or_else(|| Unanswered("no majority".to_owned())) }.boxed()
    }

    fn peer_call(
        &self,
        _to: HostId,
        _kind: PeerKind,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Bytes, Unanswered>> {
        let keeper = self.keeper.get().cloned();
        async move {
            let keeper = keeper.ok_or_else(|| Unanswered("unreachable".to_owned()))?;
            let answered = tokio::time::timeout(timeout, keeper.handle(self.host, body)).await;
            answered.map_err(|_| Unanswered("timeout".to_owned()))
        }
        .boxed()
    }

    fn events(&self) -> Option<Arc<EventStore>> {
        None
    }

    fn reconcile_membership(&self) -> BoxFuture<'_, Result<Option<MembershipStep>, Unanswered>> {
        self.membership_looks.fetch_add(1, Ordering::SeqCst);
        let step = self.membership_step.lock().unwrap().clone();
        async { Ok(step) }.boxed()
    }

    fn transfer_leader(&self, _to: HostId) -> BoxFuture<'_, Result<(), Unanswered>> {
        async { Ok(()) }.boxed()
    }
}
