//! The agent's files and processes in a simulation: [`Processes`] over a [`Machine`]. hostd's own agent loop, plan, reports
//! and lease run above it unchanged.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hostd::agent::AgentError;
use hostd::agent::adopt::Found;
use hostd::agent::guest::Seen;
use hostd::agent::guest::Told;
use hostd::agent::guest_files::GuestIdentity;
use hostd::agent::marks::MarkError;
use hostd::agent::plan::Device;
use hostd::agent::plan::Ended;
use hostd::agent::plan::Order;
use hostd::agent::work::Attended;
use hostd::agent::work::Looked;
use hostd::agent::work::News;
use hostd::agent::work::Processes;
use hostd::agent::work::Worked;
use hostd::migration::carrier::Journey;
use rand::Rng;
use statemachine::HostId;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use statemachine::state::ExitReason;
use statemachine::state::HostProcessor;
use statemachine::state::Permit;
use statemachine::state::VmSpec;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::hardware::Hardware;
use super::hardware::Launch;
use super::hardware::Machine;
use super::hardware::Vmm;
use super::hardware::VmmState;
use super::random::Seeded;
use super::roads::Roads;

/// Between two looks of an attendant.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const AGAIN: Duration = Duration::from_secs(1);
/// As the product's carrier waits for the other end.
const TARGET_READY: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct StandIns {
    pub hardware: Hardware,
    pub host: HostId,
    pub roads: Roads,
}

/// Some milliseconds, from the product's generator: what a real process would take.
fn some_ms(least: u64, most: u64) -> Duration {
    Duration::from_millis(least + Seeded.next_u64() % (most - least))
}

fn found(machine: &Machine, vm: VmId) -> Found {
    if let Some(vmm) = machine.vmms.get(&vm) {
        let incoming = matches!(vmm.state, VmmState::Incoming { .. }).then(|| MigrationId(vmm.epoch.0));
        return Found::Alive { epoch: vmm.epoch, release: vmm.release, incoming };
    }
    // A launch that is under way holds the lock.
    if machine.launches.iter().any(|launch| launch.vm == vm) {
        return Found::Unclear("it is being launched".to_owned());
    }
    match machine.remains.get(&vm) {
        Some((epoch, release, ended)) => Found::Gone { epoch: *epoch, release: *release, ended: ended.clone() },
        None => Found::Nothing,
    }
}

async fn launch(hardware: Hardware, identity: GuestIdentity) -> Worked {
    let GuestIdentity { vm, epoch, release, deadline, incoming, .. } = identity;
    tokio::time::sleep(some_ms(2, 40)).await;
    let (launched, is_launched) = oneshot::channel();
    {
        let mut machine = hardware.machine();
        if mutant::is_on(Mutant::EpochStartedTwice) {
            machine.marks.remove(&(vm, epoch));
        }
        let state = if incoming.is_some() { VmmState::Incoming { loaded: false } } else { VmmState::Running };
        let vmm = Vmm { epoch, release, deadline, state, off_at_ms: None, stands_for: None };
        let at_ms = machine.now_ms + some_ms(2, 60).as_millis() as u64;
        machine.launches.push(Launch { at_ms, vm, vmm, launched });
    }
    if is_launched.await == Ok(true) {
        return Worked::Started { epoch };
    }
    let left = found(&hardware.machine(), vm);
    match left {
        Found::Nothing | Found::NeverRan { .. } => Worked::NotStarted { epoch },
        found => Worked::Found { instead_of: Some(epoch), found },
    }
}

