//! A tap of the kernel for a test.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A tap in a network of this thread's own, which a child inherits.
pub fn tap() -> OwnedFd {
    let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(io::Error::from).and_then(|()| {
        let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: all zeros are a valid ifreq: a name of the kernel's choice.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads and writes one ifreq.
        check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
        inherited(tun.into())
    });
    made.expect("a tap in a network namespace of one's own: root, and /dev/net/tun")
}

/// Stays open in a child.
pub fn inherited(fd: OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(fd)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
