//! The guest's console, between the devices that speak it (serial port, virtio console) and the people who read it.
//!
//! The guest must never wait for a reader: output goes into a ring of the last 64 KiB, into one bounded buffer for
//! each attached client, and into the buffer of the log's own thread. A client that does not keep up is dropped; the log
//! loses its oldest bytes and says how many. Input is bounded too, and goes to one device, the one in focus: two terminals
//! that both got it would both echo it. [`keyboard_is_virtio`] says which one the guest's kernel reads.
//!
//! Start at [`ConsoleHub::device`] (the guest's side), [`ConsoleHub::attach`] (the reader's side) and
//! [`serve_client`], which joins a reader's socket to the hub.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

mod log;

use log::LogThread;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a client that attaches is shown first.
pub const SCROLLBACK_BYTES: usize = 64 << 10;
/// Output that a client may leave unread before it is dropped. Twice the scrollback, which is in it from the start.
pub const CLIENT_BUFFER_BYTES: usize = 2 * SCROLLBACK_BYTES;
/// Clients at one time: operators who watch the same console.
pub const MAX_CLIENTS: usize = 16;
/// Keyboard input that a guest has not read yet. More is refused: a person sees that nothing is echoed.
pub const INPUT_QUEUE_BYTES: usize = 16 << 10;
/// `console.log` is renamed to `console.log.1` when it has grown to this.
pub const LOG_ROTATE_BYTES: u64 = 1 << 20;
/// Output that may wait for a slow log disk.
const LOG_BUFFER_BYTES: usize = 256 << 10;

/// Where a device writes what the guest prints. Never blocks and never fails: the guest has no use for the error.
pub trait ConsoleSink: Send + Sync {
    fn write(&self, bytes: &[u8]);

    /// Whether the device may write now. A console always takes what is printed; a sink that does not rings
    /// [`ConsoleSource::ready`] when it does again.
    fn has_room(&self) -> bool {
        true
    }
}

/// Where a device takes what somebody typed.
pub trait ConsoleSource: Send + Sync {
    /// Takes up to `buffer.len()` bytes, 0 when there are none.
    fn read(&self, buffer: &mut [u8]) -> usize;
    /// Readable when input is there. Its owner empties it before [`read`](Self::read), or wakes for nothing.
    fn ready(&self) -> &EventFd;
}

