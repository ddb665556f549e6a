//! What survives a hostd: the machine's clock and disk, and the processes of its guests. A power cut takes the processes and
//! what was not synced; a SIGKILL of hostd takes neither; a stopped machine runs nothing while its clocks go on.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use consensus::platform::Clock;
use consensus::store::memory_disk::MemoryDisk;
use hostd::agent::plan::Ended;
use hostd::lease::clock::Boottime;
use statemachine::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::ReleaseClass;
use tokio::sync::oneshot;

use super::clock::HostClock;

/// A vmm stand-in: the part of a vmm that DESIGN §5 speaks of, its deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmm {
    pub epoch: Epoch,
    pub release: ReleaseClass,
    pub deadline: Boottime,
    pub state: VmmState,
    /// True time at which it will have obeyed the power button.
    pub off_at_ms: Option<u64>,
    /// The migration or suspension for which it stands still.
    pub stands_for: Option<MigrationId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmState {
    Running,
    /// Quiesced at its deadline.
    Lapsed,
    /// It takes in a guest; its epoch is the number of the migration until it runs.
    Incoming {
        loaded: bool,
    },
}

impl Vmm {
    /// Would the next KVM_RUN enter the guest? The check before each entry (DESIGN §5, *Self-fence*).
    pub fn may_enter(&self, now: Boottime) -> bool {
        self.state == VmmState::Running
            && self.stands_for.is_none()
            && (self.release != ReleaseClass::Lease || now < self.deadline)
    }

    pub fn status(&self) -> GuestStatus {
        match self.state {
            VmmState::Running if self.off_at_ms.is_some() => GuestStatus::PoweringDown,
            VmmState::Running => GuestStatus::Up,
            VmmState::Lapsed => GuestStatus::PausedLease,
            VmmState::Incoming { .. } => GuestStatus::PoweringUp,
        }
    }
}

/// A vmm that was asked for and has not started yet. It starts whether hostd lives to see it or not.
pub struct Launch {
    pub at_ms: u64,
    pub vm: VmId,
    pub vmm: Vmm,
    pub launched: oneshot::Sender<bool>,
}

/// How a guest's process ends without hostd's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnEnd {
    /// The guest powers itself off; its vmm writes the exit report.
    PowersOff,
    /// Its vmm is killed; its configuration tells which epoch it was.
    Killed,
    /// The same, and somebody clears `/run` of it: its mark alone is left.
    Traceless,
}

/// What the observer outside sees of guests; the checker takes it after each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    Launched {
        vm: VmId,
        epoch: Epoch,
    },
    /// From another host, by a migration.
    Arrived {
        vm: VmId,
        epoch: Epoch,
    },
    /// From the file of this suspension.
    Woke {
        vm: VmId,
        epoch: Epoch,
        suspension: MigrationId,
    },
    /// It stood still for a migration that came to nothing.
    WentOn {
        vm: VmId,
    },
    Lapsed {
        vm: VmId,
        epoch: Epoch,
    },
    Resumed {
        vm: VmId,
        epoch: Epoch,
    },
    Ended {
        vm: VmId,
        epoch: Epoch,
    },
}

#[derive(Default)]
pub struct Machine {
    pub vmms: BTreeMap<VmId, Vmm>,
    pub launches: Vec<Launch>,
    /// Used epochs, on a disk that survives.
    pub marks: BTreeSet<(VmId, Epoch)>,
    /// Files of guests that sleep, on the same disk.
    pub asleep: BTreeSet<(VmId, MigrationId)>,
    /// Exit reports and configurations, in `/run`: gone after a reboot.
    pub remains: BTreeMap<VmId, (Epoch, ReleaseClass, Ended)>,
    pub sights: Vec<Sight>,
    pub now_ms: u64,
}

#[derive(Clone)]
pub struct Hardware {
    pub clock: Arc<HostClock>,
    pub disk: MemoryDisk,
    pub boot: BootId,
    machine: Arc<Mutex<Machine>>,
}

