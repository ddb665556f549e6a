//! A whole site in one process and on one thread: the real state machine, consensus, event store, decider, grants, leases,
//! duties and agent loop of every host, on a clock, network, disk and power that the seed commands.
//!
//! ```text
//! seed -> faults + clients -> hosts (hostd over stand-ins) -> network -> hosts ... -> checker
//! ```
//!
//! - [`world`]: the loop, a step of [`STEP_MS`] at a time; start there.
//! - [`host`]: one machine and the lives of its hostd; [`hardware`]: what outlives a hostd; [`processes`]: its guests.
//! - [`network`], [`clock`], [`runtime`], [`random`]: what lies.
//! - [`faults`]: what goes wrong; [`clients`]: who asks; [`checker`]: what must hold; [`coverage`]: what was met.
//! - [`trace`]: one hash of all that happened. [`shrink`]: a failing run with fewer faults.
//!
//! Each host has a tokio runtime of its own with a paused clock (`docs/adr/0009-a-runtime-for-each-simulated-host.md`): a
//! SIGKILL drops it, a stopped machine is not driven, a drifting clock is driven by more or less. Within a step the hosts run
//! one after the other in an order of the seed.

pub mod checker;
pub mod clients;
pub mod clock;
pub mod coverage;
pub mod faults;
pub mod hardware;
pub mod host;
pub mod network;
mod panics;
pub mod processes;
pub mod random;
pub mod roads;
pub mod runtime;
pub mod shrink;
pub mod trace;
pub mod world;

use statemachine::mutant;
use statemachine::mutant::Mutant;

use self::checker::Violation;
use self::coverage::Coverage;
use self::faults::Planned;
use self::trace::Prints;

/// True milliseconds between two looks of the checker.
pub const STEP_MS: u64 = 2;

#[derive(Debug, Clone, Default)]
pub struct Options {
    pub mutant: Option<Mutant>,
    pub prints: Prints,
    /// Instead of the seed's own.
    pub faults: Option<Vec<Planned>>,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub violation: Option<Violation>,
    pub trace_hash: String,
    pub simulated_ms: u64,
    pub coverage: Coverage,
    pub faults: Vec<Planned>,
    /// Messages delivered and batches committed.
    pub messages: u64,
    pub batches: u64,
}

/// Runs one seed. The same seed, options and build give the same outcome, on any machine.
pub fn run(seed: u64, options: &Options) -> Outcome {
    mutant::switch_on(options.mutant);
    let outcome = world::World::new(seed, options).run();
    mutant::switch_on(None);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_itself_and_another_differs() {
        let first = run(1, &Options::default());
        assert_eq!(first.violation, None);
        assert_eq!(first.trace_hash, run(1, &Options::default()).trace_hash);
        assert_ne!(first.trace_hash, run(2, &Options::default()).trace_hash);
    }
}
