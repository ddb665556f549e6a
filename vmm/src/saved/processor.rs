//! What the guest knows of its processor, and whether another host's KVM can keep the promise.
//!
//! A guest finds its processor's features out once, when it boots, and uses them for ever. So it keeps the CPUID that it was started
//! with, and a host takes it only when its own KVM supports every feature bit in there (reference peers-vmm §4.2, rules 20 and 21).
//! More features, another stepping or another model of the same vendor do no harm.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::cpu::leaves::{Leaf, Leaves, Register};

/// Who made the processor, and which one it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub vendor: String,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    pub brand: String,
}

impl Model {
    pub fn of(leaves: &Leaves) -> Self {
        let leaf = |function| leaves.get(function, 0).copied().unwrap_or(Leaf::zero(function, 0));
        let text = |words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
        };
        let vendor = leaf(0);
        let signature = leaf(1).eax;
        let (family, model) = ((signature >> 8) & 0xf, (signature >> 4) & 0xf);
        // Extended fields count for family 15, the model's for 6 too (Intel SDM, CPUID leaf 1).
        let full_family = if family == 0xf { family + ((signature >> 20) & 0xff) } else { family };
        let full_model = if matches!(family, 6 | 0xf) { model | ((signature >> 16) & 0xf) << 4 } else { model };
        let brand = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(leaf);
        let brand: Vec<u32> = brand.iter().flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx]).collect();
        Self {
            vendor: text(&[vendor.ebx, vendor.edx, vendor.ecx]),
            family: full_family,
            model: full_model,
            stepping: signature & 0xf,
            brand: text(&brand),
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vendor, family, model, stepping, brand } = self;
        write!(f, "{vendor} family {family:#x} model {model:#x} stepping {stepping}")?;
        if brand.is_empty() { Ok(()) } else { write!(f, " ({brand})") }
    }
}

/// Why a processor cannot take the place of another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProcessorError {
    #[error("the guest runs on a processor of {saved}, this host has one of {here}")]
    Vendor { saved: String, here: String },
    #[error(
        "this host's KVM lacks features that the guest uses: CPUID {function:#x}.{index} {register:?} bits {missing:#010x}"
    )]
    Features { function: u32, index: u32, register: Register, missing: u32 },
    #[error("the guest addresses {saved} bits of memory, this host's processor {here}")]
    AddressBits { saved: u32, here: u32 },
    #[error(
        "part {component} of the extended processor state lies at {here:?} here, at {saved:?} in the guest (offset, bytes)"
    )]
    StateLayout { component: u32, saved: (u32, u32), here: Option<(u32, u32)> },
    #[error("the guest has {count} leaves of CPUID, more than KVM takes")]
    TooManyLeaves { count: usize },
}

const SIZES: u32 = 0x8000_0008;
const EXTENDED_STATE: u32 = 0xd;
const MAX_STATE_COMPONENTS: u32 = 63;

/// Registers whose every bit is a promise, with the bits that are none: they say where in the machine the processor is, or
/// follow the guest's own settings.
const FEATURES: &[(u32, u32, Register, u32)] = {
    use Register::*;
    const OSXSAVE: u32 = 1 << 27;
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const MONITOR: u32 = 1 << 3;
    const LOCAL_APIC: u32 = 1 << 9;
    const MANY_PROCESSORS: u32 = 1 << 28;
    const OSPKE: u32 = 1 << 4;
    const CORES_ARE_CORES: u32 = 1 << 1;
    const TOPOLOGY_LEAVES: u32 = 1 << 22;
    &[
        (0x1, 0, Ecx, OSXSAVE | HYPERVISOR | MONITOR | TSC_DEADLINE),
        (0x1, 0, Edx, LOCAL_APIC | MANY_PROCESSORS),
        (0x7, 0, Ebx, 0),
        (0x7, 0, Ecx, OSPKE),
        (0x7, 0, Edx, 0),
        (0x7, 1, Eax, 0),
        (0x7, 1, Ebx, 0),
        (0x7, 1, Ecx, 0),
        (0x7, 1, Edx, 0),
        (0x7, 2, Edx, 0),
        (EXTENDED_STATE, 0, Eax, 0),
        (EXTENDED_STATE, 0, Edx, 0),
        (EXTENDED_STATE, 1, Eax, 0),
        (EXTENDED_STATE, 1, Ecx, 0),
        (EXTENDED_STATE, 1, Edx, 0),
        (0x12, 0, Eax, 0),
        (0x14, 0, Ebx, 0),
        (0x14, 0, Ecx, 0),
        (0x19, 0, Ebx, 0),
        (0x1e, 1, Eax, 0),
        (0x24, 0, Ebx, 0),
        (0x4000_0001, 0, Eax, 0),
        (0x8000_0001, 0, Ecx, CORES_ARE_CORES | TOPOLOGY_LEAVES),
        (0x8000_0001, 0, Edx, LOCAL_APIC),
        (0x8000_0007, 0, Edx, 0),
        (SIZES, 0, Ebx, 0),
        (0x8000_000a, 0, Edx, 0),
        (0x8000_0021, 0, Eax, 0),
    ]
};

