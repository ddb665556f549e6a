//! The agent's loop: wakes when applied state, the grant or a guest changes, plans, and has the plan carried out by tasks. It
//! never blocks itself, so a grant reaches every guest whatever a disk does.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use statemachine::command::HostFacts;
use statemachine::fold::Fold;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::DeviceWord;
use statemachine::state::GuestStatus;
use statemachine::state::Permit;
use statemachine::state::ReleaseClass;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::GuestView;
use super::adopt;
use super::adopt::Found;
use super::cluster::Cluster;
use super::guest;
use super::guest::Seen;
use super::plan;
use super::plan::Action;
use super::plan::Device;
use super::plan::Ended;
use super::plan::Feeding;
use super::plan::Guest;
use super::plan::Order;
use super::plan::Outgoing;
use super::plan::Phase;
use super::plan::StopTimers;
use super::plan::View;
use super::reports;
use super::reports::Owed;
use super::reports::Reports;
use super::reports::Subject;
use super::work::Attended;
use super::work::Looked;
use super::work::Processes;
use super::work::Worked;
use crate::lease::clock::Boottime;
use crate::lease::record::ConfirmedGrant;
use crate::migration::carrier::Journey;
use crate::migration::carrier::limits;

const TICK: Duration = Duration::from_millis(500);
/// News of guests and of work that wait for the loop.
const NEWS_MAX: usize = 1024;
/// Progress of a migration is an event at most this often.
const PROGRESS_EVERY_MS: u64 = 5_000;

pub struct Reconciler {
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) facts: watch::Receiver<HostFacts>,
    pub(super) processes: Arc<dyn Processes>,
    pub(super) stop_timers: StopTimers,
    pub(super) grant: watch::Receiver<Option<ConfirmedGrant>>,
    pub(super) publish: watch::Sender<Arc<Vec<GuestView>>>,
    pub(super) shutdown: CancellationToken,
}

/// A guest and the way to its task.
struct Line {
    orders: mpsc::Sender<Order>,
    since: Boottime,
    seen: Option<Seen>,
    /// When the progress of its migration last became news.
    progress_told: Option<Boottime>,
}

impl Line {
    /// The latest deadline that the process may hold, for the watchdog: of an adopted one that has not answered yet, the end of
    /// a lease that an earlier hostd began in its last moment.
    fn deadline(&self, guest: &Guest) -> Option<Boottime> {
        let told = self.seen.as_ref().and_then(|seen| seen.deadline_ns).map(Boottime::from_ns).max(guest.confirmed);
        let latest = Boottime::from_ns(self.since.as_ns().saturating_add(vmm_control::MAX_LEASE_NS));
        told.or((guest.release == ReleaseClass::Lease && guest.incoming.is_none()).then_some(latest))
    }
}

struct Loop {
    own: Reconciler,
    guests: BTreeMap<VmId, Guest>,
    /// Epochs that were, or may have been, started on this host.
    marked: BTreeSet<(VmId, Epoch)>,
    /// Files of guests that sleep, or may, on this host.
    asleep: BTreeSet<(VmId, MigrationId)>,
    lines: BTreeMap<VmId, Line>,
    /// Those who bring guests to other hosts, or to sleep.
    carriers: BTreeMap<VmId, (MigrationId, AbortHandle)>,
    /// VMs whose files a thread is busy with.
    busy: BTreeSet<VmId>,
    /// Orders that did not take effect, to be planned again at the next tick.
    undone: BTreeSet<VmId>,
    reports: Reports,
    told: mpsc::Sender<(VmId, Epoch, guest::Told)>,
    worked: mpsc::Sender<(VmId, Worked)>,
    reported: mpsc::Sender<(Subject, reports::Told)>,
}

