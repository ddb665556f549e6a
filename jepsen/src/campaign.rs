//! Many seeds: the corpus first, then as many as were asked for, on all cores; the counters of coverage at the end.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use statemachine::mutant::Mutant;

use crate::sim;
use crate::sim::Options;
use crate::sim::Outcome;
use crate::sim::coverage::Coverage;
use crate::sim::shrink::shrink;
use crate::sim::trace::Prints;

/// Seeds that found something once: one a line, with what it was.
const CORPUS: &str = include_str!("../corpus.txt");
/// A campaign of fewer seeds need not meet everything.
const ENOUGH_FOR_COVERAGE: u64 = 50;
const PROGRESS_EVERY: usize = 100;

#[derive(Debug, Args)]
pub struct SimArgs {
    /// First seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, counted up from the first
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Seeds at a time; each runs on one thread
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Run the seeds that found something once before all others
    #[arg(long)]
    corpus: bool,
    /// Switch on a deliberate fault of the product
    #[arg(long, value_parser = crate::mutants::named)]
    mutant: Option<Mutant>,
    /// Print what happens; one seed at a time
    #[arg(long)]
    trace: bool,
    /// With --trace: every message too
    #[arg(long, requires = "trace")]
    packets: bool,
    /// Do not look for fewer faults that break the same
    #[arg(long)]
    no_shrink: bool,
}

/// The corpus' seeds.
pub fn corpus() -> anyhow::Result<Vec<u64>> {
    let lines = CORPUS.lines().map(|line| line.split('#').next().unwrap_or("").trim());
    lines
        .filter(|line| !line.is_empty())
        .map(|line| line.parse().with_context(|| format!("corpus.txt: {line}")))
        .collect()
}

/// Runs seeds, so many at a time; stops at the first that breaks something.
pub fn run_seeds(seeds: &[u64], jobs: usize, options: &Options) -> Vec<Outcome> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let outcomes = Mutex::new(Vec::new());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                    let outcome = sim::run(*seed, options);
                    stop.fetch_or(outcome.violation.is_some(), Ordering::Relaxed);
                    let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                    outcomes.push(outcome);
                    if outcomes.len().is_multiple_of(PROGRESS_EVERY) {
                        let seconds = began.elapsed().as_secs_f64();
                        eprintln!("{} of {} seeds, {seconds:.0} s", outcomes.len(), seeds.len());
                    }
                }
            });
        }
    });
    outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what was asked for and tells. False when an invariant broke, or too little was met to prove anything.
pub fn run(args: &SimArgs) -> anyhow::Result<bool> {
    let began = Instant::now();
    let mut seeds = if args.corpus { corpus()? } else { Vec::new() };
    seeds.extend(args.seed..args.seed + args.seeds);
    let prints = match (args.trace, args.packets) {
        (false, _) => Prints::Nothing,
        (true, false) => Prints::Notes,
        (true, true) => Prints::Packets,
    };
    let options = Options { mutant: args.mutant, prints, faults: None };
    let outcomes = run_seeds(&seeds, if args.trace { 1 } else { args.jobs }, &options);
    let mut coverage = Coverage::default();
    outcomes.iter().for_each(|outcome| coverage.merge(&outcome.coverage));
    let hours = outcomes.iter().map(|outcome| outcome.simulated_ms).sum::<u64>() as f64 / 3_600_000.0;
    let messages: u64 = outcomes.iter().map(|outcome| outcome.messages).sum();
    let batches: u64 = outcomes.iter().map(|outcome| outcome.batches).sum();
    for outcome in outcomes.iter().filter(|outcome| outcome.violation.is_some() || outcomes.len() <= 3) {
        tell(outcome);
    }
    let broken = outcomes.iter().find(|outcome| outcome.violation.is_some());
    if let Some(broken) = broken
        && !args.no_shrink
    {
        let options = Options { mutant: args.mutant, ..Options::default() };
        let best = shrink(broken, &options, |left| eprintln!("still broken with {left} faults"));
        println!("seed {} needs {} of {} faults:", best.seed, best.faults.len(), broken.faults.len());
        best.faults.iter().for_each(|fault| println!("  {fault}"));
        tell(&best);
    }
    println!(
        "{} seeds, {hours:.2} simulated hours, {messages} messages, {batches} batches, {:.1} s",
        outcomes.len(),
        began.elapsed().as_secs_f64()
    );
    print!("{coverage}");
    let missing = if args.seeds >= ENOUGH_FOR_COVERAGE { coverage.missing() } else { Vec::new() };
    if !missing.is_empty() {
        println!("never met, so nothing is proven about it: {missing:?}");
    }
    let passed = broken.is_none() && missing.is_empty();
    println!("sim: {}", if passed { "ok" } else { "FAILED" });
    Ok(passed)
}

fn tell(outcome: &Outcome) {
    let verdict = outcome.violation.as_ref().map_or("ok".to_owned(), |violation| violation.to_string());
    let seconds = outcome.simulated_ms as f64 / 1000.0;
    println!(
        "seed {} trace {} {seconds:.1} s, {} batches: {verdict}",
        outcome.seed, outcome.trace_hash, outcome.batches
    );
}
