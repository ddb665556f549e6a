//! A disk that hangs, seen by its driver and by those who have to make it quiet (DESIGN §5, hazard C8): a backend that
//! ends requests only when the test says so, and a pipe that nobody writes to under the real io_uring.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Completion, Io, Token};
use super::tests::{DISK_BYTES, Guest, NO_ANSWER, OK, guest_on, guest_with, pattern};
use super::uring::Uring;
use crate::lease::quiesce::{Quiesce, QuiesceError};
use crate::virtio::locked;
use crate::virtio::testing::{Buffer, PATIENCE};

/// A backend that ends requests when the test says so.
pub(crate) struct Hanging {
    shared: Arc<Mutex<Held>>,
    completions: EventFd,
}

#[derive(Default)]
struct Held {
    /// (token, bytes it would transfer, durable, is a flush)
    requests: Vec<(Token, i64, bool, bool)>,
    ended: VecDeque<Completion>,
    /// Requests that the kernel would give back when asked.
    cancellable: bool,
    closed: bool,
}

pub(crate) struct Remote {
    shared: Arc<Mutex<Held>>,
    completions: EventFd,
}

pub(crate) fn hanging() -> (Box<Hanging>, Remote) {
    let shared = Arc::new(Mutex::new(Held::default()));
    let completions = EventFd::new(EFD_NONBLOCK).unwrap();
    let remote = Remote { shared: shared.clone(), completions: completions.try_clone().unwrap() };
    (Box::new(Hanging { shared, completions }), remote)
}

impl Backend for Hanging {
    fn name(&self) -> &'static str {
        "hanging"
    }
    fn completions(&self) -> &EventFd {
        &self.completions
    }
    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()> {
        let (bytes, durable, flush) = match io {
            Io::Read { buffers, .. } => (buffers.iter().map(|b| b.iov_len as i64).sum(), false, false),
            Io::Write { buffers, durable, .. } => (buffers.iter().map(|b| b.iov_len as i64).sum(), durable, false),
            Io::Flush | Io::Settle => (0, false, true),
            _ => (0, false, false),
        };
        locked(&self.shared).requests.push((token, bytes, durable, flush));
        Ok(())
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn cancel(&mut self, tokens: &[Token]) -> io::Result<()> {
        let mut held = locked(&self.shared);
        if held.cancellable {
            held.requests.retain(|(token, ..)| !tokens.contains(token));
            held.ended
                .extend(tokens.iter().map(|token| Completion { token: *token, result: -i64::from(libc::ECANCELED) }));
            self.completions.write(1).unwrap();
        }
        Ok(())
    }
    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let _ = self.completions.read();
        ended.extend(locked(&self.shared).ended.drain(..));
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        locked(&self.shared).closed = true;
    }
}

impl Remote {
    fn held(&self) -> usize {
        locked(&self.shared).requests.len()
    }

    /// Ends everything that is held, with full success.
    pub(crate) fn finish(&self) {
        let mut held = locked(&self.shared);
        let all = std::mem::take(&mut held.requests);
        held.ended.extend(all.into_iter().map(|(token, result, ..)| Completion { token, result }));
        self.completions.write(1).unwrap();
    }

