//! A network card under a hostile driver and a tap of any mood: frames both ways, links that go down, resets, moves.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::disk::memory_file;
use fuzz::guest;
use fuzz::guest::Buffer;
use fuzz::guest::Guest;
use fuzz::guest::OWN;
use fuzz::joined;
use fuzz::keep_samples;
use libfuzzer_sys::fuzz_target;
use vmm::devices::net::NetMetrics;
use vmm::devices::net::Tap;
use vmm::devices::net::config::Agreed;
use vmm::devices::net::config::FEATURES;
use vmm::devices::net::config::MAX_BUFFERS;
use vmm::devices::net::config::MAX_FRAME_BYTES;
use vmm::devices::net::config::MIN_FRAME_BYTES;
use vmm::devices::net::config::Offloads;
use vmm::devices::net::config::QUEUE_SIZES;
use vmm::devices::net::config::RECEIVE;
use vmm::devices::net::config::TRANSMIT;
use vmm::devices::net::engine::Engine;
use vmm::devices::net::header::FrameHeader;
use vmm::devices::net::header::HEADER_BYTES;
use vmm::virtio::device::QueuePosition;

/// The guest sends: header, form, then the frame's buffers.
const SEND: u8 = OWN;
/// The guest puts buffers out, each a chain: how many, form, buffers.
const STOCK: u8 = OWN + 1;
/// A frame for the guest: how long, header, its first bytes.
const ARRIVE: u8 = OWN + 2;
/// The card's thread wakes.
const SERVE: u8 = OWN + 3;
/// How the tap takes the next frames.
const MOODS: u8 = OWN + 4;
/// The cable: in or out.
const LINK: u8 = OWN + 5;
/// The driver begins again, with these features.
const RESET: u8 = OWN + 6;
/// The guest goes on with another card.
const MOVE: u8 = OWN + 7;
const TAGS: u8 = OWN + 8;

const RX: usize = RECEIVE as usize;
const TX: usize = TRANSMIT as usize;
/// Frames that a tap queues.
const MAX_QUEUED: usize = 64;
const MTU: u16 = 1500;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut pieces = Pieces(data);
    let (shape, settings) = pieces.next().unwrap_or((0, &[]));
    let mut card = Card::new(shape, Fields(settings).u32());
    for (tag, body) in pieces {
        card.act(tag % TAGS, body);
    }
});

mod mood {
    pub const FULL: u8 = 1;
    pub const INTERRUPTED: u8 = 2;
    pub const REFUSES: u8 = 3;
    pub const GONE: u8 = 4;
    pub const COUNT: u8 = 8;
}

/// The cable's other end, which the target holds too.
#[derive(Default)]
struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    moods: VecDeque<u8>,
    to_guest_offloads: Offloads,
    agreed: Option<Agreed>,
    sent: u64,
}

struct FakeTap {
    wire: Arc<Mutex<Wire>>,
    descriptor: File,
}

fn locked(wire: &Mutex<Wire>) -> MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    fn mood(&mut self) -> io::Result<()> {
        let error = match self.moods.pop_front().unwrap_or(0) % mood::COUNT {
            mood::FULL => libc::EAGAIN,
            mood::INTERRUPTED => libc::EINTR,
            mood::REFUSES => libc::EINVAL,
            mood::GONE => libc::EBADFD,
            _ => return Ok(()),
        };
        Err(io::Error::from_raw_os_error(error))
    }

    /// What the host's kernel gets: nothing that was not agreed.
    fn judge(&mut self, message: &[u8]) {
        let agreed = self.agreed.expect("a driver that sends has agreed").from_guest;
        let (header, frame) = message.split_first_chunk::<HEADER_BYTES>().expect("a frame has a header");
        assert!((MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame.len()), "{} bytes", frame.len());
        let header = FrameHeader::decode(header);
        assert_eq!(header.toward_host(agreed, frame.len()), Ok(header), "it is judged already");
        assert!(header.flags == 0 || agreed.checksum);
        assert!(!header.is_segmented() || agreed.segments());
        self.sent += 1;
    }
}

