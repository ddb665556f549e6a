//! One processor as KVM has it.
//!
//! Read when all vCPUs stand and all devices are quiet, on the thread that runs the vCPU, after KVM has finished the last access that it
//! left the guest for. The orders are those of reference peers-vmm §4.2: MP_STATE is read first, because reading it may change the local
//! APIC, and events last (rule 13); what depends on something is written after it (rule 14).

use std::collections::BTreeMap;

use kvm_bindings::{
    CpuId, KVM_CAP_SREGS2, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_control::CpuModel;
use zerocopy::{FromBytes, IntoBytes};

use super::blob::Blob;
use super::processor::{self, Leaves, ProcessorError};
use crate::cpu::msr::{self, MsrError};
use crate::cpu::sregs::{self, Pdptrs};
use crate::machine::kvm::{KvmError, refused};

/// The size of `kvm_xsave` before processors had more to save.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();
/// More than any processor has: with AMX it is below 12 KiB.
const MAX_XSAVE_BYTES: usize = 64 << 10;

const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// Bits 18:17 of the local APIC's timer register: the mode. 2 is TSC deadline.
const LAPIC_TIMER: usize = 0x320;
const TIMER_MODE_SHIFT: u32 = 17;
const TIMER_MODE_MASK: u32 = 0b11;
const TIMER_TSC_DEADLINE: u32 = 0b10;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    #[error("vCPU {index}")]
    Kvm {
        index: u32,
        #[source]
        source: KvmError,
    },
    #[error("vCPU {index}")]
    Msr {
        index: u32,
        #[source]
        source: MsrError,
    },
    #[error("vCPU {index}")]
    Processor {
        index: u32,
        #[source]
        source: ProcessorError,
    },
    #[error("vCPU {index} runs guests of its own, whose state cannot be saved; end them first")]
    Nested { index: u32 },
    #[error("vCPU {index}: KVM refused to move the page directory pointers of PAE")]
    Pdptrs {
        index: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("vCPU {index}: its extended state has {found} bytes, here it has {here}")]
    ExtendedState { index: u32, found: usize, here: usize },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVcpu {
    /// As the vCPU was given it: KVM shows what the guest's settings make of it, which it would take for a change.
    cpuid: Leaves,
    mp_state: Blob<kvm_mp_state>,
    regs: Blob<kvm_regs>,
    sregs: Blob<kvm_sregs>,
    /// Only where the guest uses PAE and KVM tells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pdptrs: Option<Pdptrs>,
    /// As many bytes as the processor saves.
    #[serde(with = "bytes")]
    xsave: Vec<u8>,
    xcrs: Blob<kvm_xcrs>,
    debug_registers: Blob<kvm_debugregs>,
    local_apic: Blob<kvm_lapic_state>,
    tsc_khz: u32,
    /// By index.
    msrs: BTreeMap<u32, u64>,
    events: Blob<kvm_vcpu_events>,
}

mod bytes {
    //! Bytes in base64.
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(D::Error::custom)
    }
}

/// What a host's KVM has of this, asked once for all vCPUs.
#[derive(Debug, Clone)]
pub struct VcpuAbilities {
    xsave_bytes: usize,
    msrs: Vec<u32>,
    tells_pdptrs: bool,
    pub scales_tsc: bool,
}

impl VcpuAbilities {
    /// For guests of this model.
    pub fn of(kvm: &Kvm, vm: &VmFd, model: CpuModel) -> Result<Self, KvmError> {
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            xsave_bytes: bytes.clamp(XSAVE_BYTES, MAX_XSAVE_BYTES),
            msrs: msr::to_save(kvm, model)?,
            tells_pdptrs: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            scales_tsc: scales_tsc(kvm),
        })
    }
}

/// Whether KVM can have a guest's time stamp counter count at another rate than the host's.
pub fn scales_tsc(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::TscControl)
}

