//! The card under a driver, with a pair of sockets for a cable: both directions, buffers of all sizes, pauses, the link, saved state.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pnet_base::MacAddr;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};

use super::config::{FEATURES, Offloads, RECEIVE, TRANSMIT};
use super::header::{FrameHeader, HEADER_BYTES};
use super::tap::{read_message, write_message};
use super::*;
use crate::cpu::gate::{RunGate, Stop};
use crate::interrupt::fake::{FakeIoEvents, FakeMsi};
use crate::pci::PciFunction;
use crate::virtio::registers::TRANSPORT_FEATURES;
use crate::virtio::testing::{Buffer, FakeDriver, PATIENCE, attach};
use crate::virtio::{VirtioPci, locked};

pub(super) const RX: usize = RECEIVE as usize;
pub(super) const TX: usize = TRANSMIT as usize;
const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
/// TCP over IPv4, as the kernel hands a large one to a guest.
pub(super) const SEGMENTS: FrameHeader = FrameHeader {
    flags: 1,
    gso_type: 1,
    header_len: 54,
    gso_size: 1448,
    checksum_start: 34,
    checksum_offset: 16,
    buffers: 0,
};
pub(super) const PLAIN: FrameHeader = FrameHeader {
    flags: 0,
    gso_type: 0,
    header_len: 0,
    gso_size: 0,
    checksum_start: 0,
    checksum_offset: 0,
    buffers: 0,
};

/// A tap without a kernel: one end of a pair of sockets that keep messages apart.
struct SocketTap {
    socket: OwnedFd,
    seen: Arc<TapSeen>,
}

/// What the test sees and does behind the card's back.
#[derive(Default)]
pub(super) struct TapSeen {
    offloads: Mutex<Vec<Offloads>>,
    /// Writes fail with this error number, unless it is zero.
    refuse: AtomicI32,
}

impl Tap for SocketTap {
    unsafe fn read_frame(&self, buffers: &[libc::iovec]) -> std::io::Result<usize> {
        unsafe { read_message(self.socket.as_fd(), buffers) }
    }
    unsafe fn write_frame(&self, buffers: &[libc::iovec]) -> std::io::Result<()> {
        match self.seen.refuse.load(Ordering::SeqCst) {
            0 => unsafe { write_message(self.socket.as_fd(), buffers) },
            error => Err(std::io::Error::from_raw_os_error(error)),
        }
    }
    fn set_offloads(&self, to_guest: Offloads) -> std::io::Result<()> {
        locked(&self.seen.offloads).push(to_guest);
        Ok(())
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A driver with a card, and the other end of its cable.
pub(super) struct Guest {
    pub(super) driver: FakeDriver,
    pub(super) handle: Arc<NetHandle>,
    gate: Arc<RunGate>,
    wire: OwnedFd,
    seen: Arc<TapSeen>,
}

fn config() -> NetConfig {
    NetConfig { name: "lan".into(), mac: MacAddr::new(0x52, 0x54, 0, 1, 2, 3), mtu: 1500 }
}

/// A card on a cable of its own.
fn card(config: NetConfig, gate: &Arc<RunGate>) -> (Arc<Net>, Arc<NetHandle>, OwnedFd, Arc<TapSeen>) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (socket, wire) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let seen = Arc::new(TapSeen::default());
    let tap = Box::new(SocketTap { socket, seen: Arc::clone(&seen) });
    let (net, handle) = Net::open(config, tap, Arc::clone(gate)).unwrap();
    (net, handle, wire, seen)
}

pub(super) fn guest() -> Guest {
    let gate = RunGate::new();
    let (net, handle, wire, seen) = card(config(), &gate);
    Guest { driver: attach(net), handle, gate, wire, seen }
}

pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(29).wrapping_add(seed)).collect()
}

impl Guest {
    pub(super) fn started() -> Self {
        Self::started_with(u64::MAX)
    }

    pub(super) fn started_with(features: u64) -> Self {
        let mut guest = guest();
        guest.driver.start_with(features);
        guest.wait_served();
        guest
    }

    /// Until the thread has seen the driver: what waited in the tap before is gone then.
    pub(super) fn wait_served(&self) {
        self.driver.wait("the card to be served", |driver| {
            driver.function.save().is_ok_and(|saved| saved["positions"].as_array().is_some_and(|p| p.len() == 2))
        });
    }

    /// From the host.
    pub(super) fn send(&self, header: FrameHeader, frame: &[u8]) {
        let parts = [header.encode().to_vec(), frame.to_vec()].concat();
        let sent =
            rustix::net::sendmsg(&self.wire, &[IoSlice::new(&parts)], &mut Default::default(), SendFlags::empty());
        assert_eq!(sent.unwrap(), parts.len());
    }

