//! A tap in a bridge, for one card of one guest.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use futures::TryStreamExt;
use pnet_base::MacAddr;
use rtnetlink::Handle;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::link::LinkInfo;
use rtnetlink::packet_route::link::LinkMessage;

use super::NetworkError;

const DEVICE: &str = "/dev/net/tun";
/// The kernel puts the lowest free number in.
const NAME_PATTERN: &[u8] = b"qtap%d\0";

mod ioctl {
    use nix::libc::c_int;
    // The kernel declares it as writing an int; it takes a struct ifreq, and writes the interface's name back into it.
    nix::ioctl_readwrite_bad!(set_iff, nix::request_code_write!(b'T', 202, size_of::<c_int>()), nix::libc::ifreq);
}

/// The guest's end of a cable. Closing every copy of the descriptor pulls it out of the bridge and removes it.
#[derive(Debug)]
pub struct Tap {
    pub descriptor: OwnedFd,
    /// As `ip link` shows it.
    pub name: String,
    /// That of the bridge: a longer frame would not leave it.
    pub mtu: u32,
}

impl Tap {
    /// Makes a tap for the card with this address, plugs it into `bridge` and turns it on. Blocks for a few answers of the kernel.
    pub fn plug(bridge: &str, mac: MacAddr) -> Result<Tap, NetworkError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.map_err(NetworkError::Netlink)?.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Netlink)?;
            let talk = tokio::spawn(connection);
            let tap = plug_into(&handle, bridge, mac).await;
            talk.abort();
            tap
        })
    }
}

async fn plug_into(handle: &Handle, bridge: &str, mac: MacAddr) -> Result<Tap, NetworkError> {
    let (controller, mtu) = find_bridge(handle, bridge).await?;
    let (descriptor, name) = open().map_err(NetworkError::Tap)?;
    let link = find(handle, &name).await.map_err(|source| failed("find", &name, source))?;
    let plugged = LinkUnspec::new_with_index(link.header.index)
        .mtu(mtu)
        .address(host_side(mac).octets().to_vec())
        .controller(controller)
        .up()
        .build();
    handle.link().change(plugged).execute().await.map_err(|source| failed("plug into its bridge", &name, source))?;
    Ok(Tap { descriptor, name, mtu })
}

/// The tap's own address is that of the card, with a first byte above all others: a bridge takes the lowest address of its ports,
/// and would change its own whenever a guest came or went (libvirt does the same).
fn host_side(mac: MacAddr) -> MacAddr {
    let MacAddr(_, b, c, d, e, f) = mac;
    MacAddr(0xfe, b, c, d, e, f)
}

/// Index and MTU of a bridge.
async fn find_bridge(handle: &Handle, bridge: &str) -> Result<(u32, u32), NetworkError> {
    let link = match find(handle, bridge).await {
        Ok(link) => link,
        Err(rtnetlink::Error::NetlinkError(answer)) if answer.raw_code() == -nix::libc::ENODEV => {
            return Err(NetworkError::NoBridge { bridge: bridge.to_owned() });
        }
        Err(source) => return Err(failed("find", bridge, source)),
    };
    let is_bridge = link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    });
    if !is_bridge {
        return Err(NetworkError::NotABridge { bridge: bridge.to_owned() });
    }
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    // Every link has one; 1500 is Ethernet's.
    Ok((link.header.index, mtu.unwrap_or(1500)))
}

async fn find(handle: &Handle, name: &str) -> Result<LinkMessage, rtnetlink::Error> {
    let mut found = Box::pin(handle.link().get().match_name(name).execute());
    found.try_next().await?.ok_or(rtnetlink::Error::RequestFailed)
}

fn failed(what: &'static str, name: &str, source: rtnetlink::Error) -> NetworkError {
    NetworkError::Link { what, name: name.to_owned(), source }
}

/// A new tap, and the name that the kernel gave it. Frames carry the header of virtio-net, so that checksums and segmentation
/// stay undone between guests of one host.
fn open() -> io::Result<(OwnedFd, String)> {
    let file: File = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    // SAFETY: ifreq is plain data; all zeros is an empty name and no flags.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME_PATTERN) {
        *to = *from as nix::libc::c_char;
    }
    let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as nix::libc::c_short;
    // SAFETY: the request lives over the call, and is of the type that the kernel reads and writes.
    unsafe { ioctl::set_iff(file.as_raw_fd(), &mut request) }?;
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8);
    let name = String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned();
    Ok((file.into(), name))
}

/// In network namespaces of their own; they need root and /dev/net/tun, and `make test` skips them where there is none.
#[cfg(test)]
mod with_tun {
    use nix::sched::CloneFlags;
    use nix::sched::unshare;
    use rtnetlink::LinkBridge;

    use super::*;

    const MAC: MacAddr = MacAddr(0x52, 0x54, 0, 1, 2, 3);

    /// Runs on a thread whose network is empty but for `lo` and `br0` (MTU 1400).
    fn in_a_network(story: impl FnOnce() + Send + 'static) {
        let alone = move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a namespace; these tests need root");
            on_netlink(|handle| async move {
                let bridge = LinkBridge::new("br0").mtu(1400).build();
                handle.link().add(bridge).execute().await.expect("a bridge");
            });
            story();
        };
        std::thread::spawn(alone).join().expect("the story ends well");
    }

    fn on_netlink<T, F: Future<Output = T>>(ask: impl FnOnce(Handle) -> F) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            ask(handle).await
        })
    }

    fn link(name: &str) -> Result<LinkMessage, rtnetlink::Error> {
        on_netlink(|handle| async move { find(&handle, name).await })
    }

    #[test]
    fn a_tap_is_a_port_of_its_bridge_for_as_long_as_somebody_holds_it() {
        in_a_network(|| {
            let tap = Tap::plug("br0", MAC).expect("plugged");
            assert_eq!(tap.mtu, 1400);
            let (seen, bridge) = (link(&tap.name).unwrap(), link("br0").unwrap());
            for expected in [
                LinkAttribute::Controller(bridge.header.index),
                LinkAttribute::Mtu(1400),
                LinkAttribute::Address(vec![0xfe, 0x54, 0, 1, 2, 3]),
            ] {
                assert!(seen.attributes.contains(&expected), "{expected:?} in {:?}", seen.attributes);
            }
            let second = Tap::plug("br0", MAC).expect("a second card");
            assert_ne!(second.name, tap.name);
            let copy = tap.descriptor.try_clone().unwrap();
            drop(tap.descriptor);
            link(&tap.name).expect("a copy is open");
            drop(copy);
            link(&tap.name).expect_err("nobody holds it");
        });
    }

    #[test]
    fn a_bridge_that_is_missing_or_none_is_refused_in_words() {
        in_a_network(|| {
            let missing = Tap::plug("br7", MAC).unwrap_err();
            assert!(matches!(missing, NetworkError::NoBridge { .. }), "{missing}");
            let loopback = Tap::plug("lo", MAC).unwrap_err();
            assert!(matches!(loopback, NetworkError::NotABridge { .. }), "{loopback}");
        });
    }
}
