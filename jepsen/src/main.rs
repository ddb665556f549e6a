//! `jepsen`: proves the spine of Quorate, and measures it.

use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;
use jepsen::bench;
use jepsen::bench::BenchArgs;
use jepsen::campaign;
use jepsen::campaign::SimArgs;
use jepsen::mutants;
use jepsen::mutants::MutantsArgs;

/// Proofs and measurements of Quorate's spine.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs whole sites on a simulated clock, network, disk and power; everything follows from the seed
    Sim(SimArgs),
    /// Switches on one deliberate fault of the product after the other, and shows which seed catches it
    Mutants(MutantsArgs),
    /// Measures three hosts with fsync on, beside a peer on the same machine if asked
    Bench(BenchArgs),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into()))
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let passed = match Args::parse().command {
        Command::Sim(args) => campaign::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("jepsen: {error:#}");
            ExitCode::from(2)
        }
    }
}
