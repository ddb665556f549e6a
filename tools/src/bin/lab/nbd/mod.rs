//! The lab's block server: NBD over a Unix socket a host, disks that lose what was not flushed
//! when their host loses power, and a witness of every write to a shared disk (DESIGN §13).
//!
//! Path of a write: `connection` parses the frame (`proto`) -> [`export::Export`] puts it in its
//! volatile layer (`overlay`) and records it -> FLUSH or FUA moves it to the file.

mod connection;
pub mod export;
mod overlay;
mod proto;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::clock;
use crate::image::root_disk::ROOT_DISK_BYTES;
use crate::paths::LabDir;
use crate::state::{HostId, LabConfig};
use crate::witness::EventRecord;
use export::Export;

/// Name of the export that each host has for itself; the file behind it is the host's own.
pub const OWN_DISK: &str = "disk";
const OWN_DISK_BYTES: u64 = 4 << 30;

/// A guest's root disk; its file is laid before the server starts.
pub const ROOT_DISK: &str = "root";

/// Shared exports, attached to every host in this order.
pub const SHARED: &[(&str, u64)] = &[
    ("shared", 1 << 30),
    ("shared1", 64 << 20),
    ("shared2", 64 << 20),
    ("shared3", 64 << 20),
    ("shared4", 64 << 20),
    (ROOT_DISK, ROOT_DISK_BYTES),
];

/// A host's power as its connections see it: the number changes when power is lost, and with it
/// every connection made before ends and everything that it still asks is refused.
pub type Incarnation = u64;

pub struct BlockServer {
    hosts: BTreeMap<HostId, HostDisks>,
}

/// One host's way to its disks.
struct HostDisks {
    incarnation: watch::Sender<Incarnation>,
    /// `disk` and the shared exports, by the names that this host uses.
    exports: BTreeMap<&'static str, Arc<Export>>,
}

impl BlockServer {
    /// Opens all files and starts to listen on every host's socket.
    pub fn start(dir: &LabDir, config: &LabConfig) -> Result<Arc<Self>> {
        std::fs::create_dir_all(dir.disks()).with_context(|| format!("create {}", dir.disks().display()))?;
        let mut shared = BTreeMap::new();
        for (name, size) in SHARED {
            let path = dir.shared_disk(name);
            let export = Export::open(name, &path, *size, config.ignore_flush)?.witnessed(&dir.write_witness(name))?;
            shared.insert(*name, Arc::new(export));
        }
        let mut hosts = BTreeMap::new();
        for host in config.host_ids() {
            let path = dir.disks().join(format!("{host}.raw"));
            let own = Export::open(&host.to_string(), &path, OWN_DISK_BYTES, config.ignore_flush)?;
            let mut exports = shared.clone();
            exports.insert(OWN_DISK, Arc::new(own));
            hosts.insert(host, HostDisks { incarnation: watch::channel(1).0, exports });
        }
        let server = Arc::new(Self { hosts });
        for host in config.host_ids() {
            let socket = dir.host_socket(host, "nbd");
            let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
            tokio::spawn(Arc::clone(&server).accept(host, listener));
        }
        Ok(server)
    }

    async fn accept(self: Arc<Self>, host: HostId, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let Some(disks) = self.hosts.get(&host) else { return };
                    let (exports, incarnation) = (disks.exports.clone(), disks.incarnation.subscribe());
                    tokio::spawn(async move {
                        if let Err(error) = connection::serve(host, stream, exports, incarnation).await {
                            tracing::warn!(%host, error = format!("{error:#}"), "disk connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::error!(%host, %error, "cannot accept a disk connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// The host's power is gone, now: answers the bytes that were never flushed. Its connections
    /// end, and nothing that they still hold reaches a disk.
    pub fn lose_power(&self, host: HostId) -> usize {
        let Some(disks) = self.hosts.get(&host) else { return 0 };
        // First the number, then the layers: an operation checks the number under the layer's
        // lock, so it either came before and is dropped here, or is refused.
        disks.incarnation.send_modify(|number| *number += 1);
        let mut lost = 0;
        for export in disks.exports.values() {
            lost += export.lose_power(host);
            export.record(&EventRecord { t_ns: clock::now_ns(), host: host.0, event: "power-loss" });
        }
        lost
    }

    /// Requests of this host to the export wait until it is set back: a disk that hangs.
    pub fn hang(&self, host: HostId, export: &str, hang: bool) -> Result<()> {
        let disks = self.hosts.get(&host).with_context(|| format!("this lab has no {host}"))?;
        let names = || disks.exports.keys().copied().collect::<Vec<_>>().join(", ");
        let found = disks.exports.get(export).with_context(|| format!("no export {export}: {host} has {}", names()))?;
        found.hang(host, hang);
        let event = if hang { "hang" } else { "unhang" };
        found.record(&EventRecord { t_ns: clock::now_ns(), host: host.0, event });
        Ok(())
    }

    /// Bytes of a host on all its disks that a power loss would take.
    pub fn volatile_bytes(&self, host: HostId) -> usize {
        let Some(disks) = self.hosts.get(&host) else { return 0 };
        disks.exports.values().map(|export| export.volatile_bytes(host)).sum()
    }

    /// Exports that hang for this host.
    pub fn hung(&self, host: HostId) -> Vec<&'static str> {
        let Some(disks) = self.hosts.get(&host) else { return Vec::new() };
        disks.exports.iter().filter(|(_, export)| export.is_hung(host)).map(|(name, _)| *name).collect()
    }
}
