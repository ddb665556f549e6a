//! Why `decide` says no, in words for the person who asked: what happened, why, what to type next.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

use crate::ids::Epoch;
use crate::ids::MigrationId;
use crate::ids::Seq;
use crate::scheduler::Explanation;

/// The kinds of things that have names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Noun {
    Host,
    Vm,
    Token,
    Cluster,
    DataCenter,
}

impl fmt::Display for Noun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Noun::Host => "host",
            Noun::Vm => "vm",
            Noun::Token => "token",
            Noun::Cluster => "cluster",
            Noun::DataCenter => "data center",
        })
    }
}

/// Why a join or API token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenFault {
    Unknown,
    Expired,
    Used,
    Revoked,
    WrongPurpose,
}

impl fmt::Display for TokenFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenFault::Unknown => "this site never issued it, or it was altered",
            TokenFault::Expired => "it has expired",
            TokenFault::Used => "it was used by another host, and a token admits one host",
            TokenFault::Revoked => "it was revoked",
            TokenFault::WrongPurpose => "it is not a join token",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Error, Serialize, Deserialize)]
pub enum Rejection {
    #[error("this site is initialised already; add hosts with `quorate token create` here and `quorate join` there")]
    AlreadyInitialised,
    #[error("this site is not initialised; run `quorate init` on its first host")]
    NotInitialised,
    #[error("no {noun} is called {name}; `quorate {noun} list` shows what there is")]
    NotFound { noun: Noun, name: String },
    #[error("a {noun} called {name} exists already; choose another name")]
    NameTaken { noun: Noun, name: String },
    #[error("{field} is not acceptable: {why}")]
    Invalid { field: String, why: String },
    #[error("the token is refused: {fault}; ask for a new one with `quorate token create`")]
    TokenRefused { fault: TokenFault },
    #[error("{who} may not do this: {why}")]
    Forbidden { who: String, why: String },
    #[error("host {name} is in the wrong state: {why}")]
    HostState { name: String, why: String },
    #[error("vm {name} is in the wrong state: {why}")]
    VmState { name: String, why: String },
    #[error("no host can run vm {name}: {}", .explanation.summary())]
    NoHostFits { name: String, explanation: Box<Explanation> },
    #[error(
        "disk {path} of vm {name} is held by vm {holder}, which may write it; stop {holder}, or make the disk read-only or shareable"
    )]
    DiskInUse { name: String, path: String, holder: String },
    #[error("the address {mac} is that of a network card of vm {holder}; choose another, or none, and one is made")]
    MacInUse { mac: String, holder: String },
    #[error("{place} has {limit} migrations under way, and that is the limit; wait for one to end: `quorate vm list`")]
    MigrationLimit { place: String, limit: usize },
    #[error("migration {migration} of vm {name} is over")]
    StaleMigration { name: String, migration: MigrationId },
    #[error("the idempotency key was used for another request at seq {seq}; use a new key for a new request")]
    IdempotencyConflict { seq: Seq },
    #[error("the report is older than what is known and was dropped")]
    StaleReport,
    #[error("epoch {epoch} is not the current permit of vm {name}; the report was dropped")]
    StaleEpoch { name: String, epoch: Epoch },
    #[error(
        "host {name} was removed from this site at seq {at}; to use the machine again, wipe its state and join it with a new token"
    )]
    HostRemoved { name: String, at: Seq },
    #[error(
        "data center {name} has its storage manager on host {holder}; it is released by that host, or when that host is fenced"
    )]
    SpmHeld { name: String, holder: String },
    #[error(
        "this needs feature level {needed}, and the site is at {level} until every host that is not away supports it; install the newer \
         quorate on all hosts (`quorate host list` shows versions)"
    )]
    FeatureLevel { needed: u32, level: u32 },
}

/// What a rejection is, for HTTP statuses and exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejectionClass {
    NotFound,
    Invalid,
    Forbidden,
    Conflict,
    Capacity,
    /// A host's report that is too old; nobody needs to act.
    Stale,
}

impl Rejection {
    pub fn class(&self) -> RejectionClass {
        match self {
            Rejection::NotFound { .. } => RejectionClass::NotFound,
            Rejection::Invalid { .. } => RejectionClass::Invalid,
            Rejection::TokenRefused { .. } | Rejection::Forbidden { .. } | Rejection::HostRemoved { .. } => {
                RejectionClass::Forbidden
            }
            Rejection::NoHostFits { .. } | Rejection::MigrationLimit { .. } => RejectionClass::Capacity,
            Rejection::StaleReport | Rejection::StaleEpoch { .. } | Rejection::StaleMigration { .. } => {
                RejectionClass::Stale
            }
            Rejection::AlreadyInitialised
            | Rejection::NotInitialised
            | Rejection::NameTaken { .. }
            | Rejection::HostState { .. }
            | Rejection::VmState { .. }
            | Rejection::DiskInUse { .. }
            | Rejection::MacInUse { .. }
            | Rejection::IdempotencyConflict { .. }
            | Rejection::SpmHeld { .. }
            | Rejection::FeatureLevel { .. } => RejectionClass::Conflict,
        }
    }

    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Rejection::AlreadyInitialised => "already-initialised",
            Rejection::NotInitialised => "not-initialised",
            Rejection::NotFound { .. } => "not-found",
            Rejection::NameTaken { .. } => "name-taken",
            Rejection::Invalid { .. } => "invalid",
            Rejection::TokenRefused { .. } => "token-refused",
            Rejection::Forbidden { .. } => "forbidden",
            Rejection::HostState { .. } => "host-state",
            Rejection::VmState { .. } => "vm-state",
            Rejection::NoHostFits { .. } => "no-host-fits",
            Rejection::DiskInUse { .. } => "disk-in-use",
            Rejection::MacInUse { .. } => "mac-in-use",
            Rejection::MigrationLimit { .. } => "migration-limit",
            Rejection::StaleMigration { .. } => "stale-migration",
            Rejection::IdempotencyConflict { .. } => "idempotency-conflict",
            Rejection::StaleReport => "stale-report",
            Rejection::StaleEpoch { .. } => "stale-epoch",
            Rejection::HostRemoved { .. } => "host-removed",
            Rejection::SpmHeld { .. } => "spm-held",
            Rejection::FeatureLevel { .. } => "feature-level",
        }
    }
}