impl Reconciler {
    /// Runs until shutdown. `looked` is what was on the host when the agent started.
    pub async fn run(self, looked: Looked) {
        let (told, mut told_news) = mpsc::channel(NEWS_MAX);
        let (worked, mut worked_news) = mpsc::channel(NEWS_MAX);
        let (reported, mut reported_news) = mpsc::channel(4);
        let boot = self.facts.borrow().boot;
        let mut state = Loop {
            reports: Reports::new(self.cluster.host(), boot),
            guests: BTreeMap::new(),
            marked: looked.marked,
            asleep: looked.asleep,
            lines: BTreeMap::new(),
            carriers: BTreeMap::new(),
            busy: BTreeSet::new(),
            undone: BTreeSet::new(),
            told,
            worked,
            reported,
            own: self,
        };
        for (vm, found) in looked.found {
            state.take_in(vm, found);
        }
        let mut processor = state.own.processes.processor().fuse();
        let mut fold = state.own.cluster.watch_fold();
        let mut grant = state.own.grant.clone();
        let mut facts = state.own.facts.clone();
        let shutdown = state.own.shutdown.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let applied = fold.borrow_and_update().clone();
            let confirmed = grant.borrow_and_update().clone();
            state.act(&applied, confirmed.as_ref());
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                changed = fold.changed() => if changed.is_err() { return },
                changed = grant.changed() => if changed.is_err() { return },
                changed = facts.changed() => if changed.is_err() { return },
                known = &mut processor => state.reports.processor = known,
                Some((vm, epoch, news)) = told_news.recv() => state.hear(vm, epoch, news),
                Some((vm, news)) = worked_news.recv() => state.work_done(vm, news),
                Some((subject, news)) = reported_news.recv() => state.report_done(subject, &news),
                _ = tick.tick() => state.plan_undone_again(),
            }
        }
    }
}

impl Loop {
    fn now(&self) -> Boottime {
        Boottime::of(self.own.cluster.platform().clock.as_ref())
    }

    fn act(&mut self, fold: &Arc<Fold>, grant: Option<&ConfirmedGrant>) {
        self.give_up_carriers(fold);
        let now = self.now();
        let facts = self.own.facts.borrow().clone();
        let view = View {
            host: self.own.cluster.host(),
            boot: facts.boot,
            fold,
            grant,
            guests: &self.guests,
            marked: &self.marked,
            asleep: &self.asleep,
            now,
            stop: self.own.stop_timers,
        };
        let mut owed = Vec::new();
        for action in plan::plan(&view) {
            match action {
                Action::Start { vm, permit, deadline } => self.start(fold, vm, permit, deadline),
                Action::Receive { vm, migration } | Action::Wake { vm, suspension: migration } => {
                    self.receive(fold, vm, migration);
                }
                Action::Carry { vm, epoch, migration, to } => {
                    let limits = fold.state.vms.get(&vm).map(|known| limits(&fold.state, known)).unwrap_or_default();
                    self.carry(vm, epoch, Journey { vm, migration, to, limits });
                }
                Action::Suspend { vm, epoch, suspension } => self.suspend(vm, epoch, suspension),
                Action::Feed { vm, suspension } => self.feed(vm, suspension),
                Action::Discard { vm, suspension } => self.discard(vm, suspension),
                Action::Plug { vm, epoch, device } => self.plug(vm, epoch, device),
                Action::Unplug { vm, epoch, device } => self.unplug(vm, epoch, device),
                Action::HandFiles { vm, epoch, disk } => self.hand_files(fold, vm, epoch, disk),
                Action::LookInto { vm, permit } => self.look_into(vm, permit),
                Action::Renounce { vm, permit } => self.renounce(vm, permit),
                Action::Order { vm, order, desired_at, .. } => self.order(vm, order, desired_at, now),
                Action::Forget { vm, .. } => self.forget(vm, fold.state.vms.contains(&vm)),
                // A guest whose files are being looked at is not reported on until that is done.
                Action::Report { vm, .. } if self.busy.contains(&vm) => {}
                Action::Report { vm, epoch, news } => owed.push(Owed { vm, epoch, news }),
            }
        }
        if let Some((subject, request)) = self.reports.next(&facts, fold, &owed, now) {
            self.report(subject, request);
        }
        self.publish();
    }

    fn start(&mut self, fold: &Fold, vm: VmId, permit: Permit, deadline: Boottime) {
        let Some(known) = fold.state.vms.get(&vm) else { return };
        if !self.busy.insert(vm) {
            return;
        }
        tracing::info!(%vm, epoch = %permit.epoch, name = known.name, "the guest is started");
        self.marked.insert((vm, permit.epoch));
        let mut guest = Guest::launching(permit.epoch, permit.release);
        guest.confirmed = Some(deadline);
        self.guests.insert(vm, guest);
        let spec = known.granted_spec.clone().unwrap_or_else(|| known.spec.clone());
        let identity = super::guest_files::GuestIdentity {
            vm,
            name: known.name.clone(),
            epoch: permit.epoch,
            release: permit.release,
            deadline,
            incoming: None,
        };
        self.work(vm, self.own.processes.start(identity, spec));
    }

