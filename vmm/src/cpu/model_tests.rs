//! Named models, as values.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vmm_control::{CpuConfig, CpuModel};

use super::cpuid;
use super::leaves::{Leaf, Leaves, Register};
use super::model::*;
use crate::saved::processor::{self, Model};

const V2: CpuModel = CpuModel::X86_64V2;
const V3: CpuModel = CpuModel::X86_64V3;

/// What KVM supports on a host that has all of x86-64-v3 and little else.
pub fn host(vendor: &str) -> Leaves {
    let mut leaves = Leaves::default();
    let words: Vec<u32> =
        vendor.as_bytes().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    *leaves.entry(0, 0) = Leaf { eax: 0x1c, ebx: words[0], edx: words[1], ecx: words[2], ..Leaf::zero(0, 0) };
    for (_, function, register, bit) in features(V3) {
        *register.of_mut(leaves.entry(*function, 0)) |= 1 << bit;
    }
    leaves.entry(0x1, 0).eax = 0x000c_06f2;
    *leaves.entry(0xd, 2) = Leaf { eax: 256, ebx: 576, ..Leaf::zero(0xd, 2) };
    leaves.entry(0x8000_0008, 0).eax = 0x3930;
    leaves
}

/// What differs from host to host: any bit of any leaf that a guest looks at, on top of what a model needs.
fn any_host() -> impl Strategy<Value = Leaves> {
    const FUNCTIONS: [(u32, u32); 26] = [
        (0x1, 0),
        (0x2, 0),
        (0x4, 0),
        (0x4, 3),
        (0x5, 0),
        (0x6, 0),
        (0x7, 0),
        (0x7, 1),
        (0x7, 2),
        (0xa, 0),
        (0xb, 0),
        (0xd, 0),
        (0xd, 1),
        (0xd, 9),
        (0x14, 0),
        (0x1f, 0),
        (0x4000_0000, 0),
        (0x4000_0001, 0),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0004, 0),
        (0x8000_0006, 0),
        (0x8000_0007, 0),
        (0x8000_000a, 0),
        (0x8000_001d, 1),
        (0x8000_0021, 0),
    ];
    let values = prop::collection::vec(any::<[u32; 4]>(), FUNCTIONS.len());
    (values, 39u32..=52, prop::option::of(0..features(V3).count())).prop_map(|(values, address_bits, lost)| {
        let mut leaves = host("GenuineIntel");
        for ((function, index), [eax, ebx, ecx, edx]) in FUNCTIONS.into_iter().zip(values) {
            let leaf = leaves.entry(function, index);
            leaf.eax |= eax;
            leaf.ebx |= ebx;
            leaf.ecx |= ecx;
            leaf.edx |= edx;
        }
        leaves.entry(0x8000_0008, 0).eax = 57 << 8 | address_bits;
        if let Some((_, function, register, bit)) = lost.and_then(|lost| features(V3).nth(lost)) {
            *register.of_mut(leaves.entry(*function, 0)) &= !(1 << bit);
        }
        leaves
    })
}

/// Names of the features in some leaves.
fn names(leaves: &Leaves) -> BTreeSet<&'static str> {
    let has = |(_, function, register, bit): &&Feature| leaves.value(*function, 0, *register) >> bit & 1 == 1;
    features(V3).filter(has).map(|(name, ..)| *name).collect()
}

fn functions(leaves: &Leaves) -> BTreeSet<(u32, u32)> {
    leaves.0.iter().map(|leaf| (leaf.function, leaf.index)).collect()
}

#[test]
fn every_feature_has_one_bit_and_one_name() {
    let places: BTreeSet<_> =
        features(V3).map(|(_, function, register, bit)| (function, *register as u8, bit)).collect();
    let names: BTreeSet<_> = features(V3).map(|(name, ..)| name).collect();
    let count = features(V3).count();
    assert_eq!((places.len(), names.len()), (count, count));
}

#[test]
fn each_level_has_what_the_one_below_it_has() {
    let host = host("AuthenticAMD");
    let (v2, v3) = (leaves(V2, &host, 39).unwrap(), leaves(V3, &host, 39).unwrap());
    assert!(names(&v2).is_subset(&names(&v3)));
    let more: Vec<_> = names(&v3).difference(&names(&v2)).copied().collect();
    let expected =
        ["abm", "avx", "avx state", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "sse state", "x87 state", "xsave"];
    assert_eq!(more, expected);
}

/// Registers that guests of these models will see for ever: a change is another model.
#[test]
fn a_model_is_what_it_was() {
    let mut host = host("GenuineIntel");
    host.entry(0x7, 0).ebx = u32::MAX;
    host.entry(0x1, 0).ecx = u32::MAX;
    let v3 = leaves(V3, &host, 39).unwrap();
    let value = |function, index, register| v3.value(function, index, register);
    use Register::*;
    assert_eq!(value(0, 0, Eax), 0xd);
    assert_eq!(value(0x1, 0, Eax), 0x0003_06c3);
    assert_eq!(value(0x1, 0, Ecx), 0xb5f8_3201);
    assert_eq!(value(0x1, 0, Edx), 0x078b_fbfd);
    assert_eq!(value(0x7, 0, Ebx), 1 << 3 | 1 << 5 | 1 << 8);
    assert_eq!((value(0xd, 0, Eax), value(0xd, 0, Ecx), value(0xd, 1, Eax)), (7, 832, 0));
    assert_eq!((value(0xd, 2, Eax), value(0xd, 2, Ebx)), (256, 576));
    assert_eq!(value(0x8000_0001, 0, Ecx), 1 << 5 | 1);
    assert_eq!(value(0x8000_0001, 0, Edx), 0x2010_0800);
    assert_eq!(value(0x8000_0008, 0, Eax), 0x3027);
    assert_eq!(value(0x4000_0001, 0, Eax), 0x0100_7efb);
    assert_eq!(value(0x8000_0007, 0, Edx), 0, "no constant TSC is promised: the guest takes KVM's clock");
    let name = Model::of(&v3);
    assert_eq!(name.to_string(), "GenuineIntel family 0x6 model 0x3c stepping 3 (Quorate x86-64-v3 processor)");

    let v2 = leaves(V2, &host, 45).unwrap();
    assert_eq!(v2.value(0x1, 0, Ecx), 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 24 | 1 << 31);
    assert!(v2.get(0xd, 0).is_none() && v2.get(0x7, 0).is_none(), "no extended state, no newer features");
    assert_eq!(v2.value(0x8000_0008, 0, Eax), 0x302d);
    assert_eq!(Model::of(&v2).brand, "Quorate x86-64-v2 processor");
}

