//! The header of a saved guest: everything that decides whether a host can run it, before a byte of memory moves.

use std::collections::BTreeMap;

use pnet_base::MacAddr;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmm_control::MachineType;

use super::payload::PayloadKind;
use super::processor::{self, Leaves, Model, ProcessorError};

/// The largest difference between two time stamp counters that a guest lives with where KVM cannot scale them: what NTP corrects.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The part of a configuration that the guest sees, with what is only known once its devices are open. Two guests of equal
/// shape have the same memory map, the same PCI addresses and the same tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub vm: Uuid,
    pub machine: MachineType,
    pub vcpus: u16,
    pub memory_bytes: u64,
    pub max_memory_bytes: u64,
    /// COM1 or virtio takes what is typed on the console.
    pub virtio_keyboard: bool,
    pub disks: Vec<DiskShape>,
    pub nics: Vec<NicShape>,
}

/// A disk as the guest knows it. Its name and its file are the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskShape {
    pub bytes: u64,
    pub serial: String,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicShape {
    pub mac: MacAddr,
    pub mtu: u16,
}

/// The host that a guest ran on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFacts {
    /// Kernel release, as `uname` tells.
    pub kernel: String,
    pub processor: Model,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    pub shape: Shape,
    pub host: HostFacts,
    /// As the first vCPU was given it. The state of each vCPU has its own, which differs in where the vCPU is.
    pub cpuid: Leaves,
    pub tsc_khz: u32,
    /// What the states are, and their versions.
    pub payloads: BTreeMap<PayloadKind, u32>,
}

/// What a host has to offer to a guest that comes.
#[derive(Debug, Clone)]
pub struct Here {
    pub shape: Shape,
    pub host: HostFacts,
    /// What KVM supports.
    pub cpuid: Leaves,
    pub tsc_khz: u32,
    pub scales_tsc: bool,
}

/// Why a saved guest cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("the header cannot be read")]
    Form(#[source] serde_json::Error),
    #[error("the saved guest is {saved}, this process is for {here}")]
    OtherVm { saved: Uuid, here: Uuid },
    #[error("the saved guest's {what} is {saved}, here it is {here}")]
    Differs { what: String, saved: String, here: String },
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    #[error("the guest's clock counts {saved} kHz, this host's {here} kHz, and its KVM cannot scale it")]
    Tsc { saved: u32, here: u32 },
    #[error("the saved state of the {kind} has version {saved}; this program reads {known:?}")]
    Payload { kind: PayloadKind, saved: u32, known: Option<u32> },
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        // Maps with text keys and plain numbers: neither way in which JSON can fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        serde_json::from_slice(bytes).map_err(HeaderError::Form)
    }

    /// Whether the guest can run here.
    pub fn check(&self, here: &Here) -> Result<(), HeaderError> {
        self.shape.check(&here.shape)?;
        processor::check(&self.cpuid, &here.cpuid)?;
        let apart = u64::from(self.tsc_khz.abs_diff(here.tsc_khz));
        if !here.scales_tsc && apart * 1_000_000 > u64::from(here.tsc_khz) * TSC_TOLERANCE_PPM {
            return Err(HeaderError::Tsc { saved: self.tsc_khz, here: here.tsc_khz });
        }
        let known = PayloadKind::versions();
        for (kind, saved) in &self.payloads {
            let known = known.get(kind).copied();
            if known != Some(*saved) {
                return Err(HeaderError::Payload { kind: *kind, saved: *saved, known });
            }
        }
        if self.host != here.host {
            // Allowed: features were compared above, and KVM's own structs do not change. But a person who looks for the reason of
            // a strange guest starts here (rule 21).
            tracing::warn!(
                from_kernel = %self.host.kernel,
                here_kernel = %here.host.kernel,
                from_processor = %self.host.processor,
                here_processor = %here.host.processor,
                "the guest comes from a host that is not like this one"
            );
        }
        Ok(())
    }
}

