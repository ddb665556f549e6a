//! The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes in guest memory that change whenever the guest is
//! taken back to an earlier moment, or copied, so that its random numbers are not used twice (peers-vmm §4.2 rule 31).
//!
//! Where they are is told by ACPI, in the object `ADDR` of the device VGEN; that they changed, by general purpose event
//! [`GPE_VM_GENERATION`](super::pm::GPE_VM_GENERATION). The page is the guest's to write, as real memory would be, so it is written and never
//! read.
//!
//! A generation is given to a process with the guest's configuration. A guest that comes from elsewhere is told when this one is
//! another than where it was saved: it was taken back to an earlier moment, or copied. One that was migrated keeps its generation and
//! notices nothing.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::pm::{GPE_VM_GENERATION, PowerManagement};
use crate::machine::layout::VM_GENERATION_ID;
use crate::memory::GuestMemory;
use crate::virtio::locked;

/// The generation cannot be written: guest memory is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach the generation of the VM at {VM_GENERATION_ID:#x}")]
pub struct VmGenerationError(#[from] GuestMemoryError);

/// The generation that a guest had where it was saved. An event that it has not heard of yet is in the registers of power management.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVmGeneration {
    pub generation: Uuid,
}

pub struct VmGeneration {
    memory: GuestMemory,
    pm: Arc<Mutex<PowerManagement>>,
    generation: Uuid,
}

impl VmGeneration {
    /// Of the guest of a process. Its memory does not have it yet.
    pub fn new(memory: GuestMemory, pm: Arc<Mutex<PowerManagement>>, generation: Uuid) -> Self {
        Self { memory, pm, generation }
    }

    /// For a machine that starts: the guest is not told.
    pub fn place(&self) -> Result<(), VmGenerationError> {
        // Through guest memory's own methods, which note the page as written for a migration (rule 2). A GUID's first three fields are
        // little endian in memory.
        Ok(self.memory.write_slice(&self.generation.to_bytes_le(), GuestAddress(VM_GENERATION_ID))?)
    }

    pub fn save(&self) -> SavedVmGeneration {
        SavedVmGeneration { generation: self.generation }
    }

    /// For a guest from elsewhere whose memory and power management are in their place, and which stands: gives it this process's
    /// generation and tells it. Does nothing, and returns false, when that is the one that it has.
    pub fn restore(&self, saved: SavedVmGeneration) -> Result<bool, VmGenerationError> {
        if saved.generation == self.generation {
            return Ok(false);
        }
        tracing::info!(from = %saved.generation, to = %self.generation, "the guest is told that it was taken back or copied");
        self.place()?;
        // Written before it is told: who hears of it reads the new one.
        locked(&self.pm).raise_gpe(GPE_VM_GENERATION);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::bus::PioDevice;
    use crate::devices::legacy::pm::GPE0;
    use crate::devices::legacy::testing::Asked;
    use crate::interrupt::fake::FakeLine;
    use crate::machine::layout::Layout;

    const FIRST: Uuid = Uuid::from_u128(0x00112233_4455_6677_8899_aabbccddeeff);
    const SECOND: Uuid = Uuid::from_u128(1);

    fn machine(generation: Uuid) -> (VmGeneration, Arc<FakeLine>, GuestMemory) {
        let memory = crate::memory::allocate(&Layout::new(16 << 20, 16 << 20), None).unwrap();
        let sci = Arc::new(FakeLine::default());
        let pm = Arc::new(Mutex::new(PowerManagement::new(sci.clone(), Asked::new())));
        // The guest enables the event, as its ACPI interpreter does for every method that there is.
        locked(&pm).write(GPE0 + 8, &[1 << GPE_VM_GENERATION]);
        (VmGeneration::new(memory.clone(), pm, generation), sci, memory)
    }

    fn read(memory: &GuestMemory) -> [u8; 16] {
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(VM_GENERATION_ID)).unwrap();
        bytes
    }

    #[test]
    fn a_guest_finds_its_generation_in_the_byte_order_of_a_guid() {
        let (generation, sci, memory) = machine(FIRST);
        generation.place().unwrap();
        assert_eq!(
            read(&memory),
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
        assert!(!sci.asserted());
    }

    #[test]
    fn another_generation_is_written_noted_and_told() {
        let (old, ..) = machine(FIRST);
        let saved = serde_json::from_str(&serde_json::to_string(&old.save()).unwrap()).unwrap();
        let (generation, sci, memory) = machine(SECOND);
        assert!(generation.restore(saved).unwrap());
        assert!(sci.asserted());
        assert_eq!(read(&memory), SECOND.to_bytes_le());
        let region = memory.find_region(GuestAddress(0)).unwrap();
        assert!(region.bitmap().dirty_at(VM_GENERATION_ID as usize));
        locked(&generation.pm).write(GPE0, &[1 << GPE_VM_GENERATION]);
        assert!(!sci.asserted(), "the guest has seen it");
        assert_eq!(generation.save().generation, SECOND, "saved again, this is the one that it had");
    }

    #[test]
    fn a_guest_that_was_migrated_notices_nothing_whatever_it_has_written_there() {
        let (old, ..) = machine(FIRST);
        let (generation, sci, memory) = machine(FIRST);
        memory.write_slice(&[0xff; 4096], GuestAddress(VM_GENERATION_ID)).unwrap();
        assert!(!generation.restore(old.save()).unwrap());
        assert!(!sci.asserted());
        assert_eq!(read(&memory), [0xff; 16]);
    }
}
