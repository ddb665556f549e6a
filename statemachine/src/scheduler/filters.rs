//! Filters: what excludes a host. Names and order follow oVirt's units; the first objection counts.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use super::Candidate;
use super::Question;
use crate::mutant;
use crate::mutant::Mutant;
use crate::state::Administrative;
use crate::state::Host;
use crate::state::Liveness;
use crate::state::Migration;
use crate::state::PolicyName;
use crate::state::SchedulingPolicy;

/// Append-only: it is stored in explanations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FilterName {
    /// The host is not `Up`: oVirt looks at such hosts before any unit.
    HostStatus,
    ClusterInMaintenance,
    PinToHost,
    Cpu,
    CpuOverload,
    Memory,
    /// Level 3: a running guest does not go to its own host, nor where enough are on their way to already.
    Migration,
    /// Level 3: the host's processor has not what the guest's is to have.
    Processor,
}

impl fmt::Display for FilterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FilterName::HostStatus => "HostStatus",
            FilterName::ClusterInMaintenance => "ClusterInMaintenance",
            FilterName::PinToHost => "PinToHost",
            FilterName::Cpu => "CPU",
            FilterName::CpuOverload => "CpuOverload",
            FilterName::Memory => "Memory",
            FilterName::Migration => "Migration",
            FilterName::Processor => "Processor",
        })
    }
}

type Objection = Option<String>;
type Filter = fn(&Question<'_>, &Candidate<'_>) -> Objection;

const FILTERS: &[(FilterName, Filter)] = &[
    (FilterName::PinToHost, pin_to_host),
    (FilterName::Migration, migration),
    (FilterName::HostStatus, host_status),
    (FilterName::ClusterInMaintenance, cluster_in_maintenance),
    (FilterName::Processor, processor),
    (FilterName::Cpu, cpu),
    (FilterName::CpuOverload, cpu_overload),
    (FilterName::Memory, memory),
];

pub(super) fn first_objection(question: &Question<'_>, candidate: &Candidate<'_>) -> Option<(FilterName, String)> {
    FILTERS.iter().find_map(|(name, filter)| filter(question, candidate).map(|reason| (*name, reason)))
}

fn pin_to_host(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let pinned = question.pinned?;
    (pinned != candidate.id).then(|| "another host was asked for".to_owned())
}

fn migration(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let permit = question.vm.permit?;
    if permit.host == candidate.id {
        return Some("the guest is there".to_owned());
    }
    let into = question.state.all_moving().filter(|(_, other)| other.to == candidate.id).count();
    (into >= Migration::MAX_INTO_HOST).then(|| format!("{into} guests are on their way to it"))
}

fn host_status(_: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    if candidate.host.administrative == Administrative::Maintenance {
        return Some("in maintenance".to_owned());
    }
    match candidate.host.liveness {
        Liveness::Alive => None,
        Liveness::New => Some("has not reported yet".to_owned()),
        Liveness::Suspected | Liveness::Unreachable => Some("does not answer".to_owned()),
    }
}

fn cluster_in_maintenance(question: &Question<'_>, _: &Candidate<'_>) -> Objection {
    let maintenance = question.cluster.scheduling.policy == PolicyName::ClusterMaintenance;
    (maintenance && question.vm.permit.is_none() && !question.vm.spec.highly_available)
        .then(|| "the cluster is in maintenance and starts highly available VMs only".to_owned())
}

/// Hosts that have not said what they can run are taken at their word later: their vmm refuses what it cannot be.
fn processor(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let there = question.state.processors.get(&candidate.id)?;
    let model = question.state.settled_model(question.vm.cluster, question.spec().cpu.model);
    if !there.runs(model) {
        return Some(format!("its processor cannot be {}", model.name()));
    }
    let from = question.state.processors.get(&question.vm.permit?.host)?;
    there.takes(model, from).err().map(str::to_owned)
}

/// A guest never has more vCPUs than its host has threads.
fn cpu(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let (wanted, threads) = (question.spec().vcpus, candidate.host.facts.capacity.cpu_threads);
    (wanted > threads).then(|| format!("{wanted} vCPUs wanted, {threads} CPU threads there"))
}

fn cpu_overload(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let limit = vcpu_limit(candidate.host, &question.cluster.scheduling);
    let used = u64::from(candidate.host.usage.vcpus);
    let wanted = u64::from(question.spec().vcpus);
    (used + wanted > limit).then(|| format!("{wanted} vCPUs wanted, {} of {limit} free", limit.saturating_sub(used)))
}

fn memory(question: &Question<'_>, candidate: &Candidate<'_>) -> Objection {
    let limit = memory_limit_mib(candidate.host, &question.cluster.scheduling);
    let used = if mutant::is_on(Mutant::CapacityIgnoresPending) { 0 } else { candidate.host.usage.memory_mib };
    let wanted = question.spec().memory_mib;
    (used.saturating_add(wanted) > limit)
        .then(|| format!("{wanted} MiB wanted, {} of {limit} MiB free", limit.saturating_sub(used)))
}

/// vCPUs that may be promised on a host (invariant R3).
pub(crate) fn vcpu_limit(host: &Host, policy: &SchedulingPolicy) -> u64 {
    u64::from(host.facts.capacity.cpu_threads) * u64::from(policy.cpu_overcommit_percent) / 100
}

/// Memory that may be promised on a host, MiB (invariant R3).
pub(crate) fn memory_limit_mib(host: &Host, policy: &SchedulingPolicy) -> u64 {
    host.facts.capacity.memory_mib.saturating_mul(u64::from(policy.memory_overcommit_percent)) / 100
}

/// Do the promises made on a host stay within its policy?
pub(crate) fn within_limits(host: &Host, policy: &SchedulingPolicy) -> bool {
    u64::from(host.usage.vcpus) <= vcpu_limit(host, policy) && host.usage.memory_mib <= memory_limit_mib(host, policy)
}
