//! pvpanic: one port by which a guest's kernel says that it has panicked. QEMU's interface (docs/specs/pvpanic), which Linux and
//! Windows drivers know; the DSDT names it QEMU0001.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_control::PanicKind;

use crate::bus::PioDevice;
use crate::incident::PanicSink;

/// The kernel has panicked and stays where it is, or restarts by itself.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked, and a crash kernel that was loaded before takes over.
const CRASH_LOADED: u8 = 1 << 1;
/// What a read tells: the events that are understood here.
const EVENTS: u8 = PANICKED | CRASH_LOADED;

/// The port. Each event counts once in the life of a machine, so a guest that repeats itself costs nothing.
pub struct PvPanic {
    reported: u8,
    sink: Arc<dyn PanicSink>,
}

/// The port as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPvPanic {
    /// Events that the guest has reported.
    pub reported: u8,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PvPanicError {
    #[error("the saved panic port has reported the events {found:#04x}, and there are {EVENTS:#04x}")]
    Events { found: u8 },
}

impl PvPanic {
    pub fn new(sink: Arc<dyn PanicSink>) -> Self {
        Self { reported: 0, sink }
    }

    pub fn save(&self) -> SavedPvPanic {
        SavedPvPanic { reported: self.reported }
    }

    /// What the guest has said of its end. A kernel that says both has no crash kernel left to run.
    pub fn reported(&self) -> Option<PanicKind> {
        match self.reported {
            0 => None,
            reported if reported & PANICKED != 0 => Some(PanicKind::Panicked),
            _ => Some(PanicKind::CrashKernel),
        }
    }

    /// Takes over what was reported. Nobody is told again.
    pub fn restore(&mut self, saved: &SavedPvPanic) -> Result<(), PvPanicError> {
        if saved.reported & !EVENTS != 0 {
            return Err(PvPanicError::Events { found: saved.reported });
        }
        self.reported = saved.reported;
        Ok(())
    }
}

impl PioDevice for PvPanic {
    fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
        data.fill(EVENTS);
    }

    fn write(&mut self, _port_offset: u16, data: &[u8]) {
        let [events] = data else {
            return;
        };
        let new = events & EVENTS & !self.reported;
        self.reported |= new;
        // A kernel that reports both has no crash kernel left to run.
        if new & PANICKED != 0 {
            self.sink.panicked(PanicKind::Panicked);
        } else if new & CRASH_LOADED != 0 {
            self.sink.panicked(PanicKind::CrashKernel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<PanicKind>>);

    impl PanicSink for Told {
        fn panicked(&self, kind: PanicKind) {
            self.0.lock().unwrap().push(kind);
        }
    }

    fn port() -> (PvPanic, Arc<Told>) {
        let told = Arc::new(Told::default());
        (PvPanic::new(told.clone()), told)
    }

    #[test]
    fn a_driver_finds_both_events_and_reports_one() {
        let (mut port, told) = port();
        let mut events = [0];
        port.read(0, &mut events);
        assert_eq!(events, [3]);
        port.write(0, &[1]);
        assert_eq!(*told.0.lock().unwrap(), [PanicKind::Panicked]);
    }

    #[test]
    fn a_crash_kernel_that_panics_too_is_told_of() {
        let (mut port, told) = port();
        port.write(0, &[2]);
        port.write(0, &[2]);
        port.write(0, &[1]);
        assert_eq!(*told.0.lock().unwrap(), [PanicKind::CrashKernel, PanicKind::Panicked]);
    }

    #[test]
    fn what_was_reported_is_saved_and_not_told_again() {
        let (mut old, _) = port();
        old.write(0, &[1]);
        let saved = old.save();
        let (mut new, told) = port();
        new.restore(&saved).unwrap();
        new.write(0, &[1]);
        assert!(told.0.lock().unwrap().is_empty());
        assert_eq!(new.reported(), Some(PanicKind::Panicked));
        assert_eq!(new.restore(&SavedPvPanic { reported: 4 }), Err(PvPanicError::Events { found: 4 }));
    }

    proptest! {
        /// Whatever a guest writes, in any width: at most one report of each event, and only of events that exist.
        #[test]
        fn a_guest_that_repeats_itself_is_heard_once(
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..5), 0..50)
        ) {
            let (mut port, told) = port();
            for data in &writes {
                port.write(0, data);
            }
            let told = told.0.lock().unwrap();
            let said = |bit: u8| writes.iter().any(|data| data.len() == 1 && data[0] & bit != 0);
            let count = |kind| told.iter().filter(|told| **told == kind).count();
            prop_assert_eq!(count(PanicKind::Panicked), usize::from(said(PANICKED)));
            prop_assert!(count(PanicKind::CrashKernel) <= usize::from(said(CRASH_LOADED)));
        }
    }
}
