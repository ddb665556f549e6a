//! Named models: processors that are the same on every host.
//!
//! A guest of a named model is told of nothing but the features of that model (the levels of the x86-64 psABI) and what a PC and KVM
//! need, so it moves to every host of its vendor that has those. Whatever is not written here it does not see: no caches, no topology, no
//! performance counters, no error reporting of the host, and none of its mitigations, which differ between hosts. Those that a kernel
//! brings itself it applies, by the family and model that are told.
//!
//! Each leaf that is told has its reason below; one that is not named tells zero, which means: not there.

use vmm_control::CpuModel;

use super::leaves::{Leaf, Leaves, Register};
use crate::saved::processor::Model;

/// The fewest bits of physical addresses that a guest is told: every 64-bit server and desktop processor of these levels has them.
pub const MIN_ADDRESS_BITS: u32 = 39;
const LINEAR_ADDRESS_BITS: u32 = 48;

/// Where AVX's registers are in the XSAVE area, in bytes: equal on all processors, as the guest has such areas in its memory.
const AVX_STATE: (u32, u32) = (576, 256);
/// x87, SSE and AVX.
const AVX_XCR0: u32 = 0b111;
/// Header and legacy part of the XSAVE area: all that is there before the guest turns AVX on.
const XSAVE_MIN_BYTES: u32 = 576;

const HYPERVISOR: (u32, Register, u32) = (0x1, Register::Ecx, 31);
/// There are leaves 0x8000_001d and 0x8000_001e. They are ours, whatever the host has.
const AMD_TOPOLOGY_LEAVES: (u32, Register, u32) = (0x8000_0001, Register::Ecx, 22);
/// Bits of leaf 1 that AMD's processors repeat in leaf 0x8000_0001.
const AMD_ALIASES: u32 = 0x0183_f3ff;

/// A bit of CPUID by its name, which is the one that Linux shows in /proc/cpuinfo.
pub(super) type Feature = (&'static str, u32, Register, u8);

use Register::{Eax, Ebx, Ecx, Edx};

/// What operating systems take for granted on a 64-bit PC, and KVM's own features: those that Linux 5.10 had. Later ones are left out, for a
/// guest may move from a new kernel to an old one; so is VME, which only programs of 16 bits under systems of 32 bits use.
const BASE: &[Feature] = &[
    ("fpu", 0x1, Edx, 0),
    ("de", 0x1, Edx, 2),
    ("pse", 0x1, Edx, 3),
    ("tsc", 0x1, Edx, 4),
    ("msr", 0x1, Edx, 5),
    ("pae", 0x1, Edx, 6),
    ("mce", 0x1, Edx, 7),
    ("cx8", 0x1, Edx, 8),
    ("apic", 0x1, Edx, 9),
    ("sep", 0x1, Edx, 11),
    ("mtrr", 0x1, Edx, 12),
    ("pge", 0x1, Edx, 13),
    ("mca", 0x1, Edx, 14),
    ("cmov", 0x1, Edx, 15),
    ("pat", 0x1, Edx, 16),
    ("pse36", 0x1, Edx, 17),
    ("clflush", 0x1, Edx, 19),
    ("mmx", 0x1, Edx, 23),
    ("fxsr", 0x1, Edx, 24),
    ("sse", 0x1, Edx, 25),
    ("sse2", 0x1, Edx, 26),
    ("x2apic", 0x1, Ecx, 21),
    ("tsc_deadline_timer", 0x1, Ecx, 24),
    // The local timer goes on while the processor rests: KVM's does.
    ("arat", 0x6, Eax, 2),
    ("syscall", 0x8000_0001, Edx, 11),
    ("nx", 0x8000_0001, Edx, 20),
    ("lm", 0x8000_0001, Edx, 29),
    ("kvm_clock", KVM_FEATURES, Eax, 0),
    ("kvm_nop_io_delay", KVM_FEATURES, Eax, 1),
    ("kvm_clock_2", KVM_FEATURES, Eax, 3),
    ("kvm_async_page_faults", KVM_FEATURES, Eax, 4),
    ("kvm_steal_time", KVM_FEATURES, Eax, 5),
    ("kvm_pv_eoi", KVM_FEATURES, Eax, 6),
    ("kvm_pv_unhalt", KVM_FEATURES, Eax, 7),
    ("kvm_pv_tlb_flush", KVM_FEATURES, Eax, 9),
    ("kvm_async_page_fault_exits", KVM_FEATURES, Eax, 10),
    ("kvm_pv_send_ipi", KVM_FEATURES, Eax, 11),
    ("kvm_poll_control", KVM_FEATURES, Eax, 12),
    ("kvm_pv_sched_yield", KVM_FEATURES, Eax, 13),
    ("kvm_async_page_fault_interrupts", KVM_FEATURES, Eax, 14),
    ("kvm_clock_stable", KVM_FEATURES, Eax, 24),
];

const V2: &[Feature] = &[
    ("sse3", 0x1, Ecx, 0),
    ("ssse3", 0x1, Ecx, 9),
    ("cx16", 0x1, Ecx, 13),
    ("sse4_1", 0x1, Ecx, 19),
    ("sse4_2", 0x1, Ecx, 20),
    ("popcnt", 0x1, Ecx, 23),
    ("lahf_lm", 0x8000_0001, Ecx, 0),
];

const V3: &[Feature] = &[
    ("fma", 0x1, Ecx, 12),
    ("movbe", 0x1, Ecx, 22),
    // OSXSAVE is the guest's to turn on.
    ("xsave", 0x1, Ecx, 26),
    ("avx", 0x1, Ecx, 28),
    ("f16c", 0x1, Ecx, 29),
    ("bmi1", 0x7, Ebx, 3),
    ("avx2", 0x7, Ebx, 5),
    ("bmi2", 0x7, Ebx, 8),
    ("abm", 0x8000_0001, Ecx, 5),
    ("x87 state", 0xd, Eax, 0),
    ("sse state", 0xd, Eax, 1),
    ("avx state", 0xd, Eax, 2),
];

const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const SIZES: u32 = 0x8000_0008;
const EXTENDED_STATE: u32 = 0xd;

/// Why a guest cannot have its model here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host cannot run a guest of the model {model}, because its KVM does not offer {}; \
     give the guest a lower model, or start it on a host that can",
    .missing.join(", ")
)]
pub struct ModelError {
    pub model: CpuModel,
    /// By their names, in the order of the tables above.
    pub missing: Vec<String>,
}

