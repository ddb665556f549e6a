//! The wires between simulated hosts. Every message waits here until its time; links are cut one way or both, lose, and
//! delay. Streams keep their order and live through a short cut, as QUIC's do; requests do not.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::BinaryHeap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering as Atomic;
use std::time::Duration;

use bytes::Bytes;
use consensus::platform::Clock;
use consensus::transport::Channel;
use consensus::transport::Handler;
use consensus::transport::Peer;
use consensus::transport::PeerStream;
use consensus::transport::RecordSink;
use consensus::transport::RecordSource;
use consensus::transport::Transport;
use consensus::transport::TransportError;
use futures::FutureExt;
use futures::future::BoxFuture;
use hostd::grants::wire::HEARTBEAT;
use statemachine::HostId;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::clock::HostClock;
use super::random::Dice;
use super::trace::Trace;

/// A stream's record meets a cut link: it is tried again after this long.
const RETRANSMIT_MS: u64 = 200;
/// A connection that is silent for so long is lost, with its streams and open requests (the product's idle timeout).
const IDLE_MS: u64 = 1_500;
const HEARTBEATS_KEPT: usize = 256;

#[derive(Clone)]
pub struct Network(Arc<Mutex<Wires>>);

/// One life of a host's process: what was meant for an earlier one is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Life {
    pub host: HostId,
    pub number: u64,
}

struct Endpoint {
    life: u64,
    runtime: Handle,
    handler: Option<Arc<dyn Handler>>,
}

struct Wires {
    now_ms: u64,
    order: u64,
    queue: BinaryHeap<Packet>,
    endpoints: BTreeMap<HostId, Endpoint>,
    cut: BTreeSet<(HostId, HostId)>,
    /// Extra delay of a host's links.
    slow: BTreeMap<HostId, u64>,
    /// One message in so many is lost; 0 is none.
    loss_one_in: u64,
    dice: Dice,
    trace: Trace,
    /// When each host's heartbeats left it, by its own clock: what its leases may count from.
    heartbeats: BTreeMap<HostId, VecDeque<u64>>,
    pub late_answers: u64,
    pub delivered: u64,
}

struct Packet {
    at_ms: u64,
    order: u64,
    first_try_ms: u64,
    from: Life,
    to: HostId,
    load: Load,
}

type Answer = Result<Bytes, TransportError>;

enum Load {
    Request { channel: Channel, body: Bytes, reply: oneshot::Sender<Answer> },
    Answer { reply: oneshot::Sender<Answer>, answer: Answer },
    Open { channel: Channel, far: StreamEnd, reply: oneshot::Sender<Result<(), TransportError>> },
    Opened { reply: oneshot::Sender<Result<(), TransportError>>, answer: Result<(), TransportError> },
    Record { record: Record },
}

/// A record and its place in its stream.
struct Record {
    wire: mpsc::UnboundedSender<Result<Bytes, TransportError>>,
    number: u64,
    /// The number that the receiver waits for.
    expected: Arc<AtomicU64>,
    payload: Bytes,
}

struct StreamEnd {
    wire: Wire,
    receiver: mpsc::UnboundedReceiver<Result<Bytes, TransportError>>,
}

// A min-heap by time, then by the order of sending.
impl PartialEq for Packet {
    fn eq(&self, other: &Packet) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Packet {}
impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Packet) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Packet {
    fn cmp(&self, other: &Packet) -> Ordering {
        (other.at_ms, other.order).cmp(&(self.at_ms, self.order))
    }
}

impl Network {
    pub fn new(seed: u64, trace: Trace) -> Network {
        Network(Arc::new(Mutex::new(Wires {
            now_ms: 0,
            order: 0,
            queue: BinaryHeap::new(),
            endpoints: BTreeMap::new(),
            cut: BTreeSet::new(),
            slow: BTreeMap::new(),
            loss_one_in: 0,
            dice: Dice::new(seed ^ 0x6e65_7477),
            trace,
            heartbeats: BTreeMap::new(),
            late_answers: 0,
            delivered: 0,
        })))
    }

    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host's process begins a life; its transport speaks for that life alone.
    pub fn attach(&self, life: Life, runtime: Handle, clock: Arc<HostClock>) -> Arc<SimTransport> {
        let endpoint = Endpoint { life: life.number, runtime, handler: None };
        self.wires().endpoints.insert(life.host, endpoint);
        Arc::new(SimTransport { life, clock, network: self.clone() })
    }

    pub fn detach(&self, host: HostId) {
        self.wires().endpoints.remove(&host);
    }

