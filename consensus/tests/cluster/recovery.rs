//! One host goes on when the majority is lost for good (`quorate recover`).

use std::sync::Arc;

use consensus::node::Node;
use consensus::node::NodeConfig;
use consensus::node::NodeError;
use consensus::node::Role;
use consensus::pki::ClusterCa;
use consensus::pki::Identity;
use consensus::platform::Platform;
use consensus::recover;
use consensus::recover::RecoverError;
use consensus::store::Store;
use consensus::store::StoreError;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Applied;
use statemachine::state::Fingerprint;

use crate::world::FIRST;
use crate::world::Site;
use crate::world::genesis;
use crate::world::identity;
use crate::world::keyed;
use crate::world::now_ms;

async fn alone(site: &mut Site, host: HostId) {
    let platform = Platform { disk: Arc::new(site.disk(host)), ..Platform::real() };
    let store = Store::open(platform, "/data".as_ref()).await.unwrap();
    let address = store.whole().await.unwrap().fold.state.hosts.get(&host).unwrap().address.clone();
    store.go_on_alone(host, address).await.unwrap();
    site.start(host).await;
}

fn recovered(host: HostId) -> Request {
    let command = Command::SiteRecover { generation: 1, ca: Fingerprint([8; 32]) };
    Request { actor: Actor::Duty(host), origin: host, idempotency: None, command }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_goes_on_alone_with_all_that_it_has() {
    let mut site = Site::over_memory().await.of_three().await;
    for name in ["one", "two", "three"] {
        site.accept(keyed(name)).await;
    }
    site.agree().await;
    let before = site.nodes().next().unwrap().fold();
    let survivor = *site.hosts().last().unwrap();
    for host in site.hosts() {
        site.stop(host).await;
    }
    for host in site.hosts() {
        if host != survivor {
            site.forget(host);
        }
    }
    alone(&mut site, survivor).await;
    let by_another = Request { actor: Actor::Duty(FIRST), origin: FIRST, ..recovered(survivor) };
    assert!(!by_another.may_come_from(FIRST), "nobody takes the others out of a site from outside");
    site.accept(recovered(survivor)).await;
    let node = site.node(survivor);
    assert_eq!(node.status().voters, [survivor]);
    let state = node.fold().state.clone();
    assert_eq!(state.hosts.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [survivor]);
    assert_eq!(state.vms.iter().count(), before.state.vms.iter().count());
    assert_eq!(state.removed_hosts.iter().count(), 2);
    // And it is a site like any other: restarts, and grows.
    site.stop(survivor).await;
    site.start(survivor).await;
    site.accept(Request { origin: survivor, ..keyed("after") }).await;
}

/// What a puller has durably is its sealed segments, also those behind its last snapshot; it begins a log of its own there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_pulled_goes_on_alone_too() {
    let small = |config: &mut NodeConfig| {
        config.snapshot_every = 9;
        config.store.event_segment_bytes = 600;
    };
    let mut site = Site::over_memory_with(small).await.of_three().await;
    let outside = site.join().await;
    site.until("it pulls", async || site.node(outside).status().role == Role::Puller).await;
    for number in 0..12 {
        site.accept(keyed(&format!("vm{number}"))).await;
    }
    site.agree().await;
    let before = site.node(outside).fold().head.seq;
    for host in site.hosts() {
        site.stop(host).await;
    }
    for host in site.hosts() {
        if host != outside {
            site.forget(host);
        }
    }
    alone(&mut site, outside).await;
    let kept = site.node(outside).fold().head.seq;
    assert!(before.0 - kept.0 <= 5, "{kept} of {before}");
    site.accept(recovered(outside)).await;
    for number in 0..20 {
        site.accept(Request { origin: outside, ..keyed(&format!("after{number}")) }).await;
    }
    let mut after = Seq::ZERO;
    let mut fold = Fold::default();
    while after < site.node(outside).events().head() {
        for batch in site.node(outside).events().read(after, 10, 1 << 20).await.unwrap() {
            assert_eq!(
                fold.apply_sealed(&batch.sealed),
                Ok(Applied::Applied(after.next())),
                "one chain, without a fork"
            );
            after = batch.seq;
        }
    }
    assert_eq!(fold.head, site.node(outside).fold().head);
    assert_eq!(site.node(outside).status().voters, [outside]);
}

