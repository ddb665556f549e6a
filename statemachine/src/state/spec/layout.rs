//! The bytes of a spec.

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;

use super::Disk;
use super::MachineType;
use super::Nic;
use super::VmSpec;
use crate::state::ReleaseClass;

/// A spec as it is written into logs and snapshots. A variant's number and fields never change; the first value of a spec is the
/// variant's number. The first layout begins with what was the machine type's number once, when there was one type and one layout.
#[derive(Serialize, Deserialize)]
pub(super) enum Layout {
    First(First),
    Second(Second),
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

/// Level 3: machine types, kinds of disks, network cards.
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

impl Layout {
    /// The oldest that says all of the spec.
    pub(super) fn of(spec: &VmSpec) -> Layout {
        let first_disks: Option<Vec<FirstDisk>> = spec.disks.iter().map(FirstDisk::of).collect();
        let VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, nics, highly_available, release } =
            spec.clone();
        match (machine, first_disks) {
            (MachineType::QDirect1, Some(disks)) if nics.is_empty() => {
                Layout::First(First { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release })
            }
            (machine, _) => Layout::Second(Second {
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
            }),
        }
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
            Layout::First(First { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release }) => {
                VmSpec {
                    machine: MachineType::QDirect1,
                    vcpus,
                    memory_mib,
                    kernel,
                    initrd,
                    cmdline,
                    disks: disks.iter().map(Disk::from).collect(),
                    nics: Vec::new(),
                    highly_available,
                    release,
                }
            }
            Layout::Second(Second {
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
            }) => {
                VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, nics, highly_available, release }
            }
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
    use super::super::DiskFormat;
    use super::super::OnError;
    use super::super::RateLimit;
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
        }
    }

    fn nic(id: &str) -> Nic {
        Nic { id: id.to_owned(), bridge: "br0".to_owned(), mac: None }
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
    fn newer_disks() -> [Disk; 4] {
        let limit = RateLimit { iops: Some(100), ..RateLimit::default() };
        let base = BackingImage { path: "/srv/base".to_owned(), format: DiskFormat::Raw };
        let disk = || Disk::raw("root", "/srv/root");
        [
            Disk { format: DiskFormat::Qcow2, ..disk() },
            Disk { format: DiskFormat::Qcow2, backing: vec![base], ..disk() },
            Disk { on_error: OnError::Report, ..disk() },
            Disk { rate_limit: Some(limit), ..disk() },
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
        for spec in disks.iter().cloned().chain([spec(Vec::new()), spec(vec![nic("lan"), own])]) {
            assert_eq!(codec::decode::<VmSpec>(&codec::encode(&spec)), Ok(spec.clone()));
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
        }
        assert_eq!(spec(vec![nic("lan")]).feature_level(), 3);
        assert_eq!(disks.map(|spec| spec.feature_level()), [3; 4]);
    }

    #[test]
    fn json_without_what_is_new_is_a_spec_without_it() {
        let mut json = serde_json::to_value(spec(Vec::new())).unwrap();
        json.as_object_mut().unwrap().remove("nics");
        json["disks"] = serde_json::json!([{"id": "root", "path": "/srv/root"}]);
        assert_eq!(serde_json::from_value::<VmSpec>(json.clone()).unwrap(), spec(Vec::new()));
        json["tpm"] = true.into();
        assert!(serde_json::from_value::<VmSpec>(json).is_err());
    }
}
