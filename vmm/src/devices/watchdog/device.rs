//! The watchdog as a PCI function, and the thread that waits for its timer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::WatchdogError;
use super::timer::{CONFIG_WRITABLE, LOCK_WRITABLE, SavedTimer, Timer};
use crate::bell::Bell;
use crate::cpu::gate::RunGate;
use crate::incident::WatchdogSink;
use crate::pci::config_space::{ConfigSpace, Identity, SavedConfigSpace};
use crate::pci::{Bar, BarKind, BarRange, PciError, PciFunction};
use crate::sandbox::Role;
use crate::virtio::locked;

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    revision: 0,
    // A system peripheral.
    class: [0x08, 0x80, 0x00],
    subsystem: Some((0x1af4, 0x1100)),
};
const BAR_BYTES: u64 = 16;
/// Registers of configuration space.
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;

/// The PCI function.
pub struct Watchdog {
    shared: Arc<Shared>,
}

/// The watchdog from the outside: ends its thread.
pub struct WatchdogHandle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    inner: Mutex<Inner>,
    gate: Arc<RunGate>,
    bell: Arc<Bell>,
    sink: Arc<dyn WatchdogSink>,
    /// What the next machine's watchdog tells its driver: the last restart was this one's doing.
    has_fired: Arc<AtomicBool>,
}

struct Inner {
    space: ConfigSpace,
    timer: Timer,
    ended: bool,
}

/// The function as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedWatchdog {
    pub version: u32,
    pub config: SavedConfigSpace,
    pub timer: SavedTimer,
}

impl SavedWatchdog {
    pub const VERSION: u32 = 1;
}

impl Watchdog {
    /// `has_fired` outlives the machine. The timer runs while `gate` is open.
    pub fn open(
        gate: Arc<RunGate>,
        sink: Arc<dyn WatchdogSink>,
        has_fired: Arc<AtomicBool>,
    ) -> Result<(Arc<Self>, Arc<WatchdogHandle>), WatchdogError> {
        let mut space = ConfigSpace::endpoint(IDENTITY);
        space.add_bar(Bar { index: 0, kind: BarKind::Memory32, size: BAR_BYTES });
        space.allow_u16(CONFIG, CONFIG_WRITABLE);
        space.allow_u16(LOCK, u16::from(LOCK_WRITABLE));
        let timer = Timer::new(has_fired.load(Ordering::SeqCst));
        let bell = Arc::new(Bell::new().map_err(WatchdogError)?);
        gate.ring_when_open(&bell);
        let shared =
            Arc::new(Shared { inner: Mutex::new(Inner { space, timer, ended: false }), gate, bell, sink, has_fired });
        let waits = Arc::clone(&shared);
        let thread = Role::Watchdog.spawn("", move || waits.run()).map_err(WatchdogError)?;
        let handle = WatchdogHandle { shared: Arc::clone(&shared), thread: Mutex::new(Some(thread)) };
        Ok((Arc::new(Self { shared }), Arc::new(handle)))
    }
}

impl WatchdogHandle {
    /// Ends the thread. After this the watchdog acts no more: the next machine is not this one's to restart.
    pub fn stop(&self) {
        locked(&self.shared.inner).ended = true;
        self.shared.bell.ring();
        if let Some(thread) = locked(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog's thread ended by a panic");
        }
    }
}

impl Drop for WatchdogHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    /// Configuration space shows what the timer has made of a write.
    fn show_registers(&mut self) {
        self.space.set_u16(CONFIG, self.timer.config());
        self.space.set_u16(LOCK, u16::from(self.timer.lock()));
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let next_end = {
                let inner = locked(&self.inner);
                if inner.ended {
                    return;
                }
                inner.timer.next_end()
            };
            // While the guest stands still no time passes, and the bell rings when it goes on.
            let wait = next_end.filter(|_| self.gate.is_open()).map(|end| end.saturating_sub(self.gate.ran_for()));
            self.bell.wait(wait);
            self.access(|_, _| ());
        }
    }

    /// Lets the guest's time pass up to now, then touches the registers.
    fn access<R>(&self, touch: impl FnOnce(&mut Inner, Duration) -> R) -> R {
        let mut inner = locked(&self.inner);
        let before = inner.timer.next_end();
        let now = self.gate.ran_for();
        let fires = !inner.ended && inner.timer.advance(now);
        if fires {
            self.has_fired.store(true, Ordering::SeqCst);
        }
        let result = touch(&mut inner, now);
        let changed = inner.timer.next_end() != before;
        drop(inner);
        if fires {
            self.sink.expired();
        }
        if changed {
            self.bell.ring();
        }
        result
    }
}

impl PciFunction for Watchdog {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        locked(&self.shared.inner).space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) {
        self.shared.access(|inner, now| {
            inner.space.write(register, data);
            inner.timer.write_config(inner.space.u16(CONFIG));
            inner.timer.write_lock(inner.space.u8(LOCK), now);
            inner.show_registers();
        });
    }

    fn decoded(&self) -> Vec<BarRange> {
        locked(&self.shared.inner).space.decoded()
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.shared.access(|inner, _| inner.timer.read(offset, data));
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.shared.access(|inner, now| {
            inner.timer.write(offset, data, now);
            // The driver clears the flag once it has seen it.
            self.shared.has_fired.store(inner.timer.timed_out(), Ordering::SeqCst);
        });
    }

    fn routed(&self, _bar: u8, _base: Option<u64>) {}

    fn reset(&self) {
        self.shared.access(|inner, _| {
            inner.space.reset();
            inner.timer.reset();
        });
    }

    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        let saved = self.shared.access(|inner, now| SavedWatchdog {
            version: SavedWatchdog::VERSION,
            config: inner.space.save(),
            timer: inner.timer.save(now),
        });
        serde_json::to_value(saved)
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), PciError> {
        let saved: SavedWatchdog = serde_json::from_value(saved)?;
        if saved.version != SavedWatchdog::VERSION {
            let (found, known) = (saved.version, SavedWatchdog::VERSION);
            return Err(PciError::Version { what: "the watchdog", found, known });
        }
        self.shared.access(|inner, now| {
            let timer = Timer::restore(&saved.timer, now).map_err(|error| PciError::Device(error.to_string()))?;
            inner.space.restore(&saved.config)?;
            inner.timer = timer;
            self.shared.has_fired.store(inner.timer.timed_out(), Ordering::SeqCst);
            inner.show_registers();
            Ok(())
        })
    }
}
