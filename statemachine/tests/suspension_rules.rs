//! The rules of sleep, one story each: who sleeps has no right to run, and nobody wakes up twice from one file (R1, R2, S2).

#[allow(dead_code, reason = "other stories use the rest")]
mod cluster;

use cluster::Cluster;
use cluster::boot;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::VmChange;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::invariants;
use statemachine::rejection::Rejection;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::state::SuspensionPhase;
use statemachine::view::VmStatus;

/// Three hosts, and a guest that is up on one of them.
struct Story {
    cluster: Cluster,
    vm: VmId,
    home: HostId,
}

impl Story {
    fn new(strategy: RunStrategy) -> Story {
        let mut cluster = Cluster::of(3);
        cluster.root(Cluster::define_on_disk("web", "/srv/web.raw", false)).expect("defined");
        let vm = cluster.vm("web");
        let change = VmChange { run_strategy: Some(strategy), ..VmChange::default() };
        cluster.root(Command::VmChange { vm, change }).expect("defined");
        cluster.start("web").expect("room");
        let home = cluster.permit("web").host;
        let mut story = Story { cluster, vm, home };
        story.says(GuestStatus::Up);
        story
    }

    /// One that sleeps.
    fn asleep(strategy: RunStrategy) -> Story {
        let mut story = Story::new(strategy);
        let suspension = story.suspend().expect("it is up");
        story.saved(suspension).expect("its own guest");
        story
    }

    fn at_home(&mut self, command: Command) -> Result<(), Rejection> {
        self.cluster.ask(Actor::Host(self.home), self.home, command).map(|_| ())
    }

    fn says(&mut self, status: GuestStatus) {
        let (report, vm, epoch) = (self.cluster.report(self.home), self.vm, self.cluster.permit("web").epoch);
        self.at_home(Command::ReportVmStatus { report, vm, epoch, status }).expect("its own guest");
    }

    fn ends(&mut self, reason: ExitReason) {
        let (report, vm, epoch) = (self.cluster.report(self.home), self.vm, self.cluster.permit("web").epoch);
        let detail = String::new();
        self.at_home(Command::ReportVmExited { report, vm, epoch, reason, detail }).expect("its own guest");
    }

    fn suspend(&mut self) -> Result<MigrationId, Rejection> {
        let command = Command::VmSuspend { vm: self.vm };
        self.cluster.root(command).map(|answer| answer.seq.into())
    }

    fn saved(&mut self, suspension: MigrationId) -> Result<(), Rejection> {
        let (report, vm) = (self.cluster.report(self.home), self.vm);
        self.at_home(Command::ReportVmSuspended { report, vm, suspension, bytes: 1 << 20 })
    }

    fn start(&mut self, host: Option<HostId>) -> Result<(), Rejection> {
        self.cluster.root(Command::VmStart { vm: self.vm, host }).map(|_| ())
    }

    fn stop(&mut self, mode: StopMode) -> Result<(), Rejection> {
        self.cluster.root(Command::VmStop { vm: self.vm, mode }).map(|_| ())
    }

    fn elsewhere(&self) -> HostId {
        (0..3).map(|index| self.cluster.host(index)).find(|host| *host != self.home).expect("three hosts")
    }

    fn phase(&self) -> Option<SuspensionPhase> {
        self.cluster.fold.state.suspensions.get(&self.vm).map(|suspension| suspension.phase.clone())
    }

    fn vms_at_home(&self) -> u32 {
        self.cluster.fold.state.hosts.get(&self.home).expect("a host").usage.vms
    }

    fn check(&self) {
        assert_eq!(invariants::check(&self.cluster.fold.state), []);
    }
}

#[test]
fn a_guest_sleeps_without_a_permit_and_wakes_up_where_its_file_is() {
    let mut story = Story::new(RunStrategy::Always);
    let before = story.cluster.permit("web");
    let suspension = story.suspend().expect("it is up");
    assert_eq!(story.cluster.permit("web"), before, "it stands on its host until the log says more");
    assert_eq!(story.cluster.status("web"), VmStatus::SavingState);
    story.check();

    story.saved(suspension).expect("its own guest");
    assert_eq!(story.cluster.status("web"), VmStatus::Suspended);
    assert_eq!(story.vms_at_home(), 0, "it takes no place");
    assert!(matches!(story.saved(suspension), Err(Rejection::StaleMigration { .. })), "it is told once");
    story.cluster.run_duties();
    assert_eq!(story.cluster.status("web"), VmStatus::Suspended, "nobody wakes it up unasked, though it always ran");
    story.check();

    let elsewhere = story.elsewhere();
    let refusal = story.start(Some(elsewhere)).expect_err("its file is not there").to_string();
    assert!(refusal.contains("wakes up there alone"), "{refusal}");
    story.start(None).expect("room");
    let permit = story.cluster.permit("web");
    assert_eq!(permit.host, story.home);
    assert!(permit.epoch > before.epoch);
    assert_eq!(story.cluster.status("web"), VmStatus::RestoringState);
    story.check();

    story.says(GuestStatus::Up);
    assert_eq!((story.cluster.status("web"), story.phase()), (VmStatus::Up, None));
    story.check();
}

