//! `/v1/clusters`: what the hosts of a cluster have in common, and the rules of its guests.

use serde::Deserialize;
use serde::Serialize;
use statemachine::ClusterId;
use statemachine::State;
use statemachine::state::Cluster;
use statemachine::state::CpuModel;
use statemachine::state::MigrationPolicy;
use utoipa::ToSchema;

use crate::spec::MigrationPolicyBody;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    #[schema(value_type = u64)]
    pub id: ClusterId,
    pub name: String,
    pub hosts: usize,
    pub vms: usize,
    /// What a guest of model `cluster` gets that starts now: `host` where all hosts are alike; `cluster`: no host has said yet what it can run.
    #[schema(value_type = String, example = "x86-64-v3")]
    pub cpu: CpuModel,
    /// How its guests are moved that do not say themselves.
    #[schema(value_type = Object)]
    pub migration: MigrationPolicy,
}

impl ClusterView {
    pub fn of(state: &State, id: ClusterId, cluster: &Cluster) -> ClusterView {
        ClusterView {
            id,
            name: cluster.name.clone(),
            hosts: state.hosts.iter().filter(|(_, host)| host.cluster == id).count(),
            vms: state.vms.iter().filter(|(_, vm)| vm.cluster == id).count(),
            cpu: state.settled_model(id, CpuModel::Cluster),
            migration: state.migration_policies.get(&id).copied().unwrap_or_default().or(MigrationPolicy::DEFAULT),
        }
    }
}

/// `PATCH /v1/clusters/{id}`: what is left out stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationPolicyBody>,
}
