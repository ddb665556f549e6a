//! One machine: RAM, KVM's part, buses and devices, vCPUs. Built from the configuration, run until the guest ends or resets, and
//! taken down whole. A reset builds a new one in the same process: nothing of the old state can be forgotten.
//!
//! [`layout`] is the memory map, [`kvm`] and [`msi`] the kernel's side, [`build`] puts everything together, [`fixed`] the functions that
//! every guest has. Disks and network cards come and go while it runs: [`inventory`] says what there is, [`device_manager`] opens and
//! closes it.

pub mod build;
pub mod device_manager;
pub mod fixed;
pub mod inventory;
pub mod kvm;
pub mod layout;
pub mod msi;
pub mod open_device;

#[cfg(test)]
mod inventory_tests;
#[cfg(test)]
mod plug_tests;

use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_control::PanicKind;

use crate::cpu::gate::{RunGate, Stop};
use crate::cpu::vcpu::{Vcpu, VcpuEvent, VcpuEvents};
use crate::devices::legacy::pm::PowerManagement;
use crate::devices::legacy::serial::SerialPort;
use crate::devices::legacy::{PowerControl, PowerRequest};
use crate::incident::NmiSink;
use crate::lease::quiesce::{Quiesce, QuiesceError};
use crate::sandbox::Role;
use crate::saved::parts::{Parts, PartsError};
use crate::saved::payload::Payloads;
use crate::saved::session::Saves;
use crate::virtio::locked;

pub use build::{Beginning, Context, MachineError, build};
pub use fixed::FixedHandles;

/// How long the disks may take to end their I/O when a machine is taken down.
const DRAIN: Duration = Duration::from_secs(5);
/// More than can wait: each vCPU reports once, and further requests change nothing.
const INBOX: usize = 64;

/// Why a machine ends. Whoever says it first decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Reset,
    GuestPoweredOff,
    /// From outside: the control socket or a signal.
    PoweredOff,
    /// By its configuration, because it panicked.
    GuestPanicked,
    /// By its configuration, because its watchdog ran out.
    WatchdogExpired,
    Fault(String),
}

/// The way to the owner of the machine, from vCPUs, devices and the control thread. Never waits.
pub struct Endings {
    sender: SyncSender<Ending>,
    gate: Arc<RunGate>,
}

impl Endings {
    pub fn new(gate: Arc<RunGate>) -> (Arc<Self>, EndingsReceiver) {
        let (sender, receiver) = sync_channel(INBOX);
        (Arc::new(Self { sender, gate }), EndingsReceiver(receiver))
    }

    /// Stops the vCPUs before their next instruction, and tells the owner.
    pub fn post(&self, ending: Ending) {
        self.gate.shut(Stop::End);
        // When the inbox is full the machine ends for one of those reasons already.
        let _ = self.sender.try_send(ending);
    }
}

impl PowerControl for Endings {
    fn request(&self, request: PowerRequest) {
        self.post(match request {
            PowerRequest::Reset => Ending::Reset,
            PowerRequest::PowerOff => Ending::GuestPoweredOff,
        });
    }
}

impl VcpuEvents for Endings {
    fn report(&self, event: VcpuEvent) {
        self.post(match event {
            VcpuEvent::Reset => Ending::Reset,
            VcpuEvent::PowerOff => Ending::GuestPoweredOff,
            VcpuEvent::Fault(what) => Ending::Fault(what),
        });
    }
}

/// The owner's end.
pub struct EndingsReceiver(Receiver<Ending>);

