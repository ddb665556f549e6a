//! The site, its data centers, clusters, tokens, and remembered answers.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use crate::codec;
use crate::command::Actor;
use crate::ids::ClusterId;
use crate::ids::DataCenterId;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::SiteId;

/// blake3 of a public key or a certificate; safe to log and to show.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub fn of(bytes: &[u8]) -> Fingerprint {
        Fingerprint(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Site {
    pub id: SiteId,
    pub name: String,
    /// Fingerprint of the certificate authority's public key. The key itself is a file on voters (hazard H27).
    pub ca: Fingerprint,
    pub feature_level: u32,
    /// Batches up to here need not be kept; hosts let them go with their next snapshot.
    pub trimmed_upto: Seq,
    /// 3 or 5: how many hosts vote, where there are as many.
    pub voters: u8,
    /// Rises when the site is recovered after the loss of its majority.
    pub generation: u32,
    /// Where in the log that was; hosts that are older leave.
    pub recovered_at: Seq,
}

impl Site {
    pub const VOTERS: u8 = 3;
    pub const VOTERS_MAX: u8 = 5;
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataCenter {
    pub name: String,
    /// The storage pool manager's permit; its token is the seq of the grant.
    pub spm: Option<SpmPermit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpmPermit {
    pub host: HostId,
    pub token: Seq,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub data_center: DataCenterId,
    pub scheduling: SchedulingPolicy,
}

/// oVirt's policies by their oVirt names, with the properties that this release acts on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SchedulingPolicy {
    pub policy: PolicyName,
    /// Guests' memory in percent of a host's memory for guests; 100 = none promised twice.
    pub memory_overcommit_percent: u32,
    /// Guests' vCPUs in percent of a host's CPU threads; 1000 = ten vCPUs a thread.
    pub cpu_overcommit_percent: u32,
    /// A storage manager counts as this many guests (oVirt `SpmVmGrace`).
    pub spm_vm_grace: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    None,
    EvenlyDistributed,
    PowerSaving,
    VmEvenlyDistributed,
    ClusterMaintenance,
}

impl Default for SchedulingPolicy {
    fn default() -> Self {
        SchedulingPolicy {
            policy: PolicyName::EvenlyDistributed,
            memory_overcommit_percent: 100,
            cpu_overcommit_percent: 1000,
            spm_vm_grace: 5,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub purpose: TokenPurpose,
    /// blake3 of the secret; the secret was shown once, to the person who asked for it.
    pub secret_hash: [u8; 32],
    pub created_ms: u64,
    pub expires_ms: u64,
    pub note: String,
    pub status: TokenStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenPurpose {
    /// One host may join with it, once.
    Join,
    /// Bearer of the API with every right of an administrator.
    Admin,
    /// Bearer of the API who may only look.
    Viewer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenStatus {
    Valid,
    UsedBy(HostId),
    Revoked,
}

/// An idempotency key within its scope, the actor who chose it: blake3 of both, so that a comparison follows no pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RememberedKey([u8; 32]);

impl RememberedKey {
    pub fn of(actor: &Actor, key: &str) -> RememberedKey {
        RememberedKey(*blake3::hash(&codec::encode(&(actor, key))).as_bytes())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub body_hash: [u8; 32],
    pub seq: Seq,
    pub created: Option<Created>,
    pub at_ms: u64,
}

/// What a batch created, for the caller who needs its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Created {
    Host(HostId),
    Vm(crate::ids::VmId),
    Token(crate::ids::TokenId),
    Cluster(ClusterId),
}