    /// What the host gets next, if there is something.
    pub(super) fn try_receive(&self) -> Option<(FrameHeader, Vec<u8>)> {
        let mut bytes = vec![0; 1 << 17];
        let got = rustix::net::recvmsg(
            &self.wire,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut Default::default(),
            RecvFlags::empty(),
        );
        // Nothing at all is the end of the cable.
        let got = got.ok()?.bytes.checked_sub(HEADER_BYTES)? + HEADER_BYTES;
        let header = bytes[..HEADER_BYTES].try_into().unwrap();
        Some((FrameHeader::decode(&header), bytes[HEADER_BYTES..got].to_vec()))
    }

    pub(super) fn receive(&self) -> (FrameHeader, Vec<u8>) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(received) = self.try_receive() {
                return received;
            }
            assert!(Instant::now() < until, "nothing comes");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// The guest sends. Returns the chain's head.
    pub(super) fn transmit(&mut self, header: FrameHeader, frame: &[u8]) -> u16 {
        let bytes = [header.encode().to_vec(), frame.to_vec()].concat();
        let at = self.driver.buffer(&bytes);
        self.driver.submit(TX, &[Buffer::Out(at, bytes.len() as u32)])
    }

    /// The guest puts out a receive buffer. Returns its address.
    pub(super) fn offer(&mut self, len: u32) -> u64 {
        let at = self.driver.buffer(&vec![0; len as usize]);
        self.driver.submit(RX, &[Buffer::In(at, len)]);
        at
    }

    /// A frame in buffers of the same length that were offered at these addresses.
    fn take(&mut self, addresses: &[u64]) -> (FrameHeader, Vec<u8>) {
        let mut bytes = Vec::new();
        for at in addresses {
            let (_, len) = self.driver.used(RX);
            bytes.extend(self.driver.bytes(*at, len as usize));
        }
        let header = FrameHeader::decode(bytes[..HEADER_BYTES].try_into().unwrap());
        (header, bytes.split_off(HEADER_BYTES))
    }

    fn offloads(&self) -> Vec<Offloads> {
        locked(&self.seen.offloads).clone()
    }

    /// A frame each way, to see that the card works.
    pub(super) fn both_ways_work(&mut self) {
        let out = frame(60, 7);
        self.transmit(PLAIN, &out);
        assert_eq!(self.receive(), (PLAIN, out));
        self.driver.used(TX);
        let at = self.offer(2048);
        let into = frame(77, 9);
        self.send(PLAIN, &into);
        assert_eq!(self.take(&[at]), (FrameHeader { buffers: 1, ..PLAIN }, into));
    }
}

#[test]
fn a_frame_of_the_guest_reaches_the_cable() {
    let mut guest = Guest::started();
    let sent = frame(1514, 1);
    let head = guest.transmit(PLAIN, &sent);
    assert_eq!(guest.receive(), (PLAIN, sent));
    assert_eq!(guest.driver.used(TX), (head, 0));
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.tx_frames, counters.tx_bytes, counters.tx_dropped), (1, 1514, 0));
    guest.driver.wait("the interrupt", |driver| driver.interrupts(TX) == 1);
}

#[test]
fn a_frame_in_many_pieces_is_sent_as_one() {
    let mut guest = Guest::started();
    let sent = frame(3000, 2);
    let header = FrameHeader { gso_size: 1000, ..SEGMENTS };
    let bytes = [header.encode().to_vec(), sent.clone()].concat();
    let at = guest.driver.buffer(&bytes);
    // The header ends in the second piece.
    let cuts = [0usize, 5, 19, 20, 1999, bytes.len()];
    let pieces: Vec<Buffer> =
        cuts.windows(2).map(|cut| Buffer::Out(at + cut[0] as u64, (cut[1] - cut[0]) as u32)).collect();
    guest.driver.submit(TX, &pieces);
    assert_eq!(guest.receive(), (header, sent));
}

#[test]
fn a_frame_for_the_guest_arrives_in_its_buffer() {
    let mut guest = Guest::started();
    let at = guest.offer(1536);
    let sent = frame(1400, 3);
    guest.send(PLAIN, &sent);
    assert_eq!(guest.take(&[at]), (FrameHeader { buffers: 1, ..PLAIN }, sent));
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.rx_frames, counters.rx_bytes, counters.rx_dropped), (1, 1400, 0));
    guest.driver.wait("the interrupt", |driver| driver.interrupts(RX) == 1);
}