/// Whether a guest with the CPUID `saved` can go on where KVM supports `here`.
pub fn check(saved: &Leaves, here: &Leaves) -> Result<(), ProcessorError> {
    let (theirs, ours) = (Model::of(saved), Model::of(here));
    if theirs.vendor != ours.vendor {
        return Err(ProcessorError::Vendor { saved: theirs.vendor, here: ours.vendor });
    }
    if saved.0.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
        return Err(ProcessorError::TooManyLeaves { count: saved.0.len() });
    }
    for (function, index, register, no_promise) in FEATURES.iter().copied() {
        let missing = saved.value(function, index, register) & !here.value(function, index, register) & !no_promise;
        if missing != 0 {
            return Err(ProcessorError::Features { function, index, register, missing });
        }
    }
    if address_bits(saved) > address_bits(here) {
        return Err(ProcessorError::AddressBits { saved: address_bits(saved), here: address_bits(here) });
    }
    // XSAVE areas are in guest memory too, so their layout cannot be translated.
    for component in 2..=MAX_STATE_COMPONENTS {
        if let Some(theirs) = state_place(saved, component).filter(|(_, bytes)| *bytes > 0)
            && state_place(here, component) != Some(theirs)
        {
            return Err(ProcessorError::StateLayout { component, saved: theirs, here: state_place(here, component) });
        }
    }
    Ok(())
}

fn address_bits(leaves: &Leaves) -> u32 {
    leaves.get(SIZES, 0).map_or(36, |leaf| leaf.eax & 0xff)
}

/// Offset and bytes.
fn state_place(leaves: &Leaves, component: u32) -> Option<(u32, u32)> {
    leaves.get(EXTENDED_STATE, component).map(|leaf| (leaf.ebx, leaf.eax))
}

