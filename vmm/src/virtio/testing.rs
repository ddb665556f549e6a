//! A driver that a test holds in its hand: it probes a function through its BAR as Linux does, and builds rings of any
//! shape in memory of its own, broken ones too.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::device::{Activation, DeviceError, DeviceKind, QueuePosition};
use super::locked;
use super::pci::VirtioPci;
use super::registers::status;
use crate::interrupt::fake::{FakeIoEvents, FakeMsi, FakeVectors};
use crate::memory::GuestMemory;
use crate::pci::SharedFunction;
use crate::virtio::VirtioDevice;

pub const MEMORY_BYTES: usize = 8 << 20;
/// Each queue's descriptors, avail ring and used ring.
const RINGS: u64 = 0x10_0000;
const RING_STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers are taken from.
const BUFFERS: u64 = 0x20_0000;
/// Long enough for the slowest machine; never reached when the device works.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn guest_memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// One descriptor, as the driver writes it.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A buffer of a well-formed chain.
#[derive(Debug, Clone, Copy)]
pub enum Buffer {
    /// The device reads it.
    Out(u64, u32),
    /// The device writes it.
    In(u64, u32),
}

struct DriverQueue {
    size: u16,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

pub struct FakeDriver {
    pub function: SharedFunction,
    pub memory: GuestMemory,
    pub vectors: Arc<FakeVectors>,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
}

/// Puts a device behind the transport and a driver in front of it. The driver has not started.
pub fn attach(device: Arc<dyn VirtioDevice>) -> FakeDriver {
    let memory = guest_memory();
    let sizes = device.queue_sizes();
    let msi = FakeMsi::new();
    let function = VirtioPci::new(device, memory.clone(), &*msi, FakeIoEvents::new()).unwrap();
    FakeDriver::of(function, memory, msi.function(0).unwrap(), sizes)
}

/// Keeps what the transport hands over, for a test that serves queues itself, with a clock of its own.
struct Captured {
    features: u64,
    queue_sizes: &'static [u16],
    activation: Mutex<Option<Activation>>,
}

impl VirtioDevice for Captured {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 0, class: [0, 0xff, 0], name: "captured" }
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> &'static [u16] {
        self.queue_sizes
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        *locked(&self.activation) = Some(activation);
        Ok(())
    }
    fn begin_reset(&self) {}
    fn is_reset(&self) -> bool {
        true
    }
    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(Vec::new())
    }
    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        Ok(serde_json::Value::Null)
    }
    fn restore(&self, _saved: serde_json::Value) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A driver that has started, and what its device was given.
pub fn activated(features: u64, queue_sizes: &'static [u16]) -> (FakeDriver, Activation) {
    let device = Arc::new(Captured { features, queue_sizes, activation: Mutex::default() });
    let mut driver = attach(device.clone());
    driver.start();
    let activation = locked(&device.activation).take().expect("a driver that has started");
    (driver, activation)
}

impl FakeDriver {
    /// A driver of a function that is in a machine already.
    pub fn of(function: SharedFunction, memory: GuestMemory, vectors: Arc<FakeVectors>, sizes: &[u16]) -> Self {
        let queue = |size: &u16| DriverQueue { size: *size, next_descriptor: 0, avail: 0, used: 0 };
        Self { function, memory, vectors, queues: sizes.iter().map(queue).collect(), next_buffer: BUFFERS }
    }

    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    /// A queue's register of an address: 32 descriptors, 40 avail ring, 48 used ring.
    pub fn read_queue_address(&self, queue: u16, register: u64) -> u64 {
        self.write(22, 2, u64::from(queue));
        self.read(register, 8)
    }

    pub fn status(&self) -> u8 {
        self.read(20, 1) as u8
    }

    pub fn set_status(&self, bits: u8) {
        self.write(20, 1, u64::from(self.status() | bits));
    }

    pub fn offered(&self) -> u64 {
        let mut offered = 0;
        for select in [0, 1] {
            self.write(0, 4, select);
            offered |= self.read(4, 4) << (32 * select);
        }
        offered
    }

    /// All steps to DRIVER_OK, with every offered feature.
    pub fn start(&mut self) {
        self.start_with(u64::MAX);
    }

    pub fn start_with(&mut self, wanted: u64) {
        let features = self.offered() & wanted;
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        for select in [0u64, 1] {
            self.write(8, 4, select);
            self.write(12, 4, features >> (32 * select) & 0xffff_ffff);
        }
        self.set_status(status::FEATURES_OK);
        assert_ne!(self.status() & status::FEATURES_OK, 0);
        self.enable_msix();
        for index in 0..self.queues.len() {
            self.write(22, 2, index as u64);
            self.write(26, 2, index as u64 + 1);
            for (field, part) in [(32, 0), (40, AVAIL), (48, USED)] {
                self.write(field, 8, ring(index) + part);
            }
            self.write(28, 2, 1);
            let queue = &mut self.queues[index];
            (queue.next_descriptor, queue.avail, queue.used) = (0, 0, 0);
            self.memory.write_slice(&[0; RING_STRIDE as usize], GuestAddress(ring(index))).unwrap();
        }
        self.write(16, 2, 0);
        self.set_status(status::DRIVER_OK);
    }

