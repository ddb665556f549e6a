//! The transport of the product: QUIC with mutual TLS 1.3 (DESIGN §4).
//!
//! Each host dials its own connection to each peer and serves on the connections that others dial, over one UDP socket.
//! Bulk (snapshot chunks) is dialled from a second socket: what a host pulls arrives there, so it cannot push heartbeats
//! out of the receive buffer of the first (hazard H25). [`dial`] keeps the connections, [`serve`] answers, [`keys`]
//! holds the two keys without which a restarted host stays unreachable for half a minute.

mod dial;
pub mod keys;
mod serve;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use quinn::Endpoint;
use quinn::EndpointConfig;
use quinn::IdleTimeout;
use quinn::TransportConfig;
use quinn::VarInt;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::crypto::rustls::QuicServerConfig;
use quinn_proto::HashedConnectionIdGenerator;
use statemachine::HostId;
use statemachine::codec::RecordKind;
use thiserror::Error;

use self::dial::Dialer;
use self::keys::TransportKeys;
use super::Channel;
use super::Handler;
use super::Peer;
use super::PeerStream;
use super::RecordSink;
use super::RecordSource;
use super::Transport;
use super::TransportError;
use super::frame;
use crate::pki::Clients;
use crate::pki::Identity;
use crate::pki::PkiError;

pub const ALPN: &[u8] = b"quorate-raft/1";
const KEEP_ALIVE: Duration = Duration::from_millis(100);
const IDLE_TIMEOUT_MS: u32 = 1500;
const INITIAL_RTT: Duration = Duration::from_millis(5);
/// Requests that one peer may have open with us.
const MAX_STREAMS: u32 = 256;
/// Asked of the kernel, which grants up to its `rmem_max`.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Streams of elections and heartbeats overtake the rest of a connection.
const URGENT: i32 = 10;

#[derive(Debug, Error)]
pub enum QuicError {
    #[error("cannot listen on {address}/udp; another process may hold the port (`ss -ulpn`)")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("the host's identity does not make a TLS configuration")]
    Identity(#[from] PkiError),
    #[error("the TLS configuration has no cipher suite for QUIC")]
    NoInitialCipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// See the module.
pub struct QuicTransport {
    identity: Identity,
    endpoint: Endpoint,
    bulk_endpoint: Endpoint,
    peers: Arc<Dialer>,
    bulk_peers: Arc<Dialer>,
    handler: Arc<OnceLock<Arc<dyn Handler>>>,
}

impl QuicTransport {
    /// Binds the socket and starts to accept. Needs a tokio runtime.
    pub fn listen(
        identity: Identity,
        address: SocketAddr,
        keys: &TransportKeys,
    ) -> Result<Arc<QuicTransport>, QuicError> {
        let transport = Arc::new(transport_config());
        let tls = identity.server_config(Clients::Required, &[ALPN])?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
        server.transport_config(transport.clone());
        let tls = identity.client_config(&[ALPN])?;
        let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        client.transport_config(transport);

        let endpoint = bind(address, keys, Some(server))?;
        let bulk_endpoint = bind(SocketAddr::new(address.ip(), 0), keys, None)?;
        let handler = Arc::new(OnceLock::new());
        tokio::spawn(serve::accept(endpoint.clone(), identity.site(), handler.clone()));
        Ok(Arc::new(QuicTransport {
            peers: Arc::new(Dialer::new(identity.site(), endpoint.clone(), client.clone())),
            bulk_peers: Arc::new(Dialer::new(identity.site(), bulk_endpoint.clone(), client)),
            identity,
            endpoint,
            bulk_endpoint,
            handler,
        }))
    }

    /// Where it listens; of use when port 0 was asked for.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }
}

impl Transport for QuicTransport {
    fn local(&self) -> HostId {
        self.identity.host()
    }

    fn call(
        &self,
        to: Peer,
        channel: Channel,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let dialer = if channel.is_bulk() { self.bulk_peers.clone() } else { self.peers.clone() };
        let host = to.host;
        async move {
            if body.len() > frame::MAX_BODY {
                return Err(TransportError::TooLong { len: body.len(), limit: frame::MAX_BODY });
            }
            let exchange = dialer.call(to, channel, body, timeout);
            tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(TransportError::timeout(host, timeout)))
        }
        .boxed()
    }

    fn open(
        &self,
        to: Peer,
        channel: Channel,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<PeerStream, TransportError>> {
        let dialer = self.peers.clone();
        let host = to.host;
        async move {
            let opening = dialer.open(to, channel);
            tokio::time::timeout(timeout, opening).await.unwrap_or(Err(TransportError::timeout(host, timeout)))
        }
        .boxed()
    }

    fn serve(&self, handler: Arc<dyn Handler>) {
        if self.handler.set(handler).is_err() {
            tracing::warn!("the transport is served already; the second handler is ignored");
        }
    }

    fn round_trip(&self, host: HostId) -> Option<Duration> {
        self.peers.round_trip(host)
    }

    fn shutdown(&self) -> BoxFuture<'static, ()> {
        let endpoints = [self.endpoint.clone(), self.bulk_endpoint.clone()];
        async move {
            for endpoint in &endpoints {
                endpoint.close(VarInt::from_u32(0), b"shutting down");
            }
            // Peers learn at once that we are gone, instead of after the idle timeout.
            for endpoint in &endpoints {
                let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
            }
        }
        .boxed()
    }
}

fn transport_config() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    config
}

fn bind(address: SocketAddr, keys: &TransportKeys, server: Option<quinn::ServerConfig>) -> Result<Endpoint, QuicError> {
    let failed = |source| QuicError::Bind { address, source };
    let socket = std::net::UdpSocket::bind(address).map_err(failed)?;
    // Best effort: small buffers cost throughput, not correctness.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let mut config = EndpointConfig::new(keys.reset_key());
    let cid_key = keys.cid_key();
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
    Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).map_err(failed)
}

/// One direction of a QUIC stream as records of one kind.
struct QuicSink {
    peer: HostId,
    kind: RecordKind,
    stream: quinn::SendStream,
}

struct QuicSource {
    peer: HostId,
    kind: RecordKind,
    stream: quinn::RecvStream,
}

impl RecordSink for QuicSink {
    fn send(&mut self, payload: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        async move { frame::write_record(self.peer, &mut self.stream, self.kind, &payload).await }.boxed()
    }
}

impl RecordSource for QuicSource {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, TransportError>> {
        frame::read_record(self.peer, &mut self.stream, self.kind).boxed()
    }
}
