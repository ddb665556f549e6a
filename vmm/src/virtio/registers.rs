//! The common configuration structure (virtio 1.2, 4.1.4.3) as a pure state machine: features, status, queues.
//!
//! No memory, no interrupt, no device: a write returns what the transport has to do. A write that the driver may not
//! make at this moment changes nothing.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

pub mod status {
    //! Bits of the device status.
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    pub const BY_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// "No interrupt" in a vector register.
pub const NO_VECTOR: u16 = 0xffff;
/// Features of the transport, offered by every device. ACCESS_PLATFORM is off: there is no IOMMU.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Bytes of the structure that exist.
pub const COMMON_BYTES: u64 = 56;

mod field {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const QUEUE_COUNT: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_AVAIL: u64 = 40;
    pub const QUEUE_USED: u64 = 48;
}

/// What the transport has to do after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    /// Vectors changed: interrupts go elsewhere from now on.
    Vectors,
    /// The driver is ready.
    Activate,
    /// The driver gives up, or starts over.
    Reset,
}

/// One queue as the driver set it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    pub max_size: u16,
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, vector: NO_VECTOR, enabled: false, descriptors: 0, avail: 0, used: 0 }
    }
}

/// The registers of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    device_features: u64,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    vector_count: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    /// `vector_count` is the size of the MSI-X table: higher numbers are refused.
    pub fn new(device_features: u64, queue_sizes: &[u16], vector_count: u16) -> Self {
        Self {
            device_features: device_features | TRANSPORT_FEATURES,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            vector_count,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueRegisters::new).collect(),
        }
    }

    /// Features of both sides. Meaningful after FEATURES_OK.
    pub fn features(&self) -> u64 {
        self.driver_features & self.device_features
    }

    pub fn event_idx(&self) -> bool {
        self.features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    pub fn status(&self) -> u8 {
        self.status
    }

    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Device configuration changed: the driver that reads it in parts sees that.
    pub fn bump_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    pub fn set_needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    pub fn is_driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max_size).collect();
        *self = Self::new(self.device_features, &sizes, self.vector_count);
    }

    /// Whether a saved state belongs to a device of the same features, queues and vectors.
    pub fn same_device(&self, saved: &Self) -> bool {
        let sizes = |r: &Self| r.queues.iter().map(|q| q.max_size).collect::<Vec<_>>();
        self.device_features == saved.device_features
            && self.vector_count == saved.vector_count
            && sizes(self) == sizes(saved)
            && saved.queues.iter().all(|q| valid_size(q.size, q.max_size))
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let half = |select: u32, features: u64| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let from_queue = |get: fn(&QueueRegisters) -> u64| queue.map_or(0, get);
        // (start of the field, its bytes, its value)
        let (start, len, value) = match offset {
            field::DEVICE_FEATURE_SELECT..field::DEVICE_FEATURE => {
                (field::DEVICE_FEATURE_SELECT, 4, u64::from(self.device_feature_select))
            }
            field::DEVICE_FEATURE..field::DRIVER_FEATURE_SELECT => {
                (field::DEVICE_FEATURE, 4, half(self.device_feature_select, self.device_features))
            }
            field::DRIVER_FEATURE_SELECT..field::DRIVER_FEATURE => {
                (field::DRIVER_FEATURE_SELECT, 4, u64::from(self.driver_feature_select))
            }
            field::DRIVER_FEATURE..field::CONFIG_VECTOR => {
                (field::DRIVER_FEATURE, 4, half(self.driver_feature_select, self.driver_features))
            }
            field::CONFIG_VECTOR..field::QUEUE_COUNT => (field::CONFIG_VECTOR, 2, u64::from(self.config_vector)),
            field::QUEUE_COUNT..field::STATUS => (field::QUEUE_COUNT, 2, self.queues.len() as u64),
            field::STATUS => (field::STATUS, 1, u64::from(self.status)),
            field::GENERATION => (field::GENERATION, 1, u64::from(self.generation)),
            field::QUEUE_SELECT..field::QUEUE_SIZE => (field::QUEUE_SELECT, 2, u64::from(self.queue_select)),
            field::QUEUE_SIZE..field::QUEUE_VECTOR => (field::QUEUE_SIZE, 2, from_queue(|q| u64::from(q.size))),
            field::QUEUE_VECTOR..field::QUEUE_ENABLE => {
                (field::QUEUE_VECTOR, 2, queue.map_or(u64::from(NO_VECTOR), |q| u64::from(q.vector)))
            }
            field::QUEUE_ENABLE..field::QUEUE_NOTIFY_OFFSET => {
                (field::QUEUE_ENABLE, 2, from_queue(|q| u64::from(q.enabled)))
            }
            field::QUEUE_NOTIFY_OFFSET..field::QUEUE_DESCRIPTORS => {
                (field::QUEUE_NOTIFY_OFFSET, 2, queue.map_or(0, |_| u64::from(self.queue_select)))
            }
            field::QUEUE_DESCRIPTORS..field::QUEUE_AVAIL => {
                (field::QUEUE_DESCRIPTORS, 8, from_queue(|q| q.descriptors))
            }
            field::QUEUE_AVAIL..field::QUEUE_USED => (field::QUEUE_AVAIL, 8, from_queue(|q| q.avail)),
            field::QUEUE_USED..COMMON_BYTES => (field::QUEUE_USED, 8, from_queue(|q| q.used)),
            _ => (offset, 0, 0),
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = (offset - start) as usize + i;
            *byte = if at < len { bytes[at] } else { 0 };
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        if data.len() > bytes.len() {
            return Effect::Nothing;
        }
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (field::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (field::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (field::DRIVER_FEATURE, 4) => self.write_features(value),
            (field::CONFIG_VECTOR, 2) => {
                self.config_vector = self.checked_vector(value as u16);
                return Effect::Vectors;
            }
            (field::STATUS, 1) => return self.write_status(value as u8),
            (field::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (field::QUEUE_VECTOR, 2) => {
                let vector = self.checked_vector(value as u16);
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = vector;
                    return Effect::Vectors;
                }
            }
            _ => self.write_queue(offset, data.len(), value),
        }
        Effect::Nothing
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        // The driver reads the register back and sees a vector that does not exist refused.
        if vector < self.vector_count { vector } else { NO_VECTOR }
    }

    fn write_features(&mut self, value: u64) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let keep_high = self.driver_features & !0xffff_ffff;
        let keep_low = self.driver_features & 0xffff_ffff;
        match self.driver_feature_select {
            0 => self.driver_features = keep_high | value,
            1 => self.driver_features = keep_low | value << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let value = value & status::BY_DRIVER;
        let old = self.status;
        // Bits are only ever added; a driver starts over with a reset.
        if value & old & status::BY_DRIVER != old & status::BY_DRIVER {
            return Effect::Nothing;
        }
        let mut new = old | value;
        let unknown = self.driver_features & !self.device_features;
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        let wants_features = new & !old & status::FEATURES_OK != 0;
        if wants_features && (unknown != 0 || !modern || new & status::DRIVER == 0) {
            // Left clear, the bit tells the driver that its choice is refused.
            new &= !status::FEATURES_OK;
        }
        let starts = new & !old & status::DRIVER_OK != 0;
        if starts && new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status = new;
        if new & !old & status::DRIVER_OK != 0 { Effect::Activate } else { Effect::Nothing }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        if self.is_driver_ok() || self.status & status::FEATURES_OK == 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (field::QUEUE_SIZE, 2) if valid_size(value as u16, queue.max_size) => {
                queue.size = value as u16;
            }
            (field::QUEUE_ENABLE, 2) if value == 1 => queue.enabled = true,
            _ => {
                for (start, register) in [
                    (field::QUEUE_DESCRIPTORS, &mut queue.descriptors),
                    (field::QUEUE_AVAIL, &mut queue.avail),
                    (field::QUEUE_USED, &mut queue.used),
                ] {
                    match (offset.wrapping_sub(start), len) {
                        (0, 8) => *register = value,
                        (0, 4) => *register = *register & !0xffff_ffff | value,
                        (4, 4) => *register = *register & 0xffff_ffff | value << 32,
                        _ => {}
                    }
                }
            }
        }
    }
}

