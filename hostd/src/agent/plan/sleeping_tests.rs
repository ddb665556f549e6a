//! Sleep, from the side of the host on which a guest falls asleep and wakes up.

use super::*;

impl Agent {
    /// A guest that runs here, and is to fall asleep.
    fn sleepy(&mut self) -> (VmId, Epoch, MigrationId) {
        let (vm, epoch) = self.running(ReleaseClass::Operator);
        self.site.status(vm, self.host(), GuestStatus::Up);
        let id = self.site.root(Command::VmSuspend { vm }).seq.into();
        self.catch_up();
        (vm, epoch, id)
    }

    fn guest(&mut self, vm: VmId) -> &mut Guest {
        self.guests.get_mut(&vm).expect("a guest")
    }

    fn outgoing(&mut self, vm: VmId, id: MigrationId) -> &mut Outgoing {
        let outgoing = Outgoing { migration: id, progress: None, saved_bytes: None, failure: None };
        self.guest(vm).outgoing.insert(outgoing)
    }

    fn saved(&self, vm: VmId, suspension: MigrationId) {
        let report = self.site.report_id(self.host(), self.site.boot_of(self.host()));
        self.site.must(Actor::Host(self.host()), Command::ReportVmSuspended { report, vm, suspension, bytes: 77 });
    }

    /// A guest that sleeps here and has been given a permit.
    fn waking(&mut self) -> (VmId, Epoch, MigrationId) {
        let (vm, _, id) = self.sleepy();
        self.saved(vm, id);
        self.guests.clear();
        self.asleep.insert((vm, id));
        let epoch = self.site.start(vm, self.host());
        self.catch_up();
        self.be_granted();
        (vm, epoch, id)
    }

    fn take_in_from_file(&mut self, vm: VmId, id: MigrationId, loaded: bool) {
        let mut guest = Guest::coming(id, ReleaseClass::Operator);
        guest.phase = Phase::Incoming { loaded };
        self.guests.insert(vm, guest);
    }
}

#[test]
fn a_guest_stands_from_the_end_of_its_file_until_the_log_says_what_became_of_it() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.sleepy();
    agent.be_granted();
    assert_eq!(agent.plan(), [Action::Suspend { vm, epoch, suspension: id }]);
    agent.outgoing(vm, id);
    assert_eq!(agent.plan(), [], "it is under way");
    agent.outgoing(vm, id).saved_bytes = Some(77);
    agent.guest(vm).stands_for = Some(id);
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Suspended(id, 77) }], "it is not let go");
    agent.saved(vm, id);
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Suspended(id, 77) }], "nor on what is not read");
    agent.catch_up();
    assert_eq!(agent.orders(), [Order::PowerOff], "the file is the guest now");
}

#[test]
fn a_guest_that_cannot_be_written_down_goes_on_when_the_log_has_given_it_up() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.sleepy();
    agent.outgoing(vm, id).failure = Some("no space".to_owned());
    agent.guest(vm).stands_for = Some(id);
    agent.be_granted();
    let told = Action::Report { vm, epoch, news: News::SuspensionFailed(id, "no space".to_owned()) };
    assert_eq!(agent.plan(), [told], "its word alone lets nobody go");
    let report = agent.site.report_id(agent.host(), boot(2));
    let failed = Command::ReportSuspensionFailed { report, vm, suspension: id, detail: "no space".to_owned() };
    agent.site.must(Actor::Host(agent.host()), failed);
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.orders(), [Order::GoOn { migration: id }]);
}

#[test]
fn it_is_written_down_again_by_a_hostd_that_knows_of_no_file() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.sleepy();
    agent.guest(vm).stands_for = Some(id);
    assert_eq!(agent.plan(), [Action::Suspend { vm, epoch, suspension: id }]);
}

