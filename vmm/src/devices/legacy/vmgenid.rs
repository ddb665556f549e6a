//! The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes in guest memory that change whenever the guest is
//! taken back to an earlier moment, or copied, so that its random numbers are not used twice (peers-vmm §4.2 rule 31).
//!
//! Where they are is told by ACPI, in the object `ADDR` of the device VGEN; that they changed, by general purpose event
//! [`GPE_VM_GENERATION`](super::pm::GPE_VM_GENERATION). The page is the guest's to write, as real memory would be, so what it holds is
//! compared and never trusted.
//!
//! Its state is guest memory and the event registers, which are saved by their owners. After a restore of both,
//! [`set_generation`](VmGeneration::set_generation) makes a guest notice that it is not the one that was saved; a guest that was
//! migrated keeps its generation and notices nothing.

use std::sync::{Arc, Mutex};

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::pm::{GPE_VM_GENERATION, PowerManagement};
use crate::machine::layout::VM_GENERATION_ID;
use crate::memory::GuestMemory;
use crate::virtio::locked;

/// The generation cannot be read or written: guest memory is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach the generation of the VM at {VM_GENERATION_ID:#x}")]
pub struct VmGenerationError(#[from] GuestMemoryError);

pub struct VmGeneration {
    memory: GuestMemory,
    pm: Arc<Mutex<PowerManagement>>,
}

impl VmGeneration {
    /// For a machine that starts: the guest is not told.
    pub fn place(
        memory: GuestMemory,
        pm: Arc<Mutex<PowerManagement>>,
        generation: Uuid,
    ) -> Result<Arc<Self>, VmGenerationError> {
        let placed = Self { memory, pm };
        placed.write(generation)?;
        Ok(Arc::new(placed))
    }

    /// What the guest finds now.
    pub fn generation(&self) -> Result<Uuid, VmGenerationError> {
        let mut bytes = [0; 16];
        self.memory.read_slice(&mut bytes, GuestAddress(VM_GENERATION_ID))?;
        Ok(Uuid::from_bytes_le(bytes))
    }

    /// Gives the guest another generation and tells it. Does nothing, and returns false, when it has this one already.
    /// For a guest that stands still.
    pub fn set_generation(&self, generation: Uuid) -> Result<bool, VmGenerationError> {
        if self.generation()? == generation {
            return Ok(false);
        }
        self.write(generation)?;
        // Written before it is told: who hears of it reads the new one.
        locked(&self.pm).raise_gpe(GPE_VM_GENERATION);
        Ok(true)
    }

    /// Through guest memory's own methods, which note the page as written for a migration (rule 2).
    fn write(&self, generation: Uuid) -> Result<(), VmGenerationError> {
        // A GUID's first three fields are little endian in memory.
        Ok(self.memory.write_slice(&generation.to_bytes_le(), GuestAddress(VM_GENERATION_ID))?)
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

    fn machine() -> (Arc<VmGeneration>, Arc<FakeLine>, GuestMemory) {
        let memory = crate::memory::allocate(&Layout::new(16 << 20, 16 << 20)).unwrap();
        let sci = Arc::new(FakeLine::default());
        let pm = Arc::new(Mutex::new(PowerManagement::new(sci.clone(), Asked::new())));
        // The guest enables the event, as its ACPI interpreter does for every method that there is.
        locked(&pm).write(GPE0 + 8, &[1 << GPE_VM_GENERATION]);
        (VmGeneration::place(memory.clone(), pm, FIRST).unwrap(), sci, memory)
    }

    #[test]
    fn a_guest_finds_its_generation_in_the_byte_order_of_a_guid() {
        let (_, sci, memory) = machine();
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(VM_GENERATION_ID)).unwrap();
        assert_eq!(
            bytes,
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
        assert!(!sci.asserted());
    }

    #[test]
    fn another_generation_is_written_noted_and_told() {
        let (generation, sci, memory) = machine();
        let bitmap = |memory: &GuestMemory| {
            let region = memory.find_region(GuestAddress(0)).unwrap();
            let dirty = region.bitmap().dirty_at(VM_GENERATION_ID as usize);
            let mapping: &vm_memory::MmapRegion<_> = region;
            mapping.bitmap().reset();
            dirty
        };
        bitmap(&memory);
        assert!(!generation.set_generation(FIRST).unwrap());
        assert!(!sci.asserted() && !bitmap(&memory), "a guest that was migrated notices nothing");
        assert!(generation.set_generation(SECOND).unwrap());
        assert!(sci.asserted() && bitmap(&memory));
        assert_eq!(generation.generation().unwrap(), SECOND);
        let pm = &generation.pm;
        locked(pm).write(GPE0, &[1 << GPE_VM_GENERATION]);
        assert!(!sci.asserted(), "the guest has seen it");
    }

    #[test]
    fn a_guest_that_writes_there_changes_nothing_but_its_own_memory() {
        let (generation, sci, memory) = machine();
        memory.write_slice(&[0xff; 4096], GuestAddress(VM_GENERATION_ID)).unwrap();
        assert!(generation.set_generation(FIRST).unwrap());
        assert!(sci.asserted());
        assert_eq!(generation.generation().unwrap(), FIRST);
    }
}
