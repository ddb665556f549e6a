//! The 256 bytes of configuration space of one function, with a mask on every bit that a guest may change.
//!
//! Pure: no bus, no device. A register that nothing declared writable stays what the device made it, whatever the
//! guest writes (guest input is hostile, DESIGN §7). PCI Express extended space reads as zeros: no capability there.

use serde::{Deserialize, Serialize};

use super::bar::{Bar, BarKind, BarRange};

/// Conventional configuration space. Extended space (to 4 KiB) reads as zero.
pub const CONFIG_BYTES: usize = 256;

pub mod register {
    //! Offsets of the standard header.
    pub const VENDOR_ID: u16 = 0x00;
    pub const DEVICE_ID: u16 = 0x02;
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const REVISION: u16 = 0x08;
    pub const CLASS: u16 = 0x09;
    pub const HEADER_TYPE: u16 = 0x0e;
    pub const BAR0: u16 = 0x10;
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    pub const CAPABILITIES: u16 = 0x34;
    pub const INTERRUPT_LINE: u16 = 0x3c;
}

pub mod command {
    //! Bits of the command register that our functions have.
    pub const MEMORY: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const PARITY: u16 = 1 << 6;
    pub const SERR: u16 = 1 << 8;
    pub const INTX_DISABLE: u16 = 1 << 10;
    pub const WRITABLE: u16 = MEMORY | BUS_MASTER | PARITY | SERR | INTX_DISABLE;
}

const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The first capability follows the standard header.
const FIRST_CAPABILITY: usize = 0x40;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("no room in configuration space for capability {id:#04x} of {len} bytes")]
    NoRoom { id: u8, len: usize },
    #[error("saved configuration space has version {found}; this program reads {known}")]
    Version { found: u32, known: u32 },
    #[error("saved configuration space is {found} bytes, not {CONFIG_BYTES}")]
    Length { found: usize },
    #[error(
        "saved configuration space differs at {offset:#04x} in bits that never change: it is of another device or machine type"
    )]
    OtherDevice { offset: usize },
}

/// What identifies a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem: Option<(u16, u16)>,
}

/// Configuration space of a function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// After a reset.
    reset: [u8; CONFIG_BYTES],
    /// Bits that a guest's write sets.
    writable: [u8; CONFIG_BYTES],
    /// Bits that a guest's write of one clears.
    clear_on_one: [u8; CONFIG_BYTES],
    bars: Vec<Bar>,
    next_free: usize,
    last_link: usize,
}

/// [`ConfigSpace`] as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedConfigSpace {
    pub version: u32,
    pub bytes: Vec<u8>,
}

impl SavedConfigSpace {
    pub const VERSION: u32 = 1;
}

impl ConfigSpace {
    /// A type 0 header.
    pub fn endpoint(identity: Identity) -> Self {
        Self::new(identity, 0)
    }

    /// A type 1 header, whose windows and bus numbers its owner declares.
    pub fn bridge(identity: Identity) -> Self {
        Self::new(identity, 1)
    }

