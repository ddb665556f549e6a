//! The KVM side of one guest: the VM itself, its memory slots, interrupt lines and doorbells.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::layout::{KVM_IDENTITY_MAP, KVM_TSS, LAPIC_BASE};
use crate::incident::NmiSink;
use crate::interrupt::{IoEvents, IrqLine, LevelLine};
use crate::memory::GuestMemory;

#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error(
        "cannot open /dev/kvm; is the kvm module loaded (modprobe kvm_amd or kvm_intel) and may this user open it?"
    )]
    Open(#[source] kvm_ioctls::Error),
    #[error("this kernel speaks version {0} of KVM's interface, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    #[error("this KVM lacks {0}; a Linux kernel of 5.10 or later has it")]
    Missing(&'static str),
    #[error("KVM refused to {what}")]
    Refused {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("cannot find guest RAM at {0:#x}")]
    NoRam(u64),
}

/// For `map_err`: names the operation.
pub(crate) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Refused { what, source }
}

/// /dev/kvm, with what every guest of ours needs.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::Open)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::ApiVersion(version));
    }
    for (cap, name) in [
        (Cap::Irqchip, "an interrupt controller in the kernel"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IoeventfdNoLength, "ioeventfd of any length"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::Pit2, "a timer chip in the kernel"),
        (Cap::UserMemory, "user memory slots"),
        (Cap::ExtCpuid, "CPUID control"),
        (Cap::MpState, "multiprocessor state"),
        (Cap::ImmediateExit, "immediate_exit"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Missing(name));
        }
    }
    Ok(kvm)
}

/// One guest in the kernel. Shared by all that raise interrupts or register doorbells.
#[derive(Debug)]
pub struct KvmVm {
    fd: VmFd,
}

impl KvmVm {
    /// A guest with RAM, interrupt controllers and timer, and no vCPU.
    pub fn new(kvm: &Kvm, memory: &GuestMemory) -> Result<Arc<Self>, KvmError> {
        let fd = kvm.create_vm().map_err(refused("create a VM"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(refused("place the identity map"))?;
        fd.set_tss_address(KVM_TSS as usize).map_err(refused("place the TSS"))?;
        fd.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            // Port 0x61 answers too: Linux calibrates its clock against it.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("create the timer"))?;
        let vm = Self { fd };
        vm.map(memory, 0, "map guest memory")?;
        Ok(Arc::new(vm))
    }

    /// Has KVM note which pages the guest writes to, or not. On only while the guest is copied: it takes the huge pages away (rule 1 of
    /// reference peers-vmm §4.2). `memory` is that of this guest. After an error it is on for some of it.
    pub fn log_dirty_pages(&self, memory: &GuestMemory, on: bool) -> Result<(), KvmError> {
        match on {
            true => self.map(memory, KVM_MEM_LOG_DIRTY_PAGES, "log what the guest writes to"),
            false => self.map(memory, 0, "end the log of what the guest writes to"),
        }
    }

    /// The pages of a region that the guest has written to since it was asked for last, one bit each; from now on they count as not written
    /// to (rule 3). Regions count from 0, in the order of their addresses.
    pub fn take_dirty_pages(&self, region: usize, bytes: u64) -> Result<Vec<u64>, KvmError> {
        self.fd.get_dirty_log(region as u32, bytes as usize).map_err(refused("tell what the guest has written to"))
    }

    fn map(&self, memory: &GuestMemory, flags: u32, what: &'static str) -> Result<(), KvmError> {
        for (slot, region) in memory.iter().enumerate() {
            let start = region.start_addr();
            let host = memory.get_host_address(start).map_err(|_| KvmError::NoRam(start.raw_value()))?;
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: start.raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the mapping is guest RAM and nothing else; `Machine` keeps it until the VM and all vCPUs are gone.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused(what))?;
        }
        Ok(())
    }

    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// KVM's id of a vCPU is its APIC id.
    pub fn create_vcpu(&self, apic_id: u32) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(apic_id)).map_err(refused("create a vCPU"))
    }

    /// A line that is pulsed.
    pub fn edge_line(self: &Arc<Self>, gsi: u32) -> io::Result<Arc<dyn IrqLine>> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        self.fd.register_irqfd(&fd, gsi).map_err(to_io)?;
        Ok(Arc::new(EdgeLine { fd }))
    }

    /// A line that is held.
    pub fn level_line(self: &Arc<Self>, gsi: u32) -> Arc<dyn LevelLine> {
        Arc::new(HeldLine { vm: Arc::clone(self), gsi })
    }
}

pub(crate) fn to_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The irqfd of a line; KVM raises and lowers it for each write.
struct EdgeLine {
    fd: EventFd,
}

impl IrqLine for EdgeLine {
    fn trigger(&self) -> io::Result<()> {
        self.fd.write(1)
    }
}

struct HeldLine {
    vm: Arc<KvmVm>,
    gsi: u32,
}

impl LevelLine for HeldLine {
    fn set(&self, asserted: bool) -> io::Result<()> {
        self.vm.fd.set_irq_line(self.gsi, asserted).map_err(to_io)
    }
}

/// A message with delivery mode NMI to all local APICs (Intel SDM 3A, 11.11): unlike KVM_NMI, which is a call on a vCPU, it waits for
/// none of them to leave the guest.
const NMI_TO_ALL: kvm_msi = kvm_msi {
    address_lo: LAPIC_BASE as u32 | 0xff << 12,
    address_hi: 0,
    data: 0b100 << 8,
    flags: 0,
    devid: 0,
    pad: [0; 12],
};

impl NmiSink for KvmVm {
    fn inject(&self) -> io::Result<()> {
        self.fd.signal_msi(NMI_TO_ALL).map(drop).map_err(to_io)
    }
}

impl IoEvents for KvmVm {
    fn register(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.fd.register_ioevent(fd, &address, value),
            None => self.fd.register_ioevent(fd, &address, NoDatamatch),
        }
        .map_err(to_io)
    }

    fn unregister(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.fd.unregister_ioevent(fd, &address, value),
            None => self.fd.unregister_ioevent(fd, &address, NoDatamatch),
        }
        .map_err(to_io)
    }
}
