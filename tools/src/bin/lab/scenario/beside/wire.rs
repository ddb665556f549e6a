//! One connection to a control socket of a vmm or to a monitor of QEMU: JSON lines, each stamped when it comes. Both protocols
//! answer a request with its `id` and tell events in between.

use std::collections::VecDeque;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde_json::Value;

/// A step of a migration on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(240);
const MAX_LINE_BYTES: u64 = 1 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(5);
const ID: u64 = 7;

pub struct Wire {
    writer: UnixStream,
    lines: Receiver<(Instant, Value)>,
    /// Came while something else was waited for.
    kept: VecDeque<(Instant, Value)>,
}

impl Wire {
    /// Connects, once the program listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let writer = connect(socket)?;
        let mut reader = BufReader::new(writer.try_clone().context("duplicate a connection")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let at = Instant::now();
                let Ok(value) = serde_json::from_slice(&line) else { return };
                if sender.send((at, value)).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Ok(Self { writer, lines, kept: VecDeque::new() })
    }

    /// Asks, and answers what was answered. One question at a time, so that one id is enough.
    pub fn ask(&mut self, mut request: Value) -> Result<Value> {
        request["id"] = ID.into();
        self.writer.write_all(format!("{request}\n").as_bytes()).with_context(|| format!("ask {request}"))?;
        let (_, mut answer) = self.wait(&format!("the answer to {request}"), |message| message["id"] == ID)?;
        match answer.get("error") {
            Some(error) => bail!("{request} was refused: {error}"),
            None => Ok(match answer["result"].take() {
                // QEMU's word.
                Value::Null => answer["return"].take(),
                result => result,
            }),
        }
    }

    /// The next message that fits, of those that came or will come, and when it came.
    pub fn wait(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Result<(Instant, Value)> {
        if let Some(at) = self.kept.iter().position(|(_, message)| fits(message)) {
            return self.kept.remove(at).context("a message that is there");
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.lines.recv_timeout(left).with_context(|| format!("waited in vain for {what}"))?;
            if fits(&message.1) {
                return Ok(message);
            }
            self.kept.push_back(message);
        }
    }
}

/// Asks on a connection of its own, which carries bytes after the answer.
pub fn attach(socket: &Path, mut request: Value) -> Result<UnixStream> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    request["id"] = ID.into();
    stream.write_all(format!("{request}\n").as_bytes()).with_context(|| format!("ask {request}"))?;
    loop {
        let answer: Value = serde_json::from_slice(&line(&mut stream)?).context("an answer that is no JSON")?;
        if answer["id"] == ID {
            return match answer.get("error") {
                Some(error) => bail!("{request} was refused: {error}"),
                None => Ok(stream),
            };
        }
    }
}

/// Byte by byte, as what follows the line is not ours to take.
fn line(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    for _ in 0..MAX_LINE_BYTES {
        stream.read_exact(&mut byte).context("the connection ended in the middle of an answer")?;
        match byte {
            [b'\n'] => return Ok(line),
            [other] => line.push(other),
        }
    }
    bail!("an answer of more than {MAX_LINE_BYTES} bytes")
}

pub fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("connect to {}", socket.display()));
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    /// A program that says `script` to whoever connects, after one line.
    fn program(script: &'static str) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).expect("a socket");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            line(&mut stream).expect("a question");
            stream.write_all(script.as_bytes()).expect("said");
        });
        (directory, socket)
    }

    #[test]
    fn events_before_an_answer_are_kept_with_their_time() {
        let (_directory, socket) =
            program("{\"event\":\"STOP\"}\n{\"id\":7,\"return\":{\"status\":\"active\"}}\n{\"event\":\"RESUME\"}\n");
        let mut wire = Wire::connect(&socket).expect("a connection");
        let answer = wire.ask(json!({"execute": "query-migrate"})).expect("an answer");
        assert_eq!(answer["status"], "active");
        let (resumed, _) = wire.wait("RESUME", |message| message["event"] == "RESUME").expect("an event");
        let (stopped, _) = wire.wait("STOP", |message| message["event"] == "STOP").expect("an event");
        assert!(stopped <= resumed);
        wire.wait("more", |_| true).expect_err("the program has gone");
    }

    #[test]
    fn bytes_behind_the_answer_of_an_attached_connection_are_not_taken() {
        let (_directory, socket) = program("{\"notice\":\"resumed\"}\n{\"id\":7,\"result\":{}}\nrest");
        let mut stream = attach(&socket, json!({"method": "save_attach"})).expect("a stream");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("the rest");
        assert_eq!(rest, "rest");
    }

    #[test]
    fn a_refusal_carries_its_words() {
        let (_directory, socket) = program("{\"id\":7,\"error\":{\"message\":\"not now\"}}\n");
        let error = attach(&socket, json!({"method": "save_attach"})).expect_err("refused");
        assert!(error.to_string().contains("not now"), "{error}");
    }
}
