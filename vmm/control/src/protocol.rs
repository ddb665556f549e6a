//! The control socket: lines of JSON over a Unix stream socket of mode 0600.
//!
//! A client sends [`Request`]s, each with an id of its own; the vmm answers each with one [`Reply`] of that id, in order, and pushes
//! [`Notice`]s to every client in between. A line that comes from the vmm is a [`Message`]: it has `id` or `notice`.
//!
//! ```text
//! > {"id":1,"method":"confirm","params":{"epoch":41,"deadline_ns":8123456789}}
//! < {"id":1,"result":{"deadline_ns":8123456789}}
//! < {"notice":"paused","reason":"lease_expired","quiesced":true}
//! ```
//!
//! After the reply to `console_attach` the same connection carries the guest's console as raw bytes, both ways. After the reply to
//! `agent_attach` it carries the guest's port `org.qemu.guest_agent.0`: for one client at a time, and nothing is lost while both ends
//! are there. It ends when the guest closes the port or resets; what a client sends waits until the guest opens it
//! ([`Status::agent_open`]).
//!
//! A guest moves through two more streams. After the reply to `save_attach` the connection carries the saved guest to the client, and ends
//! with it; the guest stands still from the request on, whatever becomes of the stream, until `resume` or `power_off`:
//!
//! ```text
//!              save_attach            all is sent
//!   (runs) -----------------> saving ------------> saved
//!      ^                        |  client is gone, disk or KVM fails     | save_attach: once more
//!      |                        v                                        v
//!      +------- resume ------ failed                                   saving
//! ```
//!
//! With `live` it runs on while its memory is copied, and stands from the notice `paused` on, for the last of it. When that does not come
//! about (the client is gone, or the guest writes faster than it is copied), it goes on running and `saving` says why; then the next
//! `save_attach` begins anew, and `resume` forgets it.
//!
//! A process that was started with `--incoming` runs nothing. After the reply to `restore_attach` the connection carries a saved guest to it.
//! When all of it is in its place (`loaded` in [`Status::incoming`], and a frame that says so on the connection), `run` names the
//! permit and starts it. A guest that cannot be taken over ends the process with [`crate::ExitReason::RestoreFailed`].
//!
//! Devices come and go while the guest runs. `plug_disk`, `plug_nic` and `unplug` are answered at once, with the device's slot and
//! address; a notice tells how it went on, for storage and guests may take any time, and [`Status::devices`] shows where it stands.
//! A client that does not know whether it was heard asks again: the same plug of the same device is answered the same and done once.
//!
//! ```text
//! > {"id":2,"method":"plug_disk","params":{"config":{"id":"data","path":"/dev/nbd1"}}}
//! < {"id":2,"result":{"id":"data","kind":"disk","slot":2,"address":"03:00.0","state":"plugging"}}
//! < {"notice":"plugged","id":"data","slot":2,"address":"03:00.0"}
//! > {"id":3,"method":"unplug","params":{"id":"data"}}
//! < {"id":3,"result":{"id":"data","kind":"disk","slot":2,"address":"03:00.0","state":"unplugging"}}
//! < {"notice":"unplugged","id":"data"}
//! ```
//!
//! The line of `plug_nic` carries the descriptor of the card's tap, that of `plug_disk` may carry those of the disk's files
//! ([`descriptor`](crate::descriptor)): a process in its sandbox opens nothing by itself. It lets go of a disk's files when the guest's lease
//! ends, and at the target of a migration it has none before the guest is its own. When it may have them it says so, in `files_wanted`
//! and with a notice, and `disk_files` brings them; from nobody else, and at no other time, does it take any.
//!
//! ```text
//! < {"notice":"files_wanted","disk":"root"}
//! > {"id":4,"method":"disk_files","params":{"epoch":41,"disk":"root"}}        with descriptors
//! < {"id":4,"result":{}}
//! ```
//!
//! Nothing is plugged, unplugged or changed from `save_attach` until `resume`, nor saved while a device comes or is taken away: the saved
//! guest has the devices that its header names. A guest that was asked for a device is saved with it, and still asked where it goes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::config::check_path;
use crate::{DeviceStatus, DiskConfig, NicConfig};

