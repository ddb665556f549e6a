//! The observer: sees every host at once, keeps the one true log, and says which invariant of DESIGN §5 broke. What can be
//! said of a state alone is [`statemachine::invariants`], the same code that production runs.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt;

use consensus::decider::Leadership;
use futures::FutureExt;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::batch::Batch;
use statemachine::batch::ChainHash;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::digest::Digest;
use statemachine::fold::Applied;
use statemachine::fold::Decision;
use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::invariants;
use statemachine::state::Liveness;
use statemachine::state::ReleaseClass;

use super::coverage::Coverage;
use super::coverage::Met;
use super::hardware::Sight;
use super::host::Host;
use super::host::Hostd;
use super::host::LEASE;
use super::host::SimNode;
use super::network::Network;

/// Batches taken from a host at a time.
const READ_BATCHES: usize = 256;
const READ_BYTES: usize = 4 << 20;
/// One step of the simulation, and the resolution of tokio's timers.
const RESOLUTION_MS: u64 = 4;
const STORE_LOOK_MS: u64 = 50;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
    pub at_ms: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.invariant, self.at_ms as f64 / 1000.0, self.what)
    }
}

#[derive(Clone, Copy)]
struct Place {
    hash: ChainHash,
    digest: Digest,
}

/// What was seen of one host.
#[derive(Default)]
struct Seen {
    life: u64,
    head: Seq,
    session: u64,
    session_term: u64,
    installs: u64,
    superseded: u64,
    purged: u64,
    /// Since when the log calls it unreachable.
    unreachable_since_ms: Option<u64>,
    granted_deadline_ns: u64,
}

pub struct Checker {
    pub fold: Fold,
    places: Vec<Place>,
    /// Every name that a VM ever had.
    names: BTreeSet<String>,
    /// Key of an accepted command, by the seq of its batch.
    keys: BTreeMap<Seq, String>,
    /// Acknowledged by somebody, and not yet in the log as this checker knows it.
    unproven: BTreeMap<Seq, String>,
    seen: BTreeMap<HostId, Seen>,
    launched: BTreeSet<(VmId, Epoch)>,
    /// Which life of which host led in a term.
    led: BTreeMap<u64, (HostId, u64)>,
    members: Vec<HostId>,
    pub coverage: Coverage,
    pub violation: Option<Violation>,
    now_ms: u64,
}

impl Default for Checker {
    fn default() -> Self {
        let fold = Fold::default();
        let origin = Place { hash: fold.head.hash, digest: fold.state.digest() };
        Checker {
            fold,
            places: vec![origin],
            names: BTreeSet::new(),
            keys: BTreeMap::new(),
            unproven: BTreeMap::new(),
            seen: BTreeMap::new(),
            launched: BTreeSet::new(),
            led: BTreeMap::new(),
            members: Vec::new(),
            coverage: Coverage::default(),
            violation: None,
            now_ms: 0,
        }
    }
}

impl Checker {
    fn violate(&mut self, invariant: &'static str, what: String) {
        let at_ms = self.now_ms;
        self.violation.get_or_insert(Violation { invariant, what, at_ms });
    }

    /// Looks at everything after a step.
    pub fn look(&mut self, hosts: &BTreeMap<HostId, Host>, network: &Network, now_ms: u64) {
        self.now_ms = now_ms;
        for host in hosts.values() {
            self.look_at_node(host, network);
        }
        for host in hosts.values() {
            self.look_at_guests(host);
        }
        self.one_runner(hosts);
    }

    fn look_at_node(&mut self, host: &Host, network: &Network) {
        let (Some(process), Some(hostd)) = (&host.process, host.hostd()) else { return };
        let seen = self.seen.entry(host.id).or_default();
        if seen.life != process.life.number {
            // Volatile things of the life before.
            *seen =
                Seen { life: process.life.number, unreachable_since_ms: seen.unreachable_since_ms, ..Seen::default() };
        }
        let fold = hostd.node.fold();
        if fold.head.seq != seen.head {
            seen.head = fold.head.seq;
            self.follow(&hostd.node, host.id);
            self.agrees(host.id, &fold);
        }
        self.look_at_lead(host, &hostd.node);
        if self.now_ms.is_multiple_of(STORE_LOOK_MS) {
            self.look_at_store(host.id, &hostd.node);
        }
        self.look_at_lease(host, &hostd, network);
    }

