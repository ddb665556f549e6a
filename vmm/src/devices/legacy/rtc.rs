//! The CMOS clock (MC146818 at 0x70/0x71) and its 114 bytes of memory. It reads the host's time in UTC plus what the guest
//! has set it to, and has no interrupt: alarms are not offered (the DSDT gives it none).

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::PioDevice;

/// The register that holds the century, which the FADT repeats.
pub const CENTURY: u8 = 0x32;
pub const PORT: u16 = 0x70;
pub const PORTS: u64 = 2;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// 32.768 kHz divider, 1024 Hz rate: what a BIOS leaves.
const A_DEFAULT: u8 = 0x26;
const A_UPDATING: u8 = 1 << 7;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
/// While set, the time stands and may be written.
const B_SET: u8 = 1 << 7;
/// The battery is good.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;
const INDEX_MASK: u8 = 0x7f;

/// A calendar date and time, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DateTime {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const SECONDS_A_DAY: i64 = 86_400;

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar. Years begin in March, so that leap days come last.
fn days_from_date(year: i64, month: u8, day: u8) -> i64 {
    let month = i64::from(month);
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(day) - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

impl DateTime {
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_A_DAY) + 719_468;
        let rest = seconds.rem_euclid(SECONDS_A_DAY);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    fn to_unix(self) -> i64 {
        days_from_date(self.year, self.month, self.day) * SECONDS_A_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    fn is_in_calendar(self) -> bool {
        (-9999..=9999).contains(&self.year)
            && (1..=12).contains(&self.month)
            && (1..=31).contains(&self.day)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60
    }

    /// 1 is Sunday.
    fn weekday(self) -> u8 {
        let days = days_from_date(self.year, self.month, self.day);
        ((days + 4).rem_euclid(7) + 1) as u8
    }
}

/// How far a guest's clock can be from its host's: the calendar has four digits for the year.
const MAX_OFFSET_SECONDS: u64 = 10_000 * 366 * SECONDS_A_DAY as u64;

/// [`RealTimeClock`] as it is saved: what it shows is the next host's time, with the same offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRealTimeClock {
    offset_seconds: i64,
    held: Option<DateTime>,
    index: u8,
    status_a: u8,
    status_b: u8,
    memory: Vec<u8>,
}

/// A saved clock that no guest can have set.
#[derive(Debug, thiserror::Error)]
#[error("the saved CMOS clock is none: {0}")]
pub struct NoClock(&'static str);

/// Where the clock takes the host's time from, in seconds since 1970.
type HostTime = Box<dyn Fn() -> i64 + Send>;

pub struct RealTimeClock {
    host_time: HostTime,
    /// What the guest's clock is ahead of the host's.
    offset_seconds: i64,
    /// The time while it stands (status B, SET).
    held: Option<DateTime>,
    index: u8,
    status_a: u8,
    status_b: u8,
    memory: [u8; 128],
}

impl Default for RealTimeClock {
    fn default() -> Self {
        Self::with_host_time(Box::new(|| match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_secs() as i64,
            Err(before) => -(before.duration().as_secs() as i64),
        }))
    }
}

impl RealTimeClock {
    fn with_host_time(host_time: HostTime) -> Self {
        Self {
            host_time,
            offset_seconds: 0,
            held: None,
            index: 0,
            status_a: A_DEFAULT,
            status_b: B_24_HOURS,
            memory: [0; 128],
        }
    }

    pub fn save(&self) -> SavedRealTimeClock {
        SavedRealTimeClock {
            offset_seconds: self.offset_seconds,
            held: self.held,
            index: self.index,
            status_a: self.status_a,
            status_b: self.status_b,
            memory: self.memory.to_vec(),
        }
    }

