//! The rules of migrations, one story each: exactly one outcome for an id, and one host with the right to run (R1, R2).

#[allow(dead_code, reason = "other stories use the rest")]
mod cluster;

use cluster::Cluster;
use cluster::boot;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::invariants;
use statemachine::rejection::Rejection;
use statemachine::rejection::RejectionClass;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::MigrationPhase;
use statemachine::state::MigrationProgress;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::view::VmStatus;

/// Three hosts, and a guest that is up on one of them.
struct Story {
    cluster: Cluster,
    vm: VmId,
}

impl Story {
    fn new() -> Story {
        let mut cluster = Cluster::of(3);
        cluster.root(Cluster::define("web", 2, 512, RunStrategy::Always)).expect("defined");
        cluster.start("web").expect("room");
        let vm = cluster.vm("web");
        let mut story = Story { cluster, vm };
        story.says(GuestStatus::Up);
        story
    }

    fn source(&self) -> HostId {
        self.cluster.permit("web").host
    }

    /// A host that the guest is not on.
    fn other(&self, index: usize) -> HostId {
        let source = self.source();
        (0..3).map(|index| self.cluster.host(index)).filter(|host| *host != source).nth(index).expect("three hosts")
    }

    fn says(&mut self, status: GuestStatus) {
        let permit = self.cluster.permit("web");
        let report = self.cluster.report(permit.host);
        let told = Command::ReportVmStatus { report, vm: self.vm, epoch: permit.epoch, status };
        self.cluster.ask(Actor::Host(permit.host), permit.host, told).expect("its own guest");
    }

    fn migrate(&mut self, host: Option<HostId>) -> Result<MigrationId, Rejection> {
        let command = Command::VmMigrate { vm: self.vm, host };
        self.cluster.root(command).map(|answer| answer.seq.into())
    }

    fn loaded(&mut self, host: HostId, migration: MigrationId) -> Result<Epoch, Rejection> {
        let report = self.cluster.report(host);
        let command = Command::ReportMigrationLoaded { report, vm: self.vm, migration };
        self.cluster.ask(Actor::Host(host), host, command).map(|answer| answer.seq.into())
    }

    fn failed(&mut self, host: HostId, migration: MigrationId) -> Result<(), Rejection> {
        let report = self.cluster.report(host);
        let detail = "the stream broke".to_owned();
        let command = Command::ReportMigrationFailed { report, vm: self.vm, migration, detail };
        self.cluster.ask(Actor::Host(host), host, command).map(|_| ())
    }

    fn vms_on(&self, host: HostId) -> u32 {
        self.cluster.fold.state.hosts.get(&host).expect("a host").usage.vms
    }

    fn check(&self) {
        assert_eq!(invariants::check(&self.cluster.fold.state), []);
    }
}

#[test]
fn the_right_to_run_goes_over_when_the_target_holds_everything_and_not_before() {
    let mut story = Story::new();
    let (source, before) = (story.source(), story.cluster.permit("web"));
    let target = story.other(1);
    let migration = story.migrate(Some(target)).expect("room");
    assert_eq!(story.cluster.permit("web"), before, "the source runs it");
    assert_eq!(story.cluster.status("web"), VmStatus::MigratingFrom);
    assert_eq!((story.vms_on(source), story.vms_on(target)), (1, 1), "booked on both");
    story.check();

    let epoch = story.loaded(target, migration).expect("it holds everything");
    let permit = story.cluster.permit("web");
    assert_eq!((permit.host, permit.epoch, permit.boot), (target, epoch, boot(3)));
    assert!(permit.epoch > before.epoch, "R2: epochs rise");
    assert_eq!((story.vms_on(source), story.vms_on(target)), (0, 1));
    assert_eq!(story.cluster.status("web"), VmStatus::MigratingTo);
    story.check();

    // Late words of the source change nothing, whatever they say.
    let report = story.cluster.report(source);
    let (vm, old) = (story.vm, before.epoch);
    let detail = String::new();
    let exited = Command::ReportVmExited { report, vm, epoch: old, reason: ExitReason::PoweredOff, detail };
    let late = story.cluster.ask(Actor::Host(source), source, exited).expect_err("its permit is over");
    assert_eq!(late.class(), RejectionClass::Stale);

    story.says(GuestStatus::Up);
    assert_eq!(story.cluster.status("web"), VmStatus::Up);
    assert!(story.cluster.fold.state.migrations.is_empty(), "it has arrived");
    story.check();
}

