//! Storage that fails, and a disk that is slowed down, seen by the driver and by those who look after the guest.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_control::{OnError, RateLimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Completion, Io, Token};
use super::tests::{Guest, NO_ANSWER, OK, guest_on_with, pattern};
use crate::lease::quiesce::Quiesce;
use crate::virtio::locked;
use crate::virtio::testing::{Buffer, MEMORY_BYTES};

const IO_ERROR: u8 = 1;

/// What a test has the storage do.
#[derive(Default)]
struct Weather {
    /// Each request fails with this.
    errno: Option<i32>,
    /// Nothing ends before the test says so.
    hangs: bool,
    hanging: Vec<Completion>,
    requests: usize,
}

/// Storage that ends each request at once, in success or not. A read that fails has written its first half.
struct Moody {
    weather: Arc<Mutex<Weather>>,
    ended: Vec<Completion>,
    completions: EventFd,
}

impl Backend for Moody {
    fn name(&self) -> &'static str {
        "moody"
    }
    fn completions(&self) -> &EventFd {
        &self.completions
    }
    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()> {
        let mut weather = locked(&self.weather);
        weather.requests += 1;
        let bytes = match io {
            Io::Read { buffers, .. } => {
                for buffer in buffers {
                    let len = if weather.errno.is_some() { buffer.iov_len / 2 } else { buffer.iov_len };
                    // SAFETY: valid until the request ends, by the contract of `start`.
                    unsafe { buffer.iov_base.cast::<u8>().write_bytes(0x5a, len) };
                }
                buffers.iter().map(|b| b.iov_len as i64).sum()
            }
            Io::Write { buffers, .. } => buffers.iter().map(|b| b.iov_len as i64).sum(),
            _ => 0,
        };
        let ended = Completion { token, result: weather.errno.map_or(bytes, |errno| -i64::from(errno)) };
        if weather.hangs {
            weather.hanging.push(ended);
        } else {
            self.ended.push(ended);
            self.completions.write(1)?;
        }
        Ok(())
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn cancel(&mut self, _tokens: &[Token]) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let _ = self.completions.read();
        ended.append(&mut self.ended);
        let mut weather = locked(&self.weather);
        if !weather.hangs {
            ended.append(&mut weather.hanging);
        }
    }
}

pub(super) struct Sky {
    weather: Arc<Mutex<Weather>>,
    bell: EventFd,
}

impl Sky {
    pub(super) fn fails_with(&self, errno: i32) {
        locked(&self.weather).errno = Some(errno);
    }

    pub(super) fn is_well(&self) {
        let mut weather = locked(&self.weather);
        (weather.errno, weather.hangs) = (None, false);
        self.bell.write(1).unwrap();
    }

    fn requests(&self) -> usize {
        locked(&self.weather).requests
    }
}

pub(super) fn guest_under(policy: OnError) -> (Guest, Sky) {
    let weather = Arc::new(Mutex::new(Weather::default()));
    let completions = EventFd::new(EFD_NONBLOCK).unwrap();
    let sky = Sky { weather: weather.clone(), bell: completions.try_clone().unwrap() };
    let backend = Moody { weather, ended: Vec::new(), completions };
    let mut guest = guest_on_with(Box::new(backend), |config| config.on_error = policy);
    guest.driver.start();
    (guest, sky)
}

/// A page at the end of memory, which the driver has not touched.
const CLEAN_PAGE: u64 = MEMORY_BYTES as u64 - 4096;

fn is_dirty(guest: &Guest, page: u64) -> bool {
    guest.driver.memory.find_region(GuestAddress(page)).unwrap().bitmap().dirty_at(page as usize)
}

impl Guest {
    fn stops(&self) -> usize {
        locked(&self.faults.0).len()
    }

    /// Requests that would go to another host with the guest. Answered by the disk's thread, after it has looked at the ring.
    fn saved_requests(&self) -> usize {
        self.driver.function.save().unwrap()["device"]["pending"].as_array().unwrap().len()
    }

    pub(super) fn wait_stops(&mut self, count: usize) {
        let faults = self.faults.clone();
        self.driver.wait("the guest to be stopped", |_| locked(&faults.0).len() >= count);
    }
}

