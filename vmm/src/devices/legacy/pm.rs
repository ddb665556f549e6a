//! ACPI's fixed registers at PMBASE, as the ICH9 has them: PM1 event and control with the power button and S5, the PM timer, GPE0.
//!
//! The SCI is a level: it is held exactly while an enabled event waits, so a guest that was slow misses none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{PowerControl, PowerRequest};
use crate::bus::PioDevice;
use crate::interrupt::LevelLine;

/// Offsets from PMBASE, and lengths, which the FADT repeats.
pub const PM1_EVENT: u16 = 0x00;
pub const PM1_EVENT_LEN: u8 = 4;
pub const PM1_CONTROL: u16 = 0x04;
pub const PM1_CONTROL_LEN: u8 = 2;
pub const PM_TIMER: u16 = 0x08;
pub const PM_TIMER_LEN: u8 = 4;
pub const GPE0: u16 = 0x20;
pub const GPE0_LEN: u8 = 16;
/// Half of the block is status, half is enable.
const GPE0_STATUS_LEN: usize = GPE0_LEN as usize / 2;
/// The general purpose event of the VM generation ID, as on QEMU's machines; the DSDT has its method.
pub const GPE_VM_GENERATION: u8 = 5;
/// All of PMBASE.
pub const PORTS: u64 = 0x80;

/// The sleep type that _S5 names. 0, as QEMU's Q35 has it, because stock firmware writes it without asking.
pub const S5_SLEEP_TYPE: u8 = 0;

const POWER_BUTTON: u16 = 1 << 8;
/// Events of PM1 that exist here: the power button.
const PM1_EVENTS: u16 = POWER_BUTTON;
const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0b111 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
const TIMER_HZ: u128 = 3_579_545;

/// [`PowerManagement`] as it is saved. The timer stands while the guest is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPowerManagement {
    status: u16,
    enable: u16,
    control: u16,
    gpe0: [u8; GPE0_LEN as usize],
    timer_ns: u64,
}

pub struct PowerManagement {
    status: u16,
    enable: u16,
    control: u16,
    gpe0: [u8; GPE0_LEN as usize],
    /// What the timer had counted when it was `started`.
    counted: Duration,
    started: Instant,
    sci: Arc<dyn LevelLine>,
    power: Arc<dyn PowerControl>,
}

impl PowerManagement {
    pub fn new(sci: Arc<dyn LevelLine>, power: Arc<dyn PowerControl>) -> Self {
        Self {
            status: 0,
            enable: 0,
            // There is no legacy mode to leave: ACPI is on from the start.
            control: SCI_ENABLED,
            gpe0: [0; GPE0_LEN as usize],
            counted: Duration::ZERO,
            started: Instant::now(),
            sci,
            power,
        }
    }