    pub fn cut(&self, from: HostId, to: HostId) {
        self.wires().cut.insert((from, to));
    }

    pub fn heal(&self, from: HostId, to: HostId) {
        self.wires().cut.remove(&(from, to));
    }

    /// Would a byte that is sent now arrive at a process?
    pub fn carries(&self, from: HostId, to: HostId) -> bool {
        let wires = self.wires();
        !wires.cut.contains(&(from, to)) && wires.endpoints.contains_key(&to)
    }

    pub fn slow(&self, host: HostId, extra_ms: u64) {
        if extra_ms == 0 {
            self.wires().slow.remove(&host);
        } else {
            self.wires().slow.insert(host, extra_ms);
        }
    }

    pub fn lose_one_in(&self, n: u64) {
        self.wires().loss_one_in = n;
    }

    pub fn late_answers(&self) -> u64 {
        self.wires().late_answers
    }

    fn note_heartbeat(&self, host: HostId, local_ns: u64) {
        let mut wires = self.wires();
        let sent = wires.heartbeats.entry(host).or_default();
        sent.push_back(local_ns);
        if sent.len() > HEARTBEATS_KEPT {
            sent.pop_front();
        }
    }

    /// Did a heartbeat leave the host at this moment of its clock?
    pub fn heartbeat_left(&self, host: HostId, local_ns: u64) -> bool {
        self.wires().heartbeats.get(&host).is_some_and(|sent| sent.contains(&local_ns))
    }

    pub fn delivered(&self) -> u64 {
        self.wires().delivered
    }

    /// Delivers what is due, in the order of time.
    pub fn deliver(&self, now_ms: u64) {
        loop {
            let mut wires = self.wires();
            wires.now_ms = now_ms;
            if wires.queue.peek().is_none_or(|packet| packet.at_ms > now_ms) {
                return;
            }
            let Some(packet) = wires.queue.pop() else { return };
            let arrival = wires.arrive(packet);
            // Handlers and wakers run without the lock: they may send.
            drop(wires);
            if let Some(arrival) = arrival {
                arrival.act(self);
            }
        }
    }

    fn send(&self, from: Life, to: HostId, load: Load) {
        self.wires().send(from, to, load, None);
    }
}

impl Wires {
    fn send(&mut self, from: Life, to: HostId, load: Load, not_before_ms: Option<u64>) -> u64 {
        let mut delay_ms = self.dice.range(1..4);
        if self.dice.one_in(40) {
            delay_ms += self.dice.range(5..40);
        }
        delay_ms += [from.host, to].iter().filter_map(|host| self.slow.get(host)).sum::<u64>();
        let at_ms = (self.now_ms + delay_ms).max(not_before_ms.unwrap_or(0));
        self.order += 1;
        self.queue.push(Packet { at_ms, order: self.order, first_try_ms: self.now_ms, from, to, load });
        at_ms
    }

    fn arrive(&mut self, packet: Packet) -> Option<Arrival> {
        // A process that is gone sends nothing more, and hears nothing that was meant for it.
        if self.cut.contains(&(packet.from.host, packet.to)) {
            return self.lose(packet);
        }
        if let Load::Record { record } = &packet.load
            && record.number != record.expected.load(Atomic::Relaxed)
        {
            // One before it is still being sent again.
            let at_ms = self.now_ms + 1;
            self.queue.push(Packet { at_ms, ..packet });
            return None;
        }
        let may_be_lost = !matches!(packet.load, Load::Record { .. });
        if may_be_lost && self.loss_one_in > 0 && self.dice.one_in(self.loss_one_in) {
            return None;
        }
        self.delivered += 1;
        self.trace.packet(self.now_ms, packet.from.host, packet.to, &packet.load.summary());
        match packet.load {
            Load::Answer { reply, answer } => {
                self.late_answers += u64::from(reply.is_closed());
                Some(Arrival::Answer { reply, answer })
            }
            Load::Opened { reply, answer } => Some(Arrival::Opened { reply, answer }),
            Load::Record { record } => {
                record.expected.fetch_add(1, Atomic::Relaxed);
                Some(Arrival::Record { wire: record.wire, payload: record.payload })
            }
            load @ (Load::Request { .. } | Load::Open { .. }) => self.call(packet.from, packet.to, load),
        }
    }

