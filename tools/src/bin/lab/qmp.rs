//! QEMU's monitor protocol: one connection a command, since commands are rare.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Longer than any command that the lab sends takes.
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_ANSWER: u64 = 1 << 20;

pub async fn execute(socket: &Path, command: &str) -> Result<Value> {
    tokio::time::timeout(TIMEOUT, converse(socket, command))
        .await
        .map_err(|_| anyhow::anyhow!("the emulator did not answer within {TIMEOUT:?}"))?
        .with_context(|| format!("QMP {command}"))
}

async fn converse(socket: &Path, command: &str) -> Result<Value> {
    let stream = UnixStream::connect(socket).await.context("connect: is the host on? (`lab status`)")?;
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader.take(MAX_ANSWER)).lines();
    let mut answer = Value::Null;
    for command in ["qmp_capabilities", command] {
        let request = json!({"execute": command}).to_string();
        writer.write_all(request.as_bytes()).await?;
        answer = loop {
            let line = lines.next_line().await?.context("the emulator closed the connection")?;
            let message: Value = serde_json::from_str(&line).context("an answer that is no JSON")?;
            if let Some(error) = message.get("error") {
                bail!("refused: {}", error["desc"].as_str().unwrap_or("no reason given"));
            }
            // The greeting and events come between.
            if let Some(value) = message.get("return") {
                break value.clone();
            }
        };
    }
    Ok(answer)
}

/// Whether the guest has opened the port behind a character device (its agent runs).
pub async fn frontend_is_open(socket: &Path, chardev: &str) -> Result<bool> {
    let devices = execute(socket, "query-chardev").await?;
    let devices = devices.as_array().context("query-chardev answered no list")?;
    Ok(devices.iter().any(|device| device["label"] == chardev && device["frontend-open"] == true))
}
