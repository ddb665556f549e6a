//! The bytes of a spec.

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;

use super::Cpu;
use super::Disk;
use super::FirstBoot;
use super::MachineType;
use super::MemoryPages;
use super::MigrationPolicy;
use super::Nic;
use super::OnPanic;
use super::OnWatchdog;
use super::VmSpec;
use crate::state::ReleaseClass;

/// A spec as it is written into logs and snapshots. A variant's number and fields never change; the first value of a spec is the
/// variant's number. The first layout begins with what was the machine type's number once, when there was one type and one layout.
#[derive(Serialize, Deserialize)]
pub(super) enum Layout {
    First(First),
    Second(Box<Second>),
}

/// `q-direct-1` without network cards.
#[derive(Serialize, Deserialize)]
pub(super) struct First {
    vcpus: u32,
    memory_mib: u64,
    kernel: String,
    initrd: Option<String>,
    cmdline: String,
    disks: Vec<FirstDisk>,
    highly_available: bool,
    release: Option<ReleaseClass>,
}

/// A raw disk whose errors stop the guest, as fast as it goes.
#[derive(Serialize, Deserialize)]
struct FirstDisk {
    id: String,
    path: String,
    read_only: bool,
    shareable: bool,
}

/// Level 3: machine types, kinds of disks, network cards, processors, first boots, what follows incidents, how it may be moved.
#[derive(Serialize, Deserialize)]
pub(super) struct Second {
    machine: MachineType,
    vcpus: u32,
    memory_mib: u64,
    kernel: String,
    initrd: Option<String>,
    cmdline: String,
    disks: Vec<Disk>,
    highly_available: bool,
    release: Option<ReleaseClass>,
    nics: Vec<Nic>,
    cpu: Cpu,
    pages: MemoryPages,
    first_boot: Option<FirstBoot>,
    on_watchdog: OnWatchdog,
    on_panic: OnPanic,
    migration: MigrationPolicy,
}

impl FirstDisk {
    fn of(disk: &Disk) -> Option<FirstDisk> {
        let first = FirstDisk {
            id: disk.id.clone(),
            path: disk.path.clone(),
            read_only: disk.read_only,
            shareable: disk.shareable,
        };
        (*disk == Disk::from(&first)).then_some(first)
    }
}

impl From<&FirstDisk> for Disk {
    fn from(first: &FirstDisk) -> Disk {
        Disk { read_only: first.read_only, shareable: first.shareable, ..Disk::raw(&first.id, &first.path) }
    }
}

impl First {
    /// As much of the spec as it can say.
    fn of(spec: &VmSpec) -> Option<First> {
        let VmSpec { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release, .. } = spec.clone();
        let disks = disks.iter().map(FirstDisk::of).collect::<Option<Vec<_>>>()?;
        Some(First { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release })
    }
}

impl From<&First> for VmSpec {
    fn from(first: &First) -> VmSpec {
        let First { vcpus, memory_mib, ref kernel, ref initrd, ref cmdline, ref disks, highly_available, release } =
            *first;
        VmSpec {
            machine: MachineType::QDirect1,
            vcpus,
            memory_mib,
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: cmdline.clone(),
            disks: disks.iter().map(Disk::from).collect(),
            highly_available,
            release,
            ..VmSpec::default()
        }
    }
}

/// The same fields in another order: written twice, so that neither forgets one.
macro_rules! second_is {
    ($($field:ident),* $(,)?) => {
        impl Second {
            fn of(spec: VmSpec) -> Second {
                let VmSpec { $($field),* } = spec;
                Second { $($field),* }
            }
        }

        impl From<Second> for VmSpec {
            fn from(second: Second) -> VmSpec {
                let Second { $($field),* } = second;
                VmSpec { $($field),* }
            }
        }
    };
}

second_is!(
    machine,
    vcpus,
    memory_mib,
    kernel,
    initrd,
    cmdline,
    disks,
    highly_available,
    release,
    nics,
    cpu,
    pages,
    first_boot,
    on_watchdog,
    on_panic,
    migration,
);

impl Layout {
    /// The oldest that says all of the spec.
    pub(super) fn of(spec: &VmSpec) -> Layout {
        let first = First::of(spec).filter(|first| VmSpec::from(first) == *spec);
        first.map_or_else(|| Layout::Second(Box::new(Second::of(spec.clone()))), Layout::First)
    }

    /// The level at which hosts can read it.
    pub(super) fn feature_level(&self) -> u32 {
        match self {
            Layout::First(_) => 1,
            Layout::Second(_) => 3,
        }
    }
}

impl From<Layout> for VmSpec {
    fn from(layout: Layout) -> VmSpec {
        match layout {
            Layout::First(first) => VmSpec::from(&first),
            Layout::Second(second) => VmSpec::from(*second),
        }
    }
}

