//! `quorate why`: the stored reasons of a placement, as the table that they were.

use hostd_api::read::Item;
use hostd_api::vm::WhyView;
use statemachine::scheduler::Explanation;

use super::Show;
use super::Table;
use super::table::agree;
use super::word;

impl Show for Item<WhyView> {
    fn table(&self) -> String {
        let why = &self.item;
        let mut text = match &why.host_name {
            Some(host) => format!("vm {} is {} on host {host}.\n", why.name, why.status),
            None => format!("vm {} is {} and has no host.\n", why.name, why.status),
        };
        if let Some(waiting) = &why.waiting {
            text.push_str(&format!("\nNow: no host fits. {}\n", considered(waiting)));
            text.push_str(&explanation(waiting));
        }
        match &why.placement {
            Some(placement) => {
                text.push_str(&format!("\nLast placement: {}\n", considered(placement)));
                text.push_str(&explanation(placement));
            }
            None if why.waiting.is_none() => {
                text.push_str(&format!("It was never placed; `quorate vm start {}` starts it.\n", why.name));
            }
            None => {}
        }
        text
    }
}

fn considered(explanation: &Explanation) -> String {
    let hosts = agree(u64::from(explanation.considered), "host");
    format!(
        "{hosts} considered by policy {}, on the state of seq {}.",
        word(&explanation.policy),
        explanation.decided_on
    )
}

fn explanation(explanation: &Explanation) -> String {
    let mut text = String::new();
    if !explanation.filtered.is_empty() {
        let mut table = Table::with_header(&["FILTER", "EXCLUDED", "REASONS"]);
        for count in &explanation.filtered {
            table.row(vec![count.filter.to_string(), count.hosts.to_string(), count.reasons.join("; ")]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if let Some(first) = explanation.best.first() {
        // A unit's cell: its own score (lower is better), then the rank that it gave times its factor.
        let units: Vec<String> = first.units.iter().map(|unit| unit.unit.to_string()).collect();
        let mut header = vec!["HOST", "CHOSEN", "SUM"];
        header.extend(units.iter().map(String::as_str));
        let mut table = Table::with_header(&header);
        for host in &explanation.best {
            let chosen = if explanation.chosen == Some(host.host) { "yes" } else { "" };
            let mut row = vec![host.name.clone(), chosen.to_owned(), host.total.to_string()];
            row.extend(host.units.iter().map(|unit| format!("{} -> {} x {}", unit.score, unit.rank, unit.factor)));
            table.row(row);
        }
        text.push('\n');
        text.push_str(&table.render());
        text.push_str("\nThe highest sum wins. A unit's column: its score (lower is better) -> rank x factor.\n");
    }
    text
}
