//! The agent inside a guest.

use hostd_api::guest::AgentHealth;
use hostd_api::guest::AgentView;

use super::Show;
use super::Table;
use super::table::or_dash;
use super::table::yes_no;

impl Show for AgentView {
    fn table(&self) -> String {
        let mut table = Table::bare();
        let health = match self.health {
            AgentHealth::Absent => "absent: install qemu-guest-agent in the guest",
            AgentHealth::Up => "up",
            AgentHealth::Silent => "silent: it is connected and does not answer",
        };
        table.field("agent", health);
        table.field("version", or_dash(self.version.as_ref()));
        table.field("frozen", yes_no(self.frozen));
        let mut text = table.render();
        if self.filesystems.is_empty() {
            return text;
        }
        let mut table = Table::with_header(&["FILE SYSTEM", "SIZE MIB", "USED MIB", "USED"]);
        for filesystem in &self.filesystems {
            let mib = |bytes: Option<u64>| or_dash(bytes.map(|bytes| bytes >> 20));
            let share = filesystem.used_bytes.zip(filesystem.total_bytes.filter(|total| *total > 0));
            let share = share.map(|(used, total)| format!("{} %", u128::from(used) * 100 / u128::from(total)));
            let (total, used) = (mib(filesystem.total_bytes), mib(filesystem.used_bytes));
            table.row(vec![filesystem.mountpoint.clone(), total, used, or_dash(share)]);
        }
        text.push('\n');
        text.push_str(&table.render());
        text
    }
}
