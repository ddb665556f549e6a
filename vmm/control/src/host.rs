//! What a host offers to guests, as `vmm processor` tells it. What follows from it for a cluster of hosts is the log's to decide.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpu::CpuModel;

/// The largest difference between two time stamp counters that a guest lives with where KVM cannot scale them: what NTP corrects.
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// Pages that the host keeps apart for who asks for them. Guest memory in them is the guest's from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    Mib2,
    Gib1,
}

impl HugePages {
    pub const ALL: [Self; 2] = [Self::Mib2, Self::Gib1];

    pub fn bytes(self) -> u64 {
        match self {
            Self::Mib2 => 2 << 20,
            Self::Gib1 => 1 << 30,
        }
    }
}

/// A host's processor. A guest keeps the vendor, so it moves only between hosts of one vendor, whatever its model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProcessor {
    /// As the processor says it: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// For people.
    pub model_name: String,
    /// Models that a guest can have here: `host` first, then the named ones in rising order.
    pub models: Vec<CpuModel>,
    /// Of all that a guest of the model `host` depends on, in hexadecimal digits. Where it is equal such a guest can go, as far as
    /// its features are concerned; where it is not, the vmm there compares and may still take it.
    pub fingerprint: String,
    /// The frequency of the time stamp counter, as KVM measured it at boot.
    pub tsc_khz: u32,
    /// KVM can give a guest another frequency than this.
    pub scales_tsc: bool,
    /// What a model needs that this KVM does not offer, in words, for each model that is not in `models`.
    pub missing: BTreeMap<CpuModel, Vec<String>>,
    /// Free huge pages, for each size that this kernel has.
    pub huge_pages: BTreeMap<HugePages, u64>,
}

/// Whether a guest whose time stamp counter counts `guest_khz` can run where it counts `here_khz`.
pub fn tsc_fits(guest_khz: u32, here_khz: u32, scales: bool) -> bool {
    let apart = u64::from(guest_khz.abs_diff(here_khz));
    scales || apart * 1_000_000 <= u64::from(here_khz) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;
    use CpuModel::*;

    fn host(models: &[CpuModel]) -> HostProcessor {
        HostProcessor {
            vendor: "GenuineIntel".into(),
            model_name: "Processor".into(),
            models: models.to_vec(),
            fingerprint: "aa".into(),
            tsc_khz: 2_000_000,
            scales_tsc: false,
            missing: BTreeMap::from([(X86_64V3, vec!["avx2".into()])]),
            huge_pages: BTreeMap::from([(HugePages::Mib2, 7)]),
        }
    }

    #[test]
    fn a_guest_goes_where_its_clock_is() {
        for (here_khz, scales, fits) in
            [(2_000_500, false, true), (2_000_600, false, false), (2_000_600, true, true), (0, false, false)]
        {
            assert_eq!(tsc_fits(2_000_000, here_khz, scales), fits, "{here_khz}");
        }
    }

    #[test]
    fn a_report_is_one_object_of_json() {
        let report = host(&[Host, X86_64V2]);
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<HostProcessor>(&text).unwrap(), report);
        for part in [r#""models":["host","x86-64-v2"]"#, r#"{"x86-64-v3":["avx2"]}"#, r#""huge_pages":{"mib2":7}"#] {
            assert!(text.contains(part), "{text}");
        }
    }
}
