//! The entropy device under a driver, a hostile one too. No KVM.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::engine::{Active, BYTES_PER_SECOND, Engine, Entropy, HostEntropy, MAX_REQUEST_BYTES};
use super::{Rng, RngMetrics};
use crate::cpu::gate::{RunGate, Stop};
use crate::pci::PciFunction;
use crate::virtio::device::DeviceError;
use crate::virtio::testing::{Buffer, Descriptor, FakeDriver, MEMORY_BYTES, NEXT, WRITE, activated, attach, hostile};
use crate::virtio::worker::{Pass, Work};
use crate::virtio::{Activation, DeviceQueue, VirtioDevice};

const MIB: u64 = 1 << 20;

/// Counts up, so that a test knows what it got.
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        for byte in bytes {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(())
    }
}

struct Guest {
    driver: FakeDriver,
    gate: Arc<RunGate>,
    rng: Arc<Rng>,
}

fn guest_with(entropy: Box<dyn Entropy>) -> Guest {
    let gate = RunGate::new();
    let rng = Rng::with_entropy(entropy, Arc::clone(&gate)).unwrap();
    let mut driver = attach(rng.clone());
    driver.start();
    Guest { driver, gate, rng }
}

fn guest() -> Guest {
    guest_with(Box::new(Counting(0)))
}

#[test]
fn a_request_is_filled_over_all_its_buffers() {
    let mut guest = guest();
    let at = guest.driver.buffer(&[0; 64]);
    let head = guest.driver.submit(0, &[Buffer::In(at, 3), Buffer::In(at + 8, 5)]);
    assert_eq!(guest.driver.used(0), (head, 8));
    assert_eq!(guest.driver.bytes(at, 14), [1, 2, 3, 0, 0, 0, 0, 0, 4, 5, 6, 7, 8, 0]);
    let counters = guest.rng.metrics().counters();
    assert_eq!((counters.requests, counters.bytes, counters.errors), (1, 8, 0));
}

#[test]
fn the_hosts_entropy_differs_each_time() {
    let mut bytes = [[0; 64]; 2];
    for bytes in &mut bytes {
        HostEntropy.fill(bytes).unwrap();
    }
    assert_ne!(bytes[0], bytes[1]);
    assert_ne!(bytes[0], [0; 64]);
}

#[test]
fn a_request_for_everything_is_given_a_page() {
    let mut guest = guest();
    let whole = MEMORY_BYTES as u32 / 2;
    let at = MEMORY_BYTES as u64 / 2;
    guest.driver.submit(0, &[Buffer::In(at, whole), Buffer::In(at, whole), Buffer::In(at, whole)]);
    assert_eq!(guest.driver.used(0).1, MAX_REQUEST_BYTES as u32);
    assert_eq!(guest.driver.bytes(at + MAX_REQUEST_BYTES as u64, 64), [0; 64]);
}

#[test]
fn a_request_without_room_comes_back_empty() {
    let mut guest = guest();
    let at = guest.driver.buffer(b"says something");
    guest.driver.submit(0, &[Buffer::Out(at, 14)]);
    assert_eq!(guest.driver.used(0).1, 0);
    guest.driver.submit(0, &[Buffer::Out(at, 14), Buffer::In(at + 14, 1)]);
    assert_eq!(guest.driver.used(0).1, 1);
    assert_eq!(guest.driver.bytes(at, 15), b"says something\x01");
}

#[test]
fn a_driver_that_breaks_the_ring_is_stopped_and_starts_again() {
    let mut guest = guest();
    guest.driver.descriptor(0, 0, Descriptor { address: u64::MAX - 7, len: 8, flags: WRITE, next: 0 });
    guest.driver.offer(0, 0);
    guest.driver.wait("needs reset", |driver| driver.needs_reset());
    assert_eq!(guest.rng.metrics().counters().errors, 1);
    guest.driver.reset();
    guest.driver.start();
    // A chain that loops, too.
    for (index, next) in [(0, 1), (1, 0)] {
        guest.driver.descriptor(0, index, Descriptor { address: 0x1000, len: 8, flags: NEXT | WRITE, next });
    }
    guest.driver.offer(0, 0);
    guest.driver.wait("needs reset", |driver| driver.needs_reset());
    guest.driver.reset();
    guest.driver.start();
    let at = guest.driver.buffer(&[0; 8]);
    guest.driver.submit(0, &[Buffer::In(at, 8)]);
    assert_eq!(guest.driver.used(0).1, 8);
}

#[test]
fn a_host_without_entropy_stops_the_device_rather_than_give_zeros() {
    struct Empty(Arc<AtomicBool>);
    impl Entropy for Empty {
        fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
            if self.0.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::Unsupported.into());
            }
            bytes.fill(7);
            Ok(())
        }
    }
    let broken = Arc::new(AtomicBool::new(true));
    let mut guest = guest_with(Box::new(Empty(Arc::clone(&broken))));
    let at = guest.driver.buffer(&[0; 8]);
    guest.driver.submit(0, &[Buffer::In(at, 8)]);
    guest.driver.wait("needs reset", |driver| driver.needs_reset());
    assert!(guest.driver.try_used(0).is_none());
    broken.store(false, Ordering::SeqCst);
    guest.driver.reset();
    guest.driver.start();
    guest.driver.submit(0, &[Buffer::In(at, 8)]);
    assert_eq!(guest.driver.used(0).1, 8);
}

