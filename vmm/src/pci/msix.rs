//! MSI-X: the table of a function's vectors, the pending bits, and the two mask levels over them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::config_space::{ConfigError, ConfigSpace};
use crate::interrupt::MsiVectors;

pub const CAPABILITY_ID: u8 = 0x11;
/// Message control, counted from the capability.
pub const CONTROL: u16 = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

/// Bytes of one table entry: address (8), data (4), vector control (4).
const ENTRY_BYTES: u64 = 16;
const VECTOR_MASKED: u32 = 1;
/// Pending bits live in one word: no function of ours has more vectors.
pub const MAX_VECTORS: u16 = 64;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MsixError {
    #[error("saved MSI-X state has version {found}; this program reads {known}")]
    Version { found: u32, known: u32 },
    #[error("saved MSI-X state has {found} vectors, the function has {known}")]
    Vectors { found: usize, known: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    const RESET: Self = Self { address: 0, data: 0, control: VECTOR_MASKED };
}

/// The MSI-X state of a function.
pub struct Msix {
    vectors: Arc<dyn MsiVectors>,
    entries: Vec<Entry>,
    pending: u64,
    enabled: bool,
    masked: bool,
}

/// [`Msix`] as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMsix {
    pub version: u32,
    entries: Vec<Entry>,
    pending: u64,
    enabled: bool,
    masked: bool,
}

impl SavedMsix {
    pub const VERSION: u32 = 1;
}

impl Msix {
    /// `count` vectors, 1..=[`MAX_VECTORS`].
    pub fn new(vectors: Arc<dyn MsiVectors>, count: u16) -> Self {
        Self {
            vectors,
            entries: vec![Entry::RESET; usize::from(count.clamp(1, MAX_VECTORS))],
            pending: 0,
            enabled: false,
            masked: false,
        }
    }

    /// Declares the capability. Table and pending bits lie in `bar` at 8-byte aligned offsets. Returns its offset.
    pub fn add_capability(
        space: &mut ConfigSpace,
        count: u16,
        bar: u8,
        table_offset: u32,
        pending_offset: u32,
    ) -> Result<u16, ConfigError> {
        let mut body = Vec::with_capacity(10);
        body.extend((count.clamp(1, MAX_VECTORS) - 1).to_le_bytes());
        body.extend((table_offset & !7 | u32::from(bar)).to_le_bytes());
        body.extend((pending_offset & !7 | u32::from(bar)).to_le_bytes());
        let at = space.add_capability(CAPABILITY_ID, &body)?;
        space.allow_u16(at + CONTROL, CONTROL_ENABLE | CONTROL_MASK_ALL);
        Ok(at)
    }

    pub fn table_bytes(&self) -> u64 {
        self.entries.len() as u64 * ENTRY_BYTES
    }

    /// The number of vectors.
    pub fn count(&self) -> u16 {
        self.entries.len() as u16
    }

    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Follows a write to message control.
    pub fn set_control(&mut self, control: u16) {
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK_ALL != 0);
        if (enabled, masked) != (self.enabled, self.masked) {
            (self.enabled, self.masked) = (enabled, masked);
            for index in 0..self.count() {
                self.apply(index);
            }
        }
    }

    /// Reads of the table are aligned words of 4 or 8 bytes; others find nothing.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let Some((entry, at)) = self.locate(offset, data.len()) else {
            data.fill(0xff);
            return;
        };
        let bytes = encode(&self.entries[entry]);
        data.copy_from_slice(&bytes[at..at + data.len()]);
    }

    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let Some((index, at)) = self.locate(offset, data.len()) else {
            return;
        };
        let mut bytes = encode(&self.entries[index]);
        bytes[at..at + data.len()].copy_from_slice(data);
        let entry = decode(&bytes);
        if entry != self.entries[index] {
            self.entries[index] = entry;
            self.apply(index as u16);
        }
    }

    /// The pending bits, read-only to the guest.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            *byte = usize::try_from(at).ok().and_then(|at| bytes.get(at).copied()).unwrap_or(0);
        }
    }

    /// Delivers a vector, or remembers it while it is masked. A vector that does not exist is what "no vector" is
    /// for a device: nothing happens.
    pub fn trigger(&mut self, index: u16) {
        let Some(entry) = self.entries.get(usize::from(index)) else {
            return;
        };
        if !self.enabled {
            return;
        }
        if self.masked || entry.control & VECTOR_MASKED != 0 {
            self.pending |= 1 << index;
            return;
        }
        if let Err(error) = self.vectors.trigger(index) {
            tracing::warn!(vector = index, %error, "an interrupt of a device was not delivered");
        }
    }

    pub fn reset(&mut self) {
        self.entries.fill(Entry::RESET);
        self.pending = 0;
        (self.enabled, self.masked) = (false, false);
        for index in 0..self.count() {
            self.apply(index);
        }
    }

    pub fn save(&self) -> SavedMsix {
        SavedMsix {
            version: SavedMsix::VERSION,
            entries: self.entries.clone(),
            pending: self.pending,
            enabled: self.enabled,
            masked: self.masked,
        }
    }

    /// Takes over a saved state and its side effects: routing, and delivery of what became pending (pitfall 28).
    pub fn restore(&mut self, saved: &SavedMsix) -> Result<(), MsixError> {
        if saved.version != SavedMsix::VERSION {
            return Err(MsixError::Version { found: saved.version, known: SavedMsix::VERSION });
        }
        if saved.entries.len() != self.entries.len() {
            return Err(MsixError::Vectors { found: saved.entries.len(), known: self.entries.len() });
        }
        self.entries.clone_from(&saved.entries);
        self.pending = saved.pending;
        (self.enabled, self.masked) = (saved.enabled, saved.masked);
        for index in 0..self.count() {
            self.apply(index);
        }
        Ok(())
    }

    /// Tells KVM what a vector is now, and delivers what waited for its unmasking.
    fn apply(&mut self, index: u16) {
        let entry = self.entries[usize::from(index)];
        let deliverable = self.enabled && !self.masked && entry.control & VECTOR_MASKED == 0;
        if let Err(error) = self.vectors.configure(index, entry.address, entry.data, !deliverable) {
            tracing::warn!(vector = index, %error, "an interrupt vector could not be routed");
        }
        let bit = 1 << index;
        if deliverable && self.pending & bit != 0 {
            self.pending &= !bit;
            self.trigger(index);
        }
    }

    fn locate(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let aligned = matches!(len, 4 | 8) && offset.is_multiple_of(len as u64);
        if !aligned || offset >= self.table_bytes() {
            return None;
        }
        Some(((offset / ENTRY_BYTES) as usize, (offset % ENTRY_BYTES) as usize))
    }
}

