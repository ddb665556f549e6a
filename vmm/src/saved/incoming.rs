//! A guest that comes from elsewhere: what a process does before it may run one.
//!
//! ```text
//!            restore_attach              all is in its place            run
//!   Waiting ---------------> Loading --------------------------> Loaded -----> Running
//!      |                        |                                   |
//!      +------------------------+------- power_off, SIGTERM --------+--------> Ended
//! ```
//!
//! The main thread waits here and loads; the control thread brings what hostd says. Whatever goes wrong while it loads ends the process: a
//! guest that is not whole never runs, and who sent it still has it (rule 9 of reference peers-vmm §4.2).

use std::io::{self, BufReader, Chain, Cursor, Read as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::CpuId;
use vmm_control::{IncomingState, IncomingStatus};

use super::frame::{FrameKind, FrameWriter, MAX_WORDS_BYTES};
use super::header::HeaderError;
use super::memory::{self, MemoryCopyError};
use super::parts::PartsError;
use super::payload::{PayloadError, Payloads};
use super::stream::{GuestReader, Item, StreamError};
use crate::machine::Machine;
use crate::machine::layout::Layout;

/// A source that sends nothing for this long is gone.
const NO_PROGRESS: Duration = Duration::from_secs(150);
/// For the words that end a refused guest.
const LAST_WORDS: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the guest cannot run here")]
    Header(#[from] HeaderError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Memory(#[from] MemoryCopyError),
    #[error(transparent)]
    Parts(#[from] PartsError),
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error("the connection cannot be used")]
    Connection(#[source] io::Error),
}

/// The order to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOrder {
    pub epoch: u64,
    pub deadline_ns: Option<u64>,
    pub started_marker: PathBuf,
}

/// Why a request comes at the wrong moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IncomingRefusal {
    #[error("this process does not wait for a guest")]
    NotIncoming,
    #[error("a guest comes over another connection")]
    Taken,
    #[error("no guest is loaded yet")]
    NotLoaded,
}

/// The connection that a guest comes over, with what came together with the request.
pub struct Source {
    pub socket: UnixStream,
    pub received: Vec<u8>,
}

enum State {
    Waiting,
    /// Promised to a client whose connection is being handed over.
    Reserved,
    Arrived(Source),
    Loading(UnixStream),
    Loaded,
    Ordered(RunOrder),
    Running,
    Ended,
}

pub struct Incoming {
    state: Mutex<State>,
    changed: Condvar,
    bytes: AtomicU64,
}

impl Default for Incoming {
    fn default() -> Self {
        Self { state: Mutex::new(State::Waiting), changed: Condvar::new(), bytes: AtomicU64::new(0) }
    }
}

