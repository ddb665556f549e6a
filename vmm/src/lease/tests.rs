//! What happens at the end of a lease, with disks that do as the test says. No KVM.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::quiesce::{DiskGate, Drained, Quiesce, QuiesceError};
use super::{ConfirmError, Lease, LeaseChange, Phase, thread};
use crate::cpu::gate::{RunGate, Stop};
use crate::sys::boottime_ns;

const EPOCH: u64 = 41;
const SECOND_NS: u64 = 1_000_000_000;
const SOON_NS: u64 = 30_000_000;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct FakeDisk {
    hangs: AtomicBool,
    does_not_open: AtomicBool,
    /// Its file has to be handed over once it was closed.
    is_handed: AtomicBool,
    wants: AtomicU64,
    open: AtomicBool,
    drains: AtomicU64,
    gate: Mutex<Option<Arc<DiskGate>>>,
}

impl FakeDisk {
    fn opened() -> Arc<Self> {
        let disk = Self::default();
        disk.open.store(true, Ordering::SeqCst);
        Arc::new(disk)
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }
}

impl Quiesce for FakeDisk {
    fn cancel_and_drain(&self, until: Instant) -> Result<Drained, QuiesceError> {
        self.drains.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &*self.gate.lock().unwrap() {
            assert!(!gate.is_open(), "nothing may be submitted during a drain");
        }
        while self.hangs.load(Ordering::SeqCst) {
            if Instant::now() >= until {
                return Err(QuiesceError::StillInFlight { disk: "fake".into(), in_flight: 1 });
            }
            std::thread::yield_now();
        }
        Ok(Drained::default())
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }

    fn has_file(&self) -> bool {
        self.is_open() || !self.is_handed.load(Ordering::SeqCst)
    }

    fn want_file(&self) {
        self.wants.fetch_add(1, Ordering::SeqCst);
    }

