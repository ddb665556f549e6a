//! The agent with real processes ([`super::fake_vmm`]) and a log without Raft.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::Rng;
use statemachine::command::Command;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::StopMode;
use statemachine::state::Vm;
use statemachine::state::VmSpec;
use tokio::time::Instant;

use super::*;
use crate::grants::Grants;
use crate::grants::keeper::Timers;
use crate::lease;
use crate::lease::LeaseConfig;
use crate::lease::LeaseHandle;
use crate::migration::Lane;
use crate::migration::Obstacle;
use crate::migration::Stream;
use crate::test_site::Site;
use crate::test_site::TestCluster;
use crate::test_site::boot;
use crate::test_site::facts;
use crate::test_site::spec;

const PATIENCE: Duration = Duration::from_secs(60);

/// No guest of these tests goes anywhere.
struct NoRoad;

impl Road for NoRoad {
    fn lanes(&self) -> u16 {
        1
    }

    fn open(
        &self,
        _: HostId,
        _: VmId,
        _: MigrationId,
        _: Lane,
    ) -> BoxFuture<'static, Result<Box<dyn Stream>, Obstacle>> {
        futures::future::ready(Err(Obstacle::Never("there is no other host".to_owned()))).boxed()
    }
}

/// One host that leads its site, with hostd's lease and agent on it.
struct Host {
    dir: tempfile::TempDir,
    site: Arc<Site>,
    cluster: Arc<TestCluster>,
    grants: Arc<Grants>,
    hostd: Option<Hostd>,
}

struct Hostd {
    agent: AgentHandle,
    lease: LeaseHandle,
    _facts: watch::Sender<HostFacts>,
}

