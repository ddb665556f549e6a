//! The guest's agent: what hostd asks QEMU's guest agent, which runs in the guest as `qemu-ga`, and what it believes of the answers.
//!
//! The path: a stream of bytes from the vmm ([`crate::agent::vmm_client::raw_stream`]) -> [`wire`] (bounded lines, marks) -> [`client`]
//! (one request at a time, and a clean start after every doubt) -> [`commands`] (typed) -> [`answers`] (cleaned and bounded facts) ->
//! [`observer`] (pure: what to ask when, what is worth a report) -> [`task`] (one beside each guest), which reports facts.
//!
//! A guest is not trusted: each answer has a time limit, a length limit and a limit on how many things it lists; its words lose what
//! would move a terminal's cursor. What it says is shown and recorded, and decides nothing.
//!
//! [`freeze`] is the one state that must not be left behind: a guest whose file systems are frozen does not work. [`exec`] is for
//! administrators.
//!
//! [`agents`] is where the API finds them.
//!
//! Start reading at [`task::Attendant`].

pub mod agents;
pub mod answers;
pub mod client;
#[cfg(test)]
mod client_tests;
pub mod commands;
pub mod exec;
#[cfg(test)]
mod fake_guest;
pub mod freeze;
pub mod observer;
#[cfg(test)]
mod observer_tests;
pub mod task;
#[cfg(test)]
mod task_tests;
pub mod wire;

use std::io;
use std::time::Duration;

use thiserror::Error;

use self::commands::Command;

/// Why the agent did not do what it was asked.
#[derive(Debug, Error)]
pub enum AgentError {
    #[error("the guest agent is not connected; see that qemu-guest-agent is installed and runs in the guest")]
    Absent,
    #[error("the connection to the guest agent ended; the guest may be restarting, ask again in a few seconds")]
    Closed,
    #[error("cannot read from or write to the guest agent; ask again in a few seconds")]
    Io(#[source] io::Error),
    #[error("the guest agent did not answer {command} within {} s; see whether the guest hangs", within.as_secs())]
    Silent { command: Command, within: Duration },
    #[error("the guest agent's answer to {command} is longer than {limit} bytes and was not read; ask for less")]
    TooLong { command: Command, limit: usize },
    #[error("the guest agent's answer to {command} makes no sense ({why}); see which program answers in the guest")]
    Nonsense { command: Command, why: String },
    /// The guest's own words, cleaned.
    #[error("the guest agent refused {command}: {words}")]
    Refused { command: Command, words: String },
    #[error("the guest agent does not offer {command}; a newer one may, or its configuration in the guest forbids it")]
    Unsupported { command: Command },
    #[error("the input is not base64; encode it")]
    NotBase64,
    #[error("the guest's file systems are frozen for a snapshot; ask again when it is done")]
    Frozen,
    #[error(
        "the guest's file systems were thawed before they were asked to be; what was done meanwhile is not consistent"
    )]
    ThawedEarly,
    #[error("{what} is longer than {limit} bytes or holds a NUL; shorten it")]
    BadArgument { what: &'static str, limit: usize },
}

impl AgentError {
    /// Whether a new connection is needed.
    pub fn is_the_end(&self) -> bool {
        matches!(self, AgentError::Closed | AgentError::Io(_))
    }
}
