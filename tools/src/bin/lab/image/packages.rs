//! The Debian packages whose content goes into images. They are downloaded and unpacked below
//! `.lab/cache`; nothing is installed on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::modules::ModuleTree;
use crate::paths::LabDir;

/// What the root disk of a guest is made of: a shell and its tools, ssh in and out, the guest agent, a reader of JSON.
const ROOT_PACKAGES: &[&str] = &["base-files", "busybox-static", "bash", "dropbear-bin", "qemu-guest-agent", "jq"];

/// Beginnings of names that apt adds for installing and configuring, which is not done here. Perl goes too.
const LEFT_OUT: &[&str] =
    &["debianutils", "dpkg", "gcc-", "init-system-helpers", "libdb", "libgdbm", "mawk", "tar", "usrmerge"];

/// In each tree: the packages that it was unpacked from, with their versions.
pub const LIST: &str = "etc/packages";

/// Kernels and files unpacked from packages.
pub struct Packages {
    pub host_kernel: Kernel,
    pub guest_kernel: Kernel,
    pub guest_agent: PathBuf,
    /// Debian's files for a root disk, before ours are added.
    pub root_files: PathBuf,
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
        root_files: root_files(dir, say)?,
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

/// The files of a small Debian and all libraries that they need, in one tree.
fn root_files(dir: &LabDir, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let root = root_files_of(dir);
    if !root.exists() {
        unpack(dir, &with_dependencies(ROOT_PACKAGES)?, &root, say)?;
    }
    Ok(root)
}

pub fn root_files_of(dir: &LabDir) -> PathBuf {
    dir.cache().join("root-files")
}

/// What apt would install where nothing is installed, less what only its own scripts need.
fn with_dependencies(wanted: &[&str]) -> Result<Vec<String>> {
    let nothing = tempfile::NamedTempFile::new().context("make an empty list of packages")?;
    let mut apt = Command::new("apt-get");
    apt.args(["-s", "install", "--no-install-recommends", "-o"]);
    apt.arg(format!("Dir::State::status={}", nothing.path().display())).args(wanted);
    let simulated = run(&mut apt)?;
    let packages = installed_by(&simulated);
    if packages.is_empty() {
        bail!("apt would install nothing for {}: run `apt-get update`", wanted.join(", "));
    }
    Ok(packages)
}

/// The packages of lines as `Inst bash (5.2 Debian:12 [amd64])`.
fn installed_by(simulated: &str) -> Vec<String> {
    let is_left_out = |name: &&str| name.contains("perl") || LEFT_OUT.iter().any(|left| name.starts_with(left));
    simulated
        .lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next())
        .filter(|name| !is_left_out(name))
        .map(str::to_owned)
        .collect()
}

/// The directory that holds a package's files.
fn unpacked(dir: &LabDir, package: &str, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let root = dir.cache().join(package);
    if !root.exists() {
        unpack(dir, &[package.to_owned()], &root, say)?;
    }
    Ok(root)
}

/// Downloads packages and lays their files at `root`, which is there only when all are in it.
fn unpack(dir: &LabDir, packages: &[String], root: &Path, say: &mut dyn FnMut(&str)) -> Result<()> {
    say(&format!("fetching {}", packages.join(" ")));
    std::fs::create_dir_all(dir.cache()).with_context(|| format!("create {}", dir.cache().display()))?;
    let work = tempfile::tempdir_in(dir.cache()).context("make a directory for the download")?;
    run(Command::new("apt-get").args(["download", "-qq"]).args(packages).current_dir(work.path()))?;
    let mut archives: Vec<PathBuf> = std::fs::read_dir(work.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    if archives.len() != packages.len() {
        bail!("apt-get download left {} of {} packages", archives.len(), packages.len());
    }
    archives.sort();
    let files = work.path().join("files");
    let mut list = String::new();
    for archive in &archives {
        run(Command::new("dpkg").arg("-x").arg(archive).arg(&files))?;
        list.push_str(&archive.file_name().unwrap_or_default().to_string_lossy());
        list.push('\n');
    }
    std::fs::create_dir_all(files.join("etc")).context("create etc in the tree of files")?;
    std::fs::write(files.join(LIST), list).with_context(|| format!("write {LIST} in the tree of files"))?;
    std::fs::rename(&files, root).with_context(|| format!("move files to {}", root.display()))
}

/// Runs a command to its end, and answers what it printed; its error text becomes ours.
pub fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program of this machine, looked up in the usual places.
pub fn program(name: &str) -> Result<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed: install the packages in lab/packages.txt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_those_that_apt_would_install_and_that_run_without_configuration() {
        let simulated = "NOTE: This is only a simulation!\nReading package lists...\n\
            Inst libc6 (2.36-9 Debian:12.0/stable [amd64]) []\nInst perl-base (5.36 Debian:12 [amd64])\n\
            Inst libperl5.36 (5.36 x)\nInst dpkg (1.21 x)\nInst libdb5.3 (5.3 x)\nInst jq (1.6 x [amd64])\nConf libc6 (2.36-9 x)\n";
        assert_eq!(installed_by(simulated), ["libc6", "jq"]);
    }
}