impl Host {
    async fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        fake_vmm::install(dir.path());
        std::fs::write(dir.path().join("vmlinuz"), "kernel").unwrap();
        let site = Arc::new(Site::with_hosts(1));
        let cluster = TestCluster::of(&site, site.hosts[0]);
        cluster.lead(1);
        let timers = Timers { round_every: Duration::from_millis(20), ..Timers::default() };
        let grants = Grants::spawn(timers, cluster.clone());
        let _ = cluster.keeper.set(grants.clone());
        let mut host = Host { dir, site, cluster, grants, hostd: None };
        host.start_hostd().await;
        host
    }

    fn id(&self) -> HostId {
        self.site.hosts[0]
    }

    async fn start_hostd(&mut self) {
        let own: Arc<dyn Cluster> = self.cluster.clone();
        let (publish, guests) = guest_channel();
        let lease_config = LeaseConfig {
            boot: boot(1),
            heartbeat: Duration::from_millis(100),
            lease: Duration::from_secs(12),
            watchdog_armed: false,
        };
        let lease = lease::spawn(lease_config, own.clone(), guests);
        let (sender, facts) = watch::channel(facts(boot(1)));
        let config = AgentConfig {
            vms_dir: self.dir.path().join("vm"),
            marks_dir: self.dir.path().join("marks"),
            asleep_dir: self.dir.path().join("asleep"),
            vmm: self.dir.path().join("vmm"),
            allowed_paths: vec![self.dir.path().to_owned()],
            stop: StopTimers::default(),
        };
        let agent = spawn(config, Arc::new(NoRoad), own, facts, lease.grant(), publish).await.unwrap();
        self.hostd = Some(Hostd { agent, lease, _facts: sender });
    }

    /// Ends hostd and leaves its guests; what its threads were doing goes on, as after a kill of the process.
    async fn stop_hostd(&mut self) {
        let Some(hostd) = self.hostd.take() else { return };
        hostd.lease.shutdown();
        hostd.agent.shutdown().await;
    }

    fn spec(&self, release: ReleaseClass) -> VmSpec {
        VmSpec { kernel: self.dir.path().join("vmlinuz").display().to_string(), ..spec(release) }
    }

    fn start(&self, name: &str, release: ReleaseClass) -> (VmId, Epoch) {
        let vm = self.site.define(name, self.spec(release));
        (vm, self.site.start(vm, self.id()))
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Fold) -> bool) {
        let mut fold = self.site.watch();
        let reached = tokio::time::timeout(PATIENCE, fold.wait_for(|fold| is_so(fold))).await.is_ok();
        let guests = self.hostd.as_ref().map(|hostd| hostd.agent.running());
        let vms = self.site.now().state.vms;
        assert!(reached, "{what} within {} s; guests: {guests:?}; vms: {vms:?}", PATIENCE.as_secs());
    }

    async fn until_up(&self, vm: VmId, epoch: Epoch) {
        let up = |seen: statemachine::state::Observed| (seen.epoch, seen.status) == (epoch, GuestStatus::Up);
        self.until("the guest is up", |fold| of(fold, vm).is_some_and(|vm| vm.observed.is_some_and(up))).await;
    }

    async fn until_ended(&self, vm: VmId, epoch: Epoch) -> (ExitReason, String) {
        let ended = |known: &Vm| known.last_exit.as_ref().is_some_and(|exit| exit.epoch == epoch);
        self.until("the guest has ended", |fold| of(fold, vm).is_some_and(ended)).await;
        let exit = of(&self.site.now(), vm).and_then(|vm| vm.last_exit.clone()).unwrap();
        (exit.reason, exit.detail)
    }

    fn run_dir(&self, vm: VmId) -> PathBuf {
        self.dir.path().join("vm").join(vm.to_string())
    }

    fn journal(&self, vm: VmId) -> Vec<String> {
        let text = std::fs::read_to_string(self.run_dir(vm).join("vmm").join(fake_vmm::JOURNAL)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Epoch and process of every start.
    fn starts(&self, vm: VmId) -> Vec<(u64, i32)> {
        let start = |line: &String| {
            let (epoch, pid) = line.strip_prefix("start ")?.split_once(' ')?;
            Some((epoch.parse().ok()?, pid.parse().ok()?))
        };
        self.journal(vm).iter().filter_map(start).collect()
    }
}

impl Drop for Host {
    /// Guests outlive hostd; those of a test do not outlive the test.
    fn drop(&mut self) {
        self.grants.shutdown();
        for (vm, _) in self.site.now().state.vms.iter() {
            for (_, pid) in self.starts(*vm) {
                kill(pid);
            }
            // A group can be removed a moment after its last process is gone.
            let group = Groups::detect().of(*vm);
            let until = std::time::Instant::now() + Duration::from_secs(5);
            while !group.is_empty().unwrap_or(true) && std::time::Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            group.remove();
        }
    }
}

fn of(fold: &Fold, vm: VmId) -> Option<&Vm> {
    fold.state.vms.get(&vm)
}

fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

#[tokio::test]
async fn a_permit_becomes_a_guest_and_a_shutdown_gives_it_back() {
    let host = Host::new().await;
    let (vm, epoch) = host.start("web", ReleaseClass::Operator);
    host.until_up(vm, epoch).await;
    let agent = &host.hostd.as_ref().unwrap().agent;
    assert_eq!(agent.console_socket(vm), Some(host.run_dir(vm).join("vmm/control.sock")));
    assert_eq!(agent.running().len(), 1);
    host.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    assert_eq!(host.until_ended(vm, epoch).await.0, ExitReason::GuestPoweredOff);
    let mut guests = agent.watch();
    let none_left = tokio::time::timeout(PATIENCE, guests.wait_for(|guests| guests.is_empty())).await;
    none_left.expect("what it left is cleared").unwrap();
    assert!(!host.run_dir(vm).join("config.json").exists());
    let again = host.site.start(vm, host.id());
    host.until_up(vm, again).await;
    let epochs: Vec<u64> = host.starts(vm).iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, [epoch.0, again.0]);
}

