//! Our connections to peers: dialled when first needed, kept, replaced when dead.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::future::Shared;
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

/// One connection a peer. A handshake runs to its own end, however little time its callers have: a caller that gives up after
/// a heartbeat's time must not end the handshake with it, or a peer whose handshake takes longer than that is never reached.
pub(super) struct Dialer {
    caller: Caller,
    links: Mutex<BTreeMap<HostId, Arc<Link>>>,
}

/// What a handshake needs.
#[derive(Clone)]
struct Caller {
    site: SiteId,
    endpoint: Endpoint,
    config: quinn::ClientConfig,
}

type Dialling = Shared<BoxFuture<'static, Result<Connection, String>>>;

#[derive(Default)]
struct Link {
    state: Mutex<LinkState>,
}

#[derive(Default)]
enum LinkState {
    #[default]
    Down,
    /// The address that is dialled, and the handshake, which all callers wait for.
    Dialling(String, Dialling),
    Up(String, Connection),
}

impl Link {
    fn state(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handshake that is under way or was finished for this address, else a new one.
    fn dial(self: &Arc<Self>, to: &Peer, caller: &Caller) -> Dialling {
        let mut state = self.state();
        match &*state {
            LinkState::Up(address, connection) if *address == to.address && connection.close_reason().is_none() => {
                futures::future::ready(Ok(connection.clone())).boxed().shared()
            }
            LinkState::Dialling(address, dialling) if *address == to.address && dialling.peek().is_none() => {
                dialling.clone()
            }
            _ => {
                let (link, to, caller) = (self.clone(), to.clone(), caller.clone());
                let address = to.address.clone();
                let task = tokio::spawn(async move {
                    let dialled = caller.dial(&to).await;
                    link.end_dialling(&to.address, dialled.as_ref().ok());
                    dialled
                });
                let dialling =
                    async move { task.await.unwrap_or_else(|_| Err("the transport is stopping".to_owned())) };
                let dialling = dialling.boxed().shared();
                *state = LinkState::Dialling(address, dialling.clone());
                dialling
            }
        }
    }

    fn end_dialling(&self, address: &str, connection: Option<&Connection>) {
        let mut state = self.state();
        // Another address may be dialled by now; its handshake is the one that counts.
        if matches!(&*state, LinkState::Dialling(dialled, _) if dialled == address) {
            *state =
                connection.map_or(LinkState::Down, |connection| LinkState::Up(address.to_owned(), connection.clone()));
        }
    }

    fn round_trip(&self) -> Option<Duration> {
        match &*self.state() {
            LinkState::Up(_, connection) if connection.close_reason().is_none() => Some(connection.rtt()),
            _ => None,
        }
    }
}

impl Dialer {
    pub(super) fn new(site: SiteId, endpoint: Endpoint, config: quinn::ClientConfig) -> Dialer {
        Dialer { caller: Caller { site, endpoint, config }, links: Mutex::default() }
    }

    fn link(&self, host: HostId) -> Arc<Link> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).entry(host).or_default().clone()
    }

    pub(super) fn round_trip(&self, host: HostId) -> Option<Duration> {
        self.link(host).round_trip()
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
        let dialled = self.link(to.host).dial(to, &self.caller).await;
        dialled.map_err(|why| TransportError::Unreachable { host: to.host, why })
    }
}

impl Caller {
    async fn dial(&self, to: &Peer) -> Result<Connection, String> {
        let address = self.resolve(to).await?;
        // TLS checks this name against the certificate: it is that host of this site, or nobody.
        let name = pki::server_name(self.site, to.host);
        let failed = |error: &dyn std::error::Error| format!("{address}: {error}");
        let connecting =
            self.endpoint.connect_with(self.config.clone(), address, &name).map_err(|error| failed(&error))?;
        connecting.await.map_err(|error| failed(&error))
    }

    async fn resolve(&self, to: &Peer) -> Result<SocketAddr, String> {
        if let Ok(address) = to.address.parse() {
            return Ok(address);
        }
        let local = self.endpoint.local_addr().map_err(|error| error.to_string())?;
        let mut found = tokio::net::lookup_host(&to.address)
            .await
            .map_err(|error| format!("{} does not resolve: {error}", to.address))?;
        // A socket of IPv6 reaches both families; one of IPv4 only its own.
        found
            .find(|address| local.is_ipv6() || address.is_ipv4())
            .ok_or_else(|| format!("{} has no address that this host can use", to.address))
    }
}
