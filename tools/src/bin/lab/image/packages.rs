//! The Debian packages whose content goes into images. They are downloaded and unpacked below
//! `.lab/cache`; nothing is installed on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::modules::ModuleTree;
use crate::paths::LabDir;

/// Kernels and files unpacked from packages.
pub struct Packages {
    pub host_kernel: Kernel,
    pub guest_kernel: Kernel,
    pub guest_agent: PathBuf,
}

/// QEMU as Debian ships it, for hosts in which it runs beside the vmm.
pub struct Qemu {
    pub program: PathBuf,
    /// Firmware that machine types load, by the name that QEMU looks for.
    pub firmware: Vec<(&'static str, PathBuf)>,
}

/// From SeaBIOS's package. QEMU's own has a `bios-microvm.bin` too, which is qboot: with that a `microvm` has no ACPI, and so no PCI.
const SEABIOS: &[&str] = &["bios-256k.bin", "bios-microvm.bin"];
/// What boots a kernel without a disk, and what every machine type with a local APIC loads.
const OPTION_ROMS: &[&str] = &["linuxboot.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"];

/// One unpacked kernel package.
pub struct Kernel {
    pub version: String,
    pub image: PathBuf,
    pub modules: ModuleTree,
}

/// Downloads and unpacks what is not in the cache yet.
///
/// Hosts run the full kernel, since only it has the i6300esb watchdog; guests run the cloud kernel.
pub fn fetch(dir: &LabDir, say: &mut dyn FnMut(&str)) -> Result<Packages> {
    Ok(Packages {
        host_kernel: kernel(dir, "linux-image-amd64", say)?,
        guest_kernel: kernel(dir, "linux-image-cloud-amd64", say)?,
        guest_agent: unpacked(dir, "qemu-guest-agent", say)?.join("usr/sbin/qemu-ga"),
    })
}

/// QEMU's program and the few files of its packages that the machine types `pc`, `q35` and `microvm` need.
pub fn fetch_qemu(dir: &LabDir, say: &mut dyn FnMut(&str)) -> Result<Qemu> {
    let program = unpacked(dir, "qemu-system-x86", say)?.join("usr/bin").join(crate::machine::EMULATOR);
    let seabios = unpacked(dir, "seabios", say)?.join("usr/share/seabios");
    let data = unpacked(dir, "qemu-system-data", say)?.join("usr/share/qemu");
    let bios = SEABIOS.iter().map(|name| (*name, seabios.join(name)));
    let roms = OPTION_ROMS.iter().map(|name| (*name, data.join(name)));
    Ok(Qemu { program, firmware: bios.chain(roms).collect() })
}

fn kernel(dir: &LabDir, meta_package: &str, say: &mut dyn FnMut(&str)) -> Result<Kernel> {
    // The choice is kept, so that a lab works on without the archive and its images stay the same.
    let choice = dir.cache().join(format!("{meta_package}.choice"));
    let package = match std::fs::read_to_string(&choice) {
        Ok(package) => package,
        Err(_) => newest_kernel(meta_package)?,
    };
    let root = unpacked(dir, &package, say)?;
    crate::paths::write_atomically(&choice, package.as_bytes())?;
    let version = package.strip_prefix("linux-image-").unwrap_or(&package).to_owned();
    let modules = [root.join("lib/modules"), root.join("usr/lib/modules")]
        .into_iter()
        .map(|path| path.join(&version))
        .find(|path| path.exists())
        .with_context(|| format!("{package} holds no modules for {version}"))?;
    Ok(Kernel { image: root.join(format!("boot/vmlinuz-{version}")), modules: ModuleTree::open(&modules)?, version })
}

fn newest_kernel(meta_package: &str) -> Result<String> {
    let output = Command::new("apt-cache").args(["depends", meta_package]).output().context("run apt-cache")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no {meta_package}: run `apt-get update`"))
}

/// The directory that holds a package's files.
fn unpacked(dir: &LabDir, package: &str, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let root = dir.cache().join(package);
    if root.exists() {
        return Ok(root);
    }
    say(&format!("fetching {package}"));
    std::fs::create_dir_all(dir.cache()).with_context(|| format!("create {}", dir.cache().display()))?;
    let work = tempfile::tempdir_in(dir.cache()).context("make a directory for the download")?;
    run(Command::new("apt-get").args(["download", "-qq", package]).current_dir(work.path()))?;
    let archive = std::fs::read_dir(work.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no .deb"))?;
    let files = work.path().join("files");
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&files))?;
    std::fs::rename(&files, &root).with_context(|| format!("move files to {}", root.display()))?;
    Ok(root)
}

/// Runs a command to its end; its error text becomes ours.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A program of this machine, looked up in the usual places.
pub fn program(name: &str) -> Result<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed: install the packages in lab/packages.txt"))
}