fn encode(entry: &Entry) -> [u8; ENTRY_BYTES as usize] {
    let mut bytes = [0; ENTRY_BYTES as usize];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; ENTRY_BYTES as usize]) -> Entry {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Entry {
        // A message address is a multiple of four; the reserved bits of the control word stay zero.
        address: u64::from(word(0) & !3) | u64::from(word(4)) << 32,
        data: word(8),
        control: word(12) & VECTOR_MASKED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::MsiSink;
    use crate::interrupt::fake::{FakeMsi, FakeVectors};

    fn msix(count: u16) -> (Msix, Arc<FakeVectors>) {
        let sink = FakeMsi::new();
        let vectors = sink.allocate(count).unwrap();
        (Msix::new(vectors, count), sink.function(0).unwrap())
    }

    fn program(msix: &mut Msix, index: u64, masked: bool) {
        msix.table_write(index * 16, &0xfee0_1000u32.to_le_bytes());
        msix.table_write(index * 16 + 4, &0u32.to_le_bytes());
        msix.table_write(index * 16 + 8, &0x41u32.to_le_bytes());
        msix.table_write(index * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    #[test]
    fn a_vector_raised_while_masked_is_delivered_once_when_unmasked() {
        let (mut msix, kvm) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 1, true);
        msix.trigger(1);
        msix.trigger(1);
        let mut pending = [0; 8];
        msix.pending_read(0, &mut pending);
        assert_eq!(pending[0], 0b10);
        assert_eq!(kvm.vector(1).unwrap().delivered, 0);

        program(&mut msix, 1, false);
        assert_eq!(kvm.vector(1).unwrap().delivered, 1);
        msix.pending_read(0, &mut pending);
        assert_eq!(pending[0], 0);
    }

    #[test]
    fn the_function_mask_holds_everything_back() {
        let (mut msix, kvm) = msix(2);
        program(&mut msix, 0, false);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.trigger(0);
        assert_eq!(kvm.vector(0).unwrap().delivered, 0);
        msix.set_control(CONTROL_ENABLE);
        let vector = kvm.vector(0).unwrap();
        assert_eq!((vector.delivered, vector.address, vector.data), (1, 0xfee0_1000, 0x41));
    }

    #[test]
    fn accesses_outside_the_table_or_across_words_find_nothing() {
        let (mut msix, _) = msix(2);
        msix.table_write(32, &[0; 4]);
        msix.table_write(2, &[0; 4]);
        msix.table_write(u64::MAX, &[0; 4]);
        msix.trigger(7);
        msix.trigger(u16::MAX);
        let mut data = [0; 4];
        msix.table_read(30, &mut data);
        assert_eq!(data, [0xff; 4]);
        msix.table_read(12, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
    }

    #[test]
    fn a_restored_function_delivers_what_was_pending() {
        let (mut old, _) = msix(2);
        old.set_control(CONTROL_ENABLE);
        program(&mut old, 0, false);
        program(&mut old, 1, true);
        old.trigger(1);
        let (mut new, kvm) = msix(2);
        new.restore(&old.save()).unwrap();
        assert!(kvm.vector(0).unwrap().unmasked);
        program(&mut new, 1, false);
        assert_eq!(kvm.vector(1).unwrap().delivered, 1);
    }
}
