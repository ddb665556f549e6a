//! The control thread: one poll loop over the socket, its clients, signals, and what is typed on the console.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_control::protocol::{MAX_CLIENTS, ProtocolError};
use vmm_control::{ErrorCode, Message, Notice, Reply, Request};

use super::client::{Client, ClientError};
use super::{Answer, Control, Stream, lock};
use crate::agent_channel::{self, AgentChannelError, AgentClient};
use crate::console_hub::{self, ConsoleClient, ConsoleSource};
use crate::sandbox::Role;
use crate::saved::incoming::{Incoming, Source};
use crate::saved::parts::Parts;
use crate::saved::session::Session;

/// What a stream may wait for its peer to take the last words of the line protocol.
const HAND_OVER: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on the control socket {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot receive signals")]
    Signals(#[source] io::Error),
    #[error("cannot start the control thread")]
    Thread(#[source] io::Error),
}

/// SIGTERM and SIGINT are for the control thread. Called before any other thread starts, so that all inherit it.
pub fn block_signals() -> io::Result<()> {
    signals().thread_block()?;
    Ok(())
}

fn signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT])
}

/// The control thread.
pub struct ControlServer {
    control: Arc<Control>,
    finish: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    path: PathBuf,
}

impl ControlServer {
    /// Listens at `path`, which only our own user may use.
    pub fn start(path: &Path, control: Arc<Control>) -> Result<Self, ServerError> {
        let listener = listen(path).map_err(|source| ServerError::Listen { path: path.to_owned(), source })?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&signals(), flags).map_err(|e| ServerError::Signals(e.into()))?;
        let finish = Arc::new(AtomicBool::new(false));
        let mut server = Loop {
            control: Arc::clone(&control),
            finish: Arc::clone(&finish),
            listener,
            signals,
            clients: Vec::new(),
            streams: Arc::new(AtomicUsize::new(0)),
        };
        let thread = Role::Control.spawn("", move || server.run()).map_err(ServerError::Thread)?;
        Ok(Self { control, finish, thread, path: path.to_owned() })
    }

    /// Sends the last notices, closes all connections, removes the socket.
    pub fn finish(self) {
        self.finish.store(true, Ordering::SeqCst);
        self.control.bell.ring();
        if self.thread.join().is_err() {
            tracing::error!("the control thread ended by a panic");
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "cannot remove the control socket");
        }
    }
}

/// We hold the VM's lock, so a socket that is there belongs to a process that is gone.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

struct Loop {
    control: Arc<Control>,
    finish: Arc<AtomicBool>,
    listener: UnixListener,
    signals: SignalFd,
    clients: Vec<Client>,
    /// Connections that became streams of bytes, which have a thread each.
    streams: Arc<AtomicUsize>,
}

/// The guest's end of a connection that became a stream.
enum GuestEnd {
    Console(ConsoleClient),
    Agent(AgentClient),
    Save(Session, Arc<Parts>, Arc<Control>),
    Restore(IncomingPlace),
}

/// The place that was promised to a connection. It is given back when the connection is lost before a byte.
struct IncomingPlace(Option<Arc<Incoming>>);

impl IncomingPlace {
    fn deliver(mut self, socket: UnixStream, received: Vec<u8>) {
        if let Some(incoming) = self.0.take() {
            incoming.deliver(Some(Source { socket, received }));
        }
    }
}

impl Drop for IncomingPlace {
    fn drop(&mut self) {
        if let Some(incoming) = self.0.take() {
            incoming.deliver(None);
        }
    }
}

/// What the poll found.
#[derive(Default)]
struct Ready {
    listener: bool,
    signals: bool,
    input: bool,
    clients: Vec<PollFlags>,
}

