//! Records on a byte stream: read whole, checked, bounded.
//!
//! A request is one `PeerRequest` record (`channel u16 LE | kind u16 LE | timeout_ms u32 LE | body`), its answer one
//! `PeerResponse` (`status u8 | body`, status 0 = served, 1 = refused in words). A stream begins with a request whose
//! body is empty and goes on with `RaftAppend` records one way and `RaftAppendAck` records the other.

use bytes::Bytes;
use statemachine::HostId;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::codec::HEADER_LEN;
use statemachine::codec::RecordKind;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;

use super::Channel;
use super::Refusal;
use super::TransportError;

/// Longest body of a message: the largest record less the request's own head.
pub const MAX_BODY: usize = codec::MAX_PAYLOAD - REQUEST_HEAD;
const REQUEST_HEAD: usize = 8;
const SERVED: u8 = 0;
const REFUSED: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestFrame {
    pub channel: Channel,
    pub timeout_ms: u32,
    pub body: Bytes,
}

impl RequestFrame {
    pub fn encode(&self) -> Vec<u8> {
        let (channel, kind) = self.channel.to_wire();
        let mut payload = Vec::with_capacity(REQUEST_HEAD + self.body.len());
        payload.extend_from_slice(&channel.to_le_bytes());
        payload.extend_from_slice(&kind.to_le_bytes());
        payload.extend_from_slice(&self.timeout_ms.to_le_bytes());
        payload.extend_from_slice(&self.body);
        payload
    }

    pub fn decode(payload: Bytes) -> Result<RequestFrame, CodecError> {
        let Some(head) = payload.first_chunk::<REQUEST_HEAD>() else {
            return Err(CodecError::Truncated { have: payload.len(), need: REQUEST_HEAD });
        };
        let number = u16::from_le_bytes([head[0], head[1]]);
        let kind = u16::from_le_bytes([head[2], head[3]]);
        let channel = Channel::from_wire(number, kind)
            .ok_or_else(|| CodecError::BadValue(format!("request channel {number} is unknown to this build")))?;
        let timeout_ms = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        Ok(RequestFrame { channel, timeout_ms, body: payload.slice(REQUEST_HEAD..) })
    }
}

pub fn encode_response(response: &Result<Bytes, Refusal>) -> Vec<u8> {
    let (status, body) = match response {
        Ok(body) => (SERVED, body.as_ref()),
        Err(refusal) => (REFUSED, refusal.why.as_bytes()),
    };
    let mut payload = Vec::with_capacity(1 + body.len());
    payload.push(status);
    payload.extend_from_slice(body);
    payload
}

pub fn decode_response(host: HostId, payload: Bytes) -> Result<Bytes, TransportError> {
    match payload.first() {
        Some(&SERVED) => Ok(payload.slice(1..)),
        Some(&REFUSED) => {
            Err(TransportError::Refused { host, why: String::from_utf8_lossy(&payload[1..]).into_owned() })
        }
        Some(status) => {
            let source = CodecError::BadValue(format!("response status {status} is unknown to this build"));
            Err(TransportError::BadRecord { host, source })
        }
        None => Err(TransportError::BadRecord { host, source: CodecError::Truncated { have: 0, need: 1 } }),
    }
}

/// An error with its causes: "connection lost" alone does not say whether the peer timed out or was reset.
fn in_full(error: &std::io::Error) -> String {
    let first: Option<&dyn std::error::Error> = error.get_ref().map(|inner| inner as _);
    let causes: Vec<String> =
        std::iter::successors(first, |error| error.source()).map(|cause| cause.to_string()).collect();
    if causes.is_empty() { error.to_string() } else { causes.join(": ") }
}

/// Writes one record.
pub async fn write_record<W: AsyncWrite + Unpin>(
    host: HostId,
    stream: &mut W,
    kind: RecordKind,
    payload: &[u8],
) -> Result<(), TransportError> {
    if payload.len() > codec::MAX_PAYLOAD {
        return Err(TransportError::TooLong { len: payload.len(), limit: codec::MAX_PAYLOAD });
    }
    let record = codec::seal(kind, payload);
    stream.write_all(&record).await.map_err(|error| TransportError::Closed { host, why: in_full(&error) })
}

/// Reads one record's payload; `None` at the orderly end, between records.
pub async fn read_record<R: AsyncRead + Unpin>(
    host: HostId,
    stream: &mut R,
    kind: RecordKind,
) -> Result<Option<Bytes>, TransportError> {
    let closed = |error: std::io::Error| TransportError::Closed { host, why: in_full(&error) };
    let bad = |source| TransportError::BadRecord { host, source };
    let mut header = [0; HEADER_LEN];
    let first = stream.read(&mut header).await.map_err(closed)?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut header[first..]).await.map_err(closed)?;
    let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    // Checked before a byte is reserved: the length is the peer's word.
    if len > codec::MAX_PAYLOAD {
        return Err(bad(CodecError::TooLong { len, limit: codec::MAX_PAYLOAD }));
    }
    let mut record = Vec::with_capacity(HEADER_LEN + len);
    record.extend_from_slice(&header);
    record.resize(HEADER_LEN + len, 0);
    stream.read_exact(&mut record[HEADER_LEN..]).await.map_err(closed)?;
    codec::open(kind, &record, codec::MAX_PAYLOAD).map_err(bad)?;
    Ok(Some(Bytes::from(record).slice(HEADER_LEN..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId(4);

    #[tokio::test]
    async fn records_arrive_whole_and_in_order_and_the_end_is_seen() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let writer = tokio::spawn(async move {
            for payload in [&b"one"[..], b"", b"a longer one than the pipe holds at once"] {
                write_record(HOST, &mut near, RecordKind::RaftAppend, payload).await.unwrap();
            }
        });
        for expected in ["one", "", "a longer one than the pipe holds at once"] {
            let payload = read_record(HOST, &mut far, RecordKind::RaftAppend).await.unwrap().unwrap();
            assert_eq!(payload, expected);
        }
        writer.await.unwrap();
        assert_eq!(read_record(HOST, &mut far, RecordKind::RaftAppend).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_damaged_or_oversized_record_is_refused_before_it_is_believed() {
        let mut damaged = codec::seal(RecordKind::RaftAppend, b"payload");
        damaged[HEADER_LEN] ^= 1;
        let error = read_record(HOST, &mut damaged.as_slice(), RecordKind::RaftAppend).await.unwrap_err();
        assert_eq!(error, TransportError::BadRecord { host: HOST, source: CodecError::BadChecksum });

        let mut oversized = codec::seal(RecordKind::RaftAppend, b"payload");
        oversized[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = read_record(HOST, &mut oversized.as_slice(), RecordKind::RaftAppend).await.unwrap_err();
        assert!(matches!(error, TransportError::BadRecord { source: CodecError::TooLong { .. }, .. }));
    }

    #[test]
    fn a_request_and_both_answers_survive_the_wire() {
        let request = RequestFrame { channel: Channel::Propose, timeout_ms: 900, body: Bytes::from_static(b"x") };
        assert_eq!(RequestFrame::decode(request.encode().into()).unwrap(), request);
        assert!(RequestFrame::decode(Bytes::from_static(b"short")).is_err());

        let served = encode_response(&Ok(Bytes::from_static(b"yes")));
        assert_eq!(decode_response(HOST, served.into()).unwrap(), "yes");
        let refused = encode_response(&Err(Refusal::new("removed")));
        let error = decode_response(HOST, refused.into()).unwrap_err();
        assert_eq!(error, TransportError::Refused { host: HOST, why: "removed".into() });
        assert!(decode_response(HOST, Bytes::new()).is_err());
    }
}
