//! What must be so when the faults have ended (L1).

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use futures::FutureExt;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Decision;
use statemachine::ids::VmId;
use statemachine::state::Liveness;

use super::Checker;
use super::log::READ_BATCHES;
use super::log::READ_BYTES;
use crate::sim::coverage::Met;
use crate::sim::hardware::Vmm;
use crate::sim::hardware::VmmState;
use crate::sim::host::Host;
use crate::sim::host::SimNode;

impl Checker {
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
        self.observed_is_desired(hosts)?;
        hosts
            .values()
            .filter_map(|host| Some((host.id, host.hostd()?)))
            .for_each(|(id, it)| self.serves_all(id, &it.node));
        Ok(())
    }

    /// E1: whatever a host was away for, purged or not, its stream from the oldest event to the head is the log, byte for byte.
    fn serves_all(&mut self, host: HostId, node: &SimNode) {
        let trimmed_upto = self.fold.state.site.as_ref().map_or(Seq(0), |site| site.trimmed_upto);
        let mut after = Seq(node.events().oldest().0.saturating_sub(1));
        if after > trimmed_upto {
            return self
                .violate("E1", format!("host {host} serves nothing up to {after}, and {trimmed_upto} is trimmed"));
        }
        self.coverage.add(Met::TrimmedStreams, u64::from(after > Seq(0)));
        while after < self.fold.head.seq {
            let read = node.events().read(after, READ_BATCHES, READ_BYTES).now_or_never();
            let Some(Ok(batches)) = read else {
                return self.violate("E1", format!("host {host} does not serve what follows {after}: {read:?}"));
            };
            if batches.is_empty() {
                return self.violate("E1", format!("host {host} serves nothing after {after}"));
            }
            for stored in batches {
                let place = self.places.get(stored.seq.0 as usize);
                if stored.seq != after.next() || place.is_none_or(|place| place.hash != stored.sealed.hash()) {
                    return self.violate("E1", format!("host {host} serves another batch {} than the log", stored.seq));
                }
                after = stored.seq;
            }
        }
    }

    fn can_be_placed(&self, vm: VmId) -> bool {
        let Some((host, _)) = self.fold.state.hosts.iter().next() else { return false };
        let command = Command::VmPlace { vm };
        let request = Request { actor: Actor::Duty(*host), origin: *host, idempotency: None, command };
        !matches!(self.fold.decide(&request, self.fold.stamp.wall_ms), Decision::Rejected(_))
    }

    /// Each guest that sleeps on this host has its file, and nothing else is kept.
    fn files_are_sleepers(&self, host: &Host) -> Result<(), String> {
        let sleepers = self.fold.state.suspensions.iter().filter(|(_, it)| it.host == host.id && it.asleep().is_some());
        let sleepers: BTreeSet<_> = sleepers.map(|(vm, it)| (*vm, it.id)).collect();
        let files = host.hardware.machine().asleep.clone();
        match sleepers == files {
            true => Ok(()),
            false => Err(format!("on host {} sleep {sleepers:?}, and there are files of {files:?}", host.id)),
        }
    }

    fn observed_is_desired(&self, hosts: &BTreeMap<HostId, Host>) -> Result<(), String> {
        for (id, host) in self.fold.state.hosts.iter() {
            if host.liveness != Liveness::Alive {
                return Err(format!("host {id} is {:?}", host.liveness));
            }
        }
        let mut running = BTreeMap::new();
        for host in hosts.values() {
            self.files_are_sleepers(host)?;
            let machine = host.hardware.machine();
            let moves = |vmm: &Vmm| vmm.stands_for.is_some() || matches!(vmm.state, VmmState::Incoming { .. });
            if let Some((vm, _)) = machine.vmms.iter().find(|(_, vmm)| moves(vmm)) {
                return Err(format!("vm {vm} is still on its way, and part of it on host {}", host.id));
            }
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
