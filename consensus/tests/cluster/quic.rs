//! The same over real QUIC on loopback: certificates, restarts, removals.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consensus::pki::ClusterCa;
use consensus::platform::RealEntropy;
use consensus::transport::Channel;
use consensus::transport::Handler;
use consensus::transport::Peer;
use consensus::transport::PeerKind;
use consensus::transport::PeerStream;
use consensus::transport::Refusal;
use consensus::transport::Transport;
use consensus::transport::TransportError;
use consensus::transport::quic::QuicTransport;
use consensus::transport::quic::keys::TransportKeys;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::command::Command;
use tokio::net::UdpSocket;
use uuid::Uuid;

use crate::world::FIRST;
use crate::world::Site;
use crate::world::identity;
use crate::world::keyed;
use crate::world::now_ms;
use crate::world::root;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hosts_commit_over_quic_through_the_loss_and_return_of_each() {
    let mut site = Site::over_quic().await.of_three().await;
    for host in site.hosts() {
        site.accept(keyed(&format!("before{host}"))).await;
        site.stop(host).await;
        site.accept(keyed(&format!("without{host}"))).await;
        site.start(host).await;
        site.accept(keyed(&format!("with{host}"))).await;
        site.agree().await;
    }
    let proposals = (0..200).map(|index| {
        let node = site.node(site.hosts()[index % 3]);
        async move { node.propose(keyed(&format!("vm{index}"))).await }
    });
    let accepted = futures::future::join_all(proposals).await.into_iter().filter(Result::is_ok).count();
    assert_eq!(accepted, 200);
    site.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_of_another_site_is_nobody_here() {
    let site = Site::over_quic().await;
    let target =
        Peer { host: FIRST, address: site.node(FIRST).fold().state.hosts.get(&FIRST).unwrap().address.clone() };
    let foreign_ca = ClusterCa::create(site.ca().site(), now_ms()).unwrap();
    let stranger = listen(&foreign_ca, HostId(2));
    let call = stranger.call(target.clone(), Channel::Ping, Bytes::new(), Duration::from_secs(5)).await;
    assert!(matches!(call, Err(TransportError::Unreachable { .. })), "{call:?}");

    // Its own authority, another site in the name: the chain verifies, the name does not.
    let ca = site.ca();
    let twin =
        ClusterCa::from_pem(SiteId(Uuid::from_u128(8)), ca.certificate_pem().to_owned(), ca.key_pem().to_owned())
            .unwrap();
    let call = listen(&twin, HostId(2)).call(target.clone(), Channel::Ping, Bytes::new(), Duration::from_secs(5)).await;
    assert!(call.is_err(), "{call:?}");

    // An unknown newer host of this site is served: it may have joined while we were away (H22).
    let newer = listen(ca, HostId(77));
    newer.call(target.clone(), Channel::Ping, Bytes::new(), Duration::from_secs(5)).await.unwrap();
    // And a dialler that expects another host at this address does not get this one.
    let elsewhere = Peer { host: HostId(5), ..target };
    let call = newer.call(elsewhere, Channel::Ping, Bytes::new(), Duration::from_secs(5)).await;
    assert!(matches!(call, Err(TransportError::Unreachable { .. })), "{call:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_host_is_cut_off_while_it_is_connected() {
    let site = Site::over_quic().await.of_three().await;
    let leader = site.leader().await;
    let gone = site.hosts().into_iter().find(|host| *host != leader && *host != FIRST).unwrap();
    let limit = Duration::from_secs(5);
    let served = site.node(gone).peer_call(leader, PeerKind(1), Bytes::new(), limit).await.unwrap_err();
    assert_eq!(served, TransportError::Refused { host: leader, why: "this host is starting".to_owned() });
    site.accept(root(Command::HostMaintenance { host: gone })).await;
    site.accept(root(Command::HostRemove { host: gone })).await;
    site.until("the leader has closed the door", async || {
        let call = site.node(gone).peer_call(leader, PeerKind(1), Bytes::new(), limit).await;
        matches!(call, Err(TransportError::Closed { .. } | TransportError::Unreachable { .. }))
    })
    .await;
}

fn listen(ca: &ClusterCa, host: HostId) -> Arc<QuicTransport> {
    let keys = TransportKeys::generate(&RealEntropy);
    QuicTransport::listen(identity(ca, host), "127.0.0.1:0".parse().unwrap(), &keys).unwrap()
}

/// Both keys persisted: a killed and restarted host answers the dead connection's first packet with a reset, instead of
/// leaving its peer to wait for the idle timeout.
#[test]
fn a_killed_host_that_returns_is_reachable_at_once() {
    let ca = ClusterCa::create(SiteId(Uuid::from_u128(7)), now_ms()).unwrap();
    let keys = TransportKeys::generate(&RealEntropy);
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limit = Duration::from_secs(10);

    let caller_runtime = runtime();
    let caller = caller_runtime.block_on(async { listen(&ca, HostId(1)) });
    let life = runtime();
    let first = life.block_on(async { serving(&ca, "127.0.0.1:0", &keys) });
    let address = first.local_address().unwrap().to_string();
    let ping = || caller.call(Peer { host: HostId(2), address: address.clone() }, Channel::Ping, Bytes::new(), limit);
    caller_runtime.block_on(ping()).unwrap();

    // Its runtime goes first, and nobody is left to send a farewell: as after a SIGKILL.
    life.shutdown_timeout(limit);
    drop(first);
    let life = runtime();
    let _second = life.block_on(async { serving(&ca, &address, &keys) });

    // An acknowledgement or a probe of the path that went out before this call may have met the reset already.
    if let Err(error) = caller_runtime.block_on(ping()) {
        assert!(error.to_string().contains("reset"), "the old connection is reset, it does not time out: {error}");
    }
    caller_runtime.block_on(ping()).unwrap();
}

/// A heartbeat waits a fraction of an election. Where the handshake takes longer (a far site, a host that has just started
/// and is busy), callers that give up must leave it running: in the lab a restarted host was not heard of for nine seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_outlives_the_callers_that_gave_up_on_it() {
    let ca = ClusterCa::create(SiteId(Uuid::from_u128(7)), now_ms()).unwrap();
    let peer = serving(&ca, "127.0.0.1:0", &TransportKeys::generate(&RealEntropy));
    let address = slow_handshakes(peer.local_address().unwrap(), Duration::from_millis(150)).await.to_string();
    let caller = listen(&ca, HostId(1));
    let heartbeat = Duration::from_millis(100);
    let ping =
        || caller.call(Peer { host: HostId(2), address: address.clone() }, Channel::Ping, Bytes::new(), heartbeat);
    assert!(matches!(ping().await, Err(TransportError::Timeout { .. })), "the handshake takes longer than one call");
    let mut calls = 1;
    while ping().await.is_err() {
        calls += 1;
        assert!(calls < 50, "the peer is never reached");
    }
}

/// A way to `server` on which packets of handshakes (QUIC's long header) take longer, each way; all others pass at once.
async fn slow_handshakes(server: SocketAddr, delay: Duration) -> SocketAddr {
    let outside = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let inside = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let address = outside.local_addr().unwrap();
    let (client, known) = tokio::sync::watch::channel(None);
    let pass = move |packet: Vec<u8>, socket: Arc<UdpSocket>, to: SocketAddr| {
        let is_handshake = packet.first().is_some_and(|first| first & 0x80 != 0);
        tokio::spawn(async move {
            if is_handshake {
                tokio::time::sleep(delay).await;
            }
            let _ = socket.send_to(&packet, to).await;
        });
    };
    let (from_client, to_server) = (outside.clone(), inside.clone());
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = from_client.recv_from(&mut buffer).await {
            client.send_replace(Some(from));
            pass(buffer[..len].to_vec(), to_server.clone(), server);
        }
    });
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((len, _)) = inside.recv_from(&mut buffer).await {
            let client = *known.borrow();
            if let Some(client) = client {
                pass(buffer[..len].to_vec(), outside.clone(), client);
            }
        }
    });
    address
}

fn serving(ca: &ClusterCa, address: &str, keys: &TransportKeys) -> Arc<QuicTransport> {
    let transport = QuicTransport::listen(identity(ca, HostId(2)), address.parse().unwrap(), keys).unwrap();
    transport.serve(Arc::new(Pong));
    transport
}

struct Pong;

impl Handler for Pong {
    fn admits(&self, _host: HostId) -> bool {
        true
    }

    fn call(&self, _from: HostId, _channel: Channel, _body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        async { Ok(Bytes::new()) }.boxed()
    }

    fn stream(&self, _from: HostId, _channel: Channel, _stream: PeerStream) -> BoxFuture<'static, ()> {
        async {}.boxed()
    }
}
