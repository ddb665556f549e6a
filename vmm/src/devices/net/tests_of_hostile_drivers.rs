//! Drivers that break the rules: their frames are dropped and counted, or the card asks for a reset; it always works again.

use proptest::prelude::*;

use super::config::MAX_FRAME_BYTES;
use super::header::FrameHeader;
use super::tests::{Guest, PLAIN, RX, SEGMENTS, TX, frame};
use crate::virtio::testing::{Buffer, Descriptor, FakeDriver, INDIRECT, MEMORY_BYTES, NEXT, WRITE};

#[test]
fn frames_of_absurd_lengths_are_dropped() {
    let mut guest = Guest::started();
    let at = guest.driver.buffer(&vec![0; MAX_FRAME_BYTES + 64]);
    // Shorter than a header, a header alone, less than a frame, more than a frame.
    for len in [1, 11, 12, 25, MAX_FRAME_BYTES as u32 + 13] {
        let head = guest.driver.submit(TX, &[Buffer::Out(at, len)]);
        assert_eq!(guest.driver.used(TX), (head, 0), "{len} bytes");
    }
    assert!(guest.try_receive().is_none());
    assert_eq!(guest.handle.metrics().counters().tx_dropped, 5);
    for len in [26, MAX_FRAME_BYTES as u32 + 12] {
        guest.driver.submit(TX, &[Buffer::Out(at, len)]);
        assert_eq!(guest.receive().1.len() as u32, len - 12);
        guest.driver.used(TX);
    }
    guest.both_ways_work();
}

#[test]
fn headers_that_lie_are_dropped() {
    let mut guest = Guest::started();
    for header in [
        FrameHeader { gso_type: 3, ..SEGMENTS },
        FrameHeader { gso_type: 0x55, ..SEGMENTS },
        FrameHeader { gso_size: 0, ..SEGMENTS },
        FrameHeader { flags: 0, ..SEGMENTS },
        FrameHeader { checksum_start: 990, ..SEGMENTS },
        FrameHeader { checksum_offset: u16::MAX, ..SEGMENTS },
    ] {
        guest.transmit(header, &frame(1000, 1));
        guest.driver.used(TX);
    }
    assert!(guest.try_receive().is_none());
    assert_eq!(guest.handle.metrics().counters().tx_dropped, 6);
    // A wrong hint is corrected, and what the device ignores does not reach the kernel.
    let odd = FrameHeader { header_len: u16::MAX, flags: 0xff, buffers: 77, ..SEGMENTS };
    guest.transmit(odd, &frame(1000, 2));
    assert_eq!(guest.receive().0, FrameHeader { header_len: 1000, ..SEGMENTS });
}

#[test]
fn buffers_of_the_wrong_direction_carry_nothing() {
    let mut guest = Guest::started();
    let at = guest.driver.buffer(&frame(2000, 3));
    guest.driver.submit(TX, &[Buffer::In(at, 2000)]);
    guest.driver.used(TX);
    guest.driver.submit(RX, &[Buffer::Out(at, 2000)]);
    guest.send(PLAIN, &frame(100, 4));
    assert_eq!(guest.driver.used(RX).1, 0);
    assert_eq!(guest.driver.bytes(at, 2000), frame(2000, 3));
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.tx_dropped, counters.rx_bad_buffers), (1, 1));
}

#[test]
fn a_buffer_too_small_for_a_header_comes_back_and_the_next_has_the_frame() {
    let mut guest = Guest::started();
    let small: Vec<u16> = [1, 11].map(|len| (guest.offer(len), len)).map(|(_, len)| len as u16).to_vec();
    let at = guest.offer(1536);
    let sent = frame(100, 5);
    guest.send(PLAIN, &sent);
    for _ in &small {
        assert_eq!(guest.driver.used(RX).1, 0);
    }
    assert_eq!(guest.driver.used(RX).1, 112);
    assert_eq!(guest.driver.bytes(at + 12, 100), sent);
    assert_eq!(guest.handle.metrics().counters().rx_bad_buffers, 2);
}

