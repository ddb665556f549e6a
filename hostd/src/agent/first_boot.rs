//! A guest's first boot: the seed's disk, from the VM's definition. The same on every host, because a migration's target makes it anew.

use std::net::IpAddr;

use ipnet::IpNet;
use seed::Addresses;
use seed::Seed;
use seed::SeedError;
use statemachine::ids::VmId;
use statemachine::state::FirstBoot;
use statemachine::state::Interface;
use statemachine::state::Nic;
use statemachine::state::VmSpec;
use thiserror::Error;
use vmm_control::DiskConfig;

use super::run_dir::RunDir;

/// What the guest sees as the disk's serial, and its vmm as its name; no device of a definition has a capital letter.
pub const DISK: &str = "CIDATA";

#[derive(Debug, Error)]
pub enum FirstBootError {
    #[error("first boot: {what} {text:?} is not understood")]
    Malformed { what: &'static str, text: String },
    #[error("first boot: there is no network card {0}")]
    NoCard(String),
    #[error("first boot: {0}")]
    Seed(#[from] SeedError),
}

/// The disk's bytes.
pub fn image(vm: VmId, spec: &VmSpec, first_boot: &FirstBoot) -> Result<Vec<u8>, FirstBootError> {
    let mut network = Vec::with_capacity(first_boot.interfaces.len());
    for interface in &first_boot.interfaces {
        network.push(card(vm, &spec.nics, interface, &first_boot.dns)?);
    }
    let user = first_boot.user.as_ref().map(|user| seed::User {
        name: user.name.clone(),
        ssh_keys: user.ssh_keys.clone(),
        sudo: true,
    });
    Ok(seed::image(&Seed {
        instance_id: vm.to_string(),
        host_name: first_boot.host_name.clone(),
        user,
        network,
        user_data: first_boot.user_data.clone(),
    })?)
}

fn card(vm: VmId, nics: &[Nic], interface: &Interface, dns: &[String]) -> Result<seed::Interface, FirstBootError> {
    let nic = nics.iter().find(|nic| nic.id == interface.nic);
    let nic = nic.ok_or_else(|| FirstBootError::NoCard(interface.nic.clone()))?;
    let addresses: Vec<IpNet> = parsed("address", &interface.addresses)?;
    let gateway = interface.gateway.as_ref().map(|text| parse("gateway", text)).transpose()?;
    let (gateway4, gateway6) = match gateway {
        Some(IpAddr::V4(gateway)) => (Some(gateway), None),
        Some(IpAddr::V6(gateway)) => (None, Some(gateway)),
        None => (None, None),
    };
    Ok(seed::Interface {
        mac: nic.mac_of(vm),
        addresses: if addresses.is_empty() { Addresses::Dhcp } else { Addresses::Static(addresses) },
        gateway4,
        gateway6,
        dns: parsed("name server", dns)?,
    })
}

fn parsed<T: std::str::FromStr>(what: &'static str, texts: &[String]) -> Result<Vec<T>, FirstBootError> {
    texts.iter().map(|text| parse(what, text)).collect()
}

fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T, FirstBootError> {
    text.parse().map_err(|_| FirstBootError::Malformed { what, text: text.to_owned() })
}

/// Where the guest finds it.
pub fn disk(run_dir: &RunDir) -> DiskConfig {
    DiskConfig {
        id: DISK.to_owned(),
        path: run_dir.seed_file(),
        read_only: true,
        serial: DISK.to_owned(),
        slot: Some(FirstBoot::SLOT),
        ..DiskConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use pnet_base::MacAddr;
    use statemachine::state::FirstUser;
    use uuid::Uuid;

    use super::*;

    fn first_boot() -> FirstBoot {
        FirstBoot {
            host_name: "web1".to_owned(),
            user: Some(FirstUser {
                name: "me".to_owned(),
                ssh_keys: vec![
                    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFK5sVQWtqKXSb4hM3XBgn5Xk8GZfXXkq0s2xUrXqZ3x me".to_owned(),
                ],
            }),
            interfaces: vec![Interface {
                nic: "lan".to_owned(),
                addresses: vec!["192.0.2.5/24".to_owned(), "2001:db8::5/64".to_owned()],
                gateway: Some("192.0.2.1".to_owned()),
            }],
            dns: vec!["192.0.2.53".to_owned()],
            user_data: Some("#!/bin/sh\nexit 0\n".to_owned()),
        }
    }

    fn spec() -> VmSpec {
        let mac = Some(MacAddr::new(2, 0, 0, 0, 0, 1));
        VmSpec {
            nics: vec![Nic { id: "lan".to_owned(), bridge: "br0".to_owned(), mac, slot: None }],
            ..VmSpec::default()
        }
    }

    fn made(vm: u128, first_boot: &FirstBoot) -> Result<Vec<u8>, FirstBootError> {
        image(VmId(Uuid::from_u128(vm)), &spec(), first_boot)
    }

    fn holds(image: &[u8], text: &str) -> bool {
        image.windows(text.len()).any(|bytes| bytes == text.as_bytes())
    }

    #[test]
    fn the_seed_tells_the_guest_what_its_definition_says() {
        let image = made(7, &first_boot()).unwrap();
        for text in [
            "web1",
            "ssh-ed25519 AAAA",
            "02:00:00:00:00:01",
            "192.0.2.5/24",
            "2001:db8::5/64",
            "192.0.2.1",
            "192.0.2.53",
            "exit 0",
        ] {
            assert!(holds(&image, text), "{text}");
        }
        assert!(holds(&image, &VmId(Uuid::from_u128(7)).to_string()), "applied once for each VM");
        assert_eq!(made(7, &first_boot()).unwrap(), image, "a migration's target makes the same");
        assert_ne!(made(8, &first_boot()).unwrap(), image);
    }

    #[test]
    fn a_card_without_addresses_asks_for_one() {
        let mut by_dhcp = first_boot();
        by_dhcp.interfaces[0].addresses.clear();
        by_dhcp.interfaces[0].gateway = None;
        let image = made(7, &by_dhcp).unwrap();
        assert!(holds(&image, "dhcp4") && !holds(&image, "192.0.2.5/"));
    }

    #[test]
    fn what_makes_no_seed_is_refused_in_words() {
        let mut wrong = first_boot();
        wrong.interfaces[0].nic = "wan".to_owned();
        assert_eq!(made(7, &wrong).unwrap_err().to_string(), "first boot: there is no network card wan");
        let mut wrong = first_boot();
        wrong.interfaces[0].addresses = vec!["192.0.2.5/33".to_owned()];
        assert!(made(7, &wrong).unwrap_err().to_string().contains("192.0.2.5/33"));
        let wrong = FirstBoot { host_name: "-".to_owned(), ..first_boot() };
        assert!(matches!(made(7, &wrong), Err(FirstBootError::Seed(_))));
    }
}
