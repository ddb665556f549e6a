//! Measured times as a table for people.

/// Rows of (what, measured, promised); prints them aligned.
#[derive(Default)]
pub struct Table {
    rows: Vec<[String; 3]>,
}

impl Table {
    pub fn seconds(&mut self, what: &str, seconds: f64, promised: &str) {
        self.row(what, format!("{seconds:.2} s"), promised);
    }

    pub fn row(&mut self, what: &str, measured: impl Into<String>, promised: &str) {
        self.rows.push([what.to_owned(), measured.into(), promised.to_owned()]);
    }

    pub fn print(&self) {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(["MEASURED", "HERE", "PROMISE"]);
        for row in &self.rows {
            table.add_row(row);
        }
        println!("\n{table}");
    }
}

/// Median, largest and count of measured seconds.
pub fn spread(seconds: &mut [f64]) -> String {
    seconds.sort_by(f64::total_cmp);
    match (seconds.get(seconds.len() / 2), seconds.last()) {
        (Some(median), Some(largest)) => format!("median {median:.2} s, max {largest:.2} s, {} runs", seconds.len()),
        _ => "never".to_owned(),
    }
}
