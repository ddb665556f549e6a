//! The processors of a guest: what they are ([`cpuid`], [`msr`]), how they start ([`regs`]), and the threads that run them
//! ([`vcpu`]), which all pass one gate ([`gate`]) before each entry into the guest, and
//! do what is asked of them ([`errand`]) while they stand at it.

pub mod cpuid;
pub mod errand;
pub mod gate;
pub mod msr;
pub mod regs;
pub mod sregs;
pub mod vcpu;
