//! The devices of a guest, a folder each.

pub mod balloon;
pub mod block;
pub mod console;
pub mod legacy;
pub mod net;
pub mod rng;
pub mod watchdog;
