//! A connection to the control socket of one vmm ([`vmm_control::protocol`]).

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::unix::OwnedWriteHalf;
use tokio_util::codec::FramedRead;
use tokio_util::codec::LinesCodec;
use vmm_control::Call;
use vmm_control::Fault;
use vmm_control::Hello;
use vmm_control::Message;
use vmm_control::Notice;
use vmm_control::Request;
use vmm_control::Status;
use vmm_control::protocol::MAX_LINE_BYTES;

/// A vmm answers from a thread that does nothing else.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Notices kept while an answer is awaited; each is followed by a look at the status, so the oldest may go.
const NOTICES_MAX: usize = 64;

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("cannot reach the vmm at {path}: {source}")]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the vmm closed the connection")]
    Closed,
    #[error("cannot write to the vmm: {0}")]
    Write(#[source] io::Error),
    #[error("cannot read from the vmm: {0}")]
    Read(#[source] io::Error),
    #[error("the vmm said what this hostd does not understand: {0}")]
    Nonsense(String),
    #[error("the vmm did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    /// The connection is sound.
    #[error("the vmm refused: {0}")]
    Refused(#[source] Fault),
}

impl ClientError {
    pub fn is_refusal(&self) -> bool {
        matches!(self, ClientError::Refused(_))
    }
}

/// Turns a new connection into the stream of bytes that `call` asks for: the guest's console, or its agent's port.
pub async fn raw_stream(socket: &Path, call: Call) -> Result<BufReader<UnixStream>, ClientError> {
    let answered = tokio::time::timeout(ANSWER_WITHIN, async {
        let connected = UnixStream::connect(socket).await;
        let stream = connected.map_err(|source| ClientError::Connect { path: socket.to_owned(), source })?;
        let mut stream = BufReader::new(stream);
        stream.write_all(&Request { id: 1, call }.encode()).await.map_err(ClientError::Write)?;
        loop {
            let mut line = Vec::new();
            // Whatever follows the reply's line is the guest's already, and stays in the reader's buffer.
            let read = (&mut stream).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await;
            match read {
                Ok(0) => return Err(ClientError::Closed),
                Ok(_) => {}
                Err(source) => return Err(ClientError::Read(source)),
            }
            match Message::decode(&line) {
                Ok(Message::Notice(_)) => {}
                Ok(Message::Reply(reply)) => match reply.error {
                    None => return Ok(stream),
                    Some(fault) => return Err(ClientError::Refused(fault)),
                },
                Err(error) => return Err(ClientError::Nonsense(error.to_string())),
            }
        }
    });
    answered.await.unwrap_or(Err(ClientError::Silent))
}

#[derive(Debug)]
pub struct VmmClient {
    lines: FramedRead<OwnedReadHalf, LinesCodec>,
    writer: OwnedWriteHalf,
    next_id: u64,
    notices: std::collections::VecDeque<Notice>,
    pid: Option<i32>,
}

impl VmmClient {
    pub async fn connect(socket: &Path) -> Result<VmmClient, ClientError> {
        let connected = UnixStream::connect(socket).await;
        let stream = connected.map_err(|source| ClientError::Connect { path: socket.to_owned(), source })?;
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (reader, writer) = stream.into_split();
        let lines = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE_BYTES));
        Ok(VmmClient { lines, writer, next_id: 1, notices: Default::default(), pid })
    }

    /// The process at the other end, as the kernel says.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    pub async fn hello(&mut self) -> Result<Hello, ClientError> {
        self.call(Call::Hello).await
    }

    pub async fn status(&mut self) -> Result<Status, ClientError> {
        self.call(Call::Status).await
    }

    /// Asks and waits for the answer; notices that come in between are kept.
    pub async fn call<T: DeserializeOwned>(&mut self, call: Call) -> Result<T, ClientError> {
        let value = self.ask(call).await?;
        serde_json::from_value(value).map_err(|error| ClientError::Nonsense(error.to_string()))
    }

    /// Asks for something whose answer does not matter beyond its being one.
    pub async fn order(&mut self, call: Call) -> Result<(), ClientError> {
        self.ask(call).await.map(|_| ())
    }

    async fn ask(&mut self, call: Call) -> Result<serde_json::Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let answered = tokio::time::timeout(ANSWER_WITHIN, async {
            self.writer.write_all(&Request { id, call }.encode()).await.map_err(ClientError::Write)?;
            loop {
                match self.receive().await? {
                    Message::Notice(notice) => {
                        if self.notices.len() == NOTICES_MAX {
                            self.notices.pop_front();
                        }
                        self.notices.push_back(notice);
                    }
                    Message::Reply(reply) if reply.id == id => {
                        return match reply.error {
                            Some(fault) => Err(ClientError::Refused(fault)),
                            None => Ok(reply.result.unwrap_or_default()),
                        };
                    }
                    Message::Reply(reply) => {
                        return Err(ClientError::Nonsense(format!("an answer to {} instead of {id}", reply.id)));
                    }
                }
            }
        });
        answered.await.unwrap_or(Err(ClientError::Silent))
    }

    /// The next notice. May be cancelled.
    pub async fn notice(&mut self) -> Result<Notice, ClientError> {
        if let Some(notice) = self.notices.pop_front() {
            return Ok(notice);
        }
        match self.receive().await? {
            Message::Notice(notice) => Ok(notice),
            Message::Reply(reply) => {
                Err(ClientError::Nonsense(format!("an answer to {}, which was not asked", reply.id)))
            }
        }
    }

    async fn receive(&mut self) -> Result<Message, ClientError> {
        let line = self.lines.next().await.ok_or(ClientError::Closed)?;
        let line = line.map_err(|error| ClientError::Nonsense(error.to_string()))?;
        Message::decode(line.as_bytes()).map_err(|error| ClientError::Nonsense(error.to_string()))
    }
}