    fn call(&mut self, from: Life, to: HostId, load: Load) -> Option<Arrival> {
        let endpoint = self.endpoints.get(&to);
        let Some((endpoint, handler)) = endpoint.and_then(|it| Some((it, it.handler.clone()?))) else {
            let error = TransportError::Unreachable { host: to, why: "it is not running".to_owned() };
            return Some(load.refuse(error));
        };
        if !handler.admits(from.host) {
            let why = format!("host {} was removed from this site", from.host);
            return Some(load.refuse(TransportError::Refused { host: to, why }));
        }
        let life = Life { host: to, number: endpoint.life };
        Some(Arrival::Call { from, life, runtime: endpoint.runtime.clone(), handler, load })
    }

    /// A cut link loses requests and answers. A stream's record is sent again, in its place, until the stream is broken.
    fn lose(&mut self, packet: Packet) -> Option<Arrival> {
        let Packet { first_try_ms, from, to, load, order, .. } = packet;
        let Load::Record { record } = load else { return None };
        if self.now_ms.saturating_sub(first_try_ms) > IDLE_MS {
            return Some(Arrival::Broken { wire: record.wire, host: from.host });
        }
        let at_ms = self.now_ms + RETRANSMIT_MS;
        self.queue.push(Packet { at_ms, order, first_try_ms, from, to, load: Load::Record { record } });
        None
    }
}

impl Load {
    fn summary(&self) -> (u8, u16, usize) {
        match self {
            Load::Request { channel, body, .. } => (1, channel.to_wire().0, body.len()),
            Load::Answer { answer, .. } => (2, u16::from(answer.is_ok()), answer.as_ref().map_or(0, Bytes::len)),
            Load::Open { channel, .. } => (3, channel.to_wire().0, 0),
            Load::Opened { answer, .. } => (4, u16::from(answer.is_ok()), 0),
            Load::Record { record } => (5, 0, record.payload.len()),
        }
    }

    /// A connection that nobody accepts is refused at once, as a port without a listener is.
    fn refuse(self, error: TransportError) -> Arrival {
        match self {
            Load::Request { reply, .. } => Arrival::Answer { reply, answer: Err(error) },
            Load::Open { reply, .. } => Arrival::Opened { reply, answer: Err(error) },
            Load::Answer { .. } | Load::Opened { .. } | Load::Record { .. } => Arrival::Nothing,
        }
    }
}

enum Arrival {
    Nothing,
    Answer { reply: oneshot::Sender<Answer>, answer: Answer },
    Opened { reply: oneshot::Sender<Result<(), TransportError>>, answer: Result<(), TransportError> },
    Record { wire: mpsc::UnboundedSender<Result<Bytes, TransportError>>, payload: Bytes },
    Broken { wire: mpsc::UnboundedSender<Result<Bytes, TransportError>>, host: HostId },
    Call { from: Life, life: Life, runtime: Handle, handler: Arc<dyn Handler>, load: Load },
}

impl Arrival {
    fn act(self, network: &Network) {
        match self {
            Arrival::Nothing => {}
            Arrival::Answer { reply, answer } => drop(reply.send(answer)),
            Arrival::Opened { reply, answer } => drop(reply.send(answer)),
            Arrival::Record { wire, payload } => drop(wire.send(Ok(payload))),
            Arrival::Broken { wire, host } => {
                let why = "its link is cut".to_owned();
                drop(wire.send(Err(TransportError::Closed { host, why })));
            }
            Arrival::Call { from, life, runtime, handler, load: Load::Request { channel, body, reply } } => {
                let network = network.clone();
                // As over a real network, a caller that gives up does not stop the work that it asked for.
                runtime.spawn(async move {
                    let served = handler.call(from.host, channel, body).await;
                    let answer =
                        served.map_err(|refusal| TransportError::Refused { host: life.host, why: refusal.why });
                    network.send(life, from.host, Load::Answer { reply, answer });
                });
            }
            Arrival::Call { from, life, runtime, handler, load: Load::Open { channel, far, reply } } => {
                network.send(life, from.host, Load::Opened { reply, answer: Ok(()) });
                let StreamEnd { mut wire, receiver } = far;
                wire.from = life;
                let stream =
                    PeerStream { sink: Box::new(Sink(wire)), source: Box::new(Source { from: from.host, receiver }) };
                runtime.spawn(async move { handler.stream(from.host, channel, stream).await });
            }
            Arrival::Call { .. } => {}
        }
    }
}

/// One direction of a stream. Records leave in order and arrive in order.
struct Wire {
    network: Network,
    from: Life,
    to: HostId,
    sender: mpsc::UnboundedSender<Result<Bytes, TransportError>>,
    last_ms: u64,
    sent: u64,
    expected: Arc<AtomicU64>,
}

struct Sink(Wire);

