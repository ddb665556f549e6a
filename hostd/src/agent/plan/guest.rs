//! What a host knows of a guest that it has, and what its process is told.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::Seq;
use statemachine::state::DiskFault;
use statemachine::state::ExitReason;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::MigrationProgress;
use statemachine::state::ReleaseClass;
use vmm_control::DeviceState;

use crate::lease::clock::Boottime;

/// How a guest ended, as it will be reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub reason: ExitReason,
    pub detail: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Its process was started or found, and has not answered yet.
    Launching,
    /// It takes in a guest from another host; nothing of it runs here.
    Incoming {
        /// All of it.
        loaded: bool,
    },
    Alive {
        status: GuestStatus,
        /// No vCPU runs and no I/O of a shared disk is under way.
        quiesced: bool,
    },
    /// Its lock is free and its control group empty.
    Gone(Ended),
}

/// The end of a guest, under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopping {
    /// The desire that it obeys; another one begins anew.
    pub desired_at: Seq,
    pub first_press: Option<Boottime>,
    pub presses: u8,
    pub power_off: Option<Boottime>,
    pub killed: Option<Boottime>,
}

impl Stopping {
    fn new(desired_at: Seq) -> Stopping {
        Stopping { desired_at, first_press: None, presses: 0, power_off: None, killed: None }
    }
}

/// Storage that is back, or has space again, tells nobody. So a guest that waits for it tries again by itself, as oVirt's
/// `auto_resume` does: at once, then at growing distances, and whenever a user says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retry {
    tries: u32,
    last: Option<Boottime>,
    wish: Option<Seq>,
}

impl Retry {
    const FIRST_AFTER_MS: u64 = 2_000;
    const AFTER_AT_MOST_MS: u64 = 60_000;

    fn note(&mut self, wish: Seq, now: Boottime) {
        self.tries += 1;
        self.last = Some(now);
        self.wish = Some(wish);
    }

    pub(super) fn is_due(&self, wish: Seq, now: Boottime) -> bool {
        let after_ms = Retry::FIRST_AFTER_MS << self.tries.saturating_sub(1).min(16);
        let waited = self.last.is_none_or(|last| now.ms_since(last) >= after_ms.min(Retry::AFTER_AT_MOST_MS));
        waited || self.wish.is_some_and(|known| known < wish)
    }

    /// It runs: the next error is a new one.
    pub fn forget(&mut self, now: Boottime) {
        let long_ago = |last| now.ms_since(last) >= Retry::AFTER_AT_MOST_MS;
        if self.last.is_some_and(long_ago) {
            *self = Retry::default();
        }
    }
}

/// A guest on its way to another host, or to sleep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    pub migration: MigrationId,
    pub progress: Option<MigrationProgress>,
    /// Of one that falls asleep: its file is whole, and so long.
    pub saved_bytes: Option<u64>,
    /// Why it is not under way any more.
    pub failure: Option<String>,
}

/// The file of a guest on its way to the process that takes the guest in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feeding {
    UnderWay,
    Failed(String),
}

/// A guest that this host has, or had and not yet reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The permit that its process runs it under. Of a process that takes in a guest, the number of the migration in its place: the seq
    /// of a batch like it, and so no epoch of any guest.
    pub epoch: Epoch,
    pub release: ReleaseClass,
    pub phase: Phase,
    /// The newest deadline that was handed to its process.
    pub confirmed: Option<Boottime>,
    pub stopping: Option<Stopping>,
    /// The newest reset that was handed to its process.
    pub reset: Option<Seq>,
    /// When it was last told to stand or to go.
    pub nudged: Option<Boottime>,
    /// Of a guest that an error of a disk holds: when that is tried again.
    pub retry: Retry,
    /// What its agent said last that is worth an event.
    pub facts: Option<Arc<GuestFacts>>,
    /// The error of a disk that holds it.
    pub fault: Option<DiskFault>,
    /// Its disks and network cards as its process has them; `None` until that has answered.
    pub devices: Option<BTreeMap<String, DeviceState>>,
    /// Those that its process is asked to take, and has not answered yet.
    pub plugging: BTreeSet<String>,
    /// The next word of its process on its devices may be from before it answered.
    pub devices_may_be_old: bool,
    /// Why a device is not as it should be.
    pub device_words: BTreeMap<String, String>,
    /// When a device was last plugged, or asked for.
    pub device_tries: BTreeMap<String, Retry>,
    /// The disks whose files its process wants.
    pub files_wanted: BTreeSet<String>,
    /// Those whose files are being opened, or on their way to it.
    pub handing: BTreeSet<String>,
    /// When that was last begun.
    pub file_tries: BTreeMap<String, Retry>,
    /// What its process was told to make do with, in MiB.
    pub memory_told: Option<u64>,
    /// The migration by which it comes, until it runs here.
    pub incoming: Option<MigrationId>,
    /// Of one that wakes up: its file, once that was sent on its way.
    pub feeding: Option<Feeding>,
    /// The carrier's word of the migration by which it leaves.
    pub outgoing: Option<Outgoing>,
    /// The migration for which its process has sent it, or failed to, and may stand still, by the process's own word.
    pub stands_for: Option<MigrationId>,
}

impl Guest {
    pub fn launching(epoch: Epoch, release: ReleaseClass) -> Guest {
        Guest {
            epoch,
            release,
            phase: Phase::Launching,
            confirmed: None,
            stopping: None,
            reset: None,
            nudged: None,
            retry: Retry::default(),
            facts: None,
            fault: None,
            devices: None,
            plugging: BTreeSet::new(),
            devices_may_be_old: false,
            device_words: BTreeMap::new(),
            device_tries: BTreeMap::new(),
            files_wanted: BTreeSet::new(),
            handing: BTreeSet::new(),
            file_tries: BTreeMap::new(),
            memory_told: None,
            incoming: None,
            feeding: None,
            outgoing: None,
            stands_for: None,
        }
    }