/// The features of a named model.
pub(super) fn features(model: CpuModel) -> impl Iterator<Item = &'static Feature> {
    let (v2, v3) = match model {
        CpuModel::Host => (&[][..], &[][..]),
        CpuModel::X86_64V2 => (V2, &[][..]),
        CpuModel::X86_64V3 => (V2, V3),
    };
    BASE.iter().chain(v2).chain(v3)
}

/// What a guest of this model is told where KVM supports `supported`, before its processors are told apart ([`super::cpuid`]).
/// `address_bits` are those that its memory map needs.
pub fn leaves(model: CpuModel, supported: &Leaves, address_bits: u32) -> Result<Leaves, ModelError> {
    if model == CpuModel::Host {
        return Ok(supported.clone());
    }
    let address_bits = address_bits.max(MIN_ADDRESS_BITS);
    let missing = missing(model, supported, address_bits);
    if !missing.is_empty() {
        return Err(ModelError { model, missing });
    }
    Ok(build(model, supported, address_bits))
}

fn missing(model: CpuModel, supported: &Leaves, address_bits: u32) -> Vec<String> {
    let lacks = |(_, function, register, bit): &&Feature| supported.value(*function, 0, *register) >> bit & 1 == 0;
    let mut missing: Vec<String> = features(model).filter(lacks).map(|(name, ..)| (*name).to_owned()).collect();
    let place = (supported.value(EXTENDED_STATE, 2, Ebx), supported.value(EXTENDED_STATE, 2, Eax));
    if model >= CpuModel::X86_64V3 && place != AVX_STATE {
        missing.push(format!("avx state of {} bytes at {}", AVX_STATE.1, AVX_STATE.0));
    }
    if supported.value(SIZES, 0, Eax) & 0xff < address_bits {
        missing.push(format!("{address_bits} bits of physical addresses"));
    }
    missing
}

/// Whose processor it is: the guest keeps that, because instructions of the system differ between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    Intel,
    Amd,
}

impl Maker {
    fn of(supported: &Leaves) -> Self {
        match Model::of(supported).vendor.as_str() {
            "AuthenticAMD" | "HygonGenuine" => Self::Amd,
            _ => Self::Intel,
        }
    }

    /// Family, model and stepping: of the first processor of this maker that had the level, so that a kernel applies the mitigations that
    /// this generation needs. For AMD it is that of Zen for both: on earlier ones two cores share what is one core's here.
    fn signature(self, model: CpuModel) -> u32 {
        match (self, model) {
            (Self::Amd, _) => 0x0080_0f12,
            (Self::Intel, CpuModel::X86_64V3) => 0x0003_06c3,
            (Self::Intel, _) => 0x0001_06a5,
        }
    }
}

