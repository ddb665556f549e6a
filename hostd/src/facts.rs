//! What this host tells about itself: its incarnation, its resources, and whether its clock and watchdog can be
//! evidence (DESIGN §5).

use std::path::Path;

use statemachine::BootId;
use statemachine::command::HostFacts;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::state::Capacity;
use thiserror::Error;

use crate::config::Config;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MEMINFO: &str = "/proc/meminfo";
const CPUINFO: &str = "/proc/cpuinfo";
const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

#[derive(Debug, Error)]
pub enum FactsError {
    #[error("cannot read {path}; is /proc mounted?")]
    Read { path: &'static str, source: std::io::Error },
    #[error("{path} holds no {what}")]
    Unreadable { path: &'static str, what: &'static str },
}

/// Everything about this host that enters the log.
pub fn collect(config: &Config, watchdog_timeout_ms: Option<u32>) -> Result<HostFacts, FactsError> {
    let memory_mib = total_memory_mib(&read(MEMINFO)?)?;
    let cpu_threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u32);
    Ok(HostFacts {
        boot: boot_id()?,
        capacity: Capacity { cpu_threads, memory_mib: memory_mib.saturating_sub(config.reserved_memory_mib) },
        feature_level: FEATURE_LEVEL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        clock_runs_while_stopped: config.trust_clock || clock_runs_while_stopped(),
        watchdog_timeout_ms,
    })
}

/// This incarnation of the host.
pub fn boot_id() -> Result<BootId, FactsError> {
    let unreadable = FactsError::Unreadable { path: BOOT_ID, what: "UUID" };
    read(BOOT_ID)?.trim().parse().map_err(|_| unreadable)
}

fn read(path: &'static str) -> Result<String, FactsError> {
    std::fs::read_to_string(Path::new(path)).map_err(|source| FactsError::Read { path, source })
}

fn total_memory_mib(meminfo: &str) -> Result<u64, FactsError> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or(FactsError::Unreadable { path: MEMINFO, what: "MemTotal in kB" })
}

/// Metal with a tsc: yes. A host that is itself a VM, or runs on hpet or acpi_pm: its clock may stand still while
/// it does not execute (hazard C6), so it says no unless its administrator knows better.
fn clock_runs_while_stopped() -> bool {
    let tsc = std::fs::read_to_string(CLOCKSOURCE).is_ok_and(|source| source.trim() == "tsc");
    tsc && std::fs::read_to_string(CPUINFO).is_ok_and(|cpuinfo| !is_virtual(&cpuinfo))
}

fn is_virtual(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_mebibytes() {
        assert_eq!(total_memory_mib("MemTotal:        2048000 kB\nMemFree: 1 kB\n").unwrap(), 2000);
        assert!(total_memory_mib("MemTotal: lots\n").is_err());
        assert!(total_memory_mib("").is_err());
    }

    #[test]
    fn a_host_that_is_a_vm_is_recognised() {
        assert!(is_virtual("processor : 0\nflags\t\t: fpu hypervisor lahf_lm\n"));
        assert!(!is_virtual("processor : 0\nflags\t\t: fpu vmx\n"));
    }
}
