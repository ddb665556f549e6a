//! The watchdog's registers and its two stages. Pure: time comes in with each call.
//!
//! ```text
//! configuration space                        memory, 16 bytes
//! 0x60 word: bit 5 output off                0x00 timer 1, 20 bits    0x04 timer 2, 20 bits
//!            bit 2 1 MHz rather than 1 kHz   0x0c word: bit 8 reload, bit 9 timed out
//!            bits 1:0 interrupt of stage 1
//! 0x68 byte: bit 2 free running, bit 1 on, bit 0 locked
//! ```
//!
//! A write to the memory registers counts only behind 0x80 and 0x86 at 0x0c. Started or reloaded, timer 1 counts down, then timer 2, and
//! at its end the output pin acts: what that means is the configuration's to decide. After it has acted, the timer stands until its
//! driver reloads it: one action for each hang.
//!
//! The interrupt of stage 1 is not wired; Linux switches it off.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Offsets of the memory registers.
pub const TIMER_1: u64 = 0x00;
pub const TIMER_2: u64 = 0x04;
pub const RELOAD: u64 = 0x0c;

const CONFIG_OUTPUT_OFF: u16 = 1 << 5;
const CONFIG_MEGAHERTZ: u16 = 1 << 2;
const CONFIG_INTERRUPT: u16 = 0b11;
pub const CONFIG_WRITABLE: u16 = CONFIG_OUTPUT_OFF | CONFIG_MEGAHERTZ | CONFIG_INTERRUPT;

const LOCK_FREE_RUNNING: u8 = 1 << 2;
const LOCK_ON: u8 = 1 << 1;
const LOCK_LOCKED: u8 = 1 << 0;
pub const LOCK_WRITABLE: u8 = LOCK_FREE_RUNNING | LOCK_ON | LOCK_LOCKED;

const RELOAD_NOW: u32 = 1 << 8;
const TIMED_OUT: u32 = 1 << 9;
const UNLOCK_FIRST: u32 = 0x80;
const UNLOCK_SECOND: u32 = 0x86;

const PRELOAD_MAX: u32 = 0xf_ffff;
/// The timers count this clock, divided by 2^15 (about 1 kHz) or 2^5 (about 1 MHz).
const PCI_CLOCK_HZ: u128 = 33_000_000;
const KILOHERTZ_SHIFT: u32 = 15;
const MEGAHERTZ_SHIFT: u32 = 5;

/// How far the driver has come with unlocking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Unlock {
    Locked,
    First,
    /// The next write counts.
    Open,
}

/// Which timer counts, and when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counting {
    Stopped,
    First { ends: Duration },
    Second { ends: Duration },
}

/// The state machine. `now` counts from any fixed moment, and only while the guest is let run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    config: u16,
    lock: u8,
    preload: [u32; 2],
    unlock: Unlock,
    /// The machine was restarted by this timer, or would have been. Survives a reset.
    timed_out: bool,
    counting: Counting,
}

/// [`Timer`] as it is saved: with the time that is left in the place of the time at which it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTimer {
    config: u16,
    lock: u8,
    preload: [u32; 2],
    unlock: Unlock,
    timed_out: bool,
    counting: SavedCounting,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
enum SavedCounting {
    Stopped,
    First { left_ns: u64 },
    Second { left_ns: u64 },
}

