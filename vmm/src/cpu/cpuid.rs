//! CPUID: what KVM supports, with the topology of this guest: one socket, one core a vCPU, one thread a core.
//!
//! kvmclock and the other paravirtual leaves (0x4000_0000) come as KVM gives them.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::machine::kvm::{KvmError, refused};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MANY_PROCESSORS: u32 = 1 << 28;
const AMD_ECX_CORES_ARE_CORES: u32 = 1 << 1;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What this host's KVM can give to guests.
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("list what CPUID can tell"))?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid.as_mut_slice() {
            if entry.function == LEAF_FEATURES {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
        }
    }
    Ok(cpuid)
}

/// The bits of an APIC id that number cores.
fn core_bits(vcpus: u16) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

/// The leaves of one vCPU. Its index is its APIC id.
pub fn for_vcpu(supported: &CpuId, index: u16, vcpus: u16) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        specialise(entry, u32::from(index), u32::from(vcpus), core_bits(vcpus));
    }
    cpuid
}

fn specialise(entry: &mut kvm_cpuid_entry2, apic_id: u32, vcpus: u32, core_bits: u32) {
    match entry.function {
        LEAF_FEATURES => {
            entry.ecx |= ECX_HYPERVISOR;
            entry.ebx = (entry.ebx & 0xffff) | (vcpus.min(255) << 16) | (apic_id << 24);
            if vcpus > 1 {
                entry.edx |= EDX_MANY_PROCESSORS;
            } else {
                entry.edx &= !EDX_MANY_PROCESSORS;
            }
        }
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            let shared_by = shared_by(entry.eax, vcpus);
            entry.eax = (entry.eax & 0x3fff) | ((shared_by - 1) << 14) | ((vcpus.min(64) - 1) << 26);
        }
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x3fff) | ((shared_by(entry.eax, vcpus) - 1) << 14);
        }
        // Performance counters differ between hosts and do not migrate.
        LEAF_PMU => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
            let (shift, count, level) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (core_bits, vcpus, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = entry.index | (level << 8);
            entry.edx = apic_id;
        }
        LEAF_AMD_FEATURES if vcpus > 1 => entry.ecx |= AMD_ECX_CORES_ARE_CORES,
        LEAF_AMD_SIZES => {
            entry.ecx = (entry.ecx & !0xf0ff) | (vcpus.min(256) - 1) | (core_bits << 12);
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = apic_id;
            // Core number, one thread a core; one node.
            entry.ebx = apic_id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Level 3 caches serve the socket, the others a core.
fn shared_by(eax: u32, vcpus: u32) -> u32 {
    let level = (eax >> 5) & 0b111;
    if level >= 3 { vcpus.min(4096) } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn three_vcpus_are_three_cores_of_one_socket() {
        let given = CpuId::from_entries(&[
            leaf(LEAF_FEATURES, 0),
            leaf(LEAF_TOPOLOGY, 0),
            leaf(LEAF_TOPOLOGY, 1),
            leaf(LEAF_AMD_SIZES, 0),
            leaf(LEAF_AMD_TOPOLOGY, 0),
        ])
        .unwrap();
        let cpuid = for_vcpu(&given, 2, 3);
        let features = find(&cpuid, LEAF_FEATURES, 0);
        assert_eq!(features.ebx >> 24, 2);
        assert_eq!((features.ebx >> 16) & 0xff, 3);
        assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
        let threads = find(&cpuid, LEAF_TOPOLOGY, 0);
        assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, 2));
        let cores = find(&cpuid, LEAF_TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 1 | LEVEL_CORE << 8));
        assert_eq!(find(&cpuid, LEAF_AMD_SIZES, 0).ecx & 0xff, 2);
        assert_eq!(find(&cpuid, LEAF_AMD_TOPOLOGY, 0).eax, 2);
    }
}
