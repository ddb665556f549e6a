//! Weights: which of the hosts that fit is best. Factors follow oVirt's internal policies.

use std::cmp::Reverse;
use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use super::Candidate;
use super::Question;
use super::RankedHost;
use super::UnitRank;
use super::filters;
use crate::state::PolicyName;

/// Append-only: it is stored in explanations. Names are oVirt's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WeightName {
    OptimalForEvenDistributionCpu,
    OptimalForEvenDistributionMemory,
    OptimalForPowerSavingCpu,
    OptimalForPowerSavingMemory,
    OptimalForEvenGuestDistribution,
}

impl fmt::Display for WeightName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Lower is better.
type Score = fn(&Question<'_>, &Candidate<'_>) -> u64;

struct Unit {
    name: WeightName,
    factor: u32,
    score: Score,
}

const EVEN_CPU: Unit = Unit { name: WeightName::OptimalForEvenDistributionCpu, factor: 2, score: promised_cpu };
const EVEN_MEMORY: Unit =
    Unit { name: WeightName::OptimalForEvenDistributionMemory, factor: 1, score: promised_memory };
const SAVING_CPU: Unit = Unit { name: WeightName::OptimalForPowerSavingCpu, factor: 2, score: free_cpu };
const SAVING_MEMORY: Unit = Unit { name: WeightName::OptimalForPowerSavingMemory, factor: 1, score: free_memory };
const EVEN_GUESTS: Unit = Unit { name: WeightName::OptimalForEvenGuestDistribution, factor: 1, score: guests };

fn units(policy: PolicyName) -> &'static [Unit] {
    match policy {
        PolicyName::None => &[],
        PolicyName::EvenlyDistributed | PolicyName::ClusterMaintenance => &[EVEN_CPU, EVEN_MEMORY],
        PolicyName::PowerSaving => &[SAVING_CPU, SAVING_MEMORY],
        PolicyName::VmEvenlyDistributed => &[EVEN_GUESTS],
    }
}

/// Hosts from best to worst.
pub(super) fn rank(question: &Question<'_>, candidates: &[Candidate<'_>]) -> Vec<RankedHost> {
    let mut ranked: Vec<RankedHost> = candidates
        .iter()
        .map(|it| RankedHost { host: it.id, name: it.host.name.clone(), total: 0, units: Vec::new() })
        .collect();
    for unit in units(question.cluster.scheduling.policy) {
        let scores: Vec<u64> = candidates.iter().map(|it| (unit.score)(question, it)).collect();
        let mut sorted = scores.clone();
        sorted.sort_unstable();
        for (host, score) in ranked.iter_mut().zip(scores) {
            let not_beaten = sorted.partition_point(|other| *other <= score);
            let rank = (sorted.len() - not_beaten) as u32;
            host.total += u64::from(rank) * u64::from(unit.factor);
            host.units.push(UnitRank { unit: unit.name, factor: unit.factor, score, rank });
        }
    }
    ranked.sort_by_key(|host| (Reverse(host.total), host.host));
    ranked
}

/// Promised vCPUs in thousandths of the host's limit, as they would be with this VM.
fn promised_cpu(question: &Question<'_>, candidate: &Candidate<'_>) -> u64 {
    let limit = filters::vcpu_limit(candidate.host, &question.cluster.scheduling).max(1);
    (u64::from(candidate.host.usage.vcpus) + u64::from(question.vm.spec.vcpus)) * 1000 / limit
}

fn promised_memory(question: &Question<'_>, candidate: &Candidate<'_>) -> u64 {
    let limit = filters::memory_limit_mib(candidate.host, &question.cluster.scheduling).max(1);
    candidate.host.usage.memory_mib.saturating_add(question.vm.spec.memory_mib).saturating_mul(1000) / limit
}

fn free_cpu(question: &Question<'_>, candidate: &Candidate<'_>) -> u64 {
    1000u64.saturating_sub(promised_cpu(question, candidate))
}

fn free_memory(question: &Question<'_>, candidate: &Candidate<'_>) -> u64 {
    1000u64.saturating_sub(promised_memory(question, candidate))
}

/// Guests on the host; a storage manager counts as some more (oVirt `SpmVmGrace`).
fn guests(question: &Question<'_>, candidate: &Candidate<'_>) -> u64 {
    let is_spm = question.state.data_centers.values().any(|dc| dc.spm.is_some_and(|spm| spm.host == candidate.id));
    let grace = if is_spm { question.cluster.scheduling.spm_vm_grace } else { 0 };
    u64::from(candidate.host.usage.vms) + u64::from(grace)
}
