//! The host's end of the cable: a tap that hostd opened, attached to its bridge, and handed over as a descriptor.
//!
//! The vmm needs no right over the host's network for it: attaching a descriptor to a tap takes one, using it takes none. What hostd
//! hands over is checked before anything depends on it, so that a mistake has a name.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::str::FromStr;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_control::NicConfig;

use super::config::Offloads;
use super::header::HEADER_BYTES;
use crate::sys;

/// Descriptors that every process has: a tap is none of them.
const STANDARD_DESCRIPTORS: RawFd = 3;

/// Why the taps that were handed over cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("{text:?} is not of the form ID=FD, with FD a descriptor above 2")]
    Form { text: String },
    #[error("network card {nic}: no tap was handed over; start the vmm with --tap-fd {nic}=FD")]
    NotHandedOver { nic: String },
    #[error("--tap-fd {nic}={fd}: this VM has no network card {nic}")]
    NoSuchNic { nic: String, fd: RawFd },
    #[error("--tap-fd {nic}={fd}: the network card has a tap already")]
    SecondTap { nic: String, fd: RawFd },
    #[error("--tap-fd {nic}={fd}: the descriptor was handed over for something else too")]
    SharedDescriptor { nic: String, fd: RawFd },
    #[error("--tap-fd {nic}={fd}: the descriptor is not open")]
    NotOpen {
        nic: String,
        fd: RawFd,
        #[source]
        source: io::Error,
    },
    #[error("network card {nic}: what was handed over is not attached to a tap")]
    NotATap {
        nic: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "network card {nic}: {interface} cannot be used, because {why}; open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    WrongMode { nic: String, interface: String, why: &'static str },
    #[error("network card {nic}: {interface} does not take the settings of a virtio card")]
    Settings {
        nic: String,
        interface: String,
        #[source]
        source: io::Error,
    },
    #[error("network card {nic}: cannot duplicate its tap's descriptor")]
    Duplicate {
        nic: String,
        #[source]
        source: io::Error,
    },
}

/// Where frames come from and go to. Every frame has virtio's header before it, both ways. Owned by the card's thread; no
/// method but [`set_offloads`](Self::set_offloads) waits.
pub trait Tap: Send {
    /// Reads one frame. What does not fit is lost, and the result is as long as the buffers are. `WouldBlock` when there is none.
    ///
    /// # Safety
    /// The memory of the buffers is mapped and may be written to.
    unsafe fn read_frame(&self, buffers: &[libc::iovec]) -> io::Result<usize>;

    /// Writes one frame. `WouldBlock` when there is no room for it now.
    ///
    /// # Safety
    /// The memory of the buffers is mapped.
    unsafe fn write_frame(&self, buffers: &[libc::iovec]) -> io::Result<()>;

    /// What frames to the guest may leave to it. May wait for other changes of the host's network.
    fn set_offloads(&self, to_guest: Offloads) -> io::Result<()>;

    /// To wait for.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// A list for one call: addresses in guest memory, which the queue keeps mapped, or of the device's own.
#[derive(Default)]
pub(super) struct HostBuffers(pub(super) Vec<libc::iovec>);

// SAFETY: plain addresses of memory that is not bound to a thread.
unsafe impl Send for HostBuffers {}

/// `--tap-fd ID=FD`: the descriptor of one card's tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapFd {
    pub nic: String,
    pub fd: RawFd,
}

impl FromStr for TapFd {
    type Err = TapError;

    fn from_str(text: &str) -> Result<Self, TapError> {
        let wrong = || TapError::Form { text: text.to_owned() };
        let (nic, fd) = text.split_once('=').ok_or_else(wrong)?;
        let fd = fd.parse().ok().filter(|fd| *fd >= STANDARD_DESCRIPTORS).ok_or_else(wrong)?;
        if nic.is_empty() { Err(wrong()) } else { Ok(Self { nic: nic.to_owned(), fd }) }
    }
}

