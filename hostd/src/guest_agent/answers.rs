//! What the agent answers, read so that a guest decides neither how much is kept nor what a terminal does with it.
//!
//! The shapes are those of QEMU's `qga/qapi-schema.json`. Fields that are not named here are skipped while reading.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use ipnet::IpNet;
use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Deserializer;
use serde::de::IgnoredAny;
use serde::de::SeqAccess;
use serde::de::Visitor;
use statemachine::state::GuestFacts;
use statemachine::state::GuestFilesystem;
use statemachine::state::GuestInterface;
use statemachine::state::GuestOs;
use statemachine::state::names_an_interface;

/// A complaint of the guest's, in its own words.
pub const MAX_WORDS_BYTES: usize = 256;
/// Commands that one agent offers; QEMU's has fewer than a hundred.
const MAX_COMMANDS: usize = 512;

/// The first `N` items of a list; the others are skipped without being built.
#[derive(Debug, PartialEq, Eq)]
pub struct FirstOf<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for FirstOf<T, N> {
    fn default() -> Self {
        FirstOf(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for FirstOf<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T, const N: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Items<T, N> {
            type Value = FirstOf<T, N>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut first = Vec::new();
                while first.len() < N {
                    match items.next_element()? {
                        Some(item) => first.push(item),
                        None => return Ok(FirstOf(first)),
                    }
                }
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(FirstOf(first))
            }
        }

        deserializer.deserialize_seq(Items(PhantomData))
    }
}

/// A guest's text as people may see it: without what is not to be seen, at most `limit` bytes. `None` when nothing is left.
pub fn text(raw: &str, limit: usize) -> Option<String> {
    let mut clean = String::new();
    for c in raw.trim().chars().filter(|c| GuestFacts::is_plain(*c)) {
        if clean.len() + c.len_utf8() > limit {
            break;
        }
        clean.push(c);
    }
    // Cut or cleaned text may end in a blank, and would not be equal to itself told in full.
    let len = clean.trim_end().len();
    clean.truncate(len);
    (!clean.trim_start().is_empty()).then_some(clean)
}

fn optional_text(raw: Option<String>, limit: usize) -> Option<String> {
    raw.and_then(|raw| text(&raw, limit))
}

/// `guest-info`.
#[derive(Debug, Deserialize)]
pub struct RawInfo {
    #[serde(default)]
    pub version: String,
    #[serde(default)]
    pub supported_commands: FirstOf<RawCommand, MAX_COMMANDS>,
}

#[derive(Debug, Deserialize)]
pub struct RawCommand {
    pub name: String,
    #[serde(default = "yes")]
    pub enabled: bool,
}

fn yes() -> bool {
    true
}

/// `guest-get-host-name`.
#[derive(Debug, Deserialize)]
pub struct RawHostName {
    #[serde(rename = "host-name")]
    host_name: String,
}

impl RawHostName {
    pub fn clean(self) -> Option<String> {
        text(&self.host_name, GuestFacts::MAX_HOSTNAME_BYTES)
    }
}

/// `guest-get-osinfo`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawOs {
    id: Option<String>,
    version_id: Option<String>,
    pretty_name: Option<String>,
    kernel_release: Option<String>,
}

impl RawOs {
    pub fn clean(self) -> GuestOs {
        let clean = |raw| optional_text(raw, GuestFacts::MAX_OS_TEXT_BYTES);
        GuestOs {
            id: clean(self.id),
            version_id: clean(self.version_id),
            pretty_name: clean(self.pretty_name),
            kernel: clean(self.kernel_release),
        }
    }
}