#[test]
fn a_ring_full_of_tiny_buffers_loses_the_long_frame_and_no_other() {
    let mut guest = Guest::started();
    let area = guest.driver.buffer(&[0; 8192]);
    for i in 0..256 {
        guest.driver.submit(RX, &[Buffer::In(area + i * 16, 14)]);
    }
    guest.send(SEGMENTS, &frame(5000, 6));
    let short = frame(28, 7);
    guest.send(PLAIN, &short);
    // Twelve bytes of header and 28 of the frame in buffers of 14.
    let got: Vec<u32> = (0..3).map(|_| guest.driver.used(RX).1).collect();
    assert_eq!(got, [14, 14, 12]);
    assert_eq!(guest.handle.metrics().counters().rx_dropped, 1);
}

#[test]
fn more_buffers_than_one_read_takes_are_filled_all_the_same() {
    let mut guest = Guest::started();
    let area = guest.driver.buffer(&[0; 256 * 64]);
    // Each chain is an indirect table of 64 buffers of one byte: the kernel takes fifteen of those in a list.
    let tables = guest.driver.buffer(&[0; 256 * 64 * 16]);
    for i in 0..256 * 64 {
        let flags = if i % 64 == 63 { WRITE } else { WRITE | NEXT };
        let next = (i % 64 + 1) as u16;
        guest.driver.descriptor_at(tables + i * 16, Descriptor { address: area + i, len: 1, flags, next });
    }
    for head in 0..256u16 {
        let address = tables + u64::from(head) * 1024;
        guest.driver.descriptor(RX, head, Descriptor { address, len: 1024, flags: INDIRECT, next: 0 });
        guest.driver.offer_quietly(RX, head);
    }
    guest.driver.kick(RX);
    // More than all of them hold: it is given up, and leaves all of them in stock.
    guest.send(SEGMENTS, &frame(20_000, 1));
    let mut at = area;
    for len in [9000usize, 100, 1500] {
        let sent = frame(len, len as u8);
        guest.send(SEGMENTS, &sent);
        let chains = (len + 12).div_ceil(64);
        let written: u32 = (0..chains).map(|_| guest.driver.used(RX).1).sum();
        assert_eq!(written as usize, len + 12);
        assert_eq!(guest.driver.bytes(at + 12, len), sent);
        at += chains as u64 * 64;
    }
    assert!(guest.handle.is_link_up());
    assert_eq!(guest.handle.metrics().counters().rx_dropped, 1);
}

#[test]
fn chains_of_the_most_buffers_work_both_ways() {
    let mut guest = Guest::started();
    let sent = frame(1000, 8);
    let bytes = [PLAIN.encode().to_vec(), sent.clone()].concat();
    let at = guest.driver.buffer(&bytes);
    let pieces: Vec<Buffer> = (0..253).map(|i| Buffer::Out(at + i * 4, 4)).collect();
    guest.driver.submit(TX, &pieces);
    assert_eq!(guest.receive().1, sent);
    let back = guest.driver.buffer(&[0; 1024]);
    let pieces: Vec<Buffer> = (0..256).map(|i| Buffer::In(back + i * 4, 4)).collect();
    guest.driver.submit(RX, &pieces);
    guest.send(PLAIN, &sent);
    assert_eq!(guest.driver.used(RX).1, 1012);
    assert_eq!(guest.driver.bytes(back + 12, 1000), sent);
}