fn valid_size(size: u16, max_size: u16) -> bool {
    size.is_power_of_two() && size <= max_size
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FEATURE: u64 = 1 << 9;

    fn registers() -> Registers {
        Registers::new(FEATURE, &[256, 64], 3)
    }

    fn set_features(r: &mut Registers, features: u64) {
        for (select, value) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            r.write(field::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            r.write(field::DRIVER_FEATURE, &value.to_le_bytes());
        }
    }

    fn set_status(r: &mut Registers, bits: u8) -> Effect {
        let status = r.status() | bits;
        r.write(field::STATUS, &[status])
    }

    #[test]
    fn a_driver_that_follows_the_steps_is_activated() {
        let mut r = registers();
        set_status(&mut r, status::ACKNOWLEDGE);
        set_status(&mut r, status::DRIVER);
        let mut offered = 0;
        for select in [0u32, 1] {
            r.write(field::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            let mut half = [0; 4];
            r.read(field::DEVICE_FEATURE, &mut half);
            offered |= u64::from(u32::from_le_bytes(half)) << (32 * select);
        }
        assert_eq!(offered, FEATURE | TRANSPORT_FEATURES);
        set_features(&mut r, offered);
        set_status(&mut r, status::FEATURES_OK);
        assert_ne!(r.status() & status::FEATURES_OK, 0);
        r.write(field::QUEUE_SELECT, &1u16.to_le_bytes());
        r.write(field::QUEUE_SIZE, &32u16.to_le_bytes());
        r.write(field::QUEUE_DESCRIPTORS, &0x1_0000_2000u64.to_le_bytes()[..4]);
        r.write(field::QUEUE_DESCRIPTORS + 4, &1u32.to_le_bytes());
        r.write(field::QUEUE_VECTOR, &2u16.to_le_bytes());
        r.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
        assert_eq!(set_status(&mut r, status::DRIVER_OK), Effect::Activate);
        let queue = &r.queues()[1];
        assert_eq!((queue.size, queue.descriptors, queue.vector, queue.enabled), (32, 0x1_0000_2000, 2, true));
        assert!(r.event_idx());
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut r = registers();
        set_status(&mut r, status::ACKNOWLEDGE | status::DRIVER);
        set_features(&mut r, TRANSPORT_FEATURES | 1 << 33);
        set_status(&mut r, status::FEATURES_OK);
        assert_eq!(r.status() & status::FEATURES_OK, 0);
        assert_eq!(set_status(&mut r, status::DRIVER_OK), Effect::Nothing);
        assert!(!r.is_driver_ok());
    }

    #[test]
    fn a_legacy_driver_is_refused() {
        let mut r = registers();
        set_status(&mut r, status::ACKNOWLEDGE | status::DRIVER);
        set_features(&mut r, FEATURE);
        set_status(&mut r, status::FEATURES_OK);
        assert_eq!(r.status() & status::FEATURES_OK, 0);
    }

    #[test]
    fn a_running_queue_cannot_be_changed() {
        let mut r = registers();
        set_status(&mut r, status::ACKNOWLEDGE | status::DRIVER);
        set_features(&mut r, TRANSPORT_FEATURES);
        set_status(&mut r, status::FEATURES_OK);
        r.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
        let before = r.queues()[0].clone();
        r.write(field::QUEUE_AVAIL, &0x5000u64.to_le_bytes());
        r.write(field::QUEUE_SIZE, &8u16.to_le_bytes());
        assert_eq!(r.queues()[0], before);
    }

    #[test]
    fn vectors_beyond_the_table_read_back_as_none() {
        let mut r = registers();
        r.write(field::CONFIG_VECTOR, &3u16.to_le_bytes());
        assert_eq!(r.config_vector(), NO_VECTOR);
        r.write(field::CONFIG_VECTOR, &2u16.to_le_bytes());
        assert_eq!(r.config_vector(), 2);
    }

    proptest! {
        /// No sequence of writes activates a device without accepted features, or gives a queue a size that it does not have.
        #[test]
        fn the_status_machine_holds_under_any_writes(
            writes in prop::collection::vec((0u64..64, prop::collection::vec(any::<u8>(), 1..9)), 0..300)
        ) {
            let mut r = registers();
            for (offset, data) in writes {
                let before = r.status();
                match r.write(offset, &data) {
                    Effect::Activate => prop_assert!(before & status::DRIVER_OK == 0),
                    Effect::Reset => r.reset(),
                    _ => {}
                }
                if r.is_driver_ok() {
                    prop_assert!(r.status() & status::FEATURES_OK != 0);
                    prop_assert_eq!(r.driver_features & !r.device_features, 0);
                }
                for queue in r.queues() {
                    prop_assert!(valid_size(queue.size, queue.max_size));
                    prop_assert!(queue.vector < 3 || queue.vector == NO_VECTOR);
                }
                let mut out = [0; 8];
                r.read(offset, &mut out[..data.len().min(8)]);
            }
        }
    }
}
