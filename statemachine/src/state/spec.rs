//! What a guest is made of, and how that is written down.
//!
//! Specs lie in events, in the state of a snapshot and under the digest, and hosts of two releases must agree on the bytes of all
//! three. So a spec carries the number of its layout before its fields (ADR 0015), and is always written in the oldest layout that
//! can say it: a spec that uses nothing new has the bytes that it always had. A spec of a newer layout enters the log only at the
//! feature level that [`VmSpec::feature_level`] names.

use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;

use crate::ids::VmId;
use crate::state::ReleaseClass;

/// What a guest is made of. Frozen into the permit when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct VmSpec {
    pub machine: MachineType,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Host paths, or devices that all hosts share, under the hosts' allowed directories.
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub disks: Vec<Disk>,
    /// Network cards; without any the guest has no network.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Restarted by the cluster after its host is lost.
    pub highly_available: bool,
    /// What may end its permit without its host's word; `None` takes the default of [`VmSpec::release_class`].
    pub release: Option<ReleaseClass>,
}

impl VmSpec {
    pub const MAX_VCPUS: u32 = 64;
    pub const MAX_MEMORY_MIB: u64 = 4 << 20;
    pub const MAX_DISKS: usize = 16;
    pub const MAX_NICS: usize = 8;
    /// A huge page: guest RAM is a whole number of them.
    pub const MEMORY_GRANULE_MIB: u64 = 2;
    /// Linux takes 2047 bytes; the host appends the epoch.
    pub const MAX_CMDLINE: usize = 2000;

    /// DESIGN §5: `lease` for highly available guests, `operator` for the rest.
    pub fn release_class(&self) -> ReleaseClass {
        match self.release {
            Some(class) => class,
            None if self.highly_available => ReleaseClass::Lease,
            None => ReleaseClass::Operator,
        }
    }

    /// The feature level that a site needs before this spec may enter its log.
    pub fn feature_level(&self) -> u32 {
        match Layout::of(self) {
            Layout::First(_) => 1,
            Layout::Second(_) => 3,
        }
    }
}

/// Machine types are versioned and frozen (DESIGN §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineType {
    #[serde(rename = "q-direct-1")]
    QDirect1,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Name within the VM; the guest sees it as the disk's serial.
    pub id: String,
    pub path: String,
    pub read_only: bool,
    /// More than one VM may write it (S2's exception).
    pub shareable: bool,
}

/// A network card, plugged into a bridge of whatever host the guest runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name within the VM.
    pub id: String,
    /// Name of the bridge; every host that may run the guest has one of this name.
    pub bridge: String,
    /// Hardware address; `None` takes the one of [`Nic::mac_of`].
    pub mac: Option<MacAddr>,
}

impl Nic {
    /// Linux's IFNAMSIZ, without the zero at the end.
    pub const MAX_BRIDGE_NAME: usize = 15;

    /// The address that the guest sees. It follows from the VM and the card, so it stays for life, on every host, without a pool to
    /// give out. 46 bits of a hash, locally administered and unicast: two of 20,000 cards meet with a chance of 3 in a million, and
    /// `decide` refuses the second then.
    pub fn mac_of(&self, vm: VmId) -> MacAddr {
        self.mac.unwrap_or_else(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(b"nic");
            hasher.update(vm.0.as_bytes());
            hasher.update(self.id.as_bytes());
            let hash = hasher.finalize();
            let [first, b, c, d, e, f, ..] = *hash.as_bytes();
            MacAddr::new(first & 0b1111_1100 | 0b10, b, c, d, e, f)
        })
    }
}

/// A spec as it is written into logs and snapshots. A variant's number and fields never change; the first value of a spec is the
/// variant's number. The first layout begins with what was the machine type's number once, when there was one type and one layout.
#[derive(Serialize, Deserialize)]
enum Layout {
    First(First),
    Second(Second),
}