/// Rounds over the memory of a guest that runs, then the rest of a guest that stands still: at each step hostd may die, and at each
/// the other end may be gone.
async fn carry(from: StandIns, journey: Journey) -> Result<(), String> {
    let Journey { vm, migration, to, .. } = journey;
    let far = || from.roads.far(from.host, to).ok_or_else(|| "the other host is not reached".to_owned());
    let waits = |machine: &Machine| {
        let waiting = machine.vmms.get(&vm).filter(|vmm| vmm.epoch == Epoch(migration.0));
        waiting.is_some_and(|vmm| vmm.state == VmmState::Incoming { loaded: false })
    };
    let patience = tokio::time::Instant::now() + TARGET_READY;
    while !far().is_ok_and(|far| waits(&far.machine())) {
        if tokio::time::Instant::now() > patience {
            return Err("the other host is not ready".to_owned());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    for _ in 0..Seeded.next_u64() % 4 {
        tokio::time::sleep(some_ms(20, 800)).await;
        far()?;
    }
    match from.hardware.machine().vmms.get_mut(&vm) {
        Some(vmm) if vmm.state == VmmState::Running => vmm.stands_for = Some(migration),
        _ => return Err("it does not run".to_owned()),
    }
    tokio::time::sleep(some_ms(1, 60)).await;
    let far = far()?;
    let mut machine = far.machine();
    if !waits(&machine) {
        return Err("the process that took it in is gone".to_owned());
    }
    if let Some(vmm) = machine.vmms.get_mut(&vm) {
        vmm.state = VmmState::Incoming { loaded: true };
    }
    Ok(())
}

/// The guest stands, then its file is on the disk, then that is known: hostd or its machine may be gone at each step, and now and then there
/// is no space.
async fn save(hardware: Hardware, vm: VmId, suspension: MigrationId) -> Result<u64, String> {
    match hardware.machine().vmms.get_mut(&vm) {
        Some(vmm) if vmm.state == VmmState::Running => vmm.stands_for = Some(suspension),
        _ => return Err("it does not run".to_owned()),
    }
    tokio::time::sleep(some_ms(20, 800)).await;
    if Seeded.next_u64().is_multiple_of(8) {
        return Err("no space".to_owned());
    }
    let is_there = |machine: &Machine| machine.vmms.get(&vm).is_some_and(|vmm| vmm.stands_for == Some(suspension));
    {
        let mut machine = hardware.machine();
        if !is_there(&machine) {
            return Err("its process is gone".to_owned());
        }
        machine.asleep.insert((vm, suspension));
    }
    tokio::time::sleep(some_ms(1, 60)).await;
    Ok(1)
}

/// The process that was started for it takes the guest in.
async fn feed(hardware: Hardware, vm: VmId, suspension: MigrationId) -> Result<(), String> {
    tokio::time::sleep(some_ms(20, 800)).await;
    let mut machine = hardware.machine();
    if !machine.asleep.contains(&(vm, suspension)) {
        return Err("no such file".to_owned());
    }
    match machine.vmms.get_mut(&vm).filter(|vmm| vmm.epoch == Epoch(suspension.0)) {
        Some(vmm) if vmm.state == VmmState::Incoming { loaded: false } => {
            vmm.state = VmmState::Incoming { loaded: true };
            Ok(())
        }
        _ => Err("no process waits for it".to_owned()),
    }
}

impl Processes for StandIns {
    fn look(&self) -> BoxFuture<'static, Result<Looked, AgentError>> {
        let machine = self.hardware.machine();
        let mut vms: Vec<VmId> = machine.vmms.keys().chain(machine.remains.keys()).copied().collect();
        vms.extend(machine.launches.iter().map(|launch| launch.vm));
        vms.sort_unstable();
        vms.dedup();
        let found = vms.into_iter().map(|vm| (vm, found(&machine, vm))).collect();
        let looked = Looked { marked: machine.marks.clone(), asleep: machine.asleep.clone(), found };
        futures::future::ready(Ok(looked)).boxed()
    }

    fn start(&self, identity: GuestIdentity, _spec: Arc<VmSpec>) -> BoxFuture<'static, Worked> {
        launch(self.hardware.clone(), identity).boxed()
    }

    fn receive(&self, identity: GuestIdentity, _spec: Arc<VmSpec>) -> BoxFuture<'static, Worked> {
        launch(self.hardware.clone(), identity).boxed()
    }

    fn carry(&self, journey: Journey) -> BoxFuture<'static, Result<(), String>> {
        carry(self.clone(), journey).boxed()
    }

    fn save(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<u64, String>> {
        save(self.hardware.clone(), vm, suspension).boxed()
    }

    fn feed(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>> {
        feed(self.hardware.clone(), vm, suspension).boxed()
    }

    fn discard(&self, vm: VmId, suspension: MigrationId) -> BoxFuture<'static, Result<(), String>> {
        self.hardware.machine().asleep.remove(&(vm, suspension));
        future::ready(Ok(())).boxed()
    }

    /// All hosts of the simulation are alike, and none says so.
    fn processor(&self) -> BoxFuture<'static, Option<HostProcessor>> {
        future::ready(None).boxed()
    }

    /// Guests of the simulation have no devices.
    fn plug(&self, _: VmId, _: Epoch, _: Device) -> BoxFuture<'static, Result<(), String>> {
        future::ready(Ok(())).boxed()
    }

    fn hand_files(&self, _: VmId, _: Epoch, _: String, _: Arc<VmSpec>) -> BoxFuture<'static, Result<(), String>> {
        future::ready(Ok(())).boxed()
    }

    fn unplug(&self, _: VmId, _: Epoch, _: String) -> BoxFuture<'static, Result<(), String>> {
        future::ready(Ok(())).boxed()
    }

    fn look_into(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked> {
        let found = found(&self.hardware.machine(), vm);
        async move {
            tokio::time::sleep(some_ms(1, 20)).await;
            match found {
                Found::Alive { .. } => Worked::Found { instead_of: None, found },
                Found::Gone { epoch, release, ended } if epoch == permit.epoch => {
                    Worked::Ended { epoch, release, ended }
                }
                Found::Unclear(_) => {
                    tokio::time::sleep(AGAIN).await;
                    Worked::Again
                }
                Found::Gone { .. } | Found::NeverRan { .. } | Found::Nothing => {
                    let ended = Ended { reason: ExitReason::Lost, detail: "no trace of it is left".to_owned() };
                    Worked::Ended { epoch: permit.epoch, release: permit.release, ended }
                }
            }
        }
        .boxed()
    }

    fn look_again(&self, vm: VmId) -> BoxFuture<'static, Worked> {
        let hardware = self.hardware.clone();
        async move {
            tokio::time::sleep(AGAIN).await;
            Worked::Found { instead_of: None, found: found(&hardware.machine(), vm) }
        }
        .boxed()
    }

    fn renounce(&self, vm: VmId, permit: Permit) -> BoxFuture<'static, Worked> {
        let hardware = self.hardware.clone();
        async move {
            tokio::time::sleep(some_ms(1, 20)).await;
            let mut machine = hardware.machine();
            match found(&machine, vm) {
                found @ Found::Alive { .. } => Worked::Found { instead_of: None, found },
                Found::Unclear(_) => Worked::Again,
                _ => {
                    machine.marks.insert((vm, permit.epoch));
                    let detail = "stopped before it was started".to_owned();
                    let ended = Ended { reason: ExitReason::PoweredOff, detail };
                    Worked::Ended { epoch: permit.epoch, release: permit.release, ended }
                }
            }
        }
        .boxed()
    }

    fn forget(&self, vm: VmId, _vm_exists: bool) -> BoxFuture<'static, Worked> {
        let mut machine = self.hardware.machine();
        let taken = matches!(found(&machine, vm), Found::Alive { .. } | Found::Unclear(_));
        if !taken {
            machine.remains.remove(&vm);
        }
        async move {
            if taken {
                tokio::time::sleep(AGAIN).await;
                return Worked::Again;
            }
            Worked::Forgotten
        }
        .boxed()
    }

    fn burn_before(&self, request: &Request) -> BoxFuture<'static, Result<(), MarkError>> {
        if let Command::ReportVmExited { vm, epoch, .. } = request.command {
            self.hardware.machine().marks.insert((vm, epoch));
        }
        futures::future::ready(Ok(())).boxed()
    }

    fn attend(&self, who: Attended, orders: mpsc::Receiver<Order>, told: News) -> BoxFuture<'static, ()> {
        let Attended { vm, epoch, incoming, .. } = who;
        let hardware = self.hardware.clone();
        Attendant { hardware, vm, epoch, incoming, orders, told, seen: None }.run().boxed()
    }
}

