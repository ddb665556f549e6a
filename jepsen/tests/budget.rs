//! What every commit pays for: the corpus, a fixed budget of seeds, and a few mutants. Longer hunts: `jepsen sim --seeds 2000`,
//! `jepsen mutants`.

use jepsen::campaign;
use jepsen::sim;
use jepsen::sim::Options;
use jepsen::sim::coverage::Coverage;
use statemachine::mutant::Mutant;

const SEEDS: u64 = 200;

#[test]
fn corpus_and_two_hundred_seeds_hold_and_meet_what_they_must() {
    let mut seeds = campaign::corpus().expect("a corpus that is read");
    seeds.extend(1..=SEEDS);
    let outcomes = campaign::run_seeds(&seeds, 2, &Options::default());
    for outcome in &outcomes {
        let seed = outcome.seed;
        assert_eq!(outcome.violation, None, "seed {seed}; tell it with `jepsen sim --seed {seed} --trace`");
    }
    let mut coverage = Coverage::default();
    outcomes.iter().for_each(|outcome| coverage.merge(&outcome.coverage));
    println!("{} seeds\n{coverage}", outcomes.len());
    assert_eq!(coverage.missing(), [], "never met, so nothing is proven about it");
}

/// The first seed from 1 on that catches it, within a few: see the table in README.md.
fn caught(mutant: Mutant) -> bool {
    let options = Options { mutant: Some(mutant), ..Options::default() };
    (1..=10).any(|seed| sim::run(seed, &options).violation.is_some())
}

#[test]
fn mutants_that_are_caught_soon_are_caught() {
    for mutant in [
        Mutant::VoteNotSynced,
        Mutant::AppendNotSynced,
        Mutant::AcknowledgeBeforeQuorum,
        Mutant::AnswerBeforeGround,
        Mutant::DeciderWithoutBarrier,
        Mutant::LeaderRestore,
        Mutant::SegmentDroppedAtInstall,
        Mutant::StartWithoutGrant,
        Mutant::LeaseFromReceive,
        Mutant::CapacityIgnoresPending,
    ] {
        assert!(caught(mutant), "{mutant:?} lives");
    }
}