impl Loop {
    fn run(&mut self) {
        loop {
            // Read before the notices: what was queued before the order to finish is sent.
            let finish = self.finish.load(Ordering::SeqCst);
            self.send_notices();
            if finish {
                return;
            }
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "the control thread cannot poll");
                    return;
                }
            };
            if ready.signals {
                self.take_signals();
            }
            if ready.input
                && let Some(machine) = self.control.machine()
            {
                lock(&machine.serial).take_input();
            }
            self.serve_clients(&ready.clients);
            if ready.listener {
                self.accept();
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let machine = self.control.machine();
        let input = machine.as_ref().map(|m| lock(&m.serial).input_ready());
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.bell.as_fd(), PollFlags::POLLIN),
        ];
        for client in &self.clients {
            let mut wanted = PollFlags::POLLIN;
            wanted.set(PollFlags::POLLOUT, client.has_unsent());
            fds.push(PollFd::new(client.stream().as_fd(), wanted));
        }
        if let Some(console) = &input {
            // SAFETY: `console` is held until this function returns.
            let fd = unsafe { BorrowedFd::borrow_raw(console.ready().as_raw_fd()) };
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok(Ready::default()),
            Err(error) => return Err(error.into()),
        }
        let found = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
        let first_client = 3;
        let after_clients = first_client + self.clients.len();
        if !found(2).is_empty() {
            self.control.bell.clear();
        }
        let input_ready = input.is_some() && !found(after_clients).is_empty();
        if input_ready && let Some(console) = &input {
            // Cleared before the bytes are taken: what comes later rings again.
            let _ = console.ready().read();
        }
        Ok(Ready {
            listener: !found(0).is_empty(),
            signals: !found(1).is_empty(),
            input: input_ready,
            clients: (first_client..after_clients).map(found).collect(),
        })
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            tracing::info!(signal = signal.ssi_signo, "a signal ends the guest");
            self.control.terminate();
        }
    }

    fn send_notices(&mut self) {
        let notices: Vec<Notice> = lock(&self.control.notices).drain(..).collect();
        for notice in notices {
            let line = Message::Notice(notice).encode();
            self.clients.retain_mut(|client| {
                client.send(&line).inspect_err(|error| tracing::debug!(%error, "a control client is dropped")).is_ok()
            });
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let used = self.clients.len() + self.streams.load(Ordering::SeqCst);
            if used >= MAX_CLIENTS {
                tracing::warn!(limit = MAX_CLIENTS, "a control client is refused");
                continue;
            }
            match Client::new(stream) {
                Ok(client) => self.clients.push(client),
                Err(error) => tracing::warn!(%error, "a control client is lost"),
            }
        }
    }

    fn serve_clients(&mut self, ready: &[PollFlags]) {
        let clients = std::mem::take(&mut self.clients);
        for (at, mut client) in clients.into_iter().enumerate() {
            let flags = ready.get(at).copied().unwrap_or(PollFlags::empty());
            match self.serve(&mut client, flags) {
                Ok(None) => self.clients.push(client),
                Ok(Some((stream, reply))) => self.become_stream(client, stream, reply),
                Err(error) => tracing::debug!(%error, "a control client is gone"),
            }
        }
    }

    /// Reads and answers. A reply is returned when the connection becomes a stream of bytes with it.
    fn serve(&mut self, client: &mut Client, flags: PollFlags) -> Result<Option<(Stream, Reply)>, ClientError> {
        if flags.contains(PollFlags::POLLOUT) {
            client.flush()?;
        }
        if !flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return Ok(None);
        }
        client.receive()?;
        while let Some((line, descriptors)) = client.next_line()? {
            let reply = match Request::decode(&line) {
                Ok(request) => match self.control.answer(request, descriptors) {
                    Answer::Reply(reply) => reply,
                    Answer::Stream(stream, reply) => return Ok(Some((stream, reply))),
                },
                Err(error) => {
                    let id = match &error {
                        ProtocolError::NotARequest { id: Some(id), .. } => *id,
                        _ => 0,
                    };
                    Reply::error(id, ErrorCode::BadRequest, error.to_string())
                }
            };
            client.send(&Message::Reply(reply).encode())?;
        }
        Ok(None)
    }

    fn become_stream(&mut self, mut client: Client, stream: Stream, reply: Reply) {
        let guest_end = match self.attach(stream) {
            Ok(guest_end) => guest_end,
            Err((code, words)) => {
                let refusal = Reply::error(reply.id, code, words);
                if client.send(&Message::Reply(refusal).encode()).is_ok() {
                    self.clients.push(client);
                }
                return;
            }
        };
        let streams = Arc::clone(&self.streams);
        streams.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(streams);
        let spawned = Role::Stream.spawn("", move || {
            let _counted = counted;
            let (socket, received, mut unsent) = client.into_stream();
            unsent.extend(Message::Reply(reply).encode());
            if let Err(error) = hand_over(&socket, &unsent) {
                tracing::debug!(?stream, %error, "a client is lost");
                return;
            }
            match guest_end.serve(socket, received) {
                Ok(end) => tracing::debug!(?stream, end, "a client is gone"),
                Err(error) => tracing::debug!(?stream, %error, "a client is lost"),
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(?stream, %error, "cannot start a thread for a client");
        }
    }

    fn attach(&self, stream: Stream) -> Result<GuestEnd, (ErrorCode, String)> {
        match stream {
            Stream::Console => {
                let console = self.control.console.attach();
                console.map(GuestEnd::Console).map_err(|error| (ErrorCode::Failed, error.to_string()))
            }
            Stream::Agent => self.control.agent.attach().map(GuestEnd::Agent).map_err(|error| {
                let code = match error {
                    AgentChannelError::Taken => ErrorCode::Taken,
                    AgentChannelError::EventFd(_) => ErrorCode::Failed,
                };
                (code, error.to_string())
            }),
            Stream::Save { migration, live } => {
                let begun = self.control.begin_save(migration, live);
                begun.map(|(session, parts)| GuestEnd::Save(session, parts, Arc::clone(&self.control)))
            }
            Stream::Restore => {
                self.control.reserve_incoming().map(|incoming| GuestEnd::Restore(IncomingPlace(Some(incoming))))
            }
        }
    }
}

impl GuestEnd {
    /// Copies bytes until one end is gone, and says which. `received` came together with the request.
    fn serve(self, socket: UnixStream, received: Vec<u8>) -> io::Result<String> {
        match self {
            GuestEnd::Console(console) => {
                console.send_input(&received);
                console_hub::serve_client(&console, socket).map(|end| format!("{end:?}"))
            }
            GuestEnd::Agent(agent) => {
                agent_channel::serve_client(&agent, socket, received).map(|end| format!("{end:?}"))
            }
            // Only the guest travels this way.
            GuestEnd::Save(session, parts, control) => {
                match session.run(&parts, &socket, || control.stands_for_a_save()) {
                    Ok(()) => Ok("the guest is saved".to_owned()),
                    Err(error) => Err(io::Error::other(error)),
                }
            }
            GuestEnd::Restore(place) => {
                place.deliver(socket, received);
                Ok("the guest comes".to_owned())
            }
        }
    }
}

/// Sends what belongs to the line protocol, before the first raw byte.
fn hand_over(mut stream: &UnixStream, unsent: &[u8]) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(HAND_OVER))?;
    io::Write::write_all(&mut stream, unsent)
}

/// Counts a stream's thread while it lives.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
