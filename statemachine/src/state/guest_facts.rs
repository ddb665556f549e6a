//! What a guest's agent says of the guest: name, operating system, addresses, file systems.
//!
//! A guest is not trusted. Whatever it says is bounded here: a host cleans it before it reports it, and [`GuestFacts::check`] holds for
//! everything that enters the log. Lists are sets, so two facts that say the same are equal whatever order the guest told them in.
//! What changes without end (used bytes, traffic) is a sample and not a fact (DESIGN §3).

use std::collections::BTreeSet;

use ipnet::IpNet;
use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Serialize;

use crate::rejection::Rejection;

/// What a guest is, by its own word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestFacts {
    pub hostname: Option<String>,
    pub os: Option<GuestOs>,
    /// Those that carry traffic: the loopback is left out.
    pub interfaces: BTreeSet<GuestInterface>,
    pub filesystems: BTreeSet<GuestFilesystem>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestOs {
    /// As in `os-release`: `debian`, `fedora`, `mswindows`.
    pub id: Option<String>,
    pub version_id: Option<String>,
    pub pretty_name: Option<String>,
    /// Release of the kernel.
    pub kernel: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestInterface {
    /// Unique in a guest.
    pub name: String,
    pub mac: Option<MacAddr>,
    /// Each address with the length of its network's prefix.
    pub addresses: BTreeSet<IpNet>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestFilesystem {
    pub mountpoint: String,
    /// As the guest calls it: `ext4`, `xfs`, `NTFS`.
    pub kind: String,
    pub total_bytes: Option<u64>,
}

impl GuestFacts {
    /// RFC 1035 allows 253.
    pub const MAX_HOSTNAME_BYTES: usize = 253;
    pub const MAX_OS_TEXT_BYTES: usize = 128;
    pub const MAX_INTERFACES: usize = 16;
    /// Windows calls them in sentences; Linux takes 15 bytes.
    pub const MAX_INTERFACE_NAME_BYTES: usize = 64;
    /// IPv6 with privacy addresses has eight or more.
    pub const MAX_ADDRESSES: usize = 16;
    pub const MAX_FILESYSTEMS: usize = 32;
    pub const MAX_MOUNTPOINT_BYTES: usize = 255;
    pub const MAX_FILESYSTEM_KIND_BYTES: usize = 32;

    /// Whether a character of a guest may be shown to people: no control characters, and none that hide or turn round others.
    pub fn is_plain(c: char) -> bool {
        let unseen =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        !c.is_control() && !unseen
    }

    /// The bounds of what enters the log.
    pub fn check(&self) -> Result<(), Rejection> {
        if let Some(hostname) = &self.hostname {
            text("guest host name", hostname, Self::MAX_HOSTNAME_BYTES)?;
        }
        if let Some(os) = &self.os {
            for part in [&os.id, &os.version_id, &os.pretty_name, &os.kernel].into_iter().flatten() {
                text("guest os", part, Self::MAX_OS_TEXT_BYTES)?;
            }
        }
        count("guest interfaces", self.interfaces.len(), Self::MAX_INTERFACES)?;
        let mut names = BTreeSet::new();
        for interface in &self.interfaces {
            text("guest interface", &interface.name, Self::MAX_INTERFACE_NAME_BYTES)?;
            if !names.insert(&interface.name) {
                return Err(invalid("guest interface", format!("{} is listed twice", interface.name)));
            }
            count("guest addresses", interface.addresses.len(), Self::MAX_ADDRESSES)?;
            if let Some(address) = interface.addresses.iter().find(|address| !names_an_interface(address)) {
                return Err(invalid("guest addresses", format!("{address} is not the address of an interface")));
            }
        }
        count("guest file systems", self.filesystems.len(), Self::MAX_FILESYSTEMS)?;
        for filesystem in &self.filesystems {
            text("guest mount point", &filesystem.mountpoint, Self::MAX_MOUNTPOINT_BYTES)?;
            text("guest file system", &filesystem.kind, Self::MAX_FILESYSTEM_KIND_BYTES)?;
        }
        Ok(())
    }
}

/// Whether this can be the address under which somebody else reaches the guest, or its own link does.
pub fn names_an_interface(address: &IpNet) -> bool {
    let ip = address.addr();
    !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
}

fn invalid(field: &str, why: String) -> Rejection {
    Rejection::Invalid { field: field.to_owned(), why }
}

fn text(field: &str, text: &str, max: usize) -> Result<(), Rejection> {
    if text.is_empty() || text.len() > max {
        return Err(invalid(field, format!("it has {} bytes, 1 to {max} are allowed", text.len())));
    }
    match text.chars().all(GuestFacts::is_plain) {
        true => Ok(()),
        false => Err(invalid(field, "it holds a control character".to_owned())),
    }
}

fn count(field: &str, count: usize, max: usize) -> Result<(), Rejection> {
    match count <= max {
        true => Ok(()),
        false => Err(invalid(field, format!("{count} are listed, at most {max} are kept"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    fn interface(name: &str, addresses: &[&str]) -> GuestInterface {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        GuestInterface { name: name.into(), mac: Some(MacAddr(0x52, 0x54, 0, 1, 2, 3)), addresses }
    }

    fn facts() -> GuestFacts {
        let os = GuestOs { id: Some("debian".into()), pretty_name: Some("Debian 12".into()), ..GuestOs::default() };
        let root = GuestFilesystem { mountpoint: "/".into(), kind: "ext4".into(), total_bytes: Some(1 << 30) };
        GuestFacts {
            hostname: Some("web-1".into()),
            os: Some(os),
            interfaces: BTreeSet::from([interface("eth0", &["10.0.0.5/24", "fe80::1/64"])]),
            filesystems: BTreeSet::from([root]),
        }
    }

    #[test]
    fn order_of_telling_makes_no_difference() {
        let one = interface("eth0", &["10.0.0.5/24", "fe80::1/64"]);
        let other = interface("eth0", &["fe80::1/64", "10.0.0.5/24"]);
        assert_eq!(one, other);
        let set = |a: &GuestInterface, b: &GuestInterface| BTreeSet::from([a.clone(), b.clone()]);
        let second = interface("eth1", &[]);
        assert_eq!(set(&one, &second), set(&second, &one));
    }

    #[test]
    fn facts_survive_the_log_and_the_api() {
        let facts = facts();
        facts.check().unwrap();
        let bytes = codec::encode(&facts);
        assert_eq!(codec::decode::<GuestFacts>(&bytes).unwrap(), facts);
        let text = serde_json::to_string(&facts).unwrap();
        assert!(text.contains(r#""mac":"52:54:00:01:02:03""#) && text.contains(r#""10.0.0.5/24""#), "{text}");
        assert_eq!(serde_json::from_str::<GuestFacts>(&text).unwrap(), facts);
    }

    #[test]
    fn nothing_without_bounds_enters_the_log() {
        let long = "x".repeat(300);
        let name = |name: &str| GuestFacts { hostname: Some(name.into()), ..facts() };
        let os = |text: &str| GuestFacts {
            os: Some(GuestOs { kernel: Some(text.into()), ..GuestOs::default() }),
            ..facts()
        };
        let cards =
            |interfaces: &[GuestInterface]| GuestFacts { interfaces: interfaces.iter().cloned().collect(), ..facts() };
        let mount = |mountpoint: &str, kind: &str| {
            let filesystem = GuestFilesystem { mountpoint: mountpoint.into(), kind: kind.into(), total_bytes: None };
            GuestFacts { filesystems: BTreeSet::from([filesystem]), ..facts() }
        };
        let many: Vec<_> = (0..=GuestFacts::MAX_INTERFACES).map(|i| interface(&format!("eth{i}"), &[])).collect();
        let addresses: Vec<_> = (0..=GuestFacts::MAX_ADDRESSES).map(|i| format!("10.0.0.{i}/24")).collect();
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        for bad in [
            name(""),
            name(&long),
            name("a\u{1b}[2Jb"),
            name("a\u{202e}b"),
            os(&long),
            cards(&many),
            cards(&[interface(&long, &[])]),
            cards(&[interface("eth0", &addresses)]),
            cards(&[interface("eth0", &["127.0.0.1/8"])]),
            cards(&[interface("eth0", &["ff02::1/64"])]),
            cards(&[interface("eth0", &[]), interface("eth0", &["10.0.0.1/24"])]),
            mount(&long, "ext4"),
            mount("/", ""),
            mount("/a\nb", "ext4"),
        ] {
            assert!(matches!(bad.check(), Err(Rejection::Invalid { .. })), "{bad:?}");
        }
    }
}
