//! The PCI Express capability (id 0x10, version 2) of endpoints, of those inside of the root complex, and of root ports.

use super::config_space::{ConfigError, ConfigSpace};

pub const CAPABILITY_ID: u8 = 0x10;
/// Bytes after (id, next).
const BODY_BYTES: usize = 0x3a;

pub mod offset {
    //! Registers, counted from the capability.
    pub const CAPABILITIES: u16 = 0x02;
    pub const DEVICE_CAPABILITIES: u16 = 0x04;
    pub const DEVICE_CONTROL: u16 = 0x08;
    pub const DEVICE_STATUS: u16 = 0x0a;
    pub const LINK_CAPABILITIES: u16 = 0x0c;
    pub const LINK_CONTROL: u16 = 0x10;
    pub const LINK_STATUS: u16 = 0x12;
    pub const SLOT_CAPABILITIES: u16 = 0x14;
    pub const SLOT_CONTROL: u16 = 0x18;
    pub const SLOT_STATUS: u16 = 0x1a;
    pub const ROOT_CONTROL: u16 = 0x1c;
    pub const LINK_CAPABILITIES_2: u16 = 0x2c;
    pub const LINK_CONTROL_2: u16 = 0x30;
}

/// Bit of device control: reset this function.
pub const INITIATE_FUNCTION_RESET: u16 = 1 << 15;
/// The link of a virtual device: 2.5 GT/s, one lane. Nothing depends on it, and it never changes.
pub const LINK_SPEED_AND_WIDTH: u16 = 0x0011;

const VERSION: u16 = 2;
const TYPE_ENDPOINT: u16 = 0x0 << 4;
const TYPE_ROOT_PORT: u16 = 0x4 << 4;
const TYPE_INTEGRATED_ENDPOINT: u16 = 0x9 << 4;
const SLOT_IMPLEMENTED: u16 = 1 << 8;
const ROLE_BASED_ERRORS: u32 = 1 << 15;
const FUNCTION_RESET_CAPABLE: u32 = 1 << 28;
/// Error reporting enables, relaxed ordering, payload and read request sizes, no snoop.
const DEVICE_CONTROL_WRITABLE: u16 = 0x78ff;
const DEVICE_STATUS_CLEARABLE: u16 = 0x000f;
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// Common clock, extended synch.
const LINK_CONTROL_WRITABLE: u16 = 0x00c0;

/// Adds the capability of an endpoint that can be reset by itself. Returns its offset.
pub fn add_endpoint(space: &mut ConfigSpace) -> Result<u16, ConfigError> {
    let at = add_function(space, TYPE_ENDPOINT)?;
    space.init_u32(at + offset::LINK_CAPABILITIES, u32::from(LINK_SPEED_AND_WIDTH));
    space.init_u16(at + offset::LINK_STATUS, LINK_SPEED_AND_WIDTH);
    add_link(space, at);
    Ok(at)
}

/// Adds the capability of a function on bus 0, which can be reset by itself. It has no link: those registers stay zero
/// (PCI Express Base 7.5.3). Returns its offset.
pub fn add_integrated_endpoint(space: &mut ConfigSpace) -> Result<u16, ConfigError> {
    add_function(space, TYPE_INTEGRATED_ENDPOINT)
}

fn add_function(space: &mut ConfigSpace, kind: u16) -> Result<u16, ConfigError> {
    let at = space.add_capability(CAPABILITY_ID, &[0; BODY_BYTES])?;
    space.init_u16(at + offset::CAPABILITIES, VERSION | kind);
    space.init_u32(at + offset::DEVICE_CAPABILITIES, ROLE_BASED_ERRORS | FUNCTION_RESET_CAPABLE);
    add_device_control(space, at);
    Ok(at)
}

/// Adds the capability of a root port with a slot. Slot registers are the port's. Returns its offset.
pub fn add_root_port(space: &mut ConfigSpace, port_number: u8) -> Result<u16, ConfigError> {
    let at = space.add_capability(CAPABILITY_ID, &[0; BODY_BYTES])?;
    space.init_u16(at + offset::CAPABILITIES, VERSION | TYPE_ROOT_PORT | SLOT_IMPLEMENTED);
    space.init_u32(at + offset::DEVICE_CAPABILITIES, ROLE_BASED_ERRORS);
    space.init_u32(
        at + offset::LINK_CAPABILITIES,
        u32::from(LINK_SPEED_AND_WIDTH) | LINK_ACTIVE_REPORTING | u32::from(port_number) << 24,
    );
    // System error enables and the PME interrupt: kept for the guest, without effect.
    space.allow_u16(at + offset::ROOT_CONTROL, 0x000f);
    add_device_control(space, at);
    add_link(space, at);
    Ok(at)
}

fn add_device_control(space: &mut ConfigSpace, at: u16) {
    space.allow_u16(at + offset::DEVICE_CONTROL, DEVICE_CONTROL_WRITABLE);
    space.clear_on_one_u16(at + offset::DEVICE_STATUS, DEVICE_STATUS_CLEARABLE);
}

fn add_link(space: &mut ConfigSpace, at: u16) {
    space.allow_u16(at + offset::LINK_CONTROL, LINK_CONTROL_WRITABLE);
    // Supported speeds: 2.5 GT/s. Target speed: the same.
    space.init_u32(at + offset::LINK_CAPABILITIES_2, 1 << 1);
    space.init_u16(at + offset::LINK_CONTROL_2, 1);
}
