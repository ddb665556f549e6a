//! The PCI transport (virtio 1.2, 4.1): one BAR with the common, ISR, device and notify structures and MSI-X.
//!
//! ```text
//! BAR 0, 32 KiB, 64-bit prefetchable
//! 0x0000 common configuration    0x3000 doorbells, 4 bytes a queue (ioeventfd)
//! 0x1000 ISR                     0x4000 MSI-X table: vector 0.. as the driver maps them
//! 0x2000 device configuration    0x5000 MSI-X pending bits
//! ```
//!
//! The layout, the order of capabilities and the number of vectors (one a queue and one for configuration) belong to the machine
//! type. There is no INTx: a driver needs MSI-X.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, DeviceError, QueuePosition, VirtioDevice, VirtioInterrupt};
use super::irq::{Irq, Vectors};
use super::locked;
use super::registers::{Effect, NO_VECTOR, Registers, status};
use crate::interrupt::{IoEvents, MsiSink};
use crate::memory::GuestMemory;
use crate::pci::config_space::{ConfigError, ConfigSpace, Identity, SavedConfigSpace};
use crate::pci::msix::{self, Msix, SavedMsix};
use crate::pci::{Bar, BarKind, BarRange, PciError, PciFunction, express};

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE_ID: u16 = 0x1040;
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);
const VENDOR_CAPABILITY: u8 = 0x09;

const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const REGION_BYTES: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const NOTIFY_MULTIPLIER: u32 = 4;

/// cfg_type of the vendor capabilities.
mod structure {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI_ACCESS: u8 = 5;
}

/// Registers of the PCI access capability, counted from it: a window into the BAR for drivers that cannot map it.
mod window {
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    pub const DATA: u16 = 16;
}

/// Why a virtio function cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("cannot lay out the configuration space of the {device} device")]
    Config {
        device: &'static str,
        #[source]
        source: ConfigError,
    },
    #[error("no interrupt vectors for the {device} device")]
    Vectors {
        device: &'static str,
        #[source]
        source: crate::interrupt::InterruptError,
    },
    #[error("cannot create a doorbell for the {device} device")]
    Doorbell {
        device: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the {device} device has {count} queues; the transport has room for {limit}")]
    TooManyQueues { device: &'static str, count: usize, limit: usize },
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    io_events: Arc<dyn IoEvents>,
    doorbells: Vec<EventFd>,
    irq: Arc<Irq>,
    inner: Mutex<Inner>,
}

struct Inner {
    space: ConfigSpace,
    registers: Registers,
    msix_at: u16,
    express_at: u16,
    window_at: u16,
    /// Where the doorbells are registered with KVM, one flag a queue.
    base: Option<u64>,
    registered: Vec<bool>,
    /// The device was given queues since its last reset.
    active: bool,
    /// Status as it was before a reset that is not finished.
    resetting: Option<u8>,
}

/// [`VirtioPci`] as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVirtioPci {
    pub version: u32,
    pub config: SavedConfigSpace,
    pub msix: SavedMsix,
    pub registers: Registers,
    pub isr: u8,
    pub positions: Vec<QueuePosition>,
    pub device: serde_json::Value,
}

impl SavedVirtioPci {
    pub const VERSION: u32 = 1;
}

/// What a function says of its place: the layout of its PCI Express capability.
type AddExpress = fn(&mut ConfigSpace) -> Result<u16, ConfigError>;

