//! virtio-net: a network card of the guest on a tap of the host, with checksums and TCP segments left to whoever can do them best.
//!
//! Path of a frame from the guest: [`thread`] wakes on the doorbell and runs the [`engine`]; [`transmit`] pops a chain, judges its
//! header ([`header`], pure) and hands header and frame to the [`tap`] in one `writev`, straight from guest memory. To the guest:
//! the tap becomes readable, and [`receive`] reads the frame with one `readv` into the buffers that the driver has put out, as many
//! as it needs (MRG_RXBUF), then gives them back together. When the guest has put out none, the frame stays in the tap's queue,
//! and what no longer fits there is dropped by the host's kernel, as a real card would.
//!
//! There is one queue pair and no control queue: the driver's filters have no place here, as the bridge behind the tap knows which
//! frames are for it. USO is not offered, because a machine type offers the same on every host and older kernels lack it.
//!
//! A guest that stands still (paused, lease over, machine being taken down) neither sends nor receives: each pass goes through the
//! guest's [`RunGate`](crate::cpu::gate::RunGate), and `RunGate::wait_parked` says when no frame is on its way. The queues' saved positions
//! are those of the chains that the guest has not got back, so nothing of a frame has to be saved.
//!
//! A driver that breaks the ring's protocol needs a reset, as with every device. A frame that is too long, or whose header asks for
//! what was not agreed, is dropped and counted; so is one that the host's kernel refuses.
//!
//! ```ignore
//! let taps = tap::adopt_all(&config.nics, &options.tap_fds, options.lock_fd)?;  // before anything starts
//! let (card, handle) = Net::open(config, Box::new(tap), gate.clone())?;          // Arc<Net>, Arc<NetHandle>
//! let function = VirtioPci::new(card, memory, &*msi, io_events)?;                 // Arc<VirtioPci>
//! topology.add_root_port_device(slot, function)?;
//! ```

pub mod announce;
pub mod config;
pub mod device;
pub mod engine;
pub mod header;
pub mod metrics;
mod receive;
pub mod state;
pub mod tap;
pub mod thread;
mod transmit;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_hostile_drivers;
#[cfg(test)]
mod with_tun;

pub use config::NetConfig;
pub use device::Net;
pub use metrics::NetMetrics;
pub use tap::{KernelTap, Tap, TapError, TapFd};
pub use thread::NetHandle;

/// Why a network card cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("network card {nic}: cannot start its thread")]
    Thread {
        nic: String,
        #[source]
        source: std::io::Error,
    },
}
