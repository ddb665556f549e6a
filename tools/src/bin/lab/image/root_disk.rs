//! A root disk for guests, and the first file system that goes over to it: Debian's files on ext4 and the scripts in
//! `lab/guest-disk`, a small stand-in for cloud-init among them. The kernel's modules are in the first file system, so that the disk
//! outlives kernels.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;

use super::cpio::Archive;
use super::guest::GZIP;
use super::packages;
use super::packages::Packages;
use super::packages::run;
use super::{packed, tree};
use crate::paths::LabDir;

/// Debian's files take 25 MiB.
pub const ROOT_DISK_BYTES: u64 = 128 << 20;

const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "button",
    "evdev",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "ext4",
];

/// Of Debian's files, what nobody reads here.
const NOT_KEPT: &[&str] = &["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/lib/x86_64-linux-gnu/gconv"];

const PLACES_OF_PROGRAMS: &[&str] = &["bin", "sbin", "usr/bin", "usr/sbin"];

macro_rules! script {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/guest-disk/", $name))
    };
}

/// Ours on the disk: where, whether it is run, and what is in it.
const FILES: &[(&str, u32, &str)] = &[
    ("sbin/init", 0o755, script!("init")),
    ("sbin/shutdown", 0o755, script!("shutdown")),
    ("lib/guest/first-boot", 0o755, script!("first-boot")),
    ("lib/guest/network", 0o755, script!("network")),
    ("lib/guest/dhcp", 0o755, script!("dhcp")),
    ("etc/acpi/PWRF/00000080", 0o755, script!("power-button")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n"),
    ("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n"),
    // Of the shells that are not here ssh lets nobody in.
    ("etc/shells", 0o644, "/bin/sh\n/bin/bash\n"),
    ("etc/hostname", 0o644, "unnamed\n"),
];

/// Mount points, and where programs keep what they make.
const DIRECTORIES: &[&str] = &["proc", "sys", "dev", "run", "tmp", "mnt", "home", "root", "var/lib", "etc/dropbear"];

pub struct RootDisk {
    pub disk: PathBuf,
    pub initrd: PathBuf,
}

pub fn build(dir: &LabDir, packages: &Packages, say: &mut dyn FnMut(&str)) -> Result<RootDisk> {
    let initrd = packed(dir, "guest-root-initrd.gz", &initrd(packages)?, GZIP)?;
    let disk = dir.images().join(format!("root-disk-{}", &inputs(&packages.root_files)?[..16]));
    if !disk.exists() {
        say("making a root disk for guests");
        make(dir, &packages.root_files, &disk)?;
    }
    Ok(RootDisk { disk, initrd })
}

/// A program of the disk, run on this machine with the disk's own libraries.
pub fn tool(dir: &LabDir, path: &str) -> Result<Vec<String>> {
    let root = packages::root_files_of(dir);
    let libraries = ["lib", "usr/lib"].map(|place| root.join(place).join("x86_64-linux-gnu"));
    let loader = libraries.iter().map(|place| place.join("ld-linux-x86-64.so.2")).find(|path| path.exists());
    let loader = loader.with_context(|| format!("{} holds no loader: run `lab image`", root.display()))?;
    let libraries = libraries.map(|path| path.display().to_string()).join(":");
    let program = root.join(path).display().to_string();
    Ok(vec![loader.display().to_string(), "--library-path".to_owned(), libraries, program])
}

fn initrd(packages: &Packages) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "mnt"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    tree::add_busybox(&mut archive)?;
    tree::add_modules(&mut archive, &packages.guest_kernel.modules.closure(MODULES)?, &[]);
    archive.file("init", 0o755, script!("initramfs").as_bytes());
    Ok(archive.finish())
}

/// A digest of what the disk is made of: our files, and which packages were fetched.
fn inputs(root_files: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{ROOT_DISK_BYTES} {NOT_KEPT:?} {DIRECTORIES:?} {FILES:?}").as_bytes());
    hasher.update(&tree::read(&root_files.join(packages::LIST))?);
    Ok(hasher.finalize().to_hex().to_string())
}

/// Lays the tree out in a directory, and has mke2fs copy it: no mount, no loop device.
fn make(dir: &LabDir, root_files: &Path, disk: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(dir.images()).context("make a directory for the root disk")?;
    let root = work.path().join("root");
    run(Command::new("cp").args(["-a", "--"]).arg(root_files).arg(&root))?;
    for path in NOT_KEPT {
        let path = root.join(path);
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    for path in DIRECTORIES {
        create_directory(&root.join(path))?;
    }
    link_merged_directories(&root)?;
    for (path, mode, content) in FILES {
        write_file(&root.join(path), *mode, content)?;
    }
    link_applets(&root)?;

    let image = work.path().join("disk");
    std::fs::File::create(&image).and_then(|file| file.set_len(ROOT_DISK_BYTES)).context("create the root disk")?;
    let mut mke2fs = Command::new(packages::program("mke2fs")?);
    mke2fs.args(["-q", "-t", "ext4", "-m", "0", "-L", "root", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
    run(mke2fs.arg(&root).arg(&image))?;
    std::fs::rename(&image, disk).with_context(|| format!("move the root disk to {}", disk.display()))
}

/// Packages of Debian 13 and later have everything below `/usr`, and expect links to it.
fn link_merged_directories(root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let path = root.join(name);
        if !path.exists() {
            link(&format!("usr/{name}"), &path)?;
        }
    }
    Ok(())
}

/// A link to busybox for every program that it can be and that the disk does not have.
fn link_applets(root: &Path) -> Result<()> {
    let listed = run(Command::new(packages::program("busybox")?).arg("--list"))?;
    for applet in listed.lines() {
        if !PLACES_OF_PROGRAMS.iter().any(|place| root.join(place).join(applet).symlink_metadata().is_ok()) {
            link("busybox", &root.join("bin").join(applet))?;
        }
    }
    Ok(())
}

fn link(target: &str, path: &Path) -> Result<()> {
    std::os::unix::fs::symlink(target, path).with_context(|| format!("link {}", path.display()))
}

fn create_directory(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

fn write_file(path: &Path, mode: u32, content: &str) -> Result<()> {
    create_directory(path.parent().context("a file without a directory")?)?;
    std::fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))
}

#[cfg(test)]
#[path = "root_disk_tests.rs"]
mod tests;
