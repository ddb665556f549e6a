//! What a guest is told when it boots for the first time: cloud-init's NoCloud seed, as a small disk of its own.

use serde::Deserialize;
use serde::Serialize;

/// The seed is built from this and the VM's id, on every host to the same bytes. A guest applies it once for its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstBoot {
    pub host_name: String,
    #[serde(default)]
    pub user: Option<FirstUser>,
    /// Of the cards that are named here; the others are left to the image.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Name servers, as IP addresses.
    #[serde(default)]
    pub dns: Vec<String>,
    /// The user's own: `#cloud-config`, a script that begins with `#!`, or MIME parts.
    #[serde(default)]
    pub user_data: Option<String>,
}

impl FirstBoot {
    /// The slot of the seed's disk, which no other device may have.
    pub const SLOT: u8 = 16;
    pub const MAX_KEYS: usize = 16;
    pub const MAX_KEY_BYTES: usize = 8192;
    pub const MAX_ADDRESSES: usize = 8;
    pub const MAX_DNS: usize = 4;
    /// As cloud providers take it.
    pub const MAX_USER_DATA_BYTES: usize = 16 << 10;
}

/// A user who may do everything, and logs in by key alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstUser {
    pub name: String,
    /// As lines of OpenSSH's `authorized_keys`, without options.
    pub ssh_keys: Vec<String>,
}

/// How the guest is to set up a network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// The card's id in the definition.
    pub nic: String,
    /// With the length of their prefix, as `192.0.2.5/24`; none: by DHCP.
    #[serde(default)]
    pub addresses: Vec<String>,
    #[serde(default)]
    pub gateway: Option<String>,
}
