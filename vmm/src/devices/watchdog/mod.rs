//! The watchdog: the timer of Intel's 6300ESB south bridge (datasheet 300641, chapter "Watchdog timer"), as QEMU's machines have it,
//! because every Linux has a driver for that one (i6300esb). At 00:1b.0, for guests whose configuration asks for one.
//!
//! - [`timer`]: the registers and both stages as a pure state machine, with a clock from outside.
//! - [`device`]: the PCI function around it, and the thread that waits for its end.
//!
//! The clock is the time that the guest was let run ([`RunGate::ran_for`](crate::cpu::gate::RunGate::ran_for)): a guest that stands
//! still, for whichever reason, and one that was saved, finds as much time left as it had (peers-vmm §4.2 rule 32).
//!
//! It is a conventional PCI function, as the chip's is: its registers lie where a PCI Express capability would have to be.

pub mod device;
pub mod timer;

#[cfg(test)]
mod tests;

pub use device::{Watchdog, WatchdogHandle};

/// Why the watchdog cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the watchdog's thread")]
pub struct WatchdogError(#[source] pub std::io::Error);
