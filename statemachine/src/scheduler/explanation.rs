//! Why a host was chosen: about 1 KB that is stored with the placement (DESIGN §6).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::Serialize;

use super::FilterName;
use super::WeightName;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::state::PolicyName;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub policy: PolicyName,
    /// The state that it was decided on.
    pub decided_on: Seq,
    pub considered: u32,
    pub chosen: Option<HostId>,
    /// Hosts that a filter excluded, by filter.
    pub filtered: Vec<FilterCount>,
    /// The best hosts, best first.
    pub best: Vec<RankedHost>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterCount {
    pub filter: FilterName,
    pub hosts: u32,
    /// A few of the reasons, each `host: reason`.
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankedHost {
    pub host: HostId,
    pub name: String,
    /// Sum of rank times factor over all units.
    pub total: u64,
    pub units: Vec<UnitRank>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitRank {
    pub unit: WeightName,
    pub factor: u32,
    /// The unit's own score; lower is better, as in oVirt.
    pub score: u64,
    pub rank: u32,
}

impl Explanation {
    /// How many ranked hosts are stored.
    pub const BEST_KEPT: usize = 8;
    const REASONS_KEPT: usize = 4;

    pub(super) fn nowhere(decided_on: Seq) -> Explanation {
        Explanation {
            policy: PolicyName::None,
            decided_on,
            considered: 0,
            chosen: None,
            filtered: Vec::new(),
            best: Vec::new(),
        }
    }

    /// One sentence for an error.
    pub fn summary(&self) -> String {
        if self.considered == 0 {
            return "its cluster has no host".to_owned();
        }
        let mut parts = Vec::new();
        for count in &self.filtered {
            parts.push(format!("{} excluded {} ({})", count.filter, count.hosts, count.reasons.join("; ")));
        }
        format!("of {} hosts, {}", self.considered, parts.join(", "))
    }
}

#[derive(Default)]
pub(super) struct FilterTally {
    counts: BTreeMap<FilterName, (u32, Vec<String>)>,
}

impl FilterTally {
    pub fn count(&mut self, filter: FilterName, host: &str, reason: String) {
        let (hosts, reasons) = self.counts.entry(filter).or_default();
        *hosts += 1;
        if reasons.len() < Explanation::REASONS_KEPT {
            reasons.push(format!("{host}: {reason}"));
        }
    }

    pub fn into_counts(self) -> Vec<FilterCount> {
        let count = |(filter, (hosts, reasons))| FilterCount { filter, hosts, reasons };
        self.counts.into_iter().map(count).collect()
    }
}
