//! The card on a tap of this machine's kernel, in a network of the test's own: what the sockets tell of offloads cannot. They need
//! root and /dev/net/tun; `make test` leaves them out, and says so, where either is missing.

use std::ffi::{c_int, c_ulong};
use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use pnet_base::MacAddr;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4};

use super::header::{FrameHeader, HEADER_BYTES};
use super::tap::{KernelTap, read_message, write_message};
use super::tests::{PLAIN, RX, SEGMENTS, TX};
use super::*;
use crate::cpu::gate::RunGate;
use crate::virtio::testing::{Buffer, FakeDriver, PATIENCE, attach};

const GUEST_MAC: MacAddr = MacAddr(0x52, 0x54, 0, 0, 0, 2);
const HOST_IP: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
const TAP_MODE: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const BUFFERS: usize = 64;
const ETHERNET: usize = 14;
const UDP: u8 = 17;
const TCP: u8 = 6;

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_tun(mode: c_int) -> io::Result<OwnedFd> {
    let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lan0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = mode as libc::c_short;
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
    Ok(tun.into())
}

/// A network of this thread's own with one tap in it.
fn own_network(mode: c_int) -> OwnedFd {
    let made = unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from).and_then(|()| open_tun(mode));
    made.expect("a tap in a network namespace of one's own: root, and /dev/net/tun")
}

fn socket(family: c_int, kind: c_int, protocol: c_int) -> OwnedFd {
    let fd = unsafe { libc::socket(family, kind, protocol) };
    check(fd).unwrap();
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The host's side of the tap.
struct Host {
    mac: MacAddr,
    index: c_int,
}

impl Host {
    /// Gives the tap an address, and the guest's to whoever asks for it.
    fn up() -> Self {
        let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let ask = |number: c_ulong, request: &mut libc::ifreq| {
            for (to, from) in request.ifr_name.iter_mut().zip(b"lan0") {
                *to = *from as libc::c_char;
            }
            check(unsafe { libc::ioctl(control.as_raw_fd(), number as _, request) }).unwrap();
        };
        let mut request: libc::ifreq = unsafe { zeroed() };
        request.ifr_ifru.ifru_addr = address(HOST_IP);
        ask(libc::SIOCSIFADDR as _, &mut request);
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as _;
        ask(libc::SIOCSIFFLAGS as _, &mut request);
        ask(libc::SIOCGIFHWADDR as _, &mut request);
        let mac = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        let mac = MacAddr::from(std::array::from_fn::<u8, 6, _>(|i| mac[i] as u8));
        ask(libc::SIOCGIFINDEX as _, &mut request);
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mut neighbour: libc::arpreq = unsafe { zeroed() };
        neighbour.arp_pa = address(GUEST_IP);
        neighbour.arp_ha.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in neighbour.arp_ha.sa_data.iter_mut().zip(GUEST_MAC.octets()) {
            *to = from as libc::c_char;
        }
        neighbour.arp_flags = libc::ATF_PERM | libc::ATF_COM;
        check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSARP as _, &neighbour) }).unwrap();
        Self { mac, index }
    }

    /// A socket for whole frames of the tap, each with a header before it.
    fn frames(&self) -> OwnedFd {
        let protocol = (libc::ETH_P_IP as u16).to_be();
        let frames = socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, c_int::from(protocol));
        let one: c_int = 1;
        let set = unsafe {
            libc::setsockopt(
                frames.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const one).cast(),
                size_of::<c_int>() as u32,
            )
        };
        check(set).unwrap();
        let mut at: libc::sockaddr_ll = unsafe { zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = protocol;
        at.sll_ifindex = self.index;
        let bytes = size_of::<libc::sockaddr_ll>() as u32;
        check(unsafe { libc::bind(frames.as_raw_fd(), (&raw const at).cast(), bytes) }).unwrap();
        frames
    }

    /// Deletes the tap.
    fn delete(&self) {
        let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        let mut message = [0u8; 32];
        message[..4].copy_from_slice(&32u32.to_ne_bytes());
        message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
        message[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
        message[20..24].copy_from_slice(&self.index.to_ne_bytes());
        assert_eq!(rustix::net::send(&netlink, &message, rustix::net::SendFlags::empty()), Ok(32));
    }
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: data }
}

/// The sum of RFC 1071 over 16-bit words, not complemented.
fn sum(bytes: &[u8], start: u16) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + u32::from(start);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header: what a sender leaves in the field when the receiver is to complete it.
fn pseudo(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, len: usize) -> u16 {
    let rest = [0, protocol, (len >> 8) as u8, len as u8];
    sum(&[&from.octets()[..], &to.octets(), &rest].concat(), 0)
}

