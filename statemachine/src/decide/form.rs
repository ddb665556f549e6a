//! The form of what people type: names, addresses, paths, sizes. Everything is bounded here, so nothing
//! later in the log or on a host meets a length it did not expect.

use std::ops::RangeInclusive;

use crate::rejection::Rejection;
use crate::state::Capacity;
use crate::state::Disk;
use crate::state::DiskFormat;
use crate::state::Nic;
use crate::state::RateLimit;
use crate::state::ReleaseClass;
use crate::state::VmSpec;

const NAME_MAX: usize = 63;
const PATH_MAX: usize = 1024;
/// virtio-blk GET_ID returns 20 bytes.
pub(super) const DISK_ID_MAX: usize = 20;
pub(super) const NOTE_MAX: usize = 256;
pub(super) const DETAIL_MAX: usize = 512;

pub(super) fn invalid(field: &str, why: impl Into<String>) -> Rejection {
    Rejection::Invalid { field: field.to_owned(), why: why.into() }
}

/// Names of hosts and VMs: as a DNS label, dots allowed inside.
pub(super) fn name(field: &str, name: &str) -> Result<(), Rejection> {
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let inner = |c: char| edge(c) || c == '-' || c == '.';
    let good = !name.is_empty()
        && name.len() <= NAME_MAX
        && name.chars().all(inner)
        && name.starts_with(edge)
        && name.ends_with(edge);
    match good {
        true => Ok(()),
        false => Err(invalid(
            field,
            format!("a name has 1 to {NAME_MAX} of a-z, 0-9, - and ., and begins and ends with a letter or digit"),
        )),
    }
}

pub(super) fn text(field: &str, text: &str, max: usize) -> Result<(), Rejection> {
    if text.len() > max {
        return Err(invalid(field, format!("it has {} bytes, at most {max} are allowed", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "it holds a control character"));
    }
    Ok(())
}

pub(super) fn address(address: &str) -> Result<(), Rejection> {
    match address.parse::<std::net::SocketAddr>() {
        Ok(socket) if !socket.ip().is_unspecified() && socket.port() != 0 => Ok(()),
        _ => {
            Err(invalid("address", format!("{address:?} is not an IP address with a port that other hosts can reach")))
        }
    }
}

pub(super) fn capacity(capacity: &Capacity) -> Result<(), Rejection> {
    if capacity.cpu_threads == 0 || capacity.cpu_threads > 4096 {
        return Err(invalid("capacity", "a host has 1 to 4096 CPU threads"));
    }
    if capacity.memory_mib > 64 << 20 {
        return Err(invalid("capacity", "a host has at most 64 TiB of memory"));
    }
    Ok(())
}

pub(super) fn vm_spec(spec: &VmSpec) -> Result<(), Rejection> {
    if spec.vcpus == 0 || spec.vcpus > VmSpec::MAX_VCPUS {
        return Err(invalid("vcpus", format!("{} asked for, 1 to {} are possible", spec.vcpus, VmSpec::MAX_VCPUS)));
    }
    if spec.memory_mib < 16 || spec.memory_mib > VmSpec::MAX_MEMORY_MIB {
        let why = format!("{} MiB asked for, 16 to {} are possible", spec.memory_mib, VmSpec::MAX_MEMORY_MIB);
        return Err(invalid("memory", why));
    }
    if !spec.memory_mib.is_multiple_of(VmSpec::MEMORY_GRANULE_MIB) {
        return Err(invalid("memory", format!("{} MiB is not a multiple of 2 MiB", spec.memory_mib)));
    }
    path("kernel", &spec.kernel)?;
    if let Some(initrd) = &spec.initrd {
        path("initrd", initrd)?;
    }
    text("cmdline", &spec.cmdline, VmSpec::MAX_CMDLINE)?;
    disks(&spec.disks)?;
    nics(&spec.nics)?;
    let slots = spec.disks.len() + spec.nics.len();
    if slots > VmSpec::MAX_DISKS_AND_NICS {
        let most = VmSpec::MAX_DISKS_AND_NICS;
        return Err(invalid("disks", format!("{slots} disks and network cards asked for, together at most {most}")));
    }
    if spec.highly_available && spec.release == Some(ReleaseClass::Operator) {
        return Err(invalid(
            "release",
            "a highly available VM restarts without a person, so its permit cannot wait for an operator",
        ));
    }
    Ok(())
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

fn path(field: &str, path: &str) -> Result<(), Rejection> {
    text(field, path, PATH_MAX)?;
    let climbs = path.split('/').any(|part| part == ".." || part == ".");
    match path.starts_with('/') && !climbs && !path.ends_with('/') {
        true => Ok(()),
        false => Err(invalid(field, format!("{path:?} is not an absolute path without `.` and `..`"))),
    }
}
