//! A virtqueue in memory that the driver writes as it likes: chains are popped, read, written and given back in any order.
#![no_main]

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::guest;
use fuzz::guest::Guest;
use fuzz::guest::OWN;
use fuzz::guest::WRITE;
use fuzz::guest::buffer_bytes;
use fuzz::joined;
use fuzz::keep_samples;
use libfuzzer_sys::fuzz_target;
use vm_memory::Permissions;
use vmm::virtio::Chain;
use vmm::virtio::DeviceQueue;
use vmm::virtio::QueueError;
use vmm::virtio::Segments;
use vmm::virtio::device::QueuePosition;

/// Takes a chain from the ring.
const POP: u8 = OWN;
/// Reads from a chain: which, how much.
const READ: u8 = OWN + 1;
/// Writes to a chain: which, bytes.
const FILL: u8 = OWN + 2;
/// Gives chains back: which is the first, how many.
const COMPLETE: u8 = OWN + 3;
/// Cuts a chain: which, how many bytes from the front.
const CUT: u8 = OWN + 4;
/// Doorbells on, off, and an interrupt.
const NOTIFY: u8 = OWN + 5;
/// Another device goes on where this one stands: it is given all chains back first, or not.
const MOVE: u8 = OWN + 6;
/// What the kernel would be given: which, how much of it is left out.
const HOST_BUFFERS: u8 = OWN + 7;
const TAGS: u8 = OWN + 8;

const MAX_BUFFERS: usize = 64;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut pieces = Pieces(data);
    let shape = pieces.next().map_or(0, |(shape, _)| shape);
    let size = 1 << (shape & 7);
    let mut guest = Guest::new(&[size], shape & 8 != 0);
    let mut device = Device::new(&guest, QueuePosition::default());
    for (tag, body) in pieces {
        let tag = tag % TAGS;
        if guest.act(tag, body) {
            continue;
        }
        if guest.step(|| device.act(tag, Fields(body))).is_err() {
            // The driver is at fault: the device waits for its reset.
            guest.restart();
            device = Device::new(&guest, QueuePosition::default());
        }
        if tag == MOVE {
            let held = device.held;
            device = Device::new(&guest, device.queue.position());
            device.queue.adopt(held.len() as u16);
            device.held = held;
        }
        guest.check_position(0, device.queue.position());
        assert!(device.held.len() <= usize::from(size), "no more chains than the ring has places");
    }
});

struct Device {
    queue: DeviceQueue,
    held: Vec<Chain>,
}

impl Device {
    fn new(guest: &Guest, at: QueuePosition) -> Self {
        Self { queue: guest.device_queue(0, at, MAX_BUFFERS), held: Vec::new() }
    }

