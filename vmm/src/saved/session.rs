//! The save of a running guest: who may begin one, what becomes of it, and the thread that carries it out.
//!
//! ```text
//!            begin                     all is sent
//!   Idle --------------> Saving ---------------------> Saved
//!    ^                     |  anything fails             |  begin: once more
//!    |                     v                             v
//!    +----- resume ----- Failed ------- begin -------> Saving
//! ```
//!
//! From the beginning until `resume` the guest stands ([`Stop::Saved`]) and its disks are held: what was sent stays true for as long as
//! nobody says that it does not matter. The machine may be taken down in any state; a save that is under way is given up then.

use std::io::BufWriter;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_control::{SaveState, SaveStatus};

use super::memory::{self, MemoryCopyError};
use super::parts::{Parts, PartsError};
use super::stream::{GuestWriter, StreamError};
use crate::cpu::gate::{RunGate, Stop};
use crate::lease::quiesce::DiskGate;

/// A client that takes nothing for this long is gone. What it writes to may be slow storage.
const NO_PROGRESS: Duration = Duration::from_secs(150);
/// How long the end of a machine waits for a save to let go of it.
const LET_GO: Duration = Duration::from_secs(5);
const BUFFER_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    Parts(#[from] PartsError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Memory(#[from] MemoryCopyError),
    #[error("the connection cannot be used")]
    Connection(#[source] std::io::Error),
    #[error("the machine was taken down")]
    GivenUp,
}

/// Why a save does not begin, or does not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SaveRefusal {
    #[error("the guest is being saved over another connection")]
    Taken,
    #[error("the guest is being saved; end the connection that it is saved over first")]
    UnderWay,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Idle,
    Saving,
    Saved,
    Failed(String),
}

struct State {
    phase: Phase,
    /// That the present or last save is for.
    migration: Option<u64>,
    given_up: bool,
    /// Where the guest goes, to be cut when it is given up.
    stream: Option<UnixStream>,
}

#[derive(Debug, Default)]
struct Progress {
    pages_total: AtomicU64,
    pages_done: AtomicU64,
    pages_sent: AtomicU64,
    bytes_sent: AtomicU64,
}

/// The saves of one process.
pub struct Saves {
    gate: Arc<RunGate>,
    disk_gate: Arc<DiskGate>,
    state: Mutex<State>,
    changed: Condvar,
    progress: Progress,
}

/// One save. Dropped before its end, it has failed.
pub struct Session {
    saves: Arc<Saves>,
}