#[test]
fn a_guest_wakes_up_under_a_grant_from_its_file_and_runs_under_one() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.waking();
    let granted = agent.grant.take();
    assert_eq!(agent.plan(), [], "R4: no grant names it");
    agent.grant = granted;
    let deadline = agent.grant.as_ref().unwrap().deadline;
    assert_eq!(agent.plan(), [Action::Wake { vm, suspension: id }]);
    agent.take_in_from_file(vm, id, false);
    assert_eq!(agent.plan(), [Action::Feed { vm, suspension: id }]);
    agent.guest(vm).feeding = Some(Feeding::UnderWay);
    assert_eq!(agent.plan(), []);
    agent.guest(vm).phase = Phase::Incoming { loaded: true };
    let granted = agent.grant.take();
    assert_eq!(agent.plan(), [], "R4: nothing runs by a permit alone");
    agent.grant = granted;
    assert_eq!(agent.carry_out_orders(), [Order::Run { epoch, deadline }]);
    assert_eq!(agent.plan(), [], "its file stays until the log says that it runs");
    agent.marked.insert((vm, epoch));
    agent.guest(vm).runs_as(epoch);
    agent.guest(vm).phase = Phase::Alive { status: GuestStatus::Up, quiesced: false };
    agent.site.status(vm, agent.host(), GuestStatus::Up);
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.plan(), [Action::Discard { vm, suspension: id }]);
}

#[test]
fn what_did_not_run_may_wake_up_again_and_what_may_have_run_may_not() {
    let ended = |reason| Phase::Gone(Ended { reason, detail: "gone".to_owned() });
    let exited = |vm, epoch, reason| {
        let detail = "gone".to_owned();
        [Action::Report { vm, epoch, news: News::Exited(Ended { reason, detail }) }]
    };
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.waking();
    agent.take_in_from_file(vm, id, false);
    agent.guest(vm).phase = ended(ExitReason::PoweredOff);
    assert_eq!(agent.plan(), exited(vm, epoch, ExitReason::StartFailed), "it never ran");
    agent.marked.insert((vm, epoch));
    agent.guest(vm).phase = ended(ExitReason::Lost);
    assert_eq!(agent.plan(), exited(vm, epoch, ExitReason::Lost));
    // Its files still speak of the process that takes it in, and its mark of the guest that ran.
    agent.guest(vm).phase = ended(ExitReason::StartFailed);
    assert_eq!(agent.plan(), exited(vm, epoch, ExitReason::Lost));
    // A hostd that was started since knows of no process, and looks into the used epoch.
    agent.guests.clear();
    assert!(matches!(agent.plan()[..], [Action::LookInto { .. }]), "{:?}", agent.plan());
}

#[test]
fn a_process_that_does_not_get_its_file_is_ended_and_the_words_are_told() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.waking();
    agent.take_in_from_file(vm, id, false);
    agent.guest(vm).feeding = Some(Feeding::Failed("cannot read".to_owned()));
    assert_eq!(agent.carry_out_orders(), [Order::PowerOff]);
    agent.guest(vm).phase = Phase::Gone(Ended { reason: ExitReason::PoweredOff, detail: String::new() });
    let ended = Ended { reason: ExitReason::StartFailed, detail: "cannot read".to_owned() };
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Exited(ended) }]);
}

#[test]
fn files_that_the_log_does_not_know_are_discarded_once_it_was_read() {
    let mut agent = Agent::new();
    let (vm, _, id) = agent.waking();
    agent.take_in_from_file(vm, id, true);
    agent.asleep.insert((vm, MigrationId(2)));
    let old = Action::Discard { vm, suspension: MigrationId(2) };
    assert!(agent.plan().contains(&old), "of an earlier night");
    agent.grant = None;
    assert!(!agent.plan().contains(&old), "not before hostd knows how far the log is");
    // From a night that this host has not read of yet.
    agent.be_granted();
    agent.asleep = BTreeSet::from([(vm, MigrationId(agent.fold.head.seq.0 + 5))]);
    assert!(!agent.plan().iter().any(|action| matches!(action, Action::Discard { .. })));
}
