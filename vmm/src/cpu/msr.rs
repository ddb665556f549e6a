//! Model-specific registers: as a BIOS leaves them, for without firmware nobody else sets them, and as a whole, when a guest is saved.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_control::CpuModel;

use crate::machine::kvm::{KvmError, refused};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back. Linux uses PAT only when MTRRs are on.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// KVM takes fewer than 256 in one call.
const AT_ONCE: usize = 128;
/// Of KVM's own: clock, asynchronous page faults, stolen time and what else is there. KVM's list has not always had all of them (rule 16
/// of reference peers-vmm §4.2), so each is tried.
const KVM_OWN: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// Memory types of the guest: KVM takes them, and no list of its names them.
const MTRRS: [u32; 28] = {
    let mut mtrrs = [MTRR_DEFAULT_TYPE; 28];
    let fixed = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    let mut at = 0;
    while at < fixed.len() {
        mtrrs[at + 1] = fixed[at];
        at += 1;
    }
    let mut variable = 0;
    while variable < 16 {
        mtrrs[12 + variable as usize] = 0x200 + variable;
        variable += 1;
    }
    mtrrs
};

#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("KVM does not take the value {value:#x} of MSR {index:#x}")]
    Refused { index: u32, value: u64 },
}

/// Sets what every vCPU starts with. A register that this processor lacks is left out: KVM stops at the first.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in [(MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK), (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let set = vcpu.set_msrs(&list(&[entry])?).map_err(refused("set an MSR"))?;
        if set == 0 {
            tracing::debug!(index = format!("{index:#x}"), "this KVM has no such MSR");
        }
    }
    Ok(())
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Missing("MSR lists"))
}

/// Whether a register belongs to the guest. Performance counters do not: the guest is told that there are none (`cpuid`); nor do the
/// capabilities of nested virtualisation, which are constants of the host.
fn is_state(index: u32) -> bool {
    let counters = matches!(index,
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x345 | 0x38d..=0x390 | 0x3f1 | 0x4c1..=0x4c8
        | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303);
    let nested = matches!(index, 0x480..=0x493 | 0xc001_0117);
    !counters && !nested
}

/// Whether a guest of a named model has a register. It has none of those that belong to features which it is not told of: they hold what
/// this host's processor is, which another host's KVM may refuse.
fn is_named_models(index: u32) -> bool {
    matches!(index,
        // TSC, KVM's clock in its first form, TSC_ADJUST, SMBASE.
        0x10..=0x12 | 0x3b | 0x9e
        // SYSENTER, machine checks, MISC_ENABLE, DEBUGCTL, memory types, the deadline.
        | 0x174..=0x176 | 0x179..=0x17b | 0x400..=0x47f | 0x1a0 | 0x1d9 | 0x200..=0x2ff | 0x6e0
        // EFER, SYSCALL, FS, GS; AMD's hardware configuration.
        | 0xc000_0080..=0xc000_0084 | 0xc000_0100..=0xc000_0102 | 0xc001_0015)
        || KVM_OWN.contains(&index)
}

/// The registers that make up a guest of this model on this KVM.
pub fn to_save(kvm: &Kvm, model: CpuModel) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().map_err(refused("list MSRs"))?;
    let has = |index: &u32| is_state(*index) && (model == CpuModel::Host || is_named_models(*index));
    let mut all: Vec<u32> = listed.as_slice().iter().copied().filter(has).chain(KVM_OWN).chain(MTRRS).collect();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Reads those of `wanted` that the vCPU has, by index.
pub fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<BTreeMap<u32, u64>, MsrError> {
    let mut found = BTreeMap::new();
    let mut rest = wanted;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(AT_ONCE)];
        let entries: Vec<_> = now.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = list(&entries)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(refused("read MSRs"))?.min(now.len());
        found.extend(msrs.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that the vCPU does not have.
        let missing = usize::from(count < now.len());
        rest = &rest[count + missing..];
    }
    Ok(found)
}

/// Writes registers in this order. One that KVM does not take is an error, unless the vCPU has this value anyway.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), MsrError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(AT_ONCE)];
        let count = vcpu.set_msrs(&list(now)?).map_err(refused("set MSRs"))?.min(now.len());
        rest = &rest[count..];
        if count < now.len() {
            let kvm_msr_entry { index, data: value, .. } = now[count];
            // Constants of KVM are read like any other; 0 is what a vCPU without the register has.
            let here = read(vcpu, &[index])?.get(&index).copied();
            if here.unwrap_or(0) != value {
                return Err(MsrError::Refused { index, value });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_are_named_once_each() {
        let mut mtrrs = MTRRS.to_vec();
        mtrrs.sort_unstable();
        mtrrs.dedup();
        assert_eq!(mtrrs.len(), 28);
        assert!(mtrrs.contains(&0x20f) && mtrrs.contains(&0x26f) && mtrrs.contains(&MTRR_DEFAULT_TYPE));
    }

    #[test]
    fn counters_of_the_host_are_no_state_of_the_guest() {
        assert!(!is_state(0xc1) && !is_state(0x345) && !is_state(0x480));
        assert!(MTRRS.into_iter().chain(KVM_OWN).all(is_named_models));
        // XSS, the capabilities of the architecture, TSC_AUX, speculation: of features that no named model has.
        assert!(![0xda0, 0x10a, 0xc000_0103, 0x48, 0xe1].into_iter().any(is_named_models));
        assert!([0x10, 0x174, 0x277, 0x6e0, 0xc000_0081, 0xc000_0102].into_iter().all(is_named_models));
        assert!(is_state(0x10) && is_state(0xc000_0081) && is_state(0x4b56_4d01));
    }
}