impl Tap for FakeTap {
    unsafe fn read_frame(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        assert!(buffers.len() <= libc::UIO_MAXIOV as usize);
        let mut wire = locked(&self.wire);
        wire.mood()?;
        let Some(message) = wire.to_guest.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let mut rest = &message[..];
        for buffer in buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: the caller's buffers may be written to.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), buffer.iov_base.cast(), now.len()) };
            rest = later;
        }
        Ok(message.len() - rest.len())
    }

    unsafe fn write_frame(&self, buffers: &[libc::iovec]) -> io::Result<()> {
        assert!(buffers.len() <= libc::UIO_MAXIOV as usize);
        let mut wire = locked(&self.wire);
        wire.mood()?;
        let mut message = Vec::new();
        for buffer in buffers {
            // SAFETY: the caller's buffers may be read.
            message.extend(unsafe { std::slice::from_raw_parts(buffer.iov_base.cast::<u8>(), buffer.iov_len) });
        }
        wire.judge(&message);
        Ok(())
    }

    fn set_offloads(&self, to_guest: Offloads) -> io::Result<()> {
        locked(&self.wire).to_guest_offloads = to_guest;
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

struct Card {
    guest: Guest,
    engine: Engine,
    metrics: Arc<NetMetrics>,
    wire: Arc<Mutex<Wire>>,
    features: u64,
    needs_reset: bool,
}

fn engine(wire: &Arc<Mutex<Wire>>, metrics: &Arc<NetMetrics>) -> Engine {
    let tap = FakeTap { wire: Arc::clone(wire), descriptor: memory_file(0) };
    Engine::new(Box::new(tap), Arc::clone(metrics))
}

impl Card {
    fn new(shape: u8, features: u32) -> Self {
        let (wire, metrics) = (Arc::default(), Arc::default());
        let guest = Guest::new(QUEUE_SIZES, shape & 1 != 0);
        let engine = engine(&wire, &metrics);
        let mut card = Self { guest, engine, metrics, wire, features: 0, needs_reset: false };
        // All that there are, but for those that the input takes away.
        card.activate(FEATURES & !u64::from(features), [QueuePosition::default(); 2]);
        card
    }

    fn activate(&mut self, features: u64, at: [QueuePosition; 2]) {
        let agreed = Agreed::new(features, MTU);
        locked(&self.wire).agreed = Some(agreed);
        let [receive, transmit] = [RX, TX].map(|queue| self.guest.device_queue(queue, at[queue], MAX_BUFFERS));
        self.engine.activate(receive, transmit, agreed);
        assert_eq!(locked(&self.wire).to_guest_offloads, agreed.to_guest);
        (self.features, self.needs_reset) = (features, false);
    }

    fn act(&mut self, tag: u8, body: &[u8]) {
        if self.guest.act(tag, body) {
            return;
        }
        let mut fields = Fields(body);
        match tag {
            SEND => {
                let header = fields.bytes(HEADER_BYTES);
                let form = fields.u8();
                let at = 0x1_0000;
                self.guest.poke(at, header);
                let mut chain = vec![Buffer { address: at, len: HEADER_BYTES as u32, write: false }];
                chain.extend(guest::buffers(&mut fields));
                self.guest.chain(TX, None, form, &chain);
            }
            STOCK => {
                let (count, form) = (fields.u8(), fields.u8());
                let chain = guest::buffers(&mut fields);
                let chain: Vec<_> = chain.into_iter().map(|buffer| Buffer { write: true, ..buffer }).collect();
                for _ in 0..=count {
                    self.guest.chain(RX, None, form, &chain);
                }
            }
            ARRIVE => {
                let len = usize::from(fields.u16()) * if fields.u8() & 1 == 0 { 1 } else { 2 };
                let mut message = fields.rest().to_vec();
                message.resize(len.max(message.len()).min(HEADER_BYTES + MAX_FRAME_BYTES), 0x5a);
                let mut wire = locked(&self.wire);
                // A tap of ours gives no frame without a header.
                if message.len() > HEADER_BYTES && wire.to_guest.len() < MAX_QUEUED {
                    wire.to_guest.push_back(message);
                }
            }
            SERVE => self.serve(),
            MOODS => locked(&self.wire).moods.extend(body.iter().take(MAX_QUEUED)),
            LINK => self.engine.set_link(fields.u8() & 1 != 0),
            RESET => {
                self.engine.stop_serving();
                self.engine.forget_offloads();
                self.guest.restart();
                self.activate(FEATURES & !u64::from(fields.u32()), [QueuePosition::default(); 2]);
            }
            _ => {
                let Some(at) = self.engine.positions() else { return };
                let link_up = fields.u8() & 1 == 0;
                self.engine = engine(&self.wire, &self.metrics);
                self.engine.restore(link_up);
                self.activate(self.features, at);
                assert_eq!(self.engine.positions(), Some(at));
            }
        }
    }

    fn serve(&mut self) {
        let (engine, before) = (&mut self.engine, locked(&self.wire).sent);
        let counted = self.metrics.counters().tx_frames;
        if self.guest.step(|| engine.serve()).is_err() {
            engine.count_driver_error();
            engine.stop_serving();
            self.needs_reset = true;
            assert!(engine.positions().is_none());
            return;
        }
        assert_eq!(locked(&self.wire).sent - before, self.metrics.counters().tx_frames - counted);
        if let Some(positions) = self.engine.positions() {
            for queue in [RX, TX] {
                self.guest.check_position(queue, positions[queue]);
            }
        }
    }
}

fn samples() -> Vec<Vec<u8>> {
    let plain = FrameHeader::default();
    let segments = FrameHeader {
        flags: 1,
        gso_type: 1,
        header_len: 54,
        gso_size: 1448,
        checksum_start: 34,
        checksum_offset: 16,
        buffers: 0,
    };
    let send = |header: FrameHeader, form: u8, len: u16| {
        let buffer = guest::buffer_bytes(0, 0x100, len);
        (SEND, [&header.encode()[..], &[form], &buffer, &buffer].concat())
    };
    let stock =
        |count: u8, form: u8, len: u16| (STOCK, [&[count, form][..], &guest::buffer_bytes(0, 0x2000, len)].concat());
    let arrive = |header: FrameHeader, len: u16| (ARRIVE, [&len.to_le_bytes()[..], &[0], &header.encode()].concat());
    let serve = || (SERVE, vec![]);
    let both = || {
        vec![
            send(plain, 0, 60),
            send(segments, guest::INDIRECT, 4000),
            serve(),
            stock(3, 0, 2000),
            arrive(plain, 1000),
            arrive(segments, 5000),
            serve(),
            arrive(segments, 30_000),
            serve(),
            stock(8, guest::INDIRECT, 4096),
            serve(),
        ]
    };
    let sample = |shape: u8, without: u32, more: Vec<(u8, Vec<u8>)>| {
        let mut pieces = vec![(shape, without.to_le_bytes().to_vec())];
        pieces.extend(both());
        pieces.extend(more);
        pieces.extend(both());
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    vec![
        sample(1, 0, vec![(MOVE, vec![0])]),
        sample(0, 0, vec![(LINK, vec![0]), serve(), (LINK, vec![1])]),
        sample(1, 1 << 15, vec![(RESET, vec![])]),
        sample(0, u32::MAX, vec![(MOODS, vec![1, 2, 3, 0]), serve(), serve()]),
        sample(1, 3, vec![(MOODS, vec![2, 4]), serve()]),
    ]
}
