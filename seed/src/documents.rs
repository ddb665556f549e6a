//! The files of the seed, as cloud-init's data source NoCloud reads them.
//!
//! | file | what it says | when it is there |
//! |---|---|---|
//! | `meta-data` | instance id and host name | always |
//! | `user-data` | the owner's part, byte for byte | always; an empty `#cloud-config` without one |
//! | `vendor-data` | our part: the user with its keys | with a user |
//! | `network-config` | version 2, cards matched by hardware address | with cards |
//!
//! Our part goes into vendor-data, never into the owner's file. cloud-init applies both, and where both say something the owner's
//! word holds; that is also its meaning of "vendor": who runs the machine. Merging the two into one file would mean to parse the
//! owner's YAML or MIME with another parser than the guest's, and to answer for what the two read differently.
//!
//! Everything of ours is JSON: YAML of which nothing is left to quoting, since every text in it is ASCII without control signs
//! (`check`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use ipnet::IpNet;
use serde::Serialize;

use crate::Addresses;
use crate::Interface;
use crate::Seed;
use crate::User;

pub struct Document {
    pub name: &'static str,
    pub content: Vec<u8>,
}

pub fn of(seed: &Seed) -> serde_json::Result<Vec<Document>> {
    let meta_data = MetaData { instance_id: &seed.instance_id, local_hostname: &seed.host_name };
    let owners = seed.user_data.as_deref().unwrap_or("#cloud-config\n{}\n");
    let mut documents = vec![
        document("meta-data", "", &meta_data)?,
        Document { name: "user-data", content: owners.as_bytes().to_vec() },
    ];
    if let Some(user) = &seed.user {
        documents.push(document("vendor-data", "#cloud-config\n", &VendorData { users: [user.into()] })?);
    }
    if !seed.network.is_empty() {
        documents.push(document("network-config", "", &NetworkConfig::of(&seed.network))?);
    }
    Ok(documents)
}

fn document(name: &'static str, first_line: &str, value: &impl Serialize) -> serde_json::Result<Document> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(Document { name, content: format!("{first_line}{text}\n").into_bytes() })
}

// Structs, whose fields keep their order: that of a map of serde_json follows a feature that any crate of a build may switch.

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    instance_id: &'a str,
    local_hostname: &'a str,
}

/// A list of users without `default` replaces the image's own default user.
#[derive(Serialize)]
struct VendorData<'a> {
    users: [UserEntry<'a>; 1],
}

#[derive(Serialize)]
struct UserEntry<'a> {
    name: &'a str,
    ssh_authorized_keys: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    sudo: Option<&'static str>,
}

impl<'a> From<&'a User> for UserEntry<'a> {
    fn from(user: &'a User) -> Self {
        let sudo = user.sudo.then_some("ALL=(ALL) NOPASSWD:ALL");
        UserEntry { name: &user.name, ssh_authorized_keys: &user.ssh_keys, sudo }
    }
}

#[derive(Serialize)]
struct NetworkConfig<'a> {
    version: u32,
    ethernets: BTreeMap<String, Card<'a>>,
}

impl<'a> NetworkConfig<'a> {
    fn of(interfaces: &'a [Interface]) -> Self {
        // The names are for whoever reads the file: the guest finds its cards by hardware address, and calls them what it likes.
        let named = (0..).zip(interfaces).map(|(number, interface)| (format!("nic{number}"), interface.into()));
        NetworkConfig { version: 2, ethernets: named.collect() }
    }
}

#[derive(Serialize)]
struct Card<'a> {
    r#match: Match,
    #[serde(skip_serializing_if = "Option::is_none")]
    dhcp4: Option<bool>,
    #[serde(skip_serializing_if = "<[IpNet]>::is_empty")]
    addresses: &'a [IpNet],
    // netplan would rather have routes, and warns. cloud-init 22.4, of Debian 12, takes a route to `::/0` for one to `::/64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway4: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway6: Option<Ipv6Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nameservers: Option<NameServers<'a>>,
}

#[derive(Serialize)]
struct Match {
    macaddress: String,
}

#[derive(Serialize)]
struct NameServers<'a> {
    addresses: &'a [IpAddr],
}

impl<'a> From<&'a Interface> for Card<'a> {
    fn from(interface: &'a Interface) -> Self {
        let (dhcp4, addresses) = match &interface.addresses {
            Addresses::Dhcp => (Some(true), &[][..]),
            Addresses::Static(networks) => (None, &networks[..]),
        };
        let dns = &interface.dns[..];
        Card {
            r#match: Match { macaddress: interface.mac.to_string() },
            dhcp4,
            addresses,
            gateway4: interface.gateway4,
            gateway6: interface.gateway6,
            nameservers: (!dns.is_empty()).then_some(NameServers { addresses: dns }),
        }
    }
}
