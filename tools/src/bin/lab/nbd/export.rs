//! One disk of the block server: a sparse file with the durable bytes, a volatile layer over it.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;

use super::overlay::{Extent, Overlay};
use crate::clock;
use crate::state::HostId;
use crate::witness::{Witness, WriteRecord, head_text};

/// A disk's cache is not endless: above this a host's oldest promise is kept early, as real disks
/// do. A lying disk (`--ignore-flush`) holds more before it gives in.
const VOLATILE_LIMIT: usize = 64 << 20;
const LYING_LIMIT: usize = 1 << 30;

pub struct Export {
    name: String,
    size: u64,
    durable: File,
    ignore_flush: bool,
    overlay: Mutex<Overlay>,
    hung: watch::Sender<BTreeSet<HostId>>,
    witness: Option<Witness>,
}

/// Proof that a host still had power when the layer's lock was taken.
pub trait Powered {
    fn is_powered(&self) -> bool;
}

impl Export {
    pub fn open(name: &str, path: &Path, size: u64, ignore_flush: bool) -> Result<Self> {
        let open = || -> io::Result<File> {
            let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
            file.set_len(size)?;
            Ok(file)
        };
        Ok(Self {
            name: name.to_owned(),
            size,
            durable: open().with_context(|| format!("open disk {}", path.display()))?,
            ignore_flush,
            overlay: Mutex::default(),
            hung: watch::channel(BTreeSet::new()).0,
            witness: None,
        })
    }

    /// Records every write to `path`.
    pub fn witnessed(mut self, path: &Path) -> Result<Self> {
        self.witness = Some(Witness::append_to(path)?);
        Ok(self)
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn read(&self, host: &impl Powered, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        let overlay = self.lock(host)?;
        self.durable.read_exact_at(&mut buffer, offset)?;
        overlay.read_over(offset, &mut buffer);
        Ok(buffer)
    }

    pub fn write(&self, id: HostId, host: &impl Powered, offset: u64, data: &Bytes, force: bool) -> io::Result<()> {
        let mut overlay = self.lock(host)?;
        overlay.write(id, offset, data);
        // Under the lock: records stand in the order in which writes became visible.
        self.record(&WriteRecord {
            t_ns: clock::now_ns(),
            host: id.0,
            export: &self.name,
            offset,
            length: data.len(),
            head: head_text(data),
        });
        if force && !self.ignore_flush {
            let extents = overlay.flush_range(id, offset, data.len());
            self.settle(extents)?;
        }
        let limit = if self.ignore_flush { LYING_LIMIT } else { VOLATILE_LIMIT };
        if overlay.volatile_bytes(id) > limit {
            let extents = overlay.flush(id);
            self.settle(extents)?;
        }
        Ok(())
    }

    pub fn flush(&self, id: HostId, host: &impl Powered) -> io::Result<()> {
        let mut overlay = self.lock(host)?;
        if self.ignore_flush {
            return Ok(());
        }
        let extents = overlay.flush(id);
        self.settle(extents)
    }

    pub fn lose_power(&self, host: HostId) -> usize {
        self.hang(host, false);
        self.overlay().lose_power(host)
    }

    pub fn volatile_bytes(&self, host: HostId) -> usize {
        self.overlay().volatile_bytes(host)
    }

    pub fn hang(&self, host: HostId, hang: bool) {
        self.hung.send_if_modified(|hosts| if hang { hosts.insert(host) } else { hosts.remove(&host) });
    }

    pub fn is_hung(&self, host: HostId) -> bool {
        self.hung.borrow().contains(&host)
    }

    /// Returns when the disk does not hang for this host (any more).
    pub async fn until_it_answers(&self, host: HostId) {
        let mut hung = self.hung.subscribe();
        // The sender lives as long as the export, so waiting cannot fail while we are here.
        let _ = hung.wait_for(|hosts| !hosts.contains(&host)).await;
    }

    pub fn record(&self, record: &impl Serialize) {
        if let Some(witness) = &self.witness {
            witness.record(record);
        }
    }

    /// The lab models power loss of hosts, not of the machine it runs on: reaching the page cache
    /// is durable here, and a sync would only slow the emulated disks down.
    fn settle(&self, extents: Vec<Extent>) -> io::Result<()> {
        for extent in extents {
            self.durable.write_all_at(&extent.data, extent.offset)?;
        }
        Ok(())
    }

    fn lock(&self, host: &impl Powered) -> io::Result<MutexGuard<'_, Overlay>> {
        let overlay = self.overlay();
        if host.is_powered() { Ok(overlay) } else { Err(io::Error::other("the host has no power")) }
    }

    fn overlay(&self) -> MutexGuard<'_, Overlay> {
        self.overlay.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct On;
    struct Off;

    impl Powered for On {
        fn is_powered(&self) -> bool {
            true
        }
    }

    impl Powered for Off {
        fn is_powered(&self) -> bool {
            false
        }
    }

    const HOST: HostId = HostId(1);

    fn disk(directory: &Path, ignore_flush: bool) -> Export {
        Export::open("disk", &directory.join("disk.raw"), 1 << 20, ignore_flush).expect("a disk")
    }

    fn sector(letter: u8) -> Bytes {
        Bytes::from(vec![letter; 512])
    }

    #[test]
    fn a_flushed_write_is_in_the_file_and_an_unflushed_one_is_gone_with_the_power() {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = disk(directory.path(), false);
        disk.write(HOST, &On, 0, &sector(b'a'), false).expect("write");
        disk.flush(HOST, &On).expect("flush");
        disk.write(HOST, &On, 512, &sector(b'b'), false).expect("write");
        disk.write(HOST, &On, 1024, &sector(b'f'), true).expect("forced write");
        assert_eq!(disk.lose_power(HOST), 512);
        let bytes = disk.read(&On, 0, 1536).expect("read");
        assert_eq!((bytes[0], bytes[512], bytes[1024]), (b'a', 0, b'f'));
    }

    #[test]
    fn a_disk_that_lies_about_flush_loses_what_it_promised() {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = disk(directory.path(), true);
        disk.write(HOST, &On, 0, &sector(b'a'), true).expect("write");
        disk.flush(HOST, &On).expect("flush");
        disk.lose_power(HOST);
        assert_eq!(disk.read(&On, 0, 512).expect("read")[0], 0);
    }

    #[test]
    fn a_host_without_power_reaches_no_disk() {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = disk(directory.path(), false);
        assert!(disk.write(HOST, &Off, 0, &sector(b'a'), true).is_err());
        assert!(disk.flush(HOST, &Off).is_err());
        assert_eq!(disk.read(&On, 0, 512).expect("read")[0], 0);
    }
}