#[test]
fn a_long_frame_fills_several_buffers() {
    let mut guest = Guest::started();
    let buffers: Vec<u64> = (0..50).map(|_| guest.offer(1536)).collect();
    let sent = frame(65000, 4);
    guest.send(SEGMENTS, &sent);
    let (header, received) = guest.take(&buffers[..43]);
    assert_eq!(header, FrameHeader { buffers: 43, ..SEGMENTS });
    assert_eq!(received, sent);
    // The buffers that it did not need are the next frame's.
    let next = frame(100, 5);
    guest.send(PLAIN, &next);
    assert_eq!(guest.take(&buffers[43..44]).1, next);
}

#[test]
fn a_frame_waits_in_the_tap_for_a_buffer() {
    let mut guest = Guest::started();
    let (first, second) = (frame(200, 6), frame(300, 7));
    guest.send(PLAIN, &first);
    guest.send(PLAIN, &second);
    // Passes that find the frames and no buffer: each takes a frame of the guest too.
    for _ in 0..3 {
        guest.transmit(PLAIN, &frame(60, 0));
        guest.driver.used(TX);
    }
    let at = [guest.offer(512), guest.offer(512)];
    assert_eq!(guest.take(&at[..1]).1, first);
    assert_eq!(guest.take(&at[1..]).1, second);
    assert_eq!(guest.handle.metrics().counters().rx_dropped, 0);
}

#[test]
fn a_frame_that_finds_too_few_buffers_waits_for_more_and_is_whole() {
    let mut guest = Guest::started();
    let mut at = vec![guest.offer(1536)];
    let sent = frame(4000, 8);
    guest.send(SEGMENTS, &sent);
    at.push(guest.offer(1536));
    // It needs three: the driver must not see two of them.
    guest.wait_served();
    assert!(guest.driver.try_used(RX).is_none());
    at.push(guest.offer(1536));
    let (header, received) = guest.take(&at);
    assert_eq!((header.buffers, received), (3, sent));
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_or_is_dropped() {
    let mut guest = Guest::started_with(!(1 << VIRTIO_NET_F_MRG_RXBUF));
    let at = [guest.offer(1000), guest.offer(1000)];
    guest.send(PLAIN, &frame(1200, 9));
    let short = frame(900, 10);
    guest.send(PLAIN, &short);
    let (header, received) = guest.take(&at[..1]);
    assert_eq!((header.buffers, received), (1, short));
    assert_eq!(guest.handle.metrics().counters().rx_dropped, 1);
}

#[test]
fn a_guest_that_stands_still_neither_sends_nor_receives() {
    let mut guest = Guest::started();
    let at = guest.offer(1536);
    guest.gate.shut(Stop::Requested);
    assert!(guest.gate.wait_parked(Instant::now() + PATIENCE));
    let sent = frame(500, 11);
    guest.send(PLAIN, &sent);
    guest.transmit(PLAIN, &sent);
    // The thread answers, so it has had its chance.
    guest.wait_served();
    assert!(guest.driver.try_used(RX).is_none() && guest.driver.try_used(TX).is_none());
    assert_eq!(guest.driver.bytes(at, 1536), vec![0; 1536], "memory is as it was");
    assert!(guest.try_receive().is_none());
    guest.gate.open(Stop::Requested);
    assert_eq!(guest.take(&[at]).1, sent);
    assert_eq!(guest.receive().1, sent);
}

#[test]
fn a_pulled_cable_is_seen_by_the_guest() {
    let mut guest = Guest::started();
    let status = |driver: &FakeDriver| driver.read(0x2006, 2);
    let config_interrupts = |driver: &FakeDriver| driver.vectors.vector(0).unwrap().delivered;
    assert_eq!(status(&guest.driver), 1);
    guest.handle.set_link(false).unwrap();
    guest.driver.wait("the news", |driver| config_interrupts(driver) == 1);
    assert_eq!(status(&guest.driver), 0);
    assert_eq!(guest.driver.read(21, 1), 1, "another generation");
    // Nothing passes, either way, and the driver gets its frames back.
    let at = guest.offer(1536);
    guest.send(PLAIN, &frame(100, 12));
    guest.transmit(PLAIN, &frame(100, 13));
    guest.driver.used(TX);
    assert!(guest.try_receive().is_none());
    assert_eq!(guest.handle.metrics().counters().tx_dropped, 1);
    guest.handle.set_link(true).unwrap();
    guest.driver.wait("the news", |driver| config_interrupts(driver) == 2);
    assert_eq!(status(&guest.driver), 1);
    let late = frame(100, 14);
    guest.send(PLAIN, &late);
    assert_eq!(guest.take(&[at]).1, late);
}

#[test]
fn the_tap_leaves_to_the_guest_what_its_driver_agreed_to() {
    let mut guest = Guest::started();
    assert_eq!(guest.offloads(), [ALL]);
    guest.driver.reset();
    guest.driver.start_with(!(1 << VIRTIO_NET_F_GUEST_TSO4));
    guest.wait_served();
    assert_eq!(guest.offloads(), [ALL, Offloads::NONE, Offloads { tso4: false, ..ALL }]);
}

#[test]
fn frames_beyond_what_was_agreed_are_dropped_both_ways() {
    let unwanted = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let mut guest = Guest::started_with(!unwanted);
    let at = guest.offer(4096);
    guest.send(SEGMENTS, &frame(3000, 15));
    // Longer than the MTU and not segmented.
    guest.send(PLAIN, &frame(1519, 16));
    let good = frame(1518, 17);
    guest.send(PLAIN, &good);
    assert_eq!(guest.take(&[at]).1, good);
    guest.transmit(SEGMENTS, &frame(3000, 18));
    guest.transmit(PLAIN, &good);
    assert_eq!(guest.receive().1, good);
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.rx_dropped, counters.tx_dropped), (2, 1));
}

