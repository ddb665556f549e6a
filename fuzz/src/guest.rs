//! A guest whose driver the input plays: memory in two pieces with a hole between them, rings in it, and a book of what the device
//! may write to. What the device does is done in [`Guest::step`], which looks at all of memory afterwards.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vmm::memory::GuestMemory;
use vmm::virtio::ActiveQueue;
use vmm::virtio::DeviceQueue;
use vmm::virtio::VirtioInterrupt;
use vmm::virtio::device::QueuePosition;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::fields::Fields;

/// A chain that is offered: queue, head, form, segments.
pub const CHAIN: u8 = 0;
/// A head that is offered, whatever it is: queue, head.
pub const OFFER: u8 = 1;
/// The available index as the driver likes it: queue, by how much it moves.
pub const MOVE_AVAIL: u8 = 2;
/// Bytes anywhere: place, bytes.
pub const POKE: u8 = 3;
/// When the driver wants interrupts: queue, flags, event index.
pub const EVENT: u8 = 4;
/// Tags from here on are the target's.
pub const OWN: u8 = 5;

/// Of a chain's form.
pub const INDIRECT: u8 = 1;
const CUT: u8 = 2;
const LOOP: u8 = 4;
const NOT_OFFERED: u8 = 8;

/// Of a segment's first byte: which of the places, a long length, writable.
pub const HIGH: u8 = 4;
const LOW: u8 = 6;
const ANYWHERE: u8 = 7;
const LONG: u8 = 8;
pub const WRITE: u8 = 16;

const NEXT_FLAG: u16 = 1;
const WRITE_FLAG: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

const RAM: [Range<u64>; 2] = [0..0x1_8000, 0x2_0000..0x2_8000];
const RINGS: u64 = 0x1000;
const RING_STRIDE: u64 = 0x2000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x1400;
const TABLES: u64 = 0xd000;
const BUFFERS: u64 = 0x1_0000;
const MAX_SEGMENTS: usize = 300;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub write: bool,
}

/// Counts what the device tells its driver.
#[derive(Debug, Default)]
pub struct Interrupts {
    pub used: AtomicU64,
    pub config: AtomicU64,
    pub resets: AtomicU64,
}

