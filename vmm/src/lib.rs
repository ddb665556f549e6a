//! The virtual machine monitor of Quorate: one process runs one guest on KVM (DESIGN §7).
//!
//! The path of data through it, and where each step lives:
//!
//! - a vCPU thread leaves the guest with a port or memory access, [`bus`] finds the device;
//! - a doorbell does not come that way: it is an ioeventfd, waited for by the device's own thread;
//! - the device reads and writes guest RAM through [`memory`], and interrupts by [`interrupt`].
//!
//! Start reading at [`bus`] and [`interrupt`]: they are the two borders between devices and KVM,
//! and every device is tested with a fake on its side of them.

pub mod acpi;
pub mod bell;
pub mod boot;
pub mod bus;
pub mod check;
pub mod console_hub;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod interrupt;
pub mod lease;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod pci;
pub mod process;
pub mod smbios;
pub mod start_once;
pub mod sys;
pub mod virtio;
