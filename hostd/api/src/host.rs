//! `/v1/hosts`, and `/v1/spm`: the hosts and the storage duty that one of them has.

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use statemachine::BootId;
use statemachine::ClusterId;
use statemachine::DataCenterId;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::State;
use statemachine::state::Capacity;
use statemachine::state::Host;
use statemachine::state::HostUsage;
use statemachine::view::HostStatus;
use statemachine::view::host_status;
use utoipa::ToSchema;

use crate::time;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    #[schema(value_type = u64)]
    pub id: HostId,
    pub name: String,
    /// `ip:port`.
    pub address: String,
    /// oVirt's `VDSStatus`: `Up`, `Maintenance`, `Connecting`, `NonResponsive`, ...
    #[schema(value_type = String, example = "Up")]
    pub status: HostStatus,
    #[schema(value_type = u64)]
    pub cluster: ClusterId,
    pub cluster_name: String,
    /// Holds the storage duty of its data center.
    pub spm: bool,
    /// -1 never, 0 to 10.
    pub spm_priority: i8,
    /// Hosts of one domain may fail together; empty: it shares none.
    pub failure_domain: String,
    /// What it offers to guests.
    #[schema(value_type = Object)]
    pub capacity: Capacity,
    /// What run permits have taken, pending starts included.
    #[schema(value_type = Object)]
    pub usage: HostUsage,
    pub version: String,
    pub feature_level: u32,
    #[schema(value_type = String, format = Uuid)]
    pub boot: BootId,
    /// Timeout of its armed watchdog; without one, only power fencing releases its `lease` guests.
    pub watchdog_timeout_ms: Option<u32>,
    pub clock_runs_while_stopped: bool,
    pub certificate: Option<CertificateView>,
}

/// `PATCH /v1/hosts/{host}`: what is named changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HostPatch {
    /// -1 never, 0 to 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spm_priority: Option<i8>,
    /// Hosts of one domain may fail together; empty takes the host out of its domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_domain: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CertificateView {
    pub serial: String,
    /// blake3 of the certificate, hexadecimal.
    pub fingerprint: String,
    #[schema(value_type = String, format = DateTime)]
    pub not_after: Timestamp,
}

impl HostView {
    pub fn of(state: &State, id: HostId, host: &Host) -> HostView {
        let cluster = state.clusters.get(&host.cluster);
        let holds_spm = |center: DataCenterId| {
            state.data_centers.get(&center).and_then(|center| center.spm).is_some_and(|spm| spm.host == id)
        };
        HostView {
            id,
            name: host.name.clone(),
            address: host.address.clone(),
            status: host_status(host),
            cluster: host.cluster,
            cluster_name: cluster.map(|cluster| cluster.name.clone()).unwrap_or_default(),
            spm: cluster.is_some_and(|cluster| holds_spm(cluster.data_center)),
            spm_priority: host.spm_priority,
            failure_domain: host.failure_domain.clone(),
            capacity: host.facts.capacity,
            usage: host.usage,
            version: host.facts.version.clone(),
            feature_level: host.facts.feature_level,
            boot: host.facts.boot,
            watchdog_timeout_ms: host.facts.watchdog_timeout_ms,
            clock_runs_while_stopped: host.facts.clock_runs_while_stopped,
            certificate: host.certificate.as_ref().map(|certificate| CertificateView {
                serial: certificate.serial.clone(),
                fingerprint: certificate.fingerprint.to_string(),
                not_after: time::of_ms(certificate.not_after_ms),
            }),
        }
    }
}

/// Who has the storage duty of a data center.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SpmView {
    #[schema(value_type = u64)]
    pub data_center: DataCenterId,
    pub data_center_name: String,
    #[schema(value_type = Option<u64>)]
    pub host: Option<HostId>,
    pub host_name: Option<String>,
    /// The fencing token: seq of the grant.
    #[schema(value_type = Option<u64>)]
    pub token: Option<Seq>,
}

impl SpmView {
    pub fn all(state: &State) -> Vec<SpmView> {
        let views = state.data_centers.iter().map(|(id, center)| {
            let host = center.spm.map(|spm| spm.host);
            SpmView {
                data_center: *id,
                data_center_name: center.name.clone(),
                host,
                host_name: host.and_then(|host| state.hosts.get(&host)).map(|host| host.name.clone()),
                token: center.spm.map(|spm| spm.token),
            }
        });
        views.collect()
    }
}