    fn new(identity: Identity, header_type: u8) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            reset: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            clear_on_one: [0; CONFIG_BYTES],
            bars: Vec::new(),
            next_free: FIRST_CAPABILITY,
            last_link: usize::from(register::CAPABILITIES),
        };
        space.init_u16(register::VENDOR_ID, identity.vendor);
        space.init_u16(register::DEVICE_ID, identity.device);
        space.init_u8(register::REVISION, identity.revision);
        let [base, sub, interface] = identity.class;
        space.init_u8(register::CLASS, interface);
        space.init_u8(register::CLASS + 1, sub);
        space.init_u8(register::CLASS + 2, base);
        space.init_u8(register::HEADER_TYPE, header_type);
        if let Some((vendor, id)) = identity.subsystem {
            space.init_u16(register::SUBSYSTEM_VENDOR, vendor);
            space.init_u16(register::SUBSYSTEM_ID, id);
        }
        space.allow_u16(register::COMMAND, command::WRITABLE);
        space.allow_u16(register::INTERRUPT_LINE, 0x00ff);
        space
    }

    // -- the device's side

    /// Sets a register's value, now and after each reset.
    pub fn init_u8(&mut self, offset: u16, value: u8) {
        self.bytes[usize::from(offset)] = value;
        self.reset[usize::from(offset)] = value;
    }

    pub fn init_u16(&mut self, offset: u16, value: u16) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.init_u8(offset + i as u16, byte);
        }
    }

    pub fn init_u32(&mut self, offset: u16, value: u32) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.init_u8(offset + i as u16, byte);
        }
    }

    /// Lets the guest change the bits of `mask`.
    pub fn allow_u16(&mut self, offset: u16, mask: u16) {
        for (i, byte) in mask.to_le_bytes().into_iter().enumerate() {
            self.writable[usize::from(offset) + i] = byte;
        }
    }

    pub fn allow_u32(&mut self, offset: u16, mask: u32) {
        for (i, byte) in mask.to_le_bytes().into_iter().enumerate() {
            self.writable[usize::from(offset) + i] = byte;
        }
    }

    /// Lets the guest clear the bits of `mask` by writing ones.
    pub fn clear_on_one_u16(&mut self, offset: u16, mask: u16) {
        for (i, byte) in mask.to_le_bytes().into_iter().enumerate() {
            self.clear_on_one[usize::from(offset) + i] = byte;
        }
    }

    /// Changes a register from the device's side, until the next reset.
    pub fn set_u16(&mut self, offset: u16, value: u16) {
        let at = usize::from(offset);
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub fn set_u32(&mut self, offset: u16, value: u32) {
        let at = usize::from(offset);
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn u8(&self, offset: u16) -> u8 {
        self.bytes[usize::from(offset)]
    }

    pub fn u16(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub fn u32(&self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Appends a capability whose bytes after (id, next) are `body`. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<u16, ConfigError> {
        let at = self.next_free;
        let end = at + 2 + body.len();
        if end > CONFIG_BYTES {
            return Err(ConfigError::NoRoom { id, len: body.len() + 2 });
        }
        self.init_u8(self.last_link as u16, at as u8);
        self.init_u8(at as u16, id);
        for (i, byte) in body.iter().enumerate() {
            self.init_u8((at + 2 + i) as u16, *byte);
        }
        self.init_u16(register::STATUS, self.u16(register::STATUS) | STATUS_CAPABILITIES);
        self.last_link = at + 1;
        self.next_free = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// Declares a base address register. Its size is a power of two, its slot (two for 64 bits) free: both are
    /// decided by the device's code, never by a guest.
    pub fn add_bar(&mut self, bar: Bar) {
        debug_assert!(bar.size.is_power_of_two() && bar.size >= 16);
        let offset = bar.register();
        let mask = !(bar.size - 1);
        self.init_u32(offset, bar.kind.flag_bits());
        self.allow_u32(offset, mask as u32 & !0xf);
        if bar.kind == BarKind::Prefetchable64 {
            self.allow_u32(offset + 4, (mask >> 32) as u32);
        }
        self.bars.push(bar);
    }

    /// Memory ranges that the function answers at now: none while memory decoding is off.
    pub fn decoded(&self) -> Vec<BarRange> {
        if self.u16(register::COMMAND) & command::MEMORY == 0 {
            return Vec::new();
        }
        self.bars
            .iter()
            .filter_map(|bar| {
                let mut base = u64::from(self.u32(bar.register()) & !0xf);
                if bar.kind == BarKind::Prefetchable64 {
                    base |= u64::from(self.u32(bar.register() + 4)) << 32;
                }
                // Zero is "not assigned"; a range that wraps is what sizing leaves behind for a moment.
                base.checked_add(bar.size).filter(|_| base != 0)?;
                Some(BarRange { bar: bar.index, base, size: bar.size })
            })
            .collect()
    }

    /// Every register as after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.reset;
    }

    // -- the guest's side

    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(byte) = self.bytes.get_mut(at) else {
                return;
            };
            let mask = self.writable[at];
            *byte = (*byte & !mask) | (value & mask);
            *byte &= !(value & self.clear_on_one[at]);
        }
    }

    // -- saving

    pub fn save(&self) -> SavedConfigSpace {
        SavedConfigSpace { version: SavedConfigSpace::VERSION, bytes: self.bytes.to_vec() }
    }

    /// Takes the guest's settings from `saved`, after a look at the bits that only a device can change: a saved
    /// state of other hardware is refused.
    pub fn restore(&mut self, saved: &SavedConfigSpace) -> Result<(), ConfigError> {
        if saved.version != SavedConfigSpace::VERSION {
            return Err(ConfigError::Version { found: saved.version, known: SavedConfigSpace::VERSION });
        }
        let bytes: [u8; CONFIG_BYTES] =
            saved.bytes.as_slice().try_into().map_err(|_| ConfigError::Length { found: saved.bytes.len() })?;
        // The identity, the shape of the header and the chain of capabilities.
        let fixed = (0..0x04).chain(0x08..0x0c).chain([0x0e, 0x34]).chain(self.capability_headers());
        for offset in fixed {
            if bytes[offset] != self.bytes[offset] {
                return Err(ConfigError::OtherDevice { offset });
            }
        }
        self.bytes = bytes;
        for at in 0..CONFIG_BYTES {
            // BAR flags and hard-wired zeros are the device's whatever the file says.
            if (0x10..0x30).contains(&at) {
                let mask = self.writable[at];
                self.bytes[at] = (self.reset[at] & !mask) | (self.bytes[at] & mask);
            }
        }
        Ok(())
    }

    fn capability_headers(&self) -> Vec<usize> {
        let mut headers = Vec::new();
        let mut at = usize::from(self.u8(register::CAPABILITIES));
        while at != 0 && headers.len() < CONFIG_BYTES / 2 {
            headers.extend([at, at + 1]);
            at = usize::from(self.bytes[at + 1]);
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn function() -> ConfigSpace {
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem: Some((0x1af4, 0x1100)),
        });
        space.add_bar(Bar { index: 0, kind: BarKind::Prefetchable64, size: 0x8000 });
        space.add_bar(Bar { index: 2, kind: BarKind::Memory32, size: 0x1000 });
        space.add_capability(0x11, &[7; 10]).unwrap();
        space.add_capability(0x10, &[0; 58]).unwrap();
        space
    }

    fn read_u32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_sizes_a_bar_by_writing_ones() {
        let mut space = function();
        space.write(0x10, &[0xff; 8]);
        assert_eq!(read_u32(&space, 0x10), 0xffff_800c);
        assert_eq!(read_u32(&space, 0x14), 0xffff_ffff);
        space.write(0x18, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0x18), 0xffff_f000);
        // There is no BAR 3.
        space.write(0x1c, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0x1c), 0);
    }

    #[test]
    fn a_function_decodes_only_while_memory_is_enabled() {
        let mut space = function();
        space.write(0x10, &0x40_0000_0000u64.to_le_bytes());
        assert_eq!(space.decoded(), []);
        space.write(0x04, &command::MEMORY.to_le_bytes());
        assert_eq!(space.decoded(), [BarRange { bar: 0, base: 0x40_0000_0000, size: 0x8000 }]);
        space.reset();
        assert_eq!(space.decoded(), []);
    }

    #[test]
    fn capabilities_form_a_chain_that_ends() {
        let space = function();
        let first = u16::from(space.u8(0x34));
        assert_eq!((space.u8(first), space.u8(first + 2)), (0x11, 7));
        let second = u16::from(space.u8(first + 1));
        assert_eq!((space.u8(second), space.u8(second + 1)), (0x10, 0));
        assert_eq!(second % 4, 0);
    }

    #[test]
    fn a_capability_that_does_not_fit_is_refused() {
        let mut space = function();
        let error = space.add_capability(9, &[0; 250]).unwrap_err();
        assert_eq!(error, ConfigError::NoRoom { id: 9, len: 252 });
    }

    #[test]
    fn state_of_another_device_is_refused() {
        let space = function();
        let mut saved = space.save();
        saved.bytes[2] ^= 1;
        assert_eq!(function().restore(&saved), Err(ConfigError::OtherDevice { offset: 2 }));
        saved.version = 9;
        assert!(matches!(function().restore(&saved), Err(ConfigError::Version { found: 9, known: 1 })));
    }

    proptest! {
        /// Whatever a guest writes, in any width at any place, bits that were not declared writable keep their value,
        /// and the state goes through a save and a restore unchanged.
        #[test]
        fn hostile_writes_change_only_what_was_allowed(
            writes in prop::collection::vec((0u16..4096, prop::collection::vec(any::<u8>(), 1..9)), 0..200)
        ) {
            let fresh = function();
            let mut space = fresh.clone();
            for (offset, data) in &writes {
                space.write(*offset, data);
            }
            for at in 0..CONFIG_BYTES {
                let frozen = !(space.writable[at] | space.clear_on_one[at]);
                prop_assert_eq!(space.bytes[at] & frozen, fresh.bytes[at] & frozen, "offset {:#x}", at);
            }
            for range in space.decoded() {
                prop_assert_eq!(range.base % range.size, 0);
            }
            let mut restored = function();
            restored.restore(&space.save()).unwrap();
            prop_assert_eq!(restored.bytes, space.bytes);
        }
    }
}