fn build(model: CpuModel, supported: &Leaves, address_bits: u32) -> Leaves {
    let maker = Maker::of(supported);
    let signature = maker.signature(model);
    let mut leaves = Leaves::default();
    // The highest leaf, and the vendor.
    let Leaf { ebx, ecx, edx, .. } = supported.get(0, 0).copied().unwrap_or(Leaf::zero(0, 0));
    *leaves.entry(0, 0) = Leaf { eax: EXTENDED_STATE, ebx, ecx, edx, ..Leaf::zero(0, 0) };
    // CLFLUSH writes back 64 bytes: eight times eight.
    *leaves.entry(0x1, 0) = Leaf { eax: signature, ebx: 8 << 8, ..Leaf::zero(0x1, 0) };
    // KVM's signature, as a guest looks for it, and the last of its leaves.
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    *leaves.entry(KVM_SIGNATURE, 0) = Leaf {
        eax: KVM_FEATURES,
        ebx: word(b"KVMK"),
        ecx: word(b"VMKV"),
        edx: word(b"M\0\0\0"),
        ..Leaf::zero(KVM_SIGNATURE, 0)
    };
    for (_, function, register, bit) in features(model) {
        *register.of_mut(leaves.entry(*function, 0)) |= 1 << bit;
    }
    let (function, register, bit) = HYPERVISOR;
    *register.of_mut(leaves.entry(function, 0)) |= 1 << bit;
    if model >= CpuModel::X86_64V3 {
        // KVM changes EBX to what the guest has turned on.
        let state = Leaf { eax: AVX_XCR0, ebx: XSAVE_MIN_BYTES, ecx: AVX_STATE.0 + AVX_STATE.1, ..Leaf::zero(0xd, 0) };
        *leaves.entry(EXTENDED_STATE, 0) = state;
        *leaves.entry(EXTENDED_STATE, 2) = Leaf { eax: AVX_STATE.1, ebx: AVX_STATE.0, ..Leaf::zero(0xd, 2) };
    }
    add_name(&mut leaves, model);
    // Of the guest's memory map, never of the host.
    leaves.entry(SIZES, 0).eax = LINEAR_ADDRESS_BITS << 8 | address_bits;
    match maker {
        Maker::Intel => add_intel(&mut leaves),
        Maker::Amd => add_amd(&mut leaves, signature),
    }
    leaves
}

/// Three leaves of sixteen characters.
fn add_name(leaves: &mut Leaves, model: CpuModel) {
    let name = format!("Quorate {model} processor");
    let mut text = [0; 48];
    for (to, from) in text.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    for (function, part) in (0x8000_0002..).zip(text.chunks_exact(16)) {
        let word = |at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
        *leaves.entry(function, 0) =
            Leaf { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12), ..Leaf::zero(function, 0) };
    }
}

/// A cache, as leaves 4 and 0x8000_001d tell it. Lines have 64 bytes. Who shares it follows the topology.
struct Cache {
    level: u32,
    /// 1 is data, 2 instructions, 3 both.
    kind: u32,
    kib: u32,
    ways: u32,
}

/// Not the host's, and not none: a C library that finds no caches copies around the ones that are there.
const CACHES: [Cache; 4] = [
    Cache { level: 1, kind: 1, kib: 32, ways: 8 },
    Cache { level: 1, kind: 2, kib: 32, ways: 8 },
    Cache { level: 2, kind: 3, kib: 512, ways: 8 },
    Cache { level: 3, kind: 3, kib: 16 << 10, ways: 16 },
];

fn add_caches(leaves: &mut Leaves, function: u32) {
    const INITIALISES_ITSELF: u32 = 1 << 8;
    for (index, Cache { level, kind, kib, ways }) in (0..).zip(CACHES) {
        *leaves.entry(function, index) = Leaf {
            eax: kind | level << 5 | INITIALISES_ITSELF,
            ebx: 63 | (ways - 1) << 22,
            ecx: kib * 1024 / 64 / ways - 1,
            ..Leaf::zero(function, index)
        };
    }
    // The end of the list.
    leaves.entry(function, CACHES.len() as u32);
}

fn add_intel(leaves: &mut Leaves) {
    leaves.entry(0x8000_0000, 0).eax = SIZES;
    // One round, and one descriptor: the caches are in leaf 4.
    leaves.entry(0x2, 0).eax = 0xff01;
    add_caches(leaves, 0x4);
}

fn add_amd(leaves: &mut Leaves, signature: u32) {
    let Leaf { ebx, ecx, edx, .. } = *leaves.entry(0, 0);
    *leaves.entry(0x8000_0000, 0) = Leaf { eax: 0x8000_001e, ebx, ecx, edx, ..Leaf::zero(0x8000_0000, 0) };
    leaves.entry(0x8000_0001, 0).eax = signature;
    leaves.entry(0x8000_0001, 0).edx |= leaves.value(0x1, 0, Edx) & AMD_ALIASES;
    let (function, register, bit) = AMD_TOPOLOGY_LEAVES;
    *register.of_mut(leaves.entry(function, 0)) |= 1 << bit;
    // The same caches in the form of before: KiB, ways, lines a tag, bytes of a line.
    let first = 32 << 24 | 8 << 16 | 1 << 8 | 64;
    *leaves.entry(0x8000_0005, 0) = Leaf { ecx: first, edx: first, ..Leaf::zero(0x8000_0005, 0) };
    // Ways in code here, 6 for 8 and 8 for 16; the last level in units of 512 KiB.
    let (second, third) = (512 << 16 | 6 << 12 | 1 << 8 | 64, 32 << 18 | 8 << 12 | 1 << 8 | 64);
    *leaves.entry(0x8000_0006, 0) = Leaf { ecx: second, edx: third, ..Leaf::zero(0x8000_0006, 0) };
    add_caches(leaves, 0x8000_001d);
    // Filled in for each processor.
    leaves.entry(0x8000_001e, 0);
}
