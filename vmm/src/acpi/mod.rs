//! The ACPI tables of `q-direct-1`: full hardware ACPI as on Q35, with the fixed power button and the PM timer at PMBASE and the SCI on
//! GSI 9, so that a stock kernel's button driver works and firmware finds what it expects (hazards §7).
//!
//! [`write`] lays all tables out from [`TABLES_START`] and returns where the RSDP is. [`dsdt`] holds the AML.

mod dsdt;
mod tables;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};
use vmm_control::CpuConfig;

use crate::machine::layout::{Layout, TABLES_START, VM_GENERATION_ID};
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"QUORAT";
const OEM_TABLE_ID: [u8; 8] = *b"QDIRECT1";
const OEM_REVISION: u32 = 1;
/// What Linux asks of the FACS; good for the others.
const ALIGN: u64 = 64;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables do not fit below {VM_GENERATION_ID:#x}")]
    TooLarge,
    #[error("cannot write the ACPI tables into guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Places tables one after the other.
struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn place(&mut self, bytes: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next.next_multiple_of(ALIGN);
        let end = at + bytes.len() as u64;
        if end > VM_GENERATION_ID {
            return Err(AcpiError::TooLarge);
        }
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(AcpiError::Memory)?;
        self.next = end;
        Ok(at)
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// What the tables say about this guest's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    pub vcpus: u16,
    pub cpu: CpuConfig,
    /// The highest PCI bus, behind the last root port. Linux probes every bus up to it, device by device: naming all 256 costs
    /// 8000 exits, which was a third of the boot time in the lab.
    pub last_bus: u8,
}

/// Writes all tables and returns the address of the RSDP.
pub fn write(memory: &GuestMemory, layout: &Layout, machine: Machine) -> Result<u64, AcpiError> {
    let rsdp_at = TABLES_START;
    let mut writer = Writer { memory, next: rsdp_at + Rsdp::len() as u64 };
    let facs = writer.place(&tables::facs())?;
    let dsdt = writer.place(&dsdt::build(layout, machine.last_bus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [tables::fadt(facs, dsdt), tables::madt(machine.vcpus, machine.cpu), tables::mcfg(machine.last_bus)] {
        xsdt.add_entry(writer.place(&table)?);
    }
    let xsdt = writer.place(&bytes_of(&xsdt))?;
    memory.write_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp_at)).map_err(AcpiError::Memory)?;
    Ok(rsdp_at)
}

#[cfg(test)]
mod tests {
    use vmm_control::CpuModel;

    use super::*;

    fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let len = u32_at(&read(memory, at, 8), 4) as usize;
        let bytes = read(memory, at, len);
        let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(sum, 0, "checksum of {:?}", &bytes[..4]);
        bytes
    }

    /// Follows the tables as an operating system does.
    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let layout = Layout::new(1 << 30, 1 << 30);
        let memory = crate::memory::allocate(&layout, None).unwrap();
        let cpu = CpuConfig::of(CpuModel::Host, 254);
        let rsdp = write(&memory, &layout, Machine { vcpus: 254, cpu, last_bus: 24 }).unwrap();
        let root = read(&memory, rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(&root, 24));
        let names: Vec<String> = xsdt[36..]
            .chunks(8)
            .map(|entry| {
                let table = table(&memory, u64_at(entry, 0));
                String::from_utf8(table[..4].to_vec()).unwrap()
            })
            .collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);

        let fadt = table(&memory, u64_at(&xsdt, 36));
        assert_eq!(u32_at(&fadt, 56), 0x600, "PM1a event block");
        assert_eq!(u32_at(&fadt, 76), 0x608, "PM timer");
        let dsdt = table(&memory, u64_at(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!((u32_at(&fadt, 80), fadt[92]), (0x620, 16), "GPE0 block");
        let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(b"_HID\x0dQEMU0001\0"), "the panic port");
        assert!(has(b"_CID\x0dVM_Gen_Counter\0") && has(b"_E05"));
        // Name ADDR, a package of two: a double word, and zero.
        assert!(has(b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0e\x00\x00"));
        // Notify(\\_SB.VGEN, 0x80).
        assert!(has(b"\x86\\\x2e_SB_VGEN\x0a\x80"));
    }
}
