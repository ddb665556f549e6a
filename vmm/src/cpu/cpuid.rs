//! CPUID: what KVM supports, and where in the guest each of its processors is: its sockets, cores and threads.
//!
//! kvmclock and the other paravirtual leaves (0x4000_0000) come as KVM gives them.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
use vmm_control::CpuConfig;

use super::leaves::{Leaf, Leaves};
use crate::machine::kvm::{KvmError, refused};

const LEAF_LAST: u32 = 0x0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
/// Names levels that a guest does not have: dies, complexes.
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MANY_PROCESSORS: u32 = 1 << 28;
const AMD_ECX_CORES_ARE_CORES: u32 = 1 << 1;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What this host's KVM can give to guests.
pub fn supported(kvm: &Kvm) -> Result<Leaves, KvmError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("list what CPUID can tell"))?;
    let mut leaves = Leaves::from(&cpuid);
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        leaves.entry(LEAF_FEATURES, 0).ecx |= ECX_TSC_DEADLINE;
    }
    Ok(leaves)
}

/// Where one vCPU is.
#[derive(Clone, Copy)]
struct Place {
    cpu: CpuConfig,
    apic_id: u32,
    /// Bits of an APIC id below those that number the cores, and below those that number the sockets.
    core_shift: u32,
    socket_shift: u32,
}

impl Place {
    fn of(cpu: CpuConfig, vcpu: u16) -> Self {
        let core_shift = cpu.thread_bits();
        Self { cpu, apic_id: cpu.apic_id(vcpu), core_shift, socket_shift: core_shift + cpu.core_bits() }
    }

    fn threads(self) -> u32 {
        u32::from(self.cpu.threads)
    }

    /// Processors of a socket.
    fn in_socket(self) -> u32 {
        u32::from(self.cpu.cores) * self.threads()
    }

    fn core(self) -> u32 {
        (self.apic_id & ((1 << self.socket_shift) - 1)) >> self.core_shift
    }

    fn socket(self) -> u32 {
        self.apic_id >> self.socket_shift
    }
}

/// The leaves of one vCPU of a guest that is told `leaves`.
pub fn for_vcpu(leaves: &Leaves, cpu: CpuConfig, vcpu: u16) -> Leaves {
    let place = Place::of(cpu, vcpu);
    let mut own = leaves.clone();
    // KVM lists as many levels as it likes, and some of none.
    own.0.retain(|leaf| !matches!(leaf.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
    for leaf in &mut own.0 {
        specialise(leaf, place);
    }
    let last = own.get(LEAF_LAST, 0).map_or(0, |leaf| leaf.eax);
    for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|function| *function <= last) {
        own.0.extend(levels(function, place));
    }
    own
}

/// Threads, cores, and the end of the list.
fn levels(function: u32, place: Place) -> [Leaf; 3] {
    let level = |index, eax, ebx, level: u32| Leaf {
        eax,
        ebx,
        ecx: index | level << 8,
        edx: place.apic_id,
        ..Leaf::zero(function, index)
    };
    [
        level(0, place.core_shift, place.threads(), LEVEL_THREAD),
        level(1, place.socket_shift, place.in_socket(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn specialise(leaf: &mut Leaf, place: Place) {
    let apic_id = place.apic_id;
    match leaf.function {
        LEAF_FEATURES => {
            leaf.ecx |= ECX_HYPERVISOR;
            // Ids that a socket takes, used or not.
            leaf.ebx = (leaf.ebx & 0xffff) | (ids(place.socket_shift).min(255) << 16) | (apic_id << 24);
            if place.in_socket() > 1 {
                leaf.edx |= EDX_MANY_PROCESSORS;
            } else {
                leaf.edx &= !EDX_MANY_PROCESSORS;
            }
        }
        LEAF_CACHES if leaf.eax & 0x1f != 0 => {
            let cores = ids(place.socket_shift - place.core_shift).min(64);
            leaf.eax = (leaf.eax & 0x3fff) | ((shared_by(leaf.eax, place) - 1) << 14) | ((cores - 1) << 26);
        }
        LEAF_AMD_CACHES if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & 0x3fff) | ((shared_by(leaf.eax, place) - 1) << 14);
        }
        // Performance counters differ between hosts and do not migrate.
        LEAF_PMU => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        LEAF_AMD_FEATURES if place.in_socket() > 1 => leaf.ecx |= AMD_ECX_CORES_ARE_CORES,
        LEAF_AMD_FEATURES => leaf.ecx &= !AMD_ECX_CORES_ARE_CORES,
        LEAF_AMD_SIZES => {
            leaf.ecx = (leaf.ecx & !0xf0ff) | (place.in_socket().min(256) - 1) | (place.socket_shift << 12);
        }
        LEAF_AMD_TOPOLOGY => {
            leaf.eax = apic_id;
            leaf.ebx = (place.core() & 0xff) | ((place.threads() - 1) & 0xff) << 8;
            // A socket is one node.
            leaf.ecx = place.socket() & 0xff;
            leaf.edx = 0;
        }
        LEAF_AMD_TOPOLOGY_V2 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Ids that so many bits number.
fn ids(bits: u32) -> u32 {
    1 << bits
}

/// Ids of the processors that share a cache: level 3 serves the socket, the others a core.
fn shared_by(eax: u32, place: Place) -> u32 {
    let level = (eax >> 5) & 0b111;
    ids(if level >= 3 { place.socket_shift } else { place.core_shift })
}