impl Incoming {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, to: State) {
        let mut state = self.state();
        // The end is the end.
        if !matches!(*state, State::Ended) {
            *state = to;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A client wants to bring the guest.
    pub fn reserve(&self) -> Result<(), IncomingRefusal> {
        let mut state = self.state();
        match *state {
            State::Waiting => {
                *state = State::Reserved;
                Ok(())
            }
            State::Running | State::Ended => Err(IncomingRefusal::NotIncoming),
            _ => Err(IncomingRefusal::Taken),
        }
    }

    /// Its connection; `None` when it was lost before a byte came, and another client may try.
    pub fn deliver(&self, source: Option<Source>) {
        self.change(source.map_or(State::Waiting, State::Arrived));
    }

    /// Says that the guest may run.
    pub fn order(&self, order: RunOrder) -> Result<(), IncomingRefusal> {
        let mut state = self.state();
        match *state {
            State::Loaded => *state = State::Ordered(order),
            State::Ordered(_) | State::Running | State::Ended => return Err(IncomingRefusal::NotIncoming),
            _ => return Err(IncomingRefusal::NotLoaded),
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The guest is not wanted any more.
    pub fn end(&self) {
        let mut state = self.state();
        if let State::Loading(socket) = &*state {
            // Fails only when the other end is gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        if !matches!(*state, State::Running) {
            *state = State::Ended;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// It runs: this is over. True the first time.
    pub fn is_running(&self) -> bool {
        let before = std::mem::replace(&mut *self.state(), State::Running);
        !matches!(before, State::Running)
    }

    pub fn is_loaded(&self) {
        self.change(State::Loaded);
    }

    pub fn has_ended(&self) -> bool {
        matches!(*self.state(), State::Ended)
    }

    pub fn status(&self) -> Option<IncomingStatus> {
        let state = match *self.state() {
            State::Waiting | State::Reserved => IncomingState::Waiting,
            State::Arrived(_) | State::Loading(_) => IncomingState::Loading,
            State::Loaded | State::Ordered(_) => IncomingState::Loaded,
            State::Running | State::Ended => return None,
        };
        Some(IncomingStatus { state, bytes_received: self.bytes.load(Ordering::Relaxed) })
    }

    /// Waits for a client with a guest. `None` at the end.
    pub fn wait_source(&self) -> io::Result<Option<Source>> {
        let mut state = self.state();
        loop {
            match &*state {
                State::Ended => return Ok(None),
                State::Arrived(source) => {
                    let loading = State::Loading(source.socket.try_clone()?);
                    return match std::mem::replace(&mut *state, loading) {
                        State::Arrived(source) => Ok(Some(source)),
                        _ => Ok(None),
                    };
                }
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits for the order to run. `None` at the end.
    pub fn wait_order(&self) -> Option<RunOrder> {
        let mut state = self.state();
        loop {
            match &*state {
                State::Ended => return None,
                State::Ordered(order) => return Some(order.clone()),
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Takes a guest into a machine that was built for one. Returns what its vCPUs were given as CPUID. The source is told how far it is.
    pub fn load(&self, source: Source, machine: &mut Machine) -> Result<Vec<CpuId>, LoadError> {
        let socket = source.socket.try_clone().map_err(LoadError::Connection)?;
        socket.set_read_timeout(Some(NO_PROGRESS)).map_err(LoadError::Connection)?;
        socket.set_write_timeout(Some(LAST_WORDS)).map_err(LoadError::Connection)?;
        let mut answers = FrameWriter::answers(&socket);
        let input = Cursor::new(source.received).chain(BufReader::new(source.socket));
        let result = self.take(input, &socket, &mut answers, machine);
        let told = match &result {
            Ok(_) => answers.write(FrameKind::Loaded, &[]),
            Err(error) => {
                let words = crate::process::chain(error);
                let end = words.floor_char_boundary(words.len().min(MAX_WORDS_BYTES as usize));
                answers.write(FrameKind::Refused, &[&words.as_bytes()[..end]])
            }
        };
        if let Err(error) = told {
            // The control socket says the same.
            tracing::debug!(%error, "who brought the guest does not listen");
        }
        result
    }

    fn take(
        &self,
        input: Chain<Cursor<Vec<u8>>, BufReader<UnixStream>>,
        socket: &UnixStream,
        answers: &mut FrameWriter<&UnixStream>,
        machine: &mut Machine,
    ) -> Result<Vec<CpuId>, LoadError> {
        let parts = machine.parts();
        let (header, mut reader) = GuestReader::start(input)?;
        header.check(&parts.here())?;
        let shape = &header.shape;
        reader.accept(&Layout::new(shape.memory_bytes, shape.max_memory_bytes));
        if let Err(error) = answers.write(FrameKind::Accepted, &[]) {
            tracing::debug!(%error, "who brings the guest does not listen");
        }
        let mut payloads = Payloads::default();
        loop {
            match reader.item()? {
                Item::Pages { address, data } => memory::put_pages(&parts.memory, address, data)?,
                Item::Zeros { address, pages } => memory::put_zeros(&parts.memory, address, pages)?,
                Item::State(payload) => payloads.add(payload)?,
                Item::End => break,
            }
            self.bytes.store(reader.bytes(), Ordering::Relaxed);
        }
        self.bytes.store(reader.bytes(), Ordering::Relaxed);
        socket.set_nonblocking(true).map_err(LoadError::Connection)?;
        reader.nothing_follows()?;
        socket.set_nonblocking(false).map_err(LoadError::Connection)?;
        Ok(machine.restore(payloads)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn order(epoch: u64) -> RunOrder {
        RunOrder { epoch, deadline_ns: None, started_marker: "/started".into() }
    }

    fn source() -> (Source, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Source { socket: near, received: b"begun".to_vec() }, far)
    }

    #[test]
    fn a_guest_runs_only_after_it_was_loaded_and_once() {
        let incoming = Incoming::default();
        assert_eq!(incoming.order(order(42)), Err(IncomingRefusal::NotLoaded));
        incoming.reserve().unwrap();
        assert_eq!(incoming.reserve(), Err(IncomingRefusal::Taken));
        // That client was lost: the next one comes.
        incoming.deliver(None);
        incoming.reserve().unwrap();
        let (near, _far) = source();
        incoming.deliver(Some(near));
        let taken = incoming.wait_source().unwrap().unwrap();
        assert_eq!(taken.received, b"begun");
        assert_eq!(incoming.status().unwrap().state, IncomingState::Loading);
        assert_eq!(incoming.reserve(), Err(IncomingRefusal::Taken));
        assert_eq!(incoming.order(order(42)), Err(IncomingRefusal::NotLoaded));
        incoming.is_loaded();
        assert_eq!(incoming.status().unwrap().state, IncomingState::Loaded);
        incoming.order(order(42)).unwrap();
        assert_eq!(incoming.order(order(43)), Err(IncomingRefusal::NotIncoming));
        assert_eq!(incoming.wait_order(), Some(order(42)));
        assert!(incoming.is_running() && !incoming.is_running());
        assert_eq!(incoming.status(), None);
        assert_eq!(incoming.reserve(), Err(IncomingRefusal::NotIncoming));
    }

    #[test]
    fn the_end_wakes_whoever_waits_and_cuts_the_stream() {
        let incoming = Arc::new(Incoming::default());
        let waiter = std::thread::spawn({
            let incoming = Arc::clone(&incoming);
            move || incoming.wait_source().unwrap().is_none()
        });
        incoming.end();
        assert!(waiter.join().unwrap());
        assert_eq!(incoming.wait_order(), None);
        incoming.is_loaded();
        assert!(incoming.has_ended(), "nothing comes after the end");

        let incoming = Incoming::default();
        incoming.reserve().unwrap();
        let (near, _far) = source();
        incoming.deliver(Some(near));
        let mut taken = incoming.wait_source().unwrap().unwrap();
        incoming.end();
        assert_eq!(taken.socket.read(&mut [0]).unwrap(), 0);
        assert_eq!(incoming.order(order(1)), Err(IncomingRefusal::NotIncoming));
    }
}