/// Grows when a method or field is added that an older vmm does not know. A vmm lives as long as its guest, so a newer
/// hostd meets older ones after each upgrade. 2: `agent_attach`, `taken`, `agent_open`. 3: `save_attach`,
/// `restore_attach`, `run`, `saving`, `incoming`; `guest_panicked`, `watchdog_expired` and the pauses for them, `panic`, `panics`,
/// `balloon_set`; `plug_disk`, `plug_nic`, `unplug`, `set_link`, `not_found`, `devices`, and the `slot` of a configuration's disks and
/// network cards. 4: `live`, which an older one ignores: it stops the guest at once. 5: `disk_files`, `files_wanted`.
pub const PROTOCOL_VERSION: u32 = 5;
/// The longest line in either direction, with its end.
pub const MAX_LINE_BYTES: usize = 64 << 10;
/// Clients at one time, consoles and the agent's included.
pub const MAX_CLIENTS: usize = 8;
/// The slowest that a guest may be told to be copied: slower it would not arrive.
pub const MIN_COPY_BYTES_PER_SECOND: u64 = 64 << 10;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Call {
    /// Who is there: [`Hello`].
    Hello,
    /// What the guest does: [`Status`].
    Status,
    /// Extends the lease, and resumes a guest that was paused by its end. Only for the epoch that this process runs under.
    Confirm { epoch: u64, deadline_ns: u64 },
    /// Stops the vCPUs. Independent of the lease: both must allow the guest to run.
    Pause,
    /// Ends a pause that was asked for, one that an I/O error caused (the failed requests are tried again), and one that a save left, with
    /// success or without. Refused as `not_now` while a save is under way: its connection must end first. A guest that stands for a
    /// migration stands on: its other end may run it by now (DESIGN §5), and only [`Call::GoOn`] says that it does not.
    Resume,
    /// The migration for which the guest stands came to nothing: it goes on, if nothing else holds it. For another migration, or none, nothing
    /// happens.
    GoOn { migration: u64 },
    /// Presses the ACPI power button.
    PowerButton,
    /// Ends the guest at once, as pulling the plug would; its disks are drained.
    PowerOff,
    /// Resets the guest. A repeated `id` is answered and does nothing, so a retry is safe.
    Reset { id: u64 },
    /// Asks the guest to make do with so much of its memory, from [`crate::balloon::MIN_BALLOON_TARGET_BYTES`] to all of it. It gives what
    /// it can when it can: `metrics.balloon` tells how far it is. Stays through a reset.
    BalloonSet { bytes: u64 },
    /// Turns this connection into the guest's console.
    ConsoleAttach,
    /// Turns this connection into the guest agent's port. Refused as `taken` while another client has it.
    AgentAttach,
    /// Turns this connection into the stream of the guest, which is stopped: at once, or with `live` at the end of the copy. Refused as
    /// `taken` while another client saves it.
    SaveAttach {
        /// The migration that it is for; told again in [`SaveStatus`], so that a client which is new here knows whose it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        migration: Option<u64>,
        /// Copies the guest while it runs. Left out, it is stopped at once.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        live: Option<LiveLimits>,
    },
    /// Turns this connection into the stream of the guest that comes. Once, and only in a process that waits for one.
    RestoreAttach,
    /// Runs the guest that was loaded, under this permit. Refused as `not_now` before that. Answered at once; whether the guest runs is in
    /// the status and in the notice `resumed`, and a permit that was used or disks that do not open end the process.
    Run {
        epoch: u64,
        /// The first deadline, for a guest of release class lease, and for no other.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ns: Option<u64>,
        /// As [`crate::VmmConfig::started_marker`], for this epoch.
        started_marker: PathBuf,
    },
    /// Counters, as one object.
    Metrics,
    /// Adds a disk to the running guest: [`DeviceStatus`]; then `plugged` or `plug_failed`. With the line come the disk's files, as
    /// for `disk_files`; a process that is not in a sandbox can do without.
    PlugDisk { config: Box<DiskConfig> },
    /// Brings the open files of a disk of [`Status::files_wanted`]: its own, then those under it, nearest first.
    DiskFiles { epoch: u64, disk: String },
    /// Adds a network card, whose tap comes with the line: [`DeviceStatus`]; then `plugged` or `plug_failed`.
    PlugNic { config: Box<NicConfig> },
    /// Asks the guest to give a device up: [`DeviceStatus`]; then `unplugged` when nothing of it is open any more, or `kept` when the
    /// guest says no. A guest may never say anything: asked again it is asked again, and `force` takes the device away, as pulling
    /// a card would. A reset ends the wait too. `not_found` when no device has the id, which is what is left of an unplug that is done.
    Unplug {
        id: String,
        #[serde(default)]
        force: bool,
    },
    /// Plugs the cable of a network card in, or pulls it. Holds over resets.
    SetLink { nic: String, up: bool },
}

