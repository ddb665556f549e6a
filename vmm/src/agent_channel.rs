//! The host's end of the guest agent's port: one client's connection, joined to `org.qemu.guest_agent.0` of the guest.
//!
//! Unlike the console it is a conversation. It has one client at a time, and nothing is lost while both ends are there: what
//! the guest has not read stays in the client's socket, and what the client has not read stays in the guest's ring.
//!
//! Where an end is missing, bytes of an earlier conversation must not reach a later one:
//! - Without a client the guest's bytes are discarded, as QEMU does with a closed chardev. They answer somebody who is gone, and an
//!   agent that hangs in its write would not hear the next client.
//! - A client's bytes wait until the guest has opened its port, and are forgotten when the client leaves: a request to shut down must
//!   not be carried out after the one who asked has given up.
//! - When the guest closes its port or resets, the client reads what was said and then the end of the stream.
//! - A new client is served only after the device has told the guest that the last one left ([`AgentChannel::acknowledge`]).
//!
//! Start at [`AgentChannel::attach`] and [`serve_client`]; the device's side is [`ConsoleSink`] and [`ConsoleSource`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::console_hub::{ConsoleSink, ConsoleSource};

/// Bytes for the client from which on the guest waits. One more chain of the guest may come on top.
pub const TO_CLIENT_BYTES: usize = 64 << 10;
/// Bytes for the guest from which on the client waits.
pub const TO_GUEST_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum AgentChannelError {
    #[error("another client talks to the guest agent; ask again when its connection has ended")]
    Taken,
    #[error("cannot create an event descriptor for the guest agent's port")]
    EventFd(#[source] io::Error),
}

/// A client's name, never used twice in one process.
pub type ConnectionId = u64;

/// The guest agent's port of one guest. Outlives its machines, as the process does.
pub struct AgentChannel {
    state: Mutex<State>,
    device_bell: EventFd,
}

#[derive(Default)]
struct State {
    guest_open: bool,
    client: Option<Arc<Connection>>,
    /// The client that the device knows of.
    acknowledged: Option<ConnectionId>,
    last_id: ConnectionId,
    counters: AgentCounters,
}

struct Connection {
    id: ConnectionId,
    buffers: Mutex<Buffers>,
    bell: EventFd,
}

#[derive(Default)]
struct Buffers {
    to_guest: VecDeque<u8>,
    to_client: VecDeque<u8>,
    ended: bool,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AgentCounters {
    pub bytes_out: u64,
    pub bytes_in: u64,
    /// Said by the guest while nobody listened.
    pub bytes_discarded: u64,
    pub clients: u64,
    pub clients_refused: u64,
    /// Times that the guest opened its port.
    pub guest_opens: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event descriptor's counter only fails to grow when it is full, and then the reader wakes anyway.
fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}

fn take_into(queue: &mut VecDeque<u8>, buffer: &mut [u8]) -> usize {
    let count = queue.len().min(buffer.len());
    for (to, from) in buffer.iter_mut().zip(queue.drain(..count)) {
        *to = from;
    }
    if queue.is_empty() {
        // One long chain must not hold its memory for as long as the guest lives.
        queue.shrink_to(TO_CLIENT_BYTES);
    }
    count
}

impl AgentChannel {
    pub fn new() -> Result<Arc<Self>, AgentChannelError> {
        let device_bell = EventFd::new(EFD_NONBLOCK).map_err(AgentChannelError::EventFd)?;
        Ok(Arc::new(Self { state: Mutex::default(), device_bell }))
    }

    /// The client's side. There is one at a time.
    pub fn attach(self: &Arc<Self>) -> Result<AgentClient, AgentChannelError> {
        let bell = EventFd::new(EFD_NONBLOCK).map_err(AgentChannelError::EventFd)?;
        let mut state = locked(&self.state);
        if state.client.is_some() {
            state.counters.clients_refused += 1;
            return Err(AgentChannelError::Taken);
        }
        state.last_id += 1;
        state.counters.clients += 1;
        let connection = Arc::new(Connection { id: state.last_id, buffers: Mutex::default(), bell });
        state.client = Some(Arc::clone(&connection));
        drop(state);
        ring(&self.device_bell);
        Ok(AgentClient { channel: Arc::clone(self), connection })
    }

    /// Whether a program in the guest has the port open.
    pub fn guest_open(&self) -> bool {
        locked(&self.state).guest_open
    }

    pub fn counters(&self) -> AgentCounters {
        locked(&self.state).counters
    }

    /// The client of now, which is served from now on: the device tells the guest when it is another one than before.
    pub fn acknowledge(&self) -> Option<ConnectionId> {
        let mut state = locked(&self.state);
        state.acknowledged = state.client.as_ref().map(|client| client.id);
        state.acknowledged
    }

    /// The guest opened or closed its port. Closing ends the client's connection.
    pub fn set_guest_open(&self, open: bool) {
        let mut state = locked(&self.state);
        let was_open = std::mem::replace(&mut state.guest_open, open);
        match (was_open, open) {
            (false, true) => state.counters.guest_opens += 1,
            (true, false) => {
                if let Some(client) = state.client.take() {
                    locked(&client.buffers).ended = true;
                    ring(&client.bell);
                }
            }
            _ => {}
        }
    }
}

impl State {
    /// The client, if the guest was told of it.
    fn served(&self) -> Option<&Arc<Connection>> {
        self.client.as_ref().filter(|client| Some(client.id) == self.acknowledged)
    }
}

impl ConsoleSink for AgentChannel {
    fn write(&self, bytes: &[u8]) {
        let mut state = locked(&self.state);
        let Some(client) = state.served() else {
            state.counters.bytes_discarded += bytes.len() as u64;
            return;
        };
        locked(&client.buffers).to_client.extend(bytes);
        ring(&client.bell);
        state.counters.bytes_out += bytes.len() as u64;
    }

    fn has_room(&self) -> bool {
        let state = locked(&self.state);
        state.served().is_none_or(|client| locked(&client.buffers).to_client.len() < TO_CLIENT_BYTES)
    }
}

impl ConsoleSource for AgentChannel {
    fn read(&self, buffer: &mut [u8]) -> usize {
        let mut state = locked(&self.state);
        let Some(client) = state.served().filter(|_| state.guest_open) else {
            return 0;
        };
        let taken = take_into(&mut locked(&client.buffers).to_guest, buffer);
        if taken > 0 {
            ring(&client.bell);
        }
        state.counters.bytes_in += taken as u64;
        taken
    }

    fn ready(&self) -> &EventFd {
        &self.device_bell
    }
}

/// What a client found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentRead {
    Bytes(usize),
    Empty,
    /// The guest closed its port, or reset.
    Ended,
}

/// The one client of a guest's agent. Dropping it detaches it.
pub struct AgentClient {
    channel: Arc<AgentChannel>,
    connection: Arc<Connection>,
}

impl AgentClient {
    pub fn read(&self, buffer: &mut [u8]) -> AgentRead {
        let mut buffers = locked(&self.connection.buffers);
        let was_full = buffers.to_client.len() >= TO_CLIENT_BYTES;
        let taken = take_into(&mut buffers.to_client, buffer);
        if was_full {
            ring(&self.channel.device_bell);
        }
        match (taken, buffers.ended) {
            (0, true) => AgentRead::Ended,
            (0, false) => AgentRead::Empty,
            (taken, _) => AgentRead::Bytes(taken),
        }
    }

    /// Bytes that [`send`](Self::send) takes now.
    pub fn room(&self) -> usize {
        TO_GUEST_BYTES.saturating_sub(locked(&self.connection.buffers).to_guest.len())
    }

    /// Returns how many bytes fitted.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut buffers = locked(&self.connection.buffers);
        let room = TO_GUEST_BYTES.saturating_sub(buffers.to_guest.len());
        let part = &bytes[..bytes.len().min(room)];
        buffers.to_guest.extend(part);
        ring(&self.channel.device_bell);
        part.len()
    }

    /// Readable when [`read`](Self::read) or [`room`](Self::room) has something new to say.
    pub fn ready(&self) -> &EventFd {
        &self.connection.bell
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        let mut state = locked(&self.channel.state);
        state.client.take_if(|client| client.id == self.connection.id);
        drop(state);
        ring(&self.channel.device_bell);
    }
}

