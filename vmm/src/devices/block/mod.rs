//! virtio-blk: a file or block device as the guest's disk, raw or as a qcow2 image.
//!
//! Path of a request: [`thread`] wakes on the doorbell and runs the [`engine`], which pops a chain, has it read by
//! [`request`] (pure), asks the [`limit`] whether it may go, gives it to the [`backend`] (io_uring in [`uring`]; the [`worker`] threads
//! for [`qcow2`], or where io_uring is refused) straight from guest memory ([`pending`]), and returns the chain when the kernel is
//! done. One thread a disk, which never waits for the disk: it can always be asked to cancel.
//!
//! A request that storage fails is judged by the disk's policy ([`fault`]): the guest is told, or it is stopped, and the request is
//! kept and tried again when somebody resumes the guest.
//!
//! Self-fence (DESIGN §5, hazard C8): [`BlockHandle`] implements [`Quiesce`](crate::lease::quiesce::Quiesce). The gate is checked before each submission; what the
//! kernel takes back stays with the engine and is submitted again after `reopen`; written data that only the page cache
//! has is synced as part of the drain, for dirty pages reach a shared disk long after their writer was fenced.
//!
//! ```ignore
//! let gate = DiskGate::new();                                             // one a guest
//! let files = DiskFiles::by_path();                                       // or handed over
//! let (disk, handle) = Block::open(config, files, gate.clone(), faults)?; // Arc<Block>, Arc<BlockHandle>
//! let function = VirtioPci::new(disk, memory, &*msi, io_events)?;         // Arc<VirtioPci>
//! topology.add_root_port_device(slot, function)?;
//! ```

use std::path::PathBuf;

pub mod backend;
pub mod config;
pub mod device;
pub mod disk;
pub mod engine;
pub mod fault;
pub mod files;
pub mod limit;
pub mod metrics;
mod pending;
pub mod qcow2;
pub mod request;
pub mod state;
pub mod thread;
pub mod uring;
pub mod worker;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_faults;
#[cfg(test)]
pub(crate) mod tests_of_hanging_disks;
#[cfg(test)]
mod tests_of_images;
#[cfg(test)]
mod tests_of_moves;

pub use config::{BlockConfig, BlockSize};
pub use device::Block;
pub use fault::DiskFaults;
pub use files::DiskFiles;
pub use metrics::BlockMetrics;
pub use thread::BlockHandle;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("disk {disk}: cannot open {path}")]
    Open {
        disk: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("disk {disk}: its files were not handed over")]
    NotHandedOver { disk: String },
    #[error("disk {disk}: {path} is neither a regular file nor a block device")]
    Kind { disk: String, path: PathBuf },
    #[error("disk {disk}: {path} has {bytes} bytes, less than one sector")]
    Empty { disk: String, path: PathBuf, bytes: u64 },
    #[error("disk {disk}")]
    Image {
        disk: String,
        #[source]
        source: qcow2::ImageError,
    },
    #[error("disk {disk}: cannot start its I/O thread")]
    Thread {
        disk: String,
        #[source]
        source: std::io::Error,
    },
    #[error("disk {disk}: neither io_uring nor worker threads can be set up")]
    Backend {
        disk: String,
        #[source]
        source: std::io::Error,
    },
}
