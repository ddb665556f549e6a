//! A conversation with the agent: one request at a time, each with a deadline, and a clean start before the next one whenever it is
//! not certain that the last answer has been read.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tokio::time::timeout_at;

use super::AgentError;
use super::answers;
use super::commands::Command;
use super::wire::MARK;
use super::wire::Received;
use super::wire::WireError;

/// Longest answer that is read. The longest honest one is the output of a program.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;
/// An answer to `guest-sync-delimited` is a number.
const MAX_SYNC_BYTES: usize = 256;
/// An agent answers a sync at once, unless it is busy with an earlier request.
pub const SYNC_WITHIN: Duration = Duration::from_secs(5);
/// What JSON numbers of every agent hold.
const SYNC_ID_MASK: u64 = (1 << 53) - 1;

/// The agent of one guest over one connection.
#[derive(Debug)]
pub struct GuestAgent<S> {
    stream: S,
    received: Received,
    /// The next byte from the guest begins the answer to the next request.
    synced: bool,
    next_sync: u64,
    /// What it offers. Unknown before `guest-info`.
    supported: Option<BTreeSet<Command>>,
}

/// One line from the agent. `T` bounds what of it is kept.
#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return")]
    value: Option<T>,
    error: Option<Complaint>,
}

#[derive(Deserialize)]
struct Complaint {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// An answer without content. Whatever is in it is not read.
#[derive(Debug, Deserialize)]
pub struct Done {}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestAgent<S> {
    /// Over a connection on which anything may have been said before.
    pub fn new(stream: S) -> GuestAgent<S> {
        // Not from one: the answer to a sync of an earlier hostd must not look like ours.
        let next_sync = rand::random::<u64>() & SYNC_ID_MASK;
        GuestAgent { stream, received: Received::default(), synced: false, next_sync, supported: None }
    }

    pub fn supports(&self, command: Command) -> bool {
        self.supported.as_ref().is_none_or(|supported| supported.contains(&command))
    }

    pub(super) fn set_supported(&mut self, supported: BTreeSet<Command>) {
        self.supported = Some(supported);
    }

    /// Asks and waits for the answer. When it is cancelled or fails, the next request starts clean.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        command: Command,
        arguments: Option<Value>,
        within: Duration,
    ) -> Result<T, AgentError> {
        if !self.supports(command) {
            return Err(AgentError::Unsupported { command });
        }
        self.sync().await?;
        // Until the answer has been read, nothing is certain.
        self.synced = false;
        let exchange = async {
            self.send(command, arguments).await?;
            self.answer(command).await
        };
        let line = timeout_at(Instant::now() + within, exchange).await;
        let line = line.map_err(|_| AgentError::Silent { command, within })??;
        let nonsense = |why: String| AgentError::Nonsense { command, why };
        let answer: Answer<T> = serde_json::from_slice(&line).map_err(|error| nonsense(error.to_string()))?;
        match answer {
            Answer { error: Some(Complaint { class, desc }), .. } => {
                self.synced = true;
                let words = answers::text(&desc, answers::MAX_WORDS_BYTES);
                let words = words.or_else(|| answers::text(&class, answers::MAX_WORDS_BYTES));
                Err(AgentError::Refused { command, words: words.unwrap_or_else(|| "it does not say why".to_owned()) })
            }
            Answer { value: Some(value), error: None } => {
                self.synced = true;
                Ok(value)
            }
            Answer { value: None, error: None } => Err(nonsense("neither a result nor an error".to_owned())),
        }
    }

    /// Starts clean, if that is not certain: whatever the agent still has to say of earlier requests is skipped.
    pub async fn sync(&mut self) -> Result<(), AgentError> {
        if self.synced {
            return Ok(());
        }
        let command = Command::Sync;
        let id = self.next_sync;
        self.next_sync = (id + 1) & SYNC_ID_MASK;
        let exchange = async {
            // Ends what the agent may have of an unfinished request: it drops it, and may complain, which is skipped.
            self.stream.write_all(&[MARK]).await.map_err(AgentError::Io)?;
            self.send(command, Some(json!({ "id": id }))).await?;
            loop {
                let line = self.received.marked_line(&mut self.stream, MAX_SYNC_BYTES).await;
                let line = line.map_err(|error| lost(error, command, MAX_SYNC_BYTES))?;
                // Another number is the answer to an earlier sync; ours is still to come.
                if serde_json::from_slice::<Answer<u64>>(&line).is_ok_and(|answer| answer.value == Some(id)) {
                    return Ok(());
                }
            }
        };
        match timeout_at(Instant::now() + SYNC_WITHIN, exchange).await {
            Ok(result) => result?,
            Err(_) => return Err(AgentError::Silent { command, within: SYNC_WITHIN }),
        }
        self.synced = true;
        Ok(())
    }

    async fn send(&mut self, command: Command, arguments: Option<Value>) -> Result<(), AgentError> {
        let mut request = json!({ "execute": command.name() });
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        self.stream.write_all(&line).await.map_err(AgentError::Io)?;
        self.stream.flush().await.map_err(AgentError::Io)
    }

    async fn answer(&mut self, command: Command) -> Result<Vec<u8>, AgentError> {
        loop {
            let line = self.received.line(&mut self.stream, MAX_ANSWER_BYTES).await;
            let line = line.map_err(|error| lost(error, command, MAX_ANSWER_BYTES))?;
            if !line.trim_ascii().is_empty() {
                return Ok(line);
            }
        }
    }
}

fn lost(error: WireError, command: Command, limit: usize) -> AgentError {
    match error {
        WireError::Closed => AgentError::Closed,
        WireError::Io(error) => AgentError::Io(error),
        WireError::TooLong => AgentError::TooLong { command, limit },
    }
}