#[test]
fn what_is_missing_is_named_and_nothing_else() {
    for (name, function, register, bit) in features(V3) {
        let mut less = host("GenuineIntel");
        *register.of_mut(less.entry(*function, 0)) &= !(1 << bit);
        let error = leaves(V3, &less, 39).unwrap_err();
        assert_eq!(error.missing, [*name]);
        assert_eq!(leaves(V2, &less, 39).is_ok(), !features(V2).any(|(needed, ..)| needed == name), "{name}");
        assert!(leaves(CpuModel::Host, &less, 39).is_ok());
    }
    let mut old = host("GenuineIntel");
    old.entry(0x7, 0).ebx = 0;
    old.entry(0xd, 2).ebx = 640;
    let words = leaves(V3, &old, 49).unwrap_err().to_string();
    assert_eq!(
        words,
        "this host cannot run a guest of the model x86-64-v3, because its KVM does not offer bmi1, avx2, bmi2, \
         avx state of 256 bytes at 576, 49 bits of physical addresses; give the guest a lower model, or start it on \
         a host that can"
    );
    assert_eq!(leaves(V2, &old, 49).unwrap_err().missing, ["49 bits of physical addresses"]);
    assert!(leaves(V2, &Leaves::default(), 39).is_err());
}

/// Vendors differ in these leaves and in no others: signature, caches, and what AMD tells in places of its own.
#[test]
fn vendors_differ_in_their_own_leaves() {
    let (intel, amd) = (leaves(V3, &host("GenuineIntel"), 39).unwrap(), leaves(V3, &host("AuthenticAMD"), 39).unwrap());
    let own = [0, 0x1, 0x2, 0x4, 0x8000_0000, 0x8000_0001, 0x8000_0005, 0x8000_0006, 0x8000_001d, 0x8000_001e];
    for (function, index) in functions(&intel).union(&functions(&amd)) {
        let differs = intel.get(*function, *index) != amd.get(*function, *index);
        assert_eq!(differs, own.contains(function), "{function:#x}.{index}");
    }
    assert_eq!(Model::of(&amd).family, 0x17);
    assert_eq!(amd.value(0x8000_0001, 0, Register::Edx), 0x2010_0800 | 0x0183_f3ff & 0x078b_fbfd);
    let hygon = leaves(V3, &host("HygonGenuine"), 39).unwrap();
    assert_eq!(functions(&hygon), functions(&amd));
}

#[test]
fn the_caches_are_told_alike_in_both_forms() {
    let amd = leaves(V2, &host("AuthenticAMD"), 39).unwrap();
    let kib = |index| {
        let leaf = amd.get(0x8000_001d, index).unwrap();
        ((leaf.ebx >> 22) + 1) * ((leaf.ebx & 0xfff) + 1) * (leaf.ecx + 1) / 1024
    };
    assert_eq!([kib(0), kib(1), kib(2), kib(3)], [32, 32, 512, 16384]);
    assert_eq!(amd.get(0x8000_001d, 4), Some(&Leaf::zero(0x8000_001d, 4)), "the end of the list");
    assert_eq!(amd.value(0x8000_0005, 0, Register::Ecx) >> 24, 32);
    assert_eq!(amd.value(0x8000_0006, 0, Register::Ecx) >> 16, 512);
    assert_eq!((amd.value(0x8000_0006, 0, Register::Edx) >> 18) * 512, 16384);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever else a host has: what a guest of a model is told, its KVM supports; and any host that can run the model takes it.
    #[test]
    fn a_model_is_a_part_of_every_host_that_passes(first in any_host(), second in any_host(), high in any::<bool>(), vcpu in 0u16..6) {
        let model = if high { V3 } else { V2 };
        let (Ok(told), Ok(_)) = (leaves(model, &first, 39), leaves(model, &second, 39)) else {
            return Ok(());
        };
        let cpu = CpuConfig { model, sockets: 1, cores: 3, threads: 2 };
        let own = cpuid::for_vcpu(&told, cpu, vcpu);
        prop_assert_eq!(processor::check(&own, &first), Ok(()));
        prop_assert_eq!(processor::check(&own, &second), Ok(()));
    }

    /// Whatever two hosts differ in: the guest is told the same, and a host that lacks something says what.
    #[test]
    fn a_model_is_the_same_on_every_host(first in any_host(), second in any_host(), high in any::<bool>()) {
        let model = if high { V3 } else { V2 };
        let needed: BTreeSet<_> = features(model).map(|(name, ..)| *name).collect();
        match (leaves(model, &first, 39), leaves(model, &second, 39)) {
            (Ok(one), Ok(other)) => prop_assert_eq!(one, other),
            (Err(error), _) | (_, Err(error)) => {
                prop_assert!(!error.missing.is_empty());
                prop_assert!(error.missing.iter().all(|name| needed.contains(name.as_str())), "{}", error);
            }
        }
    }
}
