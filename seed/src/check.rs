//! The rules of a seed. Some are the guest's (a name that Linux takes); the others keep what somebody typed from meaning something
//! else in the guest, or nothing at all.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::net::Ipv4Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::IpNet;

use crate::Addresses;
use crate::Interface;
use crate::Seed;
use crate::SeedError;
use crate::User;
use crate::error::KeyFault;

/// What `sshd` takes in `authorized_keys`. DSA is left out, since OpenSSH refuses it.
const KEY_KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// How far cloud-init looks for the header that makes user data a MIME message.
const MIME_HEADER_WITHIN: usize = 4096;
/// Of wrong user data, in its error.
const SHOWN_SIGNS: usize = 32;

pub fn check(seed: &Seed) -> Result<(), SeedError> {
    instance_id(&seed.instance_id)?;
    host_name(&seed.host_name)?;
    seed.user.as_ref().map_or(Ok(()), user)?;
    network(&seed.network)?;
    seed.user_data.as_deref().map_or(Ok(()), user_data)
}

fn instance_id(id: &str) -> Result<(), SeedError> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let fits = (1..=Seed::MAX_INSTANCE_ID).contains(&id.len()) && id.bytes().all(known);
    if fits { Ok(()) } else { Err(SeedError::InstanceId { length: id.len() }) }
}

fn host_name(name: &str) -> Result<(), SeedError> {
    if name.len() > Seed::MAX_HOST_NAME {
        return Err(SeedError::HostNameLength { length: name.len() });
    }
    if let Some(wrong) = name.split('.').find(|label| !is_host_label(label)) {
        return Err(SeedError::HostLabel { label: wrong.to_owned() });
    }
    // RFC 1123, 2.1: a name is told from an address by its last label.
    let last = name.rsplit('.').next().unwrap_or(name);
    if name.contains('.') && last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(SeedError::HostNameIsAddress { name: name.to_owned() });
    }
    Ok(())
}

fn is_host_label(label: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=Seed::MAX_HOST_LABEL).contains(&label.len())
        && label.bytes().all(known)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn user(user: &User) -> Result<(), SeedError> {
    let is_first = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    let known = |byte: u8| is_first(byte) || byte.is_ascii_digit() || byte == b'-';
    let starts = user.name.bytes().next().is_some_and(is_first);
    if !starts || user.name.len() > Seed::MAX_USER_NAME || !user.name.bytes().all(known) {
        let name = user.name.chars().take(Seed::MAX_USER_NAME + 1).collect();
        return Err(SeedError::UserName { name });
    }
    if user.ssh_keys.is_empty() {
        return Err(SeedError::UserWithoutKey { user: user.name.clone() });
    }
    if user.ssh_keys.len() > Seed::MAX_SSH_KEYS {
        return Err(SeedError::TooManyKeys { count: user.ssh_keys.len() });
    }
    for (number, key) in (1..).zip(&user.ssh_keys) {
        ssh_key(key).map_err(|why| SeedError::SshKey { number, why })?;
    }
    Ok(())
}

fn ssh_key(key: &str) -> Result<(), KeyFault> {
    if key.len() > Seed::MAX_SSH_KEY {
        return Err(KeyFault::Length { length: key.len() });
    }
    // A second line would be a second key, with options of its own choice.
    if !key.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err(KeyFault::Sign);
    }
    let (kind, rest) = key.split_once(' ').ok_or(KeyFault::Kind)?;
    if !KEY_KINDS.contains(&kind) {
        return Err(KeyFault::Kind);
    }
    let text = rest.split(' ').next().unwrap_or_default();
    let blob = BASE64.decode(text).map_err(|_| KeyFault::Base64)?;
    is_blob_of(kind, &blob).then_some(()).ok_or(KeyFault::Content)
}

/// RFC 4253, 6.6: a key is a row of strings, each after its length in four bytes, and the first is its kind.
fn is_blob_of(kind: &str, mut blob: &[u8]) -> bool {
    let mut strings = Vec::new();
    while let Some((length, rest)) = blob.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((string, rest)) = rest.split_at_checked(length) else { return false };
        strings.push(string);
        blob = rest;
    }
    blob.is_empty() && strings.len() > 1 && strings[0] == kind.as_bytes()
}

