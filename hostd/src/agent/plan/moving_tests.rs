//! Migrations from the side of the host that a guest comes to, and from that of the host that it leaves.

use statemachine::state::MigrationProgress;

use super::*;

impl Agent {
    fn there(&self) -> HostId {
        self.site.hosts[0]
    }

    /// A guest that runs on the first host, and sets out for this one.
    pub(super) fn coming(&mut self) -> (VmId, MigrationId) {
        let vm = self.site.define("web", spec(ReleaseClass::Lease));
        self.site.start(vm, self.there());
        self.site.status(vm, self.there(), GuestStatus::Up);
        let id = self.site.root(Command::VmMigrate { vm, host: Some(self.host()) }).seq.into();
        (vm, id)
    }

    /// A guest that runs here, and is to set out.
    fn leaving(&mut self) -> (VmId, Epoch, MigrationId) {
        let (vm, epoch) = self.running(ReleaseClass::Operator);
        self.site.status(vm, self.host(), GuestStatus::Up);
        let id = self.site.root(Command::VmMigrate { vm, host: Some(self.there()) }).seq.into();
        (vm, epoch, id)
    }

    pub(super) fn take_in(&mut self, vm: VmId, id: MigrationId, loaded: bool) {
        let mut guest = Guest::coming(id, ReleaseClass::Lease);
        guest.phase = Phase::Incoming { loaded };
        self.guests.insert(vm, guest);
    }

    pub(super) fn commit(&self, vm: VmId, migration: MigrationId, host: HostId) -> Epoch {
        let report = self.site.report_id(host, self.site.boot_of(host));
        let loaded = Command::ReportMigrationLoaded { report, vm, migration };
        self.site.must(Actor::Host(host), loaded).seq.into()
    }
}

#[test]
fn a_guest_is_taken_in_when_the_log_says_that_it_comes_and_hostd_has_caught_up() {
    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    agent.be_granted();
    assert_eq!(agent.plan(), [], "this host has not heard of it");
    agent.catch_up();
    assert_eq!(agent.plan(), [Action::Receive { vm, migration: id }]);
    agent.take_in(vm, id, false);
    assert_eq!(agent.plan(), []);
}

#[test]
fn what_is_held_is_said_and_runs_only_after_the_commit_and_under_a_grant_that_names_it() {
    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    agent.take_in(vm, id, true);
    agent.catch_up();
    agent.be_granted();
    let told = Action::Report { vm, epoch: Epoch(id.0), news: News::MigrationLoaded(id) };
    assert_eq!(agent.plan(), std::slice::from_ref(&told), "nothing runs");
    let epoch = agent.commit(vm, id, agent.host());
    agent.be_granted();
    assert_eq!(agent.plan(), [told], "this host has not heard of the commit, and a grant alone is nothing");
    agent.grant = None;
    agent.catch_up();
    assert_eq!(agent.plan(), [], "R4: no grant names it");
    agent.be_granted();
    let deadline = agent.grant.as_ref().unwrap().deadline;
    assert_eq!(agent.carry_out_orders(), [Order::Run { epoch, deadline }]);
    assert_eq!(agent.orders(), [], "its status will tell");
}

#[test]
fn a_guest_that_was_not_let_go_is_dropped_by_its_target() {
    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    agent.take_in(vm, id, true);
    agent.site.root(Command::VmCancelMigration { vm });
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.carry_out_orders(), [Order::PowerOff]);
    // A later attempt does not take it for its own.
    agent.site.root(Command::VmMigrate { vm, host: Some(agent.host()) });
    agent.catch_up();
    assert_eq!(agent.orders(), []);
    agent.now = agent.now.plus_ms(15_000);
    assert_eq!(agent.orders(), [Order::Kill]);
}

#[test]
fn a_process_that_ends_while_it_takes_in_is_a_failure_before_the_commit_and_a_start_from_disk_after_it() {
    let ended = || Phase::Gone(Ended { reason: ExitReason::StartFailed, detail: "the stream is damaged".to_owned() });
    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    agent.take_in(vm, id, false);
    agent.guests.get_mut(&vm).unwrap().phase = ended();
    agent.catch_up();
    let words = "the stream is damaged".to_owned();
    let news = News::MigrationFailed(id, words);
    assert_eq!(agent.plan(), [Action::Report { vm, epoch: Epoch(id.0), news }]);

    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    let epoch = agent.commit(vm, id, agent.host());
    agent.take_in(vm, id, true);
    agent.guests.get_mut(&vm).unwrap().phase = ended();
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.plan(), [Action::Forget { vm, epoch: Epoch(id.0) }]);
    agent.guests.clear();
    assert_eq!(agent.starts(), [epoch]);
}

#[test]
fn a_guest_leaves_once_and_its_carriers_words_are_told() {
    let mut agent = Agent::new();
    let (vm, epoch, id) = agent.leaving();
    agent.catch_up();
    let to = agent.there();
    assert_eq!(agent.plan(), [Action::Carry { vm, epoch, migration: id, to }]);
    let outgoing = |agent: &mut Agent, progress, failure| {
        agent.guests.get_mut(&vm).unwrap().outgoing =
            Some(Outgoing { migration: id, progress, saved_bytes: None, failure });
    };
    outgoing(&mut agent, None, None);
    assert_eq!(agent.plan(), []);
    let progress = MigrationProgress { round: 2, ..MigrationProgress::default() };
    outgoing(&mut agent, Some(progress), None);
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::MigrationProgress(id, progress) }]);
    outgoing(&mut agent, Some(progress), Some("no route".to_owned()));
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::MigrationFailed(id, "no route".to_owned()) }]);
}

#[test]
fn a_guest_that_stands_still_goes_on_only_when_the_abort_is_applied() {
    let mut agent = Agent::new();
    let (vm, _, id) = agent.leaving();
    let before = agent.fold.clone();
    let stand = |agent: &mut Agent| {
        let guest = agent.guests.get_mut(&vm).unwrap();
        guest.outgoing = Some(Outgoing { migration: id, progress: None, saved_bytes: None, failure: None });
        guest.stands_for = Some(id);
    };
    stand(&mut agent);
    agent.be_granted();
    agent.fold = before;
    assert_eq!(agent.orders(), [], "a state from before the migration knows neither it nor its end");
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.orders(), [], "the other may hold everything by now");
    agent.site.root(Command::VmCancelMigration { vm });
    agent.catch_up();
    agent.grant = None;
    assert_eq!(agent.orders(), [], "R4: no grant names it");
    agent.be_granted();
    assert_eq!(agent.carry_out_orders(), [Order::GoOn { migration: id }]);
    assert_eq!(agent.orders(), []);
}

#[test]
fn a_guest_that_was_let_go_ends_at_its_source() {
    let mut agent = Agent::new();
    let (vm, _, id) = agent.leaving();
    agent.guests.get_mut(&vm).unwrap().stands_for = Some(id);
    agent.commit(vm, id, agent.there());
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.carry_out_orders(), [Order::PowerOff]);
}
