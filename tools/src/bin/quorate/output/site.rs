//! Status, membership, tokens, storage duty, digests.

use std::collections::BTreeMap;

use hostd_api::cluster::ClusterView;
use hostd_api::digest::StateDigest;
use hostd_api::host::SpmView;
use hostd_api::read::List;
use hostd_api::site::Membership;
use hostd_api::status::Status;
use hostd_api::token::TokenCreated;
use hostd_api::token::TokenState;
use hostd_api::token::TokenView;
use jiff::Timestamp;
use statemachine::HostId;
use statemachine::Seq;

use super::Show;
use super::Table;
use super::fields::distance;
use super::fields::moment;
use super::table::agree;
use super::table::or_dash;
use super::word;

impl Show for Status {
    fn table(&self) -> String {
        let mut table = Table::bare();
        let Some(member) = &self.member else {
            table.field("host", format!("{} ({})", self.host_name, self.address));
            table.field("site", "none: `quorate init` begins one, `quorate join TOKEN` enters one");
            table.field("version", &self.version);
            return table.render();
        };
        let hosts = |ids: &[HostId]| match ids.is_empty() {
            true => "-".to_owned(),
            false => ids.iter().map(HostId::to_string).collect::<Vec<_>>().join(", "),
        };
        let counts = member.counts;
        table.field("site", format!("{} ({})", member.site_name, member.site));
        table.field("host", format!("{} (id {}, {})", self.host_name, member.host, self.address));
        table.field("role", word(&member.role));
        table.field(
            "leader",
            match (&member.leader_name, member.leader) {
                (Some(name), Some(id)) => format!("{name} (id {id})"),
                (_, Some(id)) => format!("id {id}"),
                (_, None) => "none: writes wait until the voters have one".to_owned(),
            },
        );
        table.field("voters", hosts(&member.voters));
        table.field("learners", hosts(&member.learners));
        table.field("applied seq", member.applied_seq);
        table.field("hosts", format!("{} of {} up", counts.hosts_up, counts.hosts));
        let unknown = match counts.vms_unknown {
            0 => String::new(),
            count => format!(", {count} unknown"),
        };
        table.field("vms", format!("{} of {} up{unknown}", counts.vms_up, counts.vms));
        table.field("version", format!("{}, feature level {}", self.version, member.feature_level));
        for alarm in &member.alarms {
            table.field("ALARM", alarm);
        }
        table.render()
    }
}

impl Show for List<ClusterView> {
    fn table(&self) -> String {
        let mut table =
            Table::with_header(&["NAME", "ID", "HOSTS", "VMS", "CPU", "DOWNTIME", "BANDWIDTH", "AUTOMATIC"]);
        for cluster in &self.items {
            let migration = cluster.migration;
            table.row(vec![
                cluster.name.clone(),
                cluster.id.to_string(),
                cluster.hosts.to_string(),
                cluster.vms.to_string(),
                cluster.cpu.name().to_owned(),
                or_dash(migration.downtime_ms.map(|ms| format!("{ms} ms"))),
                or_dash(migration.mib_per_second.map(|mib| format!("{mib} MiB/s"))),
                word(&migration.automatic.unwrap_or(true)),
            ]);
        }
        table.render()
    }
}

impl Show for Membership {
    fn table(&self) -> String {
        format!("host {} (id {}) belongs to site {} ({})\n", self.host_name, self.host, self.site_name, self.site)
    }
}

impl Show for TokenCreated {
    /// Nothing but the text, so that it can be stored or piped; the rest of what people want is said on stderr.
    fn table(&self) -> String {
        format!("{}\n", self.token.expose())
    }
}

impl Show for List<TokenView> {
    fn table(&self) -> String {
        tokens(&self.items, Timestamp::now())
    }
}

pub(super) fn tokens(tokens: &[TokenView], now: Timestamp) -> String {
    let mut table = Table::with_header(&["ID", "PURPOSE", "STATUS", "EXPIRES", "CREATED", "NOTE"]);
    for token in tokens {
        let status = match (token.status, token.used_by) {
            (TokenState::Used, Some(host)) => format!("used by host {host}"),
            (status, _) => word(&status),
        };
        table.row(vec![
            token.id.to_string(),
            word(&token.purpose),
            status,
            distance(token.expires, now),
            moment(token.created),
            token.note.clone(),
        ]);
    }
    table.render()
}

impl Show for List<SpmView> {
    fn table(&self) -> String {
        let mut table = Table::with_header(&["DATA CENTER", "SPM HOST", "TOKEN"]);
        for spm in &self.items {
            let host = match (&spm.host_name, spm.host) {
                (Some(name), Some(id)) => format!("{name} (id {id})"),
                (_, host) => or_dash(host),
            };
            table.row(vec![spm.data_center_name.clone(), host, or_dash(spm.token)]);
        }
        table.render()
    }
}

/// First characters of a digest: enough to compare by eye. JSON has all of it.
const DIGEST_SHOWN: usize = 16;

impl Show for StateDigest {
    fn table(&self) -> String {
        let mut table = Table::with_header(&["HOST", "ID", "SEQ", "DIGEST", "CHAIN", "LEVEL"]);
        for host in &self.hosts {
            let mut row = vec![host.name.clone(), host.host.to_string()];
            match &host.digest {
                Some(digest) => row.extend([
                    digest.seq.to_string(),
                    digest.digest.chars().take(DIGEST_SHOWN).collect(),
                    digest.head_hash.chars().take(DIGEST_SHOWN).collect(),
                    digest.feature_level.to_string(),
                ]),
                None => row.extend(["-".to_owned(), or_dash(host.unreachable.as_ref())]),
            }
            table.row(row);
        }
        let verdict = match disagreement(self) {
            Some(seq) => format!("hosts DIFFER at seq {seq}: keep their disks, and report a defect"),
            None => verdict(self),
        };
        format!("{}{verdict}\n", table.render())
    }
}

fn verdict(digest: &StateDigest) -> String {
    let mut hosts_at: BTreeMap<Seq, u64> = BTreeMap::new();
    for at in digest.hosts.iter().filter_map(|host| host.digest.as_ref()) {
        *hosts_at.entry(at.seq).or_default() += 1;
    }
    let silent = digest.hosts.iter().filter(|host| host.digest.is_none()).count() as u64;
    let silent = match silent {
        0 => String::new(),
        count => format!("; {} did not answer", agree(count, "host")),
    };
    match hosts_at.len() {
        0 => "no host answered".to_owned(),
        1 => {
            let (seq, hosts) = hosts_at.iter().next().unwrap_or((&Seq::ZERO, &0));
            format!("{} at seq {seq}, digests equal{silent}", agree(*hosts, "host"))
        }
        _ => format!("hosts are at different seqs, as they are while something is written: look again{silent}"),
    }
}

/// The seq at which two hosts believe different things, if there is one (invariant E2).
pub fn disagreement(digest: &StateDigest) -> Option<Seq> {
    let mut seen: BTreeMap<Seq, (&str, &str)> = BTreeMap::new();
    for at in digest.hosts.iter().filter_map(|host| host.digest.as_ref()) {
        let found = (at.digest.as_str(), at.head_hash.as_str());
        if *seen.entry(at.seq).or_insert(found) != found {
            return Some(at.seq);
        }
    }
    None
}
