//! Our connections to peers: dialled when first needed, kept, replaced when dead.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use quinn::Endpoint;
use quinn::RecvStream;
use quinn::SendStream;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::codec::RecordKind;

use super::Channel;
use super::Peer;
use super::PeerStream;
use super::QuicSink;
use super::QuicSource;
use super::TransportError;
use super::URGENT;
use super::frame;
use super::frame::RequestFrame;
use crate::pki;

/// One connection a peer. Concurrent callers of an unconnected peer wait for one handshake.
pub(super) struct Dialer {
    site: SiteId,
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    links: Mutex<BTreeMap<HostId, Arc<Link>>>,
}

#[derive(Default)]
struct Link {
    current: Mutex<Option<(String, Connection)>>,
    dialling: tokio::sync::Mutex<()>,
}

impl Link {
    /// The live connection, if it goes to this address.
    fn live(&self, address: &str) -> Option<Connection> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match current.as_ref() {
            Some((dialled, connection)) if dialled == address && connection.close_reason().is_none() => {
                Some(connection.clone())
            }
            _ => None,
        }
    }
}

impl Dialer {
    pub(super) fn new(site: SiteId, endpoint: Endpoint, config: quinn::ClientConfig) -> Dialer {
        Dialer { site, endpoint, config, links: Mutex::default() }
    }

    pub(super) fn round_trip(&self, host: HostId) -> Option<Duration> {
        let link = self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&host)?.clone();
        let current = link.current.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, connection) = current.as_ref()?;
        connection.close_reason().is_none().then(|| connection.rtt())
    }

    pub(super) async fn call(
        &self,
        to: Peer,
        channel: Channel,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, TransportError> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let host = to.host;
        let (mut send, mut receive) = self.request(&to, RequestFrame { channel, timeout_ms, body }).await?;
        // A refused stream shows up here; the answer below says why.
        let _ = send.finish();
        let response = frame::read_record(host, &mut receive, RecordKind::PeerResponse).await?;
        let response = response
            .ok_or_else(|| TransportError::Closed { host, why: "it ended the request without an answer".to_owned() })?;
        frame::decode_response(host, response)
    }

    pub(super) async fn open(&self, to: Peer, channel: Channel) -> Result<PeerStream, TransportError> {
        let host = to.host;
        let opening = RequestFrame { channel, timeout_ms: 0, body: Bytes::new() };
        let (send, receive) = self.request(&to, opening).await?;
        Ok(PeerStream {
            sink: Box::new(QuicSink { peer: host, kind: RecordKind::RaftAppend, stream: send }),
            source: Box::new(QuicSource { peer: host, kind: RecordKind::RaftAppendAck, stream: receive }),
        })
    }

    async fn request(&self, to: &Peer, request: RequestFrame) -> Result<(SendStream, RecvStream), TransportError> {
        let connection = self.connection(to).await?;
        let (mut send, receive) = connection
            .open_bi()
            .await
            .map_err(|error| TransportError::Unreachable { host: to.host, why: error.to_string() })?;
        if request.channel.is_urgent() {
            let _ = send.set_priority(URGENT);
        }
        frame::write_record(to.host, &mut send, RecordKind::PeerRequest, &request.encode()).await?;
        Ok((send, receive))
    }

    async fn connection(&self, to: &Peer) -> Result<Connection, TransportError> {
        let link = {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            links.entry(to.host).or_default().clone()
        };
        if let Some(connection) = link.live(&to.address) {
            return Ok(connection);
        }
        let _turn = link.dialling.lock().await;
        if let Some(connection) = link.live(&to.address) {
            return Ok(connection);
        }
        let connection = self.dial(to).await?;
        *link.current.lock().unwrap_or_else(PoisonError::into_inner) = Some((to.address.clone(), connection.clone()));
        Ok(connection)
    }

    async fn dial(&self, to: &Peer) -> Result<Connection, TransportError> {
        let unreachable = |why: String| TransportError::Unreachable { host: to.host, why };
        let address = self.resolve(to).await?;
        // TLS checks this name against the certificate: it is that host of this site, or nobody.
        let name = pki::server_name(self.site, to.host);
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), address, &name)
            .map_err(|error| unreachable(format!("{address}: {error}")))?;
        connecting.await.map_err(|error| unreachable(format!("{address}: {error}")))
    }

    async fn resolve(&self, to: &Peer) -> Result<SocketAddr, TransportError> {
        let unreachable = |why: String| TransportError::Unreachable { host: to.host, why };
        if let Ok(address) = to.address.parse() {
            return Ok(address);
        }
        let local = self.endpoint.local_addr().map_err(|error| unreachable(error.to_string()))?;
        let mut found = tokio::net::lookup_host(&to.address)
            .await
            .map_err(|error| unreachable(format!("{} does not resolve: {error}", to.address)))?;
        // A socket of IPv6 reaches both families; one of IPv4 only its own.
        found
            .find(|address| local.is_ipv6() || address.is_ipv4())
            .ok_or_else(|| unreachable(format!("{} has no address that this host can use", to.address)))
    }
}