#[test]
fn an_id_has_one_outcome() {
    let mut story = Story::new();
    let (source, target) = (story.source(), story.other(0));
    let first = story.migrate(Some(target)).expect("room");
    story.failed(source, first).expect("its own migration");
    let before = story.cluster.permit("web");
    let late = story.loaded(target, first).expect_err("aborted");
    assert!(matches!(late, Rejection::StaleMigration { .. }), "{late}");
    assert_eq!((story.cluster.permit("web"), story.vms_on(target)), (before, 0));
    assert_eq!(story.cluster.status("web"), VmStatus::Up);

    let second = story.migrate(Some(target)).expect("room");
    assert!(second > first);
    assert!(story.loaded(target, first).is_err(), "the word is about another attempt");
    story.loaded(target, second).expect("it holds everything");
    assert!(story.failed(source, second).is_err(), "committed");
    let vm = story.vm;
    assert!(story.cluster.root(Command::VmCancelMigration { vm }).is_err(), "it has arrived");
    story.check();
}

#[test]
fn only_the_target_in_the_incarnation_that_prepared_takes_the_guest() {
    let mut story = Story::new();
    let (source, target, third) = (story.source(), story.other(0), story.other(1));
    let migration = story.migrate(Some(target)).expect("room");
    for host in [source, third] {
        let refusal = story.loaded(host, migration).expect_err("not its migration");
        assert_eq!(refusal.code(), "host-state");
    }
    story.cluster.reboot(target, boot(77)).expect("it is back");
    assert!(story.cluster.fold.state.migrations.is_empty(), "what it held is gone");
    assert!(story.loaded(target, migration).is_err());
    assert_eq!((story.source(), story.vms_on(target)), (source, 0));
    story.check();
}

#[test]
fn a_target_that_is_suspected_takes_nothing_and_one_that_is_lost_or_draining_ends_it() {
    let mut story = Story::new();
    let (source, target) = (story.source(), story.other(0));
    let migration = story.migrate(Some(target)).expect("room");
    story.cluster.duty(Command::HostSuspect { host: target }).expect("silent");
    assert_eq!(story.loaded(target, migration).expect_err("suspected").code(), "host-state");
    story.cluster.duty(Command::HostRecover { host: target }).expect("heard");
    story.cluster.root(Command::HostMaintenance { host: target }).expect("asked");
    assert!(story.cluster.fold.state.migrations.is_empty(), "a guest that stands still for it would do so for ever");
    assert_eq!(story.loaded(target, migration).expect_err("draining").code(), "stale-migration");
    assert_eq!((story.source(), story.vms_on(target)), (source, 0));
    story.cluster.root(Command::HostActivate { host: target }).expect("asked");
    story.migrate(Some(target)).expect("room");
    story.cluster.duty(Command::HostLost { host: target }).expect("silent");
    assert!(story.cluster.fold.state.migrations.is_empty());
    assert_eq!((story.source(), story.vms_on(target)), (source, 0));
    story.check();
}

#[test]
fn a_source_that_falls_silent_after_everything_was_sent_does_not_hold_the_guest_back() {
    let mut story = Story::new();
    let (source, target) = (story.source(), story.other(0));
    let migration = story.migrate(Some(target)).expect("room");
    story.cluster.duty(Command::HostSuspect { host: source }).expect("silent");
    story.cluster.duty(Command::HostLost { host: source }).expect("silent");
    story.loaded(target, migration).expect("it holds everything, and the source stands still");
    assert_eq!(story.source(), target);
    story.check();
}

#[test]
fn the_end_of_the_guest_or_of_its_host_ends_the_migration() {
    let mut story = Story::new();
    let (source, target) = (story.source(), story.other(0));
    let migration = story.migrate(Some(target)).expect("room");
    story.cluster.exit("web", ExitReason::GuestPoweredOff);
    assert!(story.loaded(target, migration).is_err(), "R2: its permit is released");
    assert_eq!((story.vms_on(source), story.vms_on(target)), (0, 0));
    story.check();

    let mut story = Story::new();
    let (source, target) = (story.source(), story.other(0));
    let migration = story.migrate(Some(target)).expect("room");
    story.cluster.reboot(source, boot(88)).expect("it is back");
    assert!(story.loaded(target, migration).is_err());
    assert_eq!((story.vms_on(source), story.vms_on(target)), (0, 0));
    story.check();
}

#[test]
fn stopping_and_cancelling_end_it_and_resetting_waits() {
    let mut story = Story::new();
    let (vm, target) = (story.vm, story.other(0));
    story.migrate(Some(target)).expect("room");
    assert!(story.cluster.root(Command::VmReset { vm }).is_err());
    story.cluster.root(Command::VmCancelMigration { vm }).expect("under way");
    assert_eq!((story.cluster.status("web"), story.vms_on(target)), (VmStatus::Up, 0));
    story.migrate(Some(target)).expect("room");
    story.cluster.root(Command::VmStop { vm, mode: StopMode::Shutdown }).expect("it runs");
    assert!(story.cluster.fold.state.migrations.is_empty());
    assert!(story.migrate(Some(target)).is_err(), "it is powering down");
    story.check();
}

