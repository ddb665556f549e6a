use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use pnet_base::MacAddr;
use thiserror::Error;

use crate::Seed;

/// Why a seed cannot be. Text of the caller is repeated only where it is short, and printable by its `Debug` form.
#[derive(Debug, Error)]
pub enum SeedError {
    #[error(
        "an instance id of {length} bytes or with other signs cannot be: use 1 to {} letters, digits, `-`, `_` and `.`",
        Seed::MAX_INSTANCE_ID
    )]
    InstanceId { length: usize },
    #[error("the host name has {length} bytes and may have {}: shorten it", Seed::MAX_HOST_NAME)]
    HostNameLength { length: usize },
    #[error(
        "{label:?} in the host name is no label of RFC 1123: use 1 to {} letters, digits and `-`, with `-` neither first nor last",
        Seed::MAX_HOST_LABEL
    )]
    HostLabel { label: String },
    #[error("the host name {name:?} would be read as an address: use a name with a letter in its last label")]
    HostNameIsAddress { name: String },
    #[error(
        "{name:?} is no user name that every Linux takes: begin with a small letter or `_`, go on with small letters, digits, \
         `-` and `_`, {} at most",
        Seed::MAX_USER_NAME
    )]
    UserName { name: String },
    #[error("nobody could log in as {user}: give the user a key, or describe the user in user data")]
    UserWithoutKey { user: String },
    #[error(
        "{count} keys are more than the {} that a user may have: put the others into user data",
        Seed::MAX_SSH_KEYS
    )]
    TooManyKeys { count: usize },
    #[error("key {number}: {why}; give the line of a .pub file, as in `ssh-ed25519 AAAA... name`")]
    SshKey {
        /// Counted from 1, as the user gave them.
        number: usize,
        #[source]
        why: KeyFault,
    },
    #[error("{count} cards are more than the {} that a guest may have: describe fewer", Seed::MAX_INTERFACES)]
    TooManyInterfaces { count: usize },
    #[error("{mac} cannot be the hardware address of a card: give the one that the card has")]
    Mac { mac: MacAddr },
    #[error(
        "two cards have the hardware address {mac}, and the guest could not tell them apart: describe each card once"
    )]
    SameMac { mac: MacAddr },
    #[error("the card {mac} has neither DHCP nor an address: give it one of them, or leave it out")]
    NoAddress { mac: MacAddr },
    #[error("the card {mac} has {count} addresses and may have {}: give it fewer", Seed::MAX_ADDRESSES)]
    TooManyAddresses { mac: MacAddr, count: usize },
    #[error(
        "{address} cannot be the address of a card: give an address of one machine with its network, as in 10.77.9.5/24"
    )]
    Address { address: IpNet },
    #[error("the card {mac} has the address {address} twice: give it once")]
    SameAddress { mac: MacAddr, address: IpAddr },
    #[error(
        "the gateway {gateway} is no other machine in a network of the card {mac}, so the guest could not reach it: give one that \
         is, and none with DHCP, which brings its own"
    )]
    GatewayOutside { mac: MacAddr, gateway: IpAddr },
    #[error("the card {mac} has {count} name servers and may have {}: give it fewer", Seed::MAX_DNS)]
    TooManyNameServers { mac: MacAddr, count: usize },
    #[error("{address} cannot be a name server: give the address of one machine")]
    NameServer { address: IpAddr },
    #[error(
        "user data has {length} bytes and may have {}: let it fetch the rest from the network",
        Seed::MAX_USER_DATA
    )]
    UserDataLength { length: usize },
    #[error(
        "user data begins with {start:?}, which no guest would act on: begin with `#cloud-config`, with `#!` for a script, or \
         with the header `MIME-Version:` or `Content-Type:` of a MIME message that has both"
    )]
    UserDataKind { start: String },
    #[error("cannot lay out the seed's file system; this is a fault of this program, please report it")]
    Image(#[source] io::Error),
}

/// What is wrong with one key.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyFault {
    #[error("it has {length} bytes, and may have {}", Seed::MAX_SSH_KEY)]
    Length { length: usize },
    #[error("it holds a line break or a sign that is not printable ASCII")]
    Sign,
    #[error("it does not begin with a kind of key that OpenSSH knows")]
    Kind,
    #[error("what follows its kind is no base64")]
    Base64,
    #[error("what follows its kind is a key of another kind, or cut off")]
    Content,
}
