//! The longest of everything fits the disk, and one more is refused.

use crate::world::*;
use pnet_base::MacAddr;
use seed::Addresses;
use seed::Interface;
use seed::Seed;
use seed::SeedError;
use seed::User;

fn longest_key() -> String {
    let short = key("");
    let comment = "\"".repeat(Seed::MAX_SSH_KEY - short.len() - 1);
    format!("{short} {comment}")
}

fn card(number: usize) -> Interface {
    let byte = u8::try_from(number).expect("a small number");
    let address = |at: usize| format!("2001:db8:ffff:ffff:ffff:ffff:{number:x}fff:f{at:03x}/64");
    Interface {
        mac: MacAddr::new(2, 0, 0, 0, 0, byte),
        addresses: Addresses::Static(
            (0..Seed::MAX_ADDRESSES).map(|at| address(at).parse().expect("an address")).collect(),
        ),
        gateway4: None,
        gateway6: Some("fe80::ffff:ffff:ffff:ffff".parse().expect("an address")),
        dns: vec!["2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().expect("an address"); Seed::MAX_DNS],
    }
}

fn longest() -> Seed {
    let label = "a".repeat(Seed::MAX_HOST_LABEL);
    Seed {
        instance_id: "i".repeat(Seed::MAX_INSTANCE_ID),
        host_name: [&label[..], &label, &label, &label[..61]].join("."),
        user: Some(User {
            name: "a".repeat(Seed::MAX_USER_NAME),
            ssh_keys: vec![longest_key(); Seed::MAX_SSH_KEYS],
            sudo: true,
        }),
        network: (0..Seed::MAX_INTERFACES).map(card).collect(),
        user_data: Some(format!("#!{}", "x".repeat(Seed::MAX_USER_DATA - 2))),
    }
}

#[test]
fn the_longest_seed_fits_its_disk_and_comes_out_whole() {
    let seed = longest();
    assert_eq!(seed.host_name.len(), Seed::MAX_HOST_NAME);
    let image = image(&seed);
    assert_eq!(image.len(), Seed::IMAGE_BYTES);
    let files = files(&image);
    assert_eq!(files["user-data"].len(), Seed::MAX_USER_DATA);
    let keys = &json(&files, "vendor-data")["users"][0]["ssh_authorized_keys"];
    assert_eq!(keys.as_array().map(Vec::len), Some(Seed::MAX_SSH_KEYS));
    assert_eq!(keys[15], longest_key().as_str());
    assert_eq!(json(&files, "network-config")["ethernets"].as_object().map(serde_json::Map::len), Some(8));
}

/// A part of a seed that is made one too long, and what is said of it.
type Excess = (fn(&mut Seed), fn(&SeedError) -> bool);

#[test]
fn one_more_is_refused() {
    let cases: [Excess; 9] = [
        (|seed| seed.instance_id.push('i'), |error| matches!(error, SeedError::InstanceId { length: 129 })),
        (|seed| seed.host_name.push('a'), |error| matches!(error, SeedError::HostNameLength { length: 254 })),
        (
            |seed| seed.host_name = "a".repeat(64),
            |error| matches!(error, SeedError::HostLabel { label } if label.len() == 64),
        ),
        (
            |seed| seed.user.as_mut().expect("a user").name.push('a'),
            |error| matches!(error, SeedError::UserName { name } if name.len() == 33),
        ),
        (
            |seed| seed.user.as_mut().expect("a user").ssh_keys.push(key("")),
            |error| matches!(error, SeedError::TooManyKeys { count: 17 }),
        ),
        (
            |seed| seed.user.as_mut().expect("a user").ssh_keys[3].push('x'),
            |error| matches!(error, SeedError::SshKey { number: 4, .. }),
        ),
        (|seed| seed.network.push(card(9)), |error| matches!(error, SeedError::TooManyInterfaces { count: 9 })),
        (
            |seed| seed.network[7].dns.push("9.9.9.9".parse().expect("an address")),
            |error| matches!(error, SeedError::TooManyNameServers { count: 9, .. }),
        ),
        (
            |seed| seed.user_data.as_mut().expect("user data").push(' '),
            |error| matches!(error, SeedError::UserDataLength { length: 65_537 }),
        ),
    ];
    for (number, (lengthen, is_right)) in cases.into_iter().enumerate() {
        let mut seed = longest();
        lengthen(&mut seed);
        let error = seed.check().expect_err("one too many");
        assert!(is_right(&error), "case {number}: {error}");
    }
    let mut seed = longest();
    let Addresses::Static(addresses) = &mut seed.network[0].addresses else { unreachable!("cards have addresses") };
    addresses.push("10.0.0.1/24".parse().expect("an address"));
    assert!(matches!(seed.check(), Err(SeedError::TooManyAddresses { count: 17, .. })));
}
