use proptest::prelude::*;
use statemachine::command::Actor;
use statemachine::command::Command;

use super::*;
use crate::test_site::Site;
use crate::test_site::boot;
use crate::test_site::spec;

/// The second host of a site, as its agent sees it; the first is where commands come from.
struct Agent {
    site: Site,
    /// What this host has applied; it may lag behind the site.
    fold: Fold,
    grant: Option<ConfirmedGrant>,
    guests: BTreeMap<VmId, Guest>,
    marked: BTreeSet<(VmId, Epoch)>,
    now: Boottime,
}

impl Agent {
    fn new() -> Agent {
        let site = Site::with_hosts(2);
        let fold = site.now();
        let (guests, marked) = (BTreeMap::new(), BTreeSet::new());
        Agent { site, fold, grant: None, guests, marked, now: Boottime::from_ms(1_000) }
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
    assert_eq!(agent.plan(), [Action::ReportExited { vm, epoch, ended }]);
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
    assert_eq!(agent.plan(), [Action::ReportStatus { vm, epoch, status: GuestStatus::Up }]);
    let report = statemachine::command::ReportId { host: agent.host(), boot: boot(2), counter: 1_000 };
    let told = Command::ReportVmStatus { report, vm, epoch, status: GuestStatus::Up };
    agent.site.must(Actor::Host(agent.host()), told);
    agent.catch_up();
    assert_eq!(agent.plan(), []);
    agent.guests.insert(vm, Guest::launching(epoch, ReleaseClass::Operator));
    assert_eq!(agent.plan(), [], "hostd restarted and has not reached the vmm yet");
}

#[derive(Debug, Clone)]
enum Step {
    StartHere,
    StartThere,
    Stop(bool),
    CatchUp,
    /// A grant is made now and arrives now.
    Grant,
    /// A grant is made now and arrives at the next `Arrive`.
    GrantLater,
    Arrive,
    Pass(u64),
    /// The agent carries out what it plans.
    Act,
    /// The guest that this host has ends by itself, or was never able to run.
    End,
    /// hostd dies and comes back: it finds processes and markers, and has neither grants nor memory.
    Restart,
    Reboot,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::StartHere),
        2 => Just(Step::StartThere),
        2 => any::<bool>().prop_map(Step::Stop),
        5 => Just(Step::CatchUp),
        5 => Just(Step::Grant),
        2 => Just(Step::GrantLater),
        2 => Just(Step::Arrive),
        2 => (0..8_000u64).prop_map(Step::Pass),
        8 => Just(Step::Act),
        2 => Just(Step::End),
        2 => Just(Step::Restart),
        1 => Just(Step::Reboot),
    ]
}

/// One VM, this host and another, a log that this host may lag behind, reports that may be lost on the way.
struct World {
    agent: Agent,
    vm: VmId,
    incarnation: u128,
    /// Epochs whose process lives on this host: the truth, whatever hostd remembers.
    processes: BTreeSet<Epoch>,
    ever_started: BTreeSet<Epoch>,
    exit_reported: BTreeSet<Epoch>,
    in_flight: Option<ConfirmedGrant>,
}

impl World {
    fn new(release: ReleaseClass) -> World {
        let agent = Agent::new();
        let vm = agent.site.define("web", spec(release));
        World {
            agent,
            vm,
            incarnation: 2,
            processes: BTreeSet::new(),
            ever_started: BTreeSet::new(),
            exit_reported: BTreeSet::new(),
            in_flight: None,
        }
    }

