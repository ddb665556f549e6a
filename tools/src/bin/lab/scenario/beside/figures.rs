//! What a turn measures, and the table of all turns.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::Serialize;

use super::peer::Peer;

/// In the order of the table's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// From the start of the process to the first line of the guest's init on its console.
    InitS,
    /// Memory of the process beyond guest RAM: its share of what it maps ([`super::memory`]).
    PssMib,
    /// Of that, what no other process maps.
    PrivateMib,
    /// Requests of 4 KiB a second from inside the guest, one at a time.
    SequentialReads,
    RandomReads,
    SequentialWrites,
    RandomWrites,
    /// From the guest to the host, one TCP stream.
    NetworkMibS,
    /// From the order to the guest's first instruction in the other process.
    MigrationS,
    /// From the stop of the guest to its first instruction in the other process.
    DowntimeMs,
}

impl Measure {
    pub const ALL: [Self; 10] = [
        Self::InitS,
        Self::PssMib,
        Self::PrivateMib,
        Self::SequentialReads,
        Self::RandomReads,
        Self::SequentialWrites,
        Self::RandomWrites,
        Self::NetworkMibS,
        Self::MigrationS,
        Self::DowntimeMs,
    ];

    /// What, and in which unit.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::InitS => ("process start to guest init", "s"),
            Self::PssMib => ("memory beyond guest RAM, Pss", "MiB"),
            Self::PrivateMib => ("the same, private", "MiB"),
            Self::SequentialReads => ("reads of 4 KiB, sequential", "/s"),
            Self::RandomReads => ("reads of 4 KiB, random", "/s"),
            Self::SequentialWrites => ("writes of 4 KiB, sequential", "/s"),
            Self::RandomWrites => ("writes of 4 KiB, random", "/s"),
            Self::NetworkMibS => ("network, guest to host", "MiB/s"),
            Self::MigrationS => ("migration, total", "s"),
            Self::DowntimeMs => ("migration, downtime", "ms"),
        }
    }

    fn text(self, value: f64) -> String {
        let decimals = match value {
            value if value < 10.0 => 2,
            value if value < 100.0 => 1,
            _ => 0,
        };
        format!("{value:.decimals$} {}", self.words().1)
    }
}

pub type Figures = BTreeMap<Measure, f64>;

/// One turn of one program.
#[derive(Debug, Clone)]
pub struct Turn {
    pub round: u32,
    pub peer: Peer,
    pub vcpus: u32,
    pub figures: Figures,
}

/// All figures of a turn, for the eye.
pub fn line(figures: &Figures) -> String {
    let text = |(measure, value): (&Measure, &f64)| format!("{}: {}", measure.words().0, measure.text(*value));
    figures.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Medians of each program, and the vmm's figures divided by those of each machine type of QEMU in the same round: median, least, most.
pub fn table(turns: &[Turn]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    let others = || Peer::ALL.into_iter().filter(|peer| *peer != Peer::Vmm);
    let mut header = vec!["vCPUs".to_owned(), "what".to_owned()];
    header.extend(Peer::ALL.iter().map(|peer| peer.name().to_owned()));
    header.extend(others().map(|peer| format!("vmm to {}", peer.name())));
    table.set_header(header);
    let vcpus: std::collections::BTreeSet<u32> = turns.iter().map(|turn| turn.vcpus).collect();
    for vcpus in vcpus {
        for measure in Measure::ALL {
            let of = |peer| values(turns, vcpus, peer, measure);
            let mut row = vec![vcpus.to_string(), measure.words().0.to_owned()];
            let middle = |peer| median(of(peer).into_values().collect());
            row.extend(Peer::ALL.map(|peer| middle(peer).map_or_else(String::new, |value| measure.text(value))));
            row.extend(others().map(|peer| spread(ratios(&of(Peer::Vmm), &of(peer)))));
            table.add_row(row);
        }
    }
    table.to_string()
}

/// A figure of a program in each round.
fn values(turns: &[Turn], vcpus: u32, peer: Peer, measure: Measure) -> BTreeMap<u32, f64> {
    let of = turns.iter().filter(|turn| turn.vcpus == vcpus && turn.peer == peer);
    of.filter_map(|turn| Some((turn.round, *turn.figures.get(&measure)?))).collect()
}

/// Only rounds in which both had their turn: what else the machine did was the same for both, or nearly.
fn ratios(ours: &BTreeMap<u32, f64>, theirs: &BTreeMap<u32, f64>) -> Vec<f64> {
    ours.iter().filter_map(|(round, value)| Some(value / theirs.get(round).filter(|other| **other > 0.0)?)).collect()
}

/// `0.82 (0.79, 0.90)`.
fn spread(ratios: Vec<f64>) -> String {
    let (least, most) = ratios.iter().fold((f64::MAX, f64::MIN), |(least, most), it| (least.min(*it), most.max(*it)));
    median(ratios).map_or_else(String::new, |middle| format!("{middle:.2} ({least:.2}, {most:.2})"))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    match values.len() % 2 {
        0 => Some((values[values.len() / 2 - 1] + upper) / 2.0),
        _ => Some(upper),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(round: u32, peer: Peer, seconds: f64) -> Turn {
        Turn { round, peer, vcpus: 1, figures: Figures::from([(Measure::InitS, seconds)]) }
    }

    #[test]
    fn a_ratio_compares_turns_of_the_same_round() {
        // The third round was twice as slow for both, and its turn of `pc` is missing.
        let turns = [
            turn(0, Peer::Vmm, 2.0),
            turn(0, Peer::Pc, 4.0),
            turn(1, Peer::Pc, 2.0),
            turn(1, Peer::Vmm, 3.0),
            turn(2, Peer::Vmm, 400.0),
        ];
        let table = table(&turns);
        let row = table.lines().find(|line| line.contains("guest init")).expect("a row");
        assert!(row.contains("| 3.00 s "), "{row}");
        assert!(row.contains("| 1.00 (0.50, 1.50) "), "{row}");
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn figures_go_from_the_host_to_the_story_as_json() {
        let figures = Figures::from([(Measure::InitS, 1.5), (Measure::NetworkMibS, 20.0)]);
        let text = serde_json::to_string(&figures).expect("JSON");
        assert_eq!(text, r#"{"init_s":1.5,"network_mib_s":20.0}"#);
        assert_eq!(serde_json::from_str::<Figures>(&text).expect("figures"), figures);
    }
}
