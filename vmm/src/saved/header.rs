//! The header of a saved guest: everything that decides whether a host can run it, before a byte of memory moves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use pnet_base::MacAddr;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmm_control::host::tsc_fits;
use vmm_control::{CpuConfig, CpuModel, MachineType};

use super::payload::PayloadKind;
use super::processor::{self, Leaves, Model, ProcessorError};

/// The part of a configuration that the guest sees, with what is only known once its devices are open. Two guests of equal
/// shape have the same memory map, the same PCI addresses and the same tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub vm: Uuid,
    pub machine: MachineType,
    pub vcpus: u16,
    /// Left out where it is what every guest had before there was a choice, so that a vmm of then can read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuConfig>,
    pub memory_bytes: u64,
    pub max_memory_bytes: u64,
    /// COM1 or virtio takes what is typed on the console.
    pub virtio_keyboard: bool,
    /// The watchdog is the one fixed function that a guest can be without.
    pub watchdog: bool,
    /// By slot. An address that a guest knows has the same device everywhere.
    pub slots: BTreeMap<u8, DeviceShape>,
}

/// What is in a slot. The console, which every guest has in slot 0, is not named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceShape {
    Disk(DiskShape),
    Nic(NicShape),
}

impl fmt::Display for DeviceShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(DiskShape { bytes, serial, read_only }) => {
                let kind = if *read_only { "a read-only disk" } else { "a disk" };
                write!(f, "{kind} of {bytes} bytes with the serial {serial:?}")
            }
            Self::Nic(NicShape { mac, mtu }) => write!(f, "a network card {mac} with an MTU of {mtu}"),
        }
    }
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
        if !tsc_fits(self.tsc_khz, here.tsc_khz, here.scales_tsc) {
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

/// As a shape has it.
pub fn chosen_cpu(cpu: CpuConfig, vcpus: u16) -> Option<CpuConfig> {
    Some(cpu).filter(|cpu| *cpu != CpuConfig::of(CpuModel::Host, vcpus))
}

impl Shape {
    /// What the guest's processors are.
    pub fn cpu(&self) -> CpuConfig {
        self.cpu.unwrap_or_else(|| CpuConfig::of(CpuModel::Host, self.vcpus))
    }

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
        let (saved_cpu, here_cpu) = (self.cpu(), here.cpu());
        same("model of processors", &saved_cpu.model.as_str(), &here_cpu.model.as_str())?;
        same("number of sockets", &saved_cpu.sockets, &here_cpu.sockets)?;
        same("number of cores of a socket", &saved_cpu.cores, &here_cpu.cores)?;
        same("number of threads of a core", &saved_cpu.threads, &here_cpu.threads)?;
        same("memory in bytes", &self.memory_bytes, &here.memory_bytes)?;
        same("most memory in bytes", &self.max_memory_bytes, &here.max_memory_bytes)?;
        same("keyboard on virtio", &self.virtio_keyboard, &here.virtio_keyboard)?;
        same("watchdog", &self.watchdog, &here.watchdog)?;
        let slots: BTreeSet<u8> = self.slots.keys().chain(here.slots.keys()).copied().collect();
        for slot in slots {
            let (saved, here) = (self.slots.get(&slot), here.slots.get(&slot));
            if saved != here {
                let words =
                    |device: Option<&DeviceShape>| device.map_or_else(|| "none".to_owned(), DeviceShape::to_string);
                let what = format!("device in slot {slot}");
                return Err(HeaderError::Differs { what, saved: words(saved), here: words(here) });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::processor::tests::processor;
    use super::*;

    fn disk(bytes: u64, serial: &str, read_only: bool) -> DeviceShape {
        DeviceShape::Disk(DiskShape { bytes, serial: serial.into(), read_only })
    }

    fn nic(last: u8, mtu: u16) -> DeviceShape {
        DeviceShape::Nic(NicShape { mac: MacAddr::new(2, 0, 0, 0, 0, last), mtu })
    }

    pub fn here() -> Here {
        let cpuid = processor();
        Here {
            shape: Shape {
                vm: Uuid::from_u128(7),
                machine: MachineType::QDirect1,
                vcpus: 2,
                cpu: None,
                memory_bytes: 32 << 20,
                max_memory_bytes: 64 << 20,
                virtio_keyboard: false,
                watchdog: false,
                slots: BTreeMap::from([(1, disk(1 << 20, "d1", false)), (23, nic(1, 1500))]),
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

    fn cpu(sockets: u16, cores: u16, threads: u16) -> CpuConfig {
        CpuConfig { model: CpuModel::Host, sockets, cores, threads }
    }

    #[test]
    fn a_guest_without_a_choice_of_processors_has_the_header_of_before() {
        let mut header = header();
        assert_eq!((header.shape.cpu(), chosen_cpu(cpu(1, 2, 1), 2)), (cpu(1, 2, 1), None));
        assert!(!String::from_utf8(header.encode()).unwrap().contains("\"cpu\""));
        header.shape.cpu = chosen_cpu(cpu(2, 1, 1), 2);
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        // Said or left out, it is the same guest.
        header.shape.cpu = Some(cpu(1, 2, 1));
        header.check(&here()).unwrap();
    }

    #[test]
    fn a_named_model_moves_where_the_host_has_more_or_other_than_its_own_has() {
        let v3 = crate::cpu::model_tests::host("GenuineIntel");
        let mut guest = header();
        guest.cpuid = crate::cpu::model::leaves(CpuModel::X86_64V3, &v3, 39).unwrap();
        guest.shape.cpu = Some(CpuConfig::of(CpuModel::X86_64V3, 2));
        let here = |cpuid: Leaves| Here { shape: guest.shape.clone(), cpuid, ..here() };
        guest.check(&here(v3.clone())).unwrap();
        // AVX-512 and another stepping there; and none of what is not in the model.
        let mut more = v3.clone();
        more.entry(0x7, 0).ebx |= 1 << 16;
        more.entry(0x1, 0).eax += 1;
        guest.check(&here(more.clone())).unwrap();
        let of_the_host = Header { cpuid: more, ..guest.clone() };
        assert!(matches!(of_the_host.check(&here(v3.clone())), Err(HeaderError::Processor(_))));
        let mut less = v3;
        less.entry(0x7, 0).ebx &= !(1 << 5);
        assert!(matches!(guest.check(&here(less)), Err(HeaderError::Processor(_))));
    }

    #[test]
    fn whatever_the_guest_would_see_differ_is_refused_by_name() {
        type Change = fn(&mut Header);
        let changes: [(Change, &str); 19] = [
            (|h| h.shape.vcpus = 3, "number of vCPUs is 3, here it is 2"),
            (|h| h.shape.cpu = Some(CpuConfig::of(CpuModel::X86_64V3, 2)), "\"x86-64-v3\", here it is \"host\""),
            (|h| h.shape.cpu = Some(cpu(2, 1, 1)), "number of sockets is 2, here it is 1"),
            (|h| h.shape.cpu = Some(cpu(1, 1, 1)), "number of cores of a socket is 1, here it is 2"),
            (|h| h.shape.cpu = Some(cpu(1, 2, 2)), "number of threads of a core is 2, here it is 1"),
            (|h| h.shape.memory_bytes = 64 << 20, "memory in bytes is 67108864"),
            (|h| h.shape.max_memory_bytes = 32 << 20, "most memory"),
            (|h| h.shape.virtio_keyboard = true, "keyboard"),
            (|h| h.shape.watchdog = true, "watchdog is true, here it is false"),
            (|h| drop(h.shape.slots.remove(&1)), "slot 1 is none, here it is a disk of 1048576 bytes"),
            (|h| drop(h.shape.slots.insert(1, disk((1 << 20) + 512, "d1", false))), "a disk of 1049088 bytes"),
            (|h| drop(h.shape.slots.insert(1, disk(1 << 20, "d1x", false))), "d1x"),
            (|h| drop(h.shape.slots.insert(1, disk(1 << 20, "d1", true))), "a read-only disk"),
            (|h| drop(h.shape.slots.insert(5, disk(1 << 20, "d2", false))), "slot 5 is a disk of 1048576 bytes"),
            (|h| drop(h.shape.slots.insert(1, nic(1, 1500))), "slot 1 is a network card"),
            (
                |h| h.shape.slots = BTreeMap::from([(2, disk(1 << 20, "d1", false)), (23, nic(1, 1500))]),
                "slot 1 is none",
            ),
            (|h| drop(h.shape.slots.insert(23, nic(1, 9000))), "MTU of 9000, here it is"),
            (|h| drop(h.shape.slots.insert(23, nic(2, 1500))), "02:00:00:00:00:02"),
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