impl Call {
    /// What is wrong with the values of a call, each by itself.
    fn check(&self) -> Result<(), String> {
        match self {
            Self::SaveAttach { live: Some(limits), .. } => limits.check(),
            Self::Run { epoch: 0, .. } => Err("no permit has the epoch 0".to_owned()),
            Self::Run { started_marker, .. } => {
                check_path("started_marker", started_marker).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// What it may cost to copy a guest while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveLimits {
    /// For how long the guest may stand while the last of its memory is sent: an aim, judged by the bandwidth that was measured.
    pub downtime_ms: u64,
    /// While the guest runs. The last of its memory goes as fast as it can. [`MIN_COPY_BYTES_PER_SECOND`] at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// From the first byte to the stop of the guest, or it is given up. Left out, 800 seconds for each GiB of memory, and 150 at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

impl Default for LiveLimits {
    fn default() -> Self {
        Self { downtime_ms: 300, bytes_per_second: None, timeout_ms: None }
    }
}

impl LiveLimits {
    fn check(&self) -> Result<(), String> {
        match self {
            Self { downtime_ms: 0, .. } => Err("a guest cannot be moved without a downtime".to_owned()),
            Self { bytes_per_second: Some(rate), .. } if *rate < MIN_COPY_BYTES_PER_SECOND => {
                Err(format!("bytes_per_second is {rate}, and at least {MIN_COPY_BYTES_PER_SECOND}"))
            }
            _ => Ok(()),
        }
    }
}

/// One line from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub id: u64,
    pub call: Call,
}

#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the line is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    #[error("the line is not a request: {what}")]
    NotARequest {
        /// The id, when at least that was readable, so that the answer can carry it.
        id: Option<u64>,
        what: String,
    },
}

/// The outer form. `params` may be left out by methods that take none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequest {
    id: u64,
    method: String,
    #[serde(default)]
    params: Value,
}

impl Request {
    /// One line, with its end.
    pub fn encode(&self) -> Vec<u8> {
        let mut line = json!(self.call);
        line["id"] = json!(self.id);
        encode_line(&line)
    }