/// `guest-network-get-interfaces`. Some more than are kept, because not all of them are worth it.
pub type RawInterfaces = FirstOf<RawInterface, { 4 * GuestFacts::MAX_INTERFACES }>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawInterface {
    name: String,
    hardware_address: Option<String>,
    #[serde(default)]
    ip_addresses: FirstOf<RawAddress, { 4 * GuestFacts::MAX_ADDRESSES }>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawAddress {
    ip_address: String,
    prefix: u64,
}

impl RawAddress {
    fn clean(&self) -> Option<IpNet> {
        let ip: IpAddr = self.ip_address.parse().ok()?;
        let address = IpNet::new(ip, u8::try_from(self.prefix).ok()?).ok()?;
        names_an_interface(&address).then_some(address)
    }
}

/// In the guest's order, in which its network cards come before the bridges and ends of containers that come and go.
pub fn clean_interfaces(raw: RawInterfaces) -> BTreeSet<GuestInterface> {
    let mut names = BTreeSet::new();
    let clean = raw.0.into_iter().filter_map(|raw| {
        let name = text(&raw.name, GuestFacts::MAX_INTERFACE_NAME_BYTES)?;
        let mac = raw.hardware_address.and_then(|mac| mac.parse::<MacAddr>().ok()).filter(|mac| !mac.is_zero());
        let addresses = raw.ip_addresses.0.iter().filter_map(RawAddress::clean);
        let addresses: BTreeSet<IpNet> = addresses.take(GuestFacts::MAX_ADDRESSES).collect();
        // The loopback has neither.
        let carries = mac.is_some() || !addresses.is_empty();
        (carries && names.insert(name.clone())).then_some(GuestInterface { name, mac, addresses })
    });
    clean.take(GuestFacts::MAX_INTERFACES).collect()
}

/// `guest-get-fsinfo`.
pub type RawFilesystems = FirstOf<RawFilesystem, { 4 * GuestFacts::MAX_FILESYSTEMS }>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawFilesystem {
    mountpoint: String,
    #[serde(rename = "type")]
    kind: String,
    used_bytes: Option<u64>,
    total_bytes: Option<u64>,
}

/// How full a file system is. A sample, which never enters the log (DESIGN §3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesystemUse {
    pub mountpoint: String,
    pub used_bytes: u64,
    pub total_bytes: u64,
}