impl Saves {
    pub fn new(gate: Arc<RunGate>, disk_gate: Arc<DiskGate>) -> Arc<Self> {
        let state = State { phase: Phase::Idle, migration: None, given_up: false, stream: None };
        let (state, changed, progress) = (Mutex::new(state), Condvar::new(), Progress::default());
        Arc::new(Self { gate, disk_gate, state, changed, progress })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the guest, for this migration if it is for one. Does not wait for it.
    pub fn begin(self: &Arc<Self>, migration: Option<u64>) -> Result<Session, SaveRefusal> {
        let mut state = self.state();
        if state.phase == Phase::Saving {
            return Err(SaveRefusal::Taken);
        }
        *state = State { phase: Phase::Saving, migration, given_up: false, stream: None };
        let Progress { pages_total, pages_done, pages_sent, bytes_sent } = &self.progress;
        for counter in [pages_total, pages_done, pages_sent, bytes_sent] {
            counter.store(0, Ordering::Relaxed);
        }
        self.gate.shut(Stop::Saved);
        self.disk_gate.hold();
        Ok(Session { saves: Arc::clone(self) })
    }

    /// Lets a guest go on that was saved, or was not. True when there was one.
    pub fn resume(&self) -> Result<bool, SaveRefusal> {
        let mut state = self.state();
        match state.phase {
            Phase::Saving => Err(SaveRefusal::UnderWay),
            Phase::Idle => Ok(false),
            Phase::Saved | Phase::Failed(_) => {
                state.phase = Phase::Idle;
                self.disk_gate.release();
                self.gate.open(Stop::Saved);
                Ok(true)
            }
        }
    }

    /// The machine ends: cuts a save short, and waits a moment until it has let go.
    pub fn give_up(&self) {
        let mut state = self.state();
        state.given_up = true;
        if let Some(stream) = &state.stream {
            // Fails only when the other end is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let is_saving = |state: &mut State| state.phase == Phase::Saving;
        let waited = self.changed.wait_timeout_while(state, LET_GO, is_saving).unwrap_or_else(PoisonError::into_inner);
        if waited.1.timed_out() {
            tracing::warn!("a save goes on though its machine ends: its storage does not answer");
        }
    }

    /// What the guest stands still for.
    pub fn status(&self) -> Option<SaveStatus> {
        let (state, error, migration) = {
            let state = self.state();
            let (now, error) = match &state.phase {
                Phase::Idle => return None,
                Phase::Saving => (SaveState::Saving, None),
                Phase::Saved => (SaveState::Saved, None),
                Phase::Failed(words) => (SaveState::Failed, Some(words.clone())),
            };
            (now, error, state.migration)
        };
        let progress = &self.progress;
        Some(SaveStatus {
            state,
            migration,
            error,
            pages_total: progress.pages_total.load(Ordering::Relaxed),
            pages_done: progress.pages_done.load(Ordering::Relaxed),
            pages_sent: progress.pages_sent.load(Ordering::Relaxed),
            bytes_sent: progress.bytes_sent.load(Ordering::Relaxed),
        })
    }

    fn finish(&self, phase: Phase) {
        let mut state = self.state();
        if state.phase == Phase::Saving {
            state.phase = phase;
        }
        state.stream = None;
        drop(state);
        self.changed.notify_all();
    }

    fn is_given_up(&self) -> bool {
        self.state().given_up
    }
}

impl Session {
    /// Sends the guest, and says how that ended.
    pub fn run(self, parts: &Parts, socket: &UnixStream) -> Result<(), SaveError> {
        let result = self.send(parts, socket);
        match &result {
            Ok(()) => {
                tracing::info!("the guest is saved");
                self.saves.finish(Phase::Saved);
            }
            Err(error) => {
                let words = crate::process::chain(error);
                tracing::error!(error = words, "the guest is not saved");
                self.saves.finish(Phase::Failed(words));
            }
        }
        result
    }

    fn send(&self, parts: &Parts, socket: &UnixStream) -> Result<(), SaveError> {
        let (saves, progress) = (&self.saves, &self.saves.progress);
        progress.pages_total.store(parts.pages(), Ordering::Relaxed);
        socket.set_write_timeout(Some(NO_PROGRESS)).map_err(SaveError::Connection)?;
        saves.state().stream = Some(socket.try_clone().map_err(SaveError::Connection)?);
        parts.settle()?;
        let (header, payloads) = {
            // What the header names is what there is a state of. Not for the time of the drain: whoever takes the machine down waits for it.
            let _nobody_connects = parts.devices.hold();
            parts.ask_for_leaving()?;
            (parts.header(), parts.save()?)
        };
        // From here on nothing writes to the guest's memory: it is sent once, after the states (rule 4 of reference peers-vmm §4.2).
        let mut writer = GuestWriter::start(BufWriter::with_capacity(BUFFER_BYTES, socket), &header)?;
        memory::send_all(&parts.memory, &mut writer, |done, writer| {
            progress.pages_done.store(done, Ordering::Relaxed);
            progress.pages_sent.store(writer.totals().pages, Ordering::Relaxed);
            progress.bytes_sent.store(writer.bytes(), Ordering::Relaxed);
            !saves.is_given_up()
        })?;
        for payload in &payloads {
            writer.state(payload)?;
        }
        if saves.is_given_up() {
            return Err(SaveError::GivenUp);
        }
        writer.end()?;
        progress.bytes_sent.store(writer.bytes(), Ordering::Relaxed);
        socket.shutdown(Shutdown::Write).map_err(SaveError::Connection)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.saves.finish(Phase::Failed("the client was gone before the guest was saved".to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn saves() -> (Arc<Saves>, Arc<RunGate>, Arc<DiskGate>) {
        let (gate, disk_gate) = (RunGate::new(), DiskGate::new());
        (Saves::new(gate.clone(), disk_gate.clone()), gate, disk_gate)
    }

    fn state_of(saves: &Saves) -> Option<SaveState> {
        saves.status().map(|status| status.state)
    }

    #[test]
    fn a_guest_stands_from_the_beginning_of_a_save_until_it_is_resumed() {
        let (saves, gate, disk_gate) = saves();
        assert_eq!(saves.resume(), Ok(false));
        let session = saves.begin(None).unwrap();
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open());
        assert_eq!(saves.begin(None).err(), Some(SaveRefusal::Taken));
        assert_eq!(saves.resume(), Err(SaveRefusal::UnderWay));
        assert_eq!(state_of(&saves), Some(SaveState::Saving));

        saves.finish(Phase::Saved);
        drop(session);
        assert_eq!(state_of(&saves), Some(SaveState::Saved));
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open(), "what was sent stays true");
        assert_eq!(saves.resume(), Ok(true));
        assert!(gate.is_open() && disk_gate.is_open());
        assert_eq!(saves.status(), None);
    }

    #[test]
    fn a_client_that_is_gone_leaves_the_guest_stopped_until_it_is_resumed_or_saved_again() {
        let (saves, gate, _) = saves();
        drop(saves.begin(None).unwrap());
        let status = saves.status().unwrap();
        assert_eq!(status.state, SaveState::Failed);
        assert!(status.error.unwrap().contains("client was gone"));
        assert!(gate.holds(Stop::Saved));

        let again = saves.begin(None).unwrap();
        assert_eq!(state_of(&saves), Some(SaveState::Saving));
        drop(again);
        gate.shut(Stop::Lease);
        assert_eq!(saves.resume(), Ok(true));
        assert!(!gate.is_open(), "the lease is a reason of its own");
    }

    #[test]
    fn the_end_of_a_machine_cuts_a_save_short() {
        let (saves, gate, _) = saves();
        saves.give_up();
        let session = saves.begin(None).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        saves.state().stream = Some(near.try_clone().unwrap());
        let saver = std::thread::spawn(move || {
            // As a save does: it writes until it cannot.
            let mut written = &near;
            while std::io::Write::write_all(&mut written, &[0; 4096]).is_ok() {}
            drop(session);
        });
        let before = Instant::now();
        saves.give_up();
        assert!(before.elapsed() < LET_GO);
        saver.join().unwrap();
        assert_eq!(state_of(&saves), Some(SaveState::Failed));
        assert!(gate.holds(Stop::Saved));
        drop(far);
    }
}
