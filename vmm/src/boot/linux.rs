//! The Linux boot protocol in its 64-bit form: a bzImage's protected-mode part is placed where it wants to be, and
//! the zero page tells the rest (Documentation/arch/x86/boot.rst, zero-page.rst).

use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, BootFile, CMDLINE, Initrd, ZERO_PAGE, read_into, write_object};
use crate::machine::layout::{HIGH_MEMORY_START, Layout, RangeKind};
use crate::memory::GuestMemory;

const HEADER_OFFSET: u64 = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// 2.12 added `xloadflags`, which says whether there is a 64-bit entry. Linux 3.8.
const MIN_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry is this far into the protected-mode part.
const ENTRY_64_OFFSET: u64 = 0x200;
/// No loader of the registry's.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A bzImage in guest memory.
pub(super) struct BzImage {
    pub entry: u64,
    /// End of what the kernel uses until it has its own memory map.
    pub end: u64,
    /// Last address that an initrd may use.
    pub initrd_max: u64,
    pub header: setup_header,
}

pub(super) fn load_bzimage(memory: &GuestMemory, layout: &Layout, kernel: &BootFile) -> Result<BzImage, BootError> {
    let refuse = |why: &str| BootError::NotAKernel { path: kernel.path.clone(), why: why.to_owned() };
    let mut header = setup_header::default();
    kernel
        .file
        .read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        .map_err(|_| refuse("it is shorter than a boot sector"))?;
    if header.boot_flag != BOOT_FLAG || header.header != HEADER_MAGIC {
        return Err(refuse("it is neither a bzImage nor an ELF file"));
    }
    if header.version < MIN_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(refuse("it has no 64-bit entry point"));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (setup_sectors + 1) * 512;
    let image_bytes = kernel
        .bytes
        .checked_sub(setup_bytes)
        .filter(|bytes| *bytes > ENTRY_64_OFFSET)
        .ok_or_else(|| refuse("it ends before its protected-mode part"))?;
    let needed = u64::from(header.init_size).max(image_bytes);
    let address = choose_address(layout, &header, needed)?;
    read_into(memory, kernel, setup_bytes, GuestAddress(address), image_bytes)?;
    Ok(BzImage {
        entry: address + ENTRY_64_OFFSET,
        end: address + needed,
        initrd_max: u64::from(header.initrd_addr_max),
        header,
    })
}

/// The preferred address saves the kernel from moving itself; 1 MiB will do for a small guest.
fn choose_address(layout: &Layout, header: &setup_header, needed: u64) -> Result<u64, BootError> {
    let limit = layout.low_ram_end();
    let fits =
        |address: u64| address >= HIGH_MEMORY_START && address.checked_add(needed).is_some_and(|end| end <= limit);
    let preferred = header.pref_address;
    let aligned = u64::from(header.kernel_alignment.max(4096));
    let lowest = HIGH_MEMORY_START.next_multiple_of(aligned);
    if fits(preferred) {
        Ok(preferred)
    } else if header.relocatable_kernel != 0 && fits(lowest) {
        Ok(lowest)
    } else {
        Err(BootError::TooLittleMemory { what: "the kernel", needed: needed.saturating_add(lowest), limit })
    }
}

/// The header that a boot loader makes up for a kernel that has none.
pub(super) fn header_for_elf() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, kernel_alignment: 0x100_0000, ..Default::default() }
}

