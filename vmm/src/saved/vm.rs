//! What KVM keeps of a guest beside its processors: interrupt controllers, timer chip, clock.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use crate::machine::kvm::{KvmError, refused};

/// Two PICs and the I/O APIC, by KVM's numbers.
const CHIPS: u32 = 3;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedIrqchip {
    chips: [Blob<kvm_irqchip>; CHIPS as usize],
}

impl SavedIrqchip {
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let mut chips = [Blob(kvm_irqchip::default()); CHIPS as usize];
        for (chip_id, chip) in (0..CHIPS).zip(&mut chips) {
            chip.0.chip_id = chip_id;
            vm.get_irqchip(&mut chip.0).map_err(refused("read an interrupt controller"))?;
        }
        Ok(Self { chips })
    }

    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for (chip_id, chip) in (0..CHIPS).zip(&self.chips) {
            let chip = kvm_irqchip { chip_id, ..chip.0 };
            vm.set_irqchip(&chip).map_err(refused("set an interrupt controller"))?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPit {
    state: Blob<kvm_pit_state2>,
}

impl SavedPit {
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let state = vm.get_pit2().map_err(refused("read the timer chip"))?;
        Ok(Self { state: Blob(state) })
    }

    /// KVM starts the counts anew: the moment that they began at is one of the other host's clock.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.set_pit2(&self.state.0).map_err(refused("set the timer chip"))
    }
}

/// kvmclock: nanoseconds since the guest began.
///
/// The guest's wall clock is right after a restore, because its clock goes forward by the time that has passed (rule 19 of reference
/// peers-vmm §4.2: a choice). Its monotonic clock is the same clock: it goes forward with it, as over a suspend, and never back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedClock {
    guest_ns: u64,
    /// The real time at the same moment, nanoseconds since 1970.
    real_ns: u64,
}

impl SavedClock {
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let clock = vm.get_clock().map_err(refused("read the guest's clock"))?;
        // KVM tells both of one moment where the host's TSC is stable; else they are apart by the time of a system call.
        let real_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 { clock.realtime } else { real_time_ns() };
        Ok(Self { guest_ns: clock.clock, real_ns })
    }

    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let flags = vm.check_extension_int(Cap::AdjustClock) as u32;
        let clock = self.to_kvm(flags & KVM_CLOCK_REALTIME != 0, real_time_ns());
        vm.set_clock(&clock).map_err(refused("set the guest's clock"))
    }

    /// KVM adds the time that has passed, if it can; Linux before 5.16 cannot.
    fn to_kvm(self, kvm_adds: bool, now_ns: u64) -> kvm_clock_data {
        let Self { guest_ns, real_ns } = self;
        if kvm_adds {
            return kvm_clock_data {
                clock: guest_ns,
                flags: KVM_CLOCK_REALTIME,
                realtime: real_ns,
                ..Default::default()
            };
        }
        kvm_clock_data { clock: guest_ns.saturating_add(now_ns.saturating_sub(real_ns)), ..Default::default() }
    }
}

fn real_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::kvm::{KvmVm, open};
    use crate::machine::layout::Layout;
    use crate::memory::{GuestMemory, allocate};

    fn vm(kvm: &kvm_ioctls::Kvm) -> (std::sync::Arc<KvmVm>, GuestMemory) {
        let memory = allocate(&Layout::new(16 << 20, 16 << 20), None).unwrap();
        (KvmVm::new(kvm, &memory).unwrap(), memory)
    }

    fn over_the_wire<T: Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
        serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
    }

    #[test]
    fn chips_and_clock_come_back_in_another_machine() {
        let kvm = match open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let ((old, _old_memory), (new, _new_memory)) = (vm(&kvm), vm(&kvm));
        // The I/O APIC with a line that is routed and held, the PIC with a mask, the timer with a count.
        let mut chip = kvm_irqchip { chip_id: 2, ..Default::default() };
        old.fd().get_irqchip(&mut chip).unwrap();
        // SAFETY: chip 2 is the I/O APIC.
        let ioapic = unsafe { &mut chip.chip.ioapic };
        ioapic.redirtbl[9].bits = 0x8050;
        old.fd().set_irqchip(&chip).unwrap();
        let mut chip = kvm_irqchip { chip_id: 1, ..Default::default() };
        old.fd().get_irqchip(&mut chip).unwrap();
        // SAFETY: chip 1 is a PIC.
        unsafe { &mut chip.chip.pic }.imr = 0xa5;
        old.fd().set_irqchip(&chip).unwrap();
        let mut pit = old.fd().get_pit2().unwrap();
        (pit.channels[2].count, pit.channels[2].mode) = (1193, 3);
        old.fd().set_pit2(&pit).unwrap();

        let chips = SavedIrqchip::save(old.fd()).unwrap();
        over_the_wire(&chips).restore(new.fd()).unwrap();
        assert_eq!(SavedIrqchip::save(new.fd()).unwrap(), chips);
        // SAFETY: as above.
        assert_eq!(unsafe { chips.chips[2].0.chip.ioapic.redirtbl[9].bits }, 0x8050);

        let timer = SavedPit::save(old.fd()).unwrap();
        over_the_wire(&timer).restore(new.fd()).unwrap();
        let restored = new.fd().get_pit2().unwrap().channels[2];
        assert_eq!((restored.count, restored.mode), (1193, 3));

        let before = SavedClock { guest_ns: 5_000_000_000_000, real_ns: real_time_ns() };
        over_the_wire(&before).restore(new.fd()).unwrap();
        let after = SavedClock::save(new.fd()).unwrap();
        assert!(after.guest_ns >= before.guest_ns, "{after:?}");
        let passed = after.real_ns - before.real_ns;
        assert!(after.guest_ns - before.guest_ns <= passed + 1_000_000_000, "{after:?}");
    }

    #[test]
    fn time_passes_while_a_guest_is_saved_and_never_goes_back() {
        let saved = SavedClock { guest_ns: 5, real_ns: 100 };
        let kvm = saved.to_kvm(true, 130);
        assert_eq!((kvm.clock, kvm.flags, kvm.realtime), (5, KVM_CLOCK_REALTIME, 100));
        let own = saved.to_kvm(false, 130);
        assert_eq!((own.clock, own.flags), (35, 0));
        assert_eq!(saved.to_kvm(false, 90).clock, 5, "this host's clock is behind");
    }
}
