//! The virtual machine monitor of Quorate: one process runs one guest on KVM (DESIGN §7).
//!
//! The life of a process is [`process`]: configuration, lock, marker, then one [`machine`] after the other until the guest ends. The path
//! of data through a machine, and where each step lives:
//!
//! - a vCPU thread ([`cpu::vcpu`]) leaves the guest with a port or memory access, [`bus`] finds the device;
//! - a doorbell does not come that way: it is an ioeventfd, waited for by the device's own thread;
//! - the device reads and writes guest RAM through [`memory`], and interrupts by [`interrupt`];
//! - hostd asks over [`control`], and the [`lease`] stops the guest when hostd no longer may.
//!
//! A guest that moves to another process, or into a file, does so by [`saved`].
//!
//! Threads: the main one owns the machine, `control` serves the socket, `lease` quiesces, `vcpu-N` run the guest, each device that does I/O has
//! its own, `plug` has devices come and go with a thread for each that opens or ends, `log` and `console-log` write to disk. A vCPU
//! waits for none of them.
//!
//! Start reading at [`process`] for the whole, or at [`bus`] and [`interrupt`] for devices: those two are the border
//! between devices and KVM, and every device is tested with a fake on its side of it.

pub mod acpi;
pub mod agent_channel;
pub mod bell;
pub mod boot;
pub mod bus;
pub mod check;
pub mod console_hub;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod incident;
pub mod interrupt;
pub mod io_stop;
pub mod lease;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod pci;
pub mod process;
pub mod program_pages;
pub mod sandbox;
pub mod saved;
pub mod smbios;
pub mod start_once;
pub mod sys;
pub mod token_bucket;
pub mod virtio;
