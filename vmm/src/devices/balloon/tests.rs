//! The balloon under a driver that does what Linux's does. No KVM; the memory is real.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_control::balloon::GuestMemoryStats;

use super::config::{DEFLATE, FEATURES, INFLATE, PAGE_BYTES, QUEUE_SIZES, REPORTS, STATISTICS};
use super::engine::{Engine, LastStats, STATS_INTERVAL};
use super::metrics::BalloonMetrics;
use super::{Balloon, BalloonHandle, Ram};
use crate::cpu::gate::{RunGate, Stop};
use crate::interrupt::fake::{FakeIoEvents, FakeMsi};
use crate::machine::layout::Window;
use crate::memory::GuestMemory;
use crate::pci::PciFunction;
use crate::virtio::testing::{Buffer, FakeDriver, activated, attach};
use crate::virtio::worker::{Pass, Work};
use crate::virtio::{VirtioDevice, VirtioPci, locked};

pub const MIB: u64 = 1 << 20;
/// What the guest may give: the upper half of the test's memory, away from the rings.
pub const GIVEN: Window = Window { base: 4 * MIB, size: 4 * MIB };
/// What the guest has, as far as it knows.
const MEMORY_BYTES: u64 = 256 * MIB;

pub fn ram() -> Ram {
    Ram::of_ranges(vec![GIVEN])
}

pub struct Guest {
    pub driver: FakeDriver,
    pub handle: Arc<BalloonHandle>,
    gate: Arc<RunGate>,
}

impl Guest {
    pub fn new() -> Self {
        let gate = RunGate::new();
        let (balloon, handle) = Balloon::open(ram(), MEMORY_BYTES, Arc::clone(&gate)).unwrap();
        let mut driver = attach(balloon);
        driver.start();
        Self { driver, handle, gate }
    }

    /// Tells page numbers on one of the two queues, and waits until they were taken.
    pub fn tell(&mut self, queue: u16, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let at = self.driver.buffer(&bytes);
        let head = self.driver.submit(usize::from(queue), &[Buffer::Out(at, bytes.len() as u32)]);
        assert_eq!(self.driver.used(usize::from(queue)), (head, 0));
    }

    fn fill(&self, page: u32, value: u8) {
        self.driver.memory.write_slice(&[value; PAGE_BYTES as usize], address(page)).unwrap();
    }

    fn is_full_of(&self, page: u32, value: u8) -> bool {
        self.driver.bytes(address(page).0, PAGE_BYTES as usize) == [value; PAGE_BYTES as usize]
    }
}

fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * PAGE_BYTES)
}

/// The nth page that may be given.
pub fn page(nth: u32) -> u32 {
    (GIVEN.base / PAGE_BYTES) as u32 + nth
}

pub fn forget_dirty(memory: &GuestMemory) {
    for region in memory.iter() {
        let mapping: &vm_memory::MmapRegion<_> = region;
        mapping.bitmap().reset();
    }
}

fn is_dirty(memory: &GuestMemory, page: u32) -> bool {
    memory.find_region(address(page)).unwrap().bitmap().dirty_at(address(page).0 as usize)
}

