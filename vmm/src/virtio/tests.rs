//! The transport under a well-behaved driver and under hostile ones, with a device that echoes.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::device::{DeviceError, QueuePosition};
use super::registers::status;
use super::testing::{Buffer, Descriptor, FakeDriver, INDIRECT, NEXT, WRITE, attach};
use super::*;
use crate::pci::PciFunction;

/// Copies what it reads into what it may write, when the test says so.
#[derive(Default)]
struct Echo {
    queue: Mutex<Option<DeviceQueue>>,
    interrupt: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
    holds_memory: AtomicBool,
    activations: AtomicU32,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, class: [7, 0x80, 0], name: "echo" }
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&self, mut activation: Activation) -> Result<(), DeviceError> {
        self.activations.fetch_add(1, Ordering::SeqCst);
        *locked(&self.interrupt) = Some(Arc::clone(&activation.interrupt));
        let memory = activation.memory.clone();
        *locked(&self.queue) = activation.queues[0]
            .take()
            .map(|active| DeviceQueue::new(0, active.queue, memory, activation.interrupt, 8));
        Ok(())
    }
    fn begin_reset(&self) {
        *locked(&self.queue) = None;
    }
    fn is_reset(&self) -> bool {
        !self.holds_memory.load(Ordering::SeqCst)
    }
    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(locked(&self.queue).iter().map(|q| q.position()).collect())
    }
    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        Ok(serde_json::Value::Null)
    }
    fn restore(&self, _saved: serde_json::Value) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Echo {
    /// Serves what is there.
    fn serve(&self) -> Result<u32, QueueError> {
        let mut queue = locked(&self.queue);
        let Some(queue) = queue.as_mut() else {
            return Ok(0);
        };
        let mut served = 0;
        while let Some(chain) = queue.pop()? {
            let len = chain.readable.len().min(chain.writable.len()) as usize;
            let mut bytes = vec![0; len];
            assert!(chain.readable.read(queue.memory(), &mut bytes));
            assert!(chain.writable.write(queue.memory(), &bytes));
            queue.complete(chain.head, len as u32)?;
            served += 1;
        }
        queue.notify()?;
        Ok(served)
    }
}

fn echo() -> (Arc<Echo>, FakeDriver) {
    let device = Arc::new(Echo::default());
    let driver = attach(device.clone());
    (device, driver)
}

/// A started driver, and the error that the device finds in the chain at head 0.
fn hostile(build: impl FnOnce(&mut FakeDriver)) -> QueueError {
    let (device, mut driver) = echo();
    driver.start();
    build(&mut driver);
    driver.offer(0, 0);
    device.serve().expect_err("the chain is broken")
}

#[test]
fn an_echo_goes_through_the_rings_and_interrupts() {
    let (device, mut driver) = echo();
    driver.start();
    let (out, back) = (driver.buffer(b"hello world"), driver.buffer(&[0; 32]));
    let head = driver
        .submit(0, &[Buffer::Out(out, 5), Buffer::Out(out + 5, 6), Buffer::In(back, 3), Buffer::In(back + 3, 20)]);
    assert_eq!(device.serve().unwrap(), 1);
    assert_eq!(driver.used(0), (head, 11));
    assert_eq!(driver.bytes(back, 11), b"hello world");
    assert_eq!(driver.interrupts(0), 1);
    assert_eq!(driver.read(0x1000, 1), 1, "ISR says queue");
    assert_eq!(driver.read(0x1000, 1), 0, "and is cleared by reading");
}

#[test]
fn an_indirect_table_is_followed() {
    let (device, mut driver) = echo();
    driver.start();
    let (out, back) = (driver.buffer(b"abc"), driver.buffer(&[0; 3]));
    let table = driver.buffer(&[0; 32]);
    driver.descriptor_at(table, Descriptor { address: out, len: 3, flags: NEXT, next: 1 });
    driver.descriptor_at(table + 16, Descriptor { address: back, len: 3, flags: WRITE, next: 0 });
    driver.descriptor(0, 0, Descriptor { address: table, len: 32, flags: INDIRECT, next: 0 });
    driver.offer(0, 0);
    device.serve().unwrap();
    assert_eq!(driver.used(0), (0, 3));
    assert_eq!(driver.bytes(back, 3), b"abc");
}

