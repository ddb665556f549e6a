//! Commits and reads: how many a second, and how long each takes. Two sites take turns, round by round; the table has medians
//! and ratios.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use super::Peer;
use super::load;
use super::load::Load;
use super::load::Measured;
use super::load::Work;
use super::site::Kind;
use super::site::Site;

#[derive(Debug, Args)]
pub struct Rounds {
    /// Clients at once, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1000])]
    clients: Vec<usize>,
    /// Seconds that are counted in each round, after two that are not
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Rounds; with a peer both take turns in each, and who is first changes
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

#[derive(Debug, Args)]
pub struct CommitArgs {
    #[command(flatten)]
    pub rounds: Rounds,
    /// Bytes that each commit carries
    #[arg(long, default_value_t = 256)]
    pub bytes: usize,
}

pub async fn run(rounds: &Rounds, work: Work, dir: &Path, peer: Option<Peer>) -> anyhow::Result<()> {
    let mut comparison = Comparison::new(&rounds.clients, &Kind::beside(peer));
    for round in 1..=rounds.rounds {
        for row in comparison.turns(round) {
            let site = Arc::new(Site::start(row.kind, dir).await?);
            let (warm_up, measure) = (Duration::from_secs(2), Duration::from_secs(rounds.seconds));
            let load = Load { clients: row.clients, work, warm_up, measure, pace: None };
            row.take(round, load::put(&site, load).await?, &site);
        }
    }
    comparison.print(match work {
        Work::Commit { .. } => "commits/s",
        Work::Read => "reads/s",
    });
    Ok(())
}

struct Row {
    clients: usize,
    kind: Kind,
    rounds: Vec<Measured>,
}

impl Row {
    /// Notes a round, and says it.
    fn take(&mut self, round: usize, measured: Measured, site: &Site) {
        eprintln!(
            "round {round}: {:<8} {:>4} clients: {:>8.0}/s, p50 {:.2} ms, p99 {:.2} ms, {} errors, {:.0} MiB resident",
            self.kind.name(),
            self.clients,
            measured.rate(),
            measured.ms_at(0.5),
            measured.ms_at(0.99),
            measured.errors,
            site.resident_mib().into_iter().fold(0.0, f64::max),
        );
        self.rounds.push(measured);
    }

    fn of(&self, what: impl Fn(&Measured) -> f64) -> f64 {
        median(self.rounds.iter().map(what).collect())
    }

    fn p99(&self) -> f64 {
        self.of(|measured| measured.ms_at(0.99))
    }
}

struct Comparison {
    /// By clients, and within them Quorate first.
    rows: Vec<Row>,
    kinds: usize,
}

/// The middle one, of the rounds.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Comparison {
    fn new(clients: &[usize], kinds: &[Kind]) -> Comparison {
        let row = |clients, kind| Row { clients, kind, rounds: Vec::new() };
        let rows = clients.iter().flat_map(|clients| kinds.iter().map(|kind| row(*clients, *kind)));
        Comparison { rows: rows.collect(), kinds: kinds.len() }
    }

    /// The rows in the order of this round: who goes first changes from round to round.
    fn turns(&mut self, round: usize) -> Vec<&mut Row> {
        let mut turns = Vec::new();
        for pair in self.rows.chunks_mut(self.kinds) {
            match round.is_multiple_of(2) {
                true => turns.extend(pair.iter_mut().rev()),
                false => turns.extend(pair.iter_mut()),
            }
        }
        turns
    }

    fn print(&self, rate: &str) {
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN);
        table.set_header([
            "clients",
            "site",
            rate,
            "p50 ms",
            "p99 ms",
            "errors",
            "rate to peer (least, most)",
            "p99 to peer",
        ]);
        for (index, row) in self.rows.iter().enumerate() {
            let peer = (row.kind == Kind::Quorate && self.kinds > 1).then(|| &self.rows[index + 1]);
            table.add_row([
                row.clients.to_string(),
                row.kind.name().to_owned(),
                format!("{:.0}", row.of(Measured::rate)),
                format!("{:.2}", row.of(|measured| measured.ms_at(0.5))),
                format!("{:.2}", row.p99()),
                row.rounds.iter().map(|measured| measured.errors).sum::<u64>().to_string(),
                peer.map_or_else(String::new, |peer| ratios(row, peer)),
                peer.map_or_else(String::new, |peer| format!("{:.2}", row.p99() / peer.p99())),
            ]);
        }
        for column in [0, 2, 3, 4, 5] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        println!("{table}");
    }
}

/// Of the rates, round by round.
fn ratios(own: &Row, peer: &Row) -> String {
    let mut ratios: Vec<f64> =
        own.rounds.iter().zip(&peer.rounds).map(|(own, peer)| own.rate() / peer.rate()).collect();
    ratios.sort_by(f64::total_cmp);
    match (ratios.first(), ratios.last()) {
        (Some(least), Some(most)) => format!("{:.2} ({least:.2}, {most:.2})", median(ratios.clone())),
        _ => String::new(),
    }
}
