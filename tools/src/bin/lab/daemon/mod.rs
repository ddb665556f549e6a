//! The lab's daemon (`lab serve`): owns the hosts' processes, their disks and the witnesses, and
//! does what the command line asks on the control socket. It ends by signal (`lab down`); all that
//! must be cleaned up then is in state.json.
//!
//! `hosts` holds what can be done to a host, `consoles` collects guests' console lines.

mod consoles;
mod hosts;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::control::{Reply, Request};
use crate::paths::LabDir;
use crate::process::ProcessId;
use crate::state::LabState;
use hosts::Hosts;

/// A request holds at most a command line and its input.
const MAX_REQUEST: u64 = 32 << 20;
/// Progress lines that a slow client has not read yet.
const PROGRESS_BUFFER: usize = 64;

/// Sends progress; lines that find no room are left out, since the last word says it all.
type Progress = mpsc::Sender<Reply>;

pub async fn serve(dir: LabDir) -> Result<()> {
    let mut state = LabState::load(&dir)?.context("no lab is configured here: run `lab up`")?;
    state.daemon = Some(ProcessId::of(std::process::id())?);
    state.save(&dir)?;
    let hosts = Arc::new(Hosts::new(dir.clone(), state)?);
    let socket = dir.control_socket();
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    tracing::info!(dir = %dir.root().display(), "lab daemon ready");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(converse(Arc::clone(&hosts), stream));
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(hosts: Arc<Hosts>, stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let (progress, mut replies) = mpsc::channel(PROGRESS_BUFFER);
    let work = async {
        let mut line = Vec::new();
        BufReader::new(reader).take(MAX_REQUEST).read_until(b'\n', &mut line).await?;
        let request = serde_json::from_slice(&line).context("a request that this lab does not know")?;
        perform(&hosts, request, &progress).await
    };
    let work = async {
        let last = match work.await {
            Ok(value) => Reply::Done { value },
            Err(error) => Reply::Failed { error: format!("{error:#}") },
        };
        let _ = progress.send(last).await;
    };
    // A client that has gone stops reading; what it asked for is finished all the same.
    let write = async {
        while let Some(reply) = replies.recv().await {
            let last = !matches!(reply, Reply::Progress { .. });
            let Ok(mut line) = serde_json::to_vec(&reply) else { return };
            line.push(b'\n');
            if writer.write_all(&line).await.is_err() || last {
                replies.close();
                return;
            }
        }
    };
    tokio::join!(work, write);
}

async fn perform(hosts: &Arc<Hosts>, request: Request, progress: &Progress) -> Result<Value> {
    match request {
        Request::Hello => Ok(Value::Null),
        Request::Up { timeout_s } => hosts.up(Duration::from_secs(timeout_s), progress).await,
        Request::Status => hosts.status().await,
        Request::Exec { host, argv, input, timeout_s } => {
            let input = BASE64.decode(input).context("input is no base64")?;
            let done = hosts.agent(host)?.run(&argv, &input, Duration::from_secs(timeout_s)).await?;
            Ok(json!({
                "exit_code": done.exit_code,
                "stdout": BASE64.encode(done.stdout),
                "stderr": BASE64.encode(done.stderr),
            }))
        }
        Request::Push { host, source, destination } => {
            let (content, mode) = read_source(&source).await.with_context(|| format!("read {source}"))?;
            hosts.agent(host)?.push(&content, &destination, mode).await?;
            Ok(json!({"bytes": content.len()}))
        }
        Request::Power { host, action, wait_s } => {
            hosts.power(host, action, wait_s.map(Duration::from_secs), progress).await
        }
        Request::Net { host, change } => hosts.change_link(host, change).await,
        Request::Disk { host, export, hang } => {
            hosts.blocks.hang(host, &export, hang)?;
            Ok(Value::Null)
        }
    }
}

async fn read_source(path: &str) -> Result<(Vec<u8>, u32)> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = tokio::fs::metadata(path).await?;
    if !metadata.is_file() {
        bail!("not a file");
    }
    Ok((tokio::fs::read(path).await?, metadata.permissions().mode() & 0o777))
}