    pub fn restore(&mut self, saved: SavedRealTimeClock) -> Result<(), NoClock> {
        let SavedRealTimeClock { offset_seconds, held, index, status_a, status_b, memory } = saved;
        if offset_seconds.unsigned_abs() > MAX_OFFSET_SECONDS {
            return Err(NoClock("its time is millennia from the host's"));
        }
        if held.is_some_and(|time| !time.is_in_calendar()) {
            return Err(NoClock("it shows no date"));
        }
        self.memory = memory.try_into().map_err(|_| NoClock("its memory has another size"))?;
        self.offset_seconds = offset_seconds;
        self.held = held;
        self.index = index & INDEX_MASK;
        self.status_a = status_a;
        self.status_b = status_b;
        Ok(())
    }

    fn now(&self) -> DateTime {
        self.held.unwrap_or_else(|| DateTime::from_unix((self.host_time)() + self.offset_seconds))
    }

    /// A number as the guest wants it: BCD unless it chose binary.
    fn encode(&self, value: u8) -> u8 {
        if self.status_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let twelve = self.decode(value & !PM) % 12;
        if value & PM != 0 { twelve + 12 } else { twelve }
    }

    fn read_register(&self, index: u8) -> u8 {
        let now = self.now();
        match index {
            SECONDS => self.encode(now.second),
            MINUTES => self.encode(now.minute),
            HOURS => self.encode_hour(now.hour),
            WEEKDAY => now.weekday(),
            DAY => self.encode(now.day),
            MONTH => self.encode(now.month),
            YEAR => self.encode(now.year.rem_euclid(100) as u8),
            CENTURY => self.encode((now.year / 100).clamp(0, 99) as u8),
            STATUS_A => self.status_a & !A_UPDATING,
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            other => self.memory[usize::from(other & INDEX_MASK)],
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY => {
                self.write_time(index, value);
            }
            STATUS_A => self.status_a = value & !A_UPDATING,
            STATUS_B => self.write_status_b(value),
            WEEKDAY | STATUS_C | STATUS_D => {}
            other => self.memory[usize::from(other & INDEX_MASK)] = value,
        }
    }

    fn write_time(&mut self, index: u8, value: u8) {
        let mut time = self.now();
        let number = self.decode(value);
        match index {
            SECONDS => time.second = number.min(59),
            MINUTES => time.minute = number.min(59),
            HOURS => time.hour = self.decode_hour(value).min(23),
            DAY => time.day = number.clamp(1, 31),
            MONTH => time.month = number.clamp(1, 12),
            YEAR => time.year = time.year / 100 * 100 + i64::from(number.min(99)),
            _ => time.year = i64::from(number.min(99)) * 100 + time.year % 100,
        }
        self.set(time);
    }

    fn set(&mut self, time: DateTime) {
        if self.held.is_some() {
            self.held = Some(time);
        } else {
            self.offset_seconds = time.to_unix() - (self.host_time)();
        }
    }

    fn write_status_b(&mut self, value: u8) {
        let holds = value & B_SET != 0;
        if holds && self.held.is_none() {
            self.held = Some(self.now());
        }
        self.status_b = value;
        if !holds && let Some(time) = self.held.take() {
            self.set(time);
        }
    }
}

impl PioDevice for RealTimeClock {
    fn read(&mut self, port_offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (port_offset, data) {
            *byte = self.read_register(self.index);
        }
    }

