//! One processor as KVM has it.
//!
//! Read when all vCPUs stand and all devices are quiet, on the thread that runs the vCPU, after KVM has finished the last access that it
//! left the guest for. The orders are those of reference peers-vmm §4.2: MP_STATE is read first, because reading it may change the local
//! APIC, and events last (rule 13); what depends on something is written after it (rule 14).

use std::collections::BTreeMap;

use kvm_bindings::{
    CpuId, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::blob::Blob;
use super::processor::{self, Leaves, ProcessorError};
use crate::cpu::msr::{self, MsrError};
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
    pub scales_tsc: bool,
}

impl VcpuAbilities {
    pub fn of(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            xsave_bytes: bytes.clamp(XSAVE_BYTES, MAX_XSAVE_BYTES),
            msrs: msr::to_save(kvm)?,
            scales_tsc: kvm.check_extension(Cap::TscControl),
        })
    }
}

/// Reads a vCPU. `given` is the CPUID that it was made with.
pub fn save(index: u32, vcpu: &VcpuFd, given: &CpuId, able: &VcpuAbilities) -> Result<SavedVcpu, VcpuStateError> {
    let kvm = |source| VcpuStateError::Kvm { index, source };
    let mp_state = vcpu.get_mp_state().map_err(refused("read whether a vCPU runs")).map_err(kvm)?;
    let regs = vcpu.get_regs().map_err(refused("read registers")).map_err(kvm)?;
    let sregs = vcpu.get_sregs().map_err(refused("read the control registers")).map_err(kvm)?;
    if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
        return Err(VcpuStateError::Nested { index });
    }
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
        sregs: Blob(sregs),
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
        if self.xsave.len() != able.xsave_bytes {
            return Err(VcpuStateError::ExtendedState { index, found: self.xsave.len(), here: able.xsave_bytes });
        }
        vcpu.set_cpuid2(&self.cpuid(index)?).map_err(refused("set CPUID")).map_err(kvm)?;
        if able.scales_tsc {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(refused("set the frequency of the TSC")).map_err(kvm)?;
        }
        vcpu.set_mp_state(self.mp_state.0).map_err(refused("set whether a vCPU runs")).map_err(kvm)?;
        vcpu.set_regs(&self.regs.0).map_err(refused("set registers")).map_err(kvm)?;
        vcpu.set_sregs(&self.sregs.0).map_err(refused("set the control registers")).map_err(kvm)?;
        write_xsave(vcpu, &self.xsave).map_err(kvm)?;
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
