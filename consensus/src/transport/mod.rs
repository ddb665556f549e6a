//! How hosts talk: requests with answers, and long ordered streams of appends and heartbeats (DESIGN §4).
//!
//! [`Transport`] is the door. [`quic`] is the product: mutual TLS, one connection a direction between two hosts.
//! [`memory`] joins hosts of one process and can cut and delay their links, for tests and simulation. Whoever is called
//! is a [`Handler`]. Everything that travels is a bounded, checksummed record of [`statemachine::codec`] ([`frame`]).
//!
//! A host that is *known removed* is refused; an unknown newer host with a certificate of this site is served, because
//! a host that was away through a change of all voters must not lock itself out (hazard H22).

pub mod frame;
pub mod memory;
pub mod quic;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::codec::CodecError;
use thiserror::Error;

/// Number of a request of the layer above (hostd): heartbeats, joins, consoles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerKind(pub u16);

/// What a message is for. Numbers on the wire are append-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Vote,
    PreVote,
    TransferLeader,
    /// Stream: log entries in order, answered in order.
    Appends,
    /// Stream of its own, so that no append delays it.
    Heartbeats,
    /// A snapshot is offered: its manifest. The receiver pulls what it lacks by `SnapshotChunk`.
    SnapshotOffer,
    /// Bulk: travels on a socket of its own.
    SnapshotChunk,
    Propose,
    ReadIndex,
    /// Answers at once: is the host there?
    Ping,
    /// Committed batches after a seq, for followers that pull.
    Pull,
    Peer(PeerKind),
}

impl Channel {
    const PEER: u16 = 256;

    pub fn to_wire(self) -> (u16, u16) {
        let number = match self {
            Channel::Vote => 1,
            Channel::PreVote => 2,
            Channel::TransferLeader => 3,
            Channel::Appends => 4,
            Channel::Heartbeats => 5,
            Channel::SnapshotOffer => 6,
            Channel::SnapshotChunk => 7,
            Channel::Propose => 8,
            Channel::ReadIndex => 9,
            Channel::Ping => 10,
            Channel::Pull => 11,
            Channel::Peer(PeerKind(kind)) => return (Channel::PEER, kind),
        };
        (number, 0)
    }

    pub fn from_wire(number: u16, kind: u16) -> Option<Channel> {
        Some(match number {
            1 => Channel::Vote,
            2 => Channel::PreVote,
            3 => Channel::TransferLeader,
            4 => Channel::Appends,
            5 => Channel::Heartbeats,
            6 => Channel::SnapshotOffer,
            7 => Channel::SnapshotChunk,
            8 => Channel::Propose,
            9 => Channel::ReadIndex,
            10 => Channel::Ping,
            11 => Channel::Pull,
            Channel::PEER => Channel::Peer(PeerKind(kind)),
            _ => return None,
        })
    }

    /// A stream of records rather than one request with one answer.
    pub fn is_stream(self) -> bool {
        matches!(self, Channel::Appends | Channel::Heartbeats)
    }

    /// Elections and leases wait for these: they overtake everything else on the connection.
    pub fn is_urgent(self) -> bool {
        matches!(self, Channel::Vote | Channel::PreVote | Channel::TransferLeader | Channel::Heartbeats | Channel::Ping)
    }

    /// Bulk must never queue in the socket that receives heartbeats (hazard H25).
    pub fn is_bulk(self) -> bool {
        matches!(self, Channel::SnapshotChunk)
    }
}

/// A host and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub host: HostId,
    /// `address:port`; the address may be a name.
    pub address: String,
}

#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum TransportError {
    #[error("host {host} cannot be reached: {why}")]
    Unreachable { host: HostId, why: String },
    #[error("host {host} did not answer within {after_ms} ms")]
    Timeout { host: HostId, after_ms: u64 },
    #[error("host {host} refuses: {why}")]
    Refused { host: HostId, why: String },
    #[error("the stream with host {host} ended: {why}")]
    Closed { host: HostId, why: String },
    #[error("host {host} sent a damaged record: {source}")]
    BadRecord { host: HostId, source: CodecError },
    #[error("a message of {len} bytes exceeds the limit of {limit} bytes")]
    TooLong { len: usize, limit: usize },
}

impl TransportError {
    pub(crate) fn timeout(host: HostId, after: Duration) -> TransportError {
        TransportError::Timeout { host, after_ms: after.as_millis() as u64 }
    }
}

/// Why a handler does not serve a request; the caller sees it as [`TransportError::Refused`].
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("{why}")]
pub struct Refusal {
    pub why: String,
}

impl Refusal {
    pub fn new(why: impl ToString) -> Refusal {
        Refusal { why: why.to_string() }
    }
}

/// Sends hosts' messages. Nothing is retried here: the caller knows what may be sent twice.
pub trait Transport: Send + Sync + 'static {
    fn local(&self) -> HostId;

    /// One request, one answer, within `timeout` in all, connecting included.
    fn call(
        &self,
        to: Peer,
        channel: Channel,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>>;

    /// Opens a long ordered stream of appends or heartbeats.
    fn open(
        &self,
        to: Peer,
        channel: Channel,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<PeerStream, TransportError>>;

    /// Who answers others. Until this is called, everybody is refused.
    fn serve(&self, handler: Arc<dyn Handler>);

    /// Smoothed round trip of the connection to `host`, if there is one.
    fn round_trip(&self, host: HostId) -> Option<Duration>;

    /// Ends all connections and stops listening.
    fn shutdown(&self) -> BoxFuture<'static, ()>;
}

/// Answers other hosts.
pub trait Handler: Send + Sync + 'static {
    /// Whether `host`, proven by its certificate, is still served. Asked for each request and each record.
    fn admits(&self, host: HostId) -> bool;

    fn call(&self, from: HostId, channel: Channel, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>>;

    /// Serves a stream until either side ends it.
    fn stream(&self, from: HostId, channel: Channel, stream: PeerStream) -> BoxFuture<'static, ()>;
}

/// Both halves of an ordered stream of records.
pub struct PeerStream {
    pub sink: Box<dyn RecordSink>,
    pub source: Box<dyn RecordSource>,
}

pub trait RecordSink: Send + Sync + 'static {
    /// Waits while the receiver is behind: the bound on what is in flight is the connection's window.
    fn send(&mut self, payload: Bytes) -> BoxFuture<'_, Result<(), TransportError>>;
}

pub trait RecordSource: Send + Sync + 'static {
    /// The next record, `None` at the orderly end. Not cancel-safe: a caller that drops it drops the stream.
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, TransportError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_keep_their_numbers() {
        let all = [
            Channel::Vote,
            Channel::PreVote,
            Channel::TransferLeader,
            Channel::Appends,
            Channel::Heartbeats,
            Channel::SnapshotOffer,
            Channel::SnapshotChunk,
            Channel::Propose,
            Channel::ReadIndex,
            Channel::Ping,
            Channel::Pull,
            Channel::Peer(PeerKind(77)),
        ];
        for (index, channel) in all.into_iter().enumerate() {
            let (number, kind) = channel.to_wire();
            assert_eq!(Channel::from_wire(number, kind), Some(channel));
            if !matches!(channel, Channel::Peer(_)) {
                assert_eq!(number as usize, index + 1);
            }
        }
        assert_eq!(Channel::from_wire(200, 0), None);
    }
}