fn network(interfaces: &[Interface]) -> Result<(), SeedError> {
    if interfaces.len() > Seed::MAX_INTERFACES {
        return Err(SeedError::TooManyInterfaces { count: interfaces.len() });
    }
    let mut seen = BTreeSet::new();
    for interface in interfaces {
        let mac = interface.mac;
        if mac.is_zero() || !mac.is_unicast() {
            return Err(SeedError::Mac { mac });
        }
        if !seen.insert(mac.octets()) {
            return Err(SeedError::SameMac { mac });
        }
        let networks: &[IpNet] = match &interface.addresses {
            Addresses::Dhcp => &[],
            Addresses::Static(networks) if networks.is_empty() => return Err(SeedError::NoAddress { mac }),
            Addresses::Static(networks) => networks,
        };
        addresses(interface, networks)?;
        gateways(interface, networks)?;
        name_servers(interface)?;
    }
    Ok(())
}

fn addresses(interface: &Interface, networks: &[IpNet]) -> Result<(), SeedError> {
    let mac = interface.mac;
    if networks.len() > Seed::MAX_ADDRESSES {
        return Err(SeedError::TooManyAddresses { mac, count: networks.len() });
    }
    let mut seen = BTreeSet::new();
    for network in networks {
        let ends = match network {
            // The first and the last of an IPv4 network are no machine's, except where there is nothing between them.
            IpNet::V4(v4) if v4.prefix_len() < 31 => v4.addr() == v4.network() || v4.addr() == v4.broadcast(),
            _ => false,
        };
        if ends || !is_of_one_machine(network.addr()) || network.addr().is_loopback() || network.prefix_len() == 0 {
            return Err(SeedError::Address { address: *network });
        }
        if !seen.insert(network.addr()) {
            return Err(SeedError::SameAddress { mac, address: network.addr() });
        }
    }
    Ok(())
}

fn gateways(interface: &Interface, networks: &[IpNet]) -> Result<(), SeedError> {
    let both = [interface.gateway4.map(IpAddr::V4), interface.gateway6.map(IpAddr::V6)];
    match both.into_iter().flatten().find(|gateway| !is_reached(gateway, networks)) {
        Some(gateway) => Err(SeedError::GatewayOutside { mac: interface.mac, gateway }),
        None => Ok(()),
    }
}

fn is_reached(gateway: &IpAddr, networks: &[IpNet]) -> bool {
    let is_own = networks.iter().any(|network| network.addr() == *gateway);
    let is_near = networks.iter().any(|network| network.contains(gateway));
    let is_link_local = matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let speaks_v6 = networks.iter().any(|network| network.addr().is_ipv6());
    !is_own && (is_near || is_link_local && speaks_v6)
}

fn name_servers(interface: &Interface) -> Result<(), SeedError> {
    if interface.dns.len() > Seed::MAX_DNS {
        return Err(SeedError::TooManyNameServers { mac: interface.mac, count: interface.dns.len() });
    }
    match interface.dns.iter().find(|address| !is_of_one_machine(**address)) {
        Some(wrong) => Err(SeedError::NameServer { address: *wrong }),
        None => Ok(()),
    }
}

fn is_of_one_machine(address: IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && address != IpAddr::V4(Ipv4Addr::BROADCAST)
}

fn user_data(text: &str) -> Result<(), SeedError> {
    if text.len() > Seed::MAX_USER_DATA {
        return Err(SeedError::UserDataLength { length: text.len() });
    }
    let first_line = text.lines().next().unwrap_or_default();
    let is_config = first_line.trim_end() == "#cloud-config";
    if is_config || text.starts_with("#!") || is_mime(text) {
        return Ok(());
    }
    Err(SeedError::UserDataKind { start: first_line.chars().take(SHOWN_SIGNS).collect() })
}

/// cloud-init parses a message where it finds `MIME-Version:` near the start; without `Content-Type:` it would be plain text.
fn is_mime(text: &str) -> bool {
    let head: Vec<u8> = text.bytes().take(MIME_HEADER_WITHIN).map(|byte| byte.to_ascii_lowercase()).collect();
    let head = String::from_utf8_lossy(&head);
    let headers: Vec<&str> = head.lines().take_while(|line| !line.is_empty()).collect();
    let has = |name: &str| headers.iter().any(|line| line.starts_with(name));
    let begins = ["mime-version:", "content-type:"].iter().any(|name| head.starts_with(name));
    begins && has("mime-version:") && has("content-type:")
}
