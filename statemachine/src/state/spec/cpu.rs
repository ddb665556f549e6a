//! The virtual processor.

use serde::Deserialize;
use serde::Serialize;

/// What of a processor the guest sees, and how much of the host's it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cpu {
    pub model: CpuModel,
    /// `None`: one socket, a core a vCPU.
    pub topology: Option<Topology>,
    /// The guest's part of a busy host's processors, beside other guests: cgroup v2's `cpu.weight`. `None`: 100.
    pub weight: Option<u32>,
    /// At most so much of a host's processors, in percent of one CPU thread: cgroup v2's `cpu.max`.
    pub cap_percent: Option<u32>,
}

impl Cpu {
    /// What the kernel takes.
    pub const MAX_WEIGHT: u32 = 10_000;
    /// Less of a thread, and a guest does not get through its timers.
    pub const MIN_CAP_PERCENT: u32 = 5;
}

/// Features of the virtual processor. A guest moves only between hosts that have all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum CpuModel {
    /// What the hosts of the cluster have in common, settled when the guest starts: all of it where they are alike, or else the highest of
    /// the named ones that all can run.
    #[default]
    #[serde(rename = "cluster")]
    Cluster,
    /// All that its host has.
    #[serde(rename = "host")]
    Host,
    /// The levels of the x86-64 psABI.
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl CpuModel {
    /// Those that mean the same on every host, the highest first.
    pub const NAMED: [CpuModel; 2] = [CpuModel::V3, CpuModel::V2];

    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Cluster => "cluster",
            CpuModel::Host => "host",
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
        }
    }
}

/// Sockets, cores of each, threads of each core: together the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

impl Topology {
    pub fn vcpus(self) -> Option<u32> {
        self.sockets.checked_mul(self.cores)?.checked_mul(self.threads)
    }
}

/// What guest memory is made of on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MemoryPages {
    /// Whatever the kernel gives; large ones where it can.
    #[default]
    #[serde(rename = "any")]
    Any,
    /// Huge pages that the host has set aside for guests.
    #[serde(rename = "2MiB")]
    Mib2,
    #[serde(rename = "1GiB")]
    Gib1,
}

impl MemoryPages {
    /// Guest memory is a whole number of them.
    pub fn mib(self) -> u64 {
        match self {
            MemoryPages::Any | MemoryPages::Mib2 => 2,
            MemoryPages::Gib1 => 1024,
        }
    }
}

/// What a host's processor can be to guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostProcessor {
    pub vendor: String,
    pub model_name: String,
    /// The named ones that it can run.
    pub models: Vec<CpuModel>,
    /// Of all that a guest of model `host` depends on: such a guest moves between hosts that have the same.
    pub fingerprint: String,
    /// The frequency of its time stamp counter, and whether it can give a guest another one.
    pub tsc_khz: u32,
    pub scales_tsc: bool,
}

impl HostProcessor {
    pub const MAX_WORDS: usize = 128;
    /// Since when it is reported.
    pub const FEATURE_LEVEL: u32 = 3;

    /// The largest difference between two time stamp counters that a guest lives with where they cannot be scaled, in millionths: what NTP
    /// corrects.
    const TSC_TOLERANCE_PPM: u64 = 250;

    /// Whether a guest that runs on `first` with this model can come here. It keeps its vendor and the frequency of its counter. Advice: the
    /// vmm there decides by the guest itself.
    pub fn takes(&self, model: CpuModel, first: &HostProcessor) -> Result<(), &'static str> {
        let apart = u64::from(self.tsc_khz.abs_diff(first.tsc_khz)) * 1_000_000;
        match model {
            CpuModel::Cluster | CpuModel::Host if self.fingerprint != first.fingerprint => {
                Err("the guest has all of its host's processor, and this one is another")
            }
            _ if self.vendor != first.vendor => Err("its processor is another vendor's"),
            _ if !self.scales_tsc && apart > u64::from(self.tsc_khz) * Self::TSC_TOLERANCE_PPM => {
                Err("its time stamp counter has another frequency, and cannot be scaled")
            }
            _ => Ok(()),
        }
    }

    pub fn runs(&self, model: CpuModel) -> bool {
        match model {
            CpuModel::Cluster | CpuModel::Host => true,
            named => self.models.contains(&named),
        }
    }
}

/// What they have in common: everything where they are alike, because a named model lacks what is newer than it; or the highest named model
/// that all can run. `None` when nothing is known, or when they have none in common.
pub fn common_model<'a>(processors: impl Iterator<Item = &'a HostProcessor> + Clone) -> Option<CpuModel> {
    let first = processors.clone().next()?;
    if processors.clone().all(|processor| processor.fingerprint == first.fingerprint) {
        return Some(CpuModel::Host);
    }
    CpuModel::NAMED.into_iter().find(|model| processors.clone().all(|processor| processor.runs(*model)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(models: &[CpuModel]) -> HostProcessor {
        HostProcessor {
            vendor: "AuthenticAMD".to_owned(),
            model_name: "a processor".to_owned(),
            models: models.to_vec(),
            fingerprint: "1".to_owned(),
            tsc_khz: 2_000_000,
            scales_tsc: false,
        }
    }

    #[test]
    fn a_guest_goes_where_its_processor_and_its_clock_are() {
        let first = processor(&[CpuModel::V3]);
        let with = |change: fn(&mut HostProcessor)| {
            let mut other = first.clone();
            change(&mut other);
            let takes = |model| other.takes(model, &first).is_ok();
            (takes(CpuModel::Host), takes(CpuModel::V3))
        };
        assert_eq!(with(|_| {}), (true, true));
        assert_eq!(with(|it| it.fingerprint = "2".to_owned()), (false, true));
        assert_eq!(with(|it| it.vendor = "GenuineIntel".to_owned()), (false, false));
        assert_eq!(with(|it| it.tsc_khz = 2_000_500), (true, true));
        assert_eq!(with(|it| it.tsc_khz = 2_000_501), (false, false));
        assert_eq!(with(|it| (it.tsc_khz, it.scales_tsc) = (3_000_000, true)), (true, true));
    }

    #[test]
    fn a_cluster_has_the_model_that_its_weakest_host_can_run() {
        let other =
            |models: &[CpuModel], print: &str| HostProcessor { fingerprint: print.to_owned(), ..processor(models) };
        let (new, newer) = (other(&[CpuModel::V2, CpuModel::V3], "a"), other(&[CpuModel::V2, CpuModel::V3], "b"));
        let (old, ancient) = (other(&[CpuModel::V2], "c"), other(&[], "d"));
        let common = |hosts: &[&HostProcessor]| common_model(hosts.iter().copied());
        assert_eq!(common(&[&new, &new]), Some(CpuModel::Host), "nothing is lost where all are alike");
        assert_eq!(common(&[&new, &newer]), Some(CpuModel::V3));
        assert_eq!(common(&[&new, &old]), Some(CpuModel::V2));
        assert_eq!(common(&[&new, &old, &ancient]), None);
        assert_eq!(common(&[]), None);
    }
}