    pub fn decode(line: &[u8]) -> Result<Self, ProtocolError> {
        if line.len() > MAX_LINE_BYTES {
            return Err(ProtocolError::TooLong);
        }
        let raw: RawRequest =
            serde_json::from_slice(line).map_err(|e| ProtocolError::NotARequest { id: None, what: e.to_string() })?;
        let no_params = match &raw.params {
            Value::Null => true,
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        let not_a_request = |what| ProtocolError::NotARequest { id: Some(raw.id), what };
        let with = |params| serde_json::from_value(json!({ "method": raw.method, "params": params }));
        let call: Result<Call, _> = match no_params {
            // A method takes none, or all of its own may be left out.
            true => serde_json::from_value(json!({ "method": raw.method })).or_else(|_| with(json!({}))),
            false => with(raw.params),
        };
        let call = call.map_err(|e| not_a_request(e.to_string()))?;
        call.check().map_err(not_a_request)?;
        Ok(Self { id: raw.id, call })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    BadRequest,
    /// `confirm` named another permit.
    WrongEpoch,
    /// `confirm` named a deadline that no lease can have, or that has passed.
    BadDeadline,
    /// The guest's release class has no lease.
    NoLease,
    /// The guest is ending or restarting.
    NotNow,
    /// Another client has what can be had once, or another device the slot or the id.
    Taken,
    /// No device has the id.
    NotFound,
    Failed,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub code: ErrorCode,
    pub message: String,
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
}

/// What the vmm tells without being asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
pub enum Notice {
    /// The vCPUs stand. For a lease, a second notice follows once the disks are quiet.
    Paused {
        reason: PauseReason,
        quiesced: bool,
    },
    Resumed,
    /// The guest restarts within this process, under the same epoch.
    Reset,
    /// The guest's kernel says so. What follows is the configuration's to decide. Once of each kind until the guest restarts.
    GuestPanicked {
        kind: PanicKind,
    },
    /// The guest has not kept its watchdog from running out. What follows is the configuration's to decide.
    WatchdogExpired,
    /// The guest ends; `exit.json` follows.
    ShuttingDown {
        reason: crate::ExitReason,
    },
    /// A device is in its slot, and the guest was told.
    Plugged {
        id: String,
        slot: u8,
        address: String,
    },
    /// A device that could not be opened. It is as if it had not been asked for.
    PlugFailed {
        id: String,
        message: String,
    },
    /// A device is gone: its disk is closed, its tap given back.
    Unplugged {
        id: String,
    },
    /// The guest was asked for a device, and keeps it.
    Kept {
        id: String,
    },
    /// A disk cannot be opened before its files are handed over.
    FilesWanted {
        disk: String,
    },
}

/// One line from the vmm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    Reply(Reply),
    Notice(Notice),
}

impl Reply {
    pub fn ok(id: u64, result: impl Serialize) -> Self {
        match serde_json::to_value(result) {
            Ok(result) => Self { id, result: Some(result), error: None },
            Err(e) => Self::error(id, ErrorCode::Failed, e.to_string()),
        }
    }

    pub fn error(id: u64, code: ErrorCode, message: impl Into<String>) -> Self {
        Self { id, result: None, error: Some(Fault { code, message: message.into() }) }
    }
}

impl Message {
    /// One line, with its end.
    pub fn encode(&self) -> Vec<u8> {
        encode_line(self)
    }

    pub fn decode(line: &[u8]) -> Result<Self, ProtocolError> {
        if line.len() > MAX_LINE_BYTES {
            return Err(ProtocolError::TooLong);
        }
        serde_json::from_slice(line).map_err(|e| ProtocolError::NotARequest { id: None, what: e.to_string() })
    }
}

fn encode_line(value: &impl Serialize) -> Vec<u8> {
    // Our types have string keys and no failing Serialize, which are the two ways this can fail.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    pub vm: Uuid,
    pub name: String,
    pub epoch: u64,
    pub pid: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// `pause` over the control socket.
    Requested,
    /// The lease ended. Goes before the others when several hold.
    LeaseExpired,
    /// A disk whose policy is to stop met an error; [`Status::io_error`] has it. Goes before the following. `resume` tries again.
    IoError,
    /// The guest is being saved, or was; [`Status::saving`] says which. Goes before the following.
    Saved,
    /// The guest has not been given to this process yet, or not been told to run; [`Status::incoming`] says which. Goes before
    /// the following.
    Incoming,
    /// The guest panicked, and the configuration says to pause it then. Goes before `requested`, and ends with `resume`.
    GuestPanicked,
    /// The guest's watchdog ran out, likewise.
    Watchdog,
}

/// What a guest's kernel reports at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PanicKind {
    /// It has panicked, and stays where it is or restarts by itself.
    Panicked,
    /// It has panicked, and its crash kernel takes over to write a dump. Never a reason to stop it.
    CrashKernel,
}

/// How far a save is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveState {
    Saving,
    /// All of it was handed over.
    Saved,
    /// [`SaveStatus::error`] says why.
    Failed,
}