#[test]
fn a_file_is_used_again_only_when_nothing_ran_from_it() {
    let mut story = Story::asleep(RunStrategy::Manual);
    story.start(None).expect("room");
    story.ends(ExitReason::StartFailed);
    assert_eq!(story.cluster.status("web"), VmStatus::Suspended, "the host could not; the file is as good as before");
    story.check();

    for reason in [ExitReason::Lost, ExitReason::GuestFault, ExitReason::PoweredOff] {
        let mut story = Story::asleep(RunStrategy::Manual);
        story.start(None).expect("room");
        story.ends(reason);
        assert_eq!((story.cluster.status("web"), story.phase()), (VmStatus::Down, None), "{reason:?}");
        story.check();
    }

    let mut story = Story::asleep(RunStrategy::Manual);
    story.start(None).expect("room");
    let home = story.home;
    story.cluster.reboot(home, boot(77)).expect("it is back");
    assert_eq!(story.phase(), None, "whether it ran is not known");
    story.check();
}

#[test]
fn a_host_that_comes_back_without_the_guest_that_it_saved_has_no_file_of_it() {
    let mut story = Story::new(RunStrategy::Manual);
    let suspension = story.suspend().expect("it is up");
    let home = story.home;
    story.cluster.reboot(home, boot(77)).expect("it is back");
    assert_eq!(story.phase(), None);
    assert!(story.saved(suspension).is_err());
    story.check();
}

#[test]
fn a_sleeping_guest_keeps_its_host_and_nobody_else_gets_its_disks() {
    let mut story = Story::asleep(RunStrategy::Manual);
    story.cluster.root(Cluster::define_on_disk("thief", "/srv/web.raw", false)).expect("a definition may say so");
    let refusal = story.cluster.start("thief").expect_err("its disk is the sleeper's");
    assert!(matches!(refusal, Rejection::DiskInUse { .. }), "{refusal}");

    let home = story.home;
    story.cluster.root(Command::HostMaintenance { host: home }).expect("a host");
    let refusal = story.cluster.root(Command::HostRemove { host: home }).expect_err("the file would go with it");
    assert!(refusal.to_string().contains("web is suspended on it"), "{refusal}");
    story.check();
}

#[test]
fn only_a_pulled_plug_throws_memory_away() {
    let mut story = Story::asleep(RunStrategy::Manual);
    let refusal = story.stop(StopMode::Shutdown).expect_err("nobody hears the button").to_string();
    assert!(refusal.contains("quorate vm start web") && refusal.contains("--power-off"), "{refusal}");
    story.stop(StopMode::PowerOff).expect("meant");
    assert_eq!((story.cluster.status("web"), story.phase()), (VmStatus::Down, None));
    story.start(None).expect("a cold start");
    assert_eq!(story.phase(), None);
    story.check();

    let mut story = Story::new(RunStrategy::Manual);
    let suspension = story.suspend().expect("it is up");
    story.stop(StopMode::Shutdown).expect("it goes on, to shut down");
    assert_eq!((story.cluster.status("web"), story.phase()), (VmStatus::PoweringDown, None));
    assert!(story.saved(suspension).is_err(), "too late");
    story.check();
}

#[test]
fn a_guest_that_cannot_wake_up_is_tried_again_until_somebody_says_stop() {
    let mut story = Story::asleep(RunStrategy::Always);
    story.start(None).expect("room");
    story.ends(ExitReason::StartFailed);
    assert_eq!(story.cluster.status("web"), VmStatus::WaitForLaunch, "it is to run always, since it was started");
    story.cluster.run_duties();
    assert_eq!(story.cluster.status("web"), VmStatus::RestoringState);
    let refusal = story.stop(StopMode::Shutdown).expect_err("it has no ears yet").to_string();
    assert!(refusal.contains("waking up"), "{refusal}");
    story.ends(ExitReason::StartFailed);
    story.stop(StopMode::Shutdown).expect("it sleeps on");
    story.cluster.run_duties();
    assert_eq!(story.cluster.status("web"), VmStatus::Suspended, "what it was is kept");
    story.check();
}

#[test]
fn nothing_changes_about_a_guest_that_falls_asleep() {
    let mut story = Story::new(RunStrategy::Manual);
    story.suspend().expect("it is up");
    let vm = story.vm;
    let meanwhile =
        [Command::VmMigrate { vm, host: None }, Command::VmReset { vm }, Command::VmPause { vm, paused: true }];
    for command in meanwhile {
        let refusal = story.cluster.root(command.clone()).expect_err("not now").to_string();
        assert!(refusal.contains("being suspended"), "{command:?}: {refusal}");
    }
    let (report, suspension) = (story.cluster.report(story.home), story.cluster.fold.state.suspensions.get(&vm));
    let suspension = suspension.expect("under way").id;
    let detail = "no space".to_owned();
    story.at_home(Command::ReportSuspensionFailed { report, vm, suspension, detail }).expect("its own guest");
    assert_eq!((story.cluster.status("web"), story.phase()), (VmStatus::Up, None), "it goes on");
    story.check();
}

#[test]
fn only_a_guest_that_is_up_falls_asleep() {
    let mut story = Story::new(RunStrategy::Manual);
    story.says(GuestStatus::PausedIo);
    assert!(story.suspend().is_err(), "an error holds it");
    story.says(GuestStatus::Up);
    let elsewhere = story.elsewhere();
    story.cluster.root(Command::VmMigrate { vm: story.vm, host: Some(elsewhere) }).expect("room");
    let refusal = story.suspend().expect_err("it is on its way").to_string();
    assert!(refusal.contains("cancel-migration"), "{refusal}");
    let mut story = Story::asleep(RunStrategy::Manual);
    story.suspend().expect("it does already");
    assert_eq!(story.cluster.status("web"), VmStatus::Suspended);
    story.check();
}