#[test]
fn what_came_before_the_driver_is_forgotten() {
    let mut guest = guest();
    guest.send(SEGMENTS, &frame(3000, 19));
    guest.send(PLAIN, &frame(60, 20));
    guest.driver.start();
    guest.wait_served();
    let at = guest.offer(1536);
    let now = frame(60, 21);
    guest.send(PLAIN, &now);
    assert_eq!(guest.take(&[at]).1, now);
}

#[test]
fn pages_that_a_frame_was_read_into_are_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    let mut guest = Guest::started();
    // Two pages that the driver has not written.
    let at = crate::virtio::testing::MEMORY_BYTES as u64 - 8192;
    let is_dirty = |guest: &Guest, page: u64| {
        let region = guest.driver.memory.find_region(GuestAddress(page)).unwrap();
        region.bitmap().dirty_at(page as usize)
    };
    guest.driver.submit(RX, &[Buffer::In(at, 4096), Buffer::In(at + 4096, 4096)]);
    guest.send(PLAIN, &frame(1000, 22));
    guest.driver.used(RX);
    assert!(is_dirty(&guest, at));
    assert!(!is_dirty(&guest, at + 4096), "the second page was not reached");
    guest.driver.submit(RX, &[Buffer::In(at, 64), Buffer::In(at + 4096, 4096)]);
    guest.send(PLAIN, &frame(1000, 23));
    guest.driver.used(RX);
    assert!(is_dirty(&guest, at + 4096));
}

#[test]
fn a_frame_that_the_tap_has_no_room_for_is_sent_later() {
    let mut guest = Guest::started();
    let count = 200;
    let sent: Vec<Vec<u8>> = (0..count).map(|i| frame(9000, i)).collect();
    for sent in &sent {
        // One address for all: the driver's memory would not hold them.
        guest.transmit(PLAIN, sent);
        while guest.driver.try_used(TX).is_some() {}
    }
    for sent in &sent {
        assert_eq!(&guest.receive().1, sent);
    }
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.tx_frames, counters.tx_refused), (u64::from(count), 0));
}

#[test]
fn what_the_kernel_refuses_is_counted() {
    let mut guest = Guest::started();
    guest.seen.refuse.store(libc::EINVAL, Ordering::SeqCst);
    let head = guest.transmit(PLAIN, &frame(60, 24));
    assert_eq!(guest.driver.used(TX).0, head);
    assert_eq!(guest.handle.metrics().counters().tx_refused, 1);
    guest.seen.refuse.store(0, Ordering::SeqCst);
    guest.both_ways_work();
}

#[test]
fn a_tap_that_is_gone_is_a_link_that_is_down() {
    let mut guest = Guest::started();
    guest.seen.refuse.store(libc::EBADFD, Ordering::SeqCst);
    guest.transmit(PLAIN, &frame(60, 25));
    guest.transmit(PLAIN, &frame(60, 26));
    guest.driver.used(TX);
    guest.driver.used(TX);
    assert!(!guest.handle.is_link_up());
    assert_eq!(guest.driver.read(0x2006, 2), 0);
    assert_eq!(guest.handle.metrics().counters().tx_dropped, 2);
}

