//! The form of a VM's definition.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::DISK_ID_MAX;
use super::invalid;
use super::name;
use super::path;
use super::text;
use crate::rejection::Rejection;
use crate::state::Cpu;
use crate::state::Disk;
use crate::state::DiskFormat;
use crate::state::FirstBoot;
use crate::state::FirstUser;
use crate::state::MigrationPolicy;
use crate::state::Nic;
use crate::state::RateLimit;
use crate::state::ReleaseClass;
use crate::state::Topology;
use crate::state::VmSpec;

pub(in crate::decide) fn vm_spec(spec: &VmSpec) -> Result<(), Rejection> {
    if spec.vcpus == 0 || spec.vcpus > VmSpec::MAX_VCPUS {
        return Err(invalid("vcpus", format!("{} asked for, 1 to {} are possible", spec.vcpus, VmSpec::MAX_VCPUS)));
    }
    memory(spec)?;
    path("kernel", &spec.kernel)?;
    if let Some(initrd) = &spec.initrd {
        path("initrd", initrd)?;
    }
    text("cmdline", &spec.cmdline, VmSpec::MAX_CMDLINE)?;
    disks(&spec.disks)?;
    nics(&spec.nics)?;
    slots(spec)?;
    cpu(spec)?;
    migration_policy(&spec.migration)?;
    if let Some(first_boot) = &spec.first_boot {
        self::first_boot(first_boot, &spec.nics)?;
    }
    if spec.highly_available && spec.release == Some(ReleaseClass::Operator) {
        return Err(invalid(
            "release",
            "a highly available VM restarts without a person, so its permit cannot wait for an operator",
        ));
    }
    Ok(())
}

fn memory(spec: &VmSpec) -> Result<(), Rejection> {
    let (least, most, page) = (VmSpec::MIN_MEMORY_MIB, VmSpec::MAX_MEMORY_MIB, spec.pages.mib());
    if !(least..=most).contains(&spec.memory_mib) {
        return Err(invalid("memory", format!("{} MiB asked for, {least} to {most} are possible", spec.memory_mib)));
    }
    match spec.memory_mib.is_multiple_of(page) {
        true => Ok(()),
        false => Err(invalid("memory", format!("{} MiB is not a multiple of {page} MiB", spec.memory_mib))),
    }
}

fn cpu(spec: &VmSpec) -> Result<(), Rejection> {
    let Cpu { topology, weight, cap_percent, .. } = spec.cpu;
    if let Some(topology) = topology
        && topology.vcpus() != Some(spec.vcpus)
    {
        let Topology { sockets, cores, threads } = topology;
        let why = format!("{sockets} sockets of {cores} cores of {threads} threads are not {} vCPUs", spec.vcpus);
        return Err(invalid("cpu topology", why));
    }
    if let Some(weight) = weight.filter(|weight| !(1..=Cpu::MAX_WEIGHT).contains(weight)) {
        return Err(invalid("cpu weight", format!("{weight} asked for, 1 to {} are possible", Cpu::MAX_WEIGHT)));
    }
    let bounds = Cpu::MIN_CAP_PERCENT..=VmSpec::MAX_VCPUS * 100;
    match cap_percent.filter(|cap| !bounds.contains(cap)) {
        Some(cap) => {
            let (least, most) = (bounds.start(), bounds.end());
            Err(invalid("cpu cap", format!("{cap} % asked for, {least} to {most} % of a CPU thread are possible")))
        }
        None => Ok(()),
    }
}

/// Ids, and slots that are said, once each; and as many slots as there are.
pub(in crate::decide) fn slots(spec: &VmSpec) -> Result<(), Rejection> {
    let mut ids = BTreeSet::new();
    if let Some(twice) = spec.device_ids().find(|id| !ids.insert(*id)) {
        return Err(invalid("devices", format!("a disk and a network card are both called {twice}")));
    }
    let mut taken: BTreeSet<u8> = spec.first_boot.iter().map(|_| FirstBoot::SLOT).collect();
    let said = spec.disks.iter().filter_map(|disk| disk.slot).chain(spec.nics.iter().filter_map(|nic| nic.slot));
    for slot in said {
        if !(1..=VmSpec::SLOTS).contains(&slot) || !taken.insert(slot) {
            let why = format!("{slot} is taken already, or not one of 1 to {}", VmSpec::SLOTS);
            return Err(invalid("slot", why));
        }
    }
    let most = usize::from(VmSpec::SLOTS) - usize::from(spec.first_boot.is_some());
    match ids.len() > most {
        true => {
            let why = format!("{} disks and network cards asked for, together at most {most}", ids.len());
            Err(invalid("disks", why))
        }
        false => Ok(()),
    }
}

