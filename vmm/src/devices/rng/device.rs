//! The entropy device as the transport sees it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::RngError;
use super::engine::{Active, Engine, Entropy, HostEntropy, MAX_BUFFERS};
use super::metrics::RngMetrics;
use crate::cpu::gate::RunGate;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::worker::{Work, Worker};
use crate::virtio::{Activation, DeviceKind, DeviceQueue, VirtioDevice};

const NAME: &str = "rng";
/// Part of the machine type.
const QUEUE_SIZES: &[u16] = &[64];

/// A virtio entropy device.
pub struct Rng {
    worker: Worker<Engine>,
    metrics: Arc<RngMetrics>,
}

/// The device as it is saved: what it has given away is the guest's, and it keeps nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRng {
    pub version: u32,
}

impl SavedRng {
    pub const VERSION: u32 = 1;
}

impl Rng {
    /// On the host's entropy. Requests are answered while `gate` is open.
    pub fn open(gate: Arc<RunGate>) -> Result<Arc<Self>, RngError> {
        Self::with_entropy(Box::new(HostEntropy), gate)
    }

    pub fn with_entropy(entropy: Box<dyn Entropy>, gate: Arc<RunGate>) -> Result<Arc<Self>, RngError> {
        let metrics = Arc::new(RngMetrics::default());
        let engine = Engine::new(entropy, Arc::clone(&metrics));
        let worker = Worker::start(NAME, gate, engine).map_err(RngError)?;
        Ok(Arc::new(Self { worker, metrics }))
    }

    pub fn metrics(&self) -> Arc<RngMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, class: [0x00, 0xff, 0x00], name: NAME }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let Some(given) = queues.first_mut().and_then(Option::take) else {
            return Ok(());
        };
        let queue = DeviceQueue::new(0, given.queue, memory, Arc::clone(&interrupt), MAX_BUFFERS);
        self.worker.with(|engine| engine.activate(Active { queue, kick: Arc::new(given.kick), interrupt }));
        Ok(())
    }

    fn begin_reset(&self) {
        self.worker.with(|engine| drop(engine.stop()));
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(self.worker.look(|engine| engine.position().into_iter().collect()))
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        serde_json::to_value(SavedRng { version: SavedRng::VERSION })
            .map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let SavedRng { version } =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        if version != SavedRng::VERSION {
            return Err(DeviceError::Version { device: NAME, found: version, known: SavedRng::VERSION });
        }
        Ok(())
    }
}
