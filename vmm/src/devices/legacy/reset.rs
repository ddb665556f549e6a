//! The two ways a PC is told to reset: port 0xCF9, and command 0xFE of the keyboard controller. The keyboard controller has
//! no keyboard; it answers as an idle one.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{PowerControl, PowerRequest};
use crate::bus::PioDevice;

/// What the FADT tells the guest to write to 0xCF9: full reset.
pub const RESET_VALUE: u8 = 0x0f;
/// Bit 2 of 0xCF9 resets when it is set; bit 1 only chooses how.
const RESET_CPU: u8 = 1 << 2;
const KEYBOARD_RESET: u8 = 0xfe;

/// First port of the keyboard controller, and how many to claim: 0x61 in between is the timer's, and KVM's own.
pub const KEYBOARD_DATA_PORT: u16 = 0x60;
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;

/// [`ResetPort`] as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedResetPort {
    value: u8,
}

/// Port 0xCF9.
pub struct ResetPort {
    power: Arc<dyn PowerControl>,
    value: u8,
}

impl ResetPort {
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Self { power, value: 0 }
    }

    pub fn save(&self) -> SavedResetPort {
        SavedResetPort { value: self.value }
    }

    pub fn restore(&mut self, saved: SavedResetPort) {
        self.value = saved.value & !RESET_CPU;
    }
}

impl PioDevice for ResetPort {
    fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _port_offset: u16, data: &[u8]) {
        if let [value] = data {
            self.value = *value & !RESET_CPU;
            if value & RESET_CPU != 0 {
                self.power.request(PowerRequest::Reset);
            }
        }
    }
}

/// Ports 0x60 and 0x64, one instance for each.
pub struct KeyboardController {
    power: Option<Arc<dyn PowerControl>>,
}

impl KeyboardController {
    /// Port 0x64, which takes commands.
    pub fn command(power: Arc<dyn PowerControl>) -> Self {
        Self { power: Some(power) }
    }

    /// Port 0x60, which has no data.
    pub fn data() -> Self {
        Self { power: None }
    }
}

impl PioDevice for KeyboardController {
    fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
        // Status: nothing to read, ready for a command.
        data.fill(0);
    }

    fn write(&mut self, _port_offset: u16, data: &[u8]) {
        if let (Some(power), [KEYBOARD_RESET]) = (&self.power, data) {
            power.request(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;

    #[test]
    fn only_the_reset_bit_resets() {
        let asked = Asked::new();
        let mut port = ResetPort::new(asked.clone());
        port.write(0, &[0x02]);
        assert_eq!(asked.take(), []);
        let mut restored = ResetPort::new(asked.clone());
        restored.restore(port.save());
        assert_eq!(restored.save(), SavedResetPort { value: 0x02 });
        port.write(0, &[0x06]);
        port.write(0, &[RESET_VALUE]);
        assert_eq!(asked.take(), [PowerRequest::Reset; 2]);
    }

    #[test]
    fn the_keyboard_controller_resets_on_its_command_port_alone() {
        let asked = Asked::new();
        let mut command = KeyboardController::command(asked.clone());
        KeyboardController::data().write(0, &[KEYBOARD_RESET]);
        command.write(0, &[0x20]);
        assert_eq!(asked.take(), []);
        command.write(0, &[KEYBOARD_RESET]);
        assert_eq!(asked.take(), [PowerRequest::Reset]);
    }
}