    /// Presses the power button. What follows is the guest's to decide.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.update_sci();
    }

    /// A general purpose event happened. A guest that has not enabled it hears of it when it does.
    pub fn raise_gpe(&mut self, number: u8) {
        if let Some(status) = self.gpe0[..GPE0_STATUS_LEN].get_mut(usize::from(number / 8)) {
            *status |= 1 << (number % 8);
        }
        self.update_sci();
    }

    fn update_sci(&self) {
        let (status, enable) = self.gpe0.split_at(GPE0_STATUS_LEN);
        let gpe = status.iter().zip(enable).any(|(status, enable)| status & enable != 0);
        let asserted = gpe || self.status & self.enable & PM1_EVENTS != 0;
        if let Err(error) = self.sci.set(asserted) {
            tracing::warn!(%error, asserted, "cannot set the SCI");
        }
    }

    fn elapsed(&self) -> Duration {
        self.counted.saturating_add(self.started.elapsed())
    }

    fn timer(&self) -> u32 {
        (self.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    pub fn save(&self) -> SavedPowerManagement {
        SavedPowerManagement {
            status: self.status,
            enable: self.enable,
            control: self.control,
            gpe0: self.gpe0,
            timer_ns: u64::try_from(self.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Takes over a saved state, and holds the SCI if it was held: KVM saves its interrupt controllers, not the lines into them.
    pub fn restore(&mut self, saved: SavedPowerManagement) {
        let SavedPowerManagement { status, enable, control, gpe0, timer_ns } = saved;
        self.status = status;
        self.enable = enable;
        self.control = (control & !SLEEP_ENABLE) | SCI_ENABLED;
        self.gpe0 = gpe0;
        self.counted = Duration::from_nanos(timer_ns);
        self.started = Instant::now();
        self.update_sci();
    }

    fn read_byte(&self, offset: u16) -> u8 {
        let word = |value: u16| value.to_le_bytes()[usize::from(offset % 2)];
        match offset {
            0x00..=0x01 => word(self.status),
            0x02..=0x03 => word(self.enable),
            0x04..=0x05 => word(self.control),
            0x20..=0x2f => self.gpe0[usize::from(offset - GPE0)],
            _ => 0,
        }
    }

    fn write_byte(&mut self, offset: u16, value: u8) {
        let shift = 8 * (offset % 2);
        let (bits, mask) = (u16::from(value) << shift, 0xff << shift);
        match offset {
            // Status bits are cleared by writing them.
            0x00..=0x01 => self.status &= !bits,
            0x02..=0x03 => self.enable = (self.enable & !mask) | bits,
            0x04..=0x05 => self.write_control((self.control & !mask) | bits),
            // GPE status (first half) clears by writing, enable (second half) is kept.
            0x20..=0x27 => self.gpe0[usize::from(offset - GPE0)] &= !value,
            0x28..=0x2f => self.gpe0[usize::from(offset - GPE0)] = value,
            _ => {}
        }
    }

    fn write_control(&mut self, value: u16) {
        // SLP_EN reads as 0; SCI_EN belongs to the hardware.
        self.control = (value & !SLEEP_ENABLE) | SCI_ENABLED;
        let sleep_type = (value & SLEEP_TYPE_MASK) >> SLEEP_TYPE_SHIFT;
        if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.power.request(PowerRequest::PowerOff);
        }
    }
}

impl PioDevice for PowerManagement {
    fn read(&mut self, port_offset: u16, data: &mut [u8]) {
        if port_offset == PM_TIMER && data.len() == usize::from(PM_TIMER_LEN) {
            data.copy_from_slice(&self.timer().to_le_bytes());
            return;
        }
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(port_offset.wrapping_add(at as u16));
        }
    }

    fn write(&mut self, port_offset: u16, data: &[u8]) {
        // A word written to the control register acts once, when it is whole.
        if let (PM1_CONTROL, [low, high, ..]) = (port_offset, data) {
            self.write_control(u16::from_le_bytes([*low, *high]));
            return;
        }
        for (at, byte) in data.iter().enumerate() {
            self.write_byte(port_offset.wrapping_add(at as u16), *byte);
        }
        self.update_sci();
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;
    use crate::interrupt::fake::FakeLine;

    fn device() -> (PowerManagement, Arc<FakeLine>, Arc<Asked>) {
        let (sci, asked) = (Arc::new(FakeLine::default()), Asked::new());
        (PowerManagement::new(sci.clone(), asked.clone()), sci, asked)
    }

    fn read_word(pm: &mut PowerManagement, offset: u16) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_holds_the_sci_until_the_guest_has_seen_it() {
        let (mut pm, sci, _) = device();
        pm.press_power_button();
        assert!(!sci.asserted(), "not enabled yet");
        pm.write(0x02, &POWER_BUTTON.to_le_bytes());
        assert!(sci.asserted());
        assert_eq!(read_word(&mut pm, 0x00), POWER_BUTTON);
        pm.write(0x00, &POWER_BUTTON.to_le_bytes());
        assert!(!sci.asserted());
        assert_eq!(read_word(&mut pm, 0x00), 0);
    }

    #[test]
    fn a_general_purpose_event_holds_the_sci_until_the_guest_has_seen_it() {
        let (mut pm, sci, _) = device();
        for number in [GPE_VM_GENERATION, 0, 63] {
            let (at, bit) = (GPE0 + u16::from(number / 8), [1 << (number % 8)]);
            pm.raise_gpe(number);
            assert!(!sci.asserted(), "not enabled yet");
            pm.write(at + 8, &bit);
            assert!(sci.asserted());
            let mut status = [0];
            pm.read(at, &mut status);
            assert_eq!(status, bit);
            pm.write(at, &bit);
            assert!(!sci.asserted());
            pm.raise_gpe(number);
            assert!(sci.asserted());
            // The handler masks it first, as Linux does.
            pm.write(at + 8, &[0]);
            assert!(!sci.asserted());
            pm.write(at, &bit);
        }
        // An event that does not exist, and the button beside one that does.
        pm.raise_gpe(64);
        pm.write(GPE0 + 8, &[0xff; 8]);
        assert!(!sci.asserted());
        pm.raise_gpe(GPE_VM_GENERATION);
        pm.write(0x02, &POWER_BUTTON.to_le_bytes());
        pm.press_power_button();
        pm.write(GPE0, &[0xff]);
        assert!(sci.asserted(), "the button still waits");
    }

    #[test]
    fn s5_powers_off_and_other_sleep_types_do_nothing() {
        let (mut pm, _, asked) = device();
        let s3 = SLEEP_ENABLE | (1 << SLEEP_TYPE_SHIFT);
        pm.write(PM1_CONTROL, &s3.to_le_bytes());
        assert_eq!(asked.take(), []);
        pm.write(PM1_CONTROL, &SLEEP_ENABLE.to_le_bytes());
        assert_eq!(asked.take(), [PowerRequest::PowerOff]);
        assert_eq!(read_word(&mut pm, PM1_CONTROL), SCI_ENABLED);
    }

    #[test]
    fn a_saved_state_goes_on_with_its_line_and_its_timer() {
        let (mut old, _, _) = device();
        old.write(0x02, &POWER_BUTTON.to_le_bytes());
        old.write(GPE0 + 8, &[0x21]);
        old.press_power_button();
        old.counted = Duration::from_secs(1000);
        let saved = old.save();
        assert!(saved.timer_ns >= 1_000_000_000_000);
        let (mut new, sci, asked) = device();
        let text = serde_json::to_string(&saved).unwrap();
        new.restore(serde_json::from_str(&text).unwrap());
        assert!(sci.asserted(), "the button waits to be seen");
        assert!(new.elapsed() >= Duration::from_secs(1000));
        assert_eq!(read_word(&mut new, 0x00), POWER_BUTTON);
        assert_eq!(SavedPowerManagement { timer_ns: 0, ..new.save() }, SavedPowerManagement { timer_ns: 0, ..saved });
        // A state that a guest cannot have: nothing is powered off by it, and no time is too much.
        new.restore(SavedPowerManagement { control: 0xffff, timer_ns: u64::MAX, ..new.save() });
        assert_eq!(read_word(&mut new, PM1_CONTROL), !SLEEP_ENABLE);
        new.save();
        assert_eq!(asked.take(), []);
    }

    #[test]
    fn the_timer_goes_forward() {
        let (mut pm, _, _) = device();
        let mut read = || {
            let mut data = [0; 4];
            pm.read(PM_TIMER, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        while read() == first {}
        assert!(read() > first);
    }
}
