//! What a PC has had since before PCI, as far as a stock kernel and later firmware look for it: COM1, the CMOS clock, the reset
//! ports, ACPI's fixed registers, the panic port, the generation of the VM. And two ports of our own: the boot timer and a debug console.
//!
//! Each is a register file behind [`PioDevice`](crate::bus::PioDevice); none blocks, because a vCPU waits for it.

pub mod boot_timer;
pub mod debug_port;
pub mod pm;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod vmgenid;

/// What a guest asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Start again, as after the reset button.
    Reset,
    /// ACPI S5.
    PowerOff,
}

/// Takes the request and returns at once; the vCPU that asked stops before its next instruction.
pub trait PowerControl: Send + Sync {
    fn request(&self, request: PowerRequest);
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Remembers what the guest asked for.
    #[derive(Default)]
    pub struct Asked(pub Mutex<Vec<PowerRequest>>);

    impl Asked {
        pub fn new() -> Arc<Self> {
            Arc::new(Self::default())
        }

        pub fn take(&self) -> Vec<PowerRequest> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl PowerControl for Asked {
        fn request(&self, request: PowerRequest) {
            self.0.lock().unwrap().push(request);
        }
    }
}
