//! A virtio device that does nothing but to watch its transport: it is activated when it is quiet, and not before, and what it is given
//! is memory.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use virtio_queue::QueueT;
use vmm::virtio::Activation;
use vmm::virtio::DeviceKind;
use vmm::virtio::VirtioDevice;
use vmm::virtio::VirtioInterrupt;
use vmm::virtio::device::DeviceError;
use vmm::virtio::device::QueuePosition;

const QUEUE_SIZES: &[u16] = &[64, 16];
const FEATURES: u64 = 1 << 3 | 1 << 40;

#[derive(Default)]
pub struct Recorder {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    active: Option<Activation>,
    /// Of a driver before: its requests are in the kernel still.
    holds_memory: bool,
    hold_at_reset: bool,
    /// What its driver wrote last to its configuration.
    mark: u64,
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_active(&self) -> bool {
        self.state().active.is_some()
    }

    /// Whether the next reset takes until [`let_go`](Self::let_go).
    pub fn hold_at_reset(&self, hold: bool) {
        self.state().hold_at_reset = hold;
    }

    pub fn let_go(&self) {
        self.state().holds_memory = false;
    }

    pub fn interrupt(&self) -> Option<Arc<dyn VirtioInterrupt>> {
        self.state().active.as_ref().map(|active| Arc::clone(&active.interrupt))
    }
}

impl VirtioDevice for Recorder {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, class: [7, 0x80, 0], name: "recorder" }
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < 0x1000, "device configuration is a page");
        data.fill(offset as u8);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        assert!(offset < 0x1000, "device configuration is a page");
        self.state().mark = data.iter().fold(offset, |mark, byte| mark << 8 | u64::from(*byte));
    }
    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let mut state = self.state();
        assert!(state.active.is_none() && !state.holds_memory, "a device is activated once, and when it is quiet");
        assert_eq!(activation.queues.len(), QUEUE_SIZES.len());
        for (active, most) in activation.queues.iter().zip(QUEUE_SIZES) {
            let Some(active) = active else { continue };
            assert!(active.queue.is_valid(&activation.memory) && active.queue.size() <= *most);
        }
        state.active = Some(activation);
        Ok(())
    }
    fn begin_reset(&self) {
        let mut state = self.state();
        assert!(state.active.take().is_some(), "a device is reset that was activated");
        state.holds_memory = state.hold_at_reset;
    }
    fn is_reset(&self) -> bool {
        !self.state().holds_memory
    }
    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        let position = |active: &Option<vmm::virtio::ActiveQueue>| {
            active.as_ref().map_or(QueuePosition::default(), |active| QueuePosition {
                next_avail: active.queue.next_avail(),
                next_used: active.queue.next_used(),
            })
        };
        Ok(self.state().active.iter().flat_map(|active| active.queues.iter().map(position)).collect())
    }
    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        Ok(serde_json::json!({ "mark": self.state().mark }))
    }
    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let what = || "it has no mark".to_owned();
        let mark = saved["mark"].as_u64().ok_or_else(|| DeviceError::Unfit { device: "recorder", what: what() })?;
        self.state().mark = mark;
        Ok(())
    }
}
