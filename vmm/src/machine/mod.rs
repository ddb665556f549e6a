//! One machine: RAM, KVM's part, buses and devices, vCPUs. Built from the configuration, run until the guest ends or resets, and
//! taken down whole. A reset builds a new one in the same process: nothing of the old state can be forgotten.
//!
//! [`layout`] is the memory map, [`kvm`] and [`msi`] the kernel's side, [`build`] puts everything together. Disks and network cards
//! come and go while it runs: [`inventory`] says what there is, [`device_manager`] opens and closes it.

pub mod build;
pub mod device_manager;
pub mod inventory;
pub mod kvm;
pub mod layout;
pub mod msi;
pub mod open_device;

#[cfg(test)]
mod inventory_tests;
#[cfg(test)]
mod plug_tests;

use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::cpu::gate::{RunGate, Stop};
use crate::cpu::vcpu::{Shared, Vcpu, VcpuEvent, VcpuEvents};
use crate::devices::legacy::pm::PowerManagement;
use crate::devices::legacy::serial::SerialPort;
use crate::devices::legacy::{PowerControl, PowerRequest};
use crate::lease::quiesce::{DiskGate, Quiesce};
use crate::memory::GuestMemory;
use device_manager::DeviceManager;

pub use build::{Context, MachineError, build};

/// How long the disks may take to end their I/O when a machine is taken down.
const DRAIN: Duration = Duration::from_secs(5);
/// A vCPU thread does nothing but run its vCPU.
const VCPU_STACK_BYTES: usize = 256 << 10;
/// More than can wait: each vCPU reports once, and further requests change nothing.
const INBOX: usize = 64;

/// Why a machine ends. Whoever says it first decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Reset,
    GuestPoweredOff,
    /// From outside: the control socket or a signal.
    PoweredOff,
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
    pub fn wait(&self) -> Result<Ending, RecvError> {
        self.0.recv()
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
    memory: GuestMemory,
    shared: Arc<Shared>,
    vcpus: Vec<Vcpu>,
    threads: Vec<JoinHandle<()>>,
    pm: Arc<Mutex<PowerManagement>>,
    serial: Arc<Mutex<SerialPort>>,
    devices: Arc<DeviceManager>,
    disk_gate: Arc<DiskGate>,
}

impl Machine {
    pub fn pm(&self) -> Arc<Mutex<PowerManagement>> {
        Arc::clone(&self.pm)
    }

    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        Arc::clone(&self.serial)
    }

    /// Host address ranges of guest RAM.
    pub fn ram_in_host(&self) -> Vec<(u64, u64)> {
        self.memory
            .iter()
            .filter_map(|region| {
                let start = self.memory.get_host_address(region.start_addr()).ok()? as u64;
                Some((start, start + region.len()))
            })
            .collect()
    }

    /// Starts the vCPU threads, and returns when each of them can be stopped.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let (ready, is_ready) = sync_channel(self.vcpus.len());
        self.shared.gate.open(Stop::End);
        let count = self.vcpus.len();
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let ready = ready.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .stack_size(VCPU_STACK_BYTES)
                .spawn(move || {
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
        self.shared.gate.shut(Stop::End);
        self.devices.detach();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread ended by a panic");
            }
        }
        self.disk_gate.close();
        for nic in self.devices.nics() {
            if let Err(error) = nic.stop() {
                tracing::error!(nic = nic.name(), %error, "the guest has ended, its network card has not");
            }
        }
        let until = Instant::now() + DRAIN;
        let mut drained = true;
        for disk in self.devices.disks() {
            if let Err(error) = disk.cancel_and_drain(until) {
                tracing::error!(%error, "the guest has ended, its I/O has not");
                drained = false;
            }
        }
        drained
    }
}