/// Of all that [`check`] compares: with equal ones, what a guest was told on one host another host keeps.
pub fn fingerprint(supported: &Leaves) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(Model::of(supported).vendor.as_bytes());
    for (function, index, register, no_promise) in FEATURES.iter().copied() {
        hasher.update(&(supported.value(function, index, register) & !no_promise).to_le_bytes());
    }
    hasher.update(&address_bits(supported).to_le_bytes());
    for component in 2..=MAX_STATE_COMPONENTS {
        let (offset, bytes) = state_place(supported, component).unwrap_or_default();
        hasher.update(&offset.to_le_bytes()).update(&bytes.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    /// A processor with a few features.
    pub fn processor() -> Leaves {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        Leaves(vec![
            leaf(0, 0, [0xd, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            leaf(1, 0, [0x0003_06a9, 0x0100_0800, 0x8220_0201, 0x0f8b_fbff]),
            leaf(7, 0, [0, 0x0000_0281, 0, 0]),
            leaf(EXTENDED_STATE, 0, [0x7, 0, 0, 0]),
            leaf(EXTENDED_STATE, 2, [256, 576, 0, 0]),
            leaf(SIZES, 0, [0x3027, 0, 0, 0]),
            leaf(0x8000_0002, 0, [word(b"Proc"), word(b"esso"), word(b"r\0\0\0"), 0]),
        ])
    }

    fn change(leaves: &Leaves, function: u32, index: u32, change: impl Fn(&mut Leaf)) -> Leaves {
        let mut leaves = leaves.clone();
        change(leaves.0.iter_mut().find(|l| l.function == function && l.index == index).unwrap());
        leaves
    }

    #[test]
    fn a_processor_has_a_name() {
        let model = Model::of(&processor());
        assert_eq!(model.to_string(), "GenuineIntel family 0x6 model 0x3a stepping 9 (Processor)");
        assert_eq!(Model::of(&Leaves::default()).to_string(), " family 0x0 model 0x0 stepping 0");
    }

    #[test]
    fn a_processor_replaces_itself_and_one_that_can_less() {
        let here = processor();
        check(&here, &here).unwrap();
        check(&change(&here, 7, 0, |l| l.ebx = 1), &here).unwrap();
        // Another APIC id, OSXSAVE set by the guest, a smaller memory.
        let moved = change(&here, 1, 0, |l| {
            l.ebx |= 7 << 24;
            l.ecx |= 1 << 27;
        });
        check(&change(&moved, SIZES, 0, |l| l.eax = 36), &here).unwrap();
    }

    #[test]
    fn another_vendor_layout_or_number_of_bits_is_another_fingerprint() {
        let here = processor();
        assert_eq!(fingerprint(&here), fingerprint(&here));
        for other in [
            change(&here, 0, 0, |l| l.ebx = 0x6874_7541),
            change(&here, SIZES, 0, |l| l.eax = 0x3028),
            change(&here, EXTENDED_STATE, 2, |l| l.ebx = 640),
        ] {
            assert_ne!(fingerprint(&here), fingerprint(&other));
        }
        let renamed = change(&here, 0x8000_0002, 0, |l| l.eax = 0);
        assert_eq!(fingerprint(&here), fingerprint(&renamed));
    }

    #[test]
    fn what_is_missing_is_named() {
        let here = processor();
        let saved = change(&here, 7, 0, |l| l.ebx |= 1 << 5);
        let error = check(&saved, &here).unwrap_err();
        assert_eq!(error, ProcessorError::Features { function: 7, index: 0, register: Register::Ebx, missing: 1 << 5 });
        let mut no_leaf = here.clone();
        no_leaf.0.retain(|l| l.function != 7);
        assert!(matches!(check(&here, &no_leaf), Err(ProcessorError::Features { function: 7, .. })));

        let amd = change(&here, 0, 0, |l| l.ebx = 0x6874_7541);
        assert!(matches!(check(&amd, &here), Err(ProcessorError::Vendor { .. })));
        let wide = change(&here, SIZES, 0, |l| l.eax = 52);
        assert_eq!(check(&wide, &here), Err(ProcessorError::AddressBits { saved: 52, here: 39 }));
        let elsewhere = change(&here, EXTENDED_STATE, 2, |l| l.ebx = 640);
        assert!(matches!(check(&elsewhere, &here), Err(ProcessorError::StateLayout { component: 2, .. })));
        let many = Leaves(here.0.iter().cycle().take(1000).copied().collect());
        assert_eq!(check(&many, &here), Err(ProcessorError::TooManyLeaves { count: 1000 }));
        assert!(many.to_kvm().is_none());
    }

    proptest! {
        /// Whatever differs in what is compared: another fingerprint; and equal ones mean that each takes the other's place.
        #[test]
        fn equal_fingerprints_can_take_each_others_place(at in 0..FEATURES.len(), bit in 0u32..32, set: bool) {
            let (function, index, register, no_promise) = FEATURES[at];
            let one = processor();
            let mut other = one.clone();
            let value = register.of_mut(other.entry(function, index));
            *value = if set { *value | 1 << bit } else { *value & !(1 << bit) };
            let promised = |leaves: &Leaves| leaves.value(function, index, register) & !no_promise;
            prop_assert_eq!(fingerprint(&one) == fingerprint(&other), promised(&one) == promised(&other));
            if fingerprint(&one) == fingerprint(&other) {
                prop_assert!(check(&one, &other).is_ok() && check(&other, &one).is_ok());
            }
        }

        /// Whatever differs: accepted exactly when every promised bit is there.
        #[test]
        fn a_promise_is_kept_or_refused(at in 0..FEATURES.len(), saved: u32, here: u32) {
            let (function, index, register, no_promise) = FEATURES[at];
            let with = |value: u32| {
                let mut leaves = processor();
                leaves.0.retain(|l| (l.function, l.index) != (function, index));
                let mut new = leaf(function, index, [0; 4]);
                match register {
                    Register::Eax => new.eax = value,
                    Register::Ebx => new.ebx = value,
                    Register::Ecx => new.ecx = value,
                    Register::Edx => new.edx = value,
                }
                leaves.0.push(new);
                leaves
            };
            let kept = saved & !here & !no_promise == 0;
            prop_assert_eq!(check(&with(saved), &with(here)).is_ok(), kept);
        }
    }
}