impl Hardware {
    pub fn new(boot: BootId) -> Hardware {
        let (clock, disk) = (Arc::default(), MemoryDisk::new());
        Hardware { clock, disk, boot, machine: Arc::default() }
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn now(&self) -> Boottime {
        Boottime::from_ns(self.clock.boottime_ns())
    }

    /// The power goes and comes back: no process is left, and a part of what was not synced.
    pub fn power_cut(&mut self, seed: u64, next_boot: BootId) -> u64 {
        let lost = self.disk.power_cut(seed);
        self.boot = next_boot;
        let mut machine = self.machine();
        machine.vmms.clear();
        machine.launches.clear();
        machine.remains.clear();
        lost
    }

    /// Lets the machine's processes run up to now.
    pub fn run(&self, now_ms: u64) {
        let now = self.now();
        let mut machine = self.machine();
        machine.now_ms = now_ms;
        machine.launch_due();
        machine.run_guests(now);
    }
}

impl Machine {
    fn launch_due(&mut self) {
        let now_ms = self.now_ms;
        for launch in self.launches.extract_if(.., |launch| launch.at_ms <= now_ms).collect::<Vec<_>>() {
            let Launch { vm, vmm, launched, .. } = launch;
            // The lock that a vmm holds for life (hazard H20), then the mark, before the first instruction.
            let taken = self.vmms.contains_key(&vm);
            let incoming = matches!(vmm.state, VmmState::Incoming { .. });
            let starts = !taken && (incoming || self.marks.insert((vm, vmm.epoch)));
            if starts {
                if !incoming {
                    self.sights.push(Sight::Launched { vm, epoch: vmm.epoch });
                }
                self.vmms.insert(vm, vmm);
            }
            let _ = launched.send(starts);
        }
    }

    fn run_guests(&mut self, now: Boottime) {
        let mut off = Vec::new();
        for (vm, vmm) in &mut self.vmms {
            if vmm.state == VmmState::Running && vmm.stands_for.is_none() && !vmm.may_enter(now) {
                vmm.state = VmmState::Lapsed;
                self.sights.push(Sight::Lapsed { vm: *vm, epoch: vmm.epoch });
            }
            if vmm.state == VmmState::Running
                && vmm.stands_for.is_none()
                && vmm.off_at_ms.is_some_and(|at| at <= self.now_ms)
            {
                off.push(*vm);
            }
        }
        for vm in off {
            self.end(vm, ExitReason::GuestPoweredOff, "the guest powered off");
        }
    }

    /// hostd runs what was taken in, under the permit that the migration ended with. The mark comes before the first instruction.
    pub fn run_incoming(&mut self, vm: VmId, migration: Epoch, epoch: Epoch, deadline: Boottime) {
        let Some(vmm) = self.vmms.get_mut(&vm).filter(|vmm| vmm.epoch == migration) else { return };
        if vmm.state == (VmmState::Incoming { loaded: true }) && self.marks.insert((vm, epoch)) {
            (vmm.epoch, vmm.deadline, vmm.state) = (epoch, deadline, VmmState::Running);
            let suspension = MigrationId(migration.0);
            self.sights.push(match self.asleep.contains(&(vm, suspension)) {
                true => Sight::Woke { vm, epoch, suspension },
                false => Sight::Arrived { vm, epoch },
            });
        }
    }

    /// The guest stood still for a migration that came to nothing.
    pub fn go_on(&mut self, vm: VmId, migration: MigrationId) {
        if let Some(vmm) = self.vmms.get_mut(&vm).filter(|vmm| vmm.stands_for == Some(migration)) {
            vmm.stands_for = None;
            self.sights.push(Sight::WentOn { vm });
        }
    }

    /// hostd confirms an epoch up to a deadline of its own boot.
    pub fn confirm(&mut self, vm: VmId, epoch: Epoch, deadline: Boottime, now: Boottime) {
        let Some(vmm) = self.vmms.get_mut(&vm).filter(|vmm| vmm.epoch == epoch) else { return };
        vmm.deadline = vmm.deadline.max(deadline);
        if vmm.state == VmmState::Lapsed && now < vmm.deadline {
            vmm.state = VmmState::Running;
            self.sights.push(Sight::Resumed { vm, epoch });
        }
    }

    /// Every second guest's process ends, as the number says.
    pub fn guests_end(&mut self, how: OwnEnd, number: u64) {
        let due: Vec<VmId> = self.vmms.keys().copied().filter(|vm| (vm.0.as_u128() as u64 ^ number) & 1 == 0).collect();
        for vm in due {
            match how {
                OwnEnd::PowersOff => self.end(vm, ExitReason::GuestPoweredOff, "the guest powered off"),
                OwnEnd::Killed => self.end(vm, ExitReason::Lost, "its process is gone"),
                OwnEnd::Traceless => {
                    self.end(vm, ExitReason::Lost, "its process is gone");
                    self.remains.remove(&vm);
                }
            }
        }
    }

    pub fn end(&mut self, vm: VmId, reason: ExitReason, detail: &str) {
        let Some(vmm) = self.vmms.remove(&vm) else { return };
        let ended = Ended { reason, detail: detail.to_owned() };
        if matches!(vmm.state, VmmState::Incoming { .. }) {
            return;
        }
        self.sights.push(Sight::Ended { vm, epoch: vmm.epoch });
        self.remains.insert(vm, (vmm.epoch, vmm.release, ended));
    }
}