impl VirtioPci {
    /// A function for the slot of a root port.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: &dyn MsiSink,
        io_events: Arc<dyn IoEvents>,
    ) -> Result<Arc<Self>, TransportError> {
        Self::with(device, memory, msi, io_events, express::add_endpoint)
    }

    /// A function for bus 0, part of the root complex.
    pub fn integrated(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: &dyn MsiSink,
        io_events: Arc<dyn IoEvents>,
    ) -> Result<Arc<Self>, TransportError> {
        Self::with(device, memory, msi, io_events, express::add_integrated_endpoint)
    }

    fn with(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: &dyn MsiSink,
        io_events: Arc<dyn IoEvents>,
        add_express: AddExpress,
    ) -> Result<Arc<Self>, TransportError> {
        let kind = device.kind();
        let sizes = device.queue_sizes();
        let limit = usize::from(msix::MAX_VECTORS) - 1;
        if sizes.len() > limit {
            return Err(TransportError::TooManyQueues { device: kind.name, count: sizes.len(), limit });
        }
        let vector_count = sizes.len() as u16 + 1;
        let vectors =
            msi.allocate(vector_count).map_err(|source| TransportError::Vectors { device: kind.name, source })?;
        let doorbells = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| TransportError::Doorbell { device: kind.name, source })?;
        let registers = Registers::new(device.features(), sizes, vector_count);
        let inner = Self::config_space(&*device, vector_count, sizes.len(), add_express)
            .map(|(space, [msix_at, express_at, window_at])| Inner {
                space,
                registers,
                msix_at,
                express_at,
                window_at,
                base: None,
                registered: vec![false; sizes.len()],
                active: false,
                resetting: None,
            })
            .map_err(|source| TransportError::Config { device: kind.name, source })?;
        Ok(Arc::new(Self {
            irq: Arc::new(Irq {
                isr: AtomicU8::new(0),
                needs_reset: AtomicBool::new(false),
                config_changes: AtomicU8::new(0),
                vectors: Mutex::new(Vectors {
                    msix: Msix::new(vectors, vector_count),
                    config: NO_VECTOR,
                    queues: vec![NO_VECTOR; sizes.len()],
                }),
            }),
            device,
            memory,
            io_events,
            doorbells,
            inner: Mutex::new(inner),
        }))
    }

    fn config_space(
        device: &dyn VirtioDevice,
        vector_count: u16,
        queues: usize,
        add_express: AddExpress,
    ) -> Result<(ConfigSpace, [u16; 3]), ConfigError> {
        let kind = device.kind();
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + kind.id,
            revision: 1,
            class: kind.class,
            subsystem: Some(SUBSYSTEM),
        });
        space.add_bar(Bar { index: BAR, kind: BarKind::Prefetchable64, size: BAR_BYTES });
        let msix_at = Msix::add_capability(&mut space, vector_count, BAR, MSIX_TABLE as u32, MSIX_PENDING as u32)?;
        let express_at = add_express(&mut space)?;
        let notify_bytes = queues as u32 * NOTIFY_MULTIPLIER;
        for (kind, offset, length, extra) in [
            (structure::COMMON, COMMON, super::registers::COMMON_BYTES as u32, None),
            (structure::ISR, ISR, 1, None),
            (structure::DEVICE, DEVICE, REGION_BYTES as u32, None),
            (structure::NOTIFY, NOTIFY, notify_bytes, Some(NOTIFY_MULTIPLIER)),
        ] {
            space.add_capability(VENDOR_CAPABILITY, &vendor_capability(kind, offset as u32, length, extra))?;
        }
        let access = vendor_capability(structure::PCI_ACCESS, 0, 0, Some(0));
        let window_at = space.add_capability(VENDOR_CAPABILITY, &access)?;
        space.allow_u16(window_at + window::BAR, 0x00ff);
        space.allow_u32(window_at + window::OFFSET, u32::MAX);
        space.allow_u32(window_at + window::LENGTH, u32::MAX);
        Ok((space, [msix_at, express_at, window_at]))
    }

    /// The interrupts of the device, for parts of it that outlive an activation.
    pub fn interrupt(&self) -> Arc<dyn VirtioInterrupt> {
        Arc::clone(&self.irq) as Arc<dyn VirtioInterrupt>
    }

    fn read_structures(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        let at = offset % REGION_BYTES;
        match offset - at {
            COMMON => {
                self.poll_reset(inner);
                self.fold_events(inner);
                inner.registers.read(at, data);
                // Byte 20 is the status: not zero before the device has let go of guest memory.
                if let (Some(old), Some(i)) = (inner.resetting, 20u64.checked_sub(at))
                    && let Some(byte) = data.get_mut(i as usize)
                {
                    *byte = old.max(1);
                }
            }
            ISR => {
                data.fill(0);
                if at == 0 {
                    data[0] = self.irq.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => self.device.read_config(at, data),
            MSIX_TABLE => locked(&self.irq.vectors).msix.table_read(at, data),
            MSIX_PENDING => locked(&self.irq.vectors).msix.pending_read(at, data),
            _ => data.fill(0),
        }
    }

    fn write_structures(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let at = offset % REGION_BYTES;
        match offset - at {
            COMMON => self.write_common(inner, at, data),
            DEVICE => self.device.write_config(at, data),
            NOTIFY => {
                let index = (at / u64::from(NOTIFY_MULTIPLIER)) as usize;
                if let Some(doorbell) = self.doorbells.get(index) {
                    ring(doorbell);
                }
            }
            MSIX_TABLE => locked(&self.irq.vectors).msix.table_write(at, data),
            _ => {}
        }
    }

    fn write_common(&self, inner: &mut Inner, at: u64, data: &[u8]) {
        self.poll_reset(inner);
        if inner.resetting.is_some() {
            return;
        }
        self.fold_events(inner);
        match inner.registers.write(at, data) {
            Effect::Nothing => {}
            Effect::Vectors => self.apply_vectors(inner),
            Effect::Activate => {
                if let Err(error) = self.activate(inner, None) {
                    tracing::warn!(device = self.device.kind().name, %error, "the driver's queues are not usable");
                    inner.registers.set_needs_reset();
                    self.irq.needs_reset();
                }
            }
            Effect::Reset => self.reset_device(inner),
        }
    }

    /// Gives the enabled queues to the device.
    fn activate(&self, inner: &mut Inner, positions: Option<&[QueuePosition]>) -> Result<(), ActivateError> {
        let event_idx = inner.registers.event_idx();
        let mut queues = Vec::with_capacity(self.doorbells.len());
        for (index, registers) in inner.registers.queues().iter().enumerate() {
            if !registers.enabled {
                queues.push(None);
                continue;
            }
            let unusable = |source| ActivateError::Queue { index, source };
            let mut queue = Queue::new(registers.max_size).map_err(unusable)?;
            queue.try_set_size(registers.size).map_err(unusable)?;
            queue.try_set_desc_table_address(GuestAddress(registers.descriptors)).map_err(unusable)?;
            queue.try_set_avail_ring_address(GuestAddress(registers.avail)).map_err(unusable)?;
            queue.try_set_used_ring_address(GuestAddress(registers.used)).map_err(unusable)?;
            queue.set_event_idx(event_idx);
            if let Some(position) = positions.and_then(|p| p.get(index)) {
                queue.set_next_avail(position.next_avail);
                queue.set_next_used(position.next_used);
            }
            queue.set_ready(true);
            if !queue.is_valid(&self.memory) {
                return Err(ActivateError::OutOfMemory { index });
            }
            let kick = self.doorbells[index]
                .try_clone()
                .map_err(|source| DeviceError::Doorbell { device: self.device.kind().name, source })?;
            queues.push(Some(ActiveQueue { queue, kick }));
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: inner.registers.features(),
            queues,
            interrupt: self.interrupt(),
        })?;
        inner.active = true;
        // Whatever was put into the rings before now had no listener.
        self.doorbells.iter().for_each(ring);
        Ok(())
    }

    fn reset_device(&self, inner: &mut Inner) {
        let old = inner.registers.status();
        inner.registers.reset();
        self.apply_vectors(inner);
        self.irq.isr.store(0, Ordering::Release);
        self.irq.needs_reset.store(false, Ordering::Release);
        if std::mem::take(&mut inner.active) {
            self.device.begin_reset();
            inner.resetting = Some(old);
            self.poll_reset(inner);
        }
    }

    fn poll_reset(&self, inner: &mut Inner) {
        if inner.resetting.is_some() && self.device.is_reset() {
            inner.resetting = None;
            // What the old queues raised at their end says nothing about the new ones.
            self.irq.isr.store(0, Ordering::Release);
            self.irq.needs_reset.store(false, Ordering::Release);
        }
    }

    /// Takes over what the device's threads reported since the last look.
    fn fold_events(&self, inner: &mut Inner) {
        if inner.active && self.irq.needs_reset.load(Ordering::Acquire) {
            inner.registers.set_needs_reset();
        }
        for _ in 0..self.irq.config_changes.swap(0, Ordering::AcqRel) {
            inner.registers.bump_generation();
        }
    }

    fn apply_vectors(&self, inner: &Inner) {
        let mut vectors = locked(&self.irq.vectors);
        vectors.config = inner.registers.config_vector();
        vectors.queues.clear();
        let queues = inner.registers.queues().iter().map(|q| q.vector);
        vectors.queues.extend(queues);
    }

    fn move_doorbells(&self, inner: &mut Inner, base: Option<u64>) {
        for (index, doorbell) in self.doorbells.iter().enumerate() {
            let offset = NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Some(old) = inner.base.filter(|_| inner.registered[index])
                && let Err(error) = self.io_events.unregister(old + offset, None, doorbell)
            {
                tracing::warn!(%error, address = old + offset, "cannot take back a doorbell");
            }
            inner.registered[index] = false;
            if let Some(new) = base {
                // Without it a store exits to us and rings the same descriptor: slower, still right.
                match self.io_events.register(new + offset, None, doorbell) {
                    Ok(()) => inner.registered[index] = true,
                    Err(error) => {
                        tracing::warn!(%error, address = new + offset, "a doorbell stays slow");
                    }
                }
            }
        }
        inner.base = base;
    }

    /// The BAR access that the guest has programmed into the PCI access capability (virtio 1.2, 4.1.4.9).
    fn window_target(&self, inner: &Inner) -> Option<(u64, usize)> {
        let space = &inner.space;
        let at = inner.window_at;
        let offset = u64::from(space.u32(at + window::OFFSET));
        let len = space.u32(at + window::LENGTH) as usize;
        let usable = space.u8(at + window::BAR) == BAR
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset + len as u64 <= BAR_BYTES;
        usable.then_some((offset, len))
    }

    fn function_reset(&self, inner: &mut Inner) {
        self.reset_device(inner);
        inner.space.reset();
        locked(&self.irq.vectors).msix.reset();
    }
}

