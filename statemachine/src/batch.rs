//! A batch: the events of one accepted command, under one seq, chained to the batch before it.

use serde::Deserialize;
use serde::Serialize;

use crate::codec;
use crate::codec::CodecError;
use crate::codec::RecordKind;
use crate::command::Actor;
use crate::command::IdempotencyKey;
use crate::event::EncodedEvent;
use crate::event::Event;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::stamp::Stamp;
use crate::state::Created;

/// Largest encoded batch: 1 MiB. One command never needs more.
pub const MAX_BATCH_LEN: usize = 1 << 20;

/// blake3 over the original bytes of a batch, which hold the hash of the batch before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChainHash(pub [u8; 32]);

impl std::fmt::Display for ChainHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The end of the chain: what the next batch must name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Head {
    pub seq: Seq,
    pub hash: ChainHash,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub previous: Head,
    pub stamp: Stamp,
    pub actor: Actor,
    /// The host whose API or agent received the command.
    pub origin: HostId,
    pub idempotency: Option<IdempotencyKey>,
    pub created: Option<Created>,
    pub events: Vec<Event>,
}

/// How a batch is encoded. Event payloads keep their own versions.
#[derive(Serialize, Deserialize)]
struct BatchWire {
    previous: Head,
    stamp: Stamp,
    actor: Actor,
    origin: HostId,
    idempotency: Option<IdempotencyKey>,
    created: Option<Created>,
    events: Vec<EncodedEvent>,
}

/// A batch as bytes: what the log carries, the stream serves and the chain hash covers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedBatch(#[serde(with = "serde_bytes")] Vec<u8>);

impl std::fmt::Debug for SealedBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SealedBatch({} bytes)", self.0.len())
    }
}

impl SealedBatch {
    /// Takes bytes from a log, a peer or a file as they are; [`SealedBatch::open`] checks them.
    pub fn from_bytes(bytes: Vec<u8>) -> SealedBatch {
        SealedBatch(bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn hash(&self) -> ChainHash {
        ChainHash(*blake3::hash(&self.0).as_bytes())
    }

    /// What it claims to follow, without decoding its events: compare-and-append needs no more, so a batch
    /// that does not fit is a no-op even where its events are unknown (DESIGN §3).
    pub fn previous(&self) -> Result<Head, CodecError> {
        self.wire().map(|wire| wire.previous)
    }

    pub fn open(&self) -> Result<Batch, CodecError> {
        self.wire()?.decode()
    }

    /// The batch, if it claims to follow this head; events of one that does not may be unknown.
    pub fn open_after(&self, head: Head) -> Result<Option<Batch>, CodecError> {
        let wire = self.wire()?;
        match wire.previous == head {
            true => wire.decode().map(Some),
            false => Ok(None),
        }
    }

    fn wire(&self) -> Result<BatchWire, CodecError> {
        codec::open_value(RecordKind::Batch, &self.0, MAX_BATCH_LEN)
    }
}

impl BatchWire {
    fn decode(self) -> Result<Batch, CodecError> {
        Ok(Batch {
            previous: self.previous,
            stamp: self.stamp,
            actor: self.actor,
            origin: self.origin,
            idempotency: self.idempotency,
            created: self.created,
            events: self.events.iter().map(Event::decode).collect::<Result<_, _>>()?,
        })
    }
}

impl Batch {
    pub fn seq(&self) -> Seq {
        self.previous.seq.next()
    }

    pub fn seal(&self) -> SealedBatch {
        let wire = BatchWire {
            previous: self.previous,
            stamp: self.stamp,
            actor: self.actor.clone(),
            origin: self.origin,
            idempotency: self.idempotency.clone(),
            created: self.created,
            events: self.events.iter().map(Event::encode).collect(),
        };
        SealedBatch(codec::seal_value(RecordKind::Batch, &wire))
    }
}