    fn receive(&mut self, fold: &Fold, vm: VmId, migration: MigrationId) {
        let Some((known, permit)) = fold.state.vms.get(&vm).and_then(|known| Some((known, known.permit?))) else {
            return;
        };
        if !self.busy.insert(vm) {
            return;
        }
        // From another host, or from a file of this one.
        tracing::info!(%vm, %migration, name = known.name, from = %permit.host, "a guest is on its way here");
        let guest = Guest::coming(migration, permit.release);
        let spec = known.granted_spec.clone().unwrap_or_else(|| known.spec.clone());
        let identity = super::guest_files::GuestIdentity {
            vm,
            name: known.name.clone(),
            epoch: guest.epoch,
            release: permit.release,
            deadline: self.now(),
            incoming: Some(migration),
        };
        self.guests.insert(vm, guest);
        self.work(vm, self.own.processes.receive(identity, spec));
    }

    fn carry(&mut self, vm: VmId, epoch: Epoch, journey: Journey) {
        let Some(guest) = self.guests.get_mut(&vm) else { return };
        let migration = journey.migration;
        tracing::info!(%vm, %epoch, %migration, to = %journey.to, "the guest sets out for another host");
        guest.outgoing = Some(Outgoing { migration, progress: None, saved_bytes: None, failure: None });
        let (carried, told) = (self.own.processes.carry(journey), self.told.clone());
        let task = tokio::spawn(async move {
            if let Err(words) = carried.await {
                tracing::warn!(%vm, %epoch, %migration, "the guest does not get away: {words}");
                let _ = told.send((vm, epoch, guest::Told::NotCarried(migration, words))).await;
            }
        });
        self.carriers.insert(vm, (migration, task.abort_handle()));
    }

    fn suspend(&mut self, vm: VmId, epoch: Epoch, suspension: MigrationId) {
        let Some(guest) = self.guests.get_mut(&vm) else { return };
        tracing::info!(%vm, %epoch, %suspension, "the guest falls asleep");
        guest.outgoing = Some(Outgoing { migration: suspension, progress: None, saved_bytes: None, failure: None });
        // From here on there may be a file, whether or not somebody lives to say so.
        self.asleep.insert((vm, suspension));
        let (saved, told) = (self.own.processes.save(vm, suspension), self.told.clone());
        let task = tokio::spawn(async move {
            let _ = told.send((vm, epoch, guest::Told::Saved(suspension, saved.await))).await;
        });
        self.carriers.insert(vm, (suspension, task.abort_handle()));
    }

    fn feed(&mut self, vm: VmId, suspension: MigrationId) {
        let Some(guest) = self.guests.get_mut(&vm) else { return };
        guest.feeding = Some(Feeding::UnderWay);
        let goes_by = guest.epoch;
        let (fed, told) = (self.own.processes.feed(vm, suspension), self.told.clone());
        tokio::spawn(async move {
            if let Err(words) = fed.await {
                let _ = told.send((vm, goes_by, guest::Told::NotFed(words))).await;
            }
        });
    }

    /// Tried once: what is left of it is found again when hostd starts.
    fn discard(&mut self, vm: VmId, suspension: MigrationId) {
        tracing::info!(%vm, %suspension, "the file of a guest that slept is removed");
        self.asleep.remove(&(vm, suspension));
        let discarded = self.own.processes.discard(vm, suspension);
        tokio::spawn(async move {
            if let Err(words) = discarded.await {
                tracing::warn!(%vm, %suspension, "the file of a guest that slept is still there: {words}");
            }
        });
    }

    fn plug(&mut self, vm: VmId, epoch: Epoch, device: Device) {
        let now = self.now();
        let Some(guest) = self.guests.get_mut(&vm) else { return };
        let id = device.id().to_owned();
        guest.begin_plug(&id, now);
        let (plugged, told) = (self.own.processes.plug(vm, epoch, device), self.told.clone());
        tokio::spawn(async move {
            let refusal = plugged.await.err();
            let _ = told.send((vm, epoch, guest::Told::PlugAnswered(id, refusal))).await;
        });
    }