fn stats(pairs: &[(u16, u64)]) -> Vec<u8> {
    pairs.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn a_target_reaches_the_driver_and_its_answer_hostd() {
    let mut guest = Guest::new();
    guest.handle.set_target(MEMORY_BYTES);
    assert_eq!(guest.driver.vectors.vector(0).unwrap().delivered, 0, "nothing new");
    guest.handle.set_target(192 * MIB);
    assert_eq!(guest.driver.vectors.vector(0).unwrap().delivered, 1);
    assert_eq!(guest.driver.read(0x2000, 4), 64 * MIB / PAGE_BYTES);
    guest.driver.write(0x2004, 4, 32 * MIB / PAGE_BYTES);
    let counters = guest.handle.counters();
    assert_eq!((counters.target_bytes, counters.actual_bytes), (192 * MIB, 224 * MIB));
    // A driver that lies is a driver that lies.
    guest.driver.write(0x2004, 4, u64::from(u32::MAX));
    assert_eq!(guest.handle.counters().actual_bytes, 0);

    guest.driver.reset();
    let counters = guest.handle.counters();
    assert_eq!((counters.target_bytes, counters.actual_bytes), (192 * MIB, MEMORY_BYTES), "the wish stays");
    guest.handle.set_target(200 * MIB);
    guest.driver.start();
    assert_eq!(guest.driver.read(0x2000, 4), 56 * MIB / PAGE_BYTES);
}

#[test]
fn a_page_that_was_given_reads_as_zeros_for_ever_and_for_a_migration_too() {
    let mut guest = Guest::new();
    for nth in 0..6 {
        guest.fill(page(nth), 0xa5);
    }
    forget_dirty(&guest.driver.memory);
    // As Linux does: in the order in which they came, neighbours or not.
    guest.tell(INFLATE, &[page(1), page(2), page(4)]);
    for (nth, given) in [false, true, true, false, true, false].into_iter().enumerate() {
        let page = page(nth as u32);
        assert!(guest.is_full_of(page, if given { 0 } else { 0xa5 }), "page {nth}");
        assert_eq!(is_dirty(&guest.driver.memory, page), given, "page {nth}");
    }
    assert_eq!(guest.handle.counters().inflated_pages, 3);

    guest.tell(DEFLATE, &[page(1), page(2)]);
    assert!(guest.is_full_of(page(1), 0));
    assert_eq!(guest.handle.counters().deflated_pages, 2);
    guest.fill(page(1), 0x5a);
    assert!(guest.is_full_of(page(1), 0x5a), "it is the guest's again");
    guest.tell(INFLATE, &[page(1)]);
    assert!(guest.is_full_of(page(1), 0));
}

#[test]
fn the_host_has_the_memory_that_was_given() {
    let mut guest = Guest::new();
    let region = guest.driver.memory.find_region(GuestAddress(GIVEN.base)).unwrap();
    let start = region.as_ptr() as usize + GIVEN.base as usize;
    let resident = || {
        let mut pages = vec![0u8; (GIVEN.size / PAGE_BYTES) as usize];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        let result = unsafe { libc::mincore(start as *mut libc::c_void, GIVEN.size as usize, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    };
    guest.driver.memory.write_slice(&vec![1; GIVEN.size as usize], GuestAddress(GIVEN.base)).unwrap();
    let all = (GIVEN.size / PAGE_BYTES) as usize;
    assert_eq!(resident(), all);
    let pages: Vec<u32> = (0..all as u32).map(page).collect();
    for pages in pages.chunks(256) {
        guest.tell(INFLATE, pages);
    }
    assert_eq!(resident(), 0);
}

#[test]
fn free_memory_that_is_reported_is_taken_on_either_queue() {
    let mut guest = Guest::new();
    for (queue, nth) in REPORTS.into_iter().zip([0, 8]) {
        for nth in nth..nth + 4 {
            guest.fill(page(nth), 0xa5);
        }
        forget_dirty(&guest.driver.memory);
        let buffers = [
            Buffer::In(address(page(nth)).0, PAGE_BYTES as u32),
            Buffer::In(address(page(nth + 2)).0, PAGE_BYTES as u32),
        ];
        let head = guest.driver.submit(usize::from(queue), &buffers);
        assert_eq!(guest.driver.used(usize::from(queue)), (head, 0));
        for (nth, taken) in (nth..).zip([true, false, true, false]) {
            assert!(guest.is_full_of(page(nth), if taken { 0 } else { 0xa5 }));
            assert_eq!(is_dirty(&guest.driver.memory, page(nth)), taken);
        }
    }
    assert_eq!(guest.handle.counters().reported_bytes, 4 * PAGE_BYTES);
}

#[test]
fn a_guest_that_stands_still_keeps_its_memory() {
    let mut guest = Guest::new();
    guest.fill(page(0), 0xa5);
    guest.gate.shut(Stop::Requested);
    assert!(guest.gate.wait_parked(std::time::Instant::now() + crate::virtio::testing::PATIENCE));
    let at = guest.driver.buffer(&page(0).to_le_bytes());
    guest.driver.submit(usize::from(INFLATE), &[Buffer::Out(at, 4)]);
    // As much time as a page takes many times over; a device that ignored the gate would be seen here.
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.driver.try_used(usize::from(INFLATE)).is_none() && guest.is_full_of(page(0), 0xa5));
    guest.gate.open(Stop::Requested);
    guest.driver.used(usize::from(INFLATE));
    assert!(guest.is_full_of(page(0), 0));
}

#[test]
fn what_the_guest_says_of_itself_is_shown_until_its_driver_is_gone() {
    let mut guest = Guest::new();
    assert_eq!(guest.handle.counters().guest, None);
    let said = stats(&[(4, 10 * MIB), (5, 250 * MIB), (0, u64::MAX)]);
    let at = guest.driver.buffer(&said);
    guest.driver.submit(usize::from(STATISTICS), &[Buffer::Out(at, said.len() as u32)]);
    guest.driver.wait("the statistics", |_| guest.handle.counters().guest.is_some());
    let counters = guest.handle.counters();
    let wanted =
        GuestMemoryStats { free_bytes: Some(10 * MIB), total_bytes: Some(250 * MIB), ..GuestMemoryStats::default() };
    assert_eq!(counters.guest, Some(wanted));
    assert!(counters.guest_age_ms.is_some());
    guest.driver.reset();
    assert_eq!(guest.handle.counters().guest, None);
}

/// The engine with its queues, and a clock in the test's hand.
pub fn engine() -> (FakeDriver, Engine, Arc<BalloonMetrics>, Arc<LastStats>) {
    let (driver, activation) = activated(FEATURES, QUEUE_SIZES);
    let (metrics, stats) = (Arc::new(BalloonMetrics::default()), Arc::new(LastStats::default()));
    let mut engine = Engine::new(ram(), Arc::clone(&metrics), Arc::clone(&stats));
    engine.activate(activation);
    (driver, engine, metrics, stats)
}

#[test]
fn the_guest_is_asked_at_the_stated_interval() {
    let (mut driver, mut engine, _, last) = engine();
    let queue = usize::from(STATISTICS);
    let start = Duration::from_secs(5);
    assert_eq!(engine.serve(start).unwrap(), Pass::Idle, "a driver that said nothing is not asked");
    let said = stats(&[(4, 1)]);
    let at = driver.buffer(&said);
    driver.submit(queue, &[Buffer::Out(at, said.len() as u32)]);
    let ask_at = start + STATS_INTERVAL;
    assert_eq!(engine.serve(start).unwrap(), Pass::At(ask_at));
    assert_eq!(engine.serve(ask_at - Duration::from_nanos(1)).unwrap(), Pass::At(ask_at));
    assert!(driver.try_used(queue).is_none());
    assert_eq!(engine.serve(ask_at).unwrap(), Pass::Idle, "asked, and the answer is the driver's to give");
    assert!(driver.try_used(queue).is_some());
    assert_eq!(driver.interrupts(queue), 1);
    driver.memory.write_slice(&stats(&[(4, 2)]), GuestAddress(at)).unwrap();
    driver.submit(queue, &[Buffer::Out(at, said.len() as u32)]);
    let later = ask_at + Duration::from_secs(1);
    assert_eq!(engine.serve(later).unwrap(), Pass::At(later + STATS_INTERVAL));
    let (stats, at) = locked(&last).unwrap();
    assert_eq!((stats.free_bytes, at), (Some(2), later));
}

#[test]
fn a_saved_balloon_goes_on_and_finds_the_statistics_again() {
    let mut guest = Guest::new();
    guest.handle.set_target(192 * MIB);
    guest.driver.write(0x2004, 4, 7);
    guest.tell(INFLATE, &[page(0)]);
    let said = stats(&[(5, 123)]);
    let at = guest.driver.buffer(&said);
    guest.driver.submit(usize::from(STATISTICS), &[Buffer::Out(at, said.len() as u32)]);
    guest.driver.wait("the statistics", |_| guest.handle.counters().guest.is_some());
    guest.gate.shut(Stop::Requested);
    let saved = guest.driver.function.save().unwrap();

    let (balloon, handle) = Balloon::open(ram(), MEMORY_BYTES, RunGate::new()).unwrap();
    let memory = guest.driver.memory.clone();
    let function = VirtioPci::new(balloon.clone(), memory, &*FakeMsi::new(), FakeIoEvents::new()).unwrap();
    function.restore(saved).unwrap();
    guest.driver.function = function;
    let counters = handle.counters();
    assert_eq!((counters.target_bytes, counters.actual_bytes), (192 * MIB, MEMORY_BYTES - 7 * PAGE_BYTES));
    guest.driver.wait("the statistics", |_| handle.counters().guest.is_some());
    assert_eq!(handle.counters().guest.unwrap().total_bytes, Some(123));
    guest.fill(page(9), 1);
    guest.tell(INFLATE, &[page(9)]);
    assert!(guest.is_full_of(page(9), 0));

    let unfit = [
        serde_json::json!({"version": 2, "wanted_pages": 0, "given_pages": 0}),
        serde_json::json!({"version": 1, "wanted_pages": u32::MAX, "given_pages": 0}),
        serde_json::json!({"version": 1}),
    ];
    for state in unfit {
        assert!(balloon.restore(state.clone()).is_err(), "{state}");
    }
    assert_eq!(handle.counters().target_bytes, 192 * MIB);
}
