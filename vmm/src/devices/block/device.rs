//! The disk as the transport sees it.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::BlockError;
use super::config::{BlockConfig, Geometry, MAX_SEGMENTS, QUEUE_SIZE};
use super::disk::OpenDisk;
use super::fault::DiskFaults;
use super::state::SavedBlock;
use super::thread::{self, BlockHandle, Command, Link};
use crate::lease::quiesce::DiskGate;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{Activation, DeviceKind, DeviceQueue, VirtioDevice};

const NAME: &str = "block";

/// A virtio block device. Its work is done by its thread.
pub struct Block {
    geometry: Geometry,
    link: Arc<Link>,
}

impl Block {
    /// Opens a disk and starts its thread. Requests pass `gate`, which all disks of a guest share.
    /// `faults` is told when an error stops the guest.
    pub fn open(
        config: BlockConfig,
        gate: Arc<DiskGate>,
        faults: Arc<dyn DiskFaults>,
    ) -> Result<(Arc<Self>, Arc<BlockHandle>), BlockError> {
        let disk = OpenDisk::open(&config)?;
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
        let link = thread::start(&config, geometry.clone(), gate, backend, direct, faults)?;
        let handle = Arc::new(BlockHandle { config, facts, link: Arc::clone(&link) });
        Ok((Arc::new(Self { geometry, link }), handle))
    }

    /// A disk on a backend of the test's own.
    #[cfg(test)]
    pub(crate) fn on_backend(
        config: BlockConfig,
        facts: super::disk::FileFacts,
        gate: Arc<DiskGate>,
        backend: Box<dyn super::backend::Backend>,
        faults: Arc<dyn DiskFaults>,
    ) -> (Arc<Self>, Arc<BlockHandle>) {
        let geometry = Geometry::new(&config, facts.bytes);
        let link = thread::start(&config, geometry.clone(), gate, backend, None, faults).unwrap();
        let handle = Arc::new(BlockHandle { config, facts, link: Arc::clone(&link) });
        (Arc::new(Self { geometry, link }), handle)
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
        let Some(active) = activation.queues.into_iter().next().flatten() else {
            // A driver that enables no queue asks for nothing.
            return Ok(());
        };
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
        })
    }

    fn begin_reset(&self) {
        self.link.begin_reset();
    }

    fn is_reset(&self) -> bool {
        self.link.is_reset()
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        match self.link.position()? {
            Some(position) => Ok(vec![position]),
            None => Err(DeviceError::Busy { device: NAME }),
        }
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        serde_json::to_value(SavedBlock::of(&self.geometry))
            .map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedBlock =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        saved.check(&self.geometry)
    }
}
