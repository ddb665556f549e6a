use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::state::ExitReason;

use super::*;
use crate::test_site::Site;
use crate::test_site::boot;
use crate::test_site::spec;

#[path = "device_tests.rs"]
mod device_stories;
#[path = "file_tests.rs"]
mod file_stories;
#[path = "moving_tests.rs"]
mod moving_stories;
#[path = "property_tests.rs"]
mod property;
#[path = "sleeping_tests.rs"]
mod sleeping_stories;
#[path = "standstill_tests.rs"]
mod standstill;

/// The second host of a site, as its agent sees it; the first is where commands come from.
struct Agent {
    site: Site,
    /// What this host has applied; it may lag behind the site.
    fold: Fold,
    grant: Option<ConfirmedGrant>,
    guests: BTreeMap<VmId, Guest>,
    marked: BTreeSet<(VmId, Epoch)>,
    asleep: BTreeSet<(VmId, MigrationId)>,
    now: Boottime,
}

impl Agent {
    fn new() -> Agent {
        let site = Site::with_hosts(2);
        let fold = site.now();
        let (guests, marked, asleep) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Agent { site, fold, grant: None, guests, marked, asleep, now: Boottime::from_ms(1_000) }
    }

    fn host(&self) -> HostId {
        self.site.hosts[1]
    }

    fn plan(&self) -> Vec<Action> {
        plan(&View {
            host: self.host(),
            boot: boot(2),
            fold: &self.fold,
            grant: self.grant.as_ref(),
            guests: &self.guests,
            marked: &self.marked,
            asleep: &self.asleep,
            now: self.now,
            stop: StopTimers::default(),
        })
    }

    fn catch_up(&mut self) {
        self.fold = self.site.now();
    }

    /// A grant as the leader makes one from the site's state, answering a heartbeat sent now.
    fn be_granted(&mut self) {
        let fold = self.site.now();
        self.grant = Some(ConfirmedGrant {
            deadline: self.now.plus_ms(12_000),
            applied: fold.head.seq,
            epochs: fold.state.permits_on(self.host()).map(|(_, _, permit)| permit.epoch).collect(),
            session: 1,
        });
    }

    fn vm_started_here(&mut self, release: ReleaseClass) -> (VmId, Epoch) {
        let vm = self.site.define("web", spec(release));
        (vm, self.site.start(vm, self.host()))
    }

    /// A guest that runs and is known to.
    fn running(&mut self, release: ReleaseClass) -> (VmId, Epoch) {
        let (vm, epoch) = self.vm_started_here(release);
        let mut guest = Guest::launching(epoch, release);
        guest.phase = Phase::Alive { status: GuestStatus::Up, quiesced: false };
        self.guests.insert(vm, guest);
        self.marked.insert((vm, epoch));
        self.catch_up();
        (vm, epoch)
    }

    fn orders(&self) -> Vec<Order> {
        let order = |action| match action {
            Action::Order { order, .. } => Some(order),
            _ => None,
        };
        self.plan().into_iter().filter_map(order).collect()
    }

    fn carry_out_orders(&mut self) -> Vec<Order> {
        let mut done = Vec::new();
        for action in self.plan() {
            if let Action::Order { vm, order, desired_at, .. } = action {
                self.guests.get_mut(&vm).unwrap().note(order, desired_at, self.now);
                done.push(order);
            }
        }
        done
    }

    fn starts(&self) -> Vec<Epoch> {
        let start = |action| match action {
            Action::Start { permit, .. } => Some(permit.epoch),
            _ => None,
        };
        self.plan().into_iter().filter_map(start).collect()
    }
}

#[test]
fn a_permit_alone_starts_nothing_a_grant_that_names_it_does() {
    let mut agent = Agent::new();
    agent.be_granted();
    let (_, epoch) = agent.vm_started_here(ReleaseClass::Operator);
    agent.catch_up();
    assert_eq!(agent.starts(), [], "the grant is older than the permit");
    agent.be_granted();
    assert_eq!(agent.starts(), [epoch]);
    agent.now = agent.grant.as_ref().unwrap().deadline;
    assert_eq!(agent.starts(), [], "the grant has ended");
}

