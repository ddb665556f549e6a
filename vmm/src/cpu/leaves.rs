//! CPUID as values: leaves of one processor, and the registers of a leaf.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// Functions that answer by ECX too, of those that are written here.
const HAVE_INDEX: [u32; 6] = [0x4, 0x7, 0xb, 0xd, 0x1f, 0x8000_001d];

/// One leaf of CPUID: KVM's own struct, field by field, so that a saved guest can be read by people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    pub function: u32,
    pub index: u32,
    /// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Leaf {
    pub fn zero(function: u32, index: u32) -> Self {
        let flags = if HAVE_INDEX.contains(&function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        Self { function, index, flags, eax: 0, ebx: 0, ecx: 0, edx: 0 }
    }
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let Leaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
        Self { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// All leaves of one processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Leaves(pub Vec<Leaf>);

impl From<&CpuId> for Leaves {
    fn from(cpuid: &CpuId) -> Self {
        Self(cpuid.as_slice().iter().map(Leaf::from).collect())
    }
}

impl Leaves {
    /// For KVM. `None` when there are more than it takes.
    pub fn to_kvm(&self) -> Option<CpuId> {
        let entries: Vec<_> = self.0.iter().map(kvm_cpuid_entry2::from).collect();
        CpuId::from_entries(&entries).ok().filter(|_| entries.len() <= kvm_bindings::KVM_MAX_CPUID_ENTRIES)
    }

    pub fn get(&self, function: u32, index: u32) -> Option<&Leaf> {
        self.0.iter().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// What a leaf tells in one of its registers; one that is not there tells zero.
    pub fn value(&self, function: u32, index: u32, register: Register) -> u32 {
        self.get(function, index).map_or(0, |leaf| register.of(leaf))
    }

    /// A leaf to write to. One that is not there begins with zeros.
    pub fn entry(&mut self, function: u32, index: u32) -> &mut Leaf {
        let at = self.0.iter().position(|leaf| leaf.function == function && leaf.index == index);
        let at = at.unwrap_or_else(|| {
            self.0.push(Leaf::zero(function, index));
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub fn of(self, leaf: &Leaf) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    pub fn of_mut(self, leaf: &mut Leaf) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}
