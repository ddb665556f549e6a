//! A host as the log knows it.

use serde::Deserialize;
use serde::Serialize;

use crate::command::HostFacts;
use crate::ids::BootId;
use crate::ids::ClusterId;
use crate::state::Fingerprint;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    pub name: String,
    pub address: String,
    pub cluster: ClusterId,
    pub public_key: Fingerprint,
    /// The newest certificate that was issued to it.
    pub certificate: Option<Certificate>,
    pub facts: HostFacts,
    /// Incarnations that are over, newest last; a late word of one of them is dropped.
    pub previous_boots: Vec<BootId>,
    /// Highest counter of this boot's reports; older reports are dropped.
    pub report_counter: u64,
    /// What its administrator wants.
    pub administrative: Administrative,
    /// What the leader sees of it.
    pub liveness: Liveness,
    /// oVirt's range: -1 never, 0 .. 10, default 5.
    pub spm_priority: i8,
    pub usage: HostUsage,
    /// Hosts of one domain may fail together; empty: it shares none.
    pub failure_domain: String,
}

impl Host {
    pub const PREVIOUS_BOOTS_MAX: usize = 16;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    pub serial: String,
    pub fingerprint: Fingerprint,
    pub not_after_ms: u64,
}

/// Resources that a host offers to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Capacity {
    pub cpu_threads: u32,
    /// Memory for guests in MiB: what the host has, less what it keeps for itself.
    pub memory_mib: u64,
}

/// Resources that run permits on this host have taken, pending starts included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostUsage {
    pub vcpus: u32,
    pub memory_mib: u64,
    pub vms: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Administrative {
    Active,
    /// No new guests; reached `Maintenance` when the last one is gone.
    Maintenance,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Liveness {
    /// Joined, never reported.
    New,
    Alive,
    /// Silent for 5 s (DESIGN §5).
    Suspected,
    /// Silent for 10 s.
    Unreachable,
}
