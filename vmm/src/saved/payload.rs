//! The state of one part of a guest, with the version of its form.
//!
//! Each part has its own version, so that one of them can change without the others (rules 22 and 23 of reference peers-vmm §4.2). A part is
//! JSON: a field that is added has a default, and what an older program cannot read it refuses by the version.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Whose state it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PayloadKind {
    /// One processor; the instance is its number.
    Vcpu,
    /// KVM's two PICs and the I/O APIC.
    Irqchip,
    /// KVM's timer chip.
    Pit,
    /// The guest's paravirtual clock.
    Clock,
    PowerManagement,
    RealTimeClock,
    Serial,
    ResetPort,
    PanicPort,
    /// The VM generation ID.
    Generation,
    /// Everything on the PCI bus. Its functions have versions of their own inside.
    Pci,
}

impl PayloadKind {
    pub const ALL: [Self; 11] = [
        Self::Vcpu,
        Self::Irqchip,
        Self::Pit,
        Self::Clock,
        Self::PowerManagement,
        Self::RealTimeClock,
        Self::Serial,
        Self::ResetPort,
        Self::PanicPort,
        Self::Generation,
        Self::Pci,
    ];

    /// The form that this program writes, and the only one that it reads so far.
    pub fn version(self) -> u32 {
        1
    }

    /// All of them, as a header tells.
    pub fn versions() -> BTreeMap<PayloadKind, u32> {
        Self::ALL.into_iter().map(|kind| (kind, kind.version())).collect()
    }
}

impl fmt::Display for PayloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpu => "vCPU",
            Self::Irqchip => "interrupt controllers",
            Self::Pit => "timer chip",
            Self::Clock => "clock",
            Self::PowerManagement => "power management",
            Self::RealTimeClock => "CMOS clock",
            Self::Serial => "serial port",
            Self::ResetPort => "reset port",
            Self::PanicPort => "panic port",
            Self::Generation => "VM generation",
            Self::Pci => "PCI bus",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    pub kind: PayloadKind,
    pub instance: u32,
    pub version: u32,
    pub data: serde_json::Value,
}

#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("the saved state of the {kind} cannot be written")]
    Encode {
        kind: PayloadKind,
        #[source]
        source: serde_json::Error,
    },
    #[error("the saved state of the {kind} (number {instance}) cannot be read")]
    Decode {
        kind: PayloadKind,
        instance: u32,
        #[source]
        source: serde_json::Error,
    },
    #[error("the saved state of the {kind} has version {found}; this program reads {known}")]
    Version { kind: PayloadKind, found: u32, known: u32 },
    #[error("the saved guest has no state of the {kind} (number {instance})")]
    Missing { kind: PayloadKind, instance: u32 },
    #[error("the saved guest has two states of the {kind} (number {instance})")]
    Twice { kind: PayloadKind, instance: u32 },
    #[error("the saved guest has a state of the {kind} (number {instance}), and there is none here")]
    Surplus { kind: PayloadKind, instance: u32 },
}

impl Payload {
    pub fn new(kind: PayloadKind, instance: u32, state: &impl Serialize) -> Result<Self, PayloadError> {
        let data = serde_json::to_value(state).map_err(|source| PayloadError::Encode { kind, source })?;
        Ok(Self { kind, instance, version: kind.version(), data })
    }

    fn decode<T: DeserializeOwned>(self) -> Result<T, PayloadError> {
        let Self { kind, instance, version, data } = self;
        if version != kind.version() {
            return Err(PayloadError::Version { kind, found: version, known: kind.version() });
        }
        serde_json::from_value(data).map_err(|source| PayloadError::Decode { kind, instance, source })
    }
}

/// All payloads of a guest, each to be taken once.
#[derive(Debug, Default)]
pub struct Payloads(BTreeMap<(PayloadKind, u32), Payload>);

impl Payloads {
    pub fn add(&mut self, payload: Payload) -> Result<(), PayloadError> {
        let (kind, instance) = (payload.kind, payload.instance);
        match self.0.insert((kind, instance), payload) {
            None => Ok(()),
            Some(_) => Err(PayloadError::Twice { kind, instance }),
        }
    }

    pub fn take<T: DeserializeOwned>(&mut self, kind: PayloadKind, instance: u32) -> Result<T, PayloadError> {
        self.0.remove(&(kind, instance)).ok_or(PayloadError::Missing { kind, instance })?.decode()
    }

    /// Whether everything was taken.
    pub fn finish(self) -> Result<(), PayloadError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some((kind, instance)) => Err(PayloadError::Surplus { kind, instance }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_taken_once_and_none_is_left_over() {
        let mut payloads = Payloads::default();
        payloads.add(Payload::new(PayloadKind::Vcpu, 1, &7u32).unwrap()).unwrap();
        payloads.add(Payload::new(PayloadKind::Pit, 0, &8u32).unwrap()).unwrap();
        let again = payloads.add(Payload::new(PayloadKind::Pit, 0, &9u32).unwrap());
        assert!(matches!(again, Err(PayloadError::Twice { kind: PayloadKind::Pit, instance: 0 })));
        assert_eq!(payloads.take::<u32>(PayloadKind::Vcpu, 1).unwrap(), 7);
        let missing = payloads.take::<u32>(PayloadKind::Vcpu, 1);
        assert!(matches!(missing, Err(PayloadError::Missing { kind: PayloadKind::Vcpu, instance: 1 })));
        let surplus = payloads.finish();
        assert!(matches!(surplus, Err(PayloadError::Surplus { kind: PayloadKind::Pit, instance: 0 })));
    }

    #[test]
    fn another_version_or_form_is_refused() {
        let mut payloads = Payloads::default();
        let mut newer = Payload::new(PayloadKind::Clock, 0, &1u32).unwrap();
        newer.version = 2;
        payloads.add(newer).unwrap();
        payloads.add(Payload::new(PayloadKind::Pit, 0, &"text").unwrap()).unwrap();
        let refused = payloads.take::<u32>(PayloadKind::Clock, 0);
        assert!(matches!(refused, Err(PayloadError::Version { found: 2, known: 1, .. })));
        let refused = payloads.take::<u32>(PayloadKind::Pit, 0);
        assert!(matches!(refused, Err(PayloadError::Decode { kind: PayloadKind::Pit, .. })));
        payloads.finish().unwrap();
    }
}
