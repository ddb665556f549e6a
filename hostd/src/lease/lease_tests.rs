use super::*;
use crate::agent::guest_channel;
use crate::grants::Grants;
use crate::grants::keeper::Timers;
use crate::test_site::Site;
use crate::test_site::TestCluster;
use crate::test_site::boot;
use crate::test_site::spec;
use statemachine::ids::Epoch;
use statemachine::state::ReleaseClass;

struct Host {
    cluster: Arc<TestCluster>,
    handle: LeaseHandle,
    grant: watch::Receiver<Option<ConfirmedGrant>>,
    epoch: Epoch,
    _guests: watch::Sender<Arc<Vec<GuestView>>>,
}

/// The only host of a site, which leads it and has one permit.
fn host() -> Host {
    host_with_heartbeat(Duration::from_millis(200))
}

fn host_with_heartbeat(heartbeat: Duration) -> Host {
    let site = Arc::new(Site::with_hosts(1));
    let own = site.hosts[0];
    let epoch = site.start(site.define("web", spec(ReleaseClass::Lease)), own);
    let cluster = TestCluster::of(&site, own);
    let (publish, guests) = guest_channel();
    let config = LeaseConfig { boot: boot(1), heartbeat, lease: Duration::from_secs(12), watchdog_armed: false };
    let _ = cluster.keeper.set(Grants::spawn(Timers::default(), cluster.clone()));
    let handle = spawn(config, cluster.clone(), guests);
    Host { cluster, grant: handle.grant(), handle, epoch, _guests: publish }
}

async fn next_grant(host: &mut Host) -> ConfirmedGrant {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, host.grant.changed()).await.expect("a grant in time").expect("a lease that runs");
    host.grant.borrow_and_update().clone().expect("a grant")
}

#[tokio::test]
async fn a_host_asks_until_somebody_leads_and_then_holds_a_lease_from_its_own_send_time() {
    let mut host = host();
    assert!(host.grant.borrow().is_none(), "nobody leads");
    let before = Boottime::now();
    host.cluster.lead(1);
    let grant = next_grant(&mut host).await;
    assert!(grant.deadline >= before.plus_ms(12_000) && grant.deadline <= Boottime::now().plus_ms(12_000));
    assert!(grant.allows(host.epoch, host.cluster.site.now().head.seq, Boottime::now()));
    assert!(host.handle.status().remaining_ms.is_some_and(|left| left > 0));
}

#[tokio::test]
async fn a_leader_without_a_majority_lets_its_own_lease_run_out() {
    let mut host = host();
    host.cluster.lead(1);
    next_grant(&mut host).await;
    host.cluster.has_majority.store(false, Ordering::SeqCst);
    let refused = || host.handle.counters().refused.load(Ordering::Relaxed);
    // From the second refusal on, every round that began with a majority has ended.
    let until = tokio::time::Instant::now() + Duration::from_secs(30);
    while refused() < 2 {
        assert!(tokio::time::Instant::now() < until, "heartbeats go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let last = host.grant.borrow_and_update().clone();
    while refused() < 5 {
        assert!(tokio::time::Instant::now() < until, "heartbeats go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!host.grant.has_changed().unwrap(), "no later grant came");
    host.cluster.has_majority.store(true, Ordering::SeqCst);
    assert!(next_grant(&mut host).await.deadline > last.unwrap().deadline);
}

#[tokio::test]
async fn a_new_permit_does_not_wait_for_the_next_regular_heartbeat() {
    let mut host = host_with_heartbeat(Duration::from_secs(3_600));
    host.cluster.lead(1);
    next_grant(&mut host).await;
    let site = host.cluster.site.clone();
    let epoch = site.start(site.define("db", spec(ReleaseClass::Operator)), site.hosts[0]);
    assert!(next_grant(&mut host).await.epochs.contains(&epoch));
}
