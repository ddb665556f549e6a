//! The places of processors, as operating systems work them out from CPUID.

use std::collections::BTreeSet;

use vmm_control::{CpuConfig, CpuModel};

use super::cpuid::for_vcpu;
use super::leaves::{Leaf, Leaves, Register};
use super::model;
use super::model_tests::host;

fn arranged(sockets: u16, cores: u16, threads: u16) -> CpuConfig {
    CpuConfig { model: CpuModel::X86_64V3, sockets, cores, threads }
}

fn told(vendor: &str, cpu: CpuConfig) -> Vec<Leaves> {
    let leaves = model::leaves(cpu.model, &host(vendor), 39).unwrap();
    (0..cpu.sockets * cpu.cores * cpu.threads).map(|vcpu| for_vcpu(&leaves, cpu, vcpu)).collect()
}

#[test]
fn three_vcpus_are_three_cores_of_one_socket() {
    // As KVM gives them: no levels, or more than there are.
    let given = Leaves(
        [(0, 0), (0x1, 0), (0xb, 0), (0xb, 1), (0xb, 5), (0x1f, 0), (0x8000_0008, 0), (0x8000_001e, 0)]
            .map(|(function, index)| Leaf { eax: 0x1f, ..Leaf::zero(function, index) })
            .to_vec(),
    );
    let own = for_vcpu(&given, CpuConfig::of(CpuModel::Host, 3), 2);
    let features = own.get(0x1, 0).unwrap();
    assert_eq!((features.ebx >> 24, (features.ebx >> 16) & 0xff), (2, 4));
    assert_ne!(features.ecx & 1 << 31, 0, "there is a hypervisor");
    for function in [0xb, 0x1f] {
        let level = |index| own.get(function, index).map(|leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx));
        assert_eq!(level(0), Some((0, 1, 0x100, 2)));
        assert_eq!(level(1), Some((2, 3, 0x201, 2)));
        assert_eq!(level(2), Some((0, 0, 2, 2)));
        assert_eq!(level(5), None);
    }
    assert_eq!(own.get(0x8000_0008, 0).unwrap().ecx, 2 << 12 | 2);
    assert_eq!(own.get(0x8000_001e, 0).unwrap().eax, 2);
}

#[test]
fn a_processor_that_knows_no_levels_is_told_none() {
    let old = Leaves(vec![Leaf { eax: 0xa, ..Leaf::zero(0, 0) }, Leaf::zero(0x1, 0)]);
    let own = for_vcpu(&old, CpuConfig::of(CpuModel::Host, 1), 0);
    assert!(own.get(0xb, 0).is_none());
    assert_eq!(own.get(0x1, 0).unwrap().edx & 1 << 28, 0, "one processor");
    let many = for_vcpu(&old, CpuConfig::of(CpuModel::Host, 2), 0);
    assert_ne!(many.get(0x1, 0).unwrap().edx & 1 << 28, 0);
}

/// All small arrangements: leaf 0xb alone, leaves 1 and 4 alone, and AMD's alone give the same sockets, cores and threads, which are as
/// many as were asked for.
#[test]
fn every_way_to_look_gives_the_same_places() {
    for cpu in (1..=4).flat_map(|s| (1..=5).flat_map(move |c| (1..=3).map(move |t| arranged(s, c, t)))) {
        let vcpus = usize::from(cpu.sockets * cpu.cores * cpu.threads);
        let (intel, amd) = (told("GenuineIntel", cpu), told("AuthenticAMD", cpu));
        let mut ids = BTreeSet::new();
        for (intel, amd) in intel.iter().zip(&amd) {
            let id = intel.value(0xb, 0, Register::Edx);
            ids.insert(id);
            assert_eq!(intel.value(0x1, 0, Register::Ebx) >> 24, id);
            let (core_shift, socket_shift) = (intel.value(0xb, 0, Register::Eax), intel.value(0xb, 1, Register::Eax));
            // What Intel had before leaf 0xb: the ids of a socket, and of its cores.
            let in_socket = intel.value(0x1, 0, Register::Ebx) >> 16 & 0xff;
            let cores = (intel.value(0x4, 0, Register::Eax) >> 26) + 1;
            assert_eq!((in_socket, in_socket / cores), (1 << socket_shift, 1 << core_shift), "{cpu:?}");
            // The first level serves a core, the last a socket.
            let sharing =
                |leaves: &Leaves, function, index| (leaves.value(function, index, Register::Eax) >> 14 & 0xfff) + 1;
            for index in [0, 1, 2] {
                assert_eq!(sharing(intel, 0x4, index), 1 << core_shift);
                assert_eq!(sharing(amd, 0x8000_001d, index), 1 << core_shift);
            }
            assert_eq!((sharing(intel, 0x4, 3), sharing(amd, 0x8000_001d, 3)), (1 << socket_shift, 1 << socket_shift));

            let sizes = amd.value(0x8000_0008, 0, Register::Ecx);
            assert_eq!((sizes >> 12 & 0xf, (sizes & 0xff) + 1), (socket_shift, u32::from(cpu.cores * cpu.threads)));
            let place = amd.get(0x8000_001e, 0).unwrap();
            assert_eq!((place.eax, place.ecx), (id, id >> socket_shift));
            assert_eq!(place.ebx & 0xff, id >> core_shift & ((1 << (socket_shift - core_shift)) - 1));
            assert_eq!((place.ebx >> 8) + 1, u32::from(cpu.threads));
            assert_eq!(amd.value(0x8000_0001, 0, Register::Ecx) >> 1 & 1, u32::from(cpu.cores * cpu.threads > 1));
        }
        let shifts = (intel[0].value(0xb, 0, Register::Eax), intel[0].value(0xb, 1, Register::Eax));
        let count = |shift: u32| ids.iter().map(|id| id >> shift).collect::<BTreeSet<_>>().len();
        assert_eq!(ids.len(), vcpus, "{cpu:?}");
        assert_eq!(count(shifts.0), usize::from(cpu.sockets * cpu.cores), "{cpu:?}");
        assert_eq!(count(shifts.1), usize::from(cpu.sockets), "{cpu:?}");
        assert_eq!(intel[0].value(0xb, 0, Register::Ebx), u32::from(cpu.threads));
        assert_eq!(intel[0].value(0xb, 1, Register::Ebx), u32::from(cpu.cores * cpu.threads));
    }
}
