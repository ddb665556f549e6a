//! A guest that came from another host tells the network where it is now: switches and bridges send frames for its address where
//! they last saw it, and would go on to (reference peers-vmm §4.2 rule 30).
//!
//! As QEMU does, in the guest's name and without its help: a reverse ARP request (RFC 903) of each card, some times over a second,
//! as frames get lost while ports come up. Every switch on the way learns the address; nobody has to answer.

use std::sync::Arc;
use std::time::Duration;

use pnet_base::MacAddr;

use super::header::HEADER_BYTES;
use super::tap::{KernelTap, Tap};
use crate::sandbox::Role;

/// Before each frame but the first, in milliseconds.
const PAUSES_MS: [u64; 4] = [50, 150, 250, 350];
/// The least that Ethernet carries, without the checksum at its end.
const FRAME_BYTES: usize = 60;

const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
const HARDWARE_ETHERNET: [u8; 2] = [0, 1];
const PROTOCOL_IPV4: [u8; 2] = [0x08, 0];
const REQUEST_REVERSE: [u8; 2] = [0, 3];

/// A frame from `card`, with the header that taps want before it: nothing in it is left to others.
fn frame(card: MacAddr) -> [u8; HEADER_BYTES + FRAME_BYTES] {
    let mac = card.octets();
    let mut frame = [0; HEADER_BYTES + FRAME_BYTES];
    let mut at = HEADER_BYTES;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac);
    put(&ETHERTYPE_RARP);
    put(&HARDWARE_ETHERNET);
    put(&PROTOCOL_IPV4);
    put(&[6, 4]);
    put(&REQUEST_REVERSE);
    // Its own address is what it asks about; protocol addresses are unknown and zero.
    put(&mac);
    put(&[0; 4]);
    put(&mac);
    frame
}

fn send(cards: &[(MacAddr, Arc<KernelTap>)]) {
    for (mac, tap) in cards {
        let mut frame = frame(*mac);
        let buffer = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: the buffer is `frame`, which lives until the call has returned.
        if let Err(error) = unsafe { tap.write_frame(&[buffer]) } {
            tracing::debug!(%mac, %error, "a card is not announced");
        }
    }
}

/// Announces these cards from a thread of its own, which ends by itself.
pub fn start(cards: Vec<(MacAddr, Arc<KernelTap>)>) {
    if cards.is_empty() {
        return;
    }
    let announce = move || {
        send(&cards);
        for pause in PAUSES_MS {
            std::thread::sleep(Duration::from_millis(pause));
            send(&cards);
        }
    };
    if let Err(error) = Role::Announce.spawn("", announce) {
        // The guest's own first frame says the same.
        tracing::warn!(%error, "the network is not told where the guest is now");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_reverse_arp_request_from_the_card_to_all() {
        let mac = MacAddr::new(0x52, 0x54, 0, 1, 2, 3);
        let whole = frame(mac);
        let (header, frame) = whole.split_at(HEADER_BYTES);
        assert_eq!(header, [0; HEADER_BYTES]);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac.octets());
        // Ethernet type, then RFC 903: hardware, protocol, lengths, operation.
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac.octets());
        assert_eq!(frame[32..38], mac.octets());
        assert!(frame[28..32].iter().chain(&frame[38..]).all(|byte| *byte == 0));
    }
}