#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("{MAX_CLIENTS} clients watch this console already; detach one (quorate vm console ends with ctrl-])")]
    TooManyClients,
    #[error("cannot create an event descriptor for the console")]
    EventFd(#[source] io::Error),
    #[error("cannot open the console log {path}")]
    OpenLog {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the thread of the console log")]
    LogThread(#[source] io::Error),
}

/// One guest's console.
pub struct ConsoleHub {
    shared: Arc<Shared>,
    log: Option<LogThread>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    log: Mutex<LogBuffer>,
    log_wake: Condvar,
}

#[derive(Default)]
struct State {
    scrollback: VecDeque<u8>,
    devices: Vec<Arc<InputQueue>>,
    /// Where input goes. Without one, to the first device.
    focus: Option<Arc<InputQueue>>,
    clients: Vec<Arc<ClientBuffer>>,
    bytes_out: u64,
    clients_dropped: u64,
}

struct InputQueue {
    bytes: Mutex<VecDeque<u8>>,
    ready: EventFd,
}

struct ClientBuffer {
    state: Mutex<ClientState>,
    ready: EventFd,
}

#[derive(Default)]
struct ClientState {
    bytes: VecDeque<u8>,
    dropped: bool,
}

#[derive(Default)]
struct LogBuffer {
    enabled: bool,
    closing: bool,
    bytes: VecDeque<u8>,
    lost: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event descriptor's counter only fails to grow when it is full, and then the reader wakes anyway.
fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}

fn bell() -> Result<EventFd, ConsoleError> {
    EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::EventFd)
}

/// Appends, and keeps only the last `limit` bytes. Returns how many old bytes were lost.
fn push_bounded(ring: &mut VecDeque<u8>, bytes: &[u8], limit: usize) -> u64 {
    let skipped = bytes.len().saturating_sub(limit);
    let bytes = &bytes[skipped..];
    let overflow = (ring.len() + bytes.len()).saturating_sub(limit);
    ring.drain(..overflow);
    ring.extend(bytes);
    (skipped + overflow) as u64
}

fn pop_into(queue: &mut VecDeque<u8>, buffer: &mut [u8]) -> usize {
    // Reading from a VecDeque<u8> cannot fail; it stops at the end of its first half, hence the loop.
    let mut taken = 0;
    while taken < buffer.len() {
        match queue.read(&mut buffer[taken..]) {
            Ok(0) | Err(_) => break,
            Ok(n) => taken += n,
        }
    }
    taken
}

impl ConsoleHub {
    /// A console that only clients read.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { shared: Arc::new(Shared::default()), log: None })
    }

    /// A console that is written to `path` too, by a thread of its own: a log disk that hangs costs
    /// log lines, never the guest's time.
    pub fn with_log(path: &Path) -> Result<Arc<Self>, ConsoleError> {
        let shared = Arc::new(Shared::default());
        locked(&shared.log).enabled = true;
        let log = LogThread::start(path, Arc::clone(&shared))?;
        Ok(Arc::new(Self { shared, log: Some(log) }))
    }

    /// The guest's side, for one device.
    pub fn device(&self) -> Result<ConsoleDevice, ConsoleError> {
        let input = Arc::new(InputQueue { bytes: Mutex::default(), ready: bell()? });
        locked(&self.shared.state).devices.push(Arc::clone(&input));
        Ok(ConsoleDevice { shared: Arc::clone(&self.shared), input })
    }

    /// What is typed goes to this device from now on.
    pub fn focus(&self, device: &ConsoleDevice) {
        locked(&self.shared.state).focus = Some(Arc::clone(&device.input));
    }

    /// The reader's side. The scrollback is the first that it reads.
    pub fn attach(&self) -> Result<ConsoleClient, ConsoleError> {
        let ready = bell()?;
        let mut state = locked(&self.shared.state);
        if state.clients.len() >= MAX_CLIENTS {
            return Err(ConsoleError::TooManyClients);
        }
        if !state.scrollback.is_empty() {
            ring(&ready);
        }
        let buffer = Arc::new(ClientBuffer {
            state: Mutex::new(ClientState { bytes: state.scrollback.clone(), dropped: false }),
            ready,
        });
        state.clients.push(Arc::clone(&buffer));
        Ok(ConsoleClient { shared: Arc::clone(&self.shared), buffer })
    }

    /// The last output, at most [`SCROLLBACK_BYTES`].
    pub fn scrollback(&self) -> Vec<u8> {
        locked(&self.shared.state).scrollback.iter().copied().collect()
    }

    /// Bytes that the guest printed, and clients that were dropped because they did not read them.
    pub fn counters(&self) -> (u64, u64) {
        let state = locked(&self.shared.state);
        (state.bytes_out, state.clients_dropped)
    }
}

impl Drop for ConsoleHub {
    fn drop(&mut self) {
        if let Some(log) = self.log.take() {
            log.finish(&self.shared);
        }
    }
}

impl Shared {
    fn output(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        {
            let mut state = locked(&self.state);
            state.bytes_out += bytes.len() as u64;
            push_bounded(&mut state.scrollback, bytes, SCROLLBACK_BYTES);
            let before = state.clients.len();
            state.clients.retain(|client| client.offer(bytes));
            state.clients_dropped += (before - state.clients.len()) as u64;
        }
        let mut log = locked(&self.log);
        if log.enabled {
            log.lost += push_bounded(&mut log.bytes, bytes, LOG_BUFFER_BYTES);
            self.log_wake.notify_one();
        }
    }

    /// Returns how many bytes the device in focus took.
    fn input(&self, bytes: &[u8]) -> usize {
        let state = locked(&self.state);
        let Some(device) = state.focus.as_ref().or(state.devices.first()) else {
            return 0;
        };
        let mut queue = locked(&device.bytes);
        let room = INPUT_QUEUE_BYTES.saturating_sub(queue.len());
        let part = &bytes[..bytes.len().min(room)];
        queue.extend(part);
        if !part.is_empty() {
            ring(&device.ready);
        }
        part.len()
    }
}

/// Whether a Linux guest reads its keyboard on the virtio console: `/dev/console` is the last `console=` of its
/// command line, and the serial port without any.
pub fn keyboard_is_virtio(cmdline: &str) -> bool {
    let mut last_first = cmdline.split_ascii_whitespace().rev().filter_map(|word| word.strip_prefix("console="));
    last_first.next().is_some_and(|name| name.starts_with("hvc"))
}

impl ClientBuffer {
    /// Gives output to the client. False when it has to go.
    fn offer(&self, bytes: &[u8]) -> bool {
        let mut state = locked(&self.state);
        if state.bytes.len() + bytes.len() > CLIENT_BUFFER_BYTES {
            state.dropped = true;
            state.bytes = VecDeque::new();
        } else {
            state.bytes.extend(bytes);
        }
        ring(&self.ready);
        !state.dropped
    }
}

