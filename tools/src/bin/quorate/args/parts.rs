//! Parts of a VM's definition that have several values: its processor, its first boot, how it may be moved.

use std::path::PathBuf;

use clap::Args;
use hostd_api::spec::CpuBody;
use hostd_api::spec::FirstBootBody;
use hostd_api::spec::FirstUserBody;
use hostd_api::spec::InterfaceBody;
use hostd_api::spec::MigrationPolicyBody;
use hostd_api::spec::TopologyBody;
use statemachine::state::CpuModel;

/// The virtual processor.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Processor")]
pub struct CpuArgs {
    /// What of a processor the guest sees: cluster, host, x86-64-v2, x86-64-v3 [default: cluster]
    ///
    /// `cluster` is what the hosts of the cluster have in common, settled when the guest starts: all of it where they are alike, or else the
    /// highest named model that all can run. A guest moves only between hosts that can be its model; with `host`, between equal ones.
    #[arg(long, value_name = "MODEL", value_parser = parse_model)]
    pub cpu: Option<CpuModel>,
    /// SOCKETSxCORESxTHREADS, as 1x2x2; together the vCPUs [default: one socket, a core a vCPU]
    #[arg(long, value_name = "SxCxT", value_parser = parse_topology)]
    pub topology: Option<TopologyBody>,
    /// Its part of a busy host's processors beside other guests, 1 to 10000 [default: 100]
    #[arg(long, value_name = "N")]
    pub cpu_weight: Option<u32>,
    /// At most so much, in percent of one CPU thread
    #[arg(long, value_name = "PERCENT")]
    pub cpu_cap: Option<u32>,
}

impl CpuArgs {
    pub fn is_given(&self) -> bool {
        *self != CpuArgs::default()
    }

    pub fn apply(self, cpu: &mut Option<CpuBody>) {
        if !self.is_given() {
            return;
        }
        let cpu = cpu.get_or_insert_default();
        cpu.model = self.cpu.unwrap_or(cpu.model);
        cpu.topology = self.topology.or(cpu.topology);
        cpu.weight = self.cpu_weight.or(cpu.weight);
        cpu.cap_percent = self.cpu_cap.or(cpu.cap_percent);
    }
}

fn parse_model(text: &str) -> Result<CpuModel, String> {
    let models = [CpuModel::Cluster, CpuModel::Host, CpuModel::V2, CpuModel::V3];
    let known = models.into_iter().find(|model| model.name() == text);
    known.ok_or_else(|| format!("{text:?} is no model; there are {}", models.map(CpuModel::name).join(", ")))
}

fn parse_topology(text: &str) -> Result<TopologyBody, String> {
    let numbers: Option<Vec<u32>> = text.split('x').map(|number| number.parse().ok()).collect();
    match numbers.as_deref() {
        Some([sockets, cores, threads]) => Ok(TopologyBody { sockets: *sockets, cores: *cores, threads: *threads }),
        _ => Err(format!("{text:?} is not SOCKETSxCORESxTHREADS, as 1x2x2")),
    }
}

/// What cloud-init in the guest is told, once.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "First boot (cloud-init)")]
pub struct FirstBootArgs {
    /// The guest's host name; the VM's own name when only other parts are given
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
    /// A user who may do everything and logs in by key
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// A line of authorized_keys for --user; once for each
    #[arg(long, value_name = "KEY", requires = "user")]
    pub ssh_key: Vec<String>,
    /// An address of a network card: NIC=ADDRESS/PREFIX, or NIC=dhcp; once for each
    #[arg(long, value_name = "NIC=ADDRESS", value_parser = parse_pair)]
    pub address: Vec<(String, String)>,
    /// The gateway behind a network card: NIC=ADDRESS
    #[arg(long, value_name = "NIC=ADDRESS", value_parser = parse_pair)]
    pub gateway: Vec<(String, String)>,
    /// A name server; once for each
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<String>,
    /// A file of your own: #cloud-config, a script, or MIME parts
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
}

impl FirstBootArgs {
    pub fn is_given(&self) -> bool {
        *self != FirstBootArgs::default()
    }

    /// `vm`: the name that the host name follows. `user_data`: what the file holds.
    pub fn apply(self, vm: &str, user_data: Option<String>, first_boot: &mut Option<FirstBootBody>) {
        if !self.is_given() {
            return;
        }
        let boot = first_boot.get_or_insert_default();
        if let Some(name) = self.host_name {
            boot.host_name = name;
        }
        if boot.host_name.is_empty() {
            vm.clone_into(&mut boot.host_name);
        }
        if let Some(name) = self.user {
            boot.user = Some(FirstUserBody { name, ssh_keys: self.ssh_key });
        }
        if !self.address.is_empty() {
            boot.interfaces.clear();
        }
        for (nic, address) in self.address {
            let interface = interface_of(&mut boot.interfaces, nic);
            if address != "dhcp" {
                interface.addresses.push(address);
            }
        }
        for (nic, gateway) in self.gateway {
            interface_of(&mut boot.interfaces, nic).gateway = Some(gateway);
        }
        if !self.dns.is_empty() {
            boot.dns = self.dns;
        }
        if user_data.is_some() {
            boot.user_data = user_data;
        }
    }
}

