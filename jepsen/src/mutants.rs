//! Deliberate faults of the product, each of which the simulation must catch: what is never caught is not tested.

use std::time::Instant;

use clap::Args;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use statemachine::mutant::Mutant;

use crate::sim;
use crate::sim::Options;

#[derive(Debug, Args)]
pub struct MutantsArgs {
    /// Seeds that each may take
    #[arg(long, default_value_t = 60)]
    seeds: u64,
    /// Only this one
    #[arg(long, value_parser = named)]
    only: Option<Mutant>,
    /// First seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A mutant by its name in the code.
pub fn named(name: &str) -> Result<Mutant, String> {
    let all = || Mutant::ALL.map(|mutant| format!("{mutant:?}")).join(", ");
    let found = Mutant::ALL.into_iter().find(|mutant| format!("{mutant:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("no mutant of that name; there are {}", all()))
}

/// Runs seeds against each mutant until one is caught. False when one lives.
pub fn run(args: &MutantsArgs) -> anyhow::Result<bool> {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(["mutant", "caught by", "invariant", "seeds", "seconds"]);
    let all: Vec<Mutant> = args.only.map_or_else(|| Mutant::ALL.to_vec(), |only| vec![only]);
    let mut lives = 0;
    for mutant in all {
        let began = Instant::now();
        let options = Options { mutant: Some(mutant), ..Options::default() };
        let caught = (args.seed..args.seed + args.seeds).find_map(|seed| {
            let outcome = sim::run(seed, &options);
            Some((seed, outcome.violation?))
        });
        let seconds = format!("{:.1}", began.elapsed().as_secs_f64());
        let name = format!("{mutant:?}");
        match caught {
            Some((seed, violation)) => {
                eprintln!("{name}: seed {seed}: {violation}");
                let tried = (seed - args.seed + 1).to_string();
                table.add_row([name, format!("seed {seed}"), violation.invariant.to_owned(), tried, seconds]);
            }
            None => {
                eprintln!("{name}: LIVES after {} seeds", args.seeds);
                lives += 1;
                table.add_row([name, "LIVES".to_owned(), String::new(), args.seeds.to_string(), seconds]);
            }
        }
    }
    println!("{table}");
    println!("mutants: {}", if lives == 0 { "all caught".to_owned() } else { format!("{lives} live") });
    Ok(lives == 0)
}