    /// Extends the one true log by what this host has applied.
    fn follow(&mut self, node: &SimNode, host: HostId) {
        while self.fold.head.seq < node.fold().head.seq {
            let read = node.events().read(self.fold.head.seq, READ_BATCHES, READ_BYTES).now_or_never();
            let batches = match read {
                Some(Ok(batches)) => batches,
                other => {
                    let what = format!("host {host} does not serve what follows {}: {other:?}", self.fold.head.seq);
                    return self.violate("E1", what);
                }
            };
            if batches.is_empty() {
                return self.violate("E1", format!("host {host} serves nothing after {}", self.fold.head.seq));
            }
            for stored in batches {
                let Ok(batch) = stored.sealed.open() else {
                    return self.violate("E1", format!("batch {} of host {host} does not decode", stored.seq));
                };
                let before = self.fold.state.clone();
                match self.fold.apply_sealed(&stored.sealed) {
                    Ok(Applied::Applied(seq)) if seq == stored.seq => {}
                    other => {
                        return self
                            .violate("E1", format!("batch {} of host {host} does not follow: {other:?}", stored.seq));
                    }
                }
                self.take(&batch, &before);
                if self.violation.is_some() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, batch: &Batch, before: &statemachine::state::State) {
        let seq = self.fold.head.seq;
        self.places.push(Place { hash: self.fold.head.hash, digest: self.fold.state.digest() });
        let mut found = invariants::check_step(before, &self.fold.state);
        found.extend(invariants::check(&self.fold.state));
        if let Some(broken) = found.into_iter().next() {
            self.violate(broken.invariant, format!("by batch {seq}: {}", broken.what));
        }
        if before.vm_names != self.fold.state.vm_names {
            self.names.extend(self.fold.state.vm_names.iter().map(|(name, _)| name.clone()));
        }
        if let Some(key) = &batch.idempotency {
            self.keys.insert(seq, key.key.clone());
        }
        if let Some(key) = self.unproven.remove(&seq) {
            self.proven(seq, &key);
        }
        let now_ms = self.now_ms;
        for (id, host) in self.fold.state.hosts.iter() {
            let lost = host.liveness == Liveness::Unreachable;
            let seen = self.seen.entry(*id).or_default();
            if !lost {
                seen.unreachable_since_ms = None;
            } else if seen.unreachable_since_ms.is_none() {
                seen.unreachable_since_ms = Some(now_ms);
                self.coverage.add(Met::HostsLost, 1);
            }
        }
        let removed = before.removed_hosts.iter().count() < self.fold.state.removed_hosts.iter().count();
        self.coverage.add(Met::HostsRemoved, u64::from(removed));
    }

    /// E2: equal seq, equal chain, equal digest.
    fn agrees(&mut self, host: HostId, fold: &Fold) {
        let Some(place) = self.places.get(fold.head.seq.0 as usize).copied() else { return };
        if place.hash != fold.head.hash {
            self.violate("E2", format!("host {host} has another batch {} than the log", fold.head.seq));
        } else if place.digest != fold.state.digest() {
            self.violate("E2", format!("host {host} has another state at {} than the log", fold.head.seq));
        }
    }

    fn look_at_lead(&mut self, host: &Host, node: &SimNode) {
        let Leadership::Leading { session, ready } = *node.leadership().borrow() else { return };
        let term = node.metrics().term;
        let Some(seen) = self.seen.get_mut(&host.id) else { return };
        if session != seen.session {
            let same_term = seen.session != 0 && seen.session_term == term;
            (seen.session, seen.session_term) = (session, term);
            self.coverage.add(if same_term { Met::RefusedProposals } else { Met::LeaderChanges }, 1);
        }
        if !ready {
            return;
        }
        // Standard Raft has one leader a term; and a life never inherits the lead of the one before it (hazard C2).
        let (id, life) = *self.led.entry(term).or_insert((host.id, host.lives));
        if (id, life) != (host.id, host.lives) {
            let what =
                format!("host {} in life {} leads term {term} that host {id} led in life {life}", host.id, host.lives);
            self.violate("C2", what);
        }
    }

    fn look_at_store(&mut self, host: HostId, node: &SimNode) {
        let metrics = node.metrics();
        let Some(seen) = self.seen.get_mut(&host) else { return };
        let installs = metrics.disk.snapshots_installed;
        let superseded = metrics.disk.batches_superseded;
        self.coverage.add(Met::SnapshotInstalls, installs.saturating_sub(seen.installs));
        self.coverage.add(Met::SupersededBatches, superseded.saturating_sub(seen.superseded));
        self.coverage.add(Met::Purges, u64::from(metrics.purged_index > seen.purged));
        (seen.installs, seen.superseded, seen.purged) = (installs, superseded, metrics.purged_index);
        if metrics.is_leader {
            let voters = node.status().voters;
            if voters != self.members {
                self.members = voters;
                self.coverage.add(Met::MembershipChanges, 1);
            }
        }
    }

    /// A lease ends one lease after the send of the heartbeat that it answers, by the host's own clock (DESIGN §5, *Grant*).
    fn look_at_lease(&mut self, host: &Host, hostd: &Hostd, network: &Network) {
        let Some(deadline) = hostd.lease.grant().borrow().as_ref().map(|grant| grant.deadline) else { return };
        let Some(seen) = self.seen.get_mut(&host.id) else { return };
        if deadline.as_ns() == seen.granted_deadline_ns {
            return;
        }
        seen.granted_deadline_ns = deadline.as_ns();
        let sent_ns = deadline.as_ns().saturating_sub(LEASE.as_nanos() as u64);
        // A leader's own heartbeats do not cross the network.
        let leads = matches!(*hostd.node.leadership().borrow(), Leadership::Leading { .. });
        if !leads && !network.heartbeat_left(host.id, sent_ns) {
            let what =
                format!("host {} holds a lease until {deadline} that no heartbeat of its own asked for", host.id);
            self.violate("R4", what);
        }
    }

    fn look_at_guests(&mut self, host: &Host) {
        let sights = std::mem::take(&mut host.hardware.machine().sights);
        for sight in sights {
            match sight {
                Sight::Launched { vm, epoch } => self.launched(host, vm, epoch),
                Sight::Lapsed { .. } => self.coverage.add(Met::LapsedLeases, 1),
                Sight::Resumed { .. } => self.coverage.add(Met::ResumedLeases, 1),
                Sight::Ended { .. } => {}
            }
        }
        if !host.runs() {
            return;
        }
        let now = host.hardware.now();
        let entering: Vec<_> = {
            let machine = host.hardware.machine();
            let entering = machine.vmms.iter().filter(|(_, vmm)| vmm.may_enter(now));
            entering.map(|(vm, vmm)| (*vm, vmm.epoch, vmm.release)).collect()
        };
        for (vm, epoch, release) in entering {
            self.may_run(host, vm, epoch, release);
        }
    }

    fn launched(&mut self, host: &Host, vm: VmId, epoch: Epoch) {
        self.coverage.add(Met::GuestStarts, 1);
        if !self.launched.insert((vm, epoch)) {
            self.violate("R1", format!("epoch {epoch} of vm {vm} was started twice, now on host {}", host.id));
        }
    }

    /// R1: nothing runs after its release. R4: what runs has an applied permit that names its host.
    fn may_run(&mut self, host: &Host, vm: VmId, epoch: Epoch, release: ReleaseClass) {
        let permit = self.fold.state.vms.get(&vm).and_then(|vm| vm.permit);
        let Some(permit) = permit.filter(|permit| permit.epoch == epoch) else {
            return self
                .violate("R1", format!("vm {vm} runs on host {} under epoch {epoch}, which was released", host.id));
        };
        if permit.host != host.id || permit.boot != host.hardware.boot {
            return self
                .violate("R4", format!("vm {vm} runs on host {} under a permit of host {}", host.id, permit.host));
        }
        let lost = self.seen.get(&host.id).and_then(|seen| seen.unreachable_since_ms);
        let (ReleaseClass::Lease, Some(since_ms)) = (release, lost) else { return };
        // The loss is decided after the last grant was given, so the lease is over one lease later, drift included.
        let lease_ms = LEASE.as_millis() as u64 * 1_000_000 / host.oscillator.rate_ppm;
        if self.now_ms > since_ms + lease_ms + RESOLUTION_MS {
            let lost_ms = self.now_ms - since_ms;
            let what =
                format!("vm {vm} runs on its lease on host {}, {lost_ms} ms after that was declared lost", host.id);
            self.violate("R4", what);
        }
    }

    fn one_runner(&mut self, hosts: &BTreeMap<HostId, Host>) {
        let mut runners: BTreeMap<VmId, HostId> = BTreeMap::new();
        for host in hosts.values().filter(|host| host.runs()) {
            let now = host.hardware.now();
            let running: Vec<VmId> = {
                let machine = host.hardware.machine();
                machine.vmms.iter().filter(|(_, vmm)| vmm.may_enter(now)).map(|(vm, _)| *vm).collect()
            };
            for vm in running {
                if let Some(other) = runners.insert(vm, host.id) {
                    self.violate("R1", format!("vm {vm} runs on hosts {other} and {}", host.id));
                }
            }
        }
    }

    /// A client was told that its command is in the log (D1, C13).
    pub fn acknowledged(&mut self, key: &str, seq: Seq) {
        self.coverage.add(Met::AcceptedCommands, 1);
        if seq <= self.fold.head.seq {
            self.proven(seq, key);
        } else if let Some(other) = self.unproven.insert(seq, key.to_owned())
            && other != key
        {
            self.violate("D1", format!("seq {seq} was given to {other} and to {key}"));
        }
    }

    fn proven(&mut self, seq: Seq, key: &str) {
        let found = self.keys.get(&seq);
        if found.is_none_or(|found| found != key) {
            self.violate("D1", format!("{key} was acknowledged as batch {seq}, which is {found:?}"));
        }
    }

    /// Was there ever a VM of this name in the log?
    pub fn knew(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub fn refused(&mut self, key: &str, why: &str) {
        self.violate("D1", format!("{key} was refused on grounds that never were: {why}"));
    }

    /// A linearizable read that began after these acknowledgements must see them.
    pub fn read(&mut self, host: HostId, seen: Seq, acknowledged: Seq) {
        if seen < acknowledged {
            self.violate("D1", format!("a read on host {host} saw {seen} after {acknowledged} was acknowledged"));
        }
    }

    /// A process that may end only for a broken disk, on a disk that is whole.
    pub fn ended(&mut self, host: HostId, why: &str) {
        self.violate("D1", format!("host {host} gave up: {why}"));
    }

    pub fn panicked(&mut self, words: &str) {
        self.violate("panic", words.to_owned());
    }

    pub fn never_came(&mut self, what: &str) {
        self.violate("L1", format!("in vain: {what}"));
    }

    /// A host that was removed before it ever ran stays away.
    pub fn admits(&self, host: HostId) -> bool {
        !self.fold.state.removed_hosts.contains(&host)
    }

    /// L1, and what can be judged only at the end. `None` while it does not hold yet.
    pub fn at_rest(&mut self, hosts: &BTreeMap<HostId, Host>) -> Result<(), String> {
        let mut folds = Vec::new();
        for host in hosts.values() {
            let Some(hostd) = host.hostd() else { return Err(format!("host {} has not started", host.id)) };
            folds.push((host.id, hostd.node.fold()));
        }
        let leads =
            |host: &Host| host.hostd().is_some_and(|it| it.node.leadership().borrow().ready_session().is_some());
        if hosts.values().filter(|host| leads(host)).count() != 1 {
            return Err("no single leader".to_owned());
        }
        for (id, fold) in &folds {
            if fold.head != self.fold.head {
                return Err(format!("host {id} is at {}, the log at {}", fold.head.seq, self.fold.head.seq));
            }
        }
        if let Some((seq, key)) = self.unproven.first_key_value() {
            return Err(format!("{key}, acknowledged as batch {seq}, is not in the log"));
        }
        self.observed_is_desired(hosts)
    }

    fn can_be_placed(&self, vm: VmId) -> bool {
        let Some((host, _)) = self.fold.state.hosts.iter().next() else { return false };
        let command = Command::VmPlace { vm };
        let request = Request { actor: Actor::Duty(*host), origin: *host, idempotency: None, command };
        !matches!(self.fold.decide(&request, self.fold.stamp.wall_ms), Decision::Rejected(_))
    }

    fn observed_is_desired(&self, hosts: &BTreeMap<HostId, Host>) -> Result<(), String> {
        for (id, host) in self.fold.state.hosts.iter() {
            if host.liveness != Liveness::Alive {
                return Err(format!("host {id} is {:?}", host.liveness));
            }
        }
        let mut running = BTreeMap::new();
        for host in hosts.values() {
            let machine = host.hardware.machine();
            running.extend(machine.vmms.iter().map(|(vm, vmm)| (*vm, vmm.may_enter(host.hardware.now()))));
        }
        for (id, vm) in self.fold.state.vms.iter() {
            let wanted = vm.desired == statemachine::state::Desired::Running;
            match (wanted, running.get(id)) {
                (true, Some(true)) | (false, None) => {}
                // Nowhere is room for it, as the decider would say again.
                (true, None) if vm.permit.is_none() && !self.can_be_placed(*id) => {}
                (true, state) => return Err(format!("vm {} should run, and is {state:?}", vm.name)),
                (false, Some(_)) => return Err(format!("vm {} should not run, and does", vm.name)),
            }
        }
        Ok(())
    }
}
