//! What a bench says to a log that it makes itself: hosts that exist on paper, and VMs that change.

use consensus::types::TokioRuntime;
use statemachine::BootId;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::VmId;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::state::Capacity;
use statemachine::state::Fingerprint;
use statemachine::state::RunStrategy;
use statemachine::state::VmSpec;
use uuid::Uuid;

pub const FIRST: HostId = HostId(1);
pub type Node = consensus::node::NodeOn<TokioRuntime>;

pub fn address(number: usize) -> String {
    format!("192.0.{}.{}:7443", 2 + number / 250, number % 250 + 1)
}

pub fn candidate(number: usize) -> HostCandidate {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&(number as u64).to_le_bytes());
    let facts = HostFacts {
        boot: BootId(Uuid::from_u128(number as u128)),
        capacity: Capacity { cpu_threads: 4, memory_mib: 4096 },
        feature_level: FEATURE_LEVEL,
        version: "bench".to_owned(),
        clock_runs_while_stopped: true,
        watchdog_timeout_ms: None,
    };
    HostCandidate { name: format!("host{number}"), address: address(number), public_key: Fingerprint(key), facts }
}

pub fn site_init() -> Command {
    let (site, ca) = (SiteId(Uuid::from_u128(1)), Fingerprint([2; 32]));
    Command::SiteInit { site, name: "bench".to_owned(), ca, first_host: candidate(1) }
}

pub fn vm_define(number: usize) -> Command {
    let spec = VmSpec { vcpus: 1, memory_mib: 64, kernel: "/srv/vmlinuz".to_owned(), ..VmSpec::default() };
    Command::VmDefine { name: format!("vm{number}"), cluster: None, spec, run_strategy: RunStrategy::Halted }
}

/// A change that carries so many bytes, different for each `n`.
pub fn vm_change(vm: VmId, n: u64, bytes: usize) -> Command {
    let spec = VmSpecChange { cmdline: Some(format!("{n:x<bytes$}")), ..VmSpecChange::default() };
    Command::VmChange { vm, change: VmChange { spec, ..VmChange::default() } }
}
