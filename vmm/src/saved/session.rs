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
//! nobody says that it does not matter. A live save copies the guest while it runs ([`live`]), and stops it for the last of its memory; one
//! that fails before that leaves it running. The machine may be taken down in any state; a save that is under way is given up then.

use std::io::{BufWriter, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_control::{LiveLimits, SaveState, SaveStatus};

use super::dirty::DirtyLog;
use super::frame::{MAX_RUN_PAGES, PAGE_BYTES};
use super::header::Header;
use super::live;
use super::memory::{self, MemoryCopyError};
use super::parts::{Parts, PartsError};
use super::payload::Payload;
use super::precopy::GiveUp;
use super::stream::{GuestWriter, StreamError};
use crate::cpu::gate::{RunGate, Stop};
use crate::lease::quiesce::DiskGate;
use crate::machine::kvm::KvmError;

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
    #[error("the client is gone")]
    ClientGone,
    #[error(transparent)]
    TooBusy(#[from] GiveUp),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("cannot start the thread that slows the guest down")]
    Throttle(#[source] std::io::Error),
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
    /// Since when the guest is kept from running by a save: this one or one before it. `None` while it may run.
    stands_since: Option<Instant>,
    /// Where the guest goes, to be cut when it is given up.
    stream: Option<UnixStream>,
}

/// As in [`SaveStatus`].
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub pages_total: AtomicU64,
    pub pages_done: AtomicU64,
    pub pages_sent: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub round: AtomicU64,
    pub remaining_bytes: AtomicU64,
    pub dirty_bytes_per_second: AtomicU64,
    pub throttle_percent: AtomicU8,
    pub settled_us: AtomicU64,
    pub downtime_us: AtomicU64,
}

impl Progress {
    fn forget(&self) {
        let Self { pages_total, pages_done, pages_sent, bytes_sent, .. } = self;
        let Self { round, remaining_bytes, dirty_bytes_per_second, throttle_percent, settled_us, downtime_us, .. } =
            self;
        let counters = [pages_total, pages_done, pages_sent, bytes_sent, round, remaining_bytes];
        for counter in counters.into_iter().chain([dirty_bytes_per_second, settled_us, downtime_us]) {
            counter.store(0, Ordering::Relaxed);
        }
        throttle_percent.store(0, Ordering::Relaxed);
    }

    pub fn has_sent<W: Write>(&self, writer: &GuestWriter<W>) {
        self.pages_sent.store(writer.totals().pages, Ordering::Relaxed);
        self.bytes_sent.store(writer.bytes(), Ordering::Relaxed);
    }
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
    live: Option<LiveLimits>,
}

impl Saves {
    pub fn new(gate: Arc<RunGate>, disk_gate: Arc<DiskGate>) -> Arc<Self> {
        let state = State { phase: Phase::Idle, migration: None, given_up: false, stands_since: None, stream: None };
        let (state, changed, progress) = (Mutex::new(state), Condvar::new(), Progress::default());
        Arc::new(Self { gate, disk_gate, state, changed, progress })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a save, for this migration if it is for one. The guest is stopped, unless it is to be copied live; this does not wait for it.
    pub fn begin(self: &Arc<Self>, migration: Option<u64>, live: Option<LiveLimits>) -> Result<Session, SaveRefusal> {
        let mut state = self.state();
        if state.phase == Phase::Saving {
            return Err(SaveRefusal::Taken);
        }
        let stands_since = state.stands_since;
        *state = State { phase: Phase::Saving, migration, given_up: false, stands_since, stream: None };
        self.progress.forget();
        if live.is_none() {
            self.stop_guest(&mut state);
        }
        Ok(Session { saves: Arc::clone(self), live })
    }

    fn stop_guest(&self, state: &mut State) {
        state.stands_since = Some(Instant::now());
        self.gate.shut(Stop::Saved);
        self.disk_gate.hold();
    }

    /// Lets a guest go on that was saved for this migration, or for none, or was not saved after all. True when there was one. A guest
    /// that is copied while it runs needs no leave to.
    pub fn resume(&self, migration: Option<u64>) -> Result<bool, SaveRefusal> {
        let mut state = self.state();
        match state.phase {
            Phase::Saving if state.stands_since.is_some() => Err(SaveRefusal::UnderWay),
            Phase::Saving | Phase::Idle => Ok(false),
            // The other end may run it by now.
            _ if state.migration != migration => Ok(false),
            Phase::Saved | Phase::Failed(_) => {
                state.phase = Phase::Idle;
                if state.stands_since.take().is_some() {
                    self.disk_gate.release();
                    self.gate.open(Stop::Saved);
                }
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

    /// The save that is under way or was the last one, until the guest is resumed.
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
            round: progress.round.load(Ordering::Relaxed),
            remaining_bytes: progress.remaining_bytes.load(Ordering::Relaxed),
            dirty_bytes_per_second: progress.dirty_bytes_per_second.load(Ordering::Relaxed),
            throttle_percent: progress.throttle_percent.load(Ordering::Relaxed),
            settled_us: progress.settled_us.load(Ordering::Relaxed),
            downtime_us: progress.downtime_us.load(Ordering::Relaxed),
        })
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    fn finish(&self, phase: Phase) {
        let mut state = self.state();
        if state.phase == Phase::Saving {
            state.phase = phase;
            if state.stands_since.is_none() {
                // It runs on, and as fast as it likes.
                self.progress.throttle_percent.store(0, Ordering::Relaxed);
            }
        }
        state.stream = None;
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.state().given_up
    }
}

impl Session {
    /// Sends the guest, and says how that ended. `stopped` is called when a guest that was copied live is stopped.
    pub fn run(self, parts: &Parts, socket: &UnixStream, stopped: impl FnOnce()) -> Result<(), SaveError> {
        let result = self.send(parts, socket, stopped);
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

    fn send(&self, parts: &Parts, socket: &UnixStream, stopped: impl FnOnce()) -> Result<(), SaveError> {
        let (saves, progress) = (&self.saves, &self.saves.progress);
        progress.pages_total.store(parts.pages(), Ordering::Relaxed);
        progress.remaining_bytes.store(parts.pages() * PAGE_BYTES, Ordering::Relaxed);
        socket.set_write_timeout(Some(NO_PROGRESS)).map_err(SaveError::Connection)?;
        saves.state().stream = Some(socket.try_clone().map_err(SaveError::Connection)?);
        let out = || BufWriter::with_capacity(BUFFER_BYTES, socket);
        let Some(limits) = self.live else {
            let (named, payloads) = settle(parts)?;
            let mut writer = GuestWriter::start(out(), &named)?;
            memory::send_all(&parts.memory, &mut writer, |done, writer| {
                self.still_wanted(done, parts.pages(), writer)
            })?;
            return self.end(&payloads, writer, socket);
        };
        // Ends after everything else: turning it off takes a while, and the other side has the guest by then (rule 5).
        let mut log = DirtyLog::start(&parts.vm, &parts.memory)?;
        let mut writer = GuestWriter::start(out(), &header(parts))?;
        let throttle = live::copy(saves, parts, socket, limits, (&mut log, &mut writer))?;
        self.stop()?;
        drop(throttle);
        stopped();
        let (_, payloads) = settle(parts)?;
        progress.settled_us.store(self.stands_us(), Ordering::Relaxed);
        log.collect()?;
        let pages = log.pages();
        memory::send_again(&parts.memory, &mut writer, log.take(MAX_RUN_PAGES), |done, writer| {
            self.still_wanted(parts.pages() - pages + done, parts.pages(), writer)
        })?;
        self.end(&payloads, writer, socket)
    }

    /// Stops a guest that was copied live. From here on it stands, whatever becomes of the save.
    fn stop(&self) -> Result<(), SaveError> {
        let mut state = self.saves.state();
        if state.given_up {
            return Err(SaveError::GivenUp);
        }
        self.saves.stop_guest(&mut state);
        Ok(())
    }

    /// For how long the guest stands. 0 when it does not.
    fn stands_us(&self) -> u64 {
        let since = self.saves.state().stands_since;
        since.map_or(0, |since| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn still_wanted<W: Write>(&self, done: u64, pages: u64, writer: &GuestWriter<W>) -> bool {
        let progress = &self.saves.progress;
        progress.pages_done.store(done, Ordering::Relaxed);
        progress.remaining_bytes.store((pages - done) * PAGE_BYTES, Ordering::Relaxed);
        progress.has_sent(writer);
        !self.saves.is_given_up()
    }

    fn end<W: Write>(
        &self,
        payloads: &[Payload],
        mut writer: GuestWriter<W>,
        socket: &UnixStream,
    ) -> Result<(), SaveError> {
        for payload in payloads {
            writer.state(payload)?;
        }
        if self.saves.is_given_up() {
            return Err(SaveError::GivenUp);
        }
        writer.end()?;
        let progress = &self.saves.progress;
        progress.has_sent(&writer);
        progress.downtime_us.store(self.stands_us(), Ordering::Relaxed);
        socket.shutdown(Shutdown::Write).map_err(SaveError::Connection)
    }
}

/// Has the guest stand, and returns all of it but its memory. From here on nothing writes to that: what of it is sent after this is sent
/// for the last time (rule 4 of reference peers-vmm §4.2).
fn settle(parts: &Parts) -> Result<(Header, Vec<Payload>), PartsError> {
    parts.settle()?;
    // What the header names is what there is a state of. Not for the time of the drain: whoever takes the machine down waits for it.
    let _nobody_connects = parts.devices.hold();
    parts.ask_for_leaving()?;
    Ok((parts.header(), parts.save()?))
}

/// Of a guest that runs on. A device that it gives up meanwhile makes the target refuse it.
fn header(parts: &Parts) -> Header {
    let _nobody_connects = parts.devices.hold();
    parts.header()
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
        assert_eq!(saves.resume(None), Ok(false));
        let session = saves.begin(None, None).unwrap();
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open());
        assert_eq!(saves.begin(None, None).err(), Some(SaveRefusal::Taken));
        assert_eq!(saves.resume(None), Err(SaveRefusal::UnderWay));
        assert_eq!(state_of(&saves), Some(SaveState::Saving));

        saves.finish(Phase::Saved);
        drop(session);
        assert_eq!(state_of(&saves), Some(SaveState::Saved));
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open(), "what was sent stays true");
        assert_eq!(saves.resume(None), Ok(true));
        assert!(gate.is_open() && disk_gate.is_open());
        assert_eq!(saves.status(), None);
    }

    #[test]
    fn a_guest_that_stands_for_a_migration_goes_on_when_that_one_came_to_nothing_and_for_no_other_reason() {
        let (saves, gate, disk_gate) = saves();
        let session = saves.begin(Some(7), None).unwrap();
        saves.finish(Phase::Saved);
        drop(session);
        for other in [None, Some(6)] {
            assert_eq!(saves.resume(other), Ok(false));
            assert!(gate.holds(Stop::Saved) && !disk_gate.is_open());
            assert_eq!(saves.status().and_then(|status| status.migration), Some(7));
        }
        assert_eq!(saves.resume(Some(7)), Ok(true));
        assert!(gate.is_open() && disk_gate.is_open());
    }

    #[test]
    fn a_client_that_is_gone_leaves_the_guest_stopped_until_it_is_resumed_or_saved_again() {
        let (saves, gate, _) = saves();
        drop(saves.begin(None, None).unwrap());
        let status = saves.status().unwrap();
        assert_eq!(status.state, SaveState::Failed);
        assert!(status.error.unwrap().contains("client was gone"));
        assert!(gate.holds(Stop::Saved));

        let again = saves.begin(None, None).unwrap();
        assert_eq!(state_of(&saves), Some(SaveState::Saving));
        drop(again);
        gate.shut(Stop::Lease);
        assert_eq!(saves.resume(None), Ok(true));
        assert!(!gate.is_open(), "the lease is a reason of its own");
    }

    #[test]
    fn a_guest_that_is_copied_live_runs_until_it_is_stopped_for_the_last_of_it() {
        let (saves, gate, disk_gate) = saves();
        let live = Some(LiveLimits::default());
        let session = saves.begin(Some(7), live).unwrap();
        assert!(gate.is_open() && disk_gate.is_open());
        assert_eq!(saves.begin(None, live).err(), Some(SaveRefusal::Taken));
        assert_eq!(saves.resume(None), Ok(false), "a pause that somebody asked for may end");
        saves.progress.throttle_percent.store(30, Ordering::Relaxed);
        drop(session);
        let failed = saves.status().unwrap();
        assert_eq!((failed.state, failed.migration, failed.throttle_percent), (SaveState::Failed, Some(7), 0));
        assert!(gate.is_open() && disk_gate.is_open());

        let session = saves.begin(None, live).unwrap();
        session.stop().unwrap();
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open());
        assert_eq!(saves.resume(None), Err(SaveRefusal::UnderWay));
        drop(session);
        assert!(gate.holds(Stop::Saved), "what was sent last may have arrived");
        // Nothing runs meanwhile that a live copy could leave running.
        drop(saves.begin(None, live).unwrap());
        assert!(gate.holds(Stop::Saved) && !disk_gate.is_open());
        assert_eq!(saves.resume(None), Ok(true));
        assert!(gate.is_open() && disk_gate.is_open());

        let session = saves.begin(None, live).unwrap();
        saves.state().given_up = true;
        assert!(matches!(session.stop(), Err(SaveError::GivenUp)));
        assert!(gate.is_open() && disk_gate.is_open());
    }

    #[test]
    fn the_end_of_a_machine_cuts_a_save_short() {
        let (saves, gate, _) = saves();
        saves.give_up();
        let session = saves.begin(None, None).unwrap();
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