/// Puts a broken chain at head 0 of a queue.
fn break_queue(guest: &mut Guest, queue: usize, descriptors: &[Descriptor]) {
    for (i, descriptor) in descriptors.iter().enumerate() {
        guest.driver.descriptor(queue, i as u16, *descriptor);
    }
    guest.driver.offer(queue, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
    assert_eq!(guest.handle.metrics().counters().driver_errors, 1);
    guest.driver.reset();
    guest.driver.start();
    guest.wait_served();
    guest.both_ways_work();
}

#[test]
fn a_broken_chain_stops_the_card_until_the_reset() {
    let looping = [0u16, 1].map(|i| Descriptor { address: 0x1000, len: 64, flags: NEXT, next: 1 - i });
    let far = [Descriptor { address: u64::MAX - 8, len: 16, flags: 0, next: 0 }];
    let too_far = [Descriptor { address: MEMORY_BYTES as u64 - 8, len: 2048, flags: WRITE, next: 0 }];
    let cut = [Descriptor { address: 0x1000, len: 64, flags: NEXT, next: 300 }];
    let wrong_order = [
        Descriptor { address: 0x1000, len: 64, flags: WRITE | NEXT, next: 1 },
        Descriptor { address: 0x2000, len: 64, flags: 0, next: 0 },
    ];
    for descriptors in [&looping[..], &far, &too_far, &cut, &wrong_order] {
        for queue in [RX, TX] {
            break_queue(&mut Guest::started(), queue, descriptors);
        }
    }
}

#[test]
fn an_index_that_runs_away_stops_the_card() {
    for queue in [RX, TX] {
        let mut guest = Guest::started();
        guest.driver.set_avail_index(queue, 300);
        guest.driver.kick(queue);
        guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
        guest.driver.reset();
        guest.driver.start();
        guest.wait_served();
        guest.both_ways_work();
    }
}

#[test]
fn a_head_that_is_offered_again_and_again_stops_the_card() {
    let mut guest = Guest::started();
    let at = guest.driver.buffer(&[0; 64]);
    guest.driver.descriptor(RX, 0, Descriptor { address: at, len: 14, flags: WRITE, next: 0 });
    for _ in 0..256 {
        guest.driver.offer(RX, 0);
    }
    // All of the ring is with the card, which can do no more than to give up a frame that does not fit.
    guest.send(SEGMENTS, &frame(5000, 9));
    guest.driver.wait("the frame to be given up", |_| guest.handle.metrics().counters().rx_dropped == 1);
    assert!(!guest.driver.needs_reset());
    guest.driver.offer(RX, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => 0x20_0000u64..0x40_0000,
        1 => MEMORY_BYTES as u64 - 64..MEMORY_BYTES as u64 + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0u32..64, 4 => 64u32..3000, 1 => 60_000u32..70_000, 1 => any::<u32>()];
    let flags =
        prop_oneof![6 => Just(0), 6 => Just(WRITE), 3 => Just(NEXT), 3 => Just(NEXT | WRITE), 1 => Just(INDIRECT)];
    (address, len, flags, 0u16..40).prop_map(|(address, len, flags, next)| Descriptor { address, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever a driver puts into its rings and whatever comes from the host: the card answers, and works after a reset.
    #[test]
    fn a_driver_of_any_malice_can_be_reset(
        tables in prop::array::uniform2(prop::collection::vec(any_descriptor(), 32)),
        offers in prop::collection::vec((0usize..2, 0u16..40), 0..64),
        frames in prop::collection::vec((any::<bool>(), 1usize..9000), 0..12),
        features in any::<u64>(),
    ) {
        let mut guest = Guest::started_with(features | 1 << 32);
        for (queue, table) in tables.iter().enumerate() {
            for (i, descriptor) in table.iter().enumerate() {
                guest.driver.descriptor(queue, i as u16, *descriptor);
            }
        }
        for (segmented, len) in frames {
            guest.send(if segmented { SEGMENTS } else { PLAIN }, &frame(len, 1));
        }
        for (queue, head) in offers {
            guest.driver.offer(queue, head);
        }
        guest.driver.reset();
        // What it sent while it could.
        while guest.try_receive().is_some() {}
        guest.driver.start();
        guest.wait_served();
        guest.both_ways_work();
    }
}