/// Why a driver's queues were refused.
#[derive(Debug, thiserror::Error)]
enum ActivateError {
    #[error("queue {index} is not usable: {source}")]
    Queue { index: usize, source: virtio_queue::Error },
    #[error("queue {index} does not lie in guest memory")]
    OutOfMemory { index: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn ring(doorbell: &EventFd) {
    // Fails only when the counter is full, and then the reader wakes anyway.
    let _ = doorbell.write(1);
}

fn vendor_capability(kind: u8, offset: u32, length: u32, extra: Option<u32>) -> Vec<u8> {
    let mut body = vec![if extra.is_some() { 20 } else { 16 }, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    if let Some(extra) = extra {
        body.extend(extra.to_le_bytes());
    }
    body
}

fn overlaps(register: u16, len: usize, field: u16, field_len: u16) -> bool {
    register < field + field_len && usize::from(register) + len > usize::from(field)
}

impl PciFunction for VirtioPci {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        let mut inner = locked(&self.inner);
        let field = inner.window_at + window::DATA;
        if register == field
            && let Some((offset, len)) = self.window_target(&inner)
            && len == data.len()
        {
            self.read_structures(&mut inner, offset, data);
            return;
        }
        inner.space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) {
        let mut inner = locked(&self.inner);
        if register == inner.window_at + window::DATA {
            if let Some((offset, len)) = self.window_target(&inner)
                && len == data.len()
            {
                self.write_structures(&mut inner, offset, data);
            }
            return;
        }
        inner.space.write(register, data);
        let control = inner.msix_at + msix::CONTROL;
        if overlaps(register, data.len(), control, 2) {
            let value = inner.space.u16(control);
            locked(&self.irq.vectors).msix.set_control(value);
        }
        // Initiate Function Level Reset is a command: it never reads back as one.
        let device_control = inner.express_at + express::offset::DEVICE_CONTROL;
        if overlaps(register, data.len(), device_control, 2) {
            let asked = (0..2).fold(0u16, |value, i| {
                let from = usize::from(device_control + i).checked_sub(usize::from(register));
                let byte = from.and_then(|at| data.get(at)).copied().unwrap_or(0);
                value | u16::from(byte) << (8 * i)
            });
            if asked & express::INITIATE_FUNCTION_RESET != 0 {
                self.function_reset(&mut inner);
            }
        }
    }

    fn decoded(&self) -> Vec<BarRange> {
        locked(&self.inner).space.decoded()
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.read_structures(&mut locked(&self.inner), offset, data);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.write_structures(&mut locked(&self.inner), offset, data);
    }

    fn routed(&self, _bar: u8, base: Option<u64>) {
        self.move_doorbells(&mut locked(&self.inner), base);
    }

    fn reset(&self) {
        self.function_reset(&mut locked(&self.inner));
    }

    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        use serde::ser::Error as _;
        let mut inner = locked(&self.inner);
        let positions =
            if inner.active { self.device.positions().map_err(serde_json::Error::custom)? } else { Vec::new() };
        let device = self.device.save().map_err(serde_json::Error::custom)?;
        // Last: the device's thread may report something while it is asked.
        self.fold_events(&mut inner);
        serde_json::to_value(SavedVirtioPci {
            version: SavedVirtioPci::VERSION,
            config: inner.space.save(),
            msix: locked(&self.irq.vectors).msix.save(),
            registers: inner.registers.clone(),
            isr: self.irq.isr.load(Ordering::Acquire),
            positions,
            device,
        })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), PciError> {
        let saved: SavedVirtioPci = serde_json::from_value(saved)?;
        if saved.version != SavedVirtioPci::VERSION {
            return Err(PciError::Version {
                what: "a virtio function",
                found: saved.version,
                known: SavedVirtioPci::VERSION,
            });
        }
        let mut inner = locked(&self.inner);
        if !inner.registers.same_device(&saved.registers) {
            return Err(PciError::Device("it has other features or queues than this machine type".into()));
        }
        inner.space.restore(&saved.config)?;
        inner.registers = saved.registers;
        self.irq.isr.store(saved.isr, Ordering::Release);
        self.apply_vectors(&inner);
        self.device.restore(saved.device).map_err(|e| PciError::Device(e.to_string()))?;
        locked(&self.irq.vectors).msix.restore(&saved.msix)?;
        if inner.registers.is_driver_ok() && inner.registers.status() & status::NEEDS_RESET == 0 {
            self.activate(&mut inner, Some(&saved.positions)).map_err(|e| PciError::Device(e.to_string()))?;
            drop(inner);
            // An interrupt that was on its way when the state was saved is lost: raise each once (peers-vmm §4.2 rule 25).
            for index in 0..self.doorbells.len() {
                self.irq.queue_used(index as u16);
            }
        }
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut inner = locked(&self.inner);
        self.move_doorbells(&mut inner, None);
    }
}
