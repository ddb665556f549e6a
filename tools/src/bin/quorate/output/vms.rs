//! Virtual machines.

use std::net::IpAddr;

use hostd_api::read::Item;
use hostd_api::read::List;
use hostd_api::vm::DesiredView;
use hostd_api::vm::ExitView;
use hostd_api::vm::VmView;
use ipnet::IpNet;
use statemachine::state::Disk;
use statemachine::state::GuestFacts;

use super::Show;
use super::Table;
use super::table::memory;
use super::table::or_dash;
use super::table::yes_no;
use super::word;

impl Show for List<VmView> {
    fn table(&self) -> String {
        let mut table =
            Table::with_header(&["NAME", "STATUS", "HOST", "ADDRESS", "VCPUS", "MEMORY", "RUN", "HA", "ID"]);
        let mut vms: Vec<&VmView> = self.items.iter().collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        for vm in vms {
            table.row(vec![
                vm.name.clone(),
                vm.status.to_string(),
                or_dash(vm.host_name.as_ref()),
                or_dash(vm.guest.as_deref().and_then(first_address)),
                vm.spec.vcpus.to_string(),
                memory(vm.spec.memory_mib),
                word(&vm.run_strategy),
                yes_no(vm.spec.highly_available).to_owned(),
                vm.id.to_string(),
            ]);
        }
        table.render()
    }
}

impl Show for Item<VmView> {
    fn table(&self) -> String {
        let vm = &self.item;
        let spec = &vm.spec;
        let mut table = Table::bare();
        table.field("name", &vm.name);
        table.field("id", vm.id);
        table.field("status", vm.status);
        table.field("wanted", format!("{} (run strategy {})", wanted(vm), word(&vm.run_strategy)));
        table.field("host", or_dash(vm.host_name.as_ref()));
        table.field("epoch", or_dash(vm.epoch));
        table.field("seen", or_dash(vm.observed.map(|status| word(&status))));
        table.field("released by", word(&vm.release));
        table.field("highly available", yes_no(spec.highly_available));
        table.field("cluster", &vm.cluster_name);
        let pending = if vm.spec_pending { " (changed: until its next start it runs as it was)" } else { "" };
        table.field("machine", format!("{}{pending}", word(&spec.machine)));
        table.field("vcpus", spec.vcpus);
        table.field("memory", memory(spec.memory_mib));
        table.field("kernel", &spec.kernel);
        table.field("initrd", or_dash(spec.initrd.as_ref()));
        table.field("cmdline", &spec.cmdline);
        for disk in &spec.disks {
            table.field(&format!("disk {}", disk.id), disk_line(disk));
        }
        for nic in &spec.nics {
            table.field(&format!("nic {}", nic.id), format!("{} on {}", nic.mac_of(vm.id), nic.bridge));
        }
        for device in &vm.devices {
            let why = device.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            table.field(&format!("device {}", device.id), format!("{}{why}", device.state.replace('_', " ")));
        }
        if let Some(mib) = vm.memory_target_mib {
            table.field("makes do with", memory(mib));
        }
        if let Some(migration) = &vm.migration {
            let far = migration.progress.map(|it| format!(", round {}, {} MiB sent", it.round, it.sent_bytes >> 20));
            table.field("moves", format!("from {} to {}{}", migration.from, migration.to, far.unwrap_or_default()));
        }
        if let Some(suspension) = &vm.suspension {
            let file = suspension.bytes.map(|bytes| format!(", a file of {} MiB", bytes >> 20)).unwrap_or_default();
            table.field("sleeps", format!("on host {}{file}", suspension.host_name));
        }
        if let Some(fault) = &vm.disk_fault {
            let cause = if fault.no_space { "no space left" } else { "an error" };
            table.field("stands still", format!("{cause} on disk {}: {}", fault.disk, fault.what));
        }
        if let Some(guest) = &vm.guest {
            show_guest(&mut table, guest);
        }
        if let Some(exit) = &vm.last_exit {
            table.field("last exit", exit_line(exit));
        }
        table.render()
    }
}

/// What the guest's agent says, marked as the guest's own word.
fn show_guest(table: &mut Table, guest: &GuestFacts) {
    table.field("guest name", or_dash(guest.hostname.as_ref()));
    if let Some(os) = &guest.os {
        let name = os.pretty_name.as_ref().or(os.id.as_ref());
        let kernel = os.kernel.as_ref().map(|kernel| format!(" (kernel {kernel})")).unwrap_or_default();
        table.field("guest os", format!("{}{kernel}", or_dash(name)));
    }
    for interface in &guest.interfaces {
        let addresses: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
        let addresses = if addresses.is_empty() { "-".to_owned() } else { addresses.join(", ") };
        table.field(&format!("guest {}", interface.name), addresses);
    }
    for filesystem in &guest.filesystems {
        let size = filesystem.total_bytes.map(|bytes| format!(", {} MiB", bytes >> 20)).unwrap_or_default();
        table.field(&format!("guest {}", filesystem.mountpoint), format!("{}{size}", filesystem.kind));
    }
}

/// Where others most likely reach it: IPv4 before IPv6, link-local ones never.
fn first_address(guest: &GuestFacts) -> Option<IpAddr> {
    let all = guest.interfaces.iter().flat_map(|interface| &interface.addresses).map(IpNet::addr);
    let reachable = all.filter(|address| match address {
        IpAddr::V4(address) => !address.is_link_local(),
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    });
    reachable.min_by_key(IpAddr::is_ipv6)
}

/// How it is stopped matters only while it is being stopped.
fn wanted(vm: &VmView) -> String {
    match (vm.desired, vm.epoch) {
        (DesiredView::Running, _) => "running".to_owned(),
        (_, None) => "stopped".to_owned(),
        (mode, Some(_)) => format!("stopped, by {}", word(&mode)),
    }
}

fn disk_line(disk: &Disk) -> String {
    let read_only = if disk.read_only { ", read only" } else { "" };
    let shareable = if disk.shareable { ", shareable" } else { "" };
    let mut line =
        format!("{} ({}){read_only}{shareable}, on error {}", disk.path, word(&disk.format), word(&disk.on_error));
    for image in &disk.backing {
        line.push_str(&format!(", over {} ({})", image.path, word(&image.format)));
    }
    if let Some(limit) = &disk.rate_limit {
        let most = |text: &mut String, rate: Option<u64>, unit| {
            if let Some(rate) = rate {
                text.push_str(&format!(", at most {rate} {unit}/s"));
            }
        };
        most(&mut line, limit.iops, "requests");
        most(&mut line, limit.bytes_per_second, "bytes");
    }
    line
}

/// `guest_powered_off on host 3 at seq 41: detail`.
pub fn exit_line(exit: &ExitView) -> String {
    let detail = if exit.detail.is_empty() { String::new() } else { format!(": {}", exit.detail) };
    format!("{} on host {} at seq {}{detail}", word(&exit.reason), exit.host, exit.at)
}
