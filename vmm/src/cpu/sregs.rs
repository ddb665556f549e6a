//! Segment and control registers in KVM's newer form, which kvm-ioctls does not wrap: it has the page directory pointers of PAE beside
//! them. Without it KVM reads those from memory again, where the guest may have changed them since the processor did.

use std::io;

use kvm_bindings::{KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_sregs, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

pub type Pdptrs = [u64; 4];

/// The page directory pointers, while the guest uses PAE without long mode.
pub fn pdptrs(vcpu: &VcpuFd) -> io::Result<Option<Pdptrs>> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the request fills a struct of this size.
    if unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs.pdptrs))
}

/// Sets the registers with these pointers.
pub fn set_with_pdptrs(vcpu: &VcpuFd, sregs: &kvm_sregs, pdptrs: Pdptrs) -> io::Result<()> {
    let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *sregs;
    let flags = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
    let sregs = kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    };
    // SAFETY: the request reads a struct of this size.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), &sregs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
