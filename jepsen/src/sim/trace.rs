//! What happened, as one hash: two runs of a seed that differ anywhere differ here. With `--trace` it is also printed.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use statemachine::HostId;

#[derive(Clone)]
pub struct Trace {
    hasher: Arc<Mutex<blake3::Hasher>>,
    prints: Prints,
}

/// How much of a run is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Prints {
    #[default]
    Nothing,
    Notes,
    Packets,
}

impl Trace {
    pub fn new(prints: Prints) -> Trace {
        Trace { hasher: Arc::default(), prints }
    }

    pub fn packet(&self, now_ms: u64, from: HostId, to: HostId, (kind, channel, len): &(u8, u16, usize)) {
        let mut hasher = self.hasher.lock().unwrap_or_else(PoisonError::into_inner);
        for number in [now_ms, from.0, to.0, u64::from(*kind), u64::from(*channel), *len as u64] {
            hasher.update(&number.to_le_bytes());
        }
        if self.prints == Prints::Packets {
            println!("{:>9.3} {from} -> {to} kind {kind} channel {channel} {len} bytes", now_ms as f64 / 1000.0);
        }
    }

    /// Something that people would want to read.
    pub fn note(&self, now_ms: u64, what: impl Display) {
        let line = format!("{:>9.3} {what}", now_ms as f64 / 1000.0);
        self.hasher.lock().unwrap_or_else(PoisonError::into_inner).update(line.as_bytes());
        if self.prints >= Prints::Notes {
            println!("{line}");
        }
    }

    pub fn hash(&self) -> String {
        let hash = self.hasher.lock().unwrap_or_else(PoisonError::into_inner).finalize();
        hash.to_hex()[..16].to_owned()
    }
}