#[test]
fn a_read_that_fails_leaves_its_pages_dirty() {
    let (mut guest, sky) = guest_under(OnError::Report);
    sky.fails_with(libc::EIO);
    assert!(!is_dirty(&guest, CLEAN_PAGE));
    let (status, _) = guest.carry_out(VIRTIO_BLK_T_IN, 0, &[Buffer::In(CLEAN_PAGE, 4096)]);
    assert_eq!(status, IO_ERROR);
    assert_eq!(guest.driver.bytes(CLEAN_PAGE, 1), [0x5a], "the storage wrote a part");
    assert!(is_dirty(&guest, CLEAN_PAGE));
}

#[test]
fn a_read_that_waits_for_another_try_leaves_its_pages_dirty() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(CLEAN_PAGE, 4096)]);
    guest.wait_stops(1);
    assert!(is_dirty(&guest, CLEAN_PAGE));
}

#[test]
fn a_read_that_a_reset_cut_off_leaves_its_pages_dirty() {
    let (mut guest, sky) = guest_under(OnError::Report);
    locked(&sky.weather).hangs = true;
    guest.ask(VIRTIO_BLK_T_IN, 0, &[Buffer::In(CLEAN_PAGE, 4096)]);
    guest.driver.wait("the read to be under way", |_| sky.requests() == 1);
    guest.driver.write(20, 1, 0);
    assert!(!is_dirty(&guest, CLEAN_PAGE));
    sky.is_well();
    guest.driver.wait("the reset", |d| d.status() == 0);
    assert!(is_dirty(&guest, CLEAN_PAGE), "nobody is answered, and the page has changed");
}

#[test]
fn an_error_that_stops_the_guest_is_told_once_and_tried_again_on_request() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let at = guest.driver.buffer(&pattern(512, 1));
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 8, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);
    assert_eq!(guest.status(asked), NO_ANSWER);
    let fault = locked(&guest.faults.0)[0].clone();
    assert_eq!((fault.disk.as_str(), fault.no_space), ("vda", false));
    assert!(fault.what.starts_with("write of 512 bytes at 4096"), "{}", fault.what);

    // Still broken: stopped again, and still not answered.
    guest.handle.retry();
    guest.wait_stops(2);
    assert_eq!(guest.status(asked), NO_ANSWER);

    sky.is_well();
    guest.handle.retry();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.stops, counters.errors, counters.held, counters.writes), (2, 0, 0, 1));
}

#[test]
fn a_stopped_disk_leaves_the_storage_alone_and_serves_in_order_afterwards() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let at = guest.driver.buffer(&pattern(512, 1));
    let first = guest.ask(VIRTIO_BLK_T_OUT, 8, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);
    let later: Vec<_> = (0..5).map(|i| guest.ask(VIRTIO_BLK_T_OUT, i, &[Buffer::Out(at, 512)])).collect();
    assert_eq!(guest.saved_requests(), 1, "the one that failed; the others are in the ring");
    assert_eq!(sky.requests(), 1);
    sky.is_well();
    guest.handle.retry();
    for asked in std::iter::once(first).chain(later) {
        guest.driver.used(0);
        assert_eq!(guest.status(asked), OK);
    }
    assert_eq!(guest.stops(), 1);
}

#[test]
fn a_kept_request_survives_the_end_of_the_lease() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let bytes = pattern(512, 3);
    let at = guest.driver.buffer(&bytes);
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 8, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);

    guest.gate.close();
    // What the failed write left in the page cache is synced by the drain, which needs the storage.
    sky.is_well();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    guest.handle.reopen().unwrap();
    guest.gate.open();
    guest.handle.kick();
    assert_eq!(guest.saved_requests(), 1);
    assert_eq!(guest.status(asked), NO_ANSWER, "the lease is one reason, the error another");

    guest.handle.retry();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
    assert_eq!(guest.read_disk(8, 512), (OK, bytes), "it went to the file that was opened again");
}

#[test]
fn a_reset_forgets_what_was_kept() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let at = guest.driver.buffer(&[0; 512]);
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);
    sky.is_well();
    guest.driver.reset();
    guest.driver.start();
    assert_eq!(guest.write_disk(0, &[1; 512]), OK);
    guest.handle.retry();
    assert_eq!(guest.write_disk(0, &[1; 512]), OK);
    assert_eq!(guest.status(asked), NO_ANSWER);
    assert_eq!(sky.requests(), 3);
}

