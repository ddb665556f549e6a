//! What the command line asks of the lab's daemon: JSON lines on a Unix socket, one request a
//! connection, answered by progress lines and one last line.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::state::HostId;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Is the daemon there?
    Hello,
    /// Powers on every host that is off and waits until all answer.
    Up {
        timeout_s: u64,
    },
    Status,
    Exec {
        host: HostId,
        argv: Vec<String>,
        input: String,
        timeout_s: u64,
    },
    Push {
        host: HostId,
        source: String,
        destination: String,
    },
    Power {
        host: HostId,
        action: PowerAction,
        wait_s: Option<u64>,
    },
    Net {
        host: HostId,
        change: LinkChange,
    },
    Disk {
        host: HostId,
        export: String,
        hang: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PowerAction {
    /// Mains gone: the host ends at once, and its disks lose what was not flushed.
    Off,
    On,
    /// The reset button; disks keep what they hold.
    Reset,
    /// QMP stop: the host and its clock stand still.
    Pause,
    Resume,
    /// SIGSTOP: the host stands still and its clock runs on.
    Stall,
    Unstall,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "link", rename_all = "lowercase")]
pub enum LinkChange {
    Cut,
    Heal,
    Delay { ms: u32 },
    Loss { percent: u8 },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    Progress { text: String },
    Done { value: Value },
    Failed { error: String },
}

/// Asks the daemon and answers its last word; progress goes to `say`.
pub async fn ask(socket: &Path, request: &Request, say: &mut dyn FnMut(&str)) -> Result<Value> {
    let stream = UnixStream::connect(socket)
        .await
        .context("no lab is up here: run `lab up` (or `lab down` first, when one broke)")?;
    let (reader, mut writer) = stream.into_split();
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    writer.write_all(&line).await.context("ask the lab's daemon")?;
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await.context("hear the lab's daemon")? {
        match serde_json::from_str(&line).context("the daemon's answer")? {
            Reply::Progress { text } => say(&text),
            Reply::Done { value } => return Ok(value),
            Reply::Failed { error } => bail!(error),
        }
    }
    bail!("the lab's daemon ended: see logs/daemon.log in the lab's directory")
}