fn interface_of(interfaces: &mut Vec<InterfaceBody>, nic: String) -> &mut InterfaceBody {
    let at = interfaces.iter().position(|interface| interface.nic == nic).unwrap_or(interfaces.len());
    if at == interfaces.len() {
        interfaces.push(InterfaceBody { nic, addresses: Vec::new(), gateway: None });
    }
    &mut interfaces[at]
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(nic, value)| !nic.is_empty() && !value.is_empty());
    let (nic, value) = pair.ok_or_else(|| format!("{text:?} names no network card; write NIC=ADDRESS"))?;
    Ok((nic.to_owned(), value.to_owned()))
}

/// How guests may be moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Args)]
#[command(next_help_heading = "Migration")]
pub struct MigrationArgs {
    /// The cluster may move it by itself, as from a host that goes into maintenance [default: true]
    #[arg(long, value_name = "BOOL")]
    pub migrate_automatically: Option<bool>,
    /// It may stand for so many milliseconds while the last of its memory is sent [default: 300]
    #[arg(long, value_name = "MS")]
    pub migrate_downtime: Option<u32>,
    /// At most so many MiB a second
    #[arg(long, value_name = "MIB")]
    pub migrate_bandwidth: Option<u32>,
    /// Given up after so many seconds for each GiB of memory [default: 800]
    #[arg(long, value_name = "SECONDS")]
    pub migrate_timeout: Option<u32>,
}

impl MigrationArgs {
    pub fn is_given(&self) -> bool {
        *self != MigrationArgs::default()
    }

    pub fn apply(self, policy: &mut Option<MigrationPolicyBody>) {
        if !self.is_given() {
            return;
        }
        let policy = policy.get_or_insert_default();
        policy.automatic = self.migrate_automatically.or(policy.automatic);
        policy.downtime_ms = self.migrate_downtime.or(policy.downtime_ms);
        policy.mib_per_second = self.migrate_bandwidth.or(policy.mib_per_second);
        policy.seconds_per_gib = self.migrate_timeout.or(policy.seconds_per_gib);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topology_has_three_numbers() {
        assert_eq!(parse_topology("2x4x1"), Ok(TopologyBody { sockets: 2, cores: 4, threads: 1 }));
        for wrong in ["", "2x4", "2x4x1x1", "2xax1", "-1x2x3"] {
            assert!(parse_topology(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_model("x86-64-v3"), Ok(CpuModel::V3));
        assert!(parse_model("v3").unwrap_err().contains("x86-64-v2"));
    }

    #[test]
    fn parts_that_are_given_go_over_those_that_are_there() {
        let mut cpu = Some(CpuBody { weight: Some(7), ..CpuBody::default() });
        CpuArgs::default().apply(&mut cpu);
        CpuArgs { cpu: Some(CpuModel::Host), cpu_cap: Some(50), ..CpuArgs::default() }.apply(&mut cpu);
        let expected = CpuBody { model: CpuModel::Host, weight: Some(7), cap_percent: Some(50), topology: None };
        assert_eq!(cpu, Some(expected));
        let mut none = None;
        CpuArgs::default().apply(&mut none);
        assert_eq!(none, None);
    }

    #[test]
    fn a_first_boot_has_the_vms_name_and_each_cards_addresses() {
        let pair = |text: &str| parse_pair(text).unwrap();
        let args = FirstBootArgs {
            user: Some("me".to_owned()),
            ssh_key: vec!["ssh-ed25519 AAAA".to_owned()],
            address: vec![pair("lan=192.0.2.5/24"), pair("wan=dhcp"), pair("lan=2001:db8::5/64")],
            gateway: vec![pair("lan=192.0.2.1")],
            ..FirstBootArgs::default()
        };
        let mut boot = None;
        args.apply("web1", Some("#!/bin/sh".to_owned()), &mut boot);
        let boot = boot.unwrap();
        assert_eq!((boot.host_name.as_str(), boot.user_data.as_deref()), ("web1", Some("#!/bin/sh")));
        assert_eq!(boot.interfaces.len(), 2);
        assert_eq!(boot.interfaces[0].addresses, ["192.0.2.5/24", "2001:db8::5/64"]);
        assert_eq!((boot.interfaces[0].gateway.as_deref(), boot.interfaces[1].addresses.len()), (Some("192.0.2.1"), 0));
        assert!(parse_pair("192.0.2.5/24").is_err());
    }
}