pub(super) fn write_zero_page(
    memory: &GuestMemory,
    layout: &Layout,
    header: setup_header,
    initrd: Initrd,
    cmdline: &str,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    page.hdr.cmdline_size = cmdline.len() as u32;
    page.hdr.ramdisk_image = initrd.address as u32;
    page.hdr.ramdisk_size = initrd.bytes as u32;

    let map = layout.memory_map();
    let mut table = page.e820_table;
    for (entry, (window, kind)) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: window.base,
            size: window.size,
            r#type: match kind {
                RangeKind::Ram => E820_RAM,
                RangeKind::Reserved => E820_RESERVED,
            },
        };
    }
    page.e820_table = table;
    page.e820_entries = map.len() as u8;
    write_object(memory, "the zero page", ZERO_PAGE, page)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::super::{BootFiles, Entry, load};
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A file that has a bzImage's header and whose code is recognisable.
    fn bzimage(change: impl FnOnce(&mut setup_header)) -> tempfile::NamedTempFile {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x020f,
            xloadflags: XLF_KERNEL_64,
            relocatable_kernel: 1,
            kernel_alignment: 0x20_0000,
            pref_address: 16 * MIB,
            init_size: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024];
        image[HEADER_OFFSET as usize..][..header.as_slice().len()].copy_from_slice(header.as_slice());
        image.extend([0xab; 4096]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&image).unwrap();
        file
    }

    fn boot(
        kernel: &tempfile::NamedTempFile,
        memory_bytes: u64,
        initrd: Option<&tempfile::NamedTempFile>,
    ) -> Result<(Entry, GuestMemory), BootError> {
        let layout = Layout::new(memory_bytes, memory_bytes);
        let memory = crate::memory::allocate(&layout, None).unwrap();
        let files = BootFiles::open(kernel.path(), initrd.map(|f| f.path()), "console=ttyS0")?;
        let entry = load(&memory, &layout, &files, 0xe_0000)?;
        Ok((entry, memory))
    }

    #[test]
    fn a_kernel_goes_where_it_prefers_and_the_zero_page_tells_the_rest() {
        let mut initrd = tempfile::NamedTempFile::new().unwrap();
        initrd.write_all(&[7; 5000]).unwrap();
        let (entry, memory) = boot(&bzimage(|_| {}), 64 * MIB, Some(&initrd)).unwrap();
        let rip = 16 * MIB + 0x200;
        assert_eq!(entry, Entry::Long { rip, zero_page: ZERO_PAGE.0 });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(rip)).unwrap(), 0xab);

        let page: boot_params = memory.read_obj(ZERO_PAGE).unwrap();
        let (image, size) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size);
        assert_eq!((image, size), ((64 * MIB - 8192) as u32, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(image))).unwrap(), 7);
        let rsdp = page.acpi_rsdp_addr;
        assert_eq!(rsdp, 0xe_0000);
        let mut cmdline = [0; 14];
        memory.read_slice(&mut cmdline, CMDLINE).unwrap();
        assert_eq!(&cmdline, b"console=ttyS0\0");
    }

    #[test]
    fn a_small_guest_takes_a_relocatable_kernel_at_its_lowest_place() {
        let (entry, _) = boot(&bzimage(|_| {}), 16 * MIB, None).unwrap();
        assert_eq!(entry, Entry::Long { rip: 2 * MIB + 0x200, zero_page: ZERO_PAGE.0 });
        let fixed = bzimage(|h| h.relocatable_kernel = 0);
        assert!(matches!(boot(&fixed, 16 * MIB, None), Err(BootError::TooLittleMemory { .. })));
    }

    #[test]
    fn what_is_no_kernel_is_refused_in_words() {
        let mut text = tempfile::NamedTempFile::new().unwrap();
        text.write_all(&[b'x'; 4096]).unwrap();
        let old = bzimage(|h| h.version = 0x0200);
        let no_64 = bzimage(|h| h.xloadflags = 0);
        let cut = bzimage(|h| h.setup_sects = 200);
        let wrap = bzimage(|h| h.init_size = u32::MAX);
        for (file, memory) in [(&text, 64), (&old, 64), (&no_64, 64), (&cut, 64), (&wrap, 64)] {
            let error = boot(file, memory * MIB, None).unwrap_err();
            assert!(!error.to_string().is_empty());
        }
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(boot(&empty, 64 * MIB, None), Err(BootError::Size { .. })));
    }
}
