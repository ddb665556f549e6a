//! Hosts of one process, joined by channels: for tests and simulation.
//!
//! [`Switchboard`] is the network. It cuts links one way or both, and delays them; it knows no randomness, so under a
//! paused clock a run repeats exactly.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::HostId;
use tokio::sync::mpsc;

use super::Channel;
use super::Handler;
use super::Peer;
use super::PeerStream;
use super::RecordSink;
use super::RecordSource;
use super::Transport;
use super::TransportError;

/// Records on their way in one direction of a stream.
const STREAM_RECORDS: usize = 64;

#[derive(Clone, Default)]
pub struct Switchboard {
    wires: Arc<Mutex<Wires>>,
}

#[derive(Default)]
struct Wires {
    handlers: BTreeMap<HostId, Arc<dyn Handler>>,
    cut: BTreeSet<(HostId, HostId)>,
    delay: Duration,
}

impl Switchboard {
    pub fn new() -> Switchboard {
        Switchboard::default()
    }

    /// The transport of one host.
    pub fn transport(&self, host: HostId) -> Arc<MemoryTransport> {
        Arc::new(MemoryTransport { host, switchboard: self.clone() })
    }

    /// Nothing that `from` sends reaches `to` any more; streams over it break.
    pub fn cut(&self, from: HostId, to: HostId) {
        self.wires().cut.insert((from, to));
    }

    /// Cuts `host` off from everybody, both ways.
    pub fn isolate(&self, host: HostId) {
        let others: Vec<HostId> = self.wires().handlers.keys().copied().filter(|other| *other != host).collect();
        for other in others {
            self.cut(host, other);
            self.cut(other, host);
        }
    }

    /// All links work again.
    pub fn heal(&self) {
        self.wires().cut.clear();
    }

    /// Every message takes this long, one way.
    pub fn set_delay(&self, delay: Duration) {
        self.wires().delay = delay;
    }

    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_cut(&self, from: HostId, to: HostId) -> bool {
        self.wires().cut.contains(&(from, to))
    }

    fn delay(&self) -> Duration {
        self.wires().delay
    }

    fn handler(&self, host: HostId) -> Option<Arc<dyn Handler>> {
        self.wires().handlers.get(&host).cloned()
    }

    async fn travel(&self) {
        let delay = self.delay();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
    }

    /// The way there: a lost message is silence, an absent or refusing host an error.
    async fn arrive(&self, from: HostId, to: HostId) -> Result<Arc<dyn Handler>, TransportError> {
        self.travel().await;
        if self.is_cut(from, to) {
            return std::future::pending().await;
        }
        let handler = self
            .handler(to)
            .ok_or_else(|| TransportError::Unreachable { host: to, why: "it is not running".to_owned() })?;
        if !handler.admits(from) {
            return Err(TransportError::Refused { host: to, why: format!("host {from} was removed from this site") });
        }
        Ok(handler)
    }

    async fn request(self, from: HostId, to: HostId, channel: Channel, body: Bytes) -> Result<Bytes, TransportError> {
        let handler = self.arrive(from, to).await?;
        // As over a real network, a caller that gives up does not stop the work that it asked for.
        let served = tokio::spawn(handler.call(from, channel, body));
        let response = served.await.map_err(|error| TransportError::Closed { host: to, why: error.to_string() })?;
        self.travel().await;
        if self.is_cut(to, from) {
            return std::future::pending().await;
        }
        response.map_err(|refusal| TransportError::Refused { host: to, why: refusal.why })
    }

    async fn join(self, from: HostId, to: HostId, channel: Channel) -> Result<PeerStream, TransportError> {
        let handler = self.arrive(from, to).await?;
        let (near_sink, far_source) = self.wire(from, to);
        let (far_sink, near_source) = self.wire(to, from);
        let far = PeerStream { sink: Box::new(far_sink), source: Box::new(far_source) };
        tokio::spawn(handler.stream(from, channel, far));
        Ok(PeerStream { sink: Box::new(near_sink), source: Box::new(near_source) })
    }

    fn wire(&self, from: HostId, to: HostId) -> (WireSink, WireSource) {
        let (sender, receiver) = mpsc::channel(STREAM_RECORDS);
        (WireSink { to, sender }, WireSource { from, to, receiver, switchboard: self.clone() })
    }
}

struct WireSink {
    to: HostId,
    sender: mpsc::Sender<(tokio::time::Instant, Bytes)>,
}

struct WireSource {
    from: HostId,
    to: HostId,
    receiver: mpsc::Receiver<(tokio::time::Instant, Bytes)>,
    switchboard: Switchboard,
}

impl RecordSink for WireSink {
    fn send(&mut self, payload: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        async move {
            let sent = self.sender.send((tokio::time::Instant::now(), payload)).await;
            sent.map_err(|_| TransportError::Closed { host: self.to, why: "the other side ended it".to_owned() })
        }
        .boxed()
    }
}

impl RecordSource for WireSource {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, TransportError>> {
        async move {
            let Some((sent_at, payload)) = self.receiver.recv().await else {
                return Ok(None);
            };
            let delay = self.switchboard.delay();
            if !delay.is_zero() {
                tokio::time::sleep_until(sent_at + delay).await;
            }
            if self.switchboard.is_cut(self.from, self.to) {
                let why = "its link was cut".to_owned();
                return Err(TransportError::Closed { host: self.from, why });
            }
            Ok(Some(payload))
        }
        .boxed()
    }
}

/// One host's end of a [`Switchboard`].
pub struct MemoryTransport {
    host: HostId,
    switchboard: Switchboard,
}

impl Transport for MemoryTransport {
    fn local(&self) -> HostId {
        self.host
    }

    fn call(
        &self,
        to: Peer,
        channel: Channel,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let request = self.switchboard.clone().request(self.host, to.host, channel, body);
        async move {
            tokio::time::timeout(timeout, request).await.unwrap_or(Err(TransportError::timeout(to.host, timeout)))
        }
        .boxed()
    }

    fn open(
        &self,
        to: Peer,
        channel: Channel,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<PeerStream, TransportError>> {
        let join = self.switchboard.clone().join(self.host, to.host, channel);
        async move { tokio::time::timeout(timeout, join).await.unwrap_or(Err(TransportError::timeout(to.host, timeout))) }
            .boxed()
    }

    fn serve(&self, handler: Arc<dyn Handler>) {
        self.switchboard.wires().handlers.insert(self.host, handler);
    }

    fn round_trip(&self, _host: HostId) -> Option<Duration> {
        Some(self.switchboard.delay() * 2)
    }

    fn shutdown(&self) -> BoxFuture<'static, ()> {
        let (switchboard, host) = (self.switchboard.clone(), self.host);
        async move {
            switchboard.wires().handlers.remove(&host);
        }
        .boxed()
    }
}
