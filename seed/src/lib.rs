//! The seed of a guest's first boot: a small read-only disk, labelled `CIDATA`, from which cloud-init's data source NoCloud takes
//! the guest's name, its user with keys, its network, and what the guest's owner wants done.
//!
//! [`Seed`] -> [`Seed::check`] (every rule and bound) -> `documents` (the files) -> `disk` (a FAT file system) -> bytes.
//!
//! The same seed gives the same bytes for ever: the target of a migration builds the disk anew, and the guest must not see it
//! change. So nothing here asks for the time, for random bytes or for the order of a hash map, and `tests/golden.rs` holds the
//! digests. What a guest remembers of its first boot is [`Seed::instance_id`]: another id is another first boot.

mod check;
mod disk;
mod documents;
mod error;

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use ipnet::IpNet;
use pnet_base::MacAddr;

pub use error::SeedError;

/// What a guest is told at its first boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// The guest applies a seed once for each id. Letters, digits, `-`, `_` and `.`; the VM's id serves.
    pub instance_id: String,
    /// RFC 1123; with dots the guest takes it as a full name, and what is before the first dot as its own.
    pub host_name: String,
    /// Without one the image's own default user is made, and nobody holds a key of it.
    pub user: Option<User>,
    /// Cards that are not named here are left to the guest; with none it asks DHCP on its first card.
    pub network: Vec<Interface>,
    /// The owner's part, handed on as it is: `#cloud-config`, a script (`#!`) or a MIME message. Where it speaks of the same
    /// setting as the rest of the seed, it wins.
    pub user_data: Option<String>,
}

/// The user that somebody logs in as, by key only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    /// Public keys, each as its `.pub` file holds it: kind, base64, and a comment or none.
    pub ssh_keys: Vec<String>,
    /// May become root without a password.
    pub sudo: bool,
}

/// A network card's part. The guest finds the card by its hardware address, whatever it calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub mac: MacAddr,
    pub addresses: Addresses,
    /// In a network of this card; with DHCP the server names it.
    pub gateway4: Option<Ipv4Addr>,
    /// Likewise, or link-local.
    pub gateway6: Option<Ipv6Addr>,
    pub dns: Vec<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addresses {
    /// DHCPv4. IPv6 follows the router's advertisements, as it does everywhere.
    Dhcp,
    /// With their networks: `10.77.9.5/24`.
    Static(Vec<IpNet>),
}

impl Seed {
    pub const MAX_INSTANCE_ID: usize = 128;
    /// RFC 1123.
    pub const MAX_HOST_NAME: usize = 253;
    /// A label between dots.
    pub const MAX_HOST_LABEL: usize = 63;
    /// Linux's own.
    pub const MAX_USER_NAME: usize = 32;
    pub const MAX_SSH_KEYS: usize = 16;
    /// An RSA key of 16384 bits has 2.8 KiB.
    pub const MAX_SSH_KEY: usize = 4 << 10;
    pub const MAX_INTERFACES: usize = 8;
    pub const MAX_ADDRESSES: usize = 16;
    /// Resolvers read three; some guests read more.
    pub const MAX_DNS: usize = 8;
    pub const MAX_USER_DATA: usize = 64 << 10;
    /// Every image has this size.
    pub const IMAGE_BYTES: usize = 1 << 20;

    /// All rules, and no image: what a definition must meet before it is kept.
    pub fn check(&self) -> Result<(), SeedError> {
        check::check(self)
    }
}

/// The disk, [`Seed::IMAGE_BYTES`] long.
pub fn image(seed: &Seed) -> Result<Vec<u8>, SeedError> {
    seed.check()?;
    let documents = documents::of(seed).map_err(|error| SeedError::Image(error.into()))?;
    disk::image(&documents).map_err(SeedError::Image)
}
