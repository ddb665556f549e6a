//! Slows the vCPUs of a guest down: in each period of a tenth of a second they stand for a share of it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::precopy::MAX_THROTTLE_PERCENT;
use crate::cpu::gate::{RunGate, Stop};
use crate::sandbox::Role;

const PERIOD: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Order {
    percent: u8,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    order: Mutex<Order>,
    changed: Condvar,
}

/// The vCPUs run as they like again when this is dropped.
pub struct Throttle {
    gate: Arc<RunGate>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    pub fn new(gate: Arc<RunGate>) -> Self {
        Self { gate, shared: Arc::default(), thread: None }
    }

    /// The share of time that vCPUs stand. Its thread starts with the first that is not 0.
    pub fn set(&mut self, percent: u8) -> io::Result<()> {
        self.shared.order().percent = percent.min(MAX_THROTTLE_PERCENT);
        if percent > 0 && self.thread.is_none() {
            let (gate, shared) = (Arc::clone(&self.gate), Arc::clone(&self.shared));
            self.thread = Some(Role::Throttle.spawn("", move || shared.run(&gate))?);
        }
        Ok(())
    }
}

impl Shared {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, gate: &RunGate) {
        loop {
            let standing = PERIOD * u32::from(self.order().percent) / 100;
            gate.shut(Stop::Throttled);
            if self.ends_within(standing) {
                return;
            }
            gate.open(Stop::Throttled);
            if self.ends_within(PERIOD - standing) {
                return;
            }
        }
    }

    fn ends_within(&self, time: Duration) -> bool {
        let order = self.order();
        let waited = self.changed.wait_timeout_while(order, time, |order| !order.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.order().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that slows a guest down ended by a panic");
        }
        self.gate.open(Stop::Throttled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_stand_and_go_in_turns_and_go_at_the_end() {
        let gate = RunGate::new();
        let mut throttle = Throttle::new(Arc::clone(&gate));
        throttle.set(0).unwrap();
        assert!(throttle.thread.is_none(), "nothing is slowed down");
        throttle.set(50).unwrap();
        for stands in [true, false, true, false, true] {
            while gate.holds(Stop::Throttled) != stands {
                std::thread::yield_now();
            }
        }
        throttle.set(u8::MAX).unwrap();
        drop(throttle);
        assert!(!gate.holds(Stop::Throttled) && gate.is_open());
    }
}
