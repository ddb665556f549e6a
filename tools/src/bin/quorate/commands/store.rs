//! `store check` and `store rebuild`: this machine's data directory, while hostd is stopped.

use std::path::Path;

use consensus::store::check::Finding;
use consensus::store::check::Inspection;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use serde::Serialize;

use super::Context;
use crate::args::StoreCommand;
use crate::exit::Failure;
use crate::output;
use crate::output::Show;
use crate::output::Table;

/// Of hostd's data directory.
const RAFT: &str = "raft";

/// What a check says of one part.
#[derive(Debug, Serialize)]
struct PartView {
    part: &'static str,
    files: usize,
    bytes: u64,
    holds: String,
    damage: Option<String>,
}

#[derive(Debug, Serialize)]
struct CheckView {
    parts: Vec<PartView>,
    sound: bool,
}

impl Show for CheckView {
    fn table(&self) -> String {
        let mut table = Table::with_header(&["PART", "FILES", "BYTES", "HOLDS", "VERDICT"]);
        for part in &self.parts {
            let verdict = part.damage.as_ref().map_or("sound".to_owned(), |damage| format!("DAMAGED: {damage}"));
            table.row(vec![
                part.part.to_owned(),
                part.files.to_string(),
                part.bytes.to_string(),
                part.holds.clone(),
                verdict,
            ]);
        }
        table.render()
    }
}

pub fn run(context: &Context, command: &StoreCommand) -> Result<(), Failure> {
    match command {
        StoreCommand::Check { data_dir } => check(context, &begin(data_dir)?),
        StoreCommand::Rebuild { data_dir } => rebuild(&begin(data_dir)?),
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Local(error.to_string())
}

fn begin(data_dir: &Path) -> Result<Inspection, Failure> {
    Inspection::begin(&data_dir.join(RAFT)).map_err(failed)
}

/// Bytes of events that were read, of all.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}");
    let bar = ProgressBar::new(0).with_message("reading events");
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn check(context: &Context, inspection: &Inspection) -> Result<(), Failure> {
    let bar = bar();
    let found = inspection.check(&mut |read, all| {
        bar.set_length(all);
        bar.set_position(read);
    });
    bar.finish_and_clear();
    let found = found.map_err(failed)?;
    let sound = found.iter().all(|finding| finding.damage.is_none());
    output::show(context.format, &CheckView { parts: found.iter().map(view).collect(), sound })?;
    let damaged: Vec<&Finding> = found.iter().filter(|finding| finding.damage.is_some()).collect();
    match (damaged.is_empty(), damaged.iter().all(|finding| finding.can_be_rebuilt)) {
        (true, _) => Ok(()),
        (false, true) => Err(failed("damaged; `quorate store rebuild` makes it again from the events")),
        (false, false) => Err(failed(
            "damaged beyond rebuilding; remove this host from the site (`quorate host remove` on another one), empty the \
             data directory and join it again",
        )),
    }
}

fn view(finding: &Finding) -> PartView {
    PartView {
        part: finding.part.name(),
        files: finding.files,
        bytes: finding.bytes,
        holds: finding.holds.clone(),
        damage: finding.damage.clone(),
    }
}

fn rebuild(inspection: &Inspection) -> Result<(), Failure> {
    let bar = bar();
    let done = inspection.rebuild(&mut |read, all| {
        bar.set_length(all);
        bar.set_position(read);
    });
    bar.finish_and_clear();
    for what in done.map_err(failed)? {
        output::print(&format!("{what}\n"))?;
    }
    output::print("start hostd again: `systemctl start hostd`\n")
}
