//! Lines from a guest, with every length bounded, and the mark after which a conversation starts clean.
//!
//! The agent's protocol is a line of JSON each way. A reader cannot know which request a line answers, so after a doubt it asks for
//! `guest-sync-delimited`, whose answer follows a byte 0xff that no JSON holds: everything before belongs to the past.

use std::io;

use thiserror::Error;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;

/// Never part of UTF-8.
pub const MARK: u8 = 0xff;
const CHUNK_BYTES: usize = 4096;

#[derive(Debug, Error)]
pub enum WireError {
    #[error("the stream ended")]
    Closed,
    #[error("cannot read")]
    Io(#[source] io::Error),
    /// What was read of it is dropped; the rest is still to come.
    #[error("a line is too long")]
    TooLong,
}

/// Bytes that were read and not used. Reading may be cancelled at any time and loses nothing.
#[derive(Debug, Default)]
pub struct Received {
    bytes: Vec<u8>,
    /// How many of them hold no end of line.
    searched: usize,
}

impl Received {
    /// The next line without its end, at most `limit` bytes long.
    pub async fn line(&mut self, reader: &mut (impl AsyncRead + Unpin), limit: usize) -> Result<Vec<u8>, WireError> {
        loop {
            let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
            let end = found.map(|at| self.searched + at);
            if end.unwrap_or(self.bytes.len()) > limit {
                self.forget(end.map_or(self.bytes.len(), |end| end + 1));
                return Err(WireError::TooLong);
            }
            if let Some(end) = end {
                let line = self.bytes[..end].to_vec();
                self.forget(end + 1);
                return Ok(line);
            }
            self.searched = self.bytes.len();
            self.more(reader).await?;
        }
    }

    /// The line after a mark, at most `limit` bytes long. What is before the mark is dropped, and so is a mark whose line is longer or
    /// holds another mark: somebody was interrupted there.
    pub async fn marked_line(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        limit: usize,
    ) -> Result<Vec<u8>, WireError> {
        loop {
            let Some(mark) = self.bytes.iter().position(|byte| *byte == MARK) else {
                self.forget(self.bytes.len());
                self.more(reader).await?;
                continue;
            };
            self.forget(mark);
            let line = &self.bytes[1..];
            match line.iter().position(|byte| matches!(*byte, b'\n' | MARK)) {
                Some(end) if line[end] == b'\n' && end <= limit => {
                    let line = line[..end].to_vec();
                    self.forget(1 + end + 1);
                    return Ok(line);
                }
                None if line.len() <= limit => self.more(reader).await?,
                _ => self.forget(1),
            }
        }
    }

    fn forget(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.searched = 0;
        if self.bytes.is_empty() {
            // One long answer must not hold its memory for as long as the guest lives.
            self.bytes.shrink_to(CHUNK_BYTES);
        }
    }

    async fn more(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> Result<(), WireError> {
        self.bytes.reserve(CHUNK_BYTES);
        match reader.read_buf(&mut self.bytes).await {
            Ok(0) => Err(WireError::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(WireError::Io(error)),
        }
    }
}