/// A device's two ends of the console.
pub struct ConsoleDevice {
    shared: Arc<Shared>,
    input: Arc<InputQueue>,
}

impl ConsoleSink for ConsoleDevice {
    fn write(&self, bytes: &[u8]) {
        self.shared.output(bytes);
    }
}

impl ConsoleSource for ConsoleDevice {
    fn read(&self, buffer: &mut [u8]) -> usize {
        pop_into(&mut locked(&self.input.bytes), buffer)
    }

    fn ready(&self) -> &EventFd {
        &self.input.ready
    }
}

impl Drop for ConsoleDevice {
    fn drop(&mut self) {
        let mut state = locked(&self.shared.state);
        state.devices.retain(|queue| !Arc::ptr_eq(queue, &self.input));
        state.focus.take_if(|queue| Arc::ptr_eq(queue, &self.input));
    }
}

/// What a client found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientRead {
    Bytes(usize),
    /// Nothing now; [`ConsoleClient::ready`] becomes readable.
    Empty,
    /// The client left too much unread and was dropped. It may attach again and sees the scrollback.
    Dropped,
}

/// One reader of the console. Dropping it detaches it.
pub struct ConsoleClient {
    shared: Arc<Shared>,
    buffer: Arc<ClientBuffer>,
}

impl ConsoleClient {
    pub fn read(&self, buffer: &mut [u8]) -> ClientRead {
        let mut state = locked(&self.buffer.state);
        if state.dropped {
            return ClientRead::Dropped;
        }
        match pop_into(&mut state.bytes, buffer) {
            0 => ClientRead::Empty,
            taken => ClientRead::Bytes(taken),
        }
    }

    /// Types `bytes` on the guest's keyboard. Returns how many fitted.
    pub fn send_input(&self, bytes: &[u8]) -> usize {
        self.shared.input(bytes)
    }

    /// Readable when [`read`](Self::read) has something to say.
    pub fn ready(&self) -> &EventFd {
        &self.buffer.ready
    }
}

impl Drop for ConsoleClient {
    fn drop(&mut self) {
        locked(&self.shared.state).clients.retain(|client| !Arc::ptr_eq(client, &self.buffer));
    }
}

/// Why a client's connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientEnd {
    HungUp,
    TooSlow,
}