    pub(crate) fn wait_held(&self, count: usize) {
        let until = Instant::now() + PATIENCE;
        while self.held() != count {
            assert!(Instant::now() < until, "{} held, {count} wanted", self.held());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Remote {
    /// Waits until the only request is a flush.
    pub(crate) fn wait_flush(&self) {
        let until = Instant::now() + PATIENCE;
        while !matches!(locked(&self.shared).requests[..], [(_, _, _, true)]) {
            assert!(Instant::now() < until, "no flush");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn hung_guest() -> (Guest, Remote) {
    let (backend, remote) = hanging();
    let mut guest = guest_on(backend);
    guest.driver.start();
    (guest, remote)
}

#[test]
fn a_disk_that_gives_nothing_back_is_not_drained_at_the_deadline() {
    let (mut guest, remote) = hung_guest();
    let at = guest.driver.buffer(&[1; 512]);
    for sector in 0..3 {
        guest.ask(VIRTIO_BLK_T_OUT, sector, &[Buffer::Out(at, 512)]);
    }
    remote.wait_held(3);
    guest.gate.close();
    let error = guest.handle.cancel_and_drain(Instant::now() + Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, QuiesceError::StillInFlight { in_flight: 3, .. }), "{error}");

    // The thread still answers: asked again when the storage is back, it drains. The writes may lie in the page
    // cache, so the drain syncs them first.
    let handle = guest.handle.clone();
    let until = guest.soon();
    let again = std::thread::spawn(move || handle.cancel_and_drain(until));
    remote.finish();
    remote.wait_flush();
    remote.finish();
    again.join().unwrap().unwrap();
    guest.handle.close();
    assert!(locked(&remote.shared).closed);
}

#[test]
fn a_drain_answers_all_who_asked_for_it() {
    let (mut guest, remote) = hung_guest();
    let at = guest.driver.buffer(&[0; 512]);
    guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 512)]);
    remote.wait_held(1);
    guest.gate.close();
    let until = guest.soon();
    let askers: Vec<_> = (0..3)
        .map(|_| {
            let handle = guest.handle.clone();
            std::thread::spawn(move || handle.cancel_and_drain(until))
        })
        .collect();
    let error = guest.handle.cancel_and_drain(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, QuiesceError::StillInFlight { .. }), "{error}");
    remote.finish();
    for asker in askers {
        asker.join().unwrap().unwrap();
    }
}

#[test]
fn a_disk_that_was_unplugged_is_quiet_for_good() {
    let guest = Guest::started(|_| {});
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    assert!(guest.handle.end());
    assert!(guest.handle.end(), "asked again");
    // The lease may have it in its list for a moment longer: it neither fails nor opens it again.
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    std::fs::remove_file(&guest.path).unwrap();
    guest.handle.reopen().unwrap();
    guest.driver.wait("the reset", |driver| {
        driver.write(20, 1, 0);
        driver.status() == 0
    });
}

#[test]
fn cancelled_writes_are_carried_out_after_reopen_and_the_guest_never_knows() {
    let (mut guest, remote) = hung_guest();
    locked(&remote.shared).cancellable = true;
    let bytes = pattern(1024, 6);
    let at = guest.driver.buffer(&bytes);
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 8, &[Buffer::Out(at, 1024)]);
    remote.wait_held(1);

    guest.gate.close();
    let handle = guest.handle.clone();
    let until = guest.soon();
    let draining = std::thread::spawn(move || handle.cancel_and_drain(until));
    // The cancelled write went through a page cache for all that the engine knows: it syncs.
    remote.wait_flush();
    remote.finish();
    let drained = draining.join().unwrap().unwrap();
    assert_eq!((drained.completed, drained.cancelled), (0, 1));
    guest.handle.close();
    assert!(locked(&remote.shared).closed);

    // What the guest asks for meanwhile waits, too.
    let later = guest.ask(VIRTIO_BLK_T_OUT, 16, &[Buffer::Out(at, 1024)]);
    assert_eq!(guest.status(asked), NO_ANSWER);
    guest.handle.reopen().unwrap();
    assert!(guest.driver.try_used(0).is_none(), "the gate is still closed");
    guest.gate.open();
    guest.handle.kick();
    guest.driver.used(0);
    guest.driver.used(0);
    assert_eq!((guest.status(asked), guest.status(later)), (OK, OK));
    let mut in_file = vec![0; 1024];
    let file = File::open(&guest.path).unwrap();
    for offset in [8 * 512, 16 * 512] {
        file.read_exact_at(&mut in_file, offset).unwrap();
        assert_eq!(in_file, bytes);
    }
}

#[test]
fn a_closed_gate_lets_nothing_through() {
    let (mut guest, remote) = hung_guest();
    guest.gate.close();
    let at = guest.driver.buffer(&[1; 512]);
    guest.ask(VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(at, 512)]);
    let drained = guest.handle.cancel_and_drain(guest.soon()).unwrap();
    assert_eq!((drained.completed, drained.cancelled), (0, 0));
    assert_eq!(remote.held(), 0);
    guest.gate.open();
    remote.wait_held(1);
    remote.finish();
    guest.driver.used(0);
}