/// `q-direct-1` without network cards.
#[derive(Serialize, Deserialize)]
struct First {
    vcpus: u32,
    memory_mib: u64,
    kernel: String,
    initrd: Option<String>,
    cmdline: String,
    disks: Vec<Disk>,
    highly_available: bool,
    release: Option<ReleaseClass>,
}

#[derive(Serialize, Deserialize)]
struct Second {
    machine: MachineType,
    first: First,
    nics: Vec<Nic>,
}

impl Layout {
    /// The oldest that says all of the spec.
    fn of(spec: &VmSpec) -> Layout {
        let VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, nics, highly_available, release } =
            spec.clone();
        let first = First { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release };
        match machine {
            MachineType::QDirect1 if nics.is_empty() => Layout::First(first),
            MachineType::QDirect1 => Layout::Second(Second { machine, first, nics }),
        }
    }
}

impl From<Layout> for VmSpec {
    fn from(layout: Layout) -> VmSpec {
        let (machine, first, nics) = match layout {
            Layout::First(first) => (MachineType::QDirect1, first, Vec::new()),
            Layout::Second(Second { machine, first, nics }) => (machine, first, nics),
        };
        let First { vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release } = first;
        VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, nics, highly_available, release }
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
    use uuid::Uuid;

    use super::*;
    use crate::codec;

    fn spec(nics: Vec<Nic>) -> VmSpec {
        let disk = Disk { id: "root".to_owned(), path: "/srv/root".to_owned(), read_only: false, shareable: false };
        VmSpec {
            machine: MachineType::QDirect1,
            vcpus: 2,
            memory_mib: 512,
            kernel: "/srv/vmlinuz".to_owned(),
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            disks: vec![disk],
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
        disks: Vec<Disk>,
        highly_available: bool,
        release: Option<ReleaseClass>,
    }

    #[test]
    fn a_spec_that_uses_nothing_new_has_the_bytes_that_it_always_had() {
        let VmSpec { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release, .. } =
            spec(Vec::new());
        let former = Former { machine, vcpus, memory_mib, kernel, initrd, cmdline, disks, highly_available, release };
        assert_eq!(codec::encode(&spec(Vec::new())), codec::encode(&former));
        assert_eq!(spec(Vec::new()).feature_level(), 1);
    }

    #[test]
    fn every_layout_is_read_as_it_was_written() {
        let own = Nic { mac: Some(MacAddr::new(2, 0, 0, 0, 0, 1)), ..nic("own") };
        for spec in [spec(Vec::new()), spec(vec![nic("lan"), own])] {
            assert_eq!(codec::decode::<VmSpec>(&codec::encode(&spec)), Ok(spec.clone()));
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
        }
        assert_eq!(spec(vec![nic("lan")]).feature_level(), 3);
    }

    #[test]
    fn json_without_network_cards_is_a_spec_without_any() {
        let mut json = serde_json::to_value(spec(Vec::new())).unwrap();
        json.as_object_mut().unwrap().remove("nics");
        assert_eq!(serde_json::from_value::<VmSpec>(json.clone()).unwrap(), spec(Vec::new()));
        json["tpm"] = true.into();
        assert!(serde_json::from_value::<VmSpec>(json).is_err());
    }

    #[test]
    fn a_card_has_one_address_for_life_and_no_two_have_the_same() {
        let vm = |number| VmId(Uuid::from_u128(number));
        let address = nic("lan").mac_of(vm(1));
        assert_eq!(Nic { bridge: "br1".to_owned(), ..nic("lan") }.mac_of(vm(1)), address);
        assert!(address.is_local() && address.is_unicast(), "{address}");
        assert_ne!(nic("wan").mac_of(vm(1)), address);
        assert_ne!(nic("lan").mac_of(vm(2)), address);
        let chosen = MacAddr::new(0x52, 0x54, 0, 1, 2, 3);
        assert_eq!(Nic { mac: Some(chosen), ..nic("lan") }.mac_of(vm(1)), chosen);
    }
}