/// Copies between a client and its socket until one of them ends. Blocks: give it a thread, or one of a few.
pub fn serve_client(client: &ConsoleClient, mut stream: UnixStream) -> io::Result<ClientEnd> {
    stream.set_nonblocking(true)?;
    let mut unsent: VecDeque<u8> = VecDeque::new();
    let mut buffer = [0u8; 4096];
    loop {
        if unsent.is_empty() {
            let _ = client.ready().read();
            match client.read(&mut buffer) {
                ClientRead::Bytes(n) => unsent.extend(&buffer[..n]),
                ClientRead::Dropped => return Ok(ClientEnd::TooSlow),
                ClientRead::Empty => {}
            }
        }
        if !unsent.is_empty() {
            match stream.write(unsent.make_contiguous()) {
                Ok(0) => return Ok(ClientEnd::HungUp),
                Ok(n) => {
                    unsent.drain(..n);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
        }
        let wanted = if unsent.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        if !wait_for(client.ready(), &stream, wanted)? {
            continue;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(ClientEnd::HungUp),
            // What does not fit is lost, as on a serial line whose reader sleeps.
            Ok(n) => {
                client.send_input(&buffer[..n]);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sleeps until there is output, or the socket can be used. True when the socket is readable (or ended).
fn wait_for(output: &EventFd, stream: &UnixStream, wanted: PollFlags) -> io::Result<bool> {
    // SAFETY: the descriptor outlives the call, `output` owns it.
    let output = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(output)) };
    let mut fds = [PollFd::new(stream.as_fd(), wanted), PollFd::new(output, PollFlags::POLLIN)];
    // While output waits for the socket, more output must not wake us: only the socket counts.
    let watched = if wanted.contains(PollFlags::POLLOUT) { &mut fds[..1] } else { &mut fds[..] };
    match poll(watched, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    let socket = watched[0].revents().unwrap_or(PollFlags::empty());
    Ok(socket.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(client: &ConsoleClient) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = [0; 1000];
        while let ClientRead::Bytes(n) = client.read(&mut buffer) {
            all.extend_from_slice(&buffer[..n]);
        }
        all
    }

    #[test]
    fn a_client_that_attaches_late_sees_the_last_64_kib_and_then_the_rest() {
        let hub = ConsoleHub::new();
        let serial = hub.device().unwrap();
        for line in 0..20_000 {
            serial.write(format!("line {line}\n").as_bytes());
        }
        let client = hub.attach().unwrap();
        serial.write(b"after\n");
        let seen = read_all(&client);
        assert_eq!(seen.len(), SCROLLBACK_BYTES + b"after\n".len());
        assert!(seen.ends_with(b"line 19999\nafter\n"));
    }

    #[test]
    fn a_client_that_does_not_read_is_dropped_and_the_others_go_on() {
        let hub = ConsoleHub::new();
        let serial = hub.device().unwrap();
        let slow = hub.attach().unwrap();
        let fast = hub.attach().unwrap();
        for _ in 0..(CLIENT_BUFFER_BYTES / 1000 + 1) {
            serial.write(&[b'x'; 1000]);
            assert_eq!(read_all(&fast).len(), 1000);
        }
        assert_eq!(slow.read(&mut [0; 10]), ClientRead::Dropped);
        assert_eq!(fast.read(&mut [0; 10]), ClientRead::Empty);
        assert_eq!(hub.counters().1, 1);
    }

    #[test]
    fn input_reaches_the_device_in_focus_and_is_bounded() {
        let hub = ConsoleHub::new();
        let (serial, virtio) = (hub.device().unwrap(), hub.device().unwrap());
        let client = hub.attach().unwrap();
        let mut buffer = [0; 8];
        assert_eq!(client.send_input(b"ls\n"), 3);
        assert_eq!(serial.read(&mut buffer), 3);
        assert_eq!(&buffer[..3], b"ls\n");

        hub.focus(&virtio);
        assert_eq!(client.send_input(&vec![b'y'; 2 * INPUT_QUEUE_BYTES]), INPUT_QUEUE_BYTES);
        assert_eq!(client.send_input(b"z"), 0);
        assert_eq!(serial.read(&mut buffer), 0);
        assert_eq!(virtio.read(&mut buffer), 8);
        assert_eq!(virtio.ready().read().unwrap(), 1);

        drop(virtio);
        assert_eq!(client.send_input(b"z"), 1);
        assert_eq!(serial.read(&mut buffer), 1);
    }

    #[test]
    fn the_keyboard_is_where_the_last_console_is() {
        for (cmdline, is_virtio) in [
            ("", false),
            ("quiet console=ttyS0", false),
            ("console=ttyS0,115200 console=hvc0 quiet", true),
            ("console=hvc0 console=ttyS0", false),
            ("noconsole=hvc0", false),
        ] {
            assert_eq!(keyboard_is_virtio(cmdline), is_virtio, "{cmdline}");
        }
    }

    #[test]
    fn the_seventeenth_client_is_refused_until_one_leaves() {
        let hub = ConsoleHub::new();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| hub.attach().unwrap()).collect();
        assert!(matches!(hub.attach(), Err(ConsoleError::TooManyClients)));
        clients.pop();
        hub.attach().unwrap();
    }

    #[test]
    fn the_log_holds_everything_and_rotates() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let hub = ConsoleHub::with_log(&path).unwrap();
        let serial = hub.device().unwrap();
        let chunk = vec![b'.'; LOG_BUFFER_BYTES / 2];
        let mut written = 0;
        while written <= LOG_ROTATE_BYTES {
            serial.write(&chunk);
            written += chunk.len() as u64;
            // The log's buffer is smaller than what is written here: wait until it has taken this part.
            while !locked(&hub.shared.log).bytes.is_empty() {
                std::thread::yield_now();
            }
        }
        drop(hub);
        let old = std::fs::metadata(dir.path().join("console.log.1")).unwrap();
        let new = std::fs::metadata(&path).unwrap();
        assert_eq!(old.len() + new.len(), written);
        assert!(old.len() <= LOG_ROTATE_BYTES);
    }

    #[test]
    fn a_socket_client_talks_both_ways_and_hangs_up() {
        let hub = ConsoleHub::new();
        let serial = hub.device().unwrap();
        serial.write(b"login: ");
        let client = hub.attach().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve_client(&client, far));

        let mut prompt = [0; 7];
        near.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"login: ");
        near.write_all(b"root\n").unwrap();
        let mut typed = Vec::new();
        while typed.len() < 5 {
            let mut fds = [PollFd::new(
                // SAFETY: the device lives to the end of the test.
                unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(serial.ready())) },
                PollFlags::POLLIN,
            )];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            serial.ready().read().unwrap();
            let mut buffer = [0; 8];
            let n = serial.read(&mut buffer);
            typed.extend_from_slice(&buffer[..n]);
        }
        assert_eq!(typed, b"root\n");
        drop(near);
        assert_eq!(server.join().unwrap().unwrap(), ClientEnd::HungUp);
    }
}