    /// One that comes by this migration.
    pub fn coming(migration: MigrationId, release: ReleaseClass) -> Guest {
        let guest = Guest::launching(Epoch::from(Seq::from(migration)), release);
        Guest { incoming: Some(migration), phase: Phase::Incoming { loaded: false }, ..guest }
    }

    /// Its status tells within this time whether it obeyed.
    const NUDGE_EVERY_MS: u64 = 2_000;

    /// May it be told again to stand or to go?
    pub(super) fn may_be_nudged(&self, now: Boottime) -> bool {
        self.nudged.is_none_or(|last| now.ms_since(last) >= Guest::NUDGE_EVERY_MS)
    }

    pub fn is_gone(&self) -> bool {
        matches!(self.phase, Phase::Gone(_))
    }

    /// Notes that a device was plugged, or asked for.
    pub fn note_device(&mut self, id: &str, now: Boottime) {
        self.device_tries.entry(id.to_owned()).or_default().note(Seq::ZERO, now);
    }

    /// Its process is asked to take a device. Why it was not there before says nothing about this time.
    pub fn begin_plug(&mut self, id: &str, now: Boottime) {
        self.note_device(id, now);
        self.device_words.remove(id);
        self.plugging.insert(id.to_owned());
    }

    /// Its process has answered for a device that it was asked to take. What it said of its devices before does not count any more, and
    /// one such word may still be on its way: it is asked again only when its last answer was heard.
    pub fn plug_answered(&mut self, id: &str, refusal: Option<String>) {
        self.plugging.remove(id);
        self.devices = None;
        self.devices_may_be_old = true;
        self.device_words.remove(id);
        self.device_words.extend(refusal.map(|words| (id.to_owned(), words)));
    }

    /// What its process says of its devices. One that is there has no words against it, and of one that the guest gave up all is
    /// forgotten: another may come under its name.
    pub fn see_devices(&mut self, seen: BTreeMap<String, DeviceState>) {
        if std::mem::take(&mut self.devices_may_be_old) {
            return;
        }
        let before = self.devices.replace(seen).unwrap_or_default();
        let now = self.devices.iter().flatten();
        for (id, state) in now.filter(|(id, state)| before.get(*id) != Some(state)) {
            if *state == DeviceState::Present {
                self.device_words.remove(id);
                self.device_tries.remove(id);
            }
        }
        let gone = before.iter().filter(|(_, state)| **state != DeviceState::Plugging).map(|(id, _)| id);
        for id in gone.filter(|id| self.devices.as_ref().is_some_and(|now| !now.contains_key(*id))) {
            self.device_words.remove(id);
            self.device_tries.remove(id);
        }
    }

    /// The files of a disk are being opened for its process.
    pub fn begin_handing(&mut self, disk: &str, now: Boottime) {
        self.file_tries.entry(disk.to_owned()).or_default().note(Seq::ZERO, now);
        self.handing.insert(disk.to_owned());
    }

    /// The guest that its process took in runs under this permit. So its disks are open and no file is on its way any more; that the
    /// last ones came may be told under the number that it went by until now, which nobody hears.
    pub fn runs_as(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.incoming = None;
        self.feeding = None;
        self.phase = Phase::Launching;
        self.handing.clear();
    }

    /// What its process wants now. A disk that is content begins anew when it wants its files again.
    pub fn see_files_wanted(&mut self, wanted: BTreeSet<String>) {
        self.file_tries.retain(|disk, _| wanted.contains(disk));
        self.files_wanted = wanted;
    }

    /// Notes an order that was handed to the guest's process, so that it is not planned again.
    pub fn note(&mut self, order: Order, desired_at: Seq, now: Boottime) {
        let stopping = || Stopping::new(desired_at);
        match order {
            Order::Confirm { deadline } => self.confirmed = Some(deadline),
            Order::Reset { id } => self.reset = Some(id),
            Order::Run { deadline, .. } => {
                self.nudged = Some(now);
                self.confirmed = Some(deadline);
            }
            Order::Pause | Order::GoOn { .. } => self.nudged = Some(now),
            Order::Memory { mib } => self.memory_told = Some(mib),
            Order::Resume { wish } => {
                self.nudged = Some(now);
                if matches!(self.phase, Phase::Alive { status: GuestStatus::PausedIo, .. }) {
                    self.retry.note(wish, now);
                }
            }
            Order::PowerButton => {
                let current = self.stopping.get_or_insert_with(stopping);
                if current.desired_at != desired_at {
                    *current = Stopping::new(desired_at);
                }
                current.first_press.get_or_insert(now);
                current.presses += 1;
            }
            Order::PowerOff => {
                self.stopping.get_or_insert_with(stopping).power_off.get_or_insert(now);
            }
            Order::Kill => self.stopping.get_or_insert_with(stopping).killed = Some(now),
        }
    }
}

/// What a guest's process is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Confirm {
        deadline: Boottime,
    },
    PowerButton,
    PowerOff,
    Reset {
        id: Seq,
    },
    Pause,
    /// Ends a pause of its user's, and tries again what an error of a disk stopped. `wish`: the last command about either.
    Resume {
        wish: Seq,
    },
    /// Runs the guest that it took in, under the permit that the migration ended with.
    Run {
        epoch: Epoch,
        deadline: Boottime,
    },
    /// Lets a guest go on that stood still for a migration which came to nothing.
    GoOn {
        migration: MigrationId,
    },
    /// Makes do with so much of its memory.
    Memory {
        mib: u64,
    },
    Kill,
}
