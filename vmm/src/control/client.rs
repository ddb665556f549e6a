//! One connection to the control socket: bytes in, lines out, both bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vmm_control::protocol::MAX_LINE_BYTES;

/// Answers that a client may leave unread. A client that asks and does not read is closed.
const MAX_UNSENT_BYTES: usize = 4 * MAX_LINE_BYTES;

pub(super) struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("closed by the peer")]
    HungUp,
    #[error("sent a line longer than {MAX_LINE_BYTES} bytes")]
    LongLine,
    #[error("does not read its answers")]
    TooSlow,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Client {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new(), unsent: Vec::new() })
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads what is there, up to a line.
    pub(super) fn receive(&mut self) -> Result<(), ClientError> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(ClientError::HungUp),
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The next whole line, without its end.
    pub(super) fn next_line(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        match self.received.iter().position(|b| *b == b'\n') {
            Some(end) if end <= MAX_LINE_BYTES => {
                let rest = self.received.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.received, rest);
                line.truncate(end);
                Ok(Some(line))
            }
            None if self.received.len() <= MAX_LINE_BYTES => Ok(None),
            _ => Err(ClientError::LongLine),
        }
    }

    /// Queues a line and sends what the socket takes.
    pub(super) fn send(&mut self, line: &[u8]) -> Result<(), ClientError> {
        if self.unsent.len() + line.len() > MAX_UNSENT_BYTES {
            return Err(ClientError::TooSlow);
        }
        self.unsent.extend_from_slice(line);
        self.flush()
    }

    pub(super) fn flush(&mut self) -> Result<(), ClientError> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(ClientError::HungUp),
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// The connection, and what was read from it and not used. Only when everything was sent.
    pub(super) fn into_stream(self) -> (UnixStream, Vec<u8>, Vec<u8>) {
        (self.stream, self.received, self.unsent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_they_arrive() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        near.write_all(b"one\ntw").unwrap();
        client.receive().unwrap();
        assert_eq!(client.next_line().unwrap(), Some(b"one".to_vec()));
        assert_eq!(client.next_line().unwrap(), None);
        near.write_all(b"o\n").unwrap();
        client.receive().unwrap();
        assert_eq!(client.next_line().unwrap(), Some(b"two".to_vec()));
        drop(near);
        assert!(matches!(client.receive(), Err(ClientError::HungUp)));
    }

    #[test]
    fn a_client_without_bounds_is_cut_off() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        near.set_nonblocking(true).unwrap();
        let end = loop {
            // The pair's buffer may be full; the client reads on.
            let _ = near.write(&[b'x'; 4096]);
            client.receive().unwrap();
            if let Err(end) = client.next_line() {
                break end;
            }
        };
        assert!(matches!(end, ClientError::LongLine));

        let line = [b'y'; 4096];
        let end = loop {
            if let Err(end) = client.send(&line) {
                break end;
            }
        };
        assert!(matches!(end, ClientError::TooSlow));
    }
}
