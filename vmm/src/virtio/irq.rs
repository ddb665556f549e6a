//! The part of the transport that the device's threads reach: ISR, vectors, and the news for the status register.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::device::VirtioInterrupt;
use super::locked;
use super::registers::NO_VECTOR;
use crate::pci::msix::Msix;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one function.
pub(super) struct Irq {
    pub(super) isr: AtomicU8,
    pub(super) needs_reset: AtomicBool,
    pub(super) config_changes: AtomicU8,
    pub(super) vectors: Mutex<Vectors>,
}

pub(super) struct Vectors {
    pub(super) msix: Msix,
    pub(super) config: u16,
    pub(super) queues: Vec<u16>,
}

impl VirtioInterrupt for Irq {
    fn queue_used(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        let mut vectors = locked(&self.vectors);
        let vector = vectors.queues.get(usize::from(index)).copied();
        vectors.msix.trigger(vector.unwrap_or(NO_VECTOR));
    }

    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        let mut vectors = locked(&self.vectors);
        let vector = vectors.config;
        vectors.msix.trigger(vector);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }
}