    fn act(&mut self, tag: u8, mut fields: Fields) -> Result<(), QueueError> {
        let memory = self.queue.memory().clone();
        match tag {
            POP => {
                if let Some(chain) = self.queue.pop()? {
                    look_at(&chain);
                    self.held.push(chain);
                }
            }
            NOTIFY => {
                self.queue.disable_doorbell()?;
                self.queue.enable_doorbell()?;
                self.queue.notify()?;
            }
            MOVE if fields.u8() & 1 == 0 => {
                let used: Vec<_> = self.held.drain(..).map(|chain| (chain.head, 0)).collect();
                self.queue.complete_together(&used)?;
            }
            COMPLETE if !self.held.is_empty() => {
                let first = usize::from(fields.u8()) % self.held.len();
                let count = usize::from(fields.u8()).min(self.held.len() - first);
                let written = fields.u32();
                let used: Vec<_> = self.held.drain(first..first + count).map(|chain| (chain.head, written)).collect();
                let before = self.queue.outstanding();
                match used[..] {
                    [(head, written)] => self.queue.complete(head, written)?,
                    _ => self.queue.complete_together(&used)?,
                }
                assert_eq!(self.queue.outstanding(), before - used.len() as u16);
            }
            _ if self.held.is_empty() => {}
            _ => {
                let which = usize::from(fields.u8()) % self.held.len();
                let chain = &mut self.held[which];
                let Chain { readable, writable, .. } = chain;
                match tag {
                    READ => {
                        let mut buffer = vec![0; usize::from(fields.u16())];
                        assert_eq!(readable.read(&memory, &mut buffer), buffer.len() as u64 <= readable.len());
                    }
                    FILL => {
                        let bytes = fields.rest();
                        assert_eq!(writable.write(&memory, bytes), bytes.len() as u64 <= writable.len());
                        assert!(writable.mark_written(&memory, writable.len().min(bytes.len() as u64)));
                    }
                    CUT => {
                        let at = u64::from(fields.u16());
                        cut(readable, at);
                        cut(writable, at);
                    }
                    HOST_BUFFERS => {
                        let skip = u64::from(fields.u16());
                        for (segments, access) in [(&*readable, Permissions::Read), (&*writable, Permissions::Write)] {
                            let mut list = Vec::new();
                            assert!(segments.host_buffers(&memory, access, skip, &mut list));
                            let bytes: u64 = list.iter().map(|buffer| buffer.iov_len as u64).sum();
                            assert_eq!(bytes, segments.len().saturating_sub(skip));
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// What a device may rely on.
fn look_at(chain: &Chain) {
    assert!(chain.readable.count() + chain.writable.count() <= MAX_BUFFERS);
    for segment in chain.readable.iter().chain(chain.writable.iter()) {
        assert!(segment.len > 0);
        assert!(Guest::holds(segment.address.0, segment.len.into()), "{segment:?} is no memory");
    }
}

/// Takes bytes off both ends: none is lost, none is there twice.
fn cut(segments: &mut Segments, at: u64) {
    let (whole, len) = (segments.clone(), segments.len());
    let Some(front) = segments.take_front(at) else {
        assert!(at > len && *segments == whole);
        return;
    };
    assert_eq!((front.len(), segments.len()), (at, len - at));
    let back = segments.take_back((len - at) / 2).expect("half of it is there");
    assert_eq!(back.len() + segments.len(), len - at);
    let joined = front.iter().chain(segments.iter()).chain(back.iter());
    let bytes = |segment: &vmm::virtio::chain::Segment| (segment.address.0, u64::from(segment.len));
    let joined = flat(joined.map(bytes));
    assert_eq!(joined, flat(whole.iter().map(bytes)));
}

/// Ranges, with those that follow each other as one.
fn flat(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut flat: Vec<(u64, u64)> = Vec::new();
    for (address, len) in ranges {
        match flat.last_mut() {
            Some((start, bytes)) if *start + *bytes == address => *bytes += len,
            _ => flat.push((address, len)),
        }
    }
    flat
}

fn samples() -> Vec<Vec<u8>> {
    let chain = |head: u8, form: u8, buffers: &[Vec<u8>]| [&[0, head, form], buffers.concat().as_slice()].concat();
    let (out, back) = (buffer_bytes(0, 0x100, 16), buffer_bytes(WRITE, 0x1000, 600));
    let (far, high) = (buffer_bytes(WRITE, 0x80ff, 0x1fff), buffer_bytes(guest::HIGH | WRITE, 0x10, 32));
    let direct = chain(0, 0, &[out.clone(), out.clone(), back.clone(), high.clone()]);
    let indirect = chain(5, guest::INDIRECT, &[out.clone(), back.clone(), high]);
    let serve: Vec<(u8, Vec<u8>)> = vec![
        (POP, vec![]),
        (READ, vec![0, 20, 0]),
        (FILL, [&[0u8][..], &[7; 100]].concat()),
        (HOST_BUFFERS, vec![0, 3, 0]),
        (CUT, vec![0, 17, 0]),
        (COMPLETE, vec![0, 1, 4, 0, 0, 0]),
        (NOTIFY, vec![]),
    ];
    let sample = |shape: u8, chains: &[Vec<u8>]| {
        let mut pieces: Vec<(u8, Vec<u8>)> = vec![(shape, vec![]), (guest::EVENT, vec![0, 0, 0, 0, 0])];
        for chain in chains {
            pieces.push((guest::CHAIN, chain.clone()));
            pieces.extend(serve.iter().cloned());
        }
        pieces.push((MOVE, vec![0]));
        pieces.push((guest::OFFER, vec![0, 9, 0]));
        pieces.push((POP, vec![]));
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    vec![
        sample(4, std::slice::from_ref(&direct)),
        sample(12, &[indirect.clone(), direct]),
        sample(3, &[indirect, chain(0, 0, &[out, back, far])]),
    ]
}
