//! The bytes of a seed never change: the target of a migration builds the disk anew under a running guest. A test here that fails
//! after a change of this crate, or of the crate that writes FAT, says that guests would see their disk change; then the old form
//! must stay for the guests that run.

use crate::world::*;
use seed::Seed;

fn digest(seed: &Seed) -> String {
    blake3::hash(&image(seed)).to_hex().to_string()
}

#[test]
fn the_bytes_of_a_seed_never_change() {
    let digests = [least(), full(), with_user_data("#!/bin/sh\necho hello\n")].map(|seed| digest(&seed));
    assert_eq!(
        digests,
        [
            "6ddce862efdca101579f415bbc785a1e8fe5ebabda1c8a1c9fe9618647326333",
            "a1c87fa50cdf46d7511ed85da44e86397c80ac79ea2add40d6e811f345657588",
            "3b516cbcc9d455af19270935cec3ba506f41f03fd6bf0b209c857454755b7878",
        ]
    );
}

#[test]
fn another_seed_is_another_disk() {
    let other = Seed { instance_id: "i-2".to_owned(), ..least() };
    assert_ne!(digest(&other), digest(&least()));
}
