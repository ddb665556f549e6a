//! What the agent is asked, typed.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use serde_json::Value;
use serde_json::json;
use statemachine::state::GuestFilesystem;
use statemachine::state::GuestInterface;
use statemachine::state::GuestOs;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;

use super::AgentError;
use super::answers;
use super::answers::FilesystemUse;
use super::client::Done;
use super::client::GuestAgent;

/// An agent that is well answers a question in milliseconds.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Freezing writes back what the guest has in memory, and runs its administrators' hooks.
pub const FREEZE_WITHIN: Duration = Duration::from_secs(60);
/// An agent that refuses to shut down says so at once, and one that obeys says nothing.
pub const OBEYS_AFTER: Duration = Duration::from_secs(2);

/// The commands of QEMU's guest agent that hostd uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    Sync,
    Ping,
    Info,
    Interfaces,
    OsInfo,
    HostName,
    Filesystems,
    Shutdown,
    FreezeStatus,
    Freeze,
    Thaw,
    SetTime,
    Exec,
    ExecStatus,
}

impl Command {
    const ALL: [Command; 14] = [
        Command::Sync,
        Command::Ping,
        Command::Info,
        Command::Interfaces,
        Command::OsInfo,
        Command::HostName,
        Command::Filesystems,
        Command::Shutdown,
        Command::FreezeStatus,
        Command::Freeze,
        Command::Thaw,
        Command::SetTime,
        Command::Exec,
        Command::ExecStatus,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Command::Sync => "guest-sync-delimited",
            Command::Ping => "guest-ping",
            Command::Info => "guest-info",
            Command::Interfaces => "guest-network-get-interfaces",
            Command::OsInfo => "guest-get-osinfo",
            Command::HostName => "guest-get-host-name",
            Command::Filesystems => "guest-get-fsinfo",
            Command::Shutdown => "guest-shutdown",
            Command::FreezeStatus => "guest-fsfreeze-status",
            Command::Freeze => "guest-fsfreeze-freeze",
            Command::Thaw => "guest-fsfreeze-thaw",
            Command::SetTime => "guest-set-time",
            Command::Exec => "guest-exec",
            Command::ExecStatus => "guest-exec-status",
        }
    }

    fn named(name: &str) -> Option<Command> {
        Command::ALL.into_iter().find(|command| command.name() == name)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    PowerOff,
    Reboot,
    /// Stops the guest's system and leaves its machine on.
    Halt,
}

/// What the agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentInfo {
    pub version: Option<String>,
    /// Offered, not forbidden by the guest's configuration, and known here.
    pub supported: BTreeSet<Command>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestAgent<S> {
    pub async fn ping(&mut self) -> Result<(), AgentError> {
        self.question::<Done>(Command::Ping).await.map(|_| ())
    }

    /// Later requests that the agent does not offer are refused here, without a word to it.
    pub async fn info(&mut self) -> Result<AgentInfo, AgentError> {
        let raw: answers::RawInfo = self.question(Command::Info).await?;
        let enabled = raw.supported_commands.0.iter().filter(|command| command.enabled);
        let mut supported: BTreeSet<Command> = enabled.filter_map(|command| Command::named(&command.name)).collect();
        // They answered, whatever the list says.
        supported.extend([Command::Sync, Command::Info]);
        self.set_supported(supported.clone());
        Ok(AgentInfo { version: answers::text(&raw.version, 64), supported })
    }

    pub async fn host_name(&mut self) -> Result<Option<String>, AgentError> {
        self.question(Command::HostName).await.map(answers::RawHostName::clean)
    }

    pub async fn os(&mut self) -> Result<GuestOs, AgentError> {
        self.question(Command::OsInfo).await.map(answers::RawOs::clean)
    }

    pub async fn interfaces(&mut self) -> Result<BTreeSet<GuestInterface>, AgentError> {
        self.question(Command::Interfaces).await.map(answers::clean_interfaces)
    }

    pub async fn filesystems(&mut self) -> Result<(BTreeSet<GuestFilesystem>, Vec<FilesystemUse>), AgentError> {
        self.question(Command::Filesystems).await.map(answers::clean_filesystems)
    }

    /// Asks the guest to stop. That it does is seen by the vmm.
    pub async fn shutdown(&mut self, mode: ShutdownMode) -> Result<(), AgentError> {
        let mode = match mode {
            ShutdownMode::PowerOff => "powerdown",
            ShutdownMode::Reboot => "reboot",
            ShutdownMode::Halt => "halt",
        };
        let told = self.ask::<Done>(Command::Shutdown, Some(json!({ "mode": mode })), OBEYS_AFTER).await;
        match told {
            // An agent that obeys does not answer, and may be gone before it could.
            Ok(_) | Err(AgentError::Silent { command: Command::Shutdown, .. } | AgentError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether file systems are frozen, by the agent's hand.
    pub async fn is_frozen(&mut self) -> Result<bool, AgentError> {
        let status: String = self.question(Command::FreezeStatus).await?;
        match &*status {
            "frozen" => Ok(true),
            "thawed" => Ok(false),
            _ => Err(AgentError::Nonsense {
                command: Command::FreezeStatus,
                why: "neither frozen nor thawed".to_owned(),
            }),
        }
    }

    /// Returns how many file systems were frozen. Whatever it returns, [`thaw`](Self::thaw) has to follow: some may be frozen.
    pub(super) async fn freeze(&mut self) -> Result<u64, AgentError> {
        self.ask(Command::Freeze, None, FREEZE_WITHIN).await
    }

    /// Returns how many file systems were thawed; 0 when none was frozen any more.
    pub(super) async fn thaw(&mut self) -> Result<u64, AgentError> {
        self.question(Command::Thaw).await
    }

    /// Sets the guest's clock, which stood while the guest did. Its hardware clock follows.
    pub async fn set_time(&mut self, now: SystemTime) -> Result<(), AgentError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = i64::try_from(since.as_nanos()).unwrap_or(i64::MAX);
        self.ask::<Done>(Command::SetTime, Some(json!({ "time": nanoseconds })), ANSWER_WITHIN).await.map(|_| ())
    }

    async fn question<T: serde::de::DeserializeOwned>(&mut self, command: Command) -> Result<T, AgentError> {
        self.ask(command, None::<Value>, ANSWER_WITHIN).await
    }
}
