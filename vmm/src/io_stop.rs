//! Stops a guest whose disk met an I/O error, and lets it go on when somebody says that the storage is well again.
//!
//! One more reason at the run gate, beside the lease and a pause on request: all must be gone before a vCPU runs.

use std::sync::{Arc, Mutex};

use vmm_control::DiskFault;

use crate::cpu::gate::{RunGate, Stop};
use crate::devices::block::{BlockHandle, DiskFaults};
use crate::virtio::locked;

/// Told from a disk's thread; must not wait.
pub type IoStopListener = Box<dyn Fn() + Send + Sync>;

pub struct IoStop {
    gate: Arc<RunGate>,
    /// The first error since the guest ran.
    fault: Mutex<Option<DiskFault>>,
    listener: IoStopListener,
}

impl IoStop {
    pub fn new(gate: Arc<RunGate>, listener: IoStopListener) -> Arc<Self> {
        Arc::new(Self { gate, fault: Mutex::default(), listener })
    }

    /// What holds the guest.
    pub fn fault(&self) -> Option<DiskFault> {
        locked(&self.fault).clone()
    }

    /// Lets the guest run, and has its failed requests tried again. They fail again after this, if they do, and stop it anew:
    /// the other way round, an error that comes at once would be forgotten.
    pub fn resume(&self, disks: &[Arc<BlockHandle>]) {
        self.forget();
        for disk in disks {
            disk.retry();
        }
    }

    /// The machine that met the error is gone.
    pub fn forget(&self) {
        let mut fault = locked(&self.fault);
        *fault = None;
        self.gate.open(Stop::IoError);
    }
}

impl DiskFaults for IoStop {
    fn stopped(&self, fault: DiskFault) {
        {
            let mut first = locked(&self.fault);
            first.get_or_insert(fault);
            // Under the lock, so that a resume either sees this error or comes before it.
            self.gate.shut(Stop::IoError);
        }
        (self.listener)();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn fault(disk: &str) -> DiskFault {
        DiskFault { disk: disk.into(), what: "write of 512 bytes at 0".into(), no_space: false }
    }

    #[test]
    fn an_error_and_the_lease_both_have_to_let_the_guest_run() {
        let gate = RunGate::new();
        let told = Arc::new(AtomicUsize::new(0));
        let stop = IoStop::new(gate.clone(), {
            let told = told.clone();
            Box::new(move || {
                told.fetch_add(1, Ordering::SeqCst);
            })
        });
        gate.shut(Stop::Lease);
        stop.stopped(fault("vda"));
        stop.stopped(fault("vdb"));
        assert_eq!(stop.fault().unwrap().disk, "vda", "the first error is the one to look at");
        assert_eq!(told.load(Ordering::SeqCst), 2);

        gate.open(Stop::Lease);
        assert!(gate.holds(Stop::IoError) && !gate.is_open());
        gate.shut(Stop::Lease);
        stop.resume(&[]);
        assert!(!gate.holds(Stop::IoError) && !gate.is_open());
        assert_eq!(stop.fault(), None);
        gate.open(Stop::Lease);
        assert!(gate.is_open());
    }
}
