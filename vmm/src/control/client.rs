//! One connection to the control socket: bytes in, lines out, both bounded. Descriptors may come with a line
//! ([`vmm_control::descriptor`]).

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vmm_control::descriptor::MAX_DESCRIPTORS;
use vmm_control::protocol::MAX_LINE_BYTES;

/// Messages with descriptors for lines that are not whole yet: of one that was begun, and of the next one, whose beginning came with the
/// end of it.
const MAX_MESSAGES: usize = 2;

/// Answers that a client may leave unread. A client that asks and does not read is closed.
const MAX_UNSENT_BYTES: usize = 4 * MAX_LINE_BYTES;

pub(super) struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    /// Those of a message belong to the line that holds this byte of `received`.
    descriptors: VecDeque<(usize, Vec<OwnedFd>)>,
    unsent: Vec<u8>,
}

/// A line without its end, and what came with it.
pub(super) type Line = (Vec<u8>, Vec<OwnedFd>);

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("closed by the peer")]
    HungUp,
    #[error("sent a line longer than {MAX_LINE_BYTES} bytes")]
    LongLine,
    #[error("sent more descriptors with a line than it can ask for")]
    Descriptors,
    #[error("does not read its answers")]
    TooSlow,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Client {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new(), descriptors: VecDeque::new(), unsent: Vec::new() })
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads what is there. The kernel ends a read behind the bytes that descriptors came with.
    pub(super) fn receive(&mut self) -> Result<(), ClientError> {
        let mut buffer = [0; 4096];
        // The kernel rounds the room up to that for an even number.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let got = match recvmsg(&self.stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got,
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let came = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let came: Vec<OwnedFd> = came.flatten().collect();
        if came.len() > MAX_DESCRIPTORS || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ClientError::Descriptors);
        }
        if got.bytes == 0 {
            return Err(ClientError::HungUp);
        }
        self.received.extend_from_slice(&buffer[..got.bytes]);
        if !came.is_empty() {
            if self.descriptors.len() == MAX_MESSAGES {
                return Err(ClientError::Descriptors);
            }
            self.descriptors.push_back((self.received.len() - 1, came));
        }
        Ok(())
    }

    /// The next whole line.
    pub(super) fn next_line(&mut self) -> Result<Option<Line>, ClientError> {
        match self.received.iter().position(|b| *b == b'\n') {
            Some(end) if end <= MAX_LINE_BYTES => {
                let rest = self.received.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.received, rest);
                line.truncate(end);
                let came = self.descriptors.pop_front_if(|(at, _)| *at <= end);
                let descriptors = came.map(|(_, descriptors)| descriptors).unwrap_or_default();
                if self.descriptors.front().is_some_and(|(at, _)| *at <= end) {
                    return Err(ClientError::Descriptors);
                }
                for (at, _) in &mut self.descriptors {
                    *at -= end + 1;
                }
                Ok(Some((line, descriptors)))
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
    use std::io::{IoSlice, Read};
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use vmm_control::descriptor::send_line;

    use super::*;

    fn text(client: &mut Client) -> Option<Vec<u8>> {
        client.next_line().unwrap().map(|(line, descriptors)| {
            assert!(descriptors.is_empty());
            line
        })
    }

    #[test]
    fn lines_come_out_whole_however_they_arrive() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        near.write_all(b"one\ntw").unwrap();
        client.receive().unwrap();
        assert_eq!(text(&mut client), Some(b"one".to_vec()));
        assert_eq!(text(&mut client), None);
        near.write_all(b"o\n").unwrap();
        client.receive().unwrap();
        assert_eq!(text(&mut client), Some(b"two".to_vec()));
        drop(near);
        assert!(matches!(client.receive(), Err(ClientError::HungUp)));
    }

    /// A descriptor that is known again: its other end reads the end of file once it is closed here.
    fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
        std::io::pipe().unwrap()
    }

    fn is_closed(reader: &mut std::io::PipeReader) -> bool {
        nix::fcntl::fcntl(&*reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        matches!(reader.read(&mut [0]), Ok(0))
    }

    #[test]
    fn a_descriptor_belongs_to_its_line_whatever_else_is_read_with_it() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        let (mut reader, writer) = pipe();
        near.write_all(b"before\n").unwrap();
        send_line(&near, b"with\n", &[writer.as_fd(); 3]).unwrap();
        near.write_all(b"after\n").unwrap();
        drop(writer);
        client.receive().unwrap();
        assert_eq!(text(&mut client), Some(b"before".to_vec()));
        let (line, descriptors) = client.next_line().unwrap().unwrap();
        assert_eq!((line.as_slice(), descriptors.len()), (&b"with"[..], 3));
        assert!(!is_closed(&mut reader));
        drop(descriptors);
        assert!(is_closed(&mut reader));
        client.receive().unwrap();
        assert_eq!(text(&mut client), Some(b"after".to_vec()));
    }

    #[test]
    fn a_long_line_keeps_its_descriptor_until_it_is_whole() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        let (mut reader, writer) = pipe();
        let line = [&[b'x'; 10_000][..], b"\n"].concat();
        send_line(&near, &line, &[writer.as_fd()]).unwrap();
        send_line(&near, b"next\n", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut lines = Vec::new();
        while lines.len() < 2 {
            client.receive().unwrap();
            while let Some((line, descriptors)) = client.next_line().unwrap() {
                assert_eq!(descriptors.len(), 1);
                lines.push(line.len());
            }
        }
        assert_eq!(lines, [10_000, 4]);
        assert!(is_closed(&mut reader));
    }

    #[test]
    fn more_descriptors_than_lines_cost_the_connection() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        let (mut reader, writer) = pipe();
        for _ in 0..2 {
            send_line(&near, b"part", &[writer.as_fd()]).unwrap();
            client.receive().unwrap();
        }
        near.write_all(b"\n").unwrap();
        client.receive().unwrap();
        assert!(matches!(client.next_line(), Err(ClientError::Descriptors)));

        let (near, far) = UnixStream::pair().unwrap();
        let mut client_of_many = Client::new(far).unwrap();
        const MANY: usize = MAX_DESCRIPTORS + 3;
        let many = [writer.as_fd(); MANY];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&near, &[IoSlice::new(b"{}\n")], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(client_of_many.receive(), Err(ClientError::Descriptors)));
        drop((writer, client, client_of_many));
        assert!(is_closed(&mut reader));
    }

    #[test]
    fn endless_descriptors_without_a_line_are_bounded() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut client = Client::new(far).unwrap();
        let (_reader, writer) = pipe();
        let mut held = 0;
        let end = loop {
            send_line(&near, b"x", &[writer.as_fd(); MAX_DESCRIPTORS]).unwrap();
            match client.receive() {
                Ok(()) => held += 1,
                Err(end) => break end,
            }
        };
        assert!(matches!(end, ClientError::Descriptors));
        assert_eq!(held, MAX_MESSAGES);
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