#[test]
fn a_guest_that_stands_still_is_given_nothing() {
    let mut guest = guest();
    let at = guest.driver.buffer(&[0; 8]);
    guest.gate.shut(Stop::Requested);
    assert!(guest.gate.wait_parked(std::time::Instant::now() + crate::virtio::testing::PATIENCE));
    guest.driver.submit(0, &[Buffer::In(at, 8)]);
    // As much time as a served request takes many times over; a device that ignored the gate would be seen here.
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.driver.try_used(0).is_none());
    assert_eq!(guest.driver.bytes(at, 8), [0; 8]);
    guest.gate.open(Stop::Requested);
    assert_eq!(guest.driver.used(0).1, 8, "the doorbell of meanwhile was kept");
}

#[test]
fn a_saved_device_goes_on_with_its_next_request() {
    let mut guest = guest();
    let at = guest.driver.buffer(&[0; 8]);
    guest.driver.submit(0, &[Buffer::In(at, 8)]);
    guest.driver.used(0);
    // As for every save: the guest stands still, and its device with it.
    guest.gate.shut(Stop::Requested);
    let saved = guest.driver.function.save().unwrap();

    let moved = Rng::with_entropy(Box::new(Counting(100)), RunGate::new()).unwrap();
    let msi = crate::interrupt::fake::FakeMsi::new();
    let io_events = crate::interrupt::fake::FakeIoEvents::new();
    let memory = guest.driver.memory.clone();
    let function = crate::virtio::VirtioPci::new(moved.clone(), memory, &*msi, io_events).unwrap();
    function.restore(saved).unwrap();
    guest.driver.function = function;
    let head = guest.driver.submit(0, &[Buffer::In(at, 1)]);
    assert_eq!(guest.driver.used(0), (head, 1));
    assert_eq!(guest.driver.bytes(at, 2), [101, 2]);

    for (state, known) in [(serde_json::json!({"version": 2}), false), (serde_json::json!({}), true)] {
        let error = moved.restore(state).unwrap_err();
        assert_eq!(matches!(error, DeviceError::Encoding { .. }), known, "{error}");
    }
}

#[test]
fn a_greedy_driver_gets_the_rate_and_costs_no_more() {
    let (mut driver, Activation { memory, mut queues, interrupt, .. }) = activated(0, &[64]);
    let given = queues[0].take().unwrap();
    let queue = DeviceQueue::new(0, given.queue, memory, Arc::clone(&interrupt), 64);
    let metrics = Arc::new(RngMetrics::default());
    let mut engine = Engine::new(Box::new(Counting(0)), Arc::clone(&metrics));
    engine.activate(Active { queue, kick: Arc::new(given.kick), interrupt });

    let at = driver.buffer(&[0; MAX_REQUEST_BYTES]);
    let end = Duration::from_secs(4);
    let mut now = Duration::ZERO;
    // Far more than it takes, for a device that never has the driver wait.
    for _ in 0..10_000 {
        while driver.try_used(0).is_some() {}
        for _ in 0..16 {
            driver.submit(0, &[Buffer::In(at, MAX_REQUEST_BYTES as u32)]);
        }
        // Until the ring is empty again.
        loop {
            match engine.serve(now).unwrap() {
                Pass::Idle => break,
                Pass::More => {}
                Pass::At(next) => {
                    assert!(next > now);
                    now = next;
                }
            }
        }
        if now >= end {
            break;
        }
    }
    let given = metrics.bytes.get();
    let wanted = BYTES_PER_SECOND * end.as_secs();
    assert!((wanted..wanted + (400 << 10)).contains(&given), "{given} bytes in {now:?}");
    assert!(metrics.limited.get() > 0);

    // Requests without room are no way around it.
    let (before, start) = (metrics.requests.get(), now);
    for _ in 0..100_000 {
        driver.submit(0, &[Buffer::Out(at, 1)]);
        if let Pass::At(next) = engine.serve(now).unwrap() {
            now = next;
        }
        if now >= start + Duration::from_secs(1) {
            break;
        }
    }
    let served = metrics.requests.get() - before;
    assert!(served <= (BYTES_PER_SECOND + (256 << 10)) / 64 + 64, "{served} requests in a second");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is offered: no panic, and not a byte changes but in the rings and in what the driver named for writing.
    #[test]
    fn nothing_is_written_that_was_not_asked_for(offers in prop::collection::vec(hostile::offer(1), 1..30)) {
        let (mut driver, Activation { memory, mut queues, interrupt, .. }) = activated(0, &[64]);
        let given = queues[0].take().unwrap();
        let queue = DeviceQueue::new(0, given.queue, memory, Arc::clone(&interrupt), 64);
        let metrics = Arc::new(RngMetrics::default());
        let mut engine = Engine::new(Box::new(Counting(0)), Arc::clone(&metrics));
        engine.activate(Active { queue, kick: Arc::new(given.kick), interrupt });
        let mut now = Duration::ZERO;
        let mut named = Vec::new();
        for offer in &offers {
            offer.make(&mut driver);
            named.extend(offer.writable());
            match engine.serve(now) {
                Ok(Pass::At(at)) => now = at,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        for base in [0, 2 * MIB, 3 * MIB, 4 * MIB] {
            let changed = driver.bytes(base, MIB as usize).iter().position(|byte| *byte != 0);
            if let Some(at) = changed.map(|at| base + at as u64) {
                prop_assert!(named.iter().any(|range| range.contains(&at)), "{at:#x}");
            }
        }
        prop_assert!(metrics.bytes.get() <= metrics.requests.get() * MAX_REQUEST_BYTES as u64);
    }
}