    fn reopen(&self) -> Result<(), QuiesceError> {
        assert!(self.has_file());
        if self.does_not_open.load(Ordering::SeqCst) {
            return Err(QuiesceError::NoAnswer { disk: "fake".into() });
        }
        self.open.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Guest {
    lease: Arc<Lease>,
    gate: Arc<RunGate>,
    disk_gate: Arc<DiskGate>,
    changes: Receiver<LeaseChange>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(lease_ns: Option<u64>, disks: &[Arc<FakeDisk>]) -> Self {
        let (gate, disk_gate) = (RunGate::new(), DiskGate::new());
        let (told, changes) = channel();
        let told = Mutex::new(told);
        // The test may be over when the last change comes.
        let listener = Box::new(move |change| {
            let _ = told.lock().unwrap().send(change);
        });
        let deadline = lease_ns.map(|ns| boottime_ns() + ns);
        let lease = Lease::new(EPOCH, deadline, gate.clone(), disk_gate.clone(), listener).unwrap();
        for disk in disks {
            *disk.gate.lock().unwrap() = Some(disk_gate.clone());
        }
        lease.guard_disks(disks.iter().map(|d| d.clone() as Arc<dyn Quiesce>).collect());
        let thread = Some(thread::start(lease.clone()).unwrap());
        Self { lease, gate, disk_gate, changes, thread }
    }

    fn next(&self) -> LeaseChange {
        self.changes.recv_timeout(PATIENCE).unwrap()
    }

    fn confirm(&self, ahead_ns: u64) -> Result<u64, ConfirmError> {
        self.lease.confirm(EPOCH, boottime_ns() + ahead_ns)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.lease.end();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn at_the_deadline_the_guest_stops_its_disks_are_drained_and_closed() {
    let disk = FakeDisk::opened();
    let guest = Guest::new(Some(SOON_NS), std::slice::from_ref(&disk));
    assert_eq!(guest.next(), LeaseChange::Expired);
    assert!(guest.gate.holds(Stop::Lease) && !guest.disk_gate.is_open());
    assert_eq!(guest.next(), LeaseChange::Quiesced);
    assert_eq!(guest.lease.phase(), Phase::Quiesced);
    assert!(!disk.is_open());

    guest.confirm(10 * SECOND_NS).unwrap();
    assert_eq!(guest.next(), LeaseChange::Resumed);
    assert!(disk.is_open() && guest.gate.is_open() && guest.disk_gate.is_open());
}

#[test]
fn a_guest_whose_io_hangs_is_never_called_quiesced() {
    let disk = FakeDisk::opened();
    disk.hangs.store(true, Ordering::SeqCst);
    let guest = Guest::new(Some(SOON_NS), std::slice::from_ref(&disk));
    assert_eq!(guest.next(), LeaseChange::Expired);
    // Longer than one attempt lasts: the lease thread goes on trying.
    wait_until("a second drain", || disk.drains.load(Ordering::SeqCst) >= 2);
    assert_eq!(guest.lease.phase(), Phase::Expired);
    assert!(disk.is_open(), "a disk with requests in the kernel is not closed");
    disk.hangs.store(false, Ordering::SeqCst);
    assert_eq!(guest.next(), LeaseChange::Quiesced);
}

#[test]
fn a_submission_that_began_in_time_is_waited_for() {
    let disk = FakeDisk::opened();
    let guest = Guest::new(Some(SOON_NS), std::slice::from_ref(&disk));
    let pass = guest.disk_gate.try_enter().unwrap();
    assert_eq!(guest.next(), LeaseChange::Expired);
    assert!(guest.disk_gate.try_enter().is_none());
    assert_eq!(disk.drains.load(Ordering::SeqCst), 0);
    drop(pass);
    assert_eq!(guest.next(), LeaseChange::Quiesced);
}

#[test]
fn a_confirmation_that_comes_while_io_hangs_resumes_the_guest() {
    let disk = FakeDisk::opened();
    disk.hangs.store(true, Ordering::SeqCst);
    let guest = Guest::new(Some(SOON_NS), std::slice::from_ref(&disk));
    assert_eq!(guest.next(), LeaseChange::Expired);
    wait_until("the drain", || disk.drains.load(Ordering::SeqCst) > 0);
    guest.confirm(12 * SECOND_NS).unwrap();
    assert_eq!(guest.next(), LeaseChange::Resumed);
    assert!(guest.gate.is_open() && guest.disk_gate.is_open());
}

#[test]
fn a_guest_whose_disk_does_not_open_stays_stopped_until_it_does() {
    let disk = FakeDisk::opened();
    let other = FakeDisk::opened();
    let guest = Guest::new(Some(SOON_NS), &[other.clone(), disk.clone()]);
    assert_eq!((guest.next(), guest.next()), (LeaseChange::Expired, LeaseChange::Quiesced));
    disk.does_not_open.store(true, Ordering::SeqCst);
    guest.confirm(5 * SECOND_NS).unwrap();
    assert_eq!(guest.next(), LeaseChange::Quiesced);
    assert!(!other.is_open(), "what did open is closed again");
    assert!(guest.gate.holds(Stop::Lease));
    disk.does_not_open.store(false, Ordering::SeqCst);
    guest.confirm(6 * SECOND_NS).unwrap();
    assert_eq!(guest.next(), LeaseChange::Resumed);
}

#[test]
fn a_guest_waits_for_the_files_of_its_disks_and_for_no_longer_than_its_lease() {
    let disk = FakeDisk::opened();
    let guest = Guest::new(Some(SOON_NS), std::slice::from_ref(&disk));
    assert_eq!((guest.next(), guest.next()), (LeaseChange::Expired, LeaseChange::Quiesced));
    disk.is_handed.store(true, Ordering::SeqCst);
    guest.confirm(SOON_NS).unwrap();
    // They do not come in time.
    assert_eq!(guest.next(), LeaseChange::Quiesced);
    assert!(disk.wants.load(Ordering::SeqCst) > 0 && guest.gate.holds(Stop::Lease) && !disk.is_open());

    let wants = disk.wants.load(Ordering::SeqCst);
    guest.confirm(10 * SECOND_NS).unwrap();
    wait_until("it to be asked for", || disk.wants.load(Ordering::SeqCst) > wants);
    assert_eq!(guest.lease.phase(), Phase::Reviving);
    assert!(guest.gate.holds(Stop::Lease) && !guest.disk_gate.is_open());
    disk.is_handed.store(false, Ordering::SeqCst);
    guest.lease.files_came();
    assert_eq!(guest.next(), LeaseChange::Resumed);
    assert!(disk.is_open() && guest.gate.is_open() && guest.disk_gate.is_open());
}

#[test]
fn a_machine_without_its_files_does_not_run_though_its_lease_is_valid() {
    // It was built while the lease was over, and the lease was confirmed meanwhile.
    let guest = Guest::new(Some(10 * SECOND_NS), &[]);
    let disk = Arc::new(FakeDisk::default());
    disk.is_handed.store(true, Ordering::SeqCst);
    guest.lease.guard_disks(vec![disk.clone()]);
    assert!(guest.gate.holds(Stop::Lease) && !guest.disk_gate.is_open());
    wait_until("it to be asked for", || disk.wants.load(Ordering::SeqCst) > 0);
    disk.is_handed.store(false, Ordering::SeqCst);
    guest.lease.files_came();
    assert_eq!(guest.next(), LeaseChange::Resumed);
    assert!(disk.is_open() && guest.gate.is_open() && guest.disk_gate.is_open());
}

#[test]
fn disks_that_a_reset_opened_while_the_lease_is_over_are_closed() {
    let guest = Guest::new(Some(SOON_NS), &[]);
    assert_eq!((guest.next(), guest.next()), (LeaseChange::Expired, LeaseChange::Quiesced));
    let disk = FakeDisk::opened();
    guest.lease.open_disks_if_valid();
    assert!(!guest.disk_gate.is_open());
    guest.lease.guard_disks(vec![disk.clone()]);
    assert_eq!(guest.next(), LeaseChange::Quiesced);
    assert!(!disk.is_open());
}

#[test]
fn confirmations_keep_a_lease_alive_and_bad_ones_change_nothing() {
    let guest = Guest::new(Some(10 * SECOND_NS), &[]);
    let first = guest.lease.deadline_ns().unwrap();
    let wrong = guest.lease.confirm(EPOCH + 1, first + SECOND_NS);
    assert_eq!(wrong, Err(ConfirmError::WrongEpoch { mine: EPOCH, asked: EPOCH + 1 }));
    assert!(matches!(guest.confirm(13 * SECOND_NS), Err(ConfirmError::TooFar { .. })));
    let past = guest.lease.confirm(EPOCH, boottime_ns() - SECOND_NS);
    assert!(matches!(past, Err(ConfirmError::Passed { .. })));
    assert_eq!(guest.lease.deadline_ns(), Some(first));
    // An answer that was overtaken by a newer one does not shorten the lease.
    assert_eq!(guest.confirm(2 * SECOND_NS), Ok(first));
    let later = guest.confirm(12 * SECOND_NS).unwrap();
    assert!(later > first);
    assert_eq!(guest.lease.deadline_ns(), Some(later));
}

#[test]
fn a_guest_of_another_class_never_stops() {
    let guest = Guest::new(None, &[]);
    assert!(!guest.lease.is_over());
    guest.lease.expire();
    assert_eq!(guest.lease.phase(), Phase::Valid);
    assert_eq!(guest.confirm(SECOND_NS), Err(ConfirmError::NoLease));
    assert!(guest.lease.watch_this_thread().unwrap().is_none());
}