/// Reads a vCPU. `given` is the CPUID that it was made with.
pub fn save(index: u32, vcpu: &VcpuFd, given: &CpuId, able: &VcpuAbilities) -> Result<SavedVcpu, VcpuStateError> {
    let kvm = |source| VcpuStateError::Kvm { index, source };
    let mp_state = vcpu.get_mp_state().map_err(refused("read whether a vCPU runs")).map_err(kvm)?;
    let regs = vcpu.get_regs().map_err(refused("read registers")).map_err(kvm)?;
    let control = vcpu.get_sregs().map_err(refused("read the control registers")).map_err(kvm)?;
    if control.cr4 & CR4_VMXE != 0 || control.efer & EFER_SVME != 0 {
        return Err(VcpuStateError::Nested { index });
    }
    let pdptrs = if able.tells_pdptrs {
        sregs::pdptrs(vcpu).map_err(|source| VcpuStateError::Pdptrs { index, source })?
    } else {
        None
    };
    let xsave = read_xsave(vcpu, able.xsave_bytes).map_err(kvm)?;
    let xcrs = vcpu.get_xcrs().map_err(refused("read the extended control registers")).map_err(kvm)?;
    let debug_registers = vcpu.get_debug_regs().map_err(refused("read the debug registers")).map_err(kvm)?;
    let local_apic = vcpu.get_lapic().map_err(refused("read the local interrupt controller")).map_err(kvm)?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(refused("read the frequency of the TSC")).map_err(kvm)?;
    let mut msrs = msr::read(vcpu, &able.msrs).map_err(|source| VcpuStateError::Msr { index, source })?;
    rearm_timer(&local_apic, &mut msrs);
    let events = vcpu.get_vcpu_events().map_err(refused("read pending events")).map_err(kvm)?;
    Ok(SavedVcpu {
        cpuid: Leaves::from(given),
        mp_state: Blob(mp_state),
        regs: Blob(regs),
        sregs: Blob(control),
        pdptrs,
        xsave,
        xcrs: Blob(xcrs),
        debug_registers: Blob(debug_registers),
        local_apic: Blob(local_apic),
        tsc_khz,
        msrs,
        events: Blob(events),
    })
}

/// A deadline of 0 is a timer that fired or was never set. The two look alike, and a timer that fired without its interrupt being
/// delivered would be lost; one interrupt too many does no harm (rule 15).
fn rearm_timer(local_apic: &kvm_lapic_state, msrs: &mut BTreeMap<u32, u64>) {
    let mut timer = [0; 4];
    for (to, from) in timer.iter_mut().zip(&local_apic.regs[LAPIC_TIMER..]) {
        *to = *from as u8;
    }
    let mode = u32::from_le_bytes(timer) >> TIMER_MODE_SHIFT & TIMER_MODE_MASK;
    let now = msrs.get(&MSR_TSC).copied();
    if let (TIMER_TSC_DEADLINE, Some(now), Some(deadline @ 0)) = (mode, now, msrs.get_mut(&MSR_TSC_DEADLINE)) {
        *deadline = now;
    }
}

fn read_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, KvmError> {
    if bytes <= XSAVE_BYTES {
        let xsave = vcpu.get_xsave().map_err(refused("read the extended state"))?;
        return Ok(xsave.as_bytes().to_vec());
    }
    let words = (bytes - XSAVE_BYTES).div_ceil(4);
    let mut xsave = Xsave::new(words).map_err(|_| KvmError::Missing("room for the extended state"))?;
    // SAFETY: the buffer has the number of bytes that KVM asked for.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(refused("read the extended state"))?;
    let header = xsave.as_fam_struct_ref();
    let mut all = header.xsave.as_bytes().to_vec();
    all.extend(xsave.as_slice().iter().flat_map(|word| word.to_ne_bytes()));
    Ok(all)
}

/// The extended state in as many bytes as the processor here saves. Parts that the guest has lie at the same place (`processor::check`);
/// what is longer on one of the hosts belongs to parts that it has not, and is zero. `None` where it is not.
fn fit_xsave(saved: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let is_state = (XSAVE_BYTES..=MAX_XSAVE_BYTES).contains(&saved.len());
    let nothing_lost = saved.iter().skip(bytes).all(|byte| *byte == 0);
    (is_state && nothing_lost).then(|| {
        let mut fitting = saved.to_vec();
        fitting.resize(bytes, 0);
        fitting
    })
}