#[test]
fn other_policies_answer_at_once() {
    for (policy, errno, status) in [
        (OnError::Report, libc::EIO, IO_ERROR),
        (OnError::Report, libc::ENOSPC, IO_ERROR),
        (OnError::Ignore, libc::EIO, OK),
        (OnError::Ignore, libc::ENOSPC, OK),
        (OnError::Enospc, libc::EIO, IO_ERROR),
    ] {
        let (mut guest, sky) = guest_under(policy);
        sky.fails_with(errno);
        assert_eq!(guest.write_disk(0, &[1; 512]), status, "{policy:?} {errno}");
        assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, status, "{policy:?} {errno}");
        let counters = guest.handle.metrics().counters();
        let counted = if policy == OnError::Ignore { counters.ignored } else { counters.errors };
        assert_eq!((guest.stops(), counted), (0, 2));
    }
}

#[test]
fn a_full_disk_stops_the_guest_and_goes_on_when_there_is_space() {
    let (mut guest, sky) = guest_under(OnError::Enospc);
    sky.fails_with(libc::ENOSPC);
    let at = guest.driver.buffer(&[0; 512]);
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);
    assert!(locked(&guest.faults.0)[0].no_space);
    sky.is_well();
    guest.handle.retry();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
}

#[test]
fn a_flush_that_fails_is_kept_too() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let asked = guest.ask(VIRTIO_BLK_T_FLUSH, 0, &[]);
    guest.wait_stops(1);
    sky.is_well();
    guest.handle.retry();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
}

#[test]
fn what_the_driver_does_wrong_is_no_error_of_the_storage() {
    let (mut guest, _sky) = guest_under(OnError::Stop);
    assert_eq!(guest.write_disk(u64::MAX, &[5; 512]), IO_ERROR);
    assert_eq!(guest.stops(), 0);
}

fn slowed(limit: RateLimit) -> Guest {
    Guest::started(|config| config.rate_limit = Some(limit))
}

#[test]
fn a_slowed_disk_answers_everything_in_order() {
    let mut guest = slowed(RateLimit { iops: Some(400), burst_iops: Some(4), ..RateLimit::default() });
    let at = guest.driver.buffer(&pattern(512, 4));
    let mut heads: Vec<_> = (0..40).map(|i| guest.driver_head(VIRTIO_BLK_T_OUT, i, &[Buffer::Out(at, 512)])).collect();
    heads.push(guest.driver_head(VIRTIO_BLK_T_FLUSH, 0, &[]));
    let answered: Vec<u16> = heads.iter().map(|_| guest.driver.used(0).0).collect();
    // The kernel ends what it has in any order: a burst of writes may still be there when the flush is.
    let flush = answered.iter().rev().take(5).find(|head| heads.last() == Some(*head));
    assert!(flush.is_some(), "the flush goes where the ring has it: {answered:?}");
    let counters = guest.handle.metrics().counters();
    assert!(counters.throttled > 0 && counters.throttled_us > 0, "{counters:?}");
    assert_eq!((counters.writes, counters.flushes, counters.parked), (40, 1, 0));
}

#[test]
fn a_flush_waits_for_no_rate() {
    let mut guest = slowed(RateLimit { iops: Some(1), ..RateLimit::default() });
    assert_eq!(guest.write_disk(0, &[1; 512]), OK);
    for _ in 0..3 {
        assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    }
    assert_eq!(guest.handle.metrics().counters().throttled, 0);
}

#[test]
fn bytes_are_limited_by_themselves() {
    let limit = RateLimit { bytes_per_second: Some(1 << 20), burst_bytes: Some(16 << 10), ..RateLimit::default() };
    let mut guest = slowed(limit);
    for sector in 0..4 {
        assert_eq!(guest.write_disk(sector * 32, &pattern(16 << 10, 1)), OK);
    }
    let counters = guest.handle.metrics().counters();
    // Three requests wait for a burst each, which is 1/64 of a second.
    assert!(counters.throttled >= 2, "{counters:?}");
    assert!(counters.throttled_us >= 20_000, "{counters:?}");
}

#[test]
fn requests_that_wait_for_the_rate_are_quiesced_like_others() {
    let mut guest = slowed(RateLimit { iops: Some(1), ..RateLimit::default() });
    let at = guest.driver.buffer(&[1; 512]);
    let asked: Vec<_> = (0..2).map(|i| guest.ask(VIRTIO_BLK_T_OUT, i, &[Buffer::Out(at, 512)])).collect();
    guest.driver.used(0);
    guest.gate.close();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    assert_eq!(guest.status(asked[1]), NO_ANSWER);
    guest.handle.reopen().unwrap();
    guest.gate.open();
    guest.driver.used(0);
    assert_eq!(guest.status(asked[1]), OK);
}
