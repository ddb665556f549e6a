//! The numbers of the requests that we make of KVM (linux/kvm.h). kvm-ioctls keeps its own to itself.

use kvm_bindings::*;
use libc::{_IO, _IOR, _IOW, _IOWR};

const KVM: u32 = 0xae;

const fn none(number: u32) -> u32 {
    _IO(KVM, number) as u32
}

const fn read<T>(number: u32) -> u32 {
    _IOR::<T>(KVM, number) as u32
}

const fn write<T>(number: u32) -> u32 {
    _IOW::<T>(KVM, number) as u32
}

const fn both<T>(number: u32) -> u32 {
    _IOWR::<T>(KVM, number) as u32
}

// Of /dev/kvm.
pub const KVM_CREATE_VM: u32 = none(0x01);
pub const KVM_GET_MSR_INDEX_LIST: u32 = both::<kvm_msr_list>(0x02);
pub const KVM_CHECK_EXTENSION: u32 = none(0x03);
pub const KVM_GET_VCPU_MMAP_SIZE: u32 = none(0x04);
pub const KVM_GET_SUPPORTED_CPUID: u32 = both::<kvm_cpuid2>(0x05);

// Of a VM.
pub const KVM_CREATE_VCPU: u32 = none(0x41);
pub const KVM_GET_DIRTY_LOG: u32 = write::<kvm_dirty_log>(0x42);
pub const KVM_SET_USER_MEMORY_REGION: u32 = write::<kvm_userspace_memory_region>(0x46);
pub const KVM_SET_TSS_ADDR: u32 = none(0x47);
pub const KVM_SET_IDENTITY_MAP_ADDR: u32 = write::<u64>(0x48);
pub const KVM_CREATE_IRQCHIP: u32 = none(0x60);
pub const KVM_IRQ_LINE: u32 = write::<kvm_irq_level>(0x61);
pub const KVM_GET_IRQCHIP: u32 = both::<kvm_irqchip>(0x62);
pub const KVM_SET_IRQCHIP: u32 = read::<kvm_irqchip>(0x63);
pub const KVM_SET_GSI_ROUTING: u32 = write::<kvm_irq_routing>(0x6a);
pub const KVM_IRQFD: u32 = write::<kvm_irqfd>(0x76);
pub const KVM_CREATE_PIT2: u32 = write::<kvm_pit_config>(0x77);
pub const KVM_IOEVENTFD: u32 = write::<kvm_ioeventfd>(0x79);
pub const KVM_SET_CLOCK: u32 = write::<kvm_clock_data>(0x7b);
pub const KVM_GET_CLOCK: u32 = read::<kvm_clock_data>(0x7c);
pub const KVM_GET_PIT2: u32 = read::<kvm_pit_state2>(0x9f);
pub const KVM_SET_PIT2: u32 = write::<kvm_pit_state2>(0xa0);
pub const KVM_SIGNAL_MSI: u32 = write::<kvm_msi>(0xa5);

// Of a vCPU.
pub const KVM_RUN: u32 = none(0x80);
pub const KVM_GET_REGS: u32 = read::<kvm_regs>(0x81);
pub const KVM_SET_REGS: u32 = write::<kvm_regs>(0x82);
pub const KVM_GET_SREGS: u32 = read::<kvm_sregs>(0x83);
pub const KVM_SET_SREGS: u32 = write::<kvm_sregs>(0x84);
pub const KVM_GET_MSRS: u32 = both::<kvm_msrs>(0x88);
pub const KVM_SET_MSRS: u32 = write::<kvm_msrs>(0x89);
pub const KVM_GET_LAPIC: u32 = read::<kvm_lapic_state>(0x8e);
pub const KVM_SET_LAPIC: u32 = write::<kvm_lapic_state>(0x8f);
pub const KVM_SET_CPUID2: u32 = write::<kvm_cpuid2>(0x90);
pub const KVM_GET_MP_STATE: u32 = read::<kvm_mp_state>(0x98);
pub const KVM_SET_MP_STATE: u32 = write::<kvm_mp_state>(0x99);
pub const KVM_GET_VCPU_EVENTS: u32 = read::<kvm_vcpu_events>(0x9f);
pub const KVM_SET_VCPU_EVENTS: u32 = write::<kvm_vcpu_events>(0xa0);
pub const KVM_GET_DEBUGREGS: u32 = read::<kvm_debugregs>(0xa1);
pub const KVM_SET_DEBUGREGS: u32 = write::<kvm_debugregs>(0xa2);
pub const KVM_SET_TSC_KHZ: u32 = none(0xa2);
pub const KVM_GET_TSC_KHZ: u32 = none(0xa3);
pub const KVM_GET_XSAVE: u32 = read::<kvm_xsave>(0xa4);
pub const KVM_SET_XSAVE: u32 = write::<kvm_xsave>(0xa5);
pub const KVM_GET_XCRS: u32 = read::<kvm_xcrs>(0xa6);
pub const KVM_SET_XCRS: u32 = write::<kvm_xcrs>(0xa7);
pub const KVM_GET_XSAVE2: u32 = read::<kvm_xsave>(0xcf);
pub const KVM_GET_SREGS2: u32 = read::<kvm_sregs2>(0xcc);
pub const KVM_SET_SREGS2: u32 = write::<kvm_sregs2>(0xcd);
pub const KVM_KVMCLOCK_CTRL: u32 = none(0xad);
