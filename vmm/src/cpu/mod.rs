//! The processors of a guest: what they are ([`model`], [`cpuid`], [`msr`]), how they start ([`regs`]), and the threads that run them
//! ([`vcpu`]), which all pass one gate ([`gate`]) before each entry into the guest, and
//! do what is asked of them ([`errand`]) while they stand at it. [`report`] tells the cluster what this host has of all that.

pub mod cpuid;
pub mod errand;
pub mod gate;
pub mod leaves;
pub mod model;
pub mod msr;
pub mod regs;
pub mod report;
pub mod sregs;
pub mod vcpu;

#[cfg(test)]
mod cpuid_tests;
#[cfg(test)]
pub(crate) mod model_tests;
