//! A machine as far as it is saved, and the orders in which its parts are read and written.
//!
//! Read: no device comes or goes, vCPUs stand and have finished what KVM left them with, disks are drained, then devices, then vCPUs and KVM's interrupt controllers:
//! an interrupt that a device raised last is in one of those by then (rules 25 and 26 of reference peers-vmm §4.2). Written: vCPUs,
//! interrupt controllers, clock, then the devices, which raise their interrupts again; each of them does that itself, because only it
//! knows what its driver may wait for (rules 25, 27, 28).

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::frame::PAGE_BYTES;
use super::header::{Header, Here, HostFacts, Shape};
use super::payload::{Payload, PayloadError, PayloadKind, Payloads};
use super::processor::{Leaves, Model};
use super::vcpu::{self, SavedVcpu, VcpuAbilities, VcpuStateError};
use super::vm::{SavedClock, SavedIrqchip, SavedPit};
use crate::cpu::vcpu::{Shared, Vcpu};
use crate::devices::legacy::pm::PowerManagement;
use crate::devices::legacy::pvpanic::{PvPanic, PvPanicError};
use crate::devices::legacy::reset::ResetPort;
use crate::devices::legacy::rtc::{NoClock, RealTimeClock};
use crate::devices::legacy::serial::{NoSerial, SerialPort};
use crate::devices::legacy::vmgenid::{VmGeneration, VmGenerationError};
use crate::lease::quiesce::{DiskGate, Quiesce, QuiesceError};
use crate::machine::device_manager::DeviceManager;
use crate::machine::kvm::{KvmError, KvmVm};
use crate::memory::GuestMemory;
use crate::pci::{PciBus, PciError};
use crate::virtio::locked;

