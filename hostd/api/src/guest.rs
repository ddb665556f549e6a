//! `/v1/vms/{vm}/agent`: what can be asked of the agent inside a guest (QEMU's `qemu-ga`).
//!
//! None of it enters the log: what a guest says of itself is in the VM's own view, and what it is asked to do is between the
//! administrator, the host and the guest. Nobody vouches for a guest's word.

use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;

/// Longest time that an [`Exec`] is waited for.
pub const MAX_EXEC_WAIT_S: u32 = 300;
pub const DEFAULT_EXEC_WAIT_S: u32 = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentHealth {
    /// No program in the guest has the agent's port open.
    Absent,
    Up,
    /// It has the port open, and does not answer.
    Silent,
}

/// `GET /v1/vms/{vm}/agent`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentView {
    pub health: AgentHealth,
    /// The agent's own version.
    pub version: Option<String>,
    /// Its file systems stand still for a snapshot.
    pub frozen: bool,
    pub filesystems: Vec<FilesystemView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FilesystemView {
    pub mountpoint: String,
    pub used_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
}

/// `POST /v1/vms/{vm}/agent/exec`: runs a program in the guest, as the user that the agent runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Path in the guest.
    #[schema(example = "/usr/bin/uptime")]
    pub path: String,
    #[serde(default)]
    pub arguments: Vec<String>,
    /// `NAME=value`; without any, the agent's own.
    #[serde(default)]
    pub environment: Vec<String>,
    /// What the program reads, in base64.
    #[serde(default)]
    pub input: String,
    /// Seconds to wait for its end, 30 by default. A program that takes longer goes on, and what it writes is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecAnswer {
    /// `false`: it ran on when the time was up.
    pub ended: bool,
    /// `None` when a signal ended it, or nothing yet.
    pub code: Option<i64>,
    pub signal: Option<i64>,
    /// In base64, 64 KiB at most.
    pub output: String,
    pub errors: String,
    /// There was more of either.
    pub cut: bool,
}

/// `POST /v1/vms/{vm}/agent/freeze`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Freeze {
    /// Thawed after so many seconds in any case; 10 by default, 60 at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Frozen {
    /// How many file systems stand still.
    pub filesystems: u64,
}

/// The guest did it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Obeyed {}
