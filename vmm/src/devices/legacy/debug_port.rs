//! Port 0x402, where firmware and small test guests print: lines go to our log at level debug.

use crate::bus::PioDevice;

/// A read tells the guest that somebody listens.
const PRESENT: u8 = 0xe9;
const MAX_LINE_BYTES: usize = 256;

#[derive(Default)]
pub struct DebugPort {
    line: Vec<u8>,
}

impl PioDevice for DebugPort {
    fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _port_offset: u16, data: &[u8]) {
        for byte in data {
            if *byte != b'\n' {
                self.line.push(*byte);
            }
            if *byte == b'\n' || self.line.len() == MAX_LINE_BYTES {
                let text = String::from_utf8_lossy(&self.line).escape_debug().to_string();
                tracing::debug!(target: "guest", "{text}");
                self.line.clear();
            }
        }
    }
}