pub(in crate::decide) fn migration_policy(policy: &MigrationPolicy) -> Result<(), Rejection> {
    let within = |field: &str, value: Option<u32>, most: u32| match value.filter(|value| !(1..=most).contains(value)) {
        Some(value) => Err(invalid(field, format!("{value} asked for, 1 to {most} are possible"))),
        None => Ok(()),
    };
    within("migration downtime", policy.downtime_ms, MigrationPolicy::MAX_DOWNTIME_MS)?;
    within("migration bandwidth", policy.mib_per_second, MigrationPolicy::MAX_MIB_PER_SECOND)?;
    within("migration time", policy.seconds_per_gib, MigrationPolicy::MAX_SECONDS_PER_GIB)
}

/// The seed's own rules are checked again where it is built; here is what the log and its readers have to bear.
fn first_boot(first_boot: &FirstBoot, nics: &[Nic]) -> Result<(), Rejection> {
    let FirstBoot { host_name, user, interfaces, dns, user_data } = first_boot;
    name("host name", host_name)?;
    if let Some(FirstUser { name, ssh_keys }) = user {
        user_name(name)?;
        if ssh_keys.len() > FirstBoot::MAX_KEYS {
            return Err(invalid("ssh keys", format!("{} given, at most {}", ssh_keys.len(), FirstBoot::MAX_KEYS)));
        }
        ssh_keys.iter().try_for_each(|key| ssh_key(key))?;
        if ssh_keys.is_empty() && user_data.is_none() {
            return Err(invalid("ssh keys", format!("nobody could log in as {name}: give a key, or user data")));
        }
    }
    for (index, interface) in interfaces.iter().enumerate() {
        if !nics.iter().any(|nic| nic.id == interface.nic) {
            return Err(invalid("address", format!("there is no network card {}", interface.nic)));
        }
        if interfaces[..index].iter().any(|other| other.nic == interface.nic) {
            return Err(invalid("address", format!("the network card {} is listed twice", interface.nic)));
        }
        if interface.addresses.len() > FirstBoot::MAX_ADDRESSES {
            let most = FirstBoot::MAX_ADDRESSES;
            return Err(invalid("address", format!("{} has more than {most} addresses", interface.nic)));
        }
        interface.addresses.iter().try_for_each(|address| cidr(address))?;
        interface.gateway.iter().try_for_each(|gateway| ip("gateway", gateway))?;
    }
    if dns.len() > FirstBoot::MAX_DNS {
        return Err(invalid("dns", format!("{} given, at most {}", dns.len(), FirstBoot::MAX_DNS)));
    }
    dns.iter().try_for_each(|server| ip("dns", server))?;
    match user_data.as_ref().map(String::len).filter(|bytes| *bytes > FirstBoot::MAX_USER_DATA_BYTES) {
        Some(bytes) => {
            let most = FirstBoot::MAX_USER_DATA_BYTES;
            Err(invalid("user data", format!("it has {bytes} bytes, at most {most} are allowed")))
        }
        None => Ok(()),
    }
}

/// As `useradd` takes it.
fn user_name(name: &str) -> Result<(), Rejection> {
    let first = |c: char| c.is_ascii_lowercase() || c == '_';
    let inner = |c: char| first(c) || c.is_ascii_digit() || c == '-';
    match (1..=32).contains(&name.len()) && name.starts_with(first) && name.chars().all(inner) {
        true => Ok(()),
        false => {
            let why = format!("{name:?} is no name of a user: 1 to 32 of a-z, 0-9, - and _, the first a letter or _");
            Err(invalid("user", why))
        }
    }
}

fn ssh_key(key: &str) -> Result<(), Rejection> {
    text("ssh key", key, FirstBoot::MAX_KEY_BYTES)?;
    let kinds = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-"];
    let mut words = key.split(' ');
    let kind = words.next().is_some_and(|kind| kinds.iter().any(|known| kind.starts_with(known)));
    match kind && words.next().is_some_and(|body| body.len() > 16) {
        true => Ok(()),
        false => Err(invalid("ssh key", "it is no line of authorized_keys, as `ssh-ed25519 AAAA... name`")),
    }
}

fn ip(field: &str, ip: &str) -> Result<(), Rejection> {
    match ip.parse::<IpAddr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(field, format!("{ip:?} is not an IP address"))),
    }
}

fn cidr(address: &str) -> Result<(), Rejection> {
    let parsed = address.split_once('/').and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse::<u8>().ok()?)));
    match parsed {
        Some((IpAddr::V4(_), ..=32) | (IpAddr::V6(_), ..=128)) => Ok(()),
        _ => Err(invalid(
            "address",
            format!("{address:?} is not an address with the length of its prefix, as 192.0.2.5/24"),
        )),
    }
}