// JSON names its fields and needs no layout.
impl Serialize for VmSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => VmSpec::serialize(self, serializer),
            false => Layout::of(self).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for VmSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<VmSpec, D::Error> {
        match deserializer.is_human_readable() {
            true => VmSpec::deserialize(deserializer),
            false => Layout::deserialize(deserializer).map(VmSpec::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use pnet_base::MacAddr;

    use super::super::BackingImage;
    use super::super::CpuModel;
    use super::super::DiskFormat;
    use super::super::FirstUser;
    use super::super::Interface;
    use super::super::OnError;
    use super::super::RateLimit;
    use super::super::Topology;
    use super::*;
    use crate::codec;

    fn spec(nics: Vec<Nic>) -> VmSpec {
        VmSpec {
            machine: MachineType::QDirect1,
            vcpus: 2,
            memory_mib: 512,
            kernel: "/srv/vmlinuz".to_owned(),
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            disks: vec![Disk::raw("root", "/srv/root")],
            nics,
            highly_available: true,
            release: Some(ReleaseClass::Power),
            ..VmSpec::default()
        }
    }

    fn nic(id: &str) -> Nic {
        Nic { id: id.to_owned(), bridge: "br0".to_owned(), mac: None, slot: None }
    }

    /// As the type was before specs had layouts.
    #[derive(Serialize)]
    struct Former {
        machine: MachineType,
        vcpus: u32,
        memory_mib: u64,
        kernel: String,
        initrd: Option<String>,
        cmdline: String,
        disks: Vec<FormerDisk>,
        highly_available: bool,
        release: Option<ReleaseClass>,
    }

    #[derive(Serialize)]
    struct FormerDisk {
        id: String,
        path: String,
        read_only: bool,
        shareable: bool,
    }

    /// One for each thing that only a newer layout can say.
    fn newer_disks() -> [Disk; 5] {
        let limit = RateLimit { iops: Some(100), ..RateLimit::default() };
        let base = BackingImage { path: "/srv/base".to_owned(), format: DiskFormat::Raw };
        let disk = || Disk::raw("root", "/srv/root");
        [
            Disk { format: DiskFormat::Qcow2, ..disk() },
            Disk { format: DiskFormat::Qcow2, backing: vec![base], ..disk() },
            Disk { on_error: OnError::Report, ..disk() },
            Disk { rate_limit: Some(limit), ..disk() },
            Disk { slot: Some(1), ..disk() },
        ]
    }

    #[test]
    fn a_spec_that_uses_nothing_new_has_the_bytes_that_it_always_had() {
        let VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release, .. } =
            spec(Vec::new());
        let disks = disks
            .into_iter()
            .map(|Disk { id, path, read_only, shareable, .. }| FormerDisk { id, path, read_only, shareable })
            .collect();
        let former = Former { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release };
        assert_eq!(codec::encode(&spec(Vec::new())), codec::encode(&former));
        assert_eq!(spec(Vec::new()).feature_level(), 1);
    }

    #[test]
    fn every_layout_is_read_as_it_was_written() {
        let own = Nic { mac: Some(MacAddr::new(2, 0, 0, 0, 0, 1)), ..nic("own") };
        let with_disk = |disk| VmSpec { disks: vec![disk], ..spec(Vec::new()) };
        let disks = newer_disks().map(with_disk);
        let old = || spec(Vec::new());
        let first_boot = FirstBoot {
            host_name: "web".to_owned(),
            user: Some(FirstUser { name: "me".to_owned(), ssh_keys: vec!["ssh-ed25519 AAAA me".to_owned()] }),
            interfaces: vec![Interface {
                nic: "lan".to_owned(),
                addresses: vec!["192.0.2.5/24".to_owned()],
                gateway: Some("192.0.2.1".to_owned()),
            }],
            dns: vec!["192.0.2.2".to_owned()],
            user_data: Some("#!/bin/sh".to_owned()),
        };
        let newer = [
            VmSpec { cpu: Cpu { model: CpuModel::V3, ..Cpu::default() }, ..old() },
            VmSpec {
                cpu: Cpu { topology: Some(Topology { sockets: 1, cores: 1, threads: 2 }), ..Cpu::default() },
                ..old()
            },
            VmSpec { cpu: Cpu { weight: Some(50), cap_percent: Some(150), ..Cpu::default() }, ..old() },
            VmSpec { pages: MemoryPages::Mib2, ..old() },
            VmSpec { first_boot: Some(first_boot), ..old() },
            VmSpec { on_watchdog: OnWatchdog::None, ..old() },
            VmSpec { on_panic: OnPanic::Reset, ..old() },
            VmSpec { migration: MigrationPolicy { downtime_ms: Some(9), ..MigrationPolicy::default() }, ..old() },
        ];
        assert!(newer.iter().all(|spec| spec.feature_level() == 3));
        let cards = spec(vec![nic("lan"), own]);
        for spec in disks.iter().cloned().chain([old(), cards]).chain(newer) {
            assert_eq!(codec::decode::<VmSpec>(&codec::encode(&spec)), Ok(spec.clone()));
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
        }
        assert_eq!(spec(vec![nic("lan")]).feature_level(), 3);
        assert_eq!(disks.map(|spec| spec.feature_level()), [3; 5]);
    }

    #[test]
    fn json_without_what_is_new_is_a_spec_without_it() {
        let mut json = serde_json::to_value(spec(Vec::new())).unwrap();
        for new in ["nics", "cpu", "pages", "first_boot", "on_watchdog", "on_panic", "migration"] {
            json.as_object_mut().unwrap().remove(new).unwrap();
        }
        json["disks"] = serde_json::json!([{"id": "root", "path": "/srv/root"}]);
        assert_eq!(serde_json::from_value::<VmSpec>(json.clone()).unwrap(), spec(Vec::new()));
        json["tpm"] = true.into();
        assert!(serde_json::from_value::<VmSpec>(json).is_err());
    }
}
