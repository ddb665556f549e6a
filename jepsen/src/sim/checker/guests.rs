//! Guests as an observer outside sees them.

use statemachine::HostId;
use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::state::ReleaseClass;
use std::collections::BTreeMap;

use super::Checker;
use crate::sim::coverage::Met;
use crate::sim::hardware::Sight;
use crate::sim::host::Host;
use crate::sim::host::LEASE;

/// One step of the simulation, and the resolution of tokio's timers.
const RESOLUTION_MS: u64 = 4;

impl Checker {
    /// `runners` are the guests that were seen to run on hosts that were looked at before this one.
    pub(super) fn look_at_guests(&mut self, host: &Host, runners: &mut BTreeMap<VmId, HostId>) {
        let sights = std::mem::take(&mut host.hardware.machine().sights);
        for sight in sights {
            match sight {
                Sight::Launched { vm, epoch } => self.launched(host, vm, epoch),
                Sight::Arrived { vm, epoch } => {
                    self.coverage.add(Met::Migrations, 1);
                    self.launched(host, vm, epoch);
                }
                Sight::Woke { vm, epoch, suspension } => {
                    self.coverage.add(Met::Wakings, 1);
                    self.launched(host, vm, epoch);
                    if !self.woken.insert((vm, suspension)) {
                        self.violate("R1", format!("vm {vm} woke up twice from the file of suspension {suspension}"));
                    }
                }
                Sight::WentOn { .. } => self.coverage.add(Met::MigrationsUndone, 1),
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
            if let Some(other) = runners.insert(vm, host.id) {
                self.violate("R1", format!("vm {vm} runs on hosts {other} and {}", host.id));
            }
            self.may_run(host, vm, epoch, release);
        }
    }

    fn launched(&mut self, host: &Host, vm: VmId, epoch: Epoch) {
        self.coverage.add(Met::GuestStarts, 1);
        if !self.launched.insert((vm, epoch)) {
            self.violate("R1", format!("epoch {epoch} of vm {vm} was started twice, now on host {}", host.id));
        }
        if !self.granted.contains(&(host.id, epoch)) {
            let what = format!("vm {vm} was started on host {} under epoch {epoch}, which no grant named", host.id);
            self.violate("R4", what);
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
}