/// The files of a host of a real site, through a recovery that loses power in the middle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recovery_of_a_data_directory_may_be_repeated() {
    let root = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create(statemachine::SiteId(uuid::Uuid::from_u128(7)), now_ms()).unwrap();
    let own = identity(&ca, FIRST);
    let missing = recover::look(root.path()).await;
    assert!(matches!(missing, Err(RecoverError::Identity(_))), "{missing:?}");
    std::fs::create_dir_all(root.path().join("identity")).unwrap();
    own.save(&root.path().join("identity")).unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = || NodeConfig::new(root.path().join("raft"), socket, socket.to_string());
    let node = Node::bootstrap(config(), own.clone(), genesis(socket.to_string())).await.unwrap();
    let in_use = recover::look(root.path()).await;
    assert!(matches!(in_use, Err(RecoverError::Store(StoreError::InUse { .. }))), "{in_use:?}");
    node.close().await;

    let seen = recover::look(root.path()).await.unwrap();
    assert_eq!((seen.generation, seen.host.as_str(), seen.leave.len()), (1, "host1", 0));
    let done = recover::carry_out(root.path(), now_ms()).await.unwrap();
    assert_eq!(done, seen, "it does what it showed");
    let now = Identity::load(&root.path().join("identity")).unwrap();
    assert_eq!(now.host(), FIRST);
    assert_ne!(now.ca_pem(), own.ca_pem(), "under an authority that no host of the old site has");
    assert!(root.path().join("identity.generation-0/host.pem").exists());
    let begun = recover::begun(&root.path().join("identity")).unwrap().unwrap();
    assert_eq!(begun.generation, 1);

    // Power was lost before the identities were exchanged, and the command is repeated.
    std::fs::rename(root.path().join("identity"), root.path().join("identity.next")).unwrap();
    std::fs::rename(root.path().join("identity.generation-0"), root.path().join("identity")).unwrap();
    recover::carry_out(root.path(), now_ms()).await.unwrap();
    let again = Identity::load(&root.path().join("identity")).unwrap();
    assert_eq!(again.ca_pem(), now.ca_pem(), "the authority that was made already");

    // Power was lost between the two names.
    std::fs::rename(root.path().join("identity"), root.path().join("identity.next")).unwrap();
    recover::carry_out(root.path(), now_ms()).await.unwrap();
    assert_eq!(Identity::load(&root.path().join("identity")).unwrap().ca_pem(), now.ca_pem());

    // The log was not told before the host was lost too, and somebody recovers it once more.
    let once_more = recover::carry_out(root.path(), now_ms()).await.unwrap();
    assert_eq!(once_more.generation, 1, "the log knows of none yet");
    let again = Identity::load(&root.path().join("identity")).unwrap();
    let begun = recover::begun(&root.path().join("identity")).unwrap().unwrap();

    let node = Node::start(config(), again).await.unwrap();
    let told = node.initialise(genesis(socket.to_string())).await;
    assert!(matches!(told, Err(NodeError::AlreadyInitialised)), "{told:?}");
    let command = Command::SiteRecover { generation: begun.generation, ca: begun.ca };
    let request = Request { actor: Actor::Duty(FIRST), origin: FIRST, idempotency: None, command };
    let mut leads = node.leadership();
    leads.wait_for(|leadership| leadership.ready_session().is_some()).await.unwrap();
    node.propose(request).await.unwrap();
    assert_eq!(node.fold().state.site.as_ref().unwrap().generation, 1);
    recover::finished(&root.path().join("identity")).unwrap();
    assert_eq!(recover::begun(&root.path().join("identity")).unwrap(), None);
    node.close().await;
}
