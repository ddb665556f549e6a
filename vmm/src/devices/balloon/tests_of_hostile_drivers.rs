//! Drivers that name what is not theirs, too much, or anything. No KVM.

use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::config::{DEFLATE, INFLATE, PAGE_BYTES, QUEUE_SIZES, REPORTS, STATISTICS};
use super::engine::MAX_PAGES_PER_CHAIN;
use super::tests::{GIVEN, Guest, MIB, engine, page};
use crate::virtio::testing::{Buffer, Descriptor, NEXT, WRITE, hostile};
use crate::virtio::worker::{Pass, Work};

/// Memory of the test that is not the guest's to give, and that no ring or buffer is in.
const TABLES: GuestAddress = GuestAddress(0xe_0000);

#[test]
fn pages_that_are_not_the_guests_are_refused_and_counted() {
    let mut guest = Guest::new();
    guest.driver.memory.write_slice(&[0x77; PAGE_BYTES as usize], TABLES).unwrap();
    let tables = (TABLES.0 / PAGE_BYTES) as u32;
    let after = (GIVEN.end() / PAGE_BYTES) as u32;
    guest.tell(INFLATE, &[tables, after, u32::MAX, u32::MAX, page(0), page(0), page(0) - 1]);
    let counters = guest.handle.counters();
    assert_eq!((counters.inflated_pages, counters.refused_pages, counters.driver_errors), (1, 4, 0));
    assert_eq!(guest.driver.bytes(TABLES.0, PAGE_BYTES as usize), [0x77; PAGE_BYTES as usize]);
    // Nor can it be taken as free memory.
    for queue in REPORTS.map(usize::from) {
        guest.driver.submit(queue, &[Buffer::In(TABLES.0, PAGE_BYTES as u32), Buffer::In(0, 8 << 20)]);
        guest.driver.used(queue);
    }
    assert_eq!(guest.handle.counters().reported_bytes, 0);
    assert_eq!(guest.driver.bytes(TABLES.0, PAGE_BYTES as usize), [0x77; PAGE_BYTES as usize]);
}

#[test]
fn one_chain_gives_so_many_pages_and_no_more() {
    let mut guest = Guest::new();
    // Ever the same page, in a buffer as large as the memory allows.
    let words = (MIB / 4) as usize;
    let bytes: Vec<u8> = std::iter::repeat_n(page(3).to_le_bytes(), words).flatten().collect();
    let at = guest.driver.buffer(&bytes);
    guest
        .driver
        .submit(usize::from(INFLATE), &[Buffer::Out(at, bytes.len() as u32), Buffer::Out(at, bytes.len() as u32)]);
    guest.driver.used(usize::from(INFLATE));
    let counters = guest.handle.counters();
    let beyond = 2 * words as u64 - MAX_PAGES_PER_CHAIN as u64;
    assert_eq!((counters.inflated_pages, counters.refused_pages), (1, beyond));
}

#[test]
fn chains_of_the_wrong_kind_come_back_and_take_nothing() {
    let mut guest = Guest::new();
    let at = guest.driver.buffer(&page(0).to_le_bytes());
    guest.driver.memory.write_slice(&[0x77; PAGE_BYTES as usize], GuestAddress(GIVEN.base)).unwrap();
    for queue in [INFLATE, DEFLATE, REPORTS[0], REPORTS[1]].map(usize::from) {
        // Too short for a number; for writing where numbers are read, and the other way round.
        for buffer in [Buffer::Out(at, 3), if queue < 2 { Buffer::In(at, 4) } else { Buffer::Out(GIVEN.base, 4096) }] {
            let head = guest.driver.submit(queue, &[buffer]);
            assert_eq!(guest.driver.used(queue), (head, 0));
        }
    }
    assert_eq!(guest.driver.bytes(at, 4), page(0).to_le_bytes());
    assert_eq!(guest.driver.bytes(GIVEN.base, 4096), [0x77; 4096]);
    assert_eq!(guest.handle.counters().inflated_pages, 0);
}

#[test]
fn a_driver_that_breaks_a_ring_is_stopped_whole_and_starts_again() {
    let mut guest = Guest::new();
    for (errors, queue) in (1..).zip([INFLATE, DEFLATE, STATISTICS, REPORTS[0], REPORTS[1]]) {
        let queue = usize::from(queue);
        for (index, next) in [(0, 1), (1, 0)] {
            let descriptor = Descriptor { address: GIVEN.base, len: 8, flags: NEXT | WRITE, next };
            guest.driver.descriptor(queue, index, descriptor);
        }
        guest.driver.offer(queue, 0);
        guest.driver.wait("needs reset", |driver| driver.needs_reset());
        assert_eq!(guest.handle.counters().driver_errors, errors);
        guest.driver.reset();
        guest.driver.start();
        guest.tell(INFLATE, &[page(1)]);
    }
}

#[test]
fn statistics_come_one_at_a_time_however_many_are_offered() {
    let (mut driver, mut engine, _, _) = engine();
    let queue = usize::from(STATISTICS);
    let at = driver.buffer(&[0; 64]);
    for _ in 0..8 {
        driver.submit(queue, &[Buffer::Out(at, 64), Buffer::Out(0, 8 << 20)]);
    }
    let mut now = Duration::ZERO;
    for taken in 0..8 {
        let Pass::At(at) = engine.serve(now).unwrap() else {
            panic!("it holds one and has a time to give it back");
        };
        assert_eq!((0..).map_while(|_| driver.try_used(queue)).count(), usize::from(taken > 0));
        assert_eq!(engine.serve(now).unwrap(), Pass::At(at), "the others wait for their turn");
        now = at;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is offered on whichever queue, with whatever in memory: no panic, and no page changes that is not the guest's to give, but
    /// for the rings.
    #[test]
    fn nothing_but_the_guests_own_memory_is_taken(
        offers in prop::collection::vec(hostile::offer(QUEUE_SIZES.len()), 1..40),
        seed in any::<u32>(),
    ) {
        let (mut driver, mut engine, _, _) = engine();
        // Numbers of pages all over the memory that is not to give; rings excepted.
        let mut number = seed;
        let words: Vec<u8> = (0..MIB / 4).flat_map(|_| {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (number >> 20).to_le_bytes()
        }).collect();
        for base in [0, 2 * MIB, 3 * MIB] {
            driver.memory.write_slice(&words, GuestAddress(base)).unwrap();
        }
        let mut now = Duration::ZERO;
        for offer in &offers {
            offer.make(&mut driver);
            match engine.serve(now) {
                Ok(Pass::At(at)) => now = at,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        for base in [0, 2 * MIB, 3 * MIB] {
            prop_assert!(driver.bytes(base, words.len()) == words, "{base:#x}");
        }
    }
}