    fn hand_files(&mut self, fold: &Fold, vm: VmId, epoch: Epoch, disk: String) {
        let now = self.now();
        let spec = fold.state.vms.get(&vm).and_then(|known| known.granted_spec.clone());
        let (Some(guest), Some(spec)) = (self.guests.get_mut(&vm), spec) else { return };
        guest.begin_handing(&disk, now);
        let goes_by = guest.epoch;
        let (handed, told) = (self.own.processes.hand_files(vm, epoch, disk.clone(), spec), self.told.clone());
        tokio::spawn(async move {
            let failure = handed.await.err();
            let _ = told.send((vm, goes_by, guest::Told::FilesHanded(disk, failure))).await;
        });
    }

    fn unplug(&mut self, vm: VmId, epoch: Epoch, device: String) {
        let now = self.now();
        let Some(guest) = self.guests.get_mut(&vm) else { return };
        guest.note_device(&device, now);
        let (asked, told) = (self.own.processes.unplug(vm, epoch, device.clone()), self.told.clone());
        tokio::spawn(async move {
            if let Err(words) = asked.await {
                let _ = told.send((vm, epoch, guest::Told::Device(device, words))).await;
            }
        });
    }

    /// What the log gave up is not carried on, though its target may not say so: the guest's process sees that nobody takes the rest,
    /// and what it was held back by is gone.
    fn give_up_carriers(&mut self, fold: &Fold) {
        self.carriers.retain(|vm, (migration, task)| {
            let moves = fold.state.moving(*vm).is_some_and(|moving| moving.id == *migration);
            let suspension = fold.state.suspensions.get(vm);
            let leaves = moves || suspension.is_some_and(|it| it.id == *migration && it.is_saving());
            if !leaves {
                task.abort();
            }
            leaves
        });
    }

    fn look_into(&mut self, vm: VmId, permit: Permit) {
        if self.busy.insert(vm) {
            self.work(vm, self.own.processes.look_into(vm, permit));
        }
    }

    fn renounce(&mut self, vm: VmId, permit: Permit) {
        if self.busy.insert(vm) {
            self.marked.insert((vm, permit.epoch));
            self.work(vm, self.own.processes.renounce(vm, permit));
        }
    }

    fn forget(&mut self, vm: VmId, vm_exists: bool) {
        if self.busy.insert(vm) {
            self.work(vm, self.own.processes.forget(vm, vm_exists));
        }
    }

    fn work(&self, vm: VmId, work: impl Future<Output = Worked> + Send + 'static) {
        let worked = self.worked.clone();
        tokio::spawn(async move {
            // A loop that has ended needs no news.
            let _ = worked.send((vm, work.await)).await;
        });
    }

    fn order(&mut self, vm: VmId, order: Order, desired_at: statemachine::ids::Seq, now: Boottime) {
        let (Some(line), Some(guest)) = (self.lines.get(&vm), self.guests.get_mut(&vm)) else { return };
        // A full line is a vmm that does not answer: the order is planned again.
        if line.orders.try_send(order).is_ok() {
            guest.note(order, desired_at, now);
            if let Order::Run { epoch, .. } = order {
                self.marked.insert((vm, epoch));
            }
        }
    }

    fn report(&self, subject: Subject, request: statemachine::command::Request) {
        let (cluster, reported) = (self.own.cluster.clone(), self.reported.clone());
        let burning = self.own.processes.burn_before(&request);
        tokio::spawn(async move {
            let told = match burning.await {
                Ok(()) => reports::tell(cluster, request).await,
                Err(error) => {
                    tracing::error!("an exit cannot be reported before its epoch is marked as used: {error}");
                    reports::Told::Failed(error.to_string())
                }
            };
            let _ = reported.send((subject, told)).await;
        });
    }

    fn report_done(&mut self, subject: Subject, told: &reports::Told) {
        if let reports::Told::Failed(why) = told {
            tracing::debug!(?subject, "a report was not taken yet: {why}");
        }
        let now = self.now();
        self.reports.settle(subject, told, now);
    }