impl EndingsReceiver {
    /// `None` when there is none within this time.
    pub fn wait(&self, at_most: Duration) -> Result<Option<Ending>, RecvError> {
        match self.0.recv_timeout(at_most) {
            Ok(ending) => Ok(Some(ending)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(RecvError),
        }
    }

    /// Forgets what concerned the last machine. An order to power off is kept: it was for the guest, not for one of its lives.
    pub fn drain(&self) -> Option<Ending> {
        let mut kept = None;
        while let Ok(ending) = self.0.try_recv() {
            if ending == Ending::PoweredOff {
                kept = Some(ending);
            }
        }
        kept
    }
}

/// A machine that was built. Its vCPUs run after [`start`](Self::start).
pub struct Machine {
    /// Memory, KVM's part and the devices. Who saves the guest has them too.
    parts: Arc<Parts>,
    vcpus: Vec<Vcpu>,
    threads: Vec<JoinHandle<()>>,
    saves: Arc<Saves>,
    fixed: FixedHandles,
    nmi: Arc<dyn NmiSink>,
}

impl Machine {
    pub fn pm(&self) -> Arc<Mutex<PowerManagement>> {
        Arc::clone(&self.parts.legacy.pm)
    }

    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        Arc::clone(&self.parts.legacy.serial)
    }

    /// The functions that every guest has.
    pub fn fixed(&self) -> FixedHandles {
        self.fixed.clone()
    }

    /// What the guest's kernel has reported of its end; of one from elsewhere, where it was.
    pub fn panic(&self) -> Option<PanicKind> {
        locked(&self.parts.legacy.pvpanic).reported()
    }

    /// The way to interrupt all vCPUs.
    pub fn nmi(&self) -> Arc<dyn NmiSink> {
        Arc::clone(&self.nmi)
    }

    /// Host address ranges of guest RAM.
    pub fn ram_in_host(&self) -> Vec<(u64, u64)> {
        let memory = &self.parts.memory;
        memory
            .iter()
            .filter_map(|region| {
                let start = memory.get_host_address(region.start_addr()).ok()? as u64;
                Some((start, start + region.len()))
            })
            .collect()
    }

    /// For who saves the guest.
    pub fn parts(&self) -> Arc<Parts> {
        Arc::clone(&self.parts)
    }

    /// Takes the states of a guest from elsewhere over. Its memory is in its place.
    pub fn restore(&mut self, payloads: Payloads) -> Result<Vec<CpuId>, PartsError> {
        self.parts.restore(&mut self.vcpus, payloads)
    }

    /// Opens the disks that were built closed.
    pub fn open_disks(&self) -> Result<(), QuiesceError> {
        self.parts.devices.open_disks()
    }

    /// Starts the vCPU threads, and returns when each of them can be stopped.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let (ready, is_ready) = sync_channel(self.vcpus.len());
        self.parts.shared.gate.open(Stop::End);
        let count = self.vcpus.len();
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let ready = ready.clone();
            let thread = Role::Vcpu
                .spawn(&index.to_string(), move || {
                    vcpu.run(|| {
                        // The receiver lives until all have said so.
                        let _ = ready.send(());
                    });
                })
                .map_err(MachineError::Thread)?;
            self.threads.push(thread);
        }
        drop(ready);
        for _ in 0..count {
            if is_ready.recv().is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Stops the vCPUs and ends all I/O. True when nothing of this machine is in the kernel any more; false when its storage does not
    /// answer. The guest's memory stays until the last request has ended.
    pub fn stop(&mut self) -> bool {
        self.parts.shared.gate.shut(Stop::End);
        // Who saves this machine lets go of it first: it asks the vCPUs and the disks.
        self.saves.give_up();
        self.parts.devices.detach();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread ended by a panic");
            }
        }
        self.parts.disk_gate.close();
        self.fixed.stop();
        for nic in self.parts.devices.nics() {
            if let Err(error) = nic.stop() {
                tracing::error!(nic = nic.name(), %error, "the guest has ended, its network card has not");
            }
        }
        let until = Instant::now() + DRAIN;
        let mut drained = true;
        for disk in self.parts.devices.disks() {
            if let Err(error) = disk.cancel_and_drain(until) {
                tracing::error!(%error, "the guest has ended, its I/O has not");
                drained = false;
            }
        }
        drained
    }
}
