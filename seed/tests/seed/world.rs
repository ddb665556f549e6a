//! Seeds to test with, and the disk as a reader of FAT sees it.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::io::Read;
use std::net::Ipv4Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use fatfs::FileSystem;
use fatfs::FsOptions;
use pnet_base::MacAddr;
use seed::Addresses;
use seed::Interface;
use seed::Seed;
use seed::User;
use serde_json::Value;

pub const MAC: MacAddr = MacAddr(0x52, 0x54, 0, 1, 2, 3);
pub const OTHER_MAC: MacAddr = MacAddr(0x52, 0x54, 0, 1, 2, 4);

/// A public key of this kind with this content, as its file would hold it.
pub fn key_of(kind: &str, content: &[u8], comment: &str) -> String {
    let string = |bytes: &[u8]| [&u32::try_from(bytes.len()).expect("short").to_be_bytes()[..], bytes].concat();
    let blob = [string(kind.as_bytes()), string(content)].concat();
    let space = if comment.is_empty() { "" } else { " " };
    format!("{kind} {}{space}{comment}", BASE64.encode(blob))
}

pub fn key(comment: &str) -> String {
    key_of("ssh-ed25519", &[7; 32], comment)
}

/// A name and an id: the least that a seed can be.
pub fn least() -> Seed {
    Seed {
        instance_id: "i-1".to_owned(),
        host_name: "web1".to_owned(),
        user: None,
        network: Vec::new(),
        user_data: None,
    }
}

/// Everything that a seed can say.
pub fn full() -> Seed {
    let parsed = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect();
    Seed {
        instance_id: "6b1f3f0e-4a35-4b7a-9a51-0d5cf7f4c1aa".to_owned(),
        host_name: "web1.example.org".to_owned(),
        user: Some(User { name: "alice".to_owned(), ssh_keys: vec![key("alice@desk"), key("")], sudo: true }),
        network: vec![
            Interface {
                mac: MAC,
                addresses: Addresses::Static(
                    ["10.77.9.5/24", "fd00::5/64"].iter().map(|text| text.parse().expect("a network")).collect(),
                ),
                gateway4: Some(Ipv4Addr::new(10, 77, 9, 1)),
                gateway6: Some("fe80::1".parse().expect("an address")),
                dns: parsed(&["10.77.9.2", "fd00::2"]),
            },
            Interface { mac: OTHER_MAC, addresses: Addresses::Dhcp, gateway4: None, gateway6: None, dns: Vec::new() },
        ],
        user_data: Some("#cloud-config\npackages: [nginx]\n".to_owned()),
    }
}

pub fn with_user_data(text: &str) -> Seed {
    Seed { user_data: Some(text.to_owned()), ..least() }
}

/// A seed with one card, and the card changed.
pub fn with_card(change: impl FnOnce(&mut Interface)) -> Seed {
    let mut interface = full().network.swap_remove(0);
    change(&mut interface);
    Seed { network: vec![interface], ..least() }
}

pub fn image(seed: &Seed) -> Vec<u8> {
    seed::image(seed).expect("a seed without fault")
}

/// All files of the disk.
pub fn files(image: &[u8]) -> BTreeMap<String, String> {
    let disk = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).expect("a FAT file system");
    let root = disk.root_dir();
    root.iter()
        .map(|entry| {
            let entry = entry.expect("an entry");
            let mut text = String::new();
            entry.to_file().read_to_string(&mut text).expect("a file of text");
            (entry.file_name(), text)
        })
        .collect()
}

/// A file of ours as JSON, under its first line if it has one that JSON has not.
pub fn json(files: &BTreeMap<String, String>, name: &str) -> Value {
    let text = &files[name];
    let text = text.strip_prefix("#cloud-config\n").unwrap_or(text);
    serde_json::from_str(text).expect("JSON")
}
