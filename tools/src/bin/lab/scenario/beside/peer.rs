//! The programs that are compared, and how each is told to run the same guest.

use std::os::fd::RawFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use serde_json::json;

use super::super::guest::INITRD;
use super::super::guest::KERNEL;
use crate::machine::EMULATOR;

pub const RAM_MIB: u64 = 192;
const UUID: &str = "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d";
const MAC: &str = "52:54:00:77:00:64";
const CMDLINE: &str = "console=ttyS0 quiet address=10.77.0.100/24";
/// Epochs of a guest: where it starts, and where it is moved to.
pub const EPOCHS: [u64; 2] = [1, 2];

/// The vmm, and QEMU by machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Peer {
    Vmm,
    Pc,
    Q35,
    Microvm,
}

/// One process: which guest, where its files are, what it gets from the host.
pub struct Order<'a> {
    pub vcpus: u32,
    /// Of its own, and empty.
    pub directory: &'a Path,
    pub disk: &'a Path,
    pub tap: RawFd,
    /// The guest comes from another process.
    pub incoming: bool,
}

impl Order<'_> {
    /// What the guest says on its serial line.
    pub fn console_log(&self) -> PathBuf {
        console_log(self.directory)
    }
}

pub fn console_log(directory: &Path) -> PathBuf {
    directory.join("console.log")
}

/// The control socket of a vmm, the monitor of a QEMU.
pub fn control(directory: &Path) -> PathBuf {
    directory.join("control")
}

/// Where a QEMU's serial line is, for typing.
pub fn serial(directory: &Path) -> PathBuf {
    directory.join("serial")
}

/// Where a QEMU waits for its guest.
pub fn incoming(directory: &Path) -> PathBuf {
    directory.join("incoming")
}

pub fn started_marker(directory: &Path, epoch: u64) -> PathBuf {
    directory.join(format!("started-{epoch}"))
}

impl Peer {
    pub const ALL: [Self; 4] = [Self::Vmm, Self::Pc, Self::Q35, Self::Microvm];

    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Pc => "pc",
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    pub fn command(self, order: &Order<'_>) -> Result<Command> {
        match self {
            Self::Vmm => vmm(order),
            Self::Pc => Ok(qemu("pc", order)),
            Self::Q35 => Ok(qemu("q35", order)),
            // With PCI, as the guest has no driver for the other kind of virtio.
            Self::Microvm => Ok(qemu("microvm,pcie=on", order)),
        }
    }
}

fn vmm(order: &Order<'_>) -> Result<Command> {
    let directory = order.directory;
    let config = json!({
        "vm": UUID,
        "name": "beside",
        "epoch": EPOCHS[0],
        "machine": "q-direct-1",
        "vcpus": order.vcpus,
        "memory_bytes": RAM_MIB << 20,
        "kernel": KERNEL,
        "initrd": INITRD,
        "cmdline": CMDLINE,
        "disks": [{"id": "disk", "path": order.disk}],
        "nics": [{"id": "lan", "mac": MAC}],
        "identity": {"uuid": UUID},
        "release": "operator",
        "started_marker": started_marker(directory, EPOCHS[0]),
        "run_dir": directory,
    });
    let path = directory.join("config.json");
    std::fs::write(&path, config.to_string()).with_context(|| format!("write {}", path.display()))?;
    let mut command = Command::new("/usr/bin/vmm");
    command.arg("run").arg("--config").arg(path).arg("--control").arg(control(directory));
    command.arg("--tap-fd").arg(format!("lan={}", order.tap));
    if order.incoming {
        command.arg("--incoming");
    }
    Ok(command)
}

/// No device but those of the machine type, the serial line, the disk and the network card: a vmm's guest has a few more.
fn qemu(machine: &str, order: &Order<'_>) -> Command {
    let path = |path: PathBuf| path.display().to_string();
    let directory = order.directory;
    let (log, disk) = (path(order.console_log()), order.disk.display());
    let mut command = Command::new(format!("/usr/bin/{EMULATOR}"));
    command.args(["-L", "/usr/share/qemu", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-machine", machine, "-accel", "kvm", "-cpu", "host", "-m", &RAM_MIB.to_string()]);
    command.args(["-smp", &order.vcpus.to_string(), "-kernel", KERNEL, "-initrd", INITRD, "-append", CMDLINE]);
    let socket = format!("socket,id=serial,path={},server=on,wait=off,logfile={log}", path(serial(directory)));
    command.args(["-chardev", &socket, "-serial", "chardev:serial"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path(control(directory))));
    let drive = format!("driver=host_device,node-name=disk,filename={disk},cache.direct=on,aio=io_uring");
    command.args(["-blockdev", &drive, "-device", "virtio-blk-pci,drive=disk"]);
    command.arg("-netdev").arg(format!("tap,id=lan,fd={}", order.tap));
    command.arg("-device").arg(format!("virtio-net-pci,netdev=lan,mac={MAC},romfile="));
    if order.incoming {
        command.arg("-incoming").arg(format!("unix:{}", path(incoming(directory))));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_programs_get_the_same_guest() {
        let directory = tempfile::tempdir().expect("a directory");
        let order =
            Order { vcpus: 2, directory: directory.path(), disk: Path::new("/dev/loop7"), tap: 9, incoming: true };
        for peer in Peer::ALL {
            let command = peer.command(&order).expect("a command");
            let mut told: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
            told.extend(std::fs::read_to_string(directory.path().join("config.json")));
            for word in [KERNEL, INITRD, CMDLINE, "/dev/loop7", MAC, "incoming"] {
                assert!(told.iter().any(|argument| argument.contains(word)), "{peer:?} is not told {word}: {told:?}");
            }
            std::fs::remove_file(directory.path().join("config.json")).ok();
        }
    }
}