fn disks(disks: &[Disk]) -> Result<(), Rejection> {
    if disks.len() > VmSpec::MAX_DISKS {
        return Err(invalid("disks", format!("{} asked for, at most {}", disks.len(), VmSpec::MAX_DISKS)));
    }
    for (index, disk) in disks.iter().enumerate() {
        if disk.id.len() > DISK_ID_MAX {
            return Err(invalid("disk id", format!("{} is longer than {DISK_ID_MAX} bytes", disk.id)));
        }
        name("disk id", &disk.id)?;
        path("disk path", &disk.path)?;
        image(disk)?;
        disk.rate_limit.as_ref().map_or(Ok(()), rate_limit)?;
        let clashes = |other: &Disk| disk.volumes().any(|volume| other.volumes().any(|held| held.clashes(&volume)));
        let before = &disks[..index];
        if before.iter().any(|other| other.id == disk.id || other.path == disk.path || clashes(other)) {
            return Err(invalid("disks", format!("{} is listed twice, or writes what another reads", disk.id)));
        }
    }
    Ok(())
}

/// The chain of images that a disk consists of.
fn image(disk: &Disk) -> Result<(), Rejection> {
    if disk.format == DiskFormat::Qcow2 && disk.shareable && !disk.read_only {
        return Err(invalid("disk format", format!("{}: two VMs cannot write one qcow2 image; use raw", disk.id)));
    }
    if disk.backing.len() > Disk::MAX_BACKING {
        let (count, most) = (disk.backing.len(), Disk::MAX_BACKING);
        return Err(invalid("disk backing", format!("{}: {count} images, at most {most}", disk.id)));
    }
    let mut above = disk.format;
    for (index, backing) in disk.backing.iter().enumerate() {
        path("disk backing", &backing.path)?;
        if above == DiskFormat::Raw {
            return Err(invalid("disk backing", format!("{}: nothing is ever under a raw image", disk.id)));
        }
        above = backing.format;
        if backing.path == disk.path || disk.backing[..index].iter().any(|other| other.path == backing.path) {
            return Err(invalid("disk backing", format!("{} is in the chain of {} twice", backing.path, disk.id)));
        }
    }
    Ok(())
}

fn rate_limit(limit: &RateLimit) -> Result<(), Rejection> {
    let RateLimit { iops, bytes_per_second, burst_iops, burst_bytes } = *limit;
    rate("iops", iops, 1..=RateLimit::MAX_IOPS, burst_iops)?;
    let bounds = RateLimit::MIN_BYTES_PER_SECOND..=RateLimit::MAX_BYTES_PER_SECOND;
    rate("bytes_per_second", bytes_per_second, bounds, burst_bytes)
}

fn rate(name: &str, rate: Option<u64>, bounds: RangeInclusive<u64>, burst: Option<u64>) -> Result<(), Rejection> {
    let refused = |why: String| Err(invalid("disk rate_limit", why));
    let Some(rate) = rate else {
        return match burst {
            Some(_) => refused(format!("a burst is nothing without {name}")),
            None => Ok(()),
        };
    };
    if !bounds.contains(&rate) {
        return refused(format!("{name} is {rate}, {} to {} are possible", bounds.start(), bounds.end()));
    }
    let least = (rate / RateLimit::MIN_BURST_OF_RATE).max(1);
    match burst {
        Some(burst) if !(least..=*bounds.end()).contains(&burst) => {
            refused(format!("a burst of {burst} for {name} {rate}, {least} to {} are possible", bounds.end()))
        }
        _ => Ok(()),
    }
}

fn nics(nics: &[Nic]) -> Result<(), Rejection> {
    if nics.len() > VmSpec::MAX_NICS {
        return Err(invalid("nics", format!("{} asked for, at most {}", nics.len(), VmSpec::MAX_NICS)));
    }
    for (index, nic) in nics.iter().enumerate() {
        name("nic id", &nic.id)?;
        bridge(&nic.bridge)?;
        if let Some(mac) = nic.mac
            && (mac.is_zero() || !mac.is_unicast())
        {
            return Err(invalid("nic mac", format!("{mac} is not the address of one card")));
        }
        let before = &nics[..index];
        if before.iter().any(|other| other.id == nic.id || nic.mac.is_some() && other.mac == nic.mac) {
            return Err(invalid("nics", format!("the id or the address of {} is listed twice", nic.id)));
        }
    }
    Ok(())
}

/// As Linux takes the name of an interface, without what a shell or a path would read otherwise.
fn bridge(bridge: &str) -> Result<(), Rejection> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = (1..=Nic::MAX_BRIDGE_NAME).contains(&bridge.len())
        && bridge.chars().all(fits)
        && bridge.starts_with(|c: char| c.is_ascii_alphanumeric());
    match good {
        true => Ok(()),
        false => Err(invalid(
            "nic bridge",
            format!("{bridge:?} is no name of a bridge: 1 to {} of letters, digits, -, _ and .", Nic::MAX_BRIDGE_NAME),
        )),
    }
}
