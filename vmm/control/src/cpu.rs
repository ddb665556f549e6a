//! The processors of a guest: their model, and how they are arranged in sockets, cores and threads.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, invalid};

/// Local APICs are addressed in 8 bits, and 255 means all of them.
pub const MAX_APIC_ID: u32 = 254;

/// What a guest's processor can do. The named ones are levels of the x86-64 psABI: each has what the one before it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum CpuModel {
    /// Everything that this host's KVM offers. The guest moves only where all of that is.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// SSE4.2, SSSE3, POPCNT, CMPXCHG16B.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// AVX2, BMI, FMA, MOVBE, XSAVE.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

impl CpuModel {
    /// Those that are the same on every host, from the least to the most.
    pub const NAMED: [Self; 2] = [Self::X86_64V2, Self::X86_64V3];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A guest sees this for life: like its devices, it does not change while it runs or moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    #[serde(default)]
    pub model: CpuModel,
    pub sockets: u16,
    /// Of one socket.
    pub cores: u16,
    /// Of one core.
    pub threads: u16,
}

impl CpuConfig {
    /// One socket, and a core a vCPU.
    pub fn of(model: CpuModel, vcpus: u16) -> Self {
        Self { model, sockets: 1, cores: vcpus, threads: 1 }
    }

    /// The bits of an APIC id that number the threads of a core. A count that is not a power of two leaves ids free.
    pub fn thread_bits(&self) -> u32 {
        bits(self.threads)
    }

    /// The bits that number the cores of a socket, above those.
    pub fn core_bits(&self) -> u32 {
        bits(self.cores)
    }

    /// The APIC id of a vCPU. The threads of a core follow each other, and the cores of a socket.
    pub fn apic_id(&self, vcpu: u16) -> u32 {
        let (threads, cores) = (u32::from(self.threads.max(1)), u32::from(self.cores.max(1)));
        let vcpu = u32::from(vcpu);
        let (thread, core, socket) = (vcpu % threads, vcpu / threads % cores, vcpu / threads / cores);
        (socket << (self.core_bits() + self.thread_bits())) | (core << self.thread_bits()) | thread
    }

    /// Whether so many vCPUs can be arranged like this.
    pub(crate) fn check(&self, vcpus: u16) -> Result<(), ConfigError> {
        let Self { sockets, cores, threads, .. } = *self;
        let product = u64::from(sockets) * u64::from(cores) * u64::from(threads);
        if product != u64::from(vcpus) {
            let why = format!(
                "{sockets} sockets of {cores} cores of {threads} threads are {product} processors, and vcpus is {vcpus}"
            );
            return Err(invalid("cpu", why));
        }
        let highest = self.apic_id(vcpus.saturating_sub(1));
        if highest > MAX_APIC_ID {
            let why = format!(
                "the last processor would have the APIC id {highest}, above {MAX_APIC_ID}; \
                 make cores and threads powers of two, or fewer sockets"
            );
            return Err(invalid("cpu", why));
        }
        Ok(())
    }
}

fn bits(count: u16) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn arranged(sockets: u16, cores: u16, threads: u16) -> CpuConfig {
        CpuConfig { model: CpuModel::Host, sockets, cores, threads }
    }

    #[test]
    fn models_have_the_names_of_the_psabi() {
        for model in [CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3] {
            assert_eq!(serde_json::to_value(model).unwrap(), model.as_str());
        }
        assert!(CpuModel::NAMED.is_sorted());
    }

    #[test]
    fn a_core_that_is_not_a_power_of_two_leaves_ids_free() {
        let ids = |cpu: CpuConfig, vcpus: u16| (0..vcpus).map(|vcpu| cpu.apic_id(vcpu)).collect::<Vec<_>>();
        assert_eq!(ids(CpuConfig::of(CpuModel::Host, 5), 5), [0, 1, 2, 3, 4]);
        assert_eq!(ids(arranged(2, 3, 1), 6), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(arranged(2, 1, 3), 6), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(arranged(2, 3, 2), 12), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    /// All small arrangements: whatever shares a socket, a core or nothing is told by the id alone.
    #[test]
    fn ids_are_unique_and_their_levels_nest() {
        for (sockets, cores, threads) in
            (1..=7).flat_map(|s| (1..=9).flat_map(move |c| (1..=5).map(move |t| (s, c, t))))
        {
            let cpu = arranged(sockets, cores, threads);
            let vcpus = sockets * cores * threads;
            let (core_shift, socket_shift) = (cpu.thread_bits(), cpu.thread_bits() + cpu.core_bits());
            let ids: Vec<u32> = (0..vcpus).map(|vcpu| cpu.apic_id(vcpu)).collect();
            let count = |shift: u32| ids.iter().map(|id| id >> shift).collect::<BTreeSet<_>>().len();
            assert_eq!(count(0), usize::from(vcpus), "{cpu:?}");
            assert_eq!(count(core_shift), usize::from(sockets * cores), "{cpu:?}");
            assert_eq!(count(socket_shift), usize::from(sockets), "{cpu:?}");
            assert!(ids.is_sorted(), "the boot processor is the first, and has the id 0: {cpu:?}");
            assert_eq!(ids[0], 0);
            for (vcpu, id) in ids.iter().enumerate() {
                assert_eq!((id >> socket_shift) as usize, vcpu / usize::from(cores * threads), "{cpu:?}");
            }
            assert_eq!(cpu.check(vcpus).is_ok(), ids.iter().all(|id| *id <= MAX_APIC_ID), "{cpu:?}");
        }
    }
}