impl VirtioInterrupt for Interrupts {
    fn queue_used(&self, _index: u16) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
    fn needs_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

thread_local! {
    /// Memory as it was, kept because it is as large for every input.
    static BEFORE: RefCell<[Vec<u8>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

struct Ring {
    base: u64,
    size: u16,
    avail: u16,
    next_descriptor: u16,
    next_table: u64,
}

pub struct Guest {
    pub memory: GuestMemory,
    pub interrupts: Arc<Interrupts>,
    event_idx: bool,
    rings: Vec<Ring>,
    /// All that a descriptor ever let the device write to.
    writable: Vec<Range<u64>>,
    /// Something was written where descriptors are, by the driver or in its name: what they are is no longer in the book.
    wild: bool,
}

impl Guest {
    /// One queue for each size, which is at most 256.
    pub fn new(sizes: &[u16], event_idx: bool) -> Self {
        let ranges = RAM.map(|range| (GuestAddress(range.start), (range.end - range.start) as usize));
        let memory = GuestMemory::from_ranges(&ranges).expect("a small memory");
        let rings = sizes.iter().zip(0..).map(|(size, nth)| Ring {
            base: RINGS + nth * RING_STRIDE,
            size: *size,
            avail: 0,
            next_descriptor: 0,
            next_table: 0,
        });
        let rings = rings.collect();
        let (interrupts, writable) = (Arc::default(), Vec::new());
        Self { memory, interrupts, event_idx, rings, writable, wild: false }
    }

    /// A queue as its device gets it.
    pub fn queue(&self, index: usize, at: QueuePosition) -> Queue {
        let ring = &self.rings[index];
        let mut queue = Queue::new(ring.size).expect("a size that is a power of two");
        queue.try_set_desc_table_address(GuestAddress(ring.base)).expect("it is aligned");
        queue.try_set_avail_ring_address(GuestAddress(ring.base + AVAIL)).expect("it is aligned");
        queue.try_set_used_ring_address(GuestAddress(ring.base + USED)).expect("it is aligned");
        queue.set_event_idx(self.event_idx);
        queue.set_next_avail(at.next_avail);
        queue.set_next_used(at.next_used);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    pub fn device_queue(&self, index: usize, at: QueuePosition, max_buffers: usize) -> DeviceQueue {
        let interrupts: Arc<Interrupts> = Arc::clone(&self.interrupts);
        DeviceQueue::new(index as u16, self.queue(index, at), self.memory.clone(), interrupts, max_buffers)
    }

    pub fn active_queue(&self, index: usize, at: QueuePosition) -> ActiveQueue {
        let kick = EventFd::new(EFD_NONBLOCK).expect("an event descriptor");
        ActiveQueue { queue: self.queue(index, at), kick }
    }

    /// The driver begins again, with rings that are empty.
    pub fn restart(&mut self) {
        for ring in &mut self.rings {
            (ring.avail, ring.next_descriptor) = (0, 0);
            let zeros = [0; RING_STRIDE as usize];
            self.memory.write_slice(&zeros, GuestAddress(ring.base)).expect("rings are memory");
        }
    }

    /// Carries an action out that every driver can. False for one that is the target's.
    pub fn act(&mut self, tag: u8, body: &[u8]) -> bool {
        let mut fields = Fields(body);
        if tag >= OWN {
            return false;
        }
        if tag == POKE {
            let kind = fields.u8();
            let address = address(&mut fields, kind);
            self.poke(address, fields.rest());
            return true;
        }
        let queue = usize::from(fields.u8()) % self.rings.len();
        match tag {
            CHAIN => {
                let (head, form) = (fields.u8(), fields.u8());
                let buffers = buffers(&mut fields);
                self.chain(queue, Some(head), form, &buffers);
            }
            OFFER => self.offer(queue, fields.u16()),
            MOVE_AVAIL => {
                let ring = &mut self.rings[queue];
                ring.avail = ring.avail.wrapping_add(fields.u16());
                self.show_avail(queue);
            }
            _ => {
                let ring = &self.rings[queue];
                let (base, size) = (ring.base, ring.size);
                self.put_u16(base + AVAIL, fields.u16());
                self.put_u16(base + AVAIL + 4 + 2 * u64::from(size), fields.u16());
            }
        }
        true
    }

    /// Writes what may be anywhere. What is no memory is left out.
    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        self.wild |= address < BUFFERS && !bytes.is_empty();
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn put_u16(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).expect("rings are memory");
    }

    /// Writes a chain of these buffers, and offers it.
    pub fn chain(&mut self, queue: usize, head: Option<u8>, form: u8, buffers: &[Buffer]) {
        let ring = &mut self.rings[queue];
        let (base, size) = (ring.base, ring.size);
        let head = head.map_or(ring.next_descriptor, u16::from) % size;
        let indirect = form & INDIRECT != 0;
        let count = buffers.len().min(if indirect { MAX_SEGMENTS } else { usize::from(size) });
        let mut table = base;
        if indirect {
            // One behind the other, and from the front again: a later table may lie over one that the device has not read.
            let bytes = count as u64 * 16;
            if TABLES + ring.next_table + bytes > BUFFERS {
                ring.next_table = 0;
            }
            table = TABLES + ring.next_table;
            ring.next_table += bytes;
            ring.next_descriptor = (head + 1) % size;
        } else {
            ring.next_descriptor = (head + count as u16) % size;
        }
        let index = |nth: usize| if indirect { nth as u16 } else { (head + nth as u16) % size };
        for (nth, buffer) in buffers.iter().take(count).enumerate() {
            let is_last = nth + 1 == count;
            let mut flags = if buffer.write { WRITE_FLAG } else { 0 };
            let mut next = index(nth + 1);
            if !is_last || form & (CUT | LOOP) != 0 {
                flags |= NEXT_FLAG;
            }
            if is_last && form & CUT != 0 {
                next = u16::MAX;
            } else if is_last && form & LOOP != 0 {
                next = index(0);
            }
            self.descriptor(table + u64::from(index(nth)) * 16, buffer, flags, next);
        }
        if indirect {
            let len = count as u32 * 16;
            let buffer = Buffer { address: table, len, write: false };
            self.descriptor(base + u64::from(head) * 16, &buffer, INDIRECT_FLAG, 0);
        }
        if form & NOT_OFFERED == 0 {
            self.offer(queue, head);
        }
    }

    fn descriptor(&mut self, at: u64, buffer: &Buffer, flags: u16, next: u16) {
        let Buffer { address, len, write } = *buffer;
        if write {
            let range = address..address.saturating_add(len.into());
            // A device that is let write to rings and tables makes descriptors of its own.
            self.wild |= range.start < BUFFERS && !range.is_empty();
            self.writable.push(range);
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).expect("tables are memory");
    }

    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let place = ring.base + AVAIL + 4 + u64::from(ring.avail % ring.size) * 2;
        ring.avail = ring.avail.wrapping_add(1);
        self.put_u16(place, head);
        self.show_avail(queue);
    }

    fn show_avail(&self, queue: usize) {
        let ring = &self.rings[queue];
        self.put_u16(ring.base + AVAIL + 2, ring.avail);
    }

    /// What the device does. It writes to its used rings and to what a chain made writable, and to nothing else.
    pub fn step<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.wild {
            return work();
        }
        BEFORE.with_borrow_mut(|before| {
            for (range, copy) in RAM.into_iter().zip(before.iter_mut()) {
                copy.resize((range.end - range.start) as usize, 0);
                self.memory.read_slice(copy, GuestAddress(range.start)).expect("it is memory");
            }
            let result = work();
            for (range, copy) in RAM.into_iter().zip(before.iter()) {
                self.compare(range, copy);
            }
            result
        })
    }

    fn compare(&self, range: Range<u64>, before: &[u8]) {
        const LINE: usize = 4096;
        let mut line = [0; LINE];
        for (old, start) in before.chunks(LINE).zip((range.start..).step_by(LINE)) {
            self.memory.read_slice(&mut line, GuestAddress(start)).expect("it is memory");
            if old == line {
                continue;
            }
            for ((_, _), address) in old.iter().zip(line).zip(start..).filter(|((old, new), _)| *old != new) {
                assert!(self.may_write(address), "the device wrote to {address:#x}, which was not given to it");
            }
        }
    }

    fn may_write(&self, address: u64) -> bool {
        let in_used = |ring: &Ring| {
            let used = ring.base + USED;
            (used..used + 6 + 8 * u64::from(ring.size)).contains(&address)
        };
        self.rings.iter().any(in_used) || self.writable.iter().any(|range| range.contains(&address))
    }

    /// Somebody else than the driver says where the device writes.
    pub fn trust_nobody(&mut self) {
        self.wild = true;
    }

    /// A queue that works: no chain is given back that was not taken, and the driver sees as many as were given back.
    pub fn check_position(&self, queue: usize, at: QueuePosition) {
        if self.wild {
            return;
        }
        let ring = &self.rings[queue];
        let held = at.next_avail.wrapping_sub(at.next_used);
        assert!(held <= ring.size, "{held} chains of {} are with the device: {at:?}", ring.size);
        let shown: u16 = self.memory.read_obj(GuestAddress(ring.base + USED + 2)).expect("rings are memory");
        assert_eq!(shown, at.next_used, "the used index is what the device counts");
    }

    /// All of a range is memory, in one piece.
    pub fn holds(address: u64, len: u64) -> bool {
        RAM.iter().any(|range| address >= range.start && address.checked_add(len).is_some_and(|end| end <= range.end))
    }
}

/// A place: mostly among the buffers, now and then where rings are, or anywhere.
pub fn address(fields: &mut Fields, kind: u8) -> u64 {
    match kind & 7 {
        ANYWHERE => fields.u64(),
        LOW => u64::from(fields.u16()),
        HIGH | 5 => RAM[1].start + u64::from(fields.u16() % 0x8100),
        _ => BUFFERS + u64::from(fields.u16() % 0x8100),
    }
}

/// The buffers of a chain, as many as there are bytes for.
pub fn buffers(fields: &mut Fields) -> Vec<Buffer> {
    let mut buffers = Vec::new();
    while !fields.is_empty() && buffers.len() < MAX_SEGMENTS {
        let kind = fields.u8();
        let address = address(fields, kind);
        let len = if kind & LONG != 0 { fields.u32() } else { u32::from(fields.u16() % 0x2000) };
        buffers.push(Buffer { address, len, write: kind & WRITE != 0 });
    }
    buffers
}

/// The bytes that [`buffers`] reads.
pub fn buffer_bytes(kind: u8, offset: u16, len: u16) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes
}
