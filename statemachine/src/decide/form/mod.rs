//! The form of what people type: names, addresses, paths, sizes. Everything is bounded here, so nothing
//! later in the log or on a host meets a length it did not expect.

mod spec;

pub(in crate::decide) use spec::migration_policy;
pub(in crate::decide) use spec::slots;
pub(in crate::decide) use spec::vm_spec;

use crate::rejection::Rejection;
use crate::state::Capacity;

const NAME_MAX: usize = 63;
const PATH_MAX: usize = 1024;
/// virtio-blk GET_ID returns 20 bytes.
pub(in crate::decide) const DISK_ID_MAX: usize = 20;
pub(in crate::decide) const NOTE_MAX: usize = 256;
pub(in crate::decide) const DETAIL_MAX: usize = 512;

pub(in crate::decide) fn invalid(field: &str, why: impl Into<String>) -> Rejection {
    Rejection::Invalid { field: field.to_owned(), why: why.into() }
}

/// Names of hosts and VMs: as a DNS label, dots allowed inside.
pub(in crate::decide) fn name(field: &str, name: &str) -> Result<(), Rejection> {
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

pub(in crate::decide) fn text(field: &str, text: &str, max: usize) -> Result<(), Rejection> {
    if text.len() > max {
        return Err(invalid(field, format!("it has {} bytes, at most {max} are allowed", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "it holds a control character"));
    }
    Ok(())
}

pub(in crate::decide) fn address(address: &str) -> Result<(), Rejection> {
    match address.parse::<std::net::SocketAddr>() {
        Ok(socket) if !socket.ip().is_unspecified() && socket.port() != 0 => Ok(()),
        _ => {
            Err(invalid("address", format!("{address:?} is not an IP address with a port that other hosts can reach")))
        }
    }
}

pub(in crate::decide) fn capacity(capacity: &Capacity) -> Result<(), Rejection> {
    if capacity.cpu_threads == 0 || capacity.cpu_threads > 4096 {
        return Err(invalid("capacity", "a host has 1 to 4096 CPU threads"));
    }
    if capacity.memory_mib > 64 << 20 {
        return Err(invalid("capacity", "a host has at most 64 TiB of memory"));
    }
    Ok(())
}

fn path(field: &str, path: &str) -> Result<(), Rejection> {
    text(field, path, PATH_MAX)?;
    let climbs = path.split('/').any(|part| part == ".." || part == ".");
    match path.starts_with('/') && !climbs && !path.ends_with('/') {
        true => Ok(()),
        false => Err(invalid(field, format!("{path:?} is not an absolute path without `.` and `..`"))),
    }
}
