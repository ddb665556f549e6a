//! qemu-guest-agent in a host: runs commands there (`guest-exec`). The daemon keeps one connection
//! a host, because the port serves one client; commands of several callers take turns on it, and
//! none holds it while its program runs.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// A program's end, as `lab exec` reports it.
#[derive(Debug)]
pub struct Finished {
    pub exit_code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// One answer of the agent; its output limit is 16 MiB in base64.
const MAX_ANSWER: u64 = 48 << 20;
/// One question and answer. A loaded emulated host is slow, a stalled one never answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECTION_ENDED: &str = "the agent's connection ended: did the host lose power? (`lab status`)";
/// What one `guest-file-write` carries.
const FILE_CHUNK: usize = 1 << 20;

pub struct Agent {
    socket: PathBuf,
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Agent {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, connection: Mutex::new(None) }
    }

    /// Forgets the connection; the next command makes a new one.
    pub async fn disconnect(&self) {
        *self.connection.lock().await = None;
    }

    /// Whether the agent answers within `timeout`.
    pub async fn answers(&self, timeout: Duration) -> bool {
        self.ask_within(json!({"execute": "guest-ping"}), timeout).await.is_ok()
    }

    /// Runs a program to its end. Over the timeout it is left running in the host.
    pub async fn run(&self, argv: &[String], input: &[u8], timeout: Duration) -> Result<Finished> {
        let (program, arguments) = argv.split_first().context("no command to run")?;
        let mut request = json!({"path": program, "arg": arguments, "capture-output": true});
        if !input.is_empty() {
            request["input-data"] = BASE64.encode(input).into();
        }
        let deadline = Instant::now() + timeout;
        let started = self.ask(json!({"execute": "guest-exec", "arguments": request})).await?;
        let pid = started["pid"].as_i64().context("guest-exec answered no pid")?;
        let mut pause = Duration::from_millis(5);
        loop {
            let status = self.ask(json!({"execute": "guest-exec-status", "arguments": {"pid": pid}})).await?;
            if status["exited"] == true {
                return finished(&status);
            }
            if Instant::now() >= deadline {
                bail!("{program} still runs after {} s (pid {pid} in the host); see --timeout", timeout.as_secs());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// Writes a file in the host.
    pub async fn push(&self, content: &[u8], path: &str, mode: u32) -> Result<()> {
        let open = json!({"path": path, "mode": "w"});
        let handle = self.ask(json!({"execute": "guest-file-open", "arguments": open})).await?;
        for chunk in content.chunks(FILE_CHUNK) {
            let write = json!({"handle": handle, "buf-b64": BASE64.encode(chunk)});
            let written = self.ask(json!({"execute": "guest-file-write", "arguments": write})).await?;
            if written["count"] != chunk.len() {
                bail!("the host took {} of {} bytes of {path}: is its disk full?", written["count"], chunk.len());
            }
        }
        self.ask(json!({"execute": "guest-file-close", "arguments": {"handle": handle}})).await?;
        let chmod = ["chmod".to_owned(), format!("{mode:o}"), path.to_owned()];
        let done = self.run(&chmod, &[], ANSWER_TIMEOUT).await?;
        if done.exit_code != 0 {
            bail!("chmod of {path} failed: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }

    async fn ask(&self, request: Value) -> Result<Value> {
        self.ask_within(request, ANSWER_TIMEOUT).await
    }

    async fn ask_within(&self, request: Value, timeout: Duration) -> Result<Value> {
        let mut slot = self.connection.lock().await;
        let talk = async {
            let connection = match slot.as_mut() {
                Some(connection) => connection,
                None => slot.insert(Connection::open(&self.socket).await?),
            };
            connection.ask(&request).await
        };
        let outcome = match tokio::time::timeout(timeout, talk).await {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow::anyhow!(
                "the host's agent did not answer within {} s: is the host up? (`lab status`, `lab logs`)",
                timeout.as_secs_f32()
            )),
        };
        // After anything but a refusal the stream may hold half an answer: begin anew next time.
        if outcome.as_ref().is_err_and(|error| !error.is::<Refused>()) {
            *slot = None;
        }
        outcome
    }
}

/// The agent understood and said no.
#[derive(Debug, thiserror::Error)]
#[error("the host's agent refused: {0}")]
struct Refused(String);

impl Connection {
    async fn open(socket: &PathBuf) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.context("connect to the host's agent: is the host on?")?;
        let (reader, writer) = stream.into_split();
        Ok(Self { reader: BufReader::new(reader), writer })
    }

    /// Every question is led by a sync with a new number: an agent that restarted, or an answer
    /// that nobody waited for, can then not be taken for ours.
    async fn ask(&mut self, request: &Value) -> Result<Value> {
        let id = rand::random::<u32>();
        let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let mut bytes = vec![0xff];
        bytes.extend_from_slice(sync.to_string().as_bytes());
        bytes.push(b'\n');
        bytes.extend_from_slice(request.to_string().as_bytes());
        bytes.push(b'\n');
        self.writer.write_all(&bytes).await.context(CONNECTION_ENDED)?;
        loop {
            let line = self.line().await?;
            // 0xff marks where the answer to a sync begins; what stands before it is old.
            let answer = line.rsplit(|byte| *byte == 0xff).next().unwrap_or(&line);
            if serde_json::from_slice::<Value>(answer).is_ok_and(|answer| answer["return"] == id) {
                break;
            }
        }
        let line = self.line().await?;
        let answer: Value = serde_json::from_slice(&line).context("the agent's answer is no JSON")?;
        if let Some(error) = answer.get("error") {
            return Err(Refused(error["desc"].as_str().unwrap_or("no reason given").to_owned()).into());
        }
        Ok(answer["return"].clone())
    }

    async fn line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        let length =
            (&mut self.reader).take(MAX_ANSWER).read_until(b'\n', &mut line).await.context(CONNECTION_ENDED)?;
        if length == 0 || line.last() != Some(&b'\n') {
            bail!(CONNECTION_ENDED);
        }
        Ok(line)
    }
}

fn finished(status: &Value) -> Result<Finished> {
    let output = |name: &str| -> Result<Vec<u8>> {
        let text = status[name].as_str().unwrap_or_default();
        BASE64.decode(text).with_context(|| format!("{name} is no base64"))
    };
    // A program ended by a signal has no exit code: answer as a shell does.
    let exit_code = match (status["exitcode"].as_i64(), status["signal"].as_i64()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => bail!("the agent reports an end without exit code or signal"),
    };
    Ok(Finished { exit_code: i32::try_from(exit_code)?, stdout: output("out-data")?, stderr: output("err-data")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_ended_by_a_signal_answers_as_in_a_shell() {
        let done = finished(&json!({"exited": true, "signal": 9, "out-data": "aGk="})).expect("an end");
        assert_eq!((done.exit_code, done.stdout.as_slice()), (137, &b"hi"[..]));
    }

    #[test]
    fn answers_without_an_end_are_refused() {
        assert!(finished(&json!({"exited": true})).is_err());
        assert!(finished(&json!({"exited": true, "exitcode": 0, "out-data": "%"})).is_err());
    }
}