    /// Takes in what is on the host.
    fn take_in(&mut self, vm: VmId, found: Found) {
        match found {
            Found::Alive { release, incoming: Some(migration), .. } => {
                tracing::info!(%vm, %migration, "a guest on its way here is adopted");
                let guest = Guest::coming(migration, release);
                let epoch = guest.epoch;
                self.guests.insert(vm, guest);
                self.attend(vm, epoch);
            }
            Found::Alive { epoch, release, incoming: None } => {
                tracing::info!(%vm, %epoch, "a guest of an earlier hostd is adopted");
                self.marked.insert((vm, epoch));
                self.guests.insert(vm, Guest::launching(epoch, release));
                self.attend(vm, epoch);
            }
            Found::Gone { epoch, release, ended } => {
                self.marked.insert((vm, epoch));
                self.set_gone(vm, epoch, release, ended);
            }
            // Nothing ran: the epoch may still be started.
            Found::NeverRan { .. } | Found::Nothing => {}
            Found::Unclear(why) => {
                tracing::warn!(%vm, "what is left of this VM is not clear yet: {why}");
                if self.busy.insert(vm) {
                    self.work(vm, self.own.processes.look_again(vm));
                }
            }
        }
    }

    fn set_gone(&mut self, vm: VmId, epoch: Epoch, release: ReleaseClass, ended: Ended) {
        tracing::info!(%vm, %epoch, reason = ?ended.reason, "the guest has ended: {}", ended.detail);
        self.lines.remove(&vm);
        let mut guest = self.guests.remove(&vm).unwrap_or_else(|| Guest::launching(epoch, release));
        guest.epoch = epoch;
        guest.phase = Phase::Gone(ended);
        self.guests.insert(vm, guest);
    }

    fn attend(&mut self, vm: VmId, epoch: Epoch) {
        let Some(guest) = self.guests.get(&vm) else { return };
        let who = Attended { vm, epoch, release: guest.release, incoming: guest.incoming };
        let (sender, orders) = mpsc::channel(guest::ORDERS_MAX);
        self.lines.insert(vm, Line { orders: sender, since: self.now(), seen: None, progress_told: None });
        tokio::spawn(self.own.processes.attend(who, orders, self.told.clone()));
    }

