//! Tables that line up: no borders, one line a row, no blanks at the end of a line. Good for eyes and for `grep`.

use std::fmt::Display;

use comfy_table::ContentArrangement;
use comfy_table::presets::NOTHING;

pub struct Table(comfy_table::Table);

impl Table {
    pub fn with_header(header: &[&str]) -> Table {
        let mut table = Table::bare();
        table.0.set_header(header.to_vec());
        table
    }

    /// Without a header: for `name: value` lines.
    pub fn bare() -> Table {
        let mut table = comfy_table::Table::new();
        // A row stays one line however narrow the terminal is: the terminal wraps, `grep` does not.
        table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        Table(table)
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.0.add_row(cells.into_iter().map(|cell| printable(&cell)).collect::<Vec<_>>());
    }

    pub fn field(&mut self, name: &str, value: impl Display) {
        self.row(vec![format!("{name}:"), value.to_string()]);
    }

    pub fn render(mut self) -> String {
        for column in self.0.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let mut text = String::new();
        for line in self.0.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// What a guest or another host wrote must not move the cursor of whoever reads it, nor break a row.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `-` where there is nothing.
pub fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// `1 host`, `2 hosts`.
pub fn agree(count: u64, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

/// MiB as people say it, exactly: `512 MiB`, `2 GiB`, `1.5 GiB`.
pub fn memory(mib: u64) -> String {
    match mib {
        0..1024 => format!("{mib} MiB"),
        mib if mib % 1024 == 0 => format!("{} GiB", mib / 1024),
        mib if mib % 512 == 0 => format!("{}.5 GiB", mib / 1024),
        mib => format!("{mib} MiB"),
    }
}