#[test]
fn a_host_that_lags_behind_its_grant_starts_nothing() {
    // Hazard C5: the permit it still sees was released and its VM runs elsewhere.
    let mut agent = Agent::new();
    let (vm, epoch) = agent.vm_started_here(ReleaseClass::Operator);
    agent.catch_up();
    agent.site.exited(vm, epoch, agent.host());
    agent.site.start(vm, agent.site.hosts[0]);
    agent.be_granted();
    assert_eq!(agent.plan(), []);
    agent.grant.as_mut().unwrap().epochs.insert(epoch);
    assert_eq!(agent.plan(), [], "not even if a grant named it: local state is behind the grant");
}

#[test]
fn a_marked_epoch_is_looked_into_and_never_started() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.vm_started_here(ReleaseClass::Operator);
    agent.marked.insert((vm, epoch));
    agent.catch_up();
    assert_eq!(agent.plan(), [], "this may be the state of an old snapshot");
    agent.be_granted();
    let [Action::LookInto { vm: looked, permit }] = agent.plan()[..] else { panic!("{:?}", agent.plan()) };
    assert_eq!((looked, permit.epoch), (vm, epoch));
}

#[test]
fn a_permit_of_an_earlier_incarnation_is_left_alone() {
    let mut agent = Agent::new();
    agent.vm_started_here(ReleaseClass::Operator);
    agent.catch_up();
    agent.be_granted();
    let view = View {
        host: agent.host(),
        boot: boot(3),
        fold: &agent.fold,
        grant: agent.grant.as_ref(),
        guests: &agent.guests,
        marked: &agent.marked,
        asleep: &agent.asleep,
        now: agent.now,
        stop: StopTimers::default(),
    };
    assert_eq!(plan(&view), []);
}

#[test]
fn a_vm_that_is_stopped_before_it_was_started_is_renounced() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.vm_started_here(ReleaseClass::Operator);
    agent.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    agent.catch_up();
    agent.be_granted();
    let [Action::Renounce { permit, .. }] = agent.plan()[..] else { panic!("{:?}", agent.plan()) };
    assert_eq!(permit.epoch, epoch);
}

#[test]
fn only_lease_guests_are_confirmed_and_only_with_a_later_deadline() {
    let mut agent = Agent::new();
    agent.running(ReleaseClass::Operator);
    agent.be_granted();
    assert_eq!(agent.orders(), []);

    let mut agent = Agent::new();
    agent.running(ReleaseClass::Lease);
    agent.be_granted();
    let deadline = agent.grant.as_ref().unwrap().deadline;
    assert_eq!(agent.carry_out_orders(), [Order::Confirm { deadline }]);
    assert_eq!(agent.orders(), []);
    agent.now = agent.now.plus_ms(1_000);
    agent.be_granted();
    assert_eq!(agent.carry_out_orders(), [Order::Confirm { deadline: deadline.plus_ms(1_000) }]);
}

#[test]
fn a_paused_guest_whose_epoch_was_released_is_ended_not_confirmed() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Lease);
    agent.guests.get_mut(&vm).unwrap().phase = Phase::Alive { status: GuestStatus::PausedLease, quiesced: true };
    agent.site.exited(vm, epoch, agent.host());
    agent.be_granted();
    assert_eq!(agent.orders(), [], "this host has not heard of the release yet");
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::PowerOff]);
    agent.now = agent.now.plus_ms(15_000);
    assert_eq!(agent.orders(), [Order::Kill]);
}

#[test]
fn a_guest_is_not_judged_by_a_state_from_before_its_permit() {
    // hostd restarted from a snapshot that is older than the permit.
    let mut agent = Agent::new();
    let before = agent.site.now();
    agent.running(ReleaseClass::Operator);
    agent.fold = before;
    assert_eq!(agent.plan(), []);
}