/// Takes over the taps of all cards, in the order of the cards. `taken` is the other descriptor that hostd hands over.
pub fn adopt_all(nics: &[NicConfig], handed: &[TapFd], taken: Option<RawFd>) -> Result<Vec<KernelTap>, TapError> {
    let mut descriptors: BTreeSet<RawFd> = taken.into_iter().collect();
    let mut served = BTreeSet::new();
    // All numbers are judged before one is taken over: owning a descriptor twice would close it under its other owner.
    for TapFd { nic, fd } in handed {
        let (name, fd) = (|| nic.clone(), *fd);
        if !nics.iter().any(|known| known.id == *nic) {
            return Err(TapError::NoSuchNic { nic: name(), fd });
        }
        if !served.insert(nic) {
            return Err(TapError::SecondTap { nic: name(), fd });
        }
        if !descriptors.insert(fd) {
            return Err(TapError::SharedDescriptor { nic: name(), fd });
        }
    }
    nics.iter()
        .map(|nic| {
            let given = handed.iter().find(|given| given.nic == nic.id);
            let TapFd { nic, fd } = given.ok_or_else(|| TapError::NotHandedOver { nic: nic.id.clone() })?;
            let owned =
                sys::inherit_fd(*fd).map_err(|source| TapError::NotOpen { nic: nic.clone(), fd: *fd, source })?;
            KernelTap::adopt(nic, owned)
        })
        .collect()
}

/// A tap of the host's kernel.
#[derive(Debug)]
pub struct KernelTap {
    fd: OwnedFd,
    nic: String,
    interface: String,
}

impl KernelTap {
    /// Makes sure that it is a tap in the mode that a virtio card needs, as far as the kernel tells: of IFF_NO_PI it says that
    /// it is set, whether it is or not.
    pub fn adopt(nic: &str, fd: OwnedFd) -> Result<Self, TapError> {
        let (interface, flags) =
            attached_interface(&fd).map_err(|source| TapError::NotATap { nic: nic.to_owned(), source })?;
        let why = if flags & libc::IFF_TAP == 0 {
            Some("it is a tun and carries no Ethernet frames")
        } else if flags & libc::IFF_VNET_HDR == 0 {
            Some("its frames come without a virtio header")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(TapError::WrongMode { nic: nic.to_owned(), interface, why });
        }
        let tap = Self { fd, nic: nic.to_owned(), interface };
        tap.set_up().map_err(|source| TapError::Settings {
            nic: tap.nic.clone(),
            interface: tap.interface.clone(),
            source,
        })?;
        Ok(tap)
    }

    fn set_up(&self) -> io::Result<()> {
        fcntl_setfl(&self.fd, fcntl_getfl(&self.fd)? | OFlags::NONBLOCK)?;
        let header_bytes = HEADER_BYTES as c_int;
        // SAFETY: the kernel reads one int.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &header_bytes) })?;
        self.set_offloads(Offloads::NONE)
    }

    /// The same tap, for the next machine of this process.
    pub fn try_clone(&self) -> Result<Self, TapError> {
        let fd = self.fd.try_clone().map_err(|source| TapError::Duplicate { nic: self.nic.clone(), source })?;
        Ok(Self { fd, nic: self.nic.clone(), interface: self.interface.clone() })
    }

    /// Name of the host's interface, as it was when the tap was handed over.
    pub fn interface(&self) -> &str {
        &self.interface
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The interface that a descriptor of /dev/net/tun is attached to, and its mode.
fn attached_interface(fd: &OwnedFd) -> io::Result<(String, c_int)> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    let name: [u8; libc::IFNAMSIZ] = request.ifr_name.map(|c: c_char| c as u8);
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default();
    // SAFETY: TUNGETIFF fills the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // The type is signed and the highest of the flags is its sign.
    Ok((name.into_owned(), c_int::from(flags as u16)))
}

impl Tap for KernelTap {
    unsafe fn read_frame(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: our caller's promise.
        unsafe { read_message(self.fd.as_fd(), buffers) }
    }