    fn act(&mut self) -> Result<(), TestCaseError> {
        let agent = &self.agent;
        let view = View {
            host: agent.host(),
            boot: boot(self.incarnation),
            fold: &agent.fold,
            grant: agent.grant.as_ref(),
            guests: &agent.guests,
            marked: &agent.marked,
            now: agent.now,
            stop: StopTimers::default(),
        };
        for action in plan(&view) {
            self.carry_out(action)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, action: Action) -> Result<(), TestCaseError> {
        let (host, now) = (self.agent.host(), self.agent.now);
        match action {
            Action::Start { vm, permit, deadline } => {
                let grant = self.agent.grant.as_ref().expect("no start without a grant");
                prop_assert!(now < grant.deadline && deadline == grant.deadline);
                prop_assert!(grant.epochs.contains(&permit.epoch), "the grant names the epoch");
                prop_assert!(self.agent.fold.head.seq >= grant.applied, "hazard C5");
                prop_assert_eq!(permit.boot, boot(self.incarnation));
                prop_assert!(!self.exit_reported.contains(&permit.epoch), "started after its exit was reported");
                prop_assert!(self.ever_started.insert(permit.epoch), "an epoch is started once");
                prop_assert!(self.processes.is_empty(), "R1: one process a VM on a host");
                self.processes.insert(permit.epoch);
                self.agent.marked.insert((vm, permit.epoch));
                let mut guest = Guest::launching(permit.epoch, permit.release);
                guest.phase = Phase::Alive { status: GuestStatus::Up, quiesced: false };
                self.agent.guests.insert(vm, guest);
            }
            Action::LookInto { vm, permit } => {
                prop_assert!(!self.processes.contains(&permit.epoch), "a live process is always known after a restart");
                self.agent.guests.insert(vm, gone(permit, ExitReason::Lost));
            }
            Action::Renounce { vm, permit } => {
                prop_assert!(self.processes.is_empty());
                self.agent.marked.insert((vm, permit.epoch));
                self.agent.guests.insert(vm, gone(permit, ExitReason::PoweredOff));
            }
            Action::Order { vm, epoch, order, desired_at } => {
                if let Order::Confirm { deadline } = order {
                    let grant = self.agent.grant.as_ref().expect("no confirmation without a grant");
                    prop_assert!(grant.epochs.contains(&epoch) && deadline == grant.deadline && now < deadline);
                    prop_assert!(self.agent.fold.head.seq >= grant.applied);
                }
                let guest = self.agent.guests.get_mut(&vm).expect("orders go to guests");
                guest.note(order, desired_at, now);
                if matches!(order, Order::PowerOff | Order::Kill) {
                    self.processes.remove(&epoch);
                    guest.phase = Phase::Gone(Ended { reason: ExitReason::PoweredOff, detail: String::new() });
                }
            }
            Action::ReportExited { vm, epoch, ended } => {
                prop_assert!(!self.processes.contains(&epoch), "an exit is reported when nothing is left");
                prop_assert!(self.agent.marked.contains(&(vm, epoch)), "the epoch is used up first");
                self.exit_reported.insert(epoch);
                let report = statemachine::command::ReportId {
                    host,
                    boot: boot(self.incarnation),
                    counter: 1_000 + self.agent.site.now().head.seq.0,
                };
                let told = Command::ReportVmExited { report, vm, epoch, reason: ended.reason, detail: String::new() };
                // It may be refused as stale; then the log has moved on.
                let _ = self.agent.site.try_command(Actor::Host(host), told);
            }
            Action::Forget { vm, epoch } => {
                prop_assert!(!self.processes.contains(&epoch));
                self.agent.guests.remove(&vm);
            }
            Action::ReportStatus { .. } => {}
        }
        Ok(())
    }

    fn restart(&mut self) {
        self.agent.grant = None;
        self.in_flight = None;
        self.agent.guests.clear();
        let release = ReleaseClass::Lease;
        for epoch in &self.processes {
            self.agent.guests.insert(self.vm, Guest::launching(*epoch, release));
        }
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        let there = self.agent.site.hosts[0];
        match step {
            Step::StartHere => self.start(self.agent.host()),
            Step::StartThere => self.start(there),
            Step::Stop(off) => {
                let mode = if off { StopMode::PowerOff } else { StopMode::Shutdown };
                let vm = self.vm;
                let _ = self.agent.site.try_command(Actor::Root(there), Command::VmStop { vm, mode });
                let permit = self.agent.site.now().state.vms.get(&vm).and_then(|vm| vm.permit);
                if let Some(permit) = permit.filter(|permit| permit.host == there) {
                    self.agent.site.exited(vm, permit.epoch, there);
                }
            }
            Step::CatchUp => self.agent.catch_up(),
            Step::Grant => self.grant(),
            Step::GrantLater => {
                let kept = self.agent.grant.take();
                self.grant();
                self.in_flight = std::mem::replace(&mut self.agent.grant, kept);
            }
            Step::Arrive => {
                if let Some(late) = self.in_flight.take().filter(|grant| self.agent.now < grant.deadline) {
                    self.agent.grant = Some(late);
                }
            }
            Step::Pass(ms) => self.agent.now = self.agent.now.plus_ms(ms),
            Step::Act => return self.act(),
            Step::End => {
                if let Some(epoch) = self.processes.pop_first() {
                    let ended = Ended { reason: ExitReason::GuestFault, detail: String::new() };
                    let guest = self.agent.guests.get_mut(&self.vm).expect("every process is known");
                    prop_assert_eq!(guest.epoch, epoch);
                    guest.phase = Phase::Gone(ended);
                }
            }
            Step::Restart => self.restart(),
            Step::Reboot => {
                self.incarnation += 1;
                self.processes.clear();
                self.restart();
                self.agent.guests.clear();
                self.agent.site.report_boot(self.agent.host(), boot(self.incarnation));
            }
        }
        // R1, as far as this host can break it: what runs here is permitted by the log, or its release came from here.
        prop_assert!(self.processes.len() <= 1);
        let site = self.agent.site.now();
        let permit = site.state.vms.get(&self.vm).and_then(|vm| vm.permit);
        for epoch in &self.processes {
            prop_assert!(permit.is_some_and(|permit| permit.epoch == *epoch), "epoch {epoch} runs under {permit:?}");
        }
        Ok(())
    }

    fn grant(&mut self) {
        self.agent.be_granted();
        let fold = self.agent.site.now();
        let permits = fold.state.permits_on(self.agent.host());
        let mine = permits.filter(|(_, _, permit)| permit.boot == boot(self.incarnation));
        self.agent.grant.as_mut().unwrap().epochs = mine.map(|(_, _, permit)| permit.epoch).collect();
    }

    fn start(&mut self, host: HostId) {
        let start = Command::VmStart { vm: self.vm, host: Some(host) };
        let _ = self.agent.site.try_command(Actor::Root(self.agent.site.hosts[0]), start);
    }
}

fn gone(permit: Permit, reason: ExitReason) -> Guest {
    let mut guest = Guest::launching(permit.epoch, permit.release);
    guest.phase = Phase::Gone(Ended { reason, detail: String::new() });
    guest
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// R1, R4 on one host: through lag, late grants, restarts and reboots, whatever runs is what the log permits, each
    /// epoch is started once, and never after its exit was reported.
    #[test]
    fn guests_equal_permits_that_the_host_may_act_on(steps in proptest::collection::vec(step(), 1..150)) {
        let mut world = World::new(ReleaseClass::Lease);
        for step in steps {
            world.step(step)?;
        }
    }
}
