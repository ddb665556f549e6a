//! The guest image: a stock Debian cloud kernel, busybox and the scripts in `lab/guest`.

use std::path::PathBuf;

use anyhow::Result;

use super::cpio::Archive;
use super::packages::Packages;
use super::{packed, tree};
use crate::paths::LabDir;

const MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "button", "evdev"];

macro_rules! script {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/guest/", $name))
    };
}

pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

pub fn build(dir: &LabDir, packages: &Packages, say: &mut dyn FnMut(&str)) -> Result<GuestImage> {
    let kernel = &packages.guest_kernel;
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    tree::add_busybox(&mut archive)?;
    tree::add_modules(&mut archive, &kernel.modules.closure(MODULES)?, &[]);
    archive.file("init", 0o755, script!("init").as_bytes());
    archive.file("lib/guest/commands", 0o755, script!("commands").as_bytes());
    archive.file("lib/guest/disk-check", 0o755, script!("disk-check").as_bytes());
    // busybox acpid runs the file named after the event of the power button.
    archive.file("etc/acpi/PWRF/00000080", 0o755, script!("power-button").as_bytes());
    let initrd = packed(dir, "guest-initrd.gz", &archive.finish(), &["gzip", "-n", "-6"])?;
    say(&format!("guest image: kernel {}, {}", kernel.version, super::host::size_text(&initrd)));
    Ok(GuestImage { kernel: kernel.image.clone(), initrd })
}
