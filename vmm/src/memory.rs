//! Guest RAM as devices see it.
//!
//! The dirty bitmap is part of the type from the first day: a write by a device is invisible to KVM's dirty log, and a
//! migration that misses one corrupts the guest in silence (reference peers-vmm §4.2, rule 2). One bit for a page of 4 KiB.

use vm_memory::bitmap::AtomicBitmap;

/// Guest RAM, mapped. Clones share the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// One contiguous range of guest RAM.
pub type GuestRegion = vm_memory::GuestRegionMmap<AtomicBitmap>;