/// The save that is under way, or was the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveStatus {
    pub state: SaveState,
    /// As in `save_attach`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Pages of 4 KiB that the guest has, that were looked at, and that had anything in them.
    pub pages_total: u64,
    pub pages_done: u64,
    pub pages_sent: u64,
    pub bytes_sent: u64,
    /// Of a live copy: 1 is the pass over all memory. 0 where the guest stood from the beginning.
    #[serde(default)]
    pub round: u64,
    /// Guest memory that is still to be sent, as far as it is known.
    #[serde(default)]
    pub remaining_bytes: u64,
    /// How fast the guest wrote to its memory in the last round.
    #[serde(default)]
    pub dirty_bytes_per_second: u64,
    /// The share of time for which the vCPUs are kept from running, so that the copy can catch up; at last, for a guest that stands.
    #[serde(default)]
    pub throttle_percent: u8,
    /// Of a live copy: from the order to stop until the guest stood, its disks were flushed and its devices read. The last of its memory
    /// follows. 0 before that.
    #[serde(default)]
    pub settled_us: u64,
    /// From the order to stop to the last byte. 0 before that.
    #[serde(default)]
    pub downtime_us: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncomingState {
    /// For `restore_attach`.
    Waiting,
    Loading,
    /// For `run`.
    Loaded,
}

/// The guest that comes. Gone once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingStatus {
    pub state: IncomingState,
    pub bytes_received: u64,
}

