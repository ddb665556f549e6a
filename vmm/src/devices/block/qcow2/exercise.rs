//! Opens bytes as an image and works on it: what a fuzzer calls, and the tests of hostile images. It must return, whatever it is given.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use vmm_control::DiskFormat;

use super::chain::{self, Layer};
use super::{Image, ImageError};

/// The most that one step moves.
const MAX_STEP_BYTES: u64 = 1 << 20;

/// One request. Places are taken modulo the size of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32, byte: u8 },
    Zero { offset: u64, len: u32, unmap: bool },
    Discard { offset: u64, len: u32 },
    Flush,
}

/// Opens `bytes` as an image in memory.
pub fn open_bytes(bytes: &[u8]) -> Result<Image, ImageError> {
    let failed = |source: std::io::Error| ImageError::Read { path: PathBuf::from("memory"), source };
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create("image", flags).map_err(|e| failed(e.into()))?;
    let mut file = File::from(memory);
    file.write_all(bytes).map_err(failed)?;
    chain::open(vec![Layer::new("/memory".into(), DiskFormat::Qcow2, file, None)], false)
}

/// Carries out `steps`. The number of those that succeeded.
pub fn exercise(bytes: &[u8], steps: &[Step]) -> Result<usize, ImageError> {
    let image = open_bytes(bytes)?;
    Ok(steps.iter().filter(|step| carry_out(&image, **step).is_ok()).count())
}

fn carry_out(image: &Image, step: Step) -> std::io::Result<()> {
    let range = |offset: u64, len: u32| {
        let sectors = (image.bytes() / 512).max(1);
        let offset = offset / 512 % sectors * 512;
        let len = (u64::from(len).clamp(1, MAX_STEP_BYTES).next_multiple_of(512)).min(image.bytes() - offset);
        (offset, len)
    };
    match step {
        Step::Read { offset, len } => {
            let (offset, len) = range(offset, len);
            image.read(offset, &mut vec![0; len as usize])
        }
        Step::Write { offset, len, byte } => {
            let (offset, len) = range(offset, len);
            image.write(offset, &vec![byte; len as usize])
        }
        Step::Zero { offset, len, unmap } => {
            let (offset, len) = range(offset, len);
            if unmap { image.unmap_to_zeros(offset, len) } else { image.write_zeros(offset, len) }
        }
        Step::Discard { offset, len } => {
            let (offset, len) = range(offset, len);
            image.discard(offset, len)
        }
        Step::Flush => image.flush(),
    }
}