#[test]
fn a_gone_guest_is_reported_until_the_log_knows_and_then_forgotten() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    let ended = Ended { reason: ExitReason::GuestPoweredOff, detail: String::new() };
    agent.guests.get_mut(&vm).unwrap().phase = Phase::Gone(ended.clone());
    agent.be_granted();
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Exited(ended) }]);
    agent.site.exited(vm, epoch, agent.host());
    agent.catch_up();
    assert_eq!(agent.plan(), [Action::Forget { vm, epoch }]);
    let next = agent.site.start(vm, agent.host());
    agent.catch_up();
    agent.be_granted();
    assert_eq!(agent.plan(), [Action::Forget { vm, epoch }], "the old process goes first");
    agent.guests.clear();
    assert_eq!(agent.starts(), [next]);
}

#[test]
fn a_shutdown_is_the_button_twice_then_the_plug_then_a_kill() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    agent.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    agent.catch_up();
    let start = agent.now;
    let mut log = Vec::new();
    for second in 0..100 {
        agent.now = start.plus_ms(second * 1_000);
        log.extend(agent.carry_out_orders().into_iter().map(|order| (second, order)));
    }
    let expected = [
        (0, Order::PowerButton),
        (10, Order::PowerButton),
        (60, Order::PowerOff),
        (75, Order::Kill),
        (90, Order::Kill),
    ];
    assert_eq!(log, expected);
}

#[test]
fn pulling_the_plug_does_not_wait_for_a_shutdown_under_way() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    agent.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::PowerButton]);
    agent.site.root(Command::VmStop { vm, mode: StopMode::PowerOff });
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::PowerOff]);
}

#[test]
fn a_reset_is_done_once() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    let id = agent.site.root(Command::VmReset { vm }).seq;
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::Reset { id }]);
    assert_eq!(agent.orders(), []);
    // A later epoch does not inherit the reset.
    agent.site.exited(vm, epoch, agent.host());
    let next = agent.site.start(vm, agent.host());
    agent.guests.insert(vm, Guest::launching(next, ReleaseClass::Operator));
    agent.catch_up();
    assert_eq!(agent.orders(), []);
}

#[test]
fn a_status_is_reported_when_it_differs_and_an_adopted_guest_is_not_said_to_start_again() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Status(GuestStatus::Up) }]);
    let report = statemachine::command::ReportId { host: agent.host(), boot: boot(2), counter: 1_000 };
    let told = Command::ReportVmStatus { report, vm, epoch, status: GuestStatus::Up };
    agent.site.must(Actor::Host(agent.host()), told);
    agent.catch_up();
    assert_eq!(agent.plan(), []);
    agent.guests.insert(vm, Guest::launching(epoch, ReleaseClass::Operator));
    assert_eq!(agent.plan(), [], "hostd restarted and has not reached the vmm yet");
}

#[test]
fn what_a_guest_says_is_reported_until_it_is_known_and_at_the_level_that_knows_it() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    let report = statemachine::command::ReportId { host: agent.host(), boot: boot(2), counter: 1_000 };
    let told = Command::ReportVmStatus { report, vm, epoch, status: GuestStatus::Up };
    agent.site.must(Actor::Host(agent.host()), told);
    let facts = Arc::new(GuestFacts { hostname: Some("web".to_owned()), ..GuestFacts::default() });
    if let Some(guest) = agent.guests.get_mut(&vm) {
        guest.facts = Some(facts.clone());
    }
    agent.catch_up();
    assert_eq!(agent.plan(), [Action::Report { vm, epoch, news: News::Facts(facts.clone()) }]);
    let set_level = |agent: &Agent, level| {
        let mut fold = agent.site.fold.lock().unwrap();
        if let Some(site) = fold.state.site.as_mut() {
            site.feature_level = level;
        }
    };
    set_level(&agent, GuestFacts::FEATURE_LEVEL - 1);
    agent.catch_up();
    assert_eq!(agent.plan(), [], "an older host could not read it");
    set_level(&agent, GuestFacts::FEATURE_LEVEL);
    let report = statemachine::command::ReportId { counter: 1_001, ..report };
    agent.site.must(Actor::Host(agent.host()), Command::ReportVmGuest { report, vm, epoch, facts });
    agent.catch_up();
    assert_eq!(agent.plan(), []);
}
