//! qcow2 images, through the crate `imago`. An image is hostile input: it may come from anybody, and its header names other files.
//!
//! Opening goes in this order, and nothing of the guest runs before all of it has succeeded:
//! 1. [`chain`] opens the files that the configuration lists, and no other; a header that names something else is an error.
//! 2. [`header`] and [`tables`] read each image's header and tables and refuse what is malformed, larger than its file, or
//!    inconsistent in a way that would let data of the guest overwrite the image's own tables. `imago` trusts these.
//! 3. `imago` opens what is left, on [`storage`]: our own file, with a fence that ends all writing.
//! 4. [`image`] carries out requests. A panic inside of `imago` breaks the image, not the process: every later request fails.
//!
//! `imago` waits for its file, so an image is served by the [`worker`](super::worker) threads.

pub mod chain;
pub mod exercise;
pub mod header;
pub mod image;
pub mod storage;
pub mod tables;

#[cfg(test)]
pub(in crate::devices::block) mod hostile_tests;
#[cfg(test)]
mod interop_tests;

use std::path::PathBuf;

pub use image::Image;

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a qcow2 image")]
    NotQcow2 { path: PathBuf },
    #[error("{path} is malformed: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error("{path} needs what is not supported: {what}")]
    Unsupported { path: PathBuf, what: String },
    #[error("{path} is damaged: {what}; repair it with `qemu-img check -r all`")]
    Damaged { path: PathBuf, what: String },
    #[error("{path} has a backing file by the name {name:?}, and the configuration has {expected} in its place")]
    BackingName { path: PathBuf, name: String, expected: String },
    #[error("{path} has no backing file, and the configuration has {surplus} below it")]
    NoBacking { path: PathBuf, surplus: PathBuf },
    #[error("{path} takes its backing file for {header:?}, the configuration for {configured:?}")]
    BackingFormat { path: PathBuf, header: String, configured: vmm_control::DiskFormat },
    #[error("{path} is in the chain twice")]
    Twice { path: PathBuf },
    #[error("{path} cannot be opened as an image")]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} makes the qcow2 library fail; it is not opened")]
    Panic { path: PathBuf },
}
