//! What a seed says, and what it refuses to say.

use std::net::IpAddr;

use crate::world::*;
use pnet_base::MacAddr;
use seed::Addresses;
use seed::Seed;
use seed::SeedError;
use seed::User;
use serde_json::json;

fn with_host_name(name: &str) -> Seed {
    Seed { host_name: name.to_owned(), ..least() }
}

fn with_user(name: &str, keys: &[&str]) -> Seed {
    let ssh_keys = keys.iter().map(|key| (*key).to_owned()).collect();
    Seed { user: Some(User { name: name.to_owned(), ssh_keys, sudo: false }), ..least() }
}

fn with_addresses(addresses: &[&str]) -> Seed {
    let addresses = addresses.iter().map(|text| text.parse().expect("a network")).collect();
    with_card(|card| {
        card.addresses = Addresses::Static(addresses);
        (card.gateway4, card.gateway6) = (None, None);
    })
}

fn with_gateway(gateway: &str) -> Seed {
    with_card(|card| match gateway.parse().expect("an address") {
        IpAddr::V4(v4) => card.gateway4 = Some(v4),
        IpAddr::V6(v6) => card.gateway6 = Some(v6),
    })
}

#[test]
fn a_full_seed_says_everything_in_its_file() {
    let files = files(&image(&full()));
    let meta = json!({"instance-id": "6b1f3f0e-4a35-4b7a-9a51-0d5cf7f4c1aa", "local-hostname": "web1.example.org"});
    assert_eq!(json(&files, "meta-data"), meta);
    assert_eq!(files["user-data"], "#cloud-config\npackages: [nginx]\n");
    assert!(files["vendor-data"].starts_with("#cloud-config\n"), "{}", files["vendor-data"]);
    let user = json!({
        "name": "alice",
        "ssh_authorized_keys": [key("alice@desk"), key("")],
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
    });
    assert_eq!(json(&files, "vendor-data"), json!({"users": [user]}));
    let first = json!({
        "match": {"macaddress": "52:54:00:01:02:03"},
        "addresses": ["10.77.9.5/24", "fd00::5/64"],
        "gateway4": "10.77.9.1",
        "gateway6": "fe80::1",
        "nameservers": {"addresses": ["10.77.9.2", "fd00::2"]},
    });
    let second = json!({"match": {"macaddress": "52:54:00:01:02:04"}, "dhcp4": true});
    assert_eq!(json(&files, "network-config"), json!({"version": 2, "ethernets": {"nic0": first, "nic1": second}}));
}

#[test]
fn what_is_not_asked_for_is_left_to_the_guest() {
    let files = files(&image(&least()));
    assert_eq!(files.keys().collect::<Vec<_>>(), ["meta-data", "user-data"]);
    assert_eq!(files["user-data"], "#cloud-config\n{}\n");
}

#[test]
fn host_names_are_those_of_rfc_1123() {
    for name in ["web1", "WEB-1", "1", "3com", "a.b.c", "web1.example.org", "1.2.3.x4"] {
        assert!(with_host_name(name).check().is_ok(), "{name}");
    }
    for name in ["", ".", "a.", ".a", "a..b", "-a", "a-", "a_b", "a b", "a\n", "ä", "a.-b", "a/b"] {
        assert!(matches!(with_host_name(name).check(), Err(SeedError::HostLabel { .. })), "{name:?}");
    }
    for name in ["10.77.9.5", "a.1"] {
        assert!(matches!(with_host_name(name).check(), Err(SeedError::HostNameIsAddress { .. })), "{name}");
    }
}

#[test]
fn user_names_are_those_that_every_linux_takes() {
    for name in ["alice", "_x", "a-b_c9"] {
        assert!(with_user(name, &[&key("")]).check().is_ok(), "{name}");
    }
    for name in ["", "Alice", "9a", "-a", "a b", "a:b", "a\n", "../x", "é"] {
        assert!(matches!(with_user(name, &[&key("")]).check(), Err(SeedError::UserName { .. })), "{name:?}");
    }
    assert!(matches!(with_user("alice", &[]).check(), Err(SeedError::UserWithoutKey { .. })));
}