    fn write(&mut self, port_offset: u16, data: &[u8]) {
        match (port_offset, data) {
            // Bit 7 masks NMIs on a PC; there are none to mask.
            (0, [index]) => self.index = index & INDEX_MASK,
            (1, [value]) => self.write_register(self.index, *value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// 2026-11-21 09:46:59, a Saturday.
    const NOW: i64 = 1_795_254_419;

    fn clock() -> (RealTimeClock, Arc<AtomicI64>) {
        let time = Arc::new(AtomicI64::new(NOW));
        let source = time.clone();
        let clock = RealTimeClock::with_host_time(Box::new(move || source.load(Ordering::Relaxed)));
        (clock, time)
    }

    fn read(clock: &mut RealTimeClock, index: u8) -> u8 {
        clock.write(0, &[index]);
        let mut byte = [0];
        clock.read(1, &mut byte);
        byte[0]
    }

    fn write(clock: &mut RealTimeClock, index: u8, value: u8) {
        clock.write(0, &[index]);
        clock.write(1, &[value]);
    }

    #[test]
    fn the_guest_reads_the_hosts_time_in_bcd() {
        let (mut clock, _) = clock();
        let registers = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY];
        let seen = registers.map(|r| read(&mut clock, r));
        assert_eq!(seen, [0x20, 0x26, 0x11, 0x21, 0x09, 0x46, 0x59, 7]);
    }

    #[test]
    fn hours_follow_the_mode_that_the_guest_chose() {
        let (mut clock, time) = clock();
        time.fetch_add(12 * 3600, Ordering::Relaxed);
        write(&mut clock, STATUS_B, B_BINARY);
        assert_eq!(read(&mut clock, HOURS), 9 | PM);
        write(&mut clock, HOURS, 12);
        write(&mut clock, STATUS_B, B_BINARY | B_24_HOURS);
        assert_eq!(read(&mut clock, HOURS), 0);
    }

    #[test]
    fn a_clock_that_was_set_runs_on_from_there() {
        let (mut clock, time) = clock();
        write(&mut clock, STATUS_B, B_24_HOURS | B_SET);
        for (register, value) in [(YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (CENTURY, 0x19)] {
            write(&mut clock, register, value);
        }
        for (register, value) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)] {
            write(&mut clock, register, value);
        }
        time.fetch_add(100, Ordering::Relaxed);
        assert_eq!(read(&mut clock, SECONDS), 0x59, "it stands while it is set");
        write(&mut clock, STATUS_B, B_24_HOURS);
        time.fetch_add(1, Ordering::Relaxed);
        let seen = [CENTURY, YEAR, MONTH, DAY, HOURS].map(|r| read(&mut clock, r));
        assert_eq!(seen, [0x20, 0x00, 0x01, 0x01, 0x00]);
    }

    #[test]
    fn a_saved_clock_goes_on_with_the_next_hosts_time() {
        let (mut old, _) = clock();
        write(&mut old, YEAR, 0x30);
        write(&mut old, 0x40, 0xa5);
        let (mut new, time) = clock();
        time.fetch_add(60, Ordering::Relaxed);
        new.restore(old.save()).unwrap();
        assert_eq!([YEAR, MINUTES, 0x40].map(|r| read(&mut new, r)), [0x30, 0x47, 0xa5]);
        // While it is being set, it stands.
        write(&mut old, STATUS_B, B_24_HOURS | B_SET);
        new.restore(old.save()).unwrap();
        time.fetch_add(3600, Ordering::Relaxed);
        assert_eq!(read(&mut new, HOURS), 0x09);
        let text = serde_json::to_string(&new.save()).unwrap();
        assert_eq!(serde_json::from_str::<SavedRealTimeClock>(&text).unwrap(), new.save());
    }

    #[test]
    fn a_clock_that_cannot_be_is_refused() {
        let (mut clock, _) = clock();
        let good = clock.save();
        let midnight = DateTime { year: 2026, month: 1, day: 1, hour: 0, minute: 0, second: 0 };
        for bad in [
            SavedRealTimeClock { offset_seconds: i64::MIN, ..good.clone() },
            SavedRealTimeClock { offset_seconds: i64::MAX, ..good.clone() },
            SavedRealTimeClock { held: Some(DateTime { month: 13, ..midnight }), ..good.clone() },
            SavedRealTimeClock { held: Some(DateTime { year: i64::MAX, ..midnight }), ..good.clone() },
            SavedRealTimeClock { memory: vec![0; 127], ..good.clone() },
        ] {
            clock.restore(bad).unwrap_err();
        }
        assert_eq!(clock.save(), good);
    }

    proptest! {
        #[test]
        fn dates_come_back(seconds in -10_000_000_000i64..100_000_000_000) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }

        #[test]
        fn no_write_breaks_it(writes in proptest::collection::vec(any::<(u8, u8)>(), 0..50)) {
            let (mut clock, _) = clock();
            for (index, value) in writes {
                write(&mut clock, index, value);
                for register in 0..128 {
                    read(&mut clock, register);
                }
            }
        }
    }
}
