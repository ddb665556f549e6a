//! A guest as bytes: saved to a file, or on its way to another host. One format for both.
//!
//! The path of a guest from one process to another:
//!
//! 1. hostd asks for `save_attach`; [`session`] stops the guest, and sends what [`parts`] reads of its machine. Live, [`live`] copies memory
//!    in rounds before that while the guest runs: [`precopy`] decides when they end, [`dirty`] knows what the guest wrote meanwhile, and
//!    [`throttle`] slows it down where it writes too fast;
//! 2. [`stream`] puts header, memory and states in order, [`frame`] cuts them into pieces that are checked one by one;
//! 3. a process that was started with `--incoming` is asked for `restore_attach`; [`incoming`] compares the [`header`] with its own host and
//!    configuration before it takes a byte of [`memory`];
//! 4. [`parts`] writes the states in their order; `run` names the permit, and the guest goes on between the same two instructions.
//!
//! What a state looks like, and why:
//! - each part of the machine is a [`payload`] of JSON with a version of its own, because what cannot evolve has to be thrown away at each
//!   upgrade (rule 22 of reference peers-vmm §4.2);
//! - devices of ours have structs with named fields, next to the device;
//! - the kernel's structs are kept as bytes ([`blob`] says why) in structs of ours: [`vcpu`], [`vm`];
//! - CPUID is kept leaf by leaf ([`processor`]), because it is what hosts are compared by.
//!
//! The rules that are cited by number are those of reference peers-vmm §4.2.

pub mod blob;
pub mod dirty;
pub mod frame;
pub mod header;
pub mod incoming;
pub mod live;
pub mod memory;
pub mod parts;
pub mod payload;
pub mod precopy;
pub mod processor;
pub mod session;
pub mod stream;
pub mod throttle;
pub mod vcpu;
pub mod vm;