/// A saved timer that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the saved watchdog is in a state that no watchdog can have: {0}")]
pub struct Impossible(&'static str);

impl Timer {
    /// As after power-on. `timed_out` is what the last machine's watchdog left behind.
    pub fn new(timed_out: bool) -> Self {
        Self {
            config: 0,
            lock: 0,
            preload: [PRELOAD_MAX; 2],
            unlock: Unlock::Locked,
            timed_out,
            counting: Counting::Stopped,
        }
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.timed_out);
    }

    /// Whether it has acted, and its driver has not cleared that.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }

    /// Register 0x60 of configuration space.
    pub fn config(&self) -> u16 {
        self.config
    }

    pub fn write_config(&mut self, value: u16) {
        self.config = value & CONFIG_WRITABLE;
    }

    /// Register 0x68 of configuration space.
    pub fn lock(&self) -> u8 {
        self.lock
    }

    /// Changes nothing once the register is locked.
    pub fn write_lock(&mut self, value: u8, now: Duration) {
        if self.lock & LOCK_LOCKED != 0 {
            return;
        }
        let was_on = self.is_on();
        self.lock = value & LOCK_WRITABLE;
        match (was_on, self.is_on()) {
            (false, true) => self.restart(now),
            (_, false) => self.counting = Counting::Stopped,
            (true, true) => {}
        }
    }

    fn is_on(&self) -> bool {
        self.lock & LOCK_ON != 0
    }

    /// A load from the memory registers. Locks them, as any access but the next step of unlocking does.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.unlock = Unlock::Locked;
        let value = match (offset, data.len()) {
            (TIMER_1, 4) => self.preload[0],
            (TIMER_2, 4) => self.preload[1],
            (RELOAD, 2 | 4) if self.timed_out => TIMED_OUT,
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// A store to the memory registers.
    pub fn write(&mut self, offset: u64, data: &[u8], now: Duration) {
        let unlock = std::mem::replace(&mut self.unlock, Unlock::Locked);
        let value = match *data {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        match (offset, unlock) {
            (RELOAD, _) if value == UNLOCK_FIRST => self.unlock = Unlock::First,
            (RELOAD, Unlock::First) if value == UNLOCK_SECOND => self.unlock = Unlock::Open,
            (RELOAD, Unlock::Open) => {
                if value & TIMED_OUT != 0 {
                    self.timed_out = false;
                }
                if value & RELOAD_NOW != 0 && self.is_on() {
                    self.restart(now);
                }
            }
            (TIMER_1, Unlock::Open) if data.len() == 4 => self.preload[0] = value & PRELOAD_MAX,
            (TIMER_2, Unlock::Open) if data.len() == 4 => self.preload[1] = value & PRELOAD_MAX,
            _ => {}
        }
    }

    /// Free running, the first stage is left out.
    fn restart(&mut self, now: Duration) {
        self.counting = if self.lock & LOCK_FREE_RUNNING != 0 {
            Counting::Second { ends: now + self.period(1) }
        } else {
            Counting::First { ends: now + self.period(0) }
        };
    }

    fn period(&self, stage: usize) -> Duration {
        let shift = if self.config & CONFIG_MEGAHERTZ != 0 { MEGAHERTZ_SHIFT } else { KILOHERTZ_SHIFT };
        period(self.preload[stage], shift)
    }

    /// When [`advance`](Self::advance) is to be called next.
    pub fn next_end(&self) -> Option<Duration> {
        match self.counting {
            Counting::Stopped => None,
            Counting::First { ends } | Counting::Second { ends } => Some(ends),
        }
    }

    /// Lets time pass. True when the output acts: the guest has not fed its watchdog.
    pub fn advance(&mut self, now: Duration) -> bool {
        if let Counting::First { ends } = self.counting
            && ends <= now
        {
            // From the end of the first, not from when somebody looked.
            self.counting = Counting::Second { ends: ends + self.period(1) };
        }
        match self.counting {
            Counting::Second { ends } if ends <= now => {
                self.counting = Counting::Stopped;
                let acts = self.config & CONFIG_OUTPUT_OFF == 0;
                self.timed_out |= acts;
                acts
            }
            _ => false,
        }
    }

    pub fn save(&self, now: Duration) -> SavedTimer {
        let left_ns = |ends: Duration| u64::try_from(ends.saturating_sub(now).as_nanos()).unwrap_or(u64::MAX);
        SavedTimer {
            config: self.config,
            lock: self.lock,
            preload: self.preload,
            unlock: self.unlock,
            timed_out: self.timed_out,
            counting: match self.counting {
                Counting::Stopped => SavedCounting::Stopped,
                Counting::First { ends } => SavedCounting::First { left_ns: left_ns(ends) },
                Counting::Second { ends } => SavedCounting::Second { left_ns: left_ns(ends) },
            },
        }
    }

    /// A timer that goes on at `now` with the time that was left.
    pub fn restore(saved: &SavedTimer, now: Duration) -> Result<Self, Impossible> {
        if saved.config & !CONFIG_WRITABLE != 0 || saved.lock & !LOCK_WRITABLE != 0 {
            return Err(Impossible("bits that do not exist are set"));
        }
        if saved.preload.iter().any(|preload| *preload > PRELOAD_MAX) {
            return Err(Impossible("a timer is longer than its register"));
        }
        let ends = |left_ns: u64| {
            let left = Duration::from_nanos(left_ns);
            let possible = left <= period(PRELOAD_MAX, KILOHERTZ_SHIFT);
            possible.then_some(now + left).ok_or(Impossible("more time is left than a timer can have"))
        };
        let counting = match saved.counting {
            SavedCounting::Stopped => Counting::Stopped,
            SavedCounting::First { left_ns } => Counting::First { ends: ends(left_ns)? },
            SavedCounting::Second { left_ns } => Counting::Second { ends: ends(left_ns)? },
        };
        if saved.lock & LOCK_ON == 0 && counting != Counting::Stopped {
            return Err(Impossible("it counts while it is off"));
        }
        let SavedTimer { config, lock, preload, unlock, timed_out, .. } = *saved;
        Ok(Self { config, lock, preload, unlock, timed_out, counting })
    }
}

fn period(preload: u32, shift: u32) -> Duration {
    let clocks = u128::from(preload) << shift;
    // At most 2^35 clocks, which is a quarter of an hour.
    Duration::from_nanos((clocks * 1_000_000_000 / PCI_CLOCK_HZ) as u64)
}