    unsafe fn write_frame(&self, buffers: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: our caller's promise.
        unsafe { write_message(self.fd.as_fd(), buffers) }
    }

    fn set_offloads(&self, to_guest: Offloads) -> io::Result<()> {
        let flags: c_uint = [
            (to_guest.checksum, libc::TUN_F_CSUM),
            (to_guest.tso4, libc::TUN_F_TSO4),
            (to_guest.tso6, libc::TUN_F_TSO6),
            (to_guest.ecn, libc::TUN_F_TSO_ECN),
        ]
        .into_iter()
        .filter_map(|(wanted, flag)| wanted.then_some(flag))
        .sum();
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One message of a descriptor that keeps messages apart.
///
/// # Safety
/// As for [`Tap::read_frame`].
pub(super) unsafe fn read_message(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: our caller's promise.
    let got = unsafe { libc::readv(fd.as_raw_fd(), buffers.as_ptr(), buffers.len() as c_int) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// # Safety
/// As for [`Tap::write_frame`].
pub(super) unsafe fn write_message(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<()> {
    // SAFETY: our caller's promise.
    let put = unsafe { libc::writev(fd.as_raw_fd(), buffers.as_ptr(), buffers.len() as c_int) };
    if put < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use pnet_base::MacAddr;

    use super::*;

    fn nics(ids: &[&str]) -> Vec<NicConfig> {
        let mac = MacAddr::new(2, 0, 0, 0, 0, 1);
        ids.iter().map(|id| NicConfig { id: (*id).to_owned(), mac, mtu: 1500, slot: None }).collect()
    }

    fn tap_fd(nic: &str, fd: RawFd) -> TapFd {
        TapFd { nic: nic.to_owned(), fd }
    }

    #[test]
    fn the_argument_names_a_card_and_a_descriptor() {
        assert_eq!("lan=7".parse::<TapFd>().unwrap(), tap_fd("lan", 7));
        for wrong in ["lan", "lan=", "=7", "lan=seven", "lan=-1", "lan=2", "lan=99999999999"] {
            assert!(matches!(wrong.parse::<TapFd>(), Err(TapError::Form { .. })), "{wrong}");
        }
    }

    #[test]
    fn each_card_has_one_tap_and_each_tap_a_card() {
        let refused = |ids: &[&str], handed: &[TapFd]| adopt_all(&nics(ids), handed, Some(5)).unwrap_err();
        assert!(matches!(refused(&["lan"], &[]), TapError::NotHandedOver { .. }));
        assert!(matches!(refused(&["lan"], &[tap_fd("dmz", 900)]), TapError::NoSuchNic { fd: 900, .. }));
        let twice = [tap_fd("lan", 900), tap_fd("lan", 901)];
        assert!(matches!(refused(&["lan"], &twice), TapError::SecondTap { fd: 901, .. }));
        let same = [tap_fd("lan", 900), tap_fd("dmz", 900)];
        assert!(matches!(refused(&["lan", "dmz"], &same), TapError::SharedDescriptor { fd: 900, .. }));
        assert!(matches!(refused(&["lan"], &[tap_fd("lan", 5)]), TapError::SharedDescriptor { fd: 5, .. }));
        assert!(matches!(refused(&["lan"], &[tap_fd("lan", 900)]), TapError::NotOpen { fd: 900, .. }));
        assert!(adopt_all(&[], &[], None).unwrap().is_empty());
    }

    #[test]
    fn a_file_is_no_tap() {
        let file = tempfile::tempfile().unwrap().into_raw_fd();
        let refused = adopt_all(&nics(&["lan"]), &[tap_fd("lan", file)], None).unwrap_err();
        assert!(matches!(refused, TapError::NotATap { .. }), "{refused}");
    }
}