/// A vCPU leaves the guest in microseconds once kicked, and its state is read in milliseconds.
const VCPUS: Duration = Duration::from_secs(5);
/// For storage that works.
const DRAIN: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    #[error("the guest does not stop")]
    NotParked,
    #[error("vCPU {index} does not answer; it has ended or hangs in the kernel")]
    NoVcpu { index: u16 },
    #[error("a thread hangs while it submits I/O")]
    HangingSubmission,
    #[error(transparent)]
    Disk(#[from] QuiesceError),
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error(transparent)]
    RealTimeClock(#[from] NoClock),
    #[error(transparent)]
    Serial(#[from] NoSerial),
    #[error(transparent)]
    PanicPort(#[from] PvPanicError),
    #[error(transparent)]
    Generation(#[from] VmGenerationError),
}

/// Devices that are not on the PCI bus.
#[derive(Clone)]
pub struct LegacyParts {
    pub pm: Arc<Mutex<PowerManagement>>,
    pub clock: Arc<Mutex<RealTimeClock>>,
    pub serial: Arc<Mutex<SerialPort>>,
    pub reset: Arc<Mutex<ResetPort>>,
    pub pvpanic: Arc<Mutex<PvPanic>>,
    pub generation: Arc<VmGeneration>,
}

pub struct Parts {
    pub memory: GuestMemory,
    pub vm: Arc<KvmVm>,
    pub pci: Arc<PciBus>,
    pub legacy: LegacyParts,
    pub shared: Arc<Shared>,
    pub devices: Arc<DeviceManager>,
    pub disk_gate: Arc<DiskGate>,
    /// But for its slots, whose devices come and go.
    pub shape: Shape,
    /// What KVM supports here.
    pub supported: Leaves,
    pub abilities: VcpuAbilities,
    pub processor: Mutex<GivenProcessor>,
}

/// What the guest was given, here or where it began.
#[derive(Debug, Clone)]
pub struct GivenProcessor {
    /// Of the first vCPU.
    pub cpuid: Leaves,
    pub tsc_khz: u32,
}

impl Parts {
    fn given(&self) -> GivenProcessor {
        self.processor.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn host(&self) -> HostFacts {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        HostFacts { kernel, processor: Model::of(&self.supported) }
    }

    /// With the devices of now.
    fn shape(&self) -> Shape {
        Shape { slots: self.devices.shapes(&self.pci), ..self.shape.clone() }
    }

    /// What this machine can take over. Before it has.
    pub fn here(&self) -> Here {
        Here {
            shape: self.shape(),
            host: self.host(),
            cpuid: self.supported.clone(),
            tsc_khz: self.given().tsc_khz,
            scales_tsc: self.abilities.scales_tsc,
        }
    }

    pub fn header(&self) -> Header {
        let GivenProcessor { cpuid, tsc_khz } = self.given();
        let (shape, host) = (self.shape(), self.host());
        Header { shape, host, cpuid, tsc_khz, payloads: PayloadKind::versions() }
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.memory.iter().map(|region| region.len() / PAGE_BYTES).sum()
    }

    /// Has every vCPU's thread do something, and returns the results in order of the vCPUs.
    fn on_vcpus<T: Send + 'static>(
        &self,
        work: impl Fn(u16, &VcpuFd, &CpuId) -> T + Clone + Send + 'static,
    ) -> Result<Vec<T>, PartsError> {
        let until = Instant::now() + VCPUS;
        let (done, results) = channel();
        for index in 0..self.shape.vcpus {
            let (work, done) = (work.clone(), done.clone());
            let errand = move |vcpu: &VcpuFd, cpuid: &CpuId| {
                // Nobody there: the caller has given up waiting.
                let _ = done.send((index, work(index, vcpu, cpuid)));
            };
            self.shared.errands.put(index, Box::new(errand));
        }
        drop(done);
        self.shared.gate.send_on_errands();
        let mut found: Vec<Option<T>> = (0..self.shape.vcpus).map(|_| None).collect();
        for _ in 0..self.shape.vcpus {
            match results.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((index, result)) => found[usize::from(index)] = Some(result),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        (0u16..).zip(found).map(|(index, result)| result.ok_or(PartsError::NoVcpu { index })).collect()
    }

    /// Waits until the guest stands, between two instructions, and none of its requests is in the kernel. The gate is shut, and `disk_gate`
    /// is held.
    pub fn settle(&self) -> Result<(), PartsError> {
        if !self.shared.gate.wait_parked(Instant::now() + VCPUS) {
            return Err(PartsError::NotParked);
        }
        self.on_vcpus(|_, _, _| ())?;
        let until = Instant::now() + DRAIN;
        while self.disk_gate.submitters() > 0 {
            if Instant::now() >= until {
                return Err(PartsError::HangingSubmission);
            }
            std::thread::sleep(PAUSE);
        }
        // Those too that the guest has given up and that still read into its memory.
        for disk in self.devices.disks() {
            disk.cancel_and_drain(until)?;
        }
        Ok(())
    }

    /// An unplug that was asked for is one of the guest's states from here on.
    pub fn ask_for_leaving(&self) -> Result<(), PartsError> {
        Ok(self.devices.ask_for_leaving(&self.pci)?)
    }

    /// Everything but memory, of a guest that was settled. Devices may have written to memory until this returns (rule 4).
    pub fn save(&self) -> Result<Vec<Payload>, PartsError> {
        use PayloadKind as Kind;
        let legacy = &self.legacy;
        let mut payloads = vec![
            Payload::new(Kind::PowerManagement, 0, &locked(&legacy.pm).save())?,
            Payload::new(Kind::RealTimeClock, 0, &locked(&legacy.clock).save())?,
            Payload::new(Kind::Serial, 0, &locked(&legacy.serial).save())?,
            Payload::new(Kind::ResetPort, 0, &locked(&legacy.reset).save())?,
            Payload::new(Kind::PanicPort, 0, &locked(&legacy.pvpanic).save())?,
            Payload::new(Kind::Generation, 0, &legacy.generation.save())?,
            Payload::new(Kind::Pci, 0, &self.pci.save()?)?,
        ];
        let abilities = self.abilities.clone();
        let vcpus = self.on_vcpus(move |index, vcpu, cpuid| vcpu::save(index.into(), vcpu, cpuid, &abilities))?;
        for (index, vcpu) in (0u32..).zip(vcpus) {
            payloads.push(Payload::new(Kind::Vcpu, index, &vcpu?)?);
        }
        let vm = self.vm.fd();
        payloads.push(Payload::new(Kind::Irqchip, 0, &SavedIrqchip::save(vm)?)?);
        payloads.push(Payload::new(Kind::Pit, 0, &SavedPit::save(vm)?)?);
        payloads.push(Payload::new(Kind::Clock, 0, &SavedClock::save(vm)?)?);
        Ok(payloads)
    }

    /// Takes everything over but memory, which is in its place. `vcpus` are those of this machine, and have not run. Returns what they
    /// were given as CPUID. After an error the machine is of no use.
    pub fn restore(&self, vcpus: &mut [Vcpu], mut payloads: Payloads) -> Result<Vec<CpuId>, PartsError> {
        use PayloadKind as Kind;
        let mut given = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let index = u32::from(vcpu.index());
            let saved: SavedVcpu = payloads.take(Kind::Vcpu, index)?;
            saved.restore(index, vcpu.fd(), &self.supported, &self.abilities)?;
            let cpuid = saved.cpuid(index)?;
            if index == 0 {
                let processor = GivenProcessor { cpuid: Leaves::from(&cpuid), tsc_khz: saved.tsc_khz() };
                *self.processor.lock().unwrap_or_else(PoisonError::into_inner) = processor;
            }
            vcpu.set_cpuid(cpuid.clone());
            given.push(cpuid);
        }
        let vm = self.vm.fd();
        payloads.take::<SavedIrqchip>(Kind::Irqchip, 0)?.restore(vm)?;
        payloads.take::<SavedPit>(Kind::Pit, 0)?.restore(vm)?;
        payloads.take::<SavedClock>(Kind::Clock, 0)?.restore(vm)?;

        let legacy = &self.legacy;
        locked(&legacy.pm).restore(payloads.take(Kind::PowerManagement, 0)?);
        locked(&legacy.clock).restore(payloads.take(Kind::RealTimeClock, 0)?)?;
        locked(&legacy.serial).restore(payloads.take(Kind::Serial, 0)?)?;
        locked(&legacy.reset).restore(payloads.take(Kind::ResetPort, 0)?);
        locked(&legacy.pvpanic).restore(&payloads.take(Kind::PanicPort, 0)?)?;
        // It raises an event of power management, which is in its place.
        legacy.generation.restore(payloads.take(Kind::Generation, 0)?)?;
        self.pci.restore(payloads.take(Kind::Pci, 0)?)?;
        payloads.finish()?;
        self.devices.follow_guest();
        Ok(given)
    }
}
