//! The balloon as the transport sees it, and as hostd does.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_control::balloon::BalloonCounters;

use super::BalloonError;
use super::config::{FEATURES, PAGE_BYTES, QUEUE_SIZES, Registers};
use super::engine::{Engine, LastStats};
use super::metrics::BalloonMetrics;
use super::ram::Ram;
use super::state::SavedBalloon;
use crate::cpu::gate::RunGate;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::worker::{Work, Worker};
use crate::virtio::{Activation, DeviceKind, VirtioDevice, VirtioInterrupt, locked};

const NAME: &str = "balloon";

/// A virtio balloon device.
pub struct Balloon {
    worker: Worker<Engine>,
    shared: Arc<Shared>,
}

/// The balloon from the outside.
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

/// What both sides look at. Nobody waits for the device's thread here.
struct Shared {
    memory_bytes: u64,
    registers: Registers,
    driver: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
    metrics: Arc<BalloonMetrics>,
    stats: Arc<LastStats>,
    /// Later than the thread's own start by a moment: ages are for people.
    started: Instant,
}

impl Balloon {
    /// For a guest whose memory is `ram`, and `memory_bytes` in all. Memory is taken while `gate` is open.
    pub fn open(
        ram: Ram,
        memory_bytes: u64,
        gate: Arc<RunGate>,
    ) -> Result<(Arc<Self>, Arc<BalloonHandle>), BalloonError> {
        let metrics = Arc::new(BalloonMetrics::default());
        let stats = Arc::new(LastStats::default());
        let engine = Engine::new(ram, Arc::clone(&metrics), Arc::clone(&stats));
        let worker = Worker::start(NAME, gate, engine).map_err(BalloonError)?;
        let shared = Arc::new(Shared {
            memory_bytes,
            registers: Registers::default(),
            driver: Mutex::default(),
            metrics,
            stats,
            started: Instant::now(),
        });
        Ok((Arc::new(Self { worker, shared: Arc::clone(&shared) }), Arc::new(BalloonHandle { shared })))
    }
}

impl BalloonHandle {
    /// Asks the guest to make do with so much memory, up to a page. `check_target` has looked at the figure.
    pub fn set_target(&self, bytes: u64) {
        let shared = &self.shared;
        let pages = shared.memory_bytes.saturating_sub(bytes) / PAGE_BYTES;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        if shared.registers.want(pages) != pages
            && let Some(driver) = &*locked(&shared.driver)
        {
            driver.config_changed();
        }
    }

    pub fn counters(&self) -> BalloonCounters {
        let Shared { memory_bytes, registers, metrics, .. } = &*self.shared;
        let without = |pages: u32| memory_bytes.saturating_sub(u64::from(pages) * PAGE_BYTES);
        let stats = *locked(&self.shared.stats);
        let age = |at| self.shared.started.elapsed().saturating_sub(at).as_millis() as u64;
        BalloonCounters {
            target_bytes: without(registers.wanted()),
            actual_bytes: without(registers.given()),
            inflated_pages: metrics.inflated_pages.get(),
            deflated_pages: metrics.deflated_pages.get(),
            refused_pages: metrics.refused_pages.get(),
            reported_bytes: metrics.reported_bytes.get(),
            discard_failures: metrics.discard_failures.get(),
            driver_errors: metrics.driver_errors.get(),
            guest: stats.map(|(stats, _)| stats),
            guest_age_ms: stats.map(|(_, at)| age(at)),
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 5, class: [0x00, 0xff, 0x00], name: NAME }
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.registers.read(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.registers.write(offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        *locked(&self.shared.driver) = Some(Arc::clone(&activation.interrupt));
        self.worker.with(|engine| engine.activate(activation));
        Ok(())
    }

    fn begin_reset(&self) {
        *locked(&self.shared.driver) = None;
        self.worker.with(|engine| drop(engine.stop()));
        // Without a driver all of its memory is the guest's.
        self.shared.registers.set_given(0);
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(self.worker.look(Engine::positions))
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        serde_json::to_value(SavedBalloon::of(&self.shared.registers))
            .map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedBalloon =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        saved.check(self.shared.memory_bytes / PAGE_BYTES)?;
        self.shared.registers.want(saved.wanted_pages);
        self.shared.registers.set_given(saved.given_pages);
        Ok(())
    }
}
