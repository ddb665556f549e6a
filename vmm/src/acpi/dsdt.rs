//! The DSDT: the PCI host bridge with its windows, native PCIe hot plug granted to the guest, the legacy devices, and S5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Equal, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, Notify, Or, Package, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::devices::legacy::pm::{GPE_VM_GENERATION, S5_SLEEP_TYPE};
use crate::machine::layout::{
    ECAM_BASE, ECAM_SIZE, GSI_COM1, Layout, PORT_COM1, PORT_PM_BASE, PORT_PVPANIC, VM_GENERATION_ID,
};

/// The interface of _OSC for PCI host bridges (PCI Firmware Specification 4.5.1).
const OSC_PCI_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// "Unrecognized UUID" in the first word of its answer.
const OSC_UNRECOGNIZED: u8 = 4;

pub(super) fn build(layout: &Layout, last_bus: u8) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&system_bus(layout, last_bus));
    table.append_slice(&generation());
    table.append_slice(&soft_off());
    table.as_slice().to_vec()
}

fn system_bus(layout: &Layout, last_bus: u8) -> Vec<u8> {
    let low = layout.mmio32();
    let high = layout.mmio64();
    let hid = |id: &str| EISAName::new(id);

    let windows = bytes_of(&ResourceTemplate::new(vec![
        &AddressSpace::<u16>::new_bus_number(0, u16::from(last_bus)),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::<u16>::new_io(0, 0xcf7, None),
        &AddressSpace::<u16>::new_io(0xd00, 0xffff, None),
        &AddressSpace::<u32>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            low.base as u32,
            (low.end() - 1) as u32,
            None,
        ),
        &AddressSpace::<u64>::new_memory(AddressSpaceCacheable::NotCacheable, true, high.base, high.end() - 1, None),
    ]));

    // Whatever control the guest asks for is its own: hot plug, PME, AER, the capability structures. So the answer is the question.
    let osc = bytes_of(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
            &If::new(&Equal::new(&Arg(0), &Uuid::new(OSC_PCI_UUID)), vec![&Return::new(&Arg(3))]),
            &Or::new(&Local(0), &Path::new("CDW1"), &OSC_UNRECOGNIZED),
            &Store::new(&Path::new("CDW1"), &Local(0)),
            &Return::new(&Arg(3)),
        ],
    ));

    let serial = bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &hid("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(PORT_COM1, PORT_COM1, 0, 8),
                    &Interrupt::new(true, true, false, false, GSI_COM1),
                ]),
            ),
        ],
    ));
    // Without an interrupt: the clock is read and set, alarms are not offered.
    let clock = bytes_of(&Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &hid("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(0x70, 0x70, 0, 2)])),
        ],
    ));
    // The name by which Linux and Windows know the panic port.
    let panic = bytes_of(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(PORT_PVPANIC, PORT_PVPANIC, 1, 1)])),
        ],
    ));
    let bridge = bytes_of(&Device::new(
        "ISA_".into(),
        vec![&Name::new("_ADR".into(), &0x001f_0000u32), &Raw(serial), &Raw(clock), &Raw(panic)],
    ));

    // Ports and memory that no PCI device may be given. Linux trusts ECAM only when something like this holds it.
    let board = bytes_of(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &hid("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32),
                    &IO::new(PORT_PM_BASE, PORT_PM_BASE, 0, 0x80),
                ]),
            ),
        ],
    ));

    let host_bridge = bytes_of(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &hid("PNP0A08")),
            &Name::new("_CID".into(), &hid("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CCA".into(), &acpi_tables::aml::ONE),
            &Name::new("_CRS".into(), &Raw(windows)),
            &Raw(osc),
            &Raw(bridge),
        ],
    ));

    bytes_of(&Scope::new("_SB_".into(), vec![&Raw(host_bridge), &Raw(board)]))
}

/// Where the generation of the VM is, and the event that says that it changed (Microsoft, "Virtual Machine Generation ID"): guests know
/// the device by its compatible id.
fn generation() -> Vec<u8> {
    let device = bytes_of(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMUVGID"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new(
                "ADDR".into(),
                &Package::new(vec![&(VM_GENERATION_ID as u32), &((VM_GENERATION_ID >> 32) as u32)]),
            ),
        ],
    ));
    let method = format!("_E{GPE_VM_GENERATION:02X}");
    let event = bytes_of(&Method::new(
        method.as_str().into(),
        0,
        false,
        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
    ));
    let mut aml = bytes_of(&Scope::new("_SB_".into(), vec![&Raw(device)]));
    aml.extend(bytes_of(&Scope::new("_GPE".into(), vec![&Raw(event)])));
    aml
}

fn soft_off() -> Vec<u8> {
    bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &ZERO, &ZERO])))
}

/// AML that is already encoded.
struct Raw(Vec<u8>);

impl acpi_tables::Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
