//! COM1: a 16550 between the guest and its console.

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use crate::bus::PioDevice;
use crate::console_hub::{ConsoleDevice, ConsoleSink, ConsoleSource};
use crate::interrupt::IrqLine;

/// Registers of a 16550.
pub const PORTS: u64 = 8;

/// [`SerialPort`] as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSerial {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Typed, and not yet read by the guest.
    received: Vec<u8>,
}

/// A saved serial port that cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[error("the saved serial port is none: {0}")]
pub struct NoSerial(String);

/// The device. What is typed waits in the console's queue and enters the FIFO as the guest makes room.
pub struct SerialPort {
    line: Arc<dyn IrqLine>,
    uart: Serial<Line, NoEvents, Output>,
    console: Arc<ConsoleDevice>,
}

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

struct Output(Arc<ConsoleDevice>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        ConsoleSink::write(&*self.0, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    pub fn new(line: Arc<dyn IrqLine>, console: Arc<ConsoleDevice>) -> Self {
        Self { uart: Serial::new(Line(Arc::clone(&line)), Output(Arc::clone(&console))), line, console }
    }

    pub fn save(&self) -> SavedSerial {
        let state = self.uart.state();
        SavedSerial {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Takes over a saved state. An interrupt that the guest has not seen is raised again: the pulse of the line is not
    /// saved, and a driver that waits to transmit would wait for ever (rule 27 of reference peers-vmm §4.2).
    pub fn restore(&mut self, saved: SavedSerial) -> Result<(), NoSerial> {
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received,
        };
        let (line, output) = (Line(Arc::clone(&self.line)), Output(Arc::clone(&self.console)));
        self.uart = Serial::from_state(&state, line, NoEvents, output).map_err(|error| NoSerial(error.to_string()))?;
        Ok(())
    }

    /// Says when something was typed. Its bell is cleared by who polls it, before [`take_input`](Self::take_input).
    pub fn input_ready(&self) -> Arc<ConsoleDevice> {
        Arc::clone(&self.console)
    }

    /// Moves typed bytes into the FIFO. Called when the console says that there are some, and after each read of the guest.
    pub fn take_input(&mut self) {
        let mut bytes = [0; 64];
        let room = self.uart.fifo_capacity().min(bytes.len());
        let count = self.console.read(&mut bytes[..room]);
        if count > 0
            && let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..count])
        {
            tracing::debug!(%error, "serial input lost");
        }
    }
}

impl PioDevice for SerialPort {
    fn read(&mut self, port_offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.uart.read(port_offset as u8);
            self.take_input();
        }
    }

    fn write(&mut self, port_offset: u16, data: &[u8]) {
        if let [byte] = data
            && let Err(error) = self.uart.write(port_offset as u8, *byte)
        {
            tracing::debug!(%error, "serial output lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console_hub::ConsoleHub;
    use crate::interrupt::fake::FakeLine;

    const DATA: u16 = 0;
    const INTERRUPT_ENABLE: u16 = 1;
    const LINE_STATUS: u16 = 5;

    #[test]
    fn what_is_typed_reaches_the_guest_whole_though_the_fifo_is_small() {
        let hub = ConsoleHub::new();
        let line = Arc::new(FakeLine::default());
        let mut com1 = SerialPort::new(line.clone(), Arc::new(hub.device().unwrap()));
        com1.write(INTERRUPT_ENABLE, &[1]);
        let typed: Vec<u8> = (0..200).collect();
        hub.attach().unwrap().send_input(&typed);
        com1.take_input();
        assert!(line.pulses() > 0);

        let mut seen = Vec::new();
        let mut byte = [0];
        loop {
            com1.read(LINE_STATUS, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            com1.read(DATA, &mut byte);
            seen.push(byte[0]);
        }
        assert_eq!(seen, typed);
    }

    #[test]
    fn a_saved_port_raises_again_what_the_guest_has_not_seen() {
        let hub = ConsoleHub::new();
        let line = Arc::new(FakeLine::default());
        let mut old = SerialPort::new(line.clone(), Arc::new(hub.device().unwrap()));
        // The driver waits for room to transmit, and something was typed.
        old.write(INTERRUPT_ENABLE, &[3]);
        old.write(DATA, b"x");
        hub.attach().unwrap().send_input(b"typed");
        old.take_input();
        let saved = old.save();
        let text = serde_json::to_string(&saved).unwrap();

        let line = Arc::new(FakeLine::default());
        let mut new = SerialPort::new(line.clone(), Arc::new(hub.device().unwrap()));
        new.restore(serde_json::from_str(&text).unwrap()).unwrap();
        assert!(line.pulses() > 0);
        assert_eq!(new.save(), saved);
        let mut byte = [0];
        new.read(DATA, &mut byte);
        assert_eq!(&byte, b"t");

        let overfull = SavedSerial { received: vec![0; 100_000], ..saved };
        new.restore(overfull).unwrap_err();
    }

    #[test]
    fn what_the_guest_prints_reaches_the_console() {
        let hub = ConsoleHub::new();
        let line = Arc::new(FakeLine::default());
        let mut com1 = SerialPort::new(line, Arc::new(hub.device().unwrap()));
        for byte in b"hello" {
            com1.write(DATA, &[*byte]);
        }
        // Accesses of another width are no register's.
        com1.write(DATA, b"xx");
        assert_eq!(hub.scrollback(), b"hello");
    }
}
