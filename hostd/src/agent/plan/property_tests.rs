//! R1 and R4 on one host, over random lives of a VM.

use proptest::prelude::*;

use super::*;

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
            asleep: &agent.asleep,
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
                // As of a lease that ended; they are asked for as long as it lives.
                guest.see_files_wanted(BTreeSet::from(["root".to_owned()]));
                self.agent.guests.insert(vm, guest);
            }
            Action::HandFiles { vm, epoch, disk } => {
                let grant = self.agent.grant.as_ref().expect("no files without a grant");
                prop_assert!(grant.epochs.contains(&epoch) && now < grant.deadline, "the grant names the epoch (S2)");
                prop_assert!(self.agent.fold.head.seq >= grant.applied, "hazard C5");
                let guest = self.agent.guests.get_mut(&vm).expect("files go to guests");
                guest.begin_handing(&disk, now);
                guest.handing.remove(&disk);
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
            Action::Report { vm, epoch, news: News::Exited(ended) } => {
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
            Action::Report { .. } => {}
            // Its guests do not move, and keep their devices.
            Action::Receive { .. } | Action::Carry { .. } | Action::Plug { .. } | Action::Unplug { .. } => {
                unreachable!("nobody asked for it")
            }
            // Nor do they sleep.
            Action::Suspend { .. } | Action::Wake { .. } | Action::Feed { .. } | Action::Discard { .. } => {
                unreachable!("nobody asked for it")
            }
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
