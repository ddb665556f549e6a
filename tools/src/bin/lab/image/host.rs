//! The host image, in two segments that the kernel unpacks one after the other: `base` (busybox,
//! modules, guest agent, file system tools, guest image), which changes rarely, and `product`
//! (our binaries, configuration, scripts), which changes with every build.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::guest::GuestImage;
use super::packages::{Packages, Qemu, program};
use super::root_disk::RootDisk;
use super::{Images, kernel, packed, tree};
use crate::paths::LabDir;

/// What a host needs of its kernel. Order matters where two modules could serve one device.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "ext4",
    "kvm_amd",
    "kvm_intel",
    "i6300esb",
    "softdog",
    "tun",
    "bridge",
    "loop",
    "sch_netem",
];

/// A watchdog that was armed stays armed (DESIGN §5); the hardware one comes first, as /dev/watchdog.
const PARAMETERS: &[(&str, &str)] =
    &[("i6300esb", "nowayout=1 heartbeat=10"), ("softdog", "nowayout=1 soft_margin=10")];

/// Our programs in a host. `lab` itself follows guests' consoles there.
const BINARIES: &[&str] = &["hostd", "quorate", "vmm", "lab"];

const LZ4: &[&str] = &["lz4", "-l", "-q", "-c"];

macro_rules! lab_file {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/", $name))
    };
}

pub fn build(
    dir: &LabDir,
    packages: &Packages,
    guest: &GuestImage,
    root: &RootDisk,
    qemu: Option<&Qemu>,
    binaries: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Images> {
    let base = packed(dir, "host-base.lz4", &base(packages, guest, root)?, LZ4)?;
    let product = packed(dir, "host-product.lz4", &product(dir, binaries, say)?, LZ4)?;
    let mut all = [tree::read(&base)?, tree::read(&product)?].concat();
    if let Some(qemu) = qemu {
        all.extend(tree::read(&packed(dir, "host-qemu.lz4", &beside(qemu)?, LZ4)?)?);
    }
    let initrd = dir.images().join(format!("host-initrd-{}", &blake3::hash(&all).to_hex()[..16]));
    if !initrd.exists() {
        crate::paths::write_atomically(&initrd, &all)?;
    }
    say(&format!("host image: kernel {}, {}", packages.host_kernel.version, size_text(&initrd)));
    Ok(Images {
        host_kernel: kernel::unpacked(dir, &packages.host_kernel.image)?,
        host_initrd: initrd,
        guest_kernel: guest.kernel.clone(),
        guest_initrd: guest.initrd.clone(),
        root_disk: root.disk.clone(),
    })
}

fn base(packages: &Packages, guest: &GuestImage, root: &RootDisk) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "run", "tmp", "root", "var/log", "var/lib/quorate"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    tree::add_busybox(&mut archive)?;
    archive.symlink("sbin/init", "../bin/busybox");
    tree::add_modules(&mut archive, &packages.host_kernel.modules.closure(MODULES)?, PARAMETERS);
    let mut libraries = BTreeSet::new();
    libraries.extend(tree::add_program(&mut archive, "usr/sbin/qemu-ga", &packages.guest_agent)?);
    // tc: delay and loss inside a host, where the lab's own kernel has no netem.
    for tool in ["mke2fs", "tc"] {
        libraries.extend(tree::add_program(&mut archive, &format!("usr/sbin/{tool}"), &program(tool)?)?);
    }
    tree::add_libraries(&mut archive, &libraries)?;
    archive.file("etc/mke2fs.conf", 0o644, &tree::read(Path::new("/etc/mke2fs.conf"))?);
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n");
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
    archive.file("usr/share/quorate/images/guest-vmlinuz", 0o644, &tree::read(&guest.kernel)?);
    archive.file("usr/share/quorate/images/guest-initrd.gz", 0o644, &tree::read(&guest.initrd)?);
    archive.file("usr/share/quorate/images/guest-agent-initrd.gz", 0o644, &tree::read(&guest.agent_initrd)?);
    archive.file("usr/share/quorate/images/guest-root-initrd.gz", 0o644, &tree::read(&root.initrd)?);
    Ok(archive.finish())
}

fn product(dir: &LabDir, binaries: &Path, say: &mut dyn FnMut(&str)) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let mut libraries = BTreeSet::new();
    for name in BINARIES {
        let binary = binaries.join(name);
        if !binary.exists() {
            say(&format!("no {}: the image goes without it (build it with `cargo build`)", binary.display()));
            continue;
        }
        let slim = stripped(dir, &binary)?;
        libraries.extend(tree::add_program(&mut archive, &format!("usr/bin/{name}"), &slim)?);
    }
    tree::add_libraries(&mut archive, &libraries)?;
    archive.file("init", 0o755, lab_file!("host/init").as_bytes());
    archive.file("sbin/service", 0o755, lab_file!("host/service").as_bytes());
    archive.file("etc/inittab", 0o644, lab_file!("host/inittab").as_bytes());
    archive.file("etc/quorate/hostd.toml.in", 0o644, lab_file!("hostd.toml.in").as_bytes());
    Ok(archive.finish())
}

/// QEMU with its libraries, which an emulated host unpacks in a second.
fn beside(qemu: &Qemu) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let program = format!("usr/bin/{}", crate::machine::EMULATOR);
    let libraries = tree::add_program(&mut archive, &program, &qemu.program)?;
    tree::add_libraries(&mut archive, &libraries)?;
    for (name, source) in &qemu.firmware {
        archive.file(&format!("usr/share/qemu/{name}"), 0o644, &tree::read(source)?);
    }
    Ok(archive.finish())
}

/// A copy without debug information, which is most of a binary and would be unpacked into each
/// host's memory.
fn stripped(dir: &LabDir, binary: &Path) -> Result<PathBuf> {
    let hash = blake3::hash(&tree::read(binary)?).to_hex();
    let name = binary.file_name().unwrap_or_default().to_string_lossy();
    let slim = dir.images().join(format!("bin-{name}-{}", &hash[..16]));
    if !slim.exists() {
        let output = Command::new("strip").arg("-g").arg("-o").arg(&slim).arg(binary).output().context("run strip")?;
        if !output.status.success() {
            bail!("strip {name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(slim)
}

/// Keeps what the current images are made of and the newest few of each kind; drops the rest.
pub fn remove_old(dir: &LabDir, images: &Images) -> Result<()> {
    const KEEP: usize = 3;
    for kind in [
        "guest-initrd.gz-",
        "guest-agent.gz-",
        "guest-agent-initrd.gz-",
        "guest-root-initrd.gz-",
        "root-disk-",
        "host-base.lz4-",
        "host-product.lz4-",
        "host-qemu.lz4-",
        "host-initrd-",
        "bin-hostd-",
        "bin-quorate-",
        "bin-vmm-",
        "bin-lab-",
    ] {
        let mut files: Vec<_> = std::fs::read_dir(dir.images())?
            .filter_map(|entry| entry.ok())
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(kind))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .filter(|(_, path)| ![&images.host_initrd, &images.guest_initrd, &images.root_disk].contains(&path))
            .collect();
        files.sort();
        for (_, path) in files.iter().rev().skip(KEEP) {
            // Another lab command may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

pub fn size_text(path: &Path) -> String {
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