#[test]
fn a_chain_that_loops_is_broken() {
    let error = hostile(|d| {
        for (i, next) in [(0, 1), (1, 0)] {
            d.descriptor(0, i, Descriptor { address: 0x1000, len: 8, flags: NEXT, next });
        }
    });
    assert!(matches!(error, QueueError::Chain { source: chain::ChainError::TooLong { limit: 8, .. }, .. }));
}

#[test]
fn a_chain_that_leaves_its_table_is_broken() {
    let error = hostile(|d| {
        d.descriptor(0, 0, Descriptor { address: 0x1000, len: 8, flags: NEXT, next: 16 });
    });
    assert!(matches!(error, QueueError::Chain { source: chain::ChainError::Broken { head: 0 }, .. }));
}

#[test]
fn a_buffer_outside_of_memory_is_refused() {
    for (address, len) in [(testing::MEMORY_BYTES as u64 - 4, 8), (u64::MAX - 3, 8), (0x1000, u32::MAX)] {
        let error = hostile(|d| {
            d.descriptor(0, 0, Descriptor { address, len, flags: 0, next: 0 });
        });
        assert!(matches!(error, QueueError::Chain { source: chain::ChainError::OutOfMemory { .. }, .. }), "{error:?}");
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_is_refused() {
    let error = hostile(|d| {
        d.descriptor(0, 0, Descriptor { address: 0x1000, len: 8, flags: NEXT | WRITE, next: 1 });
        d.descriptor(0, 1, Descriptor { address: 0x1000, len: 8, flags: 0, next: 0 });
    });
    assert!(matches!(error, QueueError::Chain { source: chain::ChainError::WrongOrder { .. }, .. }));
}

#[test]
fn nested_and_oversized_indirect_tables_are_refused() {
    let nested = hostile(|d| {
        let table = d.buffer(&[0; 16]);
        d.descriptor_at(table, Descriptor { address: table, len: 16, flags: INDIRECT, next: 0 });
        d.descriptor(0, 0, Descriptor { address: table, len: 16, flags: INDIRECT, next: 0 });
    });
    let crooked = hostile(|d| {
        d.descriptor(0, 0, Descriptor { address: 0x1000, len: 17, flags: INDIRECT, next: 0 });
    });
    for error in [nested, crooked] {
        assert!(matches!(error, QueueError::Chain { source: chain::ChainError::Empty { .. }, .. }), "{error:?}");
    }
}

#[test]
fn heads_that_do_not_exist_and_indexes_that_jump_are_refused() {
    let (device, mut driver) = echo();
    driver.start();
    driver.offer(0, 99);
    assert!(matches!(device.serve(), Err(QueueError::Chain { source: chain::ChainError::Empty { head: 99 }, .. })));

    let (device, mut driver) = echo();
    driver.start();
    driver.set_avail_index(0, 1000);
    assert!(matches!(device.serve(), Err(QueueError::Ring { .. })));
}

#[test]
fn one_head_offered_again_and_again_overruns() {
    let (device, mut driver) = echo();
    driver.start();
    driver.descriptor(0, 0, Descriptor { address: 0x1000, len: 8, flags: 0, next: 0 });
    for _ in 0..16 {
        driver.offer(0, 0);
    }
    let mut queue = locked(&device.queue);
    let queue = queue.as_mut().unwrap();
    for _ in 0..16 {
        queue.pop().unwrap().unwrap();
    }
    driver.offer(0, 0);
    assert!(matches!(queue.pop(), Err(QueueError::Overrun { .. })));
}

#[test]
fn a_device_in_trouble_shows_it_in_its_status_until_the_reset() {
    let (device, mut driver) = echo();
    driver.start();
    let interrupt = locked(&device.interrupt).clone().unwrap();
    interrupt.needs_reset();
    assert!(driver.needs_reset());
    assert_eq!(driver.vectors.vector(0).unwrap().delivered, 1, "the configuration vector");
    driver.reset();
    assert_eq!(driver.status(), 0);
    driver.start();
    assert!(!driver.needs_reset());
    assert_eq!(device.activations.load(Ordering::SeqCst), 2);
}

#[test]
fn queues_outside_of_memory_put_the_device_into_needs_reset() {
    let (device, driver) = echo();
    driver.set_status(status::ACKNOWLEDGE | status::DRIVER);
    driver.write(8, 4, 1);
    driver.write(12, 4, 1);
    driver.set_status(status::FEATURES_OK);
    driver.write(32, 8, 0x7fff_ffff_f000);
    driver.write(40, 8, 0x7fff_ffff_f000);
    driver.write(48, 8, 0x7fff_ffff_f000);
    driver.write(28, 2, 1);
    driver.set_status(status::DRIVER_OK);
    assert!(driver.needs_reset());
    assert_eq!(device.activations.load(Ordering::SeqCst), 0);
}

#[test]
fn a_reset_shows_zero_only_when_the_device_has_let_go_of_memory() {
    let (device, mut driver) = echo();
    driver.start();
    device.holds_memory.store(true, Ordering::SeqCst);
    driver.write(20, 1, 0);
    assert_ne!(driver.status(), 0);
    driver.set_status(status::ACKNOWLEDGE);
    device.holds_memory.store(false, Ordering::SeqCst);
    assert_eq!(driver.status(), 0);
}

#[test]
fn doorbells_follow_the_bar() {
    let device = Arc::new(Echo::default());
    let io_events = crate::interrupt::fake::FakeIoEvents::new();
    let msi = crate::interrupt::fake::FakeMsi::new();
    let function = VirtioPci::new(device, testing::guest_memory(), &*msi, io_events.clone()).unwrap();
    function.routed(0, Some(0x10_0000));
    assert_eq!(io_events.doorbells()[0].0, 0x10_3000);
    function.routed(0, Some(0x20_0000));
    assert_eq!(io_events.doorbells().len(), 1);
    assert_eq!(io_events.doorbells()[0].0, 0x20_3000);
    function.routed(0, None);
    assert!(io_events.doorbells().is_empty());
}

#[test]
fn the_access_capability_reaches_the_bar_and_nothing_beyond() {
    let (_, driver) = echo();
    let f = &driver.function;
    let mut at = [0; 2];
    f.config_read(0x34, &mut at[..1]);
    let mut header = [0; 4];
    loop {
        f.config_read(u16::from(at[0]), &mut header);
        if header[0] == 9 && header[3] == 5 {
            break;
        }
        at[0] = header[1];
        assert_ne!(at[0], 0);
    }
    let at = u16::from(at[0]);
    let set = |offset: u32, len: u32| {
        f.config_write(at + 8, &offset.to_le_bytes());
        f.config_write(at + 12, &len.to_le_bytes());
    };
    // num_queues
    set(18, 2);
    let mut two = [0; 2];
    f.config_read(at + 16, &mut two);
    assert_eq!(two, [1, 0]);
    set(20, 1);
    f.config_write(at + 16, &[status::ACKNOWLEDGE]);
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
    for (offset, len) in [(u32::MAX, 4), (0x7fff, 4), (0x8000, 1), (0, 3), (0, u32::MAX)] {
        set(offset, len);
        f.config_write(at + 16, &[0; 4]);
        f.config_read(at + 16, &mut [0; 4]);
    }
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
}

#[test]
fn a_function_level_reset_clears_everything() {
    let (_, mut driver) = echo();
    driver.start();
    let mut at = [0];
    driver.function.config_read(0x34, &mut at);
    let mut header = [0; 2];
    loop {
        driver.function.config_read(u16::from(at[0]), &mut header);
        if header[0] == 0x10 {
            break;
        }
        at[0] = header[1];
        assert_ne!(at[0], 0);
    }
    driver.function.config_write(u16::from(at[0]) + 8, &0x8000u16.to_le_bytes());
    assert_eq!(driver.status(), 0);
    assert!(!driver.vectors.vector(1).unwrap().unmasked);
    let mut control = [0; 2];
    driver.function.config_read(u16::from(at[0]) + 8, &mut control);
    assert_eq!(control, [0, 0]);
}

#[test]
fn a_saved_function_goes_on_where_it_stopped() {
    let (device, mut driver) = echo();
    driver.start();
    let (out, back) = (driver.buffer(b"one"), driver.buffer(&[0; 3]));
    driver.submit(0, &[Buffer::Out(out, 3), Buffer::In(back, 3)]);
    device.serve().unwrap();
    driver.used(0);
    let saved = driver.function.save().unwrap();

    let moved = Arc::new(Echo::default());
    let msi = crate::interrupt::fake::FakeMsi::new();
    let function =
        VirtioPci::new(moved.clone(), driver.memory.clone(), &*msi, crate::interrupt::fake::FakeIoEvents::new())
            .unwrap();
    function.restore(saved).unwrap();
    driver.function = function;
    let head = driver.submit(0, &[Buffer::Out(out, 3), Buffer::In(back, 3)]);
    assert_eq!(moved.serve().unwrap(), 1, "not the old one again");
    assert_eq!(driver.used(0), (head, 3));
}

/// A driver whose four chains the device holds.
fn four_chains() -> (Arc<Echo>, FakeDriver) {
    let (device, mut driver) = echo();
    driver.start();
    let at = driver.buffer(&[0; 64]);
    for _ in 0..4 {
        driver.submit(0, &[Buffer::In(at, 16)]);
    }
    for head in 0..4 {
        assert_eq!(locked(&device.queue).as_mut().unwrap().pop().unwrap().unwrap().head, head);
    }
    (device, driver)
}

#[test]
fn chains_that_come_back_together_interrupt_a_driver_that_waits_for_the_first() {
    let (device, mut driver) = four_chains();
    // The driver wants to know of the very next one, which is not the last of the three.
    {
        let mut queue = locked(&device.queue);
        let queue = queue.as_mut().unwrap();
        queue.complete_together(&[(0, 16), (1, 16), (2, 5)]).unwrap();
        assert_eq!(queue.outstanding(), 1);
        queue.notify().unwrap();
    }
    assert_eq!(driver.interrupts(0), 1);
    assert_eq!([(); 3].map(|()| driver.used(0)), [(0, 16), (1, 16), (2, 5)]);
    // Nor does it hear of what it did not ask for.
    let mut queue = locked(&device.queue);
    let queue = queue.as_mut().unwrap();
    queue.complete_together(&[(3, 1)]).unwrap();
    queue.notify().unwrap();
    queue.complete_together(&[]).unwrap();
    assert_eq!((driver.interrupts(0), queue.outstanding()), (1, 0));
}

#[test]
fn a_driver_sees_all_chains_of_a_frame_or_none() {
    let (device, driver) = four_chains();
    let used_index = vm_memory::GuestAddress(driver.read_queue_address(0, 48) + 2);
    let memory = driver.memory.clone();
    let ending = Arc::new(AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let ending = ending.clone();
        move || {
            use vm_memory::Bytes;
            let mut looks = 0u64;
            while !ending.load(Ordering::SeqCst) {
                let used: u16 = memory.load(used_index, Ordering::Acquire).unwrap();
                assert_eq!(used % 4, 0, "a part of a frame is seen");
                looks += 1;
            }
            looks
        }
    });
    for _ in 0..100_000 {
        locked(&device.queue).as_mut().unwrap().complete_together(&[(0, 1), (1, 1), (2, 1), (3, 1)]).unwrap();
    }
    ending.store(true, Ordering::SeqCst);
    assert!(watcher.join().unwrap() > 0);
}

#[test]
fn a_driver_without_event_indexes_can_ask_for_silence() {
    use vm_memory::Bytes;
    let (device, mut driver) = echo();
    driver.start_with(!(1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX));
    let flags = vm_memory::GuestAddress(driver.read_queue_address(0, 40));
    let at = driver.buffer(b"x");
    for (no_interrupt, interrupts) in [(0u16, 1), (1, 1), (0, 2)] {
        driver.memory.write_obj(no_interrupt, flags).unwrap();
        driver.submit(0, &[Buffer::Out(at, 1)]);
        device.serve().unwrap();
        assert_eq!(driver.interrupts(0), interrupts);
    }
}
