//! The border between the transport and a device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// What a device is to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceKind {
    /// Virtio device id (virtio 1.2, chapter 5): 2 block, 3 console.
    pub id: u16,
    /// PCI base class, subclass, programming interface.
    pub class: [u8; 3],
    /// For logs and metrics.
    pub name: &'static str,
}

/// Why a device did not do what the transport asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the thread of the {device} device has ended")]
    ThreadGone { device: &'static str },
    #[error("the thread of the {device} device does not answer")]
    NoAnswer { device: &'static str },
    #[error("the {device} device has requests under way; drain it before its state is saved")]
    Busy { device: &'static str },
    #[error("the saved state of the {device} device has version {found}; this program reads {known}")]
    Version { device: &'static str, found: u32, known: u32 },
    #[error("the saved state of the {device} device does not fit: {what}")]
    Unfit { device: &'static str, what: String },
    #[error("the saved state of the {device} device cannot be read or written")]
    Encoding {
        device: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("the {device} device cannot duplicate a doorbell")]
    Doorbell {
        device: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Where a queue's owner stopped: the part of a queue that only the device knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueuePosition {
    pub next_avail: u16,
    pub next_used: u16,
}

/// A queue that the driver enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    pub queue: Queue,
    /// Readable when the driver put something into the ring.
    pub kick: EventFd,
}

/// Everything that a device needs to work, given to it at DRIVER_OK.
pub struct Activation {
    pub memory: GuestMemory,
    /// Negotiated.
    pub features: u64,
    /// By queue index; `None` for a queue that the driver left out.
    pub queues: Vec<Option<ActiveQueue>>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// How a device reaches its driver. Called from any thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of a queue were used.
    fn queue_used(&self, index: u16);
    /// Device configuration changed.
    fn config_changed(&self);
    /// The driver broke the protocol: only a reset helps.
    fn needs_reset(&self);
}

/// A device behind the transport. Its methods are called on vCPU threads and never wait for I/O.
pub trait VirtioDevice: Send + Sync {
    fn kind(&self) -> DeviceKind;

    /// Device features. The transport adds its own.
    fn features(&self) -> u64;

    /// Size of each queue. Their number and sizes belong to the machine type and never change (peers-vmm §4.2 rule 23).
    fn queue_sizes(&self) -> &'static [u16];

    /// Reads device configuration. What does not exist reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start to serve the queues.
    fn activate(&self, activation: Activation) -> Result<(), DeviceError>;

    /// Stop serving. Ends when [`is_reset`](Self::is_reset) says so: requests that are in the kernel still write to
    /// guest memory, and the driver must not reuse it before.
    fn begin_reset(&self);

    fn is_reset(&self) -> bool;

    /// Where the queues are. Only for a device that is quiet.
    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError>;

    /// The device's own versioned state, beside its queues.
    fn save(&self) -> Result<serde_json::Value, DeviceError>;
    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError>;
}