#[test]
fn another_disk_in_the_place_of_the_closed_one_is_refused() {
    let guest = Guest::started(|_| {});
    guest.gate.close();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    File::options().write(true).open(&guest.path).unwrap().set_len(DISK_BYTES * 2).unwrap();
    assert!(matches!(guest.handle.reopen(), Err(QuiesceError::Changed { .. })));
    std::fs::remove_file(&guest.path).unwrap();
    assert!(matches!(guest.handle.reopen(), Err(QuiesceError::Reopen { .. })));
}

#[test]
fn a_reset_in_mid_flight_ends_when_the_disk_has_let_go() {
    let (mut guest, remote) = hung_guest();
    let at = guest.driver.buffer(&[0; 512]);
    let asked = guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 512)]);
    remote.wait_held(1);
    guest.driver.write(20, 1, 0);
    assert_ne!(guest.driver.status(), 0, "the kernel still has the buffer");
    remote.finish();
    guest.driver.wait("the reset", |d| d.status() == 0);
    assert_eq!(guest.status(asked), NO_ANSWER, "nobody is answered after a reset");
    guest.driver.start();
    guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 512)]);
    remote.wait_held(1);
    remote.finish();
    guest.driver.used(0);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let (backend, remote) = hanging();
    let mut guest = guest_on(backend);
    guest.driver.start_with(!(1 << VIRTIO_BLK_F_FLUSH));
    let at = guest.driver.buffer(&[1; 512]);
    guest.ask(VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(at, 512)]);
    remote.wait_held(1);
    assert!(locked(&remote.shared).requests[0].2);
    remote.finish();
    guest.driver.used(0);
}

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    let (mut guest, remote) = hung_guest();
    let at = guest.driver.buffer(&[0; 1024]);
    let asked = guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 1024)]);
    remote.wait_held(1);
    {
        let mut held = locked(&remote.shared);
        let (token, ..) = held.requests.remove(0);
        held.ended.push_back(Completion { token, result: 300 });
        remote.completions.write(1).unwrap();
    }
    remote.wait_held(1);
    assert_eq!(locked(&remote.shared).requests[0].1, 724);
    remote.finish();
    assert_eq!(guest.driver.used(0).1, 1025);
    assert_eq!(guest.status(asked), OK);
}

#[test]
fn io_uring_takes_back_a_read_that_never_ends() {
    // A pipe that nobody writes to stands for storage that does not answer.
    let (silent, writer) = nix::unistd::pipe().unwrap();
    let backend = match Uring::new(File::from(silent)) {
        Ok(backend) => backend,
        Err((_, error)) => {
            eprintln!("skipped: this kernel has no io_uring ({error})");
            return;
        }
    };
    let mut guest = guest_on(Box::new(backend));
    guest.driver.start();
    let at = guest.driver.buffer(&[0; 512]);
    guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 512)]);
    let metrics = guest.handle.metrics();
    guest.driver.wait("the read to be in the kernel", |_| metrics.in_flight.load(Ordering::SeqCst) == 1);
    guest.gate.close();
    let drained = guest.handle.cancel_and_drain(guest.soon()).unwrap();
    assert_eq!((drained.completed, drained.cancelled), (0, 1));
    drop(writer);
}

#[test]
fn a_disk_is_saved_only_when_quiet_and_resumed_only_on_the_same_disk() {
    let mut guest = Guest::started(|_| {});
    assert_eq!(guest.write_disk(0, &[1; 512]), OK);
    let saved = guest.driver.function.save().unwrap();
    assert_eq!(saved["positions"][0]["next_avail"], 1);

    let (mut busy, remote) = hung_guest();
    let at = busy.driver.buffer(&[0; 512]);
    busy.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 512)]);
    remote.wait_held(1);
    assert!(busy.driver.function.save().is_err());
    remote.finish();

    let other = guest_with(|config| config.serial = "another".into());
    let error = other.driver.function.restore(saved).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}
