//! Hosts.

use hostd_api::host::HostView;
use hostd_api::read::Item;
use hostd_api::read::List;
use jiff::Timestamp;

use super::Show;
use super::Table;
use super::fields::distance;
use super::table::memory;
use super::table::or_dash;
use super::table::yes_no;

impl Show for List<HostView> {
    fn table(&self) -> String {
        let mut table = Table::with_header(&[
            "NAME",
            "ID",
            "STATUS",
            "ADDRESS",
            "VMS",
            "VCPUS/THREADS",
            "MEMORY",
            "SPM",
            "VERSION",
        ]);
        for host in &self.items {
            table.row(vec![
                host.name.clone(),
                host.id.to_string(),
                host.status.to_string(),
                host.address.clone(),
                host.usage.vms.to_string(),
                format!("{}/{}", host.usage.vcpus, host.capacity.cpu_threads),
                format!("{} of {}", memory(host.usage.memory_mib), memory(host.capacity.memory_mib)),
                yes_no(host.spm).to_owned(),
                host.version.clone(),
            ]);
        }
        table.render()
    }
}

impl Show for Item<HostView> {
    fn table(&self) -> String {
        host(&self.item, Timestamp::now())
    }
}

fn host(host: &HostView, now: Timestamp) -> String {
    let mut table = Table::bare();
    table.field("name", &host.name);
    table.field("id", host.id);
    table.field("status", host.status);
    table.field("address", &host.address);
    table.field("cluster", &host.cluster_name);
    table.field("guests", format!("{}, {} vCPUs, {}", host.usage.vms, host.usage.vcpus, memory(host.usage.memory_mib)));
    let capacity = &host.capacity;
    table.field("capacity", format!("{} CPU threads, {}", capacity.cpu_threads, memory(capacity.memory_mib)));
    table.field("storage duty", format!("{}, priority {}", yes_no(host.spm), host.spm_priority));
    table.field("failure domain", or_dash(Some(&host.failure_domain).filter(|domain| !domain.is_empty())));
    table.field("boot", host.boot);
    table.field(
        "watchdog",
        match host.watchdog_timeout_ms {
            Some(timeout_ms) => format!("armed, {} s", timeout_ms / 1000),
            None => "none: only power fencing or a person releases its VMs when it is silent".to_owned(),
        },
    );
    table.field(
        "clock",
        match host.clock_runs_while_stopped {
            true => "runs while the host is stopped",
            false => "may stand while the host is stopped, so its silence alone proves nothing",
        },
    );
    table.field("version", format!("{}, feature level {}", host.version, host.feature_level));
    let certificate = host.certificate.as_ref();
    table.field(
        "certificate",
        or_dash(certificate.map(|it| format!("{}, ends {}", it.serial, distance(it.not_after, now)))),
    );
    table.render()
}
