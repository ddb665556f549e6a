//! One emulated host as a QEMU process: its command line, and the choice of the accelerator.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::json;

use crate::image::Images;
use crate::nbd::{OWN_DISK, SHARED};
use crate::paths::LabDir;
use crate::state::{Accelerator, HostId, LabConfig};

pub const EMULATOR: &str = "qemu-system-x86_64";

/// What `--accel` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum AcceleratorChoice {
    /// KVM when this machine's processor offers it, else emulation.
    Auto,
    Tcg,
    Kvm,
}

impl AcceleratorChoice {
    /// A /dev/kvm alone proves nothing: the PVM kind exists without the processor's help and does
    /// not run a stock kernel (DESIGN §13). The processor's own flag decides.
    pub fn resolve(self) -> Result<Accelerator> {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let usable = has_virtualization(&processor) && Path::new("/dev/kvm").exists();
        match self {
            Self::Tcg => Ok(Accelerator::Tcg),
            Self::Auto if !usable => Ok(Accelerator::Tcg),
            Self::Auto => Ok(Accelerator::Kvm),
            Self::Kvm if usable => Ok(Accelerator::Kvm),
            Self::Kvm => {
                bail!(
                    "this machine has no KVM with vmx or svm: use --accel tcg, which emulates a processor that has it"
                )
            }
        }
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// The command line of a host, without the program's name.
pub fn arguments(dir: &LabDir, config: &LabConfig, images: &Images, host: HostId) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([format!("-{option}"), value]);
    let socket = |kind: &str| dir.host_socket(host, kind).display().to_string();
    let chardev = |id: &str, kind: &str| format!("socket,id={id},path={},server=on,wait=off", socket(kind));

    add("name", host.to_string());
    add("machine", "q35".to_owned());
    match config.accelerator {
        Accelerator::Tcg => {
            add("accel", "tcg,thread=multi".to_owned());
            add("cpu", "max".to_owned());
        }
        Accelerator::Kvm => {
            add("accel", "kvm".to_owned());
            add("cpu", "host".to_owned());
        }
    }
    add("smp", config.cpus.to_string());
    add("m", config.memory_mib.to_string());
    add("display", "none".to_owned());
    add("vga", "none".to_owned());

    add("kernel", images.host_kernel.display().to_string());
    add("initrd", images.host_initrd.display().to_string());
    add("append", kernel_command_line(host));

    add("qmp", format!("unix:{},server=on,wait=off", socket("qmp")));
    add("chardev", format!("{},logfile={},logappend=on", chardev("serial", "serial"), dir.serial_log(host).display()));
    add("serial", "chardev:serial".to_owned());
    add("device", "virtio-serial-pci".to_owned());
    for (id, kind, name) in
        [("agent", "agent", "org.qemu.guest_agent.0"), ("console", "console", "org.quorate.lab.console")]
    {
        add("chardev", chardev(id, kind));
        add("device", format!("virtserialport,chardev={id},name={name}"));
    }

    add("netdev", format!("tap,id=net,ifname={},script=no,downscript=no", host.tap()));
    add("device", format!("virtio-net-pci,netdev=net,mac={},romfile=", host.mac()));
    for export in std::iter::once(OWN_DISK).chain(SHARED.iter().map(|(name, _)| *name)) {
        let drive = json!({
            "driver": "nbd",
            "node-name": export,
            "server": {"type": "unix", "path": socket("nbd")},
            "export": export,
            // QEMU keeps nothing back and passes FLUSH on: the block server is the disk's cache.
            "cache": {"direct": true, "no-flush": false},
        });
        add("blockdev", drive.to_string());
        let sharing = if export == OWN_DISK { "" } else { ",share-rw=on" };
        add("device", format!("virtio-blk-pci,drive={export},serial={export},write-cache=on{sharing}"));
    }
    add("device", "virtio-rng-pci".to_owned());
    add("device", "i6300esb".to_owned());
    arguments.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
    arguments
}

/// tsc, because the clock must run on while the emulator is stopped, as metal's does (DESIGN §13).
fn kernel_command_line(host: HostId) -> String {
    format!("console=ttyS0 panic=-1 quiet clocksource=tsc tsc=reliable hid={}", host.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processor_decides_whether_kvm_is_usable() {
        assert!(has_virtualization("processor\t: 0\nflags\t\t: fpu vme svm npt\n"));
        assert!(!has_virtualization("flags\t\t: fpu vme svmx\nbugs: vmx\n"));
    }

    #[test]
    fn every_disk_of_a_host_passes_flushes_on() {
        let dir = LabDir::find(Some(Path::new("/lab"))).expect("a directory");
        let config = LabConfig {
            hosts: 3,
            accelerator: Accelerator::Tcg,
            memory_mib: 2048,
            cpus: 2,
            ignore_flush: false,
            netns: "ns".to_owned(),
        };
        let images = Images {
            host_kernel: "/k".into(),
            host_initrd: "/i".into(),
            guest_kernel: "/gk".into(),
            guest_initrd: "/gi".into(),
            root_disk: "/rd".into(),
        };
        let arguments = arguments(&dir, &config, &images, HostId(2));
        let drives: Vec<_> = arguments.iter().filter(|word| word.contains("\"nbd\"")).collect();
        assert_eq!(drives.len(), 1 + SHARED.len());
        assert!(drives.iter().all(|drive| drive.contains(r#""cache":{"direct":true,"no-flush":false}"#)));
        assert!(drives.iter().all(|drive| drive.contains("/lab/sock/host2.nbd")));
        assert!(arguments.iter().any(|word| word.ends_with("hid=2")));
    }
}
