//! Work for the threads of vCPUs while they stand: KVM wants a vCPU's state to be read by the thread that runs it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

/// What a vCPU's thread does once, with its vCPU and the CPUID that it was made with. KVM has finished the guest's last access.
pub type Errand = Box<dyn FnOnce(&VcpuFd, &CpuId) + Send>;

/// One errand a vCPU at a time. Who puts some here sends the threads to look (`RunGate::send_on_errands`).
#[derive(Default)]
pub struct Errands {
    waiting: Mutex<BTreeMap<u16, Errand>>,
}

impl Errands {
    /// Takes the place of one that was not carried out.
    pub fn put(&self, vcpu: u16, errand: Errand) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(vcpu, errand);
    }

    pub fn take(&self, vcpu: u16) -> Option<Errand> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&vcpu)
    }
}
