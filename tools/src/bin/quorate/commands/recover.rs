//! `quorate recover`: this host goes on alone, while hostd is stopped.

use std::path::Path;

use consensus::recover;
use consensus::recover::Prospect;
use jiff::Timestamp;

use super::Context;
use crate::exit::Failure;
use crate::output;
use crate::output::Show;
use crate::output::Table;

impl Show for Prospect {
    fn table(&self) -> String {
        let mut table = Table::bare();
        table.field("site", format!("{}, generation {} begins", self.site, self.generation));
        table.field("goes on with", &self.host);
        let at = i64::try_from(self.at_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let at = at.map_or("-".to_owned(), |at| format!("{at:.0}"));
        table.field("last batch here", format!("{}, of {at}", self.head));
        let last = self.last_entry.map(|last| format!("term {}, index {}", last.term, last.index));
        table.field(
            "last log entry here",
            last.unwrap_or("none: it pulled, and all that it has was committed".to_owned()),
        );
        for (host, vms) in &self.leave {
            table.field("leaves for good", format!("{host}, {} held there", output::agree(u64::from(*vms), "VM")));
        }
        table.render()
    }
}

pub async fn run(context: &Context, data_dir: &Path, all_other_hosts_are_off: bool) -> Result<(), Failure> {
    let failed = |error: recover::RecoverError| Failure::Local(chain(&error));
    if !all_other_hosts_are_off {
        output::show(context.format, &recover::look(data_dir).await.map_err(failed)?)?;
        return Err(Failure::Local(
            "nothing was changed. What was acknowledged and this host never got is lost, and what ran there is started \
             here: a VM that still runs there would run twice and destroy its disks. Compare the last log entry \
             on every host that is left, choose the highest term, then the highest index; switch all others off or wipe them; \
             and give your word with --all-other-hosts-are-off"
                .to_owned(),
        ));
    }
    let now_ms = Timestamp::now().as_millisecond().max(0) as u64;
    output::show(context.format, &recover::carry_out(data_dir, now_ms).await.map_err(failed)?)?;
    output::print("start hostd: `systemctl start hostd`; then join other hosts, wiped, with new tokens\n")
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}
