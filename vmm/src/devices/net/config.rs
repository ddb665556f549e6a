//! What the VM's definition says of a network card, and what of it the driver reads as device configuration.

use pnet_base::MacAddr;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

/// Queue of frames to the guest.
pub const RECEIVE: u16 = 0;
/// Queue of frames from the guest.
pub const TRANSMIT: u16 = 1;
/// Part of the machine type.
pub const QUEUE_SIZES: &[u16] = &[256, 256];
/// Buffers of one chain, which an indirect table could make longer than the ring. Linux uses up to 19.
pub const MAX_BUFFERS: usize = 256;
/// Addresses, type and one VLAN tag.
pub const ETHERNET_BYTES: usize = 18;
/// Addresses and type: less is no frame.
pub const MIN_FRAME_BYTES: usize = 14;
/// The largest frame that segmentation makes: a full IP packet. Without its virtio header.
pub const MAX_FRAME_BYTES: usize = (64 << 10) + ETHERNET_BYTES;
const CONFIG_BYTES: usize = 12;

/// Part of the machine type, whatever the host's kernel could do beyond it.
pub const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A network card as its definition describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The name in logs, metrics and errors.
    pub name: String,
    pub mac: MacAddr,
    pub mtu: u16,
}

impl NetConfig {
    /// The device configuration structure (virtio 1.2, 5.1.4), as far as it belongs to features that are offered.
    pub fn config_bytes(&self, link_up: bool) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let status = if link_up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        bytes[..6].copy_from_slice(&self.mac.octets());
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[10..].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }
}

/// Work on frames of one direction that the sender may leave to the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
}

impl Offloads {
    pub const NONE: Self = Self { checksum: false, tso4: false, tso6: false, ecn: false };

    /// What the guest may leave to the host.
    pub fn from_guest(features: u64) -> Self {
        Self::of(features, [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN])
    }

    /// What the host may leave to the guest.
    pub fn to_guest(features: u64) -> Self {
        let bits = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN];
        Self::of(features, bits)
    }

    /// A driver that takes a feature without the one that it needs (virtio 1.2, 5.1.3.1) has neither.
    fn of(features: u64, [checksum, tso4, tso6, ecn]: [u32; 4]) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        let checksum = has(checksum);
        let (tso4, tso6) = (checksum && has(tso4), checksum && has(tso6));
        Self { checksum, tso4, tso6, ecn: (tso4 || tso6) && has(ecn) }
    }

    /// Whether frames can be longer than the MTU.
    pub fn segments(self) -> bool {
        self.tso4 || self.tso6
    }
}

/// What driver and device agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    pub from_guest: Offloads,
    pub to_guest: Offloads,
    pub mergeable: bool,
    /// Bytes of a frame to the guest that is not to be segmented.
    pub frame_limit: usize,
}

impl Agreed {
    pub fn new(features: u64, mtu: u16) -> Self {
        let has_mtu = features & 1 << VIRTIO_NET_F_MTU != 0;
        Self {
            from_guest: Offloads::from_guest(features),
            to_guest: Offloads::to_guest(features),
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            frame_limit: if has_mtu { usize::from(mtu) + ETHERNET_BYTES } else { MAX_FRAME_BYTES },
        }
    }

    /// Bytes of the longest frame to the guest.
    pub fn longest_frame(&self) -> usize {
        if self.to_guest.segments() { MAX_FRAME_BYTES } else { self.frame_limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_reads_address_status_and_mtu() {
        let config = NetConfig { name: "lan".into(), mac: MacAddr::new(0x52, 0x54, 0, 1, 2, 3), mtu: 9000 };
        assert_eq!(config.config_bytes(true), [0x52, 0x54, 0, 1, 2, 3, 1, 0, 0, 0, 0x28, 0x23]);
        assert_eq!(config.config_bytes(false)[6], 0);
    }

    #[test]
    fn segments_need_checksums_and_ecn_needs_segments() {
        let without_checksum = FEATURES & !(1 << VIRTIO_NET_F_CSUM) & !(1 << VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(Offloads::from_guest(without_checksum), Offloads::NONE);
        assert_eq!(Offloads::to_guest(without_checksum), Offloads::NONE);
        let only_v6 = Offloads::to_guest(FEATURES & !(1 << VIRTIO_NET_F_GUEST_TSO4));
        assert_eq!(only_v6, Offloads { checksum: true, tso4: false, tso6: true, ecn: true });
        let without = FEATURES & !(1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6);
        assert_eq!(Offloads::from_guest(without), Offloads { checksum: true, ..Offloads::NONE });
    }

    #[test]
    fn a_frame_is_as_long_as_was_agreed() {
        assert_eq!(Agreed::new(FEATURES, 1500).longest_frame(), MAX_FRAME_BYTES);
        assert_eq!(Agreed::new(1 << VIRTIO_NET_F_MTU, 1500).longest_frame(), 1518);
    }
}