#[test]
fn a_target_lost_after_the_commit_is_a_start_from_disk() {
    let mut story = Story::new();
    let target = story.other(0);
    let migration = story.migrate(Some(target)).expect("room");
    let epoch = story.loaded(target, migration).expect("it holds everything");
    let phase = story.cluster.fold.state.migrations.get(&story.vm).map(|migration| migration.phase);
    assert_eq!(phase, Some(MigrationPhase::Committed { epoch }));
    story.cluster.reboot(target, boot(99)).expect("it is back");
    assert!(story.cluster.fold.state.migrations.is_empty());
    assert_eq!(story.cluster.status("web"), VmStatus::WaitForLaunch);
    story.cluster.run_duties();
    assert!(story.cluster.permit("web").epoch > epoch);
    story.check();
}

#[test]
fn a_guest_goes_where_it_is_not_and_where_there_is_room() {
    let mut story = Story::new();
    let source = story.source();
    let refusal = story.migrate(Some(source)).expect_err("it is there");
    assert!(refusal.to_string().contains("the guest is there"), "{refusal}");
    story.migrate(None).expect("the scheduler chooses");
    let head = story.cluster.fold.head;
    story.migrate(None).expect("asked again");
    assert_eq!(story.cluster.fold.head, head);
    let target = story.cluster.fold.state.migrations.get(&story.vm).expect("under way").to;
    let third = (0..3).map(|index| story.cluster.host(index)).find(|host| ![source, target].contains(host));
    assert_eq!(story.migrate(third).expect_err("another way").code(), "vm-state");

    // A guest that an error holds, or that has not come up, stays.
    for status in [GuestStatus::PausedIo, GuestStatus::PoweringUp, GuestStatus::PausedLease] {
        let mut story = Story::new();
        story.says(status);
        assert_eq!(story.migrate(None).expect_err("not up").code(), "vm-state");
    }
}

#[test]
fn so_many_at_once_and_no_more() {
    let mut cluster = Cluster::of(8);
    let mut vms = Vec::new();
    for number in 0..14 {
        let name = format!("vm{number}");
        cluster.root(Cluster::define(&name, 1, 64, RunStrategy::Manual)).expect("defined");
        let (vm, host) = (cluster.vm(&name), cluster.host(number / 3));
        cluster.root(Command::VmStart { vm, host: Some(host) }).expect("room");
        let permit = cluster.permit(&name);
        let report = cluster.report(host);
        let up = Command::ReportVmStatus { report, vm, epoch: permit.epoch, status: GuestStatus::Up };
        cluster.ask(Actor::Host(host), host, up).expect("its own guest");
        vms.push(vm);
    }
    let target = |cluster: &Cluster, index| Some(cluster.host(index));
    let mut migrate = |vm: usize, to: usize| {
        let host = target(&cluster, to);
        cluster.root(Command::VmMigrate { vm: vms[vm], host })
    };
    migrate(0, 7).expect("first out of host 0");
    migrate(1, 7).expect("second out of host 0");
    assert_eq!(migrate(2, 6).expect_err("third out of host 0").code(), "migration-limit");
    let full = migrate(3, 7).expect_err("third into host 7");
    assert!(full.to_string().contains("2 guests are on their way to it"), "{full}");
    migrate(3, 6).expect("third in the cluster");
    migrate(4, 6).expect("fourth");
    migrate(6, 5).expect("fifth");
    assert_eq!(migrate(9, 5).expect_err("sixth").code(), "migration-limit");
}

#[test]
fn progress_is_kept_and_a_strangers_is_not() {
    let mut story = Story::new();
    let (vm, source, target) = (story.vm, story.source(), story.other(0));
    let migration = story.migrate(Some(target)).expect("room");
    let mut tell = |host: HostId, progress| {
        let report = story.cluster.report(host);
        let told = Command::ReportMigrationProgress { report, vm, migration, progress };
        story.cluster.ask(Actor::Host(host), host, told).map_err(|refusal| refusal.class())
    };
    let progress = MigrationProgress { round: 2, sent_bytes: 1 << 30, ..MigrationProgress::default() };
    tell(source, progress).expect("news");
    assert_eq!(tell(target, progress), Err(RejectionClass::Stale));
    let nonsense = MigrationProgress { throttle_percent: 101, ..progress };
    assert_eq!(tell(source, nonsense), Err(RejectionClass::Invalid));
    let known = story.cluster.fold.state.migrations.get(&vm).expect("under way").progress;
    assert_eq!(known, Some(progress));
}

#[test]
fn a_recovery_of_the_site_ends_what_was_under_way() {
    let mut story = Story::new();
    let survivor = story.source();
    story.migrate(None).expect("room");
    let ca = statemachine::state::Fingerprint([4; 32]);
    let recover = Command::SiteRecover { generation: 1, ca };
    story.cluster.ask(Actor::Duty(survivor), survivor, recover).expect("the last host");
    assert!(story.cluster.fold.state.migrations.is_empty());
    assert_eq!((story.source(), story.vms_on(survivor)), (survivor, 1));
    story.check();
}
