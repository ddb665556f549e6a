//! How many commits a second, and how long each takes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::Peer;
use super::compare::Comparison;
use super::load;
use super::load::Load;
use super::load::Work;
use super::site::Kind;
use super::site::Site;

#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Clients at once, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1000])]
    clients: Vec<usize>,
    /// Bytes that each commit carries
    #[arg(long, default_value_t = 256)]
    bytes: usize,
    /// Seconds that are counted in each round, after two that are not
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Rounds; with a peer both take turns in each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

pub async fn run(args: &CommitArgs, dir: &Path, peer: Option<Peer>) -> anyhow::Result<()> {
    let mut comparison = Comparison::new(&args.clients, &Kind::beside(peer));
    for round in 1..=args.rounds {
        for row in comparison.turns(round) {
            let site = Arc::new(Site::start(row.kind, dir).await?);
            let (warm_up, measure) = (Duration::from_secs(2), Duration::from_secs(args.seconds));
            let load = Load { clients: row.clients, work: Work::Commit { bytes: args.bytes }, warm_up, measure };
            row.take(round, load::put(&site, load).await?, &site);
        }
    }
    comparison.print("commits/s");
    Ok(())
}
