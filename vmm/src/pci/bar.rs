//! Base address registers: what a function asks for, and where the guest put it.

use super::config_space::register;

/// How a BAR may be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere; behind a bridge, in its prefetchable window. Takes two registers.
    Prefetchable64,
}

impl BarKind {
    /// The low bits of the register, which tell the guest the kind.
    pub const fn flag_bits(self) -> u32 {
        match self {
            Self::Memory32 => 0b0000,
            Self::Prefetchable64 => 0b1100,
        }
    }
}

/// A BAR as the device declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Number of its (first) register, 0..6.
    pub index: u8,
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
}

impl Bar {
    /// Its offset in configuration space.
    pub const fn register(&self) -> u16 {
        register::BAR0 + 4 * self.index as u16
    }
}

/// Guest physical addresses that a BAR answers at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    pub bar: u8,
    pub base: u64,
    pub size: u64,
}

impl BarRange {
    /// The last address of the range.
    pub fn last(&self) -> u64 {
        self.base.saturating_add(self.size - 1)
    }
}
