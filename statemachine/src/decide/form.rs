//! The form of what people type: names, addresses, paths, sizes. Everything is bounded here, so nothing
//! later in the log or on a host meets a length it did not expect.

use crate::rejection::Rejection;
use crate::state::Capacity;
use crate::state::Nic;
use crate::state::ReleaseClass;
use crate::state::VmSpec;

const NAME_MAX: usize = 63;
const PATH_MAX: usize = 1024;
/// virtio-blk GET_ID returns 20 bytes.
const DISK_ID_MAX: usize = 20;
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
    if spec.disks.len() > VmSpec::MAX_DISKS {
        return Err(invalid("disks", format!("{} asked for, at most {}", spec.disks.len(), VmSpec::MAX_DISKS)));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        if disk.id.len() > DISK_ID_MAX {
            return Err(invalid("disk id", format!("{} is longer than {DISK_ID_MAX} bytes", disk.id)));
        }
        name("disk id", &disk.id)?;
        path("disk path", &disk.path)?;
        let twice = spec.disks[..index].iter().any(|other| other.id == disk.id || other.path == disk.path);
        if twice {
            return Err(invalid("disks", format!("{} is listed twice", disk.id)));
        }
    }
    nics(&spec.nics)?;
    if spec.highly_available && spec.release == Some(ReleaseClass::Operator) {
        return Err(invalid(
            "release",
            "a highly available VM restarts without a person, so its permit cannot wait for an operator",
        ));
    }
    Ok(())
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