/// The same guest on another card, as after a migration, with a frame that was there before it.
fn moved(guest: Guest, config: NetConfig, early: &[u8]) -> Result<Guest, crate::pci::PciError> {
    guest.gate.shut(Stop::Requested);
    assert!(guest.gate.wait_parked(Instant::now() + PATIENCE));
    let saved = guest.driver.function.save().unwrap();
    let gate = RunGate::new();
    let (net, handle, wire, seen) = card(config, &gate);
    let msi = FakeMsi::new();
    let function = VirtioPci::new(net, guest.driver.memory.clone(), &*msi, FakeIoEvents::new()).unwrap();
    let mut moved = Guest { driver: guest.driver, handle, gate, wire, seen };
    moved.send(PLAIN, early);
    function.restore(saved)?;
    moved.driver.function = function;
    Ok(moved)
}

#[test]
fn buffers_that_no_frame_has_filled_go_with_the_guest() {
    let mut guest = Guest::started();
    let at: Vec<u64> = (0..6).map(|_| guest.offer(600)).collect();
    // The first frame leaves a stock of five; the second is cut off by the move.
    guest.send(PLAIN, &frame(60, 27));
    guest.take(&at[..1]);
    guest.send(SEGMENTS, &frame(9000, 28));
    guest.handle.set_link(true).unwrap();
    guest.wait_served();
    let early = frame(80, 30);
    let mut guest = moved(guest, config(), &early).unwrap();
    guest.wait_served();
    // What came for it while it was on its way is its own.
    assert_eq!(guest.take(&at[1..2]), (FrameHeader { buffers: 1, ..PLAIN }, early));
    for (i, at) in at[2..].iter().enumerate() {
        let sent = frame(80, 31 + i as u8);
        guest.send(PLAIN, &sent);
        assert_eq!(guest.take(&[*at]), (FrameHeader { buffers: 1, ..PLAIN }, sent));
    }
    guest.both_ways_work();
    assert_eq!(guest.offloads(), [ALL], "as the driver agreed before the move");
}

#[test]
fn a_pulled_cable_stays_pulled_when_the_guest_moves() {
    let guest = Guest::started();
    guest.handle.set_link(false).unwrap();
    guest.driver.wait("the link", |_| !guest.handle.is_link_up());
    let guest = moved(guest, config(), &frame(60, 29)).unwrap();
    assert_eq!(guest.driver.read(0x2006, 2), 0);
}

#[test]
fn a_guest_does_not_move_to_another_kind_of_card() {
    for other in [NetConfig { mtu: 9000, ..config() }, NetConfig { mac: MacAddr::new(2, 0, 0, 0, 0, 9), ..config() }] {
        let refused = moved(Guest::started(), other, &frame(60, 29)).err().unwrap().to_string();
        assert!(refused.contains("does not fit"), "{refused}");
    }
}

#[test]
fn what_the_driver_is_offered_belongs_to_the_machine_type() {
    let guest = guest();
    assert_eq!(guest.driver.offered(), FEATURES | TRANSPORT_FEATURES);
    // MAC, MTU, status, checksums and segments both ways, mergeable buffers: no queue pairs, no control queue, no UFO, no USO.
    assert_eq!(FEATURES, 0x1_bbab);
    let mac: Vec<u8> = (0..6).map(|i| guest.driver.read(0x2000 + i, 1) as u8).collect();
    assert_eq!(mac, config().mac.octets());
    assert_eq!(guest.driver.read(0x200a, 2), 1500);
    assert_eq!(guest.driver.read(0x2f00, 8), 0, "there is no more");
}

#[test]
fn a_card_that_was_reset_leaves_memory_alone() {
    let mut guest = Guest::started();
    let at = guest.offer(1536);
    guest.driver.reset();
    // Its memory is the driver's again, from this moment.
    for _ in 0..50 {
        guest.send(PLAIN, &frame(100, 41));
        std::thread::yield_now();
    }
    guest.driver.start();
    guest.wait_served();
    assert_eq!(guest.driver.bytes(at, 1536), vec![0; 1536]);
    assert_eq!(guest.handle.metrics().counters().rx_frames, 0);
    guest.both_ways_work();
}

#[test]
fn a_stopped_card_lets_go_of_its_tap() {
    let mut guest = Guest::started();
    guest.handle.stop().unwrap();
    guest.transmit(PLAIN, &frame(60, 40));
    assert_eq!(guest.offloads().last(), Some(&Offloads::NONE));
    guest.driver.reset();
    assert!(guest.try_receive().is_none());
    guest.handle.stop().unwrap();
    let closed = rustix::net::send(&guest.wire, b"anybody?", SendFlags::NOSIGNAL);
    assert_eq!(closed, Err(rustix::io::Errno::PIPE));
}