pub fn clean_filesystems(raw: RawFilesystems) -> (BTreeSet<GuestFilesystem>, Vec<FilesystemUse>) {
    let mut mountpoints = BTreeSet::new();
    let (mut filesystems, mut uses) = (BTreeSet::new(), Vec::new());
    for raw in raw.0 {
        let mountpoint = text(&raw.mountpoint, GuestFacts::MAX_MOUNTPOINT_BYTES);
        let kind = text(&raw.kind, GuestFacts::MAX_FILESYSTEM_KIND_BYTES);
        let (Some(mountpoint), Some(kind)) = (mountpoint, kind) else { continue };
        if filesystems.len() == GuestFacts::MAX_FILESYSTEMS || !mountpoints.insert(mountpoint.clone()) {
            continue;
        }
        if let (Some(used_bytes), Some(total_bytes)) = (raw.used_bytes, raw.total_bytes) {
            uses.push(FilesystemUse { mountpoint: mountpoint.clone(), used_bytes, total_bytes });
        }
        filesystems.insert(GuestFilesystem { mountpoint, kind, total_bytes: raw.total_bytes });
    }
    (filesystems, uses)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn text_loses_what_is_not_to_be_seen() {
        assert_eq!(text(" web-1\n", 100).as_deref(), Some("web-1"));
        assert_eq!(text("\u{1b}[2Jweb\u{202e}1\0", 100).as_deref(), Some("[2Jweb1"));
        assert_eq!(text("höhe", 2).as_deref(), Some("h"), "cut between characters");
        assert_eq!(text("ab cd", 3).as_deref(), Some("ab"));
        assert_eq!(text("\u{7}\n \u{200b}", 100), None);
    }

    #[test]
    fn a_list_without_end_is_read_to_its_first_items() {
        let list = format!("[{}1]", "1,".repeat(100_000));
        assert_eq!(serde_json::from_str::<FirstOf<u8, 3>>(&list).unwrap().0, [1, 1, 1]);
        assert_eq!(serde_json::from_str::<FirstOf<u8, 3>>("[1,2]").unwrap().0, [1, 2]);
        assert!(serde_json::from_str::<FirstOf<u8, 3>>("{}").is_err());
        let deep = format!("[1,2,3,{}{}]", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert_eq!(serde_json::from_str::<FirstOf<u8, 3>>(&deep).unwrap().0, [1, 2, 3], "skipped without a stack");
    }

    #[test]
    fn interfaces_are_what_carries_traffic() {
        let raw = json!([
            {"name": "lo", "hardware-address": "00:00:00:00:00:00",
             "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
            {"name": "eth0", "hardware-address": "52:54:00:01:02:03", "statistics": {"rx-bytes": 5},
             "ip-addresses": [
                {"ip-address": "fe80::1", "ip-address-type": "ipv6", "prefix": 64},
                {"ip-address": "10.0.0.5", "ip-address-type": "ipv4", "prefix": 24},
                {"ip-address": "10.0.0.6", "ip-address-type": "ipv4", "prefix": 99},
                {"ip-address": "10.0.0.7\n", "ip-address-type": "ipv4", "prefix": 24},
                {"ip-address": "224.0.0.1", "ip-address-type": "ipv4", "prefix": 24},
             ]},
            {"name": "eth0", "hardware-address": "52:54:00:01:02:04"},
            {"name": "wg0", "hardware-address": "nonsense", "ip-addresses": [{"ip-address": "10.9.0.1", "prefix": 32}]},
            {"name": "\u{7}", "hardware-address": "52:54:00:01:02:05"},
        ]);
        let interfaces = clean_interfaces(serde_json::from_value(raw).unwrap());
        let seen: Vec<_> =
            interfaces.iter().map(|i| (&*i.name, i.mac.map(|m| m.to_string()), i.addresses.len())).collect();
        assert_eq!(seen, [("eth0", Some("52:54:00:01:02:03".to_owned()), 2), ("wg0", None, 1)]);
    }

    #[test]
    fn a_mountpoint_is_listed_once_and_use_is_apart() {
        let raw = json!([
            {"name": "sda1", "mountpoint": "/", "type": "ext4", "used-bytes": 5, "total-bytes": 10, "disk": []},
            {"name": "sda2", "mountpoint": "/", "type": "xfs", "disk": []},
            {"name": "sr0", "mountpoint": "/mnt", "type": "iso9660", "disk": [{"bus-type": "ide"}]},
            {"name": "bad", "mountpoint": "", "type": "ext4", "disk": []},
        ]);
        let (filesystems, uses) = clean_filesystems(serde_json::from_value(raw).unwrap());
        let seen: Vec<_> = filesystems.iter().map(|f| (&*f.mountpoint, &*f.kind, f.total_bytes)).collect();
        assert_eq!(seen, [("/", "ext4", Some(10)), ("/mnt", "iso9660", None)]);
        assert_eq!(uses, [FilesystemUse { mountpoint: "/".into(), used_bytes: 5, total_bytes: 10 }]);
    }

    proptest! {
        /// Whatever a guest says, what is kept of it may enter the log.
        #[test]
        fn what_is_kept_is_within_bounds(
            name in any::<String>(),
            texts in prop::collection::vec(("[a-z\\x00-\\x1f\u{202e} ]{0,300}", any::<[u8; 4]>(), 0u64..140), 0..80),
        ) {
            let interfaces: Vec<_> = texts.iter().enumerate().map(|(i, (text, ip, prefix))| json!({
                "name": format!("{text}{i}"), "hardware-address": "52:54:00:01:02:03",
                "ip-addresses": texts.iter().take(i).map(|_| json!({
                    "ip-address": std::net::Ipv4Addr::from(*ip).to_string(), "prefix": prefix,
                })).collect::<Vec<_>>(),
            })).collect();
            let filesystems: Vec<_> = texts.iter().map(|(text, _, total)| json!({
                "mountpoint": text, "type": text, "total-bytes": total,
            })).collect();
            let raw_name: RawHostName = serde_json::from_value(json!({"host-name": name})).unwrap();
            let raw_os: RawOs = serde_json::from_value(json!({"id": name, "pretty-name": name})).unwrap();
            let facts = GuestFacts {
                hostname: raw_name.clean(),
                os: Some(raw_os.clean()),
                interfaces: clean_interfaces(serde_json::from_value(interfaces.into()).unwrap()),
                filesystems: clean_filesystems(serde_json::from_value(filesystems.into()).unwrap()).0,
            };
            prop_assert!(facts.check().is_ok(), "{:?}", facts.check());
        }
    }
}
