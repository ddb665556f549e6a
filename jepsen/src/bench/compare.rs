//! Rounds of two sites that took turns, as a table of medians and ratios.

use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use super::load::Measured;
use super::site::Kind;
use super::site::Site;

pub struct Row {
    pub clients: usize,
    pub kind: Kind,
    rounds: Vec<Measured>,
}

impl Row {
    /// Notes a round, and says it.
    pub fn take(&mut self, round: usize, measured: Measured, site: &Site) {
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

pub struct Comparison {
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
    pub fn new(clients: &[usize], kinds: &[Kind]) -> Comparison {
        let row = |clients, kind| Row { clients, kind, rounds: Vec::new() };
        let rows = clients.iter().flat_map(|clients| kinds.iter().map(|kind| row(*clients, *kind)));
        Comparison { rows: rows.collect(), kinds: kinds.len() }
    }

    /// The rows in the order of this round: who goes first changes from round to round.
    pub fn turns(&mut self, round: usize) -> Vec<&mut Row> {
        let mut turns = Vec::new();
        for pair in self.rows.chunks_mut(self.kinds) {
            match round.is_multiple_of(2) {
                true => turns.extend(pair.iter_mut().rev()),
                false => turns.extend(pair.iter_mut()),
            }
        }
        turns
    }

    pub fn print(&self, rate: &str) {
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
