//! virtio-console: the guest's `hvc0`, joined to the same [`ConsoleHub`](crate::console_hub::ConsoleHub) as the serial port.
//!
//! One [`port::Port`] moves bytes between a pair of queues and the hub; [`device`] gives it to the transport and to a thread.
//! There is one port now. The port knows nothing of its number or queues' indexes, so that more of them (the agent's
//! `org.qemu.guest_agent.0`) are more ports, and the control queues a third thing beside them.
//!
//! ```ignore
//! let console = Console::open(Arc::new(hub.device()?))?;                  // Arc<Console>
//! let function = VirtioPci::new(console, memory, &*msi, io_events)?;      // Arc<VirtioPci>
//! topology.add_root_port_device(slot, function)?;
//! ```

pub mod config;
pub mod device;
pub mod metrics;
pub mod port;
pub mod state;

#[cfg(test)]
mod tests;

pub use device::Console;
pub use metrics::ConsoleMetrics;

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleDeviceError {
    #[error("cannot create an event descriptor for the virtio console")]
    EventFd(#[source] std::io::Error),
    #[error("cannot start the thread of the virtio console")]
    Thread(#[source] std::io::Error),
}
