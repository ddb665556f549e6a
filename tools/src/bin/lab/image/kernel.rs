//! The kernel proper out of a bzImage. An emulated processor takes four seconds to unpack Debian's
//! xz-packed kernel, and this machine a tenth of one: hosts boot the ELF file inside by its PVH
//! entry. Source of the header's fields: the kernel's Documentation/arch/x86/boot.rst.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{pipe, tree};
use crate::paths::LabDir;

/// How payloads begin, and what unpacks them.
const PACKERS: &[(&[u8], &[&str])] = &[
    (b"\xfd7zXZ", &["xz", "-dc", "--single-stream"]),
    (b"\x1f\x8b", &["gzip", "-dc"]),
    (b"\x02\x21\x4c\x18", &["lz4", "-dc"]),
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dcq"]),
];

/// The unpacked kernel, kept among the images; the bzImage itself where its packing is not known.
pub fn unpacked(dir: &LabDir, bz_image: &Path) -> Result<PathBuf> {
    let name = bz_image.file_name().context("a kernel without a name")?.to_string_lossy();
    let path = dir.images().join(format!("{name}.elf"));
    if path.exists() {
        return Ok(path);
    }
    let image = tree::read(bz_image)?;
    let payload = payload(&image).with_context(|| format!("{} is no bzImage", bz_image.display()))?;
    let Some((_, packer)) = PACKERS.iter().find(|(magic, _)| payload.starts_with(magic)) else {
        return Ok(bz_image.to_owned());
    };
    let kernel = pipe(packer, payload).with_context(|| format!("unpack {}", bz_image.display()))?;
    crate::paths::write_atomically(&path, &kernel)?;
    Ok(path)
}

/// The packed kernel: it lies behind the setup sectors, and its size follows it in four bytes.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match usize::from(*image.get(0x1f1)?) {
        0 => 4,
        count => count,
    };
    let from = word(0x248)?.checked_add((setup_sectors + 1) * 512)?;
    let packed = image.get(from..from.checked_add(word(0x24c)?)?)?;
    let (packed, _size) = packed.split_last_chunk::<4>()?;
    Some(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8], length: u32) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_lies_behind_the_setup_sectors() {
        assert_eq!(payload(&image(b"kernel\0\0\0\0", 10)), Some(&b"kernel"[..]));
    }

    #[test]
    fn a_header_that_points_outside_is_refused() {
        for length in [u32::MAX, 3, 11] {
            assert_eq!(payload(&image(b"kernel\0\0\0\0", length)), None, "{length}");
        }
        assert_eq!(payload(b"short"), None);
        assert_eq!(payload(&[0; 4096]), None);
    }
}
