//! Model-specific registers as a BIOS leaves them. Without firmware nobody else sets them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::machine::kvm::{KvmError, refused};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back. Linux uses PAT only when MTRRs are on.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what every vCPU starts with. A register that this processor lacks is left out: KVM stops at the first.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in [(MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK), (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::Missing("MSR lists"))?;
        let set = vcpu.set_msrs(&msrs).map_err(refused("set an MSR"))?;
        if set == 0 {
            tracing::debug!(index = format!("{index:#x}"), "this KVM has no such MSR");
        }
    }
    Ok(())
}
