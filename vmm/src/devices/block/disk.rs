//! The file or block device under a disk: opened, measured, and tried out for O_DIRECT.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_control::DiskFormat;

use super::BlockError;
use super::backend::Backend;
use super::config::{BlockConfig, SECTOR_BYTES};
use super::files::DiskFiles;
use super::qcow2::Image;
use super::qcow2::chain::{self, Layer};
use super::qcow2::header::{self, HEADER_REGION_BYTES};
use super::uring::Uring;
use super::worker::Workers;

/// Alignments that storage asks for, smallest first.
const ALIGNMENTS: [usize; 2] = [512, 4096];

/// What the disk is. One that is opened again has to be the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// As the guest sees it.
    pub bytes: u64,
    /// Of the file, or of the top image.
    pub is_device: bool,
}

/// An open disk.
pub struct OpenDisk {
    medium: OpenMedium,
    pub facts: FileFacts,
    /// O_DIRECT is in use, and buffers, offsets and lengths are multiples of this. An image copies, and does not care.
    pub direct: Option<usize>,
}

enum OpenMedium {
    Raw(File),
    Qcow2(Box<Image>),
}

impl OpenDisk {
    pub fn open(config: &BlockConfig, files: &DiskFiles) -> Result<Self, BlockError> {
        let disk = match config.format {
            DiskFormat::Raw => {
                let limit = config.block_size.bytes() as usize;
                let opened = open_file(config, files, (0, &config.path), !config.read_only, limit)?;
                Self { medium: OpenMedium::Raw(opened.file), facts: opened.facts, direct: opened.direct }
            }
            DiskFormat::Qcow2 => Self::open_image(config, files)?,
        };
        files.note(disk.facts);
        Ok(disk)
    }

    /// Opens an image and the chain under it, which is only read.
    fn open_image(config: &BlockConfig, files: &DiskFiles) -> Result<Self, BlockError> {
        let layer = |at, path: &Path, format, write| {
            let opened = open_file(config, files, (at, path), write, ALIGNMENTS[1])?;
            Ok((Layer::new(path.to_owned(), format, opened.file, opened.direct), opened.facts))
        };
        let (top, facts) = layer(0, &config.path, DiskFormat::Qcow2, !config.read_only)?;
        let mut layers = vec![top];
        for (under, image) in config.backing.iter().enumerate() {
            layers.push(layer(under + 1, &image.path, image.format, false)?.0);
        }
        let image = chain::open(layers, config.read_only)
            .map_err(|source| BlockError::Image { disk: config.name.clone(), source })?;
        let facts = FileFacts { bytes: image.bytes(), is_device: facts.is_device };
        Ok(Self { medium: OpenMedium::Qcow2(Box::new(image)), facts, direct: None })
    }

    /// The best way to do I/O on it.
    pub fn into_backend(self, disk: &str) -> Result<Box<dyn Backend>, BlockError> {
        let failed = |source| BlockError::Backend { disk: disk.to_owned(), source };
        let file = match self.medium {
            OpenMedium::Qcow2(image) => return Ok(Box::new(Workers::new(*image).map_err(failed)?)),
            OpenMedium::Raw(file) => file,
        };
        let (file, refusal) = match Uring::new(file) {
            Ok(uring) => return Ok(Box::new(uring)),
            Err(refused) => refused,
        };
        tracing::warn!(disk, error = %refusal, "io_uring is not available: this disk uses worker threads");
        Ok(Box::new(Workers::new(file).map_err(failed)?))
    }
}

struct Opened {
    file: File,
    facts: FileFacts,
    direct: Option<usize>,
}

/// Opens a file of a disk, without the page cache where file and block size allow it: what the guest was told is written must not
/// lie in this host's memory when the host is fenced. `limit` is the largest alignment that the disk can live with.
fn open_file(
    config: &BlockConfig,
    files: &DiskFiles,
    (layer, path): (usize, &Path),
    write: bool,
    limit: usize,
) -> Result<Opened, BlockError> {
    let failed = |source| BlockError::Open { disk: config.name.clone(), path: path.to_owned(), source };
    let file = files.open(layer, path, write).map_err(failed)?;
    let mut file = file.ok_or_else(|| BlockError::NotHandedOver { disk: config.name.clone() })?;
    let metadata = file.metadata().map_err(failed)?;
    let is_device = metadata.file_type().is_block_device();
    if !is_device && !metadata.is_file() {
        return Err(BlockError::Kind { disk: config.name.clone(), path: path.to_owned() });
    }
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if bytes < SECTOR_BYTES {
        return Err(BlockError::Empty { disk: config.name.clone(), path: path.to_owned(), bytes });
    }
    let direct = go_direct(&file, limit).map_err(|errno| failed(errno.into()))?;
    Ok(Opened { file, facts: FileFacts { bytes, is_device }, direct })
}