struct Attendant {
    hardware: Hardware,
    vm: VmId,
    epoch: Epoch,
    incoming: Option<MigrationId>,
    orders: mpsc::Receiver<Order>,
    told: News,
    seen: Option<Seen>,
}

impl Attendant {
    async fn run(mut self) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(order) => {
                        tokio::time::sleep(some_ms(1, 5)).await;
                        self.carry_out(order);
                    }
                    None => return,
                },
                _ = look.tick() => {}
            }
            let by = self.epoch;
            let Some(news) = self.news() else { continue };
            let gone = matches!(news, Told::Gone { .. });
            if self.told.send((self.vm, by, news)).await.is_err() || gone {
                return;
            }
        }
    }

    fn carry_out(&self, order: Order) {
        let now = self.hardware.now();
        let mut machine = self.hardware.machine();
        match order {
            Order::Confirm { deadline } => machine.confirm(self.vm, self.epoch, deadline, now),
            Order::PowerButton => {
                let off_at_ms = machine.now_ms + some_ms(100, 3_000).as_millis() as u64;
                if let Some(vmm) = machine.vmms.get_mut(&self.vm) {
                    vmm.off_at_ms.get_or_insert(off_at_ms);
                }
            }
            Order::PowerOff | Order::Kill => machine.end(self.vm, ExitReason::PoweredOff, "powered off"),
            Order::Run { epoch, deadline } => machine.run_incoming(self.vm, self.epoch, epoch, deadline),
            Order::GoOn { migration } => machine.go_on(self.vm, migration),
            // No client of the simulation asks for these.
            Order::Reset { .. } | Order::Pause | Order::Resume { .. } | Order::Memory { .. } => {}
        }
    }

    /// What is new since the last look.
    fn news(&mut self) -> Option<Told> {
        let machine = self.hardware.machine();
        if let Some(vmm) = machine.vmms.get(&self.vm)
            && self.incoming.is_some()
            && vmm.epoch != self.epoch
        {
            (self.epoch, self.incoming) = (vmm.epoch, None);
            return Some(Told::RunsAs(vmm.epoch));
        }
        let Some(vmm) = machine.vmms.get(&self.vm).filter(|vmm| vmm.epoch == self.epoch) else {
            let ended = machine.remains.get(&self.vm).filter(|(epoch, _, _)| *epoch == self.epoch);
            let lost = || Ended { reason: ExitReason::Lost, detail: "no trace of it is left".to_owned() };
            let ended = ended.map_or_else(lost, |(_, _, ended)| ended.clone());
            let marked = machine.marks.iter().filter(|(vm, _)| *vm == self.vm).map(|(_, epoch)| *epoch).collect();
            return Some(Told::Gone { ended, marked });
        };
        let quiesced = vmm.state == VmmState::Lapsed;
        let deadline_ns = Some(vmm.deadline.as_ns());
        let loaded = match vmm.state {
            VmmState::Incoming { loaded } => Some(loaded),
            _ => None,
        };
        let (status, stands_for) = (vmm.status(), vmm.stands_for);
        let seen = Seen {
            status,
            quiesced,
            deadline_ns,
            pid: None,
            overhead_bytes: None,
            fault: None,
            loaded,
            stands_for,
            progress: None,
            devices: BTreeMap::new(),
            files_wanted: BTreeSet::new(),
        };
        if self.seen.as_ref() == Some(&seen) {
            return None;
        }
        self.seen = Some(seen.clone());
        Some(Told::Seen(seen))
    }
}