impl RecordSink for Sink {
    fn send(&mut self, payload: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        let wire = &mut self.0;
        if wire.sender.is_closed() {
            let why = "the other side ended it".to_owned();
            return futures::future::ready(Err(TransportError::Closed { host: wire.to, why })).boxed();
        }
        let (sender, expected) = (wire.sender.clone(), wire.expected.clone());
        let load = Load::Record { record: Record { wire: sender, number: wire.sent, expected, payload } };
        wire.sent += 1;
        wire.last_ms = wire.network.wires().send(wire.from, wire.to, load, Some(wire.last_ms));
        futures::future::ready(Ok(())).boxed()
    }
}

struct Source {
    from: HostId,
    receiver: mpsc::UnboundedReceiver<Result<Bytes, TransportError>>,
}

impl RecordSource for Source {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, TransportError>> {
        async move {
            match self.receiver.recv().await {
                Some(Ok(payload)) => Ok(Some(payload)),
                Some(Err(error)) => Err(error),
                None => {
                    let why = "the other side is gone".to_owned();
                    Err(TransportError::Closed { host: self.from, why })
                }
            }
        }
        .boxed()
    }
}

/// One life's end of the network.
pub struct SimTransport {
    life: Life,
    clock: Arc<HostClock>,
    network: Network,
}

impl Transport for SimTransport {
    fn local(&self) -> HostId {
        self.life.host
    }

    fn call(&self, to: Peer, channel: Channel, body: Bytes, timeout: Duration) -> BoxFuture<'static, Answer> {
        let (reply, answered) = oneshot::channel();
        if channel == Channel::Peer(HEARTBEAT) {
            self.network.note_heartbeat(self.life.host, self.clock.boottime_ns());
        }
        self.network.send(self.life, to.host, Load::Request { channel, body, reply });
        async move {
            let answer = async {
                match answered.await {
                    Ok(answer) => answer,
                    Err(_) => Err(silence(to.host).await),
                }
            };
            let late = || Err(timed_out(to.host, timeout));
            tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| late())
        }
        .boxed()
    }

    fn open(
        &self,
        to: Peer,
        channel: Channel,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<PeerStream, TransportError>> {
        let (there, there_receiver) = mpsc::unbounded_channel();
        let (back, back_receiver) = mpsc::unbounded_channel();
        let wire = |from, to, sender| Wire {
            network: self.network.clone(),
            from,
            to,
            sender,
            last_ms: 0,
            sent: 0,
            expected: Arc::default(),
        };
        // The far end learns its own life when it is served.
        let far = StreamEnd { wire: wire(self.life, self.life.host, back), receiver: there_receiver };
        let near = PeerStream {
            sink: Box::new(Sink(wire(self.life, to.host, there))),
            source: Box::new(Source { from: to.host, receiver: back_receiver }),
        };
        let (reply, opened) = oneshot::channel();
        self.network.send(self.life, to.host, Load::Open { channel, far, reply });
        async move {
            let answer = async {
                match opened.await {
                    Ok(answer) => answer,
                    Err(_) => Err(silence(to.host).await),
                }
            };
            match tokio::time::timeout(timeout, answer).await {
                Ok(Ok(())) => Ok(near),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(timed_out(to.host, timeout)),
            }
        }
        .boxed()
    }

    fn serve(&self, handler: Arc<dyn Handler>) {
        let mut wires = self.network.wires();
        let own = wires.endpoints.get_mut(&self.life.host).filter(|endpoint| endpoint.life == self.life.number);
        if let Some(endpoint) = own {
            endpoint.handler = Some(handler);
        }
    }

    fn round_trip(&self, _host: HostId) -> Option<Duration> {
        Some(Duration::from_millis(4))
    }

    fn shutdown(&self) -> BoxFuture<'static, ()> {
        let (network, life) = (self.network.clone(), self.life);
        async move {
            let mut wires = network.wires();
            if wires.endpoints.get(&life.host).is_some_and(|endpoint| endpoint.life == life.number) {
                wires.endpoints.remove(&life.host);
            }
        }
        .boxed()
    }
}

/// A message was lost, or the process that worked on it died: the connection says so once it was silent for long.
async fn silence(host: HostId) -> TransportError {
    tokio::time::sleep(Duration::from_millis(IDLE_MS)).await;
    TransportError::Closed { host, why: "the connection was silent for too long".to_owned() }
}

fn timed_out(host: HostId, after: Duration) -> TransportError {
    TransportError::Timeout { host, after_ms: after.as_millis() as u64 }
}
