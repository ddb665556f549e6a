//! What a host keeps on its disk.

pub mod disk;
pub mod snapshot;
