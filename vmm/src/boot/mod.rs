//! Direct boot: the kernel of a guest is put into its RAM, as a boot loader would.
//!
//! A bzImage is entered in 64-bit mode with a zero page ([`linux`]), an ELF kernel with a PVH note in 32-bit mode with a start info
//! ([`pvh`]), and an ELF kernel without one in 64-bit mode with a zero page. [`load`] tells which, as an [`Entry`].
//!
//! All of it goes to fixed places below 1 MiB and to the places that the kernel asks for above; nothing here is kept once
//! the guest runs. Files are read through descriptors that stay open, so a reset loads what the start has loaded.

pub mod linux;
pub mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress};

use crate::machine::layout::{HIGH_MEMORY_START, Layout};
use crate::memory::GuestMemory;

/// Where the pieces go, below the legacy hole. The processor's own tables are in `cpu::regs`.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6100);
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);

/// Far above any kernel and initrd in use; a wrong path (a disk, a device) is refused instead of read.
const MAX_KERNEL_BYTES: u64 = 512 << 20;
const MAX_INITRD_BYTES: u64 = 2 << 30;
const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];
const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot open the {what} {path}")]
    Open {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read the {what} {path}")]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the {what} {path} is {bytes} bytes; it must be a file of 1 to {limit} bytes")]
    Size { what: &'static str, path: PathBuf, bytes: u64, limit: u64 },
    #[error("the kernel {path} cannot be booted: {why}")]
    NotAKernel { path: PathBuf, why: String },
    #[error("the kernel {path} does not load")]
    Load {
        path: PathBuf,
        #[source]
        source: linux_loader::loader::Error,
    },
    #[error("the guest's memory is too small for {what}: {needed} bytes below {limit:#x} are needed")]
    TooLittleMemory { what: &'static str, needed: u64, limit: u64 },
    #[error("cannot write {what} into guest memory")]
    Memory {
        what: &'static str,
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// How the boot processor enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, RSI = zero page.
    Long { rip: u64, zero_page: u64 },
    /// 32-bit protected mode without paging, EBX = start info.
    Pvh { rip: u64, start_info: u64 },
}

/// What to boot. Opened once; read at each reset.
#[derive(Debug)]
pub struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
    cmdline: String,
}

#[derive(Debug)]
struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl BootFile {
    fn open(what: &'static str, path: &Path, limit: u64) -> Result<Self, BootError> {
        let open = |source| BootError::Open { what, path: path.to_owned(), source };
        let file = File::open(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let bytes = metadata.len();
        if !metadata.is_file() || bytes == 0 || bytes > limit {
            return Err(BootError::Size { what, path: path.to_owned(), bytes, limit });
        }
        Ok(Self { what, path: path.to_owned(), file, bytes })
    }

    fn read_error(&self) -> impl Fn(io::Error) -> BootError + '_ {
        |source| BootError::Read { what: self.what, path: self.path.clone(), source }
    }
}

impl BootFiles {
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, BootError> {
        Ok(Self {
            kernel: BootFile::open("kernel", kernel, MAX_KERNEL_BYTES)?,
            initrd: initrd.map(|path| BootFile::open("initrd", path, MAX_INITRD_BYTES)).transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }
}

/// Where the initrd is in guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Initrd {
    pub address: u64,
    pub bytes: u64,
}

/// Loads everything and returns how to enter it. `rsdp` is where the ACPI tables start.
pub fn load(memory: &GuestMemory, layout: &Layout, files: &BootFiles, rsdp: u64) -> Result<Entry, BootError> {
    let mut magic = [0; 4];
    files.kernel.file.read_exact_at(&mut magic, 0).map_err(files.kernel.read_error())?;
    write_cmdline(memory, &files.cmdline)?;
    if magic == ELF_MAGIC {
        load_elf(memory, layout, files, rsdp)
    } else {
        let image = linux::load_bzimage(memory, layout, &files.kernel)?;
        let initrd = load_initrd(memory, layout, files, image.end, image.initrd_max)?;
        linux::write_zero_page(memory, layout, image.header, initrd, &files.cmdline, rsdp)?;
        Ok(Entry::Long { rip: image.entry, zero_page: ZERO_PAGE.raw_value() })
    }
}

fn load_elf(memory: &GuestMemory, layout: &Layout, files: &BootFiles, rsdp: u64) -> Result<Entry, BootError> {
    let kernel = &files.kernel;
    let mut file = &kernel.file;
    // The loader checks no segment against the end of RAM but fails to write there, so the guest's memory bounds it.
    let loaded = Elf::load(memory, None, &mut ElfFile(&mut file), Some(GuestAddress(HIGH_MEMORY_START)))
        .map_err(|source| BootError::Load { path: kernel.path.clone(), source })?;
    let initrd = load_initrd(memory, layout, files, loaded.kernel_end, u64::from(u32::MAX))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            pvh::write_start_info(memory, layout, initrd, rsdp)?;
            Ok(Entry::Pvh { rip: entry.raw_value(), start_info: PVH_START_INFO.raw_value() })
        }
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            let header = linux::header_for_elf();
            linux::write_zero_page(memory, layout, header, initrd, &files.cmdline, rsdp)?;
            Ok(Entry::Long { rip: loaded.kernel_load.raw_value(), zero_page: ZERO_PAGE.raw_value() })
        }
    }
}

/// The loader wants one value that reads, seeks and reads into guest memory.
struct ElfFile<'a, 'f>(&'a mut &'f File);

impl Read for ElfFile<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Seek for ElfFile<'_, '_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.0.seek(position)
    }
}

impl vm_memory::ReadVolatile for ElfFile<'_, '_> {
    fn read_volatile<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        buffer: &mut vm_memory::VolatileSlice<B>,
    ) -> Result<usize, vm_memory::VolatileMemoryError> {
        self.0.read_volatile(buffer)
    }
}

/// As high as the kernel allows, below 4 GiB, above the kernel.
fn load_initrd(
    memory: &GuestMemory,
    layout: &Layout,
    files: &BootFiles,
    kernel_end: u64,
    highest: u64,
) -> Result<Initrd, BootError> {
    let Some(initrd) = &files.initrd else {
        return Ok(Initrd::default());
    };
    let limit = layout.low_ram_end().min(highest.saturating_add(1));
    let address = limit.checked_sub(initrd.bytes).map(|a| a & !(PAGE - 1)).filter(|a| *a >= kernel_end).ok_or(
        BootError::TooLittleMemory {
            what: "the kernel and the initrd",
            needed: kernel_end.saturating_add(initrd.bytes),
            limit,
        },
    )?;
    read_into(memory, initrd, 0, GuestAddress(address), initrd.bytes)?;
    Ok(Initrd { address, bytes: initrd.bytes })
}

/// Reads a part of a file into guest memory.
fn read_into(
    memory: &GuestMemory,
    from: &BootFile,
    offset: u64,
    to: GuestAddress,
    bytes: u64,
) -> Result<(), BootError> {
    let mut file = &from.file;
    file.seek(SeekFrom::Start(offset)).map_err(from.read_error())?;
    memory
        .read_exact_volatile_from(to, &mut file, bytes as usize)
        .map_err(|source| BootError::Memory { what: from.what, source })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, CMDLINE).map_err(|source| BootError::Memory { what: "the command line", source })
}

fn write_object<T: ByteValued>(
    memory: &GuestMemory,
    what: &'static str,
    at: GuestAddress,
    object: T,
) -> Result<(), BootError> {
    memory.write_obj(object, at).map_err(|source| BootError::Memory { what, source })
}