fn write_xsave(vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), KvmError> {
    let region = <[u8; XSAVE_BYTES]>::try_from(&bytes[..XSAVE_BYTES]);
    let Some(region) = region.ok().and_then(|region| kvm_xsave::read_from_bytes(&region).ok()) else {
        return Err(KvmError::Missing("room for the extended state"));
    };
    if bytes.len() == XSAVE_BYTES {
        // SAFETY: KVM reads as much as `check` has compared with what it asks for.
        return unsafe { vcpu.set_xsave(&region) }.map_err(refused("set the extended state"));
    }
    let words: Vec<u32> = bytes[XSAVE_BYTES..]
        .chunks(4)
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_ne_bytes(word)
        })
        .collect();
    let mut xsave = Xsave::from_entries(&words).map_err(|_| KvmError::Missing("room for the extended state"))?;
    // SAFETY: the length of the array, the only field that must stay, is not in `xsave`.
    unsafe { xsave.as_mut_fam_struct() }.xsave = region;
    // SAFETY: as above.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(refused("set the extended state"))
}

impl SavedVcpu {
    /// The CPUID that the vCPU was given and gets again.
    pub fn cpuid(&self, index: u32) -> Result<CpuId, VcpuStateError> {
        let count = self.cpuid.0.len();
        let too_many = ProcessorError::TooManyLeaves { count };
        self.cpuid.to_kvm().ok_or(VcpuStateError::Processor { index, source: too_many })
    }

    /// Puts the state into a vCPU that has not run. `supported` is what this host's KVM offers.
    pub fn restore(
        &self,
        index: u32,
        vcpu: &VcpuFd,
        supported: &Leaves,
        able: &VcpuAbilities,
    ) -> Result<(), VcpuStateError> {
        let kvm = |source| VcpuStateError::Kvm { index, source };
        processor::check(&self.cpuid, supported).map_err(|source| VcpuStateError::Processor { index, source })?;
        let misfit = VcpuStateError::ExtendedState { index, found: self.xsave.len(), here: able.xsave_bytes };
        let xsave = fit_xsave(&self.xsave, able.xsave_bytes).ok_or(misfit)?;
        vcpu.set_cpuid2(&self.cpuid(index)?).map_err(refused("set CPUID")).map_err(kvm)?;
        if able.scales_tsc {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(refused("set the frequency of the TSC")).map_err(kvm)?;
        }
        vcpu.set_mp_state(self.mp_state.0).map_err(refused("set whether a vCPU runs")).map_err(kvm)?;
        vcpu.set_regs(&self.regs.0).map_err(refused("set registers")).map_err(kvm)?;
        match self.pdptrs.filter(|_| able.tells_pdptrs) {
            Some(pdptrs) => sregs::set_with_pdptrs(vcpu, &self.sregs.0, pdptrs)
                .map_err(|source| VcpuStateError::Pdptrs { index, source })?,
            None => vcpu.set_sregs(&self.sregs.0).map_err(refused("set the control registers")).map_err(kvm)?,
        }
        write_xsave(vcpu, &xsave).map_err(kvm)?;
        vcpu.set_xcrs(&self.xcrs.0).map_err(refused("set the extended control registers")).map_err(kvm)?;
        vcpu.set_debug_regs(&self.debug_registers.0).map_err(refused("set the debug registers")).map_err(kvm)?;
        vcpu.set_lapic(&self.local_apic.0).map_err(refused("set the local interrupt controller")).map_err(kvm)?;
        msr::write(vcpu, &self.entries()).map_err(|source| VcpuStateError::Msr { index, source })?;
        vcpu.set_vcpu_events(&self.events.0).map_err(refused("set pending events")).map_err(kvm)?;
        Ok(())
    }