/// An IPv4 packet in a frame. `transport` has its header and checksum.
fn packet(to: (MacAddr, Ipv4Addr), from: (MacAddr, Ipv4Addr), protocol: u8, transport: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0];
    ip[2..4].copy_from_slice(&((20 + transport.len()) as u16).to_be_bytes());
    ip.extend(from.1.octets());
    ip.extend(to.1.octets());
    let checksum = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&to.0.octets()[..], &from.0.octets(), &[8, 0], &ip, transport].concat()
}

fn udp(ports: (u16, u16), checksum: u16, payload: &[u8]) -> Vec<u8> {
    let words = [ports.0, ports.1, (8 + payload.len()) as u16, checksum];
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    [header, payload.to_vec()].concat()
}

/// A segment with its checksum left to the receiver.
fn tcp(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[..4].copy_from_slice(&[0x30, 0x39, 0x30, 0x3a]);
    (header[12], header[13]) = (0x50, 0x10);
    header[16..18].copy_from_slice(&pseudo(from, to, TCP, 20 + payload.len()).to_be_bytes());
    [header, payload.to_vec()].concat()
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8).collect()
}

struct Guest {
    driver: FakeDriver,
    handle: Arc<NetHandle>,
    host: Host,
    buffers: Vec<u64>,
    next: usize,
}

fn guest(features: u64) -> Guest {
    let tap = own_network(TAP_MODE);
    let tap = KernelTap::adopt("lan", tap).unwrap();
    assert_eq!(tap.interface(), "lan0");
    let config = NetConfig { name: "lan".into(), mac: GUEST_MAC, mtu: 1500 };
    let (net, handle) = Net::open(config, Box::new(tap), RunGate::new()).unwrap();
    let mut driver = attach(net);
    driver.start_with(features);
    let buffers: Vec<u64> = (0..BUFFERS).map(|_| driver.buffer(&[0; 2048])).collect();
    for at in &buffers {
        driver.submit(RX, &[Buffer::In(*at, 2048)]);
    }
    // With the driver there from the start, nothing of the host's first words is discarded under a test.
    driver.wait("the card to be served", |driver| {
        driver.function.save().is_ok_and(|saved| saved["positions"].as_array().is_some_and(|p| p.len() == 2))
    });
    Guest { driver, handle, host: Host::up(), buffers, next: 0 }
}

impl Guest {
    /// The next IPv4 frame of a protocol that the guest gets.
    fn receive(&mut self, protocol: u8) -> (FrameHeader, Vec<u8>) {
        loop {
            let mut bytes = Vec::new();
            let mut missing = 1u16;
            while missing > 0 {
                let (_, len) = self.driver.used(RX);
                bytes.extend(self.driver.bytes(self.buffers[self.next], len as usize));
                self.next += 1;
                missing -= 1;
                if bytes.len() == len as usize {
                    missing = FrameHeader::decode(bytes[..HEADER_BYTES].try_into().unwrap()).buffers - 1;
                }
            }
            let header = FrameHeader::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            let frame = bytes.split_off(HEADER_BYTES);
            // The kernel has words of its own, as of its groups.
            if frame[12..14] == [8, 0] && frame[ETHERNET + 9] == protocol {
                return (header, frame);
            }
        }
    }

