//! The host's part of a guest's network: a tap for each card, plugged into the bridge that the card names.
//!
//! A [`tap::Tap`] is a descriptor, and lives as long as a process has it open: hostd makes it at launch, the vmm inherits it and
//! needs no right on the network itself, and when the vmm ends the tap is gone, whoever is there to see it. Nothing has to be
//! cleaned up, and an adopted guest keeps its cards.
//!
//! Bridges are the administrator's: hostd looks for the one that a card names, and says what to type when there is none.

pub mod tap;

use std::io;

use thiserror::Error;

/// Why a card cannot be plugged in.
#[derive(Debug, Error)]
pub enum NetworkError {
    #[error("cannot make a tap from /dev/net/tun: {0}; is the module `tun` loaded?")]
    Tap(#[source] io::Error),
    #[error("cannot talk to the kernel's network: {0}")]
    Netlink(#[source] io::Error),
    #[error(
        "this host has no interface {bridge}; make one with `ip link add {bridge} type bridge`, or change the card's bridge"
    )]
    NoBridge { bridge: String },
    #[error("{bridge} of this host is no bridge; name one with `quorate vm change --nic`")]
    NotABridge { bridge: String },
    #[error("cannot {what} {name}: {source}")]
    Link {
        what: &'static str,
        name: String,
        #[source]
        source: rtnetlink::Error,
    },
}