    /// The deadline counts in the guest's TSC, so it comes after it.
    fn entries(&self) -> Vec<kvm_msr_entry> {
        let entry = |(index, data): (&u32, &u64)| kvm_msr_entry { index: *index, data: *data, ..Default::default() };
        let (last, first): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|(index, _)| **index == MSR_TSC_DEADLINE);
        first.into_iter().chain(last).map(entry).collect()
    }

    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;
    use serde_json::{Value, json};
    use vmm_control::{CpuConfig, CpuModel};

    use super::*;
    use crate::cpu::cpuid;
    use crate::machine::kvm::{KvmVm, open};
    use crate::machine::layout::Layout;
    use crate::memory::{GuestMemory, allocate};

    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;

    /// A vCPU that has not run. Fields are dropped in this order.
    struct One {
        vcpu: VcpuFd,
        given: CpuId,
        supported: Leaves,
        able: VcpuAbilities,
        _vm: std::sync::Arc<KvmVm>,
        _memory: GuestMemory,
    }

    fn one(kvm: &Kvm) -> One {
        let memory = allocate(&Layout::new(16 << 20, 16 << 20), None).unwrap();
        let vm = KvmVm::new(kvm, &memory).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let supported = cpuid::supported(kvm).unwrap();
        let given = cpuid::for_vcpu(&supported, CpuConfig::of(CpuModel::Host, 1), 0).to_kvm().unwrap();
        vcpu.set_cpuid2(&given).unwrap();
        msr::set_boot_msrs(&vcpu).unwrap();
        let able = VcpuAbilities::of(kvm, vm.fd(), CpuModel::Host).unwrap();
        One { vcpu, given, supported, able, _vm: vm, _memory: memory }
    }

    /// Two machines, or a word on why there are none.
    fn two() -> Option<(One, One)> {
        let kvm = open().inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        Some((one(&kvm), one(&kvm)))
    }

    impl One {
        fn save(&self) -> SavedVcpu {
            save(0, &self.vcpu, &self.given, &self.able).unwrap()
        }

        fn restore(&self, saved: &SavedVcpu) -> Result<(), VcpuStateError> {
            saved.restore(0, &self.vcpu, &self.supported, &self.able)
        }
    }

    fn over_the_wire(saved: &SavedVcpu) -> SavedVcpu {
        serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
    }

    /// Without what goes on while it is looked at.
    fn at_rest(mut saved: SavedVcpu) -> SavedVcpu {
        saved.msrs.remove(&MSR_TSC);
        saved
    }

    #[test]
    fn a_vcpu_comes_back_in_another_machine() {
        let Some((old, new)) = two() else { return };
        let mut regs = old.vcpu.get_regs().unwrap();
        (regs.rax, regs.r15, regs.rip, regs.rflags) = (1, 15, 0x10_0000, 2);
        old.vcpu.set_regs(&regs).unwrap();
        let mut sregs = old.vcpu.get_sregs().unwrap();
        sregs.cs.base = 0x1234_0000;
        old.vcpu.set_sregs(&sregs).unwrap();
        let mut xsave = old.vcpu.get_xsave().unwrap();
        // XMM0, and SSE in use: it is in the 512 bytes that every processor has.
        xsave.region[40] = 0x5555_aaaa;
        xsave.region[128] |= 0b10;
        // SAFETY: no feature beyond the region is enabled for this process.
        unsafe { old.vcpu.set_xsave(&xsave) }.unwrap();
        let star = kvm_msr_entry { index: 0xc000_0081, data: 0x0023_0010_0000_0000, ..Default::default() };
        msr::write(&old.vcpu, &[star]).unwrap();

        let saved = old.save();
        assert_eq!(saved.msrs[&0xc000_0081], 0x0023_0010_0000_0000);
        assert!(saved.msrs.contains_key(&0x2ff), "memory types are in no list of KVM's: {:x?}", saved.msrs.keys());
        new.restore(&over_the_wire(&saved)).unwrap();
        let again = new.save();
        assert!(again.msrs[&MSR_TSC] >= saved.msrs[&MSR_TSC], "the TSC never goes back");
        assert_eq!(at_rest(again), at_rest(saved));
    }

    #[test]
    fn page_directory_pointers_come_back_though_memory_has_others() {
        let Some((old, new)) = two() else { return };
        let mut sregs = old.vcpu.get_sregs().unwrap();
        (sregs.cr3, sregs.cr4) = (0x8000, CR4_PAE);
        sregs.cr0 |= CR0_PAGING | 1;
        if old.vcpu.set_sregs(&sregs).is_err() || !old.able.tells_pdptrs {
            eprintln!("skipped: this KVM does not take PAE");
            return;
        }
        let pointers = [0x9001, 0xa001, 0xb001, 0xc001];
        sregs::set_with_pdptrs(&old.vcpu, &sregs, pointers).unwrap();
        if sregs::pdptrs(&old.vcpu).unwrap() != Some(pointers) {
            eprintln!("skipped: this KVM forgets the pointers at once");
            return;
        }
        let saved = old.save();
        assert_eq!(saved.pdptrs, Some(pointers));
        new.restore(&over_the_wire(&saved)).unwrap();
        assert_eq!(new.save().pdptrs, Some(pointers));
    }

    #[test]
    fn what_this_kvm_does_not_take_is_refused_by_name() {
        let Some((old, new)) = two() else { return };
        let saved = old.save();
        let refused = |change: &dyn Fn(&mut SavedVcpu)| {
            let mut other = saved.clone();
            change(&mut other);
            new.restore(&other).unwrap_err()
        };
        let msr = refused(&|s| {
            s.msrs.insert(0x4b56_4d7f, 7);
        });
        let named =
            matches!(msr, VcpuStateError::Msr { source: MsrError::Refused { index: 0x4b56_4d7f, value: 7 }, .. });
        assert!(named, "{msr}");
        let short = refused(&|s| s.xsave.truncate(100));
        assert!(matches!(short, VcpuStateError::ExtendedState { found: 100, .. }), "{short}");
        let feature = refused(&|s| s.cpuid.0.iter_mut().filter(|l| l.function == 7).for_each(|l| l.ebx = u32::MAX));
        assert!(matches!(feature, VcpuStateError::Processor { .. }), "{feature}");
        let no_leaves = refused(&|s| s.cpuid.0.clear());
        assert!(matches!(no_leaves, VcpuStateError::Processor { .. }), "{no_leaves}");
        // Nothing of the above has broken it.
        new.restore(&saved).unwrap();

        let mut text: Value = serde_json::to_value(&saved).unwrap();
        text["regs"] = json!("AAAA");
        assert!(serde_json::from_value::<SavedVcpu>(text).is_err());
    }

    #[test]
    fn a_timer_that_may_have_fired_fires_once_more() {
        let mut apic = kvm_lapic_state::default();
        let msrs = BTreeMap::from([(MSR_TSC, 1000), (MSR_TSC_DEADLINE, 0)]);
        let mut other_mode = msrs.clone();
        rearm_timer(&apic, &mut other_mode);
        assert_eq!(other_mode[&MSR_TSC_DEADLINE], 0, "the timer does not count in TSC");
        // Mode 2 in bits 18:17.
        apic.regs[LAPIC_TIMER + 2] = 0b100;
        let mut fired = msrs.clone();
        rearm_timer(&apic, &mut fired);
        assert_eq!(fired[&MSR_TSC_DEADLINE], 1000);
        let mut armed = BTreeMap::from([(MSR_TSC, 1000), (MSR_TSC_DEADLINE, 1500)]);
        rearm_timer(&apic, &mut armed);
        assert_eq!(armed[&MSR_TSC_DEADLINE], 1500);
    }

    #[test]
    fn extended_state_fits_where_a_host_saves_more_or_less_of_nothing() {
        let mut saved = vec![7; XSAVE_BYTES];
        assert_eq!(fit_xsave(&saved, XSAVE_BYTES).as_ref(), Some(&saved));
        let longer = fit_xsave(&saved, XSAVE_BYTES + 8).unwrap();
        assert_eq!(
            (longer.len(), &longer[..XSAVE_BYTES], &longer[XSAVE_BYTES..]),
            (XSAVE_BYTES + 8, &saved[..], &[0; 8][..])
        );
        assert_eq!(fit_xsave(&longer, XSAVE_BYTES).as_ref(), Some(&saved));
        saved.push(1);
        assert_eq!(fit_xsave(&saved, XSAVE_BYTES), None, "a part of the guest's state has no place here");
        assert_eq!(fit_xsave(&saved[..100], XSAVE_BYTES), None);
        assert_eq!(fit_xsave(&vec![0; MAX_XSAVE_BYTES + 1], XSAVE_BYTES), None);
    }

    #[test]
    fn the_deadline_comes_after_the_counter() {
        let Some((old, _)) = two() else { return };
        let saved = old.save();
        let order: Vec<u32> = saved.entries().iter().map(|entry| entry.index).collect();
        assert_eq!(order.len(), saved.msrs.len());
        if saved.msrs.contains_key(&MSR_TSC_DEADLINE) {
            assert_eq!(order.last(), Some(&MSR_TSC_DEADLINE));
        }
    }
}