    fn transmit(&mut self, header: FrameHeader, frame: &[u8]) {
        let bytes = [header.encode().to_vec(), frame.to_vec()].concat();
        let at = self.driver.buffer(&bytes);
        self.driver.submit(TX, &[Buffer::Out(at, bytes.len() as u32)]);
        self.driver.used(TX);
    }
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((HOST_IP, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn a_checksum_is_left_to_a_guest_that_agreed_to_it() {
    let mut guest = guest(u64::MAX);
    host_socket().send_to(&payload(600), (GUEST_IP, 9)).unwrap();
    let (header, frame) = guest.receive(UDP);
    let wanted = FrameHeader { flags: 1, checksum_start: 34, checksum_offset: 6, buffers: 1, ..PLAIN };
    assert_eq!(header, wanted);
    let left = u16::from_be_bytes([frame[40], frame[41]]);
    assert_eq!(left, pseudo(HOST_IP, GUEST_IP, UDP, 608), "only the pseudo header is in it");
    assert_eq!(frame[42..], payload(600));
}

#[test]
fn a_guest_that_does_not_agree_gets_whole_checksums() {
    let mut guest = guest(!(1 << VIRTIO_NET_F_GUEST_CSUM));
    host_socket().send_to(&payload(600), (GUEST_IP, 9)).unwrap();
    let (header, frame) = guest.receive(UDP);
    assert_eq!(header, FrameHeader { buffers: 1, ..PLAIN });
    assert_eq!(sum(&frame[34..], pseudo(HOST_IP, GUEST_IP, UDP, 608)), 0xffff);
}

#[test]
fn the_host_completes_a_checksum_of_the_guest() {
    let mut guest = guest(u64::MAX);
    let socket = host_socket();
    let port = socket.local_addr().unwrap().port();
    let (to, from) = ((guest.host.mac, HOST_IP), (GUEST_MAC, GUEST_IP));
    let partial = pseudo(GUEST_IP, HOST_IP, UDP, 8 + 5);
    // The same checksum as a whole one is wrong: nobody gets that frame.
    guest.transmit(PLAIN, &packet(to, from, UDP, &udp((9, port), partial, b"wrong")));
    let header = FrameHeader { flags: 1, checksum_start: 34, checksum_offset: 6, ..PLAIN };
    guest.transmit(header, &packet(to, from, UDP, &udp((9, port), partial, b"right")));
    let mut got = [0; 16];
    let (len, sender) = socket.recv_from(&mut got).unwrap();
    assert_eq!((&got[..len], sender.ip()), (&b"right"[..], GUEST_IP.into()));
    assert_eq!(guest.handle.metrics().counters().tx_frames, 2);
}

#[test]
fn segments_stay_together_for_a_guest_that_agreed_to_them() {
    let mut guest = guest(u64::MAX);
    let sent = packet((GUEST_MAC, GUEST_IP), (guest.host.mac, HOST_IP), TCP, &tcp(HOST_IP, GUEST_IP, &payload(20_000)));
    send_segments(&guest.host.frames(), &sent);
    let (header, frame) = guest.receive(TCP);
    assert_eq!((header.gso_type, header.gso_size, header.flags), (1, 1448, 1));
    // 20066 bytes in buffers of 2048.
    assert_eq!(header.buffers, 10);
    assert!(frame == sent, "{} bytes, not {}", frame.len(), sent.len());
}

#[test]
fn segments_are_cut_for_a_guest_that_does_not_agree() {
    let mut guest = guest(!(1 << VIRTIO_NET_F_GUEST_TSO4));
    let sent = packet((GUEST_MAC, GUEST_IP), (guest.host.mac, HOST_IP), TCP, &tcp(HOST_IP, GUEST_IP, &payload(20_000)));
    send_segments(&guest.host.frames(), &sent);
    let mut received: Vec<u8> = Vec::new();
    while received.len() < 20_000 {
        let (header, frame) = guest.receive(TCP);
        assert_eq!((header.gso_type, header.buffers), (0, 1));
        assert!(frame.len() <= 1514);
        received.extend(&frame[54..]);
    }
    assert!(received == payload(20_000));
}

/// Through the host's stack, as one frame that stands for many.
fn send_segments(frames: &OwnedFd, frame: &[u8]) {
    let header = SEGMENTS.encode();
    let list = [&header[..HEADER_BYTES - 2], frame]
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    unsafe { write_message(frames.as_fd(), &list) }.unwrap();
}

#[test]
fn segments_of_the_guest_reach_the_host_as_one() {
    let mut guest = guest(u64::MAX);
    let frames = guest.host.frames();
    let sent = packet((guest.host.mac, HOST_IP), (GUEST_MAC, GUEST_IP), TCP, &tcp(GUEST_IP, HOST_IP, &payload(30_000)));
    guest.transmit(SEGMENTS, &sent);
    let mut bytes = vec![0u8; 1 << 17];
    let list = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    let until = Instant::now() + PATIENCE;
    let len = loop {
        match unsafe { read_message(frames.as_fd(), &list) } {
            Ok(len) => break len,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < until, "the host gets nothing");
        std::thread::sleep(Duration::from_millis(1));
    };
    // A packet socket gives the header of before virtio 1.
    let header_bytes = HEADER_BYTES - 2;
    assert_eq!((bytes[1], u16::from_le_bytes([bytes[4], bytes[5]])), (1, 1448));
    assert!(bytes[header_bytes..len] == sent, "{} bytes, not {}", len - header_bytes, sent.len());
}

#[test]
fn a_tap_that_the_host_deletes_is_a_link_that_is_down() {
    let guest = guest(u64::MAX);
    assert!(guest.handle.is_link_up());
    guest.host.delete();
    guest.driver.wait("the link", |_| !guest.handle.is_link_up());
    assert_eq!(guest.driver.read(0x2006, 2), 0);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_tap_in_another_mode_is_refused_in_words() {
    for (mode, why) in [
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, "is a tun"),
        (libc::IFF_TAP | libc::IFF_NO_PI, "without a virtio header"),
    ] {
        let tap = own_network(mode);
        let refused = KernelTap::adopt("lan", tap).unwrap_err();
        assert!(matches!(refused, TapError::WrongMode { .. }));
        let text = refused.to_string();
        assert!(text.contains(why) && text.contains("lan0"), "{text}");
    }
    // One that nobody has attached yet.
    let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    assert!(matches!(KernelTap::adopt("lan", tun.into()), Err(TapError::NotATap { .. })));
}
