//! The header before each frame (virtio 1.2, 5.1.6): what its sender left for others to do. The tap uses the same one.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::config::Offloads;

/// Bytes of the header, with the count of buffers that virtio 1.x always has.
pub const HEADER_BYTES: usize = 12;

const NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCP6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
const CHECKSUM_BYTES: usize = 2;

/// Why a frame is dropped. Counted, not logged: a guest can make as many as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("it asks for a checksum, which was not agreed")]
    ChecksumNotAgreed,
    #[error("its checksum lies at {at} of {frame_bytes} bytes")]
    ChecksumOutside { at: usize, frame_bytes: usize },
    #[error("it asks for segmentation of type {gso_type:#x}, which was not agreed")]
    SegmentationNotAgreed { gso_type: u8 },
    #[error("it asks for segments without checksums or without a size")]
    SegmentationIncomplete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameHeader {
    pub flags: u8,
    pub gso_type: u8,
    /// Bytes of the headers of each segment: a hint.
    pub header_len: u16,
    pub gso_size: u16,
    pub checksum_start: u16,
    pub checksum_offset: u16,
    /// Chains that the frame fills. Meaningful to the guest only.
    pub buffers: u16,
}

impl FrameHeader {
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: u16_at(2),
            gso_size: u16_at(4),
            checksum_start: u16_at(6),
            checksum_offset: u16_at(8),
            buffers: u16_at(10),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&[self.flags, self.gso_type]);
        let words = [self.header_len, self.gso_size, self.checksum_start, self.checksum_offset, self.buffers];
        for (word, place) in words.iter().zip(bytes[2..].chunks_exact_mut(2)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header that the host's kernel gets for the guest's: nothing in it that was not agreed, and nothing that the device
    /// has to ignore (virtio 1.2, 5.1.6.2.2).
    pub fn toward_host(self, agreed: Offloads, frame_bytes: usize) -> Result<Self, HeaderError> {
        let flags = self.flags & NEEDS_CHECKSUM;
        self.check(flags, agreed, frame_bytes)?;
        if self.is_segmented() && (flags == 0 || self.gso_size == 0) {
            return Err(HeaderError::SegmentationIncomplete);
        }
        if !self.is_segmented() && flags == 0 {
            return Ok(Self::default());
        }
        // The hint may be wrong, and the kernel refuses one that is longer than the frame.
        let header_len = usize::from(self.header_len).min(frame_bytes) as u16;
        Ok(Self { flags, header_len, buffers: 0, ..self })
    }

    /// The header that the guest gets for the host's kernel's. An error is a frame that was in the tap's queue when the driver
    /// took over.
    pub fn toward_guest(self, agreed: Offloads, frame_bytes: usize) -> Result<Self, HeaderError> {
        self.check(self.flags, agreed, frame_bytes)?;
        // Without GUEST_CSUM all flags are zero (virtio 1.2, 5.1.6.4.1).
        let flags = if agreed.checksum { self.flags & (NEEDS_CHECKSUM | DATA_VALID) } else { 0 };
        Ok(Self { flags, buffers: 0, ..self })
    }

    fn check(&self, flags: u8, agreed: Offloads, frame_bytes: usize) -> Result<(), HeaderError> {
        if flags & NEEDS_CHECKSUM != 0 {
            if !agreed.checksum {
                return Err(HeaderError::ChecksumNotAgreed);
            }
            let at = usize::from(self.checksum_start) + usize::from(self.checksum_offset);
            if at + CHECKSUM_BYTES > frame_bytes {
                return Err(HeaderError::ChecksumOutside { at, frame_bytes });
            }
        }
        let ecn = self.gso_type & ECN != 0;
        let is_agreed = match self.gso_type & !ECN {
            NONE => !ecn,
            TCP4 => agreed.tso4 && (agreed.ecn || !ecn),
            TCP6 => agreed.tso6 && (agreed.ecn || !ecn),
            _ => false,
        };
        if is_agreed { Ok(()) } else { Err(HeaderError::SegmentationNotAgreed { gso_type: self.gso_type }) }
    }

    /// Whether the frame stands for several on the wire.
    pub fn is_segmented(&self) -> bool {
        self.gso_type != NONE
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
    const TCP: FrameHeader = FrameHeader {
        flags: NEEDS_CHECKSUM,
        gso_type: TCP4,
        header_len: 54,
        gso_size: 1460,
        checksum_start: 34,
        checksum_offset: 16,
        buffers: 0,
    };

    #[test]
    fn segments_of_agreed_kinds_pass() {
        for gso_type in [NONE, TCP4, TCP6, TCP4 | ECN, TCP6 | ECN] {
            let header = FrameHeader { gso_type, ..TCP };
            assert_eq!(header.toward_host(ALL, 4000), Ok(header));
        }
    }

    #[test]
    fn what_was_not_agreed_is_refused() {
        let refused = |header: FrameHeader, agreed| header.toward_host(agreed, 4000).unwrap_err();
        let unagreed = |gso_type| HeaderError::SegmentationNotAgreed { gso_type };
        assert_eq!(refused(TCP, Offloads::NONE), HeaderError::ChecksumNotAgreed);
        assert_eq!(refused(TCP, Offloads { tso4: false, ..ALL }), unagreed(TCP4));
        let ecn = TCP4 | ECN;
        assert_eq!(refused(FrameHeader { gso_type: ecn, ..TCP }, Offloads { ecn: false, ..ALL }), unagreed(ecn));
        // UFO, USO, what nobody knows, and ECN of nothing.
        for gso_type in [3, 5, 0x7f, ECN] {
            assert_eq!(refused(FrameHeader { gso_type, ..TCP }, ALL), unagreed(gso_type));
        }
    }

    #[test]
    fn a_checksum_lies_in_the_frame() {
        let header = FrameHeader { gso_type: NONE, ..TCP };
        assert!(header.toward_host(ALL, 52).is_ok());
        assert_eq!(header.toward_host(ALL, 51), Err(HeaderError::ChecksumOutside { at: 50, frame_bytes: 51 }));
        let far = FrameHeader { checksum_start: u16::MAX, checksum_offset: u16::MAX, ..header };
        assert!(far.toward_host(ALL, 65554).is_err());
    }

    #[test]
    fn segments_need_a_size_and_checksums() {
        for header in [FrameHeader { gso_size: 0, ..TCP }, FrameHeader { flags: 0, ..TCP }] {
            assert_eq!(header.toward_host(ALL, 4000), Err(HeaderError::SegmentationIncomplete));
        }
    }

    #[test]
    fn a_guest_without_checksums_sees_no_flags() {
        let valid = FrameHeader { flags: DATA_VALID, ..FrameHeader::default() };
        assert_eq!(valid.toward_guest(Offloads::NONE, 60), Ok(FrameHeader::default()));
        assert_eq!(valid.toward_guest(ALL, 60), Ok(valid));
        assert_eq!(TCP.toward_guest(Offloads::NONE, 4000), Err(HeaderError::ChecksumNotAgreed));
    }

    proptest! {
        /// Whatever a guest writes: what comes out was agreed, lies in the frame, and says nothing about buffers.
        #[test]
        fn the_kernel_gets_only_what_was_agreed(
            bytes in any::<[u8; HEADER_BYTES]>(), bits in 0u8..16, frame_bytes in 14usize..65554
        ) {
            let bit = |n: u8| bits & 1 << n != 0;
            let agreed = Offloads { checksum: bit(0), tso4: bit(1), tso6: bit(2), ecn: bit(3) };
            let header = FrameHeader::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            if let Ok(out) = header.toward_host(agreed, frame_bytes) {
                prop_assert_eq!(out.flags & !NEEDS_CHECKSUM, 0);
                prop_assert_eq!(out.buffers, 0);
                prop_assert!(usize::from(out.header_len) <= frame_bytes);
                if out.flags != 0 {
                    prop_assert!(agreed.checksum);
                    prop_assert!(usize::from(out.checksum_start) + usize::from(out.checksum_offset) + 2 <= frame_bytes);
                }
                match out.gso_type & !ECN {
                    NONE => prop_assert_eq!(out.gso_type, NONE),
                    TCP4 => prop_assert!(agreed.tso4 && out.flags != 0 && out.gso_size > 0),
                    TCP6 => prop_assert!(agreed.tso6 && out.flags != 0 && out.gso_size > 0),
                    _ => prop_assert!(false),
                }
            }
        }
    }
}