/// What a guest was paused for by a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFault {
    /// The disk's id.
    pub disk: String,
    /// The request and the error, in words.
    pub what: String,
    /// There is no space left: the usual reason, and one that more space ends.
    pub no_space: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RunState {
    Running,
    Paused { reason: PauseReason },
    ShuttingDown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    #[serde(flatten)]
    pub run: RunState,
    /// True when no vCPU runs, no I/O of a shared disk is in the kernel and shared disks are closed.
    pub quiesced: bool,
    /// The lease's deadline in nanoseconds of `CLOCK_BOOTTIME`; `None` for the other release classes.
    pub deadline_ns: Option<u64>,
    pub vcpus: u16,
    /// From the start of the process to the guest's write to the boot-timer port.
    pub boot_time_us: Option<u64>,
    /// Resident memory of this process that is not guest RAM; measured at most every half minute.
    pub overhead_bytes: Option<u64>,
    /// How often the guest was reset in this process.
    pub resets: u64,
    /// A program in the guest has the agent's port open. False from a vmm of protocol version 1.
    #[serde(default)]
    pub agent_open: bool,
    /// Present while an I/O error holds the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_error: Option<DiskFault>,
    /// Present from `save_attach` to `resume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saving: Option<SaveStatus>,
    /// Present in a process that was started with `--incoming`, until its guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<IncomingStatus>,
    /// Present when the guest's kernel has panicked since it last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic: Option<PanicKind>,
    /// How often it panicked in this process.
    #[serde(default)]
    pub panics: u64,
    /// How often its watchdog ran out in this process.
    #[serde(default)]
    pub watchdog_expired: u64,
    /// Disks and network cards, by slot. Empty from a vmm of protocol version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
    /// Disks that cannot be opened before their files are handed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files_wanted: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        for call in [
            Call::Hello,
            Call::Status,
            Call::Confirm { epoch: 4, deadline_ns: u64::MAX },
            Call::Reset { id: 9 },
            Call::GoOn { migration: 7 },
            Call::BalloonSet { bytes: 1 << 40 },
            Call::ConsoleAttach,
            Call::AgentAttach,
            Call::SaveAttach { migration: None, live: None },
            Call::SaveAttach { migration: Some(77), live: None },
            Call::SaveAttach { migration: Some(77), live: Some(LiveLimits::default()) },
            Call::SaveAttach {
                migration: None,
                live: Some(LiveLimits { downtime_ms: 20, bytes_per_second: Some(1 << 20), timeout_ms: Some(9) }),
            },
            Call::RestoreAttach,
            Call::Run { epoch: 42, deadline_ns: None, started_marker: "/started/42".into() },
            Call::Run { epoch: 42, deadline_ns: Some(7), started_marker: "/started/42".into() },
            Call::PlugDisk { config: Box::new(DiskConfig { id: "data".into(), slot: Some(3), ..Default::default() }) },
            Call::DiskFiles { epoch: 41, disk: "data".into() },
            Call::Unplug { id: "data".into(), force: true },
            Call::SetLink { nic: "lan".into(), up: false },
        ] {
            let request = Request { id: 3, call };
            let line = request.encode();
            assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            assert_eq!(Request::decode(&line).unwrap(), request);
        }
    }

    #[test]
    fn an_unplug_asks_unless_it_says_otherwise() {
        let request = Request::decode(br#"{"id":1,"method":"unplug","params":{"id":"data"}}"#).unwrap();
        assert_eq!(request.call, Call::Unplug { id: "data".into(), force: false });
    }

    #[test]
    fn a_copy_is_live_only_when_that_is_asked_for() {
        let call = |params: &str| {
            let line = format!(r#"{{"id":1,"method":"save_attach","params":{params}}}"#);
            Request::decode(line.as_bytes()).map(|request| request.call)
        };
        let stopped = Call::SaveAttach { migration: Some(7), live: None };
        assert_eq!(call(r#"{"migration":7}"#).unwrap(), stopped);
        for none in ["{}", "null"] {
            assert_eq!(call(none).unwrap(), Call::SaveAttach { migration: None, live: None });
        }
        let live = Call::SaveAttach { migration: None, live: Some(LiveLimits::default()) };
        assert_eq!(call(r#"{"live":{}}"#).unwrap(), live);
        assert!(call(r#"{"live":{"downtime_ms":0}}"#).is_err());
        assert!(call(r#"{"live":{"bytes_per_second":65535}}"#).is_err());
        assert!(call(r#"{"live":{"bytes_per_second":65536}}"#).is_ok());
    }

    #[test]
    fn empty_params_are_no_params() {
        for line in [
            r#"{"id":1,"method":"status"}"#,
            r#"{"id":1,"method":"status","params":{}}"#,
            r#"{"id":1,"method":"status","params":null}"#,
        ] {
            assert_eq!(Request::decode(line.as_bytes()).unwrap().call, Call::Status);
        }
        let save = br#"{"id":1,"method":"save_attach"}"#;
        assert_eq!(Request::decode(save).unwrap().call, Call::SaveAttach { migration: None, live: None });
    }

    #[test]
    fn nonsense_is_refused_with_the_id_where_it_has_one() {
        let unknown = Request::decode(br#"{"id":5,"method":"explode"}"#).unwrap_err();
        assert!(matches!(unknown, ProtocolError::NotARequest { id: Some(5), .. }));
        for line in [
            &b"not json"[..],
            br#"{"id":-1,"method":"status"}"#,
            br#"{"id":1,"method":"status","more":1}"#,
            br#"{"id":1,"method":"confirm"}"#,
            br#"{"id":1,"method":"confirm","params":{"epoch":"x","deadline_ns":1}}"#,
            br#"{"id":1,"method":"run","params":{"epoch":0,"started_marker":"/started/0"}}"#,
            br#"{"id":1,"method":"run","params":{"epoch":42,"started_marker":"started"}}"#,
            br#"{"id":1,"method":"run","params":{"epoch":42}}"#,
        ] {
            assert!(Request::decode(line).is_err());
        }
        assert!(matches!(Request::decode(&vec![b' '; MAX_LINE_BYTES + 1]), Err(ProtocolError::TooLong)));
    }

    #[test]
    fn replies_and_notices_are_told_apart() {
        let reply = Message::Reply(Reply::ok(1, 5));
        let notice = Message::Notice(Notice::Paused { reason: PauseReason::LeaseExpired, quiesced: true });
        for message in [reply, notice] {
            assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }
    }
}