impl Shape {
    fn check(&self, here: &Shape) -> Result<(), HeaderError> {
        if self.vm != here.vm {
            return Err(HeaderError::OtherVm { saved: self.vm, here: here.vm });
        }
        let same = |what: &str, saved: &dyn std::fmt::Debug, here: &dyn std::fmt::Debug| {
            let (saved, here) = (format!("{saved:?}"), format!("{here:?}"));
            if saved == here { Ok(()) } else { Err(HeaderError::Differs { what: what.to_owned(), saved, here }) }
        };
        same("machine type", &self.machine, &here.machine)?;
        same("number of vCPUs", &self.vcpus, &here.vcpus)?;
        same("memory in bytes", &self.memory_bytes, &here.memory_bytes)?;
        same("most memory in bytes", &self.max_memory_bytes, &here.max_memory_bytes)?;
        same("keyboard on virtio", &self.virtio_keyboard, &here.virtio_keyboard)?;
        same("number of disks", &self.disks.len(), &here.disks.len())?;
        for (at, (saved, here)) in self.disks.iter().zip(&here.disks).enumerate() {
            same(&format!("disk {at}"), saved, here)?;
        }
        same("number of network cards", &self.nics.len(), &here.nics.len())?;
        for (at, (saved, here)) in self.nics.iter().zip(&here.nics).enumerate() {
            same(&format!("network card {at}"), saved, here)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::processor::tests::processor;
    use super::*;

    pub fn here() -> Here {
        let cpuid = processor();
        Here {
            shape: Shape {
                vm: Uuid::from_u128(7),
                machine: MachineType::QDirect1,
                vcpus: 2,
                memory_bytes: 32 << 20,
                max_memory_bytes: 64 << 20,
                virtio_keyboard: false,
                disks: vec![DiskShape { bytes: 1 << 20, serial: "d1".into(), read_only: false }],
                nics: vec![NicShape { mac: MacAddr::new(2, 0, 0, 0, 0, 1), mtu: 1500 }],
            },
            host: HostFacts { kernel: "6.18.0".into(), processor: Model::of(&cpuid) },
            cpuid,
            tsc_khz: 2_000_000,
            scales_tsc: false,
        }
    }

    /// The header of a guest that ran here.
    pub fn header() -> Header {
        let Here { shape, host, cpuid, tsc_khz, .. } = here();
        Header { shape, host, cpuid, tsc_khz, payloads: PayloadKind::versions() }
    }

    #[test]
    fn a_guest_goes_on_where_it_was_and_on_another_kernel() {
        let mut header = header();
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        header.check(&here()).unwrap();
        header.host.kernel = "6.1.0".into();
        header.check(&here()).unwrap();
    }

    #[test]
    fn whatever_the_guest_would_see_differ_is_refused_by_name() {
        type Change = fn(&mut Header);
        let changes: [(Change, &str); 12] = [
            (|h| h.shape.vcpus = 3, "number of vCPUs is 3, here it is 2"),
            (|h| h.shape.memory_bytes = 64 << 20, "memory in bytes is 67108864"),
            (|h| h.shape.max_memory_bytes = 32 << 20, "most memory"),
            (|h| h.shape.virtio_keyboard = true, "keyboard"),
            (|h| h.shape.disks.clear(), "number of disks is 0, here it is 1"),
            (|h| h.shape.disks[0].bytes += 512, "disk 0"),
            (|h| h.shape.disks[0].serial.push('x'), "d1x"),
            (|h| h.shape.disks[0].read_only = true, "disk 0"),
            (|h| h.shape.nics.clear(), "number of network cards"),
            (|h| h.shape.nics[0].mtu = 9000, "network card 0"),
            (|h| h.shape.nics[0].mac = MacAddr::new(2, 0, 0, 0, 0, 2), "02:00:00:00:00:02"),
            (|h| h.shape.vm = Uuid::nil(), "this process is for"),
        ];
        for (change, words) in changes {
            let mut header = header();
            change(&mut header);
            let refusal = header.check(&here()).unwrap_err().to_string();
            assert!(refusal.contains(words), "{refusal} does not say {words}");
        }
    }

    #[test]
    fn another_processor_clock_or_form_is_refused() {
        let mut foreign = header();
        foreign.cpuid.0[2].ebx = u32::MAX;
        assert!(matches!(foreign.check(&here()), Err(HeaderError::Processor(_))));

        let mut drifted = header();
        drifted.tsc_khz += 500;
        drifted.check(&here()).unwrap();
        drifted.tsc_khz += 1;
        assert!(matches!(drifted.check(&here()), Err(HeaderError::Tsc { .. })));
        drifted.check(&Here { scales_tsc: true, ..here() }).unwrap();

        let mut newer = header();
        newer.payloads.insert(PayloadKind::Vcpu, 99);
        assert!(matches!(newer.check(&here()), Err(HeaderError::Payload { kind: PayloadKind::Vcpu, saved: 99, .. })));
        let mut strange: serde_json::Value = serde_json::from_slice(&header().encode()).unwrap();
        strange["payloads"]["tape_drive"] = 1.into();
        assert!(matches!(Header::decode(strange.to_string().as_bytes()), Err(HeaderError::Form(_))));
        assert!(matches!(Header::decode(b"{}"), Err(HeaderError::Form(_))));
    }
}