    fn hear(&mut self, vm: VmId, epoch: Epoch, news: guest::Told) {
        let now = self.now();
        let Some(guest) = self.guests.get_mut(&vm).filter(|guest| guest.epoch == epoch) else { return };
        match news {
            guest::Told::Seen(seen) => {
                let phase = match seen.loaded {
                    Some(loaded) => Phase::Incoming { loaded },
                    None => Phase::Alive { status: seen.status, quiesced: seen.quiesced },
                };
                let before = std::mem::replace(&mut guest.phase, phase);
                guest.stands_for = seen.stands_for;
                if seen.status == GuestStatus::Up {
                    guest.retry.forget(now);
                }
                if guest.fault != seen.fault {
                    if let Some(fault) = &seen.fault {
                        tracing::warn!(%vm, %epoch, disk = fault.disk, "an error of a disk holds the guest: {}", fault.what);
                    }
                    guest.fault.clone_from(&seen.fault);
                }
                if before != guest.phase && seen.loaded.is_none() {
                    tracing::info!(%vm, %epoch, status = ?seen.status, quiesced = seen.quiesced, "the guest's status");
                }
                guest.see_devices(seen.devices.clone());
                guest.see_files_wanted(seen.files_wanted.clone());
                let Some(line) = self.lines.get_mut(&vm) else { return };
                let progress = seen
                    .progress
                    .filter(|_| line.progress_told.is_none_or(|last| now.ms_since(last) >= PROGRESS_EVERY_MS));
                if let (Some(outgoing), Some(progress)) = (guest.outgoing.as_mut(), progress)
                    && outgoing.progress != Some(progress)
                {
                    line.progress_told = Some(now);
                    outgoing.progress = Some(progress);
                }
                line.seen = Some(seen);
            }
            guest::Told::RunsAs(permitted) => {
                tracing::info!(%vm, epoch = %permitted, migration = %epoch, "a guest from another host runs here");
                self.marked.insert((vm, permitted));
                guest.runs_as(permitted);
            }
            guest::Told::NotCarried(migration, words) => {
                if let Some(outgoing) = guest.outgoing.as_mut().filter(|outgoing| outgoing.migration == migration) {
                    outgoing.failure = Some(adopt::bounded(&words));
                }
            }
            guest::Told::Saved(suspension, saved) => {
                if let Some(outgoing) = guest.outgoing.as_mut().filter(|outgoing| outgoing.migration == suspension) {
                    match saved {
                        Ok(bytes) => {
                            tracing::info!(%vm, %epoch, %suspension, bytes, "the guest is written down");
                            outgoing.saved_bytes = Some(bytes);
                        }
                        Err(words) => {
                            tracing::warn!(%vm, %epoch, %suspension, "the guest cannot be written down: {words}");
                            outgoing.failure = Some(adopt::bounded(&words));
                        }
                    }
                }
            }
            guest::Told::NotFed(words) => {
                tracing::warn!(%vm, "the guest does not wake up: {words}");
                guest.feeding = Some(Feeding::Failed(adopt::bounded(&words)));
            }
            guest::Told::Device(device, words) => {
                tracing::warn!(%vm, %epoch, device, "a device is not as it should be: {words}");
                guest.device_words.insert(device, adopt::one_line(&words, DeviceWord::MAX_WORDS));
            }
            guest::Told::PlugAnswered(device, refusal) => {
                if let Some(words) = &refusal {
                    tracing::warn!(%vm, %epoch, device, "the guest does not get a device: {words}");
                }
                guest.plug_answered(&device, refusal.map(|words| adopt::one_line(&words, DeviceWord::MAX_WORDS)));
            }
            guest::Told::FilesHanded(disk, failure) => {
                guest.handing.remove(&disk);
                if let Some(words) = failure {
                    tracing::warn!(%vm, %epoch, disk, "the guest waits for the files of a disk: {words}");
                }
            }
            guest::Told::Facts(facts) => guest.facts = Some(facts),
            guest::Told::Undone(_) => {
                self.undone.insert(vm);
            }
            guest::Told::Gone { ended, marked } => {
                let release = guest.release;
                if guest.incoming.is_some() {
                    // What it was told to run it may not have run, and what an earlier hostd told it, it may: its marks know.
                    self.marked.retain(|(other, _)| *other != vm);
                    self.marked.extend(marked.into_iter().map(|epoch| (vm, epoch)));
                }
                self.set_gone(vm, epoch, release, ended);
            }
        }
    }

    /// Confirmations and resets that a vmm did not take are due again. Stops go on by their own timers.
    fn plan_undone_again(&mut self) {
        for vm in std::mem::take(&mut self.undone) {
            if let Some(guest) = self.guests.get_mut(&vm) {
                guest.confirmed = None;
                guest.reset = None;
                guest.memory_told = None;
            }
        }
    }

    fn work_done(&mut self, vm: VmId, worked: Worked) {
        self.busy.remove(&vm);
        match worked {
            Worked::Started { epoch } => self.attend(vm, epoch),
            Worked::NotStarted { epoch } => {
                self.guests.remove(&vm);
                self.marked.remove(&(vm, epoch));
            }
            Worked::Ended { epoch, release, ended } => self.set_gone(vm, epoch, release, ended),
            Worked::Found { instead_of, found } => {
                if let Some(epoch) = instead_of {
                    self.guests.remove(&vm);
                    self.marked.remove(&(vm, epoch));
                }
                self.take_in(vm, found);
            }
            Worked::Forgotten => {
                self.guests.remove(&vm);
                self.lines.remove(&vm);
            }
            Worked::Again => {}
        }
    }

    fn publish(&self) {
        let view = |(vm, guest): (&VmId, &Guest)| {
            let line = self.lines.get(vm);
            let seen = line.and_then(|line| line.seen.as_ref());
            GuestView {
                vm: *vm,
                epoch: guest.epoch,
                release: guest.release,
                phase: guest.phase.clone(),
                deadline: line.map_or(guest.confirmed, |line| line.deadline(guest)),
                pid: seen.and_then(|seen| seen.pid),
                overhead_bytes: seen.and_then(|seen| seen.overhead_bytes),
                incoming: guest.incoming,
            }
        };
        let views: Vec<GuestView> = self.guests.iter().map(view).collect();
        self.own.publish.send_if_modified(|published| {
            let changed = **published != views;
            if changed {
                *published = Arc::new(views);
            }
            changed
        });
    }
}
