//! `GET /v1/status`: one look at a host and at the cluster as it sees it.

use serde::Deserialize;
use serde::Serialize;
use statemachine::BootId;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::State;
use statemachine::view::HostStatus;
use statemachine::view::VmStatus;
use statemachine::view::host_status;
use statemachine::view::vm_status;
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub version: String,
    /// Name of this host, from its configuration until it belongs to a site.
    pub host_name: String,
    pub address: String,
    #[schema(value_type = String, format = Uuid)]
    pub boot: BootId,
    /// `None`: uninitialised; `quorate init` or `quorate join` comes next.
    pub member: Option<MemberStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberStatus {
    #[schema(value_type = String, format = Uuid)]
    pub site: SiteId,
    pub site_name: String,
    #[schema(value_type = u64)]
    pub host: HostId,
    pub role: Role,
    /// The leader that this host follows; `None` while there is none.
    #[schema(value_type = Option<u64>)]
    pub leader: Option<HostId>,
    pub leader_name: Option<String>,
    #[schema(value_type = Vec<u64>)]
    pub voters: Vec<HostId>,
    #[schema(value_type = Vec<u64>)]
    pub learners: Vec<HostId>,
    #[schema(value_type = u64)]
    pub applied_seq: Seq,
    pub feature_level: u32,
    pub counts: Counts,
    /// Sentences for a person: what is wrong now, and what to do.
    pub alarms: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    /// Holds the log and does not vote.
    Learner,
    /// No member of the Raft group: takes what was committed from one.
    Puller,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    pub hosts: u32,
    pub hosts_up: u32,
    pub vms: u32,
    pub vms_up: u32,
    /// VMs whose host does not answer.
    pub vms_unknown: u32,
}

impl Counts {
    pub fn of(state: &State) -> Counts {
        let mut counts = Counts::default();
        for (_, host) in state.hosts.iter() {
            counts.hosts += 1;
            counts.hosts_up += u32::from(host_status(host) == HostStatus::Up);
        }
        for (id, vm) in state.vms.iter() {
            let status = vm_status(state, *id, vm);
            counts.vms += 1;
            counts.vms_up += u32::from(status == VmStatus::Up);
            counts.vms_unknown += u32::from(status == VmStatus::Unknown);
        }
        counts
    }
}