/// Why a client's connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentEnd {
    HungUp,
    GuestClosed,
}

/// Copies between a client and its socket until one of them ends. `received` came with the request to attach. Blocks: give it a
/// thread.
pub fn serve_client(client: &AgentClient, mut stream: UnixStream, received: Vec<u8>) -> io::Result<AgentEnd> {
    stream.set_nonblocking(true)?;
    let (mut unsent, mut undelivered) = (VecDeque::new(), VecDeque::from(received));
    let mut buffer = [0u8; 4096];
    loop {
        // Before the buffers are looked at: what comes later rings again.
        let _ = client.ready().read();
        deliver(client, &mut undelivered);
        if unsent.is_empty() {
            match client.read(&mut buffer) {
                AgentRead::Bytes(count) => unsent.extend(&buffer[..count]),
                AgentRead::Empty => {}
                AgentRead::Ended => return Ok(AgentEnd::GuestClosed),
            }
        }
        if !unsent.is_empty() {
            match stream.write(unsent.make_contiguous()) {
                Ok(0) => return Ok(AgentEnd::HungUp),
                Ok(count) => {
                    unsent.drain(..count);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
        }
        let mut wanted = PollFlags::empty();
        // Bytes that the guest does not take stay in the socket, and the client feels it.
        wanted.set(PollFlags::POLLIN, undelivered.is_empty() && client.room() > 0);
        wanted.set(PollFlags::POLLOUT, !unsent.is_empty());
        let found = wait_for(client.ready(), &stream, wanted)?;
        if found.contains(PollFlags::POLLIN) {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(AgentEnd::HungUp),
                Ok(count) => undelivered.extend(&buffer[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        } else if found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            return Ok(AgentEnd::HungUp);
        }
    }
}

fn deliver(client: &AgentClient, undelivered: &mut VecDeque<u8>) {
    if !undelivered.is_empty() {
        let sent = client.send(undelivered.make_contiguous());
        undelivered.drain(..sent);
    }
}

/// Sleeps until the guest's side has news or the socket can be used. Returns what the socket says.
fn wait_for(bell: &EventFd, stream: &UnixStream, wanted: PollFlags) -> io::Result<PollFlags> {
    // SAFETY: the descriptor outlives the call, `bell` owns it.
    let bell = unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
    let mut fds = [PollFd::new(stream.as_fd(), wanted), PollFd::new(bell, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_channel() -> Arc<AgentChannel> {
        let channel = AgentChannel::new().unwrap();
        channel.set_guest_open(true);
        channel
    }

    fn wait_for_bell(bell: &EventFd) {
        // SAFETY: the descriptor outlives the call, `bell` owns it.
        let fd = unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        let _ = bell.read();
    }

    fn read(source: &AgentChannel) -> Vec<u8> {
        let mut buffer = [0; 1000];
        let taken = source.read(&mut buffer);
        buffer[..taken].to_vec()
    }

    #[test]
    fn there_is_one_client_at_a_time() {
        let channel = open_channel();
        let first = channel.attach().unwrap();
        assert!(matches!(channel.attach(), Err(AgentChannelError::Taken)));
        drop(first);
        channel.attach().unwrap();
        assert_eq!((channel.counters().clients, channel.counters().clients_refused), (2, 1));
    }

    #[test]
    fn what_the_guest_says_to_nobody_is_discarded() {
        let channel = open_channel();
        assert!(channel.has_room());
        channel.write(b"{\"return\": {}}\n");
        let client = channel.attach().unwrap();
        // The guest has not heard of this client yet: it answers an earlier one.
        channel.write(b"late");
        channel.acknowledge();
        channel.write(b"new");
        let mut buffer = [0; 100];
        assert_eq!(client.read(&mut buffer), AgentRead::Bytes(3));
        assert_eq!(&buffer[..3], b"new");
        assert_eq!(channel.counters().bytes_discarded, 19);
    }

    #[test]
    fn a_request_waits_for_the_guest_and_dies_with_its_client() {
        let channel = AgentChannel::new().unwrap();
        let client = channel.attach().unwrap();
        channel.acknowledge();
        client.send(b"ping");
        assert!(read(&channel).is_empty(), "the guest has not opened its port");
        channel.set_guest_open(true);
        assert_eq!(read(&channel), b"ping");

        client.send(b"shutdown");
        drop(client);
        let next = channel.attach().unwrap();
        next.send(b"hello");
        assert!(read(&channel).is_empty(), "the guest was not told that the client changed");
        channel.acknowledge();
        assert_eq!(read(&channel), b"hello");
    }

    #[test]
    fn a_client_that_does_not_read_makes_the_guest_wait() {
        let channel = open_channel();
        let client = channel.attach().unwrap();
        channel.acknowledge();
        let _ = channel.ready().read();
        let chunk = [b'x'; 1000];
        let mut written = 0;
        while channel.has_room() {
            channel.write(&chunk);
            written += chunk.len();
        }
        assert!(written >= TO_CLIENT_BYTES && written < TO_CLIENT_BYTES + chunk.len());
        assert!(channel.ready().read().is_err(), "no reason to wake the device");
        let mut buffer = vec![0; written];
        assert_eq!(client.read(&mut buffer), AgentRead::Bytes(written));
        assert!(channel.has_room());
        assert!(channel.ready().read().is_ok(), "the device is told of the room");
    }

    #[test]
    fn when_the_guest_closes_the_client_reads_the_rest_and_the_end() {
        let channel = open_channel();
        let client = channel.attach().unwrap();
        channel.acknowledge();
        channel.write(b"bye");
        channel.set_guest_open(false);
        let next = channel.attach().unwrap();
        let mut buffer = [0; 10];
        assert_eq!(client.read(&mut buffer), AgentRead::Bytes(3));
        assert_eq!(client.read(&mut buffer), AgentRead::Ended);
        drop(client);
        channel.set_guest_open(true);
        assert_eq!(next.read(&mut buffer), AgentRead::Empty);
        assert!(
            matches!(channel.attach(), Err(AgentChannelError::Taken)),
            "the end of the first left the second there"
        );
    }

    /// Both directions over a socket, with more than any buffer on the way holds.
    #[test]
    fn a_socket_client_loses_nothing_and_feels_the_guest() {
        let channel = open_channel();
        let client = channel.attach().unwrap();
        channel.acknowledge();
        let (near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve_client(&client, far, b"first ".to_vec()));

        let sent: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).take(1 << 20).collect();
        let mut writer = near.try_clone().unwrap();
        let to_send = sent.clone();
        let sender = std::thread::spawn(move || writer.write_all(&to_send).unwrap());
        let mut reader = near.try_clone().unwrap();
        let total = sent.len() + 6;
        let receiver = std::thread::spawn(move || {
            let mut got = vec![0; total];
            reader.read_exact(&mut got).unwrap();
            got
        });
        // The guest echoes as fast as the client reads.
        let mut echoed = 0;
        while echoed < total {
            let part = if channel.has_room() { read(&channel) } else { Vec::new() };
            channel.write(&part);
            echoed += part.len();
            if part.is_empty() {
                wait_for_bell(channel.ready());
            }
        }
        let got = receiver.join().unwrap();
        sender.join().unwrap();
        assert_eq!(&got[..6], b"first ");
        assert!(got[6..] == sent[..]);
        drop(near);
        assert_eq!(server.join().unwrap().unwrap(), AgentEnd::HungUp);
    }

    #[test]
    fn a_socket_client_sees_the_guest_close() {
        let channel = open_channel();
        let client = channel.attach().unwrap();
        channel.acknowledge();
        let (mut near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve_client(&client, far, Vec::new()));
        channel.write(b"bye");
        channel.set_guest_open(false);
        let mut rest = Vec::new();
        // The thread drops its end of the socket with the connection.
        assert_eq!(server.join().unwrap().unwrap(), AgentEnd::GuestClosed);
        near.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"bye");
    }
}