/// Leaves the page cache if that works, and says with which alignment.
fn go_direct(file: &File, limit: usize) -> rustix::io::Result<Option<usize>> {
    let cached = fcntl_getfl(file)?.difference(OFlags::DIRECT);
    let direct = fcntl_setfl(file, cached | OFlags::DIRECT).ok().and_then(|()| direct_alignment(file, limit));
    if direct.is_none() {
        fcntl_setfl(file, cached)?;
    }
    Ok(direct)
}

/// The alignment with which a read works, if one up to `limit` does. Reading is the only question that every file
/// system and device answers.
fn direct_alignment(file: &File, limit: usize) -> Option<usize> {
    let mut buffer = AlignedBuffer::new(ALIGNMENTS[1])?;
    ALIGNMENTS.into_iter().filter(|alignment| *alignment <= limit).find(|alignment| {
        // SAFETY: the buffer has at least `alignment` bytes.
        let got = unsafe { libc::pread(file.as_raw_fd(), buffer.as_mut_ptr().cast(), *alignment, 0) };
        got == *alignment as isize
    })
}

/// Memory for requests whose own buffers storage cannot use.
pub struct AlignedBuffer {
    start: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: the memory is owned, and reached through `&self` and `&mut self` only.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// Zeroed memory on a page boundary. `None` for zero bytes, or when there is no memory.
    pub fn new(len: usize) -> Option<Self> {
        let layout = std::alloc::Layout::from_size_align(len, ALIGNMENTS[1]).ok()?;
        if len == 0 {
            return None;
        }
        // SAFETY: the layout is not of zero size.
        let start = std::ptr::NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { start, layout })
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes, initialised since `new`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len()) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only way here.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// What the disk is, without keeping it open for more than a look: another host still writes it.
pub fn look(config: &BlockConfig, files: &DiskFiles) -> Result<FileFacts, BlockError> {
    let path = &config.path;
    let failed = |source| BlockError::Open { disk: config.name.clone(), path: path.clone(), source };
    let file = files.open(0, path, false).map_err(failed)?;
    files.let_go();
    let mut file = file.ok_or_else(|| BlockError::NotHandedOver { disk: config.name.clone() })?;
    let is_device = file.metadata().map_err(failed)?.file_type().is_block_device();
    let file_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let bytes = match config.format {
        DiskFormat::Raw => file_bytes,
        DiskFormat::Qcow2 => {
            file.seek(SeekFrom::Start(0)).map_err(failed)?;
            let mut start = Vec::new();
            file.take(HEADER_REGION_BYTES as u64).read_to_end(&mut start).map_err(failed)?;
            header::parse(path, &start, file_bytes)
                .map_err(|source| BlockError::Image { disk: config.name.clone(), source })?
                .size
        }
    };
    let facts = FileFacts { bytes, is_device };
    files.note(facts);
    Ok(facts)
}

/// Opens again what was closed, and refuses another disk in its place.
pub fn reopen(config: &BlockConfig, files: &DiskFiles, expected: FileFacts) -> Result<OpenDisk, ReopenError> {
    let disk = OpenDisk::open(config, files).map_err(|error| match error {
        BlockError::Open { source, .. } => ReopenError::Open(source),
        BlockError::Image { source, .. } => ReopenError::Changed(source.to_string()),
        other => ReopenError::Changed(other.to_string()),
    })?;
    if disk.facts != expected {
        return Err(ReopenError::Changed(format!("it was {expected:?} and is {:?}", disk.facts)));
    }
    Ok(disk)
}

#[derive(Debug)]
pub enum ReopenError {
    Open(io::Error),
    Changed(String),
}
