//! Programs that an administrator runs in a guest through its agent. Input, output and their number of words are bounded; a program
//! that runs on is asked after until its time is over, and then left to the guest: the agent cannot end it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;

use super::AgentError;
use super::client::GuestAgent;
use super::commands::ANSWER_WITHIN;
use super::commands::Command;

/// Of the path, all arguments and the environment together.
const MAX_WORDS_BYTES: usize = 32 << 10;
const MAX_INPUT_BYTES: usize = 64 << 10;
/// Kept of each of the two outputs.
pub const MAX_OUTPUT_BYTES: usize = 64 << 10;

/// A program and what it is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    pub path: String,
    pub arguments: Vec<String>,
    /// `NAME=value`; when empty the agent's own.
    pub environment: Vec<String>,
    pub input: Vec<u8>,
}

/// A program that the agent started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestPid(i64);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecStatus {
    Running,
    Exited(ExecOutcome),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutcome {
    /// `None` when a signal ended it.
    pub code: Option<i64>,
    pub signal: Option<i64>,
    pub output: Output,
    pub errors: Output,
}

/// What a program wrote, as it wrote it: whoever shows it to a terminal escapes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    pub bytes: Vec<u8>,
    /// There was more.
    pub cut: bool,
}

impl ExecRequest {
    pub fn check(&self) -> Result<(), AgentError> {
        let words = || std::iter::once(&self.path).chain(&self.arguments).chain(&self.environment);
        let bytes: usize = words().map(|word| word.len() + 1).sum();
        if bytes > MAX_WORDS_BYTES || words().any(|word| word.contains('\0')) || self.path.is_empty() {
            return Err(AgentError::BadArgument { what: "the command", limit: MAX_WORDS_BYTES });
        }
        if self.input.len() > MAX_INPUT_BYTES {
            return Err(AgentError::BadArgument { what: "the command's input", limit: MAX_INPUT_BYTES });
        }
        Ok(())
    }

    fn encode(&self) -> Value {
        let mut request = json!({ "path": self.path, "arg": self.arguments, "capture-output": true });
        if !self.environment.is_empty() {
            request["env"] = json!(self.environment);
        }
        if !self.input.is_empty() {
            request["input-data"] = json!(STANDARD.encode(&self.input));
        }
        request
    }
}

/// `guest-exec`.
#[derive(Debug, Deserialize)]
struct RawExec {
    pid: i64,
}

/// `guest-exec-status`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawStatus {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    #[serde(default)]
    out_data: String,
    #[serde(default)]
    err_data: String,
    #[serde(default)]
    out_truncated: bool,
    #[serde(default)]
    err_truncated: bool,
}

fn output(encoded: &str, truncated: bool) -> Result<Output, AgentError> {
    let nonsense = |why: String| AgentError::Nonsense { command: Command::ExecStatus, why };
    let mut bytes = STANDARD.decode(encoded).map_err(|error| nonsense(error.to_string()))?;
    let cut = truncated || bytes.len() > MAX_OUTPUT_BYTES;
    bytes.truncate(MAX_OUTPUT_BYTES);
    Ok(Output { bytes, cut })
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestAgent<S> {
    pub async fn exec(&mut self, request: &ExecRequest) -> Result<GuestPid, AgentError> {
        request.check()?;
        let raw: RawExec = self.ask(Command::Exec, Some(request.encode()), ANSWER_WITHIN).await?;
        Ok(GuestPid(raw.pid))
    }

    /// The agent forgets a program once it has told its end.
    pub async fn exec_status(&mut self, program: GuestPid) -> Result<ExecStatus, AgentError> {
        let arguments = json!({ "pid": program.0 });
        let raw: RawStatus = self.ask(Command::ExecStatus, Some(arguments), ANSWER_WITHIN).await?;
        if !raw.exited {
            return Ok(ExecStatus::Running);
        }
        Ok(ExecStatus::Exited(ExecOutcome {
            code: raw.exitcode,
            signal: raw.signal,
            output: output(&raw.out_data, raw.out_truncated)?,
            errors: output(&raw.err_data, raw.err_truncated)?,
        }))
    }
}
