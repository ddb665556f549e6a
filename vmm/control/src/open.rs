//! Opens the files of a disk, for a process that may not. May wait for storage for any time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::DiskConfig;

/// What the files are opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To look at a disk that another process writes.
    Look,
    /// As the disk says.
    Use,
}

/// The disk's own file, then those under it, nearest first.
pub fn open_files(disk: &DiskConfig, access: Access) -> io::Result<Vec<OwnedFd>> {
    let write = access == Access::Use && !disk.read_only;
    let mut files = vec![open(&disk.path, write)?];
    for image in &disk.backing {
        files.push(open(&image.path, false)?);
    }
    Ok(files.into_iter().map(OwnedFd::from).collect())
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    OpenOptions::new().read(true).write(write).open(path).map_err(failed)
}
