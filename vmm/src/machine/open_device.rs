//! A disk or network card between the host that has its storage or tap and the guest that has its slot.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pnet_base::MacAddr;
use vmm_control::{DiskConfig, NicConfig, Notice};

use super::build::Beginning;
use crate::cpu::gate::RunGate;
use crate::devices::block::files::{FilesRefusal, OnWant};
use crate::devices::block::{Block, BlockConfig, BlockError, BlockHandle, DiskFaults, DiskFiles};
use crate::devices::net::{KernelTap, Net, NetConfig, NetError, NetHandle, TapError};
use crate::interrupt::{IoEvents, MsiSink};
use crate::lease::Lease;
use crate::lease::quiesce::{DiskGate, Quiesce};
use crate::memory::GuestMemory;
use crate::pci::PciError;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::{TransportError, VirtioPci};

/// One attempt to drain a disk that leaves, and the pause before the next one.
const DRAIN: Duration = Duration::from_secs(5);
const NEXT_DRAIN: Duration = Duration::from_millis(200);

/// Why a device did not come.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    #[error(transparent)]
    Disk(#[from] BlockError),
    #[error(transparent)]
    Nic(#[from] NetError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Virtio(#[from] TransportError),
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// A disk's device, and the handle of those who stop and count it.
pub type OpenDisk = (Arc<dyn VirtioDevice>, Arc<BlockHandle>);
/// Opens a disk, or only looks at it, for a guest that comes from elsewhere. May wait for storage for any time.
pub type DiskOpener = Box<dyn Fn(&DiskConfig, Arc<DiskFiles>, Beginning) -> Result<OpenDisk, BlockError> + Send + Sync>;

/// What all devices of a guest share, for the life of the process.
pub struct Host {
    pub gate: Arc<RunGate>,
    pub lease: Arc<Lease>,
    pub disks: DiskOpener,
    /// Disks whose files nobody handed over are opened by their paths.
    pub opens_paths: bool,
    /// Tells hostd. Must not wait.
    pub notify: Arc<dyn Fn(Notice) + Send + Sync>,
}

impl Host {
    /// Opens disks whose requests pass `gate` and whose errors are told to `faults`.
    pub fn disk_opener(gate: Arc<DiskGate>, faults: Arc<dyn DiskFaults>) -> DiskOpener {
        Box::new(move |disk, files, beginning| {
            let (gate, faults) = (Arc::clone(&gate), Arc::clone(&faults));
            let (device, handle) = match beginning {
                Beginning::Boot => Block::open(BlockConfig::from(disk), files, gate, faults)?,
                Beginning::Incoming => Block::closed(BlockConfig::from(disk), files, gate, faults)?,
            };
            Ok((device, handle))
        })
    }

    /// The files of a disk of the guest's, with what was handed over for it, if anything was.
    pub fn disk_files(&self, disk: &DiskConfig, handed: Vec<OwnedFd>) -> Result<Arc<DiskFiles>, FilesRefusal> {
        if handed.is_empty() && self.opens_paths {
            return Ok(DiskFiles::by_path());
        }
        let notify = Arc::clone(&self.notify);
        let on_want: OnWant = Arc::new(move |disk| notify(Notice::FilesWanted { disk: disk.to_owned() }));
        DiskFiles::handed(disk, handed, on_want)
    }

    pub(super) fn open_disk(
        &self,
        disk: &DiskConfig,
        files: Arc<DiskFiles>,
        beginning: Beginning,
    ) -> Result<OpenDevice, PlugError> {
        let (device, handle) = (self.disks)(disk, files, beginning)?;
        Ok(OpenDevice { device, handle: Handle::Disk { disk: handle, shared: disk.shared } })
    }

    pub(super) fn open_nic(&self, nic: &NicConfig, tap: Arc<KernelTap>) -> Result<OpenDevice, PlugError> {
        let config = NetConfig { name: nic.id.clone(), mac: nic.mac, mtu: nic.mtu };
        tracing::info!(nic = %nic.id, mac = %nic.mac, mtu = nic.mtu, tap = tap.interface(), "network card connected");
        let (device, handle) = Net::open(config, Box::new(tap.try_clone()?), Arc::clone(&self.gate))?;
        Ok(OpenDevice { device, handle: Handle::Nic { nic: handle, mac: nic.mac, tap } })
    }
}

/// What a device is connected to.
#[derive(Clone)]
pub struct Connections {
    pub memory: GuestMemory,
    pub msi: Arc<dyn MsiSink>,
    pub io_events: Arc<dyn IoEvents>,
}

impl Connections {
    /// Makes a device a function for a slot.
    pub fn connect(&self, device: Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, TransportError> {
        VirtioPci::new(device, self.memory.clone(), &*self.msi, Arc::clone(&self.io_events))
    }

    /// Makes a device a function of bus 0.
    pub fn integrate(&self, device: Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, TransportError> {
        VirtioPci::integrated(device, self.memory.clone(), &*self.msi, Arc::clone(&self.io_events))
    }
}

/// A device that was opened, before it is connected.
pub(super) struct OpenDevice {
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) handle: Handle,
}

/// A device from the outside.
#[derive(Clone)]
pub(super) enum Handle {
    Disk {
        disk: Arc<BlockHandle>,
        shared: bool,
    },
    /// The tap is kept for the next machine.
    Nic {
        nic: Arc<NetHandle>,
        mac: MacAddr,
        tap: Arc<KernelTap>,
    },
}

impl Handle {
    /// One attempt to make the device let go of everything. False when its storage does not answer.
    fn end(&self) -> bool {
        match self {
            Self::Disk { disk, .. } => {
                if let Err(error) = disk.cancel_and_drain(Instant::now() + DRAIN) {
                    tracing::debug!(%error, "a disk that was unplugged is not drained yet");
                    return false;
                }
                disk.close();
                disk.end()
            }
            Self::Nic { nic, .. } => match nic.stop() {
                Ok(()) => true,
                Err(error) => {
                    tracing::debug!(nic = nic.name(), %error, "a network card that was unplugged has not ended yet");
                    false
                }
            },
        }
    }
}

/// Until nothing of a device is open, or nobody waits for it any more. Storage that hangs holds its own thread here.
pub(super) fn end_at_last(handle: &Handle, is_awaited: impl Fn() -> bool) {
    let mut first = true;
    while is_awaited() && !handle.end() {
        if std::mem::take(&mut first) {
            tracing::warn!("a device was unplugged, and its storage does not answer");
        }
        std::thread::sleep(NEXT_DRAIN);
    }
}
