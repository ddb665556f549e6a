//! The guest image: a stock Debian cloud kernel, busybox and the scripts in `lab/guest`. A second one, with QEMU's guest agent in it,
//! is for the stories that need it: its libraries take an emulated guest a second to unpack.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Result;

use super::cpio::Archive;
use super::packages::Packages;
use super::{packed, tree};
use crate::paths::LabDir;

const MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "button", "evdev"];

pub const GZIP: &[&str] = &["gzip", "-n", "-6"];

macro_rules! script {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/guest/", $name))
    };
}

pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// With `qemu-ga`, which the guest's init starts where it finds it.
    pub agent_initrd: PathBuf,
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
    let initrd = packed(dir, "guest-initrd.gz", &archive.finish(), GZIP)?;
    let agent = packed(dir, "guest-agent.gz", &agent(packages)?, GZIP)?;
    // The kernel unpacks one archive after the other.
    let both = [tree::read(&initrd)?, tree::read(&agent)?].concat();
    let agent_initrd = packed(dir, "guest-agent-initrd.gz", &both, &["cat"])?;
    say(&format!("guest image: kernel {}, {}", kernel.version, super::host::size_text(&initrd)));
    Ok(GuestImage { kernel: kernel.image.clone(), initrd, agent_initrd })
}

fn agent(packages: &Packages) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let libraries: BTreeSet<PathBuf> = tree::add_program(&mut archive, "usr/sbin/qemu-ga", &packages.guest_agent)?;
    tree::add_libraries(&mut archive, &libraries)?;
    // With it the agent sets the clock of the machine as well.
    archive.symlink("sbin/hwclock", "../bin/busybox");
    archive.file("sbin/shutdown", 0o755, script!("shutdown").as_bytes());
    let release = "ID=debian\nVERSION_ID=12\nPRETTY_NAME=\"Debian GNU/Linux 12, the lab's guest\"\n";
    archive.file("etc/os-release", 0o644, release.as_bytes());
    Ok(archive.finish())
}
