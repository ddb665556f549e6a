//! Values as people type them: durations, sizes, and the words of enums.

use std::time::Duration;

use clap::ValueEnum;
use hostd_api::event::StartFrom;
use jiff::Span;
use jiff::SpanRelativeTo;
use statemachine::state::MemoryPages;
use statemachine::state::OnPanic;
use statemachine::state::OnWatchdog;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::TokenPurpose;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    /// One host may join with it, once
    Join,
    /// API: every right of an administrator
    Admin,
    /// API: look only
    Viewer,
}

impl From<Purpose> for TokenPurpose {
    fn from(purpose: Purpose) -> TokenPurpose {
        match purpose {
            Purpose::Join => TokenPurpose::Join,
            Purpose::Admin => TokenPurpose::Admin,
            Purpose::Viewer => TokenPurpose::Viewer,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// Whatever the kernel gives
    Any,
    /// Huge pages of 2 MiB that the host has set aside
    #[value(name = "2MiB")]
    Mib2,
    /// Huge pages of 1 GiB that the host has set aside
    #[value(name = "1GiB")]
    Gib1,
}

impl From<Pages> for MemoryPages {
    fn from(pages: Pages) -> MemoryPages {
        match pages {
            Pages::Any => MemoryPages::Any,
            Pages::Mib2 => MemoryPages::Mib2,
            Pages::Gib1 => MemoryPages::Gib1,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Watchdog {
    Reset,
    PowerOff,
    /// It stands, for somebody to look at it
    Pause,
    /// A non-maskable interrupt, on which a kernel can panic and dump
    InjectNmi,
    None,
}

impl From<Watchdog> for OnWatchdog {
    fn from(action: Watchdog) -> OnWatchdog {
        match action {
            Watchdog::Reset => OnWatchdog::Reset,
            Watchdog::PowerOff => OnWatchdog::PowerOff,
            Watchdog::Pause => OnWatchdog::Pause,
            Watchdog::InjectNmi => OnWatchdog::InjectNmi,
            Watchdog::None => OnWatchdog::None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Panic {
    /// It is told, and the guest is left to itself
    Report,
    Reset,
    PowerOff,
    /// It stands, for somebody to look at it
    Pause,
}

impl From<Panic> for OnPanic {
    fn from(action: Panic) -> OnPanic {
        match action {
            Panic::Report => OnPanic::Report,
            Panic::Reset => OnPanic::Reset,
            Panic::PowerOff => OnPanic::PowerOff,
            Panic::Pause => OnPanic::Pause,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Runs whenever a host can be found, started again after any exit
    Always,
    /// Started and stopped by command
    Manual,
    /// Never runs
    Halted,
}

impl From<Strategy> for RunStrategy {
    fn from(strategy: Strategy) -> RunStrategy {
        match strategy {
            Strategy::Always => RunStrategy::Always,
            Strategy::Manual => RunStrategy::Manual,
            Strategy::Halted => RunStrategy::Halted,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Release {
    /// Its host's lease ran out (highly available VMs; the guest pauses when the host is cut off)
    Lease,
    /// Its host's power was cut
    Power,
    /// Its host's reservation of the storage was preempted
    Storage,
    /// A person says so (other VMs; the guest runs on when the host is cut off)
    Operator,
}

impl From<Release> for ReleaseClass {
    fn from(release: Release) -> ReleaseClass {
        match release {
            Release::Lease => ReleaseClass::Lease,
            Release::Power => ReleaseClass::Power,
            Release::Storage => ReleaseClass::Storage,
            Release::Operator => ReleaseClass::Operator,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Begin {
    /// The oldest event that is kept
    Oldest,
    /// What happens from now on
    Now,
    /// Everything as it is, then what changes
    State,
}

impl From<Begin> for StartFrom {
    fn from(begin: Begin) -> StartFrom {
        match begin {
            Begin::Oldest => StartFrom::Oldest,
            Begin::Now => StartFrom::Now,
            Begin::State => StartFrom::State,
        }
    }
}

/// `90s`, `3h`, `1d 12h`. A day has 24 hours here.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration; write 30s, 90m, 3h or 30d");
    let span: Span = text.parse().map_err(|_| wrong())?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    match Duration::try_from(duration) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(format!("{text:?} is not a duration above zero")),
    }
}

/// `512MiB`, `2GiB`, `1TiB`; short forms `512M`, `2G` mean the same powers of 1024, as in libvirt and QEMU.
pub fn parse_memory_mib(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size of memory; write 512MiB or 2GiB");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
    let unit = text[digits.len()..].trim().to_ascii_lowercase();
    let mib_in_unit = match unit.as_str() {
        "m" | "mib" => 1,
        "g" | "gib" => 1024,
        "t" | "tib" => 1024 * 1024,
        _ => return Err(wrong()),
    };
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    count.checked_mul(mib_in_unit).ok_or_else(wrong)
}
