//! The PVH boot protocol: an ELF kernel that says so in a note is entered in 32-bit mode with a start info, which lists the
//! modules (the initrd), the memory map, the command line and ACPI (Xen's docs/misc/pvh).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::{BootError, CMDLINE, Initrd, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, write_object};
use crate::machine::layout::{Layout, RangeKind};
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

pub(super) fn write_start_info(
    memory: &GuestMemory,
    layout: &Layout,
    initrd: Initrd,
    rsdp: u64,
) -> Result<(), BootError> {
    let map = layout.memory_map();
    let entry_bytes = size_of::<hvm_memmap_table_entry>() as u64;
    for (at, (window, kind)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: window.base,
            size: window.size,
            type_: match kind {
                RangeKind::Ram => MAP_RAM,
                RangeKind::Reserved => MAP_RESERVED,
            },
            reserved: 0,
        };
        let place = vm_memory::GuestAddress(PVH_MEMORY_MAP.0 + at as u64 * entry_bytes);
        write_object(memory, "the memory map", place, entry)?;
    }
    let has_initrd = initrd.bytes > 0;
    if has_initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.bytes, ..Default::default() };
        write_object(memory, "the module list", PVH_MODULES, module)?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(has_initrd),
        modlist_paddr: if has_initrd { PVH_MODULES.0 } else { 0 },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    write_object(memory, "the start info", PVH_START_INFO, info)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn the_start_info_leads_to_the_map_and_the_initrd() {
        let layout = Layout::new(3 << 30, 3 << 30);
        let memory = crate::memory::allocate(&layout, None).unwrap();
        let initrd = Initrd { address: 0x100_0000, bytes: 77 };
        write_start_info(&memory, &layout, initrd, 0xe_0000).unwrap();
        let info: hvm_start_info = memory.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.rsdp_paddr), (MAGIC, 1, 0xe_0000));
        let module: hvm_modlist_entry = memory.read_obj(vm_memory::GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x100_0000, 77));
        let last = PVH_MEMORY_MAP.0 + u64::from(info.memmap_entries - 1) * 24;
        let last: hvm_memmap_table_entry = memory.read_obj(vm_memory::GuestAddress(last)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (1 << 32, 1 << 30, MAP_RAM));
    }
}