#[tokio::test]
async fn a_new_hostd_adopts_the_guest_and_reports_its_end() {
    let mut host = Host::new().await;
    let (vm, epoch) = host.start("web", ReleaseClass::Operator);
    host.until_up(vm, epoch).await;
    let seq = host.site.now().head.seq;
    host.stop_hostd().await;
    host.start_hostd().await;
    let mut guests = host.hostd.as_ref().unwrap().agent.watch();
    let alive = |guests: &Arc<Vec<GuestView>>| guests.iter().any(|it| matches!(it.phase, Phase::Alive { .. }));
    tokio::time::timeout(PATIENCE, guests.wait_for(alive)).await.expect("it is adopted").unwrap();
    let [(started, pid)] = host.starts(vm)[..] else { panic!("{:?}", host.journal(vm)) };
    assert_eq!((started, guests.borrow()[0].pid), (epoch.0, Some(pid)));
    assert_eq!(host.site.now().head.seq, seq, "an adoption is no news for the log");
    kill(pid);
    let (reason, detail) = host.until_ended(vm, epoch).await;
    assert_eq!(reason, ExitReason::Lost, "{detail}");
}

#[tokio::test]
async fn a_guest_that_ended_while_hostd_was_away_is_reported_and_never_started_again() {
    let mut host = Host::new().await;
    let (vm, epoch) = host.start("web", ReleaseClass::Operator);
    host.until_up(vm, epoch).await;
    host.stop_hostd().await;
    kill(host.starts(vm)[0].1);
    host.start_hostd().await;
    assert_eq!(host.until_ended(vm, epoch).await.0, ExitReason::Lost);
    assert_eq!(host.starts(vm).len(), 1);
}

#[tokio::test]
async fn a_lease_guest_is_confirmed_by_each_grant_and_by_nothing_without_a_majority() {
    let host = Host::new().await;
    let (vm, epoch) = host.start("web", ReleaseClass::Lease);
    host.until_up(vm, epoch).await;
    let confirmed = || host.journal(vm).iter().filter(|line| line.starts_with("Confirm")).count();
    let reach = async |count: usize| {
        let until = Instant::now() + PATIENCE;
        while confirmed() < count {
            assert!(Instant::now() < until, "{count} confirmations");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    reach(3).await;
    host.cluster.has_majority.store(false, std::sync::atomic::Ordering::SeqCst);
    let refused = || host.hostd.as_ref().unwrap().lease.counters().refused.load(std::sync::atomic::Ordering::Relaxed);
    while refused() < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The last confirmation may still be on its way to the journal.
    let granted = host.hostd.as_ref().unwrap().lease.counters().granted.load(std::sync::atomic::Ordering::Relaxed);
    while refused() < 6 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(confirmed() as u64 <= granted, "a confirmation a grant, at most");
    let last = confirmed();
    host.cluster.has_majority.store(true, std::sync::atomic::Ordering::SeqCst);
    reach(last + 1).await;
}

#[tokio::test]
async fn a_guest_that_cannot_be_started_is_reported_in_words_and_its_epoch_is_used_up() {
    let host = Host::new().await;
    let mut wrong = host.spec(ReleaseClass::Operator);
    wrong.kernel = "/etc/hostname".to_owned();
    let vm = host.site.define("web", wrong);
    let epoch = host.site.start(vm, host.id());
    let (reason, detail) = host.until_ended(vm, epoch).await;
    assert_eq!(reason, ExitReason::StartFailed);
    assert!(detail.contains("allowed_paths"), "{detail}");
    assert!(host.dir.path().join("marks").join(vm.to_string()).join(epoch.to_string()).exists());
}

/// R1 on one host: whatever the moment at which hostd dies, no epoch has two processes and no VM has two.
#[tokio::test]
async fn hostd_may_die_at_any_moment_of_a_start() {
    let mut host = Host::new().await;
    let vm = host.site.define("web", host.spec(ReleaseClass::Operator));
    for _ in 0..12 {
        let epoch = host.site.start(vm, host.id());
        let moment = Duration::from_millis(rand::rng().random_range(0..60));
        tokio::time::sleep(moment).await;
        host.stop_hostd().await;
        host.start_hostd().await;
        host.until_up(vm, epoch).await;
        host.site.root(Command::VmStop { vm, mode: StopMode::PowerOff });
        host.until_ended(vm, epoch).await;
    }
    let mut starts: BTreeMap<u64, usize> = BTreeMap::new();
    for (epoch, _) in host.starts(vm) {
        *starts.entry(epoch).or_default() += 1;
    }
    assert_eq!(starts.len(), 12);
    assert!(starts.values().all(|count| *count == 1), "{starts:?}");
}
