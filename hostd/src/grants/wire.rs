//! What a host and the leader say about leases: one heartbeat, one answer, over a peer call of [`HEARTBEAT`].
//!
//! Bodies are `statemachine::codec` values; the transport frames them and proves who sent them.

use bytes::Bytes;
use consensus::transport::PeerKind;
use serde::Deserialize;
use serde::Serialize;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use thiserror::Error;

/// The kind of peer call that carries heartbeats.
pub const HEARTBEAT: PeerKind = PeerKind(0x0101);
/// Bytes of a body: a host with 20,000 guests names each of them in at most 10 bytes.
pub const MAX_BODY_BYTES: usize = 256 << 10;

/// Chosen by the sending host at random, once a heartbeat. The host knows by it which of its own sends an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Nonce(pub u64);

/// "I am here, in this incarnation; may I go on?"
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub host: HostId,
    pub boot: BootId,
    pub nonce: Nonce,
    /// How far this host has applied the log.
    pub applied: Seq,
    /// The wall clock at the send, for the leader's comparison of clocks (hazard H17). No deadline is made of it.
    pub wall_ms: u64,
    /// A watchdog is armed and fed.
    pub watchdog_armed: bool,
    /// Epochs whose process lives on this host, running or paused.
    pub running: Vec<Epoch>,
}

/// The leader's word that the permits named were current after the heartbeat arrived (DESIGN §5, *Grant*).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub host: HostId,
    pub boot: BootId,
    pub nonce: Nonce,
    pub epochs: Vec<Epoch>,
    /// The leader's applied seq on which `epochs` rests: the host starts nothing before it has applied as much (hazard C5).
    pub applied: Seq,
    /// The leader's session, for logs.
    pub session: u64,
}

/// Why a heartbeat got no grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Refusal {
    #[error("this host does not lead")]
    NotLeader,
    #[error("the leader has not applied the log of its predecessors yet")]
    NotReady,
    #[error("the leader is declaring this host lost, or has; it is asked again once its recovery is in the log")]
    NoGrant,
    #[error("this host was removed from the site; wipe its state directory and join again with a new token")]
    Removed,
    #[error("this host does not belong to the site")]
    Unknown,
    #[error("the heartbeat names another host than its certificate does")]
    WrongSender,
    #[error("a later heartbeat of the same host took its place")]
    Superseded,
    #[error("a majority of voters did not confirm in time that this host still leads")]
    NoMajority,
    #[error("the leader has too much to do")]
    Busy,
    #[error("the heartbeat could not be read; are both hosts of the same release?")]
    Malformed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrantAnswer {
    Granted(Grant),
    Refused(Refusal),
}

impl Heartbeat {
    pub fn encode(&self) -> Bytes {
        codec::encode(self).into()
    }

    pub fn decode(body: &[u8]) -> Result<Heartbeat, CodecError> {
        decode(body)
    }
}

impl GrantAnswer {
    pub fn encode(&self) -> Bytes {
        codec::encode(self).into()
    }

    pub fn decode(body: &[u8]) -> Result<GrantAnswer, CodecError> {
        decode(body)
    }
}

fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    if body.len() > MAX_BODY_BYTES {
        return Err(CodecError::TooLong { len: body.len(), limit: MAX_BODY_BYTES });
    }
    codec::decode(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            host: HostId(3),
            boot: BootId::default(),
            nonce: Nonce(u64::MAX),
            applied: Seq(9),
            wall_ms: 1,
            watchdog_armed: false,
            running: vec![Epoch(4), Epoch(7)],
        }
    }

    #[test]
    fn a_heartbeat_survives_the_wire_and_trailing_bytes_do_not() {
        let body = heartbeat().encode();
        assert_eq!(Heartbeat::decode(&body).unwrap(), heartbeat());
        let longer = [&body[..], b"x"].concat();
        assert!(Heartbeat::decode(&longer).is_err());
        assert!(Heartbeat::decode(&vec![0; MAX_BODY_BYTES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Heartbeat::decode(&body);
            let _ = GrantAnswer::decode(&body);
        }
    }
}
