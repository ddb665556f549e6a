//! Answers the connections that peers dial.

use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use quinn::Connection;
use quinn::Endpoint;
use quinn::Incoming;
use quinn::RecvStream;
use quinn::SendStream;
use quinn::VarInt;
use rustls_pki_types::CertificateDer;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::codec::RecordKind;

use super::Handler;
use super::PeerStream;
use super::QuicSink;
use super::QuicSource;
use super::TransportError;
use super::URGENT;
use super::frame;
use super::frame::RequestFrame;
use crate::pki::PeerName;
use crate::transport::Refusal;

/// Longest handshake: a peer that stalls costs no more than this.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A request that opens and then says nothing.
const FIRST_RECORD: Duration = Duration::from_secs(10);
/// From here on, unproven source addresses must prove themselves first (QUIC Retry).
const BUSY_CONNECTIONS: usize = 256;
const REMOVED: VarInt = VarInt::from_u32(1);
const NOBODY: VarInt = VarInt::from_u32(2);
const NOT_READY: VarInt = VarInt::from_u32(3);

type SharedHandler = Arc<OnceLock<Arc<dyn Handler>>>;

pub(super) async fn accept(endpoint: Endpoint, site: SiteId, handler: SharedHandler) {
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() > BUSY_CONNECTIONS && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(connection(incoming, site, handler.clone()));
    }
}

async fn connection(incoming: Incoming, site: SiteId, handler: SharedHandler) {
    let address = incoming.remote_address();
    let connection = match tokio::time::timeout(HANDSHAKE, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%address, "a handshake failed: {error}"),
        Err(_) => return tracing::debug!(%address, "a handshake did not finish in time"),
    };
    let from = match peer_of(&connection, site) {
        Ok(host) => host,
        Err(why) => {
            tracing::warn!(%address, "refused a connection: {why}");
            return connection.close(NOBODY, why.as_bytes());
        }
    };
    let Some(handler) = handler.get().cloned() else {
        return connection.close(NOT_READY, b"this host is starting");
    };
    if !handler.admits(from) {
        tracing::warn!(%address, host = %from, "refused a connection: the host was removed from this site");
        return connection.close(REMOVED, b"this host was removed from the site");
    }
    while let Ok((send, receive)) = connection.accept_bi().await {
        if !handler.admits(from) {
            return connection.close(REMOVED, b"this host was removed from the site");
        }
        let handler = handler.clone();
        tokio::spawn(async move {
            if let Err(error) = stream(from, handler, send, receive).await {
                tracing::debug!(host = %from, "a stream ended: {error}");
            }
        });
    }
}

/// The chain was verified by TLS; what is left is whom it names.
fn peer_of(connection: &Connection, site: SiteId) -> Result<HostId, String> {
    let identity = connection.peer_identity().ok_or("it showed no certificate")?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| "it showed no certificate")?;
    let certificate = chain.first().ok_or("it showed no certificate")?;
    let name = PeerName::of_certificate(certificate).map_err(|error| error.to_string())?;
    if name.site != site {
        return Err(format!("its certificate is of site {}", name.site));
    }
    Ok(name.host)
}

async fn stream(
    from: HostId,
    handler: Arc<dyn Handler>,
    mut send: SendStream,
    mut receive: RecvStream,
) -> Result<(), TransportError> {
    let first = frame::read_record(from, &mut receive, RecordKind::PeerRequest);
    let first = tokio::time::timeout(FIRST_RECORD, first).await;
    let Some(first) = first.unwrap_or(Err(TransportError::timeout(from, FIRST_RECORD)))? else {
        return Ok(());
    };
    let request = match RequestFrame::decode(first) {
        Ok(request) => request,
        // A newer peer may ask for what this build does not know: it gets an answer, not silence.
        Err(error) => return respond(from, &mut send, Err(Refusal::new(error))).await,
    };
    if request.channel.is_urgent() {
        let _ = send.set_priority(URGENT);
    }
    if request.channel.is_stream() {
        let stream = PeerStream {
            sink: Box::new(QuicSink { peer: from, kind: RecordKind::RaftAppendAck, stream: send }),
            source: Box::new(QuicSource { peer: from, kind: RecordKind::RaftAppend, stream: receive }),
        };
        handler.stream(from, request.channel, stream).await;
        return Ok(());
    }
    // After its own timeout the caller is gone, and so is the reason to work.
    let limit = Duration::from_millis(request.timeout_ms.into());
    let call = handler.call(from, request.channel, request.body);
    let response = tokio::time::timeout(limit, call).await;
    respond(from, &mut send, response.unwrap_or_else(|_| Err(Refusal::new("not done within the caller's timeout"))))
        .await
}

async fn respond(
    from: HostId,
    send: &mut SendStream,
    response: Result<bytes::Bytes, Refusal>,
) -> Result<(), TransportError> {
    let too_long = matches!(&response, Ok(body) if body.len() > frame::MAX_BODY);
    let response = if too_long { Err(Refusal::new("the answer exceeds the limit of a message")) } else { response };
    frame::write_record(from, send, RecordKind::PeerResponse, &frame::encode_response(&response)).await?;
    send.finish().map_err(|error| TransportError::Closed { host: from, why: error.to_string() })
}
