//! virtio-console with two ports: the guest's `hvc0`, joined to the same [`ConsoleHub`](crate::console_hub::ConsoleHub) as the
//! serial port, and `org.qemu.guest_agent.0`, joined to the [`AgentChannel`](crate::agent_channel::AgentChannel).
//!
//! - [`port`] moves bytes between a pair of queues and the host's end; it knows nothing of its number or its queues' indexes.
//! - [`control`] is what device and driver say about ports: messages in, messages out.
//! - [`active`] is the queues while the driver has given them; [`device`] joins all of it to the transport and to a thread.
//!
//! A driver without MULTIPORT has `hvc0` and nothing else.
//!
//! ```ignore
//! let console = Console::open(Arc::new(hub.device()?), agent, gate)?;     // Arc<Console>
//! let function = VirtioPci::new(console, memory, &*msi, io_events)?;      // Arc<VirtioPci>
//! topology.add_root_port_device(slot, function)?;
//! ```

mod active;
pub mod config;
pub mod control;
pub mod device;
pub mod metrics;
pub mod port;
pub mod state;

#[cfg(test)]
mod agent_tests;
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
