//! virtio-rng: entropy of the host's kernel for the guest. Every guest has one, at 00:1c.0.
//!
//! [`engine`] is the device's work, pure but for its source of entropy; [`device`] joins it to the transport and to a thread
//! ([`Worker`](crate::virtio::worker::Worker)).
//!
//! A request is answered with at most [`MAX_REQUEST_BYTES`](engine::MAX_REQUEST_BYTES), however much room it has (virtio 1.2, 5.4.6.1
//! lets the device choose), and all requests together at [`BYTES_PER_SECOND`](engine::BYTES_PER_SECOND): far above what a kernel
//! asks for, and a small part of what a host's processor can make. Nothing is drawn in advance: no entropy waits in this process's
//! memory, and none is saved.

pub mod device;
pub mod engine;
pub mod metrics;

#[cfg(test)]
mod tests;

pub use device::Rng;
pub use metrics::RngMetrics;

/// Why the device cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread of the entropy device")]
pub struct RngError(#[source] pub std::io::Error);
