//! The service manager's ear: `READY=1`, `STOPPING=1`, `STATUS=...` over the datagram socket that systemd names in
//! `NOTIFY_SOCKET`. Without one, words go nowhere and that is fine.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::os::unix::net::UnixDatagram;

pub fn ready(status: &str) {
    send(&format!("READY=1\nSTATUS={status}"));
}

pub fn status(status: &str) {
    send(&format!("STATUS={status}"));
}

pub fn stopping() {
    send("STOPPING=1");
}

fn send(message: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager does not listen");
    }
}
