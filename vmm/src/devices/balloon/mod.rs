//! virtio-balloon: takes memory from a guest that can spare it, asks it how it does, and takes back what it does not use. Every guest
//! has one, at 00:1d.0; it holds nothing until hostd sets a target.
//!
//! - [`ram`]: which memory the guest may give, and how the host takes it. Page numbers are the guest's words: pages that are not its
//!   RAM as ACPI and E820 tell it, tables among them, are refused and counted, and nothing but the guest's own memory is at stake.
//! - [`stats`]: what the guest says of itself, decoded. Asked for every [`STATS_INTERVAL`](engine::STATS_INTERVAL).
//! - [`engine`]: the queues, without thread and clock; [`device`] joins it to transport and thread.
//!
//! A page that the guest gives is dropped from the host at once. It reads as zeros from then on, also after the guest has taken it
//! back: a guest can count on nothing it has not written since. The page is noted as written, so that a migration sends the zeros and not
//! what was there before (peers-vmm §4.2 rule 2); with userfaultfd behind the memory the host sees the removal as an event (rule 11).
//!
//! Memory in huge pages stays the guest's: no target is set for it, and what its driver gives by itself is not touched and not counted.
//!
//! The driver may take memory back without asking when it has none left (DEFLATE_ON_OOM), and before the device has heard of it
//! (MUST_TELL_HOST is not offered): nothing here depends on a page staying given.

pub mod config;
pub mod device;
pub mod engine;
pub mod metrics;
pub mod ram;
pub mod state;
pub mod stats;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_hostile_drivers;

pub use device::{Balloon, BalloonHandle};
pub use ram::Ram;

/// Why the device cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread of the balloon")]
pub struct BalloonError(#[source] pub std::io::Error);