#[test]
fn keys_are_public_keys_of_a_kind_that_sshd_takes() {
    let rsa = key_of("ssh-rsa", &[1; 2048], "an old one");
    let token = key_of("sk-ssh-ed25519@openssh.com", &[1; 32], "");
    assert!(with_user("alice", &[&key("a b c"), &rsa, &token]).check().is_ok());
    let good = key("");
    let cut = &good[..good.len() - 8];
    let other_kind = good.replace("ssh-ed25519", "ssh-rsa");
    let with_options = format!("no-pty {good}");
    let private = "-----BEGIN OPENSSH PRIVATE KEY-----";
    for wrong in [
        "",
        "ssh-ed25519",
        "ssh-ed25519 ",
        "ssh-ed25519 !",
        cut,
        &other_kind,
        &with_options,
        private,
        " ",
        "ssh-dss AAAA",
    ] {
        let error = with_user("alice", &[&key(""), wrong]).check().expect_err("no key");
        assert!(matches!(error, SeedError::SshKey { number: 2, .. }), "{wrong:?}: {error}");
    }
}

#[test]
fn addresses_are_of_one_machine_with_its_network() {
    for good in ["10.77.9.5/24", "10.0.0.0/31", "10.0.0.1/32", "fd00::/64", "2001:db8::1/128"] {
        assert!(with_addresses(&[good]).check().is_ok(), "{good}");
    }
    for wrong in [
        "10.77.9.0/24",
        "10.77.9.255/24",
        "0.0.0.0/8",
        "10.0.0.1/0",
        "224.0.0.1/24",
        "127.0.0.2/8",
        "::1/128",
        "ff02::1/64",
    ] {
        assert!(matches!(with_addresses(&[wrong]).check(), Err(SeedError::Address { .. })), "{wrong}");
    }
    assert!(matches!(with_addresses(&[]).check(), Err(SeedError::NoAddress { .. })));
    let twice = with_addresses(&["10.0.0.1/24", "10.0.0.1/16"]).check();
    assert!(matches!(twice, Err(SeedError::SameAddress { .. })));
}

#[test]
fn a_gateway_is_one_that_the_guest_can_reach() {
    for good in ["10.77.9.1", "10.77.9.254", "fd00::1", "fe80::1"] {
        assert!(with_gateway(good).check().is_ok(), "{good}");
    }
    for outside in ["10.77.8.1", "10.77.9.5", "fd01::1", "fd00::5"] {
        let error = with_gateway(outside).check();
        assert!(matches!(error, Err(SeedError::GatewayOutside { .. })), "{outside}");
    }
    let without_v6 =
        with_card(|card| card.addresses = Addresses::Static(vec!["10.77.9.5/24".parse().expect("a network")]));
    assert!(matches!(without_v6.check(), Err(SeedError::GatewayOutside { .. })));
    let with_dhcp = with_card(|card| card.addresses = Addresses::Dhcp);
    assert!(matches!(with_dhcp.check(), Err(SeedError::GatewayOutside { .. })));
}

#[test]
fn a_name_server_is_one_machine() {
    for wrong in ["0.0.0.0", "255.255.255.255", "224.0.0.251", "::"] {
        let seed = with_card(|card| card.dns = vec![wrong.parse().expect("an address")]);
        assert!(matches!(seed.check(), Err(SeedError::NameServer { .. })), "{wrong}");
    }
    assert!(with_card(|card| card.dns = vec!["127.0.0.53".parse().expect("an address")]).check().is_ok());
}

#[test]
fn cards_are_told_apart_by_their_hardware_addresses() {
    for wrong in [MacAddr::zero(), MacAddr::broadcast(), MacAddr::new(1, 0, 0x5e, 0, 0, 1)] {
        assert!(matches!(with_card(|card| card.mac = wrong).check(), Err(SeedError::Mac { .. })), "{wrong}");
    }
    let mut seed = full();
    seed.network[1].mac = MAC;
    assert!(matches!(seed.check(), Err(SeedError::SameMac { mac: MAC })));
}

#[test]
fn user_data_is_of_a_kind_that_guests_act_on() {
    let mime = "Content-Type: multipart/mixed; boundary=\"b\"\nMIME-Version: 1.0\n\n--b\n";
    for good in ["#cloud-config", "#cloud-config \r\na: b", "#!/bin/sh\n", "#!", mime, &mime.to_lowercase()] {
        assert!(with_user_data(good).check().is_ok(), "{good:?}");
    }
    let without_version = "Content-Type: text/x-shellscript\n\nMIME-Version: 1.0\n";
    for wrong in
        ["", "\n#!/bin/sh", "echo", "#cloud-confi", "#cloud-config-archive\n", "# cloud-config", without_version]
    {
        assert!(matches!(with_user_data(wrong).check(), Err(SeedError::UserDataKind { .. })), "{wrong:?}");
    }
}