    /// Vector n goes to data n; all unmasked.
    fn enable_msix(&self) {
        let mut at = 0u8;
        let mut pointer = [0];
        self.function.config_read(0x34, &mut pointer);
        while pointer[0] != 0 {
            let mut header = [0; 2];
            self.function.config_read(u16::from(pointer[0]), &mut header);
            if header[0] == 0x11 {
                at = pointer[0];
            }
            pointer[0] = header[1];
        }
        assert_ne!(at, 0, "the function has MSI-X");
        self.function.config_write(u16::from(at) + 2, &0x8000u16.to_le_bytes());
        for vector in 0..=self.queues.len() as u64 {
            let entry = 0x4000 + vector * 16;
            self.write(entry, 8, 0xfee0_0000);
            self.write(entry + 8, 4, vector);
            self.write(entry + 12, 4, 0);
        }
    }

    /// Resets and waits until the device has let go of memory.
    pub fn reset(&mut self) {
        self.write(20, 1, 0);
        self.wait("the reset", |d| d.status() == 0);
    }

    pub fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < until, "no end of waiting for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Interrupts of a queue so far.
    pub fn interrupts(&self, queue: usize) -> u64 {
        self.vectors.vector(queue as u16 + 1).unwrap().delivered
    }

    /// Guest memory for a buffer, with `bytes` in it.
    pub fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next_buffer;
        self.next_buffer = (at + bytes.len() as u64).next_multiple_of(4096);
        assert!(self.next_buffer <= MEMORY_BYTES as u64, "out of test memory");
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes one descriptor of a queue's table.
    pub fn descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        self.descriptor_at(ring(queue) + u64::from(index) * 16, descriptor);
    }

    pub fn descriptor_at(&self, address: u64, d: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&d.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&d.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&d.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&d.next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
    }

    /// Offers a head and rings the doorbell.
    pub fn offer(&mut self, queue: usize, head: u16) {
        self.offer_quietly(queue, head);
        self.kick(queue);
    }

    pub fn offer_quietly(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let avail = ring(queue) + AVAIL;
        let place = avail + 4 + u64::from(q.avail % q.size) * 2;
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        q.avail = q.avail.wrapping_add(1);
        // used_event: interrupt at the very next one.
        let event = avail + 4 + u64::from(q.size) * 2;
        self.memory.write_obj(q.used, GuestAddress(event)).unwrap();
        self.set_avail_index(queue, self.queues[queue].avail);
    }

    pub fn set_avail_index(&self, queue: usize, index: u16) {
        let at = GuestAddress(ring(queue) + AVAIL + 2);
        self.memory.store(index, at, std::sync::atomic::Ordering::Release).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.write(0x3000 + queue as u64 * 4, 2, queue as u64);
    }

    /// Offers a well-formed chain. Returns its head.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let size = self.queues[queue].size;
        let head = self.queues[queue].next_descriptor % size;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = (head + i as u16) % size;
            let more = i + 1 < buffers.len();
            let (address, len, direction) = match *buffer {
                Buffer::Out(address, len) => (address, len, 0),
                Buffer::In(address, len) => (address, len, WRITE),
            };
            self.descriptor(
                queue,
                index,
                Descriptor { address, len, flags: direction | if more { NEXT } else { 0 }, next: (index + 1) % size },
            );
        }
        self.queues[queue].next_descriptor = (head + buffers.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    /// The next used element, if there is one: (head, bytes written).
    pub fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = &mut self.queues[queue];
        let used = ring(queue) + USED;
        let index: u16 = self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap();
        if index == q.used {
            return None;
        }
        let at = used + 4 + u64::from(q.used % q.size) * 8;
        let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        q.used = q.used.wrapping_add(1);
        Some((id as u16, len))
    }

    pub fn used(&mut self, queue: usize) -> (u16, u32) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.try_used(queue) {
                return used;
            }
            assert!(Instant::now() < until, "the device does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn ring(queue: usize) -> u64 {
    RINGS + queue as u64 * RING_STRIDE
}

pub mod hostile {
    //! Chains of a driver that offers anything, for property tests.

    use std::ops::Range;

    use proptest::prelude::*;

    use super::{Descriptor, FakeDriver, MEMORY_BYTES, NEXT, WRITE};

    /// A chain, mostly of whole and existing memory, now and then of anything.
    #[derive(Debug, Clone)]
    pub struct Offer {
        queue: usize,
        /// Address, length, and whether the device may write to it.
        descriptors: Vec<(u64, u32, bool)>,
    }

    /// On one of the first `queues` queues.
    pub fn offer(queues: usize) -> impl Strategy<Value = Offer> {
        let end = MEMORY_BYTES as u64;
        let address = prop_oneof![0..end + (1 << 20), (0..end / 4096).prop_map(|page| page * 4096), any::<u64>()];
        let len = prop_oneof![0u32..10_000, Just(4096), Just(4 << 20), any::<u32>()];
        let descriptors = prop::collection::vec((address, len, any::<bool>()), 1..6);
        (0..queues, descriptors).prop_map(|(queue, descriptors)| Offer { queue, descriptors })
    }

    impl Offer {
        /// Puts it into the ring and rings the doorbell.
        pub fn make(&self, driver: &mut FakeDriver) {
            let last = self.descriptors.len() - 1;
            for (index, (address, len, write)) in self.descriptors.iter().enumerate() {
                let flags = if *write { WRITE } else { 0 } | if index < last { NEXT } else { 0 };
                let descriptor = Descriptor { address: *address, len: *len, flags, next: index as u16 + 1 };
                driver.descriptor(self.queue, index as u16, descriptor);
            }
            driver.offer(self.queue, 0);
        }

        /// What the device may write to.
        pub fn writable(&self) -> impl Iterator<Item = Range<u64>> {
            let writable = self.descriptors.iter().filter(|(_, _, write)| *write);
            writable.map(|(address, len, _)| *address..address.saturating_add(u64::from(*len)))
        }
    }
}
