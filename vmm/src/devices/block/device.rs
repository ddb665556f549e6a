//! The disk as the transport sees it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::QueueT as _;

use super::BlockError;
use super::config::{BlockConfig, Geometry, MAX_SEGMENTS, QUEUE_SIZE};
use super::disk::{self, FileFacts, OpenDisk};
use super::engine::Standing;
use super::fault::DiskFaults;
use super::files::DiskFiles;
use super::request::Request;
use super::state::SavedBlock;
use super::thread::{self, BlockHandle, Command, Link};
use crate::lease::quiesce::DiskGate;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{Activation, DeviceKind, DeviceQueue, VirtioDevice, locked};

const NAME: &str = "block";

/// A virtio block device. Its work is done by its thread.
pub struct Block {
    geometry: Geometry,
    link: Arc<Link>,
    /// Requests that came with a saved state, until the driver's queue is there.
    pending: Mutex<Vec<Request>>,
}

impl Block {
    /// Opens a disk and starts its thread. Requests pass `gate`, which all disks of a guest share.
    /// `faults` is told when an error stops the guest.
    pub fn open(
        config: BlockConfig,
        files: Arc<DiskFiles>,
        gate: Arc<DiskGate>,
        faults: Arc<dyn DiskFaults>,
    ) -> Result<(Arc<Self>, Arc<BlockHandle>), BlockError> {
        let disk = match (OpenDisk::open(&config, &files), files.facts()) {
            // They are gone with the guest's lease, and come back with it.
            (Err(BlockError::NotHandedOver { .. }), Some(facts)) => {
                return Self::not_open(config, files, facts, gate, faults);
            }
            (opened, _) => opened?,
        };
        let geometry = Geometry::new(&config, disk.facts.bytes);
        let (facts, direct) = (disk.facts, disk.direct);
        let backend = disk.into_backend(&config.name)?;
        tracing::info!(
            disk = %config.name,
            path = %config.path.display(),
            images = config.backing.len() + 1,
            sectors = geometry.capacity_sectors,
            read_only = config.read_only,
            io = backend.name(),
            direct = direct.is_some(),
            "disk opened"
        );
        let link = thread::start(&config, geometry.clone(), gate, Some((backend, direct)), faults)?;
        Ok(Self::made(config, files, geometry, facts, link))
    }

    /// A disk whose file another process still writes. It is looked at once, and
    /// [`reopen`](crate::lease::quiesce::Quiesce::reopen) opens it.
    pub fn closed(
        config: BlockConfig,
        files: Arc<DiskFiles>,
        gate: Arc<DiskGate>,
        faults: Arc<dyn DiskFaults>,
    ) -> Result<(Arc<Self>, Arc<BlockHandle>), BlockError> {
        let facts = disk::look(&config, &files)?;
        Self::not_open(config, files, facts, gate, faults)
    }

    fn not_open(
        config: BlockConfig,
        files: Arc<DiskFiles>,
        facts: FileFacts,
        gate: Arc<DiskGate>,
        faults: Arc<dyn DiskFaults>,
    ) -> Result<(Arc<Self>, Arc<BlockHandle>), BlockError> {
        let geometry = Geometry::new(&config, facts.bytes);
        let link = thread::start(&config, geometry.clone(), gate, None, faults)?;
        Ok(Self::made(config, files, geometry, facts, link))
    }

    fn made(
        config: BlockConfig,
        files: Arc<DiskFiles>,
        geometry: Geometry,
        facts: FileFacts,
        link: Arc<Link>,
    ) -> (Arc<Self>, Arc<BlockHandle>) {
        let handle = Arc::new(BlockHandle { config, files, facts, link: Arc::clone(&link) });
        (Arc::new(Self { geometry, link, pending: Mutex::default() }), handle)
    }

    /// A disk on a backend of the test's own.
    #[cfg(test)]
    pub(crate) fn on_backend(
        config: BlockConfig,
        facts: FileFacts,
        gate: Arc<DiskGate>,
        backend: Box<dyn super::backend::Backend>,
        faults: Arc<dyn DiskFaults>,
    ) -> (Arc<Self>, Arc<BlockHandle>) {
        let geometry = Geometry::new(&config, facts.bytes);
        let link = thread::start(&config, geometry.clone(), gate, Some((backend, None)), faults).unwrap();
        Self::made(config, DiskFiles::by_path(), geometry, facts, link)
    }
}

impl Block {
    fn standing(&self) -> Result<Standing, DeviceError> {
        self.link.standing()?.ok_or(DeviceError::Busy { device: NAME })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 2, class: [0x01, 0x00, 0x00], name: NAME }
    }

    fn features(&self) -> u64 {
        self.geometry.features()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.geometry.config_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let pending = std::mem::take(&mut *locked(&self.pending));
        let Some(active) = activation.queues.into_iter().next().flatten() else {
            // A driver that enables no queue asks for nothing.
            return Ok(());
        };
        let fits =
            |request: &Request| request.head < active.queue.size() && request.fits(&self.geometry, &activation.memory);
        // Each was taken from the ring and not answered. More may be missing: those of a queue that is broken.
        let unanswered = active.queue.next_avail().wrapping_sub(active.queue.next_used());
        let heads: HashSet<u16> = pending.iter().map(|request| request.head).collect();
        if pending.len() > usize::from(unanswered) || heads.len() < pending.len() || !pending.iter().all(fits) {
            let what = "it waits for requests that are none of this disk".to_owned();
            return Err(DeviceError::Unfit { device: NAME, what });
        }
        let queue = DeviceQueue::new(
            0,
            active.queue,
            activation.memory,
            Arc::clone(&activation.interrupt),
            MAX_SEGMENTS as usize + 2,
        );
        self.link.send(Command::Activate {
            queue,
            kick: active.kick,
            interrupt: activation.interrupt,
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            pending,
        })
    }

    fn begin_reset(&self) {
        self.link.begin_reset();
    }

    fn is_reset(&self) -> bool {
        self.link.is_reset()
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(self.standing()?.position.into_iter().collect())
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        let saved = SavedBlock::of(&self.geometry, &self.standing()?.pending);
        serde_json::to_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedBlock =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        saved.check(&self.geometry)?;
        *locked(&self.pending) = saved.requests();
        Ok(())
    }
}
