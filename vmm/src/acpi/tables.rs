//! The tables that are not AML.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use vmm_control::CpuConfig;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::devices::legacy::pm;
use crate::devices::legacy::reset::RESET_VALUE;
use crate::machine::layout::{ECAM_BASE, GSI_SCI, IOAPIC_BASE, LAPIC_BASE, PORT_PM_BASE, PORT_RESET};

/// There are legacy devices (COM1); no VGA; PCIe has no ASPM to switch; no keyboard controller to wait for: ours only resets.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;

pub(super) fn facs() -> Vec<u8> {
    bytes_of(&FACS::new())
}

fn io_block(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, u64::from(port))
}

pub(super) fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let event = PORT_PM_BASE + pm::PM1_EVENT;
    let control = PORT_PM_BASE + pm::PM1_CONTROL;
    let timer = PORT_PM_BASE + pm::PM_TIMER;
    let gpe = PORT_PM_BASE + pm::GPE0;

    // The fixed power button is there because its flag is *not* set; a sleep button is not there because its flag is.
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // Both forms of each address, equal: ACPICA warns when they differ.
    table.firmware_ctrl = (facs as u32).into();
    table.dsdt = (dsdt as u32).into();
    table.x_dsdt = dsdt.into();
    table.sci_int = (GSI_SCI as u16).into();
    table.pm1a_evt_blk = u32::from(event).into();
    table.pm1_evt_len = pm::PM1_EVENT_LEN;
    table.x_pm1a_evt_blk = io_block(event, pm::PM1_EVENT_LEN, AccessSize::WordAccess);
    table.pm1a_cnt_blk = u32::from(control).into();
    table.pm1_cnt_len = pm::PM1_CONTROL_LEN;
    table.x_pm1a_cnt_blk = io_block(control, pm::PM1_CONTROL_LEN, AccessSize::WordAccess);
    table.pm_tmr_blk = u32::from(timer).into();
    table.pm_tmr_len = pm::PM_TIMER_LEN;
    table.x_pm_tmr_blk = io_block(timer, pm::PM_TIMER_LEN, AccessSize::DwordAccess);
    table.gpe0_blk = u32::from(gpe).into();
    table.gpe0_blk_len = pm::GPE0_LEN;
    table.x_gpe0_blk = io_block(gpe, pm::GPE0_LEN, AccessSize::ByteAccess);
    // Above these the processor has no such C-state.
    table.p_lvl2_lat = 0xfff.into();
    table.p_lvl3_lat = 0xfff.into();
    table.century = crate::devices::legacy::rtc::CENTURY;
    table.iapc_boot_arch = (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM).into();
    table.reset_reg = io_block(PORT_RESET, 1, AccessSize::ByteAccess);
    table.reset_value = RESET_VALUE;
    bytes_of(&table.finalize())
}

const MADT_PCAT_COMPAT: u32 = 1;
const TYPE_LOCAL_APIC: u8 = 0;
const TYPE_IO_APIC: u8 = 1;
const TYPE_OVERRIDE: u8 = 2;
const TYPE_LOCAL_NMI: u8 = 4;
const ENABLED: u32 = 1;
/// Interrupt flags: polarity in bits 0-1, trigger in bits 2-3.
const AS_THE_BUS: u16 = 0;
const LEVEL_HIGH: u16 = 0b1101;
const ALL_PROCESSORS: u8 = 0xff;

/// Processors, the I/O APIC, and the two lines that are not as on an ISA bus: the timer on pin 2, the SCI level triggered.
pub(super) fn madt(vcpus: u16, cpu: CpuConfig) -> Vec<u8> {
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut body = Vec::new();
    body.extend((LAPIC_BASE as u32).to_le_bytes());
    body.extend(MADT_PCAT_COMPAT.to_le_bytes());
    // MAX_VCPUS and MAX_APIC_ID are 254, so that each has an 8-bit APIC id and 255 stays the broadcast.
    for vcpu in 0..vcpus {
        body.extend([TYPE_LOCAL_APIC, 8, vcpu as u8, cpu.apic_id(vcpu) as u8]);
        body.extend(ENABLED.to_le_bytes());
    }
    body.extend([TYPE_IO_APIC, 12, 0, 0]);
    body.extend((IOAPIC_BASE as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for (source, gsi, flags) in [(0u8, 2u32, AS_THE_BUS), (GSI_SCI as u8, GSI_SCI, LEVEL_HIGH)] {
        body.extend([TYPE_OVERRIDE, 10, 0, source]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    body.extend([TYPE_LOCAL_NMI, 6, ALL_PROCESSORS, 0, 0, 1]);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

pub(super) fn mcfg(last_bus: u8) -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(ECAM_BASE, 0, 0, last_bus);
    bytes_of(&table)
}

#[cfg(test)]
mod tests {
    use vmm_control::CpuModel;

    use super::*;

    #[test]
    fn processors_have_the_ids_of_their_places() {
        let table = madt(6, CpuConfig { model: CpuModel::Host, sockets: 2, cores: 3, threads: 1 });
        let processors: Vec<_> = table[44..]
            .chunks(8)
            .take_while(|entry| entry[0] == TYPE_LOCAL_APIC)
            .map(|entry| (entry[2], entry[3]))
            .collect();
        assert_eq!(processors, [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)]);
    }
}
