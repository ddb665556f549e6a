use consensus::platform::Platform;
use statemachine::ids::BootId;
use statemachine::state::Liveness;
use statemachine::state::ReleaseClass;

use super::wire::Nonce;
use super::*;
use crate::test_site::Site;
use crate::test_site::TestCluster;
use crate::test_site::boot;
use crate::test_site::spec;

fn beat(host: HostId, boot: BootId) -> Heartbeat {
    Heartbeat {
        host,
        boot,
        nonce: Nonce(7),
        applied: Seq(0),
        wall_ms: Platform::real().clock.wall_ms(),
        watchdog_armed: false,
        running: Vec::new(),
    }
}

async fn ask(grants: &Grants, from: HostId, heartbeat: &Heartbeat) -> Result<Grant, Refusal> {
    match GrantAnswer::decode(&grants.handle(from, heartbeat.encode()).await).expect("an answer that decodes") {
        GrantAnswer::Granted(grant) => Ok(grant),
        GrantAnswer::Refused(refusal) => Err(refusal),
    }
}

#[tokio::test]
async fn a_leader_grants_its_own_host_like_any_other_and_nobody_without_a_majority() {
    let site = Arc::new(Site::with_hosts(2));
    let [h1, h2] = site.hosts[..] else { panic!() };
    let epochs = [h1, h2].map(|host| site.start(site.define(&format!("vm{host}"), spec(ReleaseClass::Lease)), host));
    let cluster = TestCluster::of(&site, h1);
    let grants = Grants::spawn(Timers::default(), cluster.clone());
    assert_eq!(ask(&grants, h1, &beat(h1, boot(1))).await, Err(Refusal::NotLeader));
    cluster.set_leadership(Leadership::Leading { session: 1, ready: false });
    assert_eq!(grants.leases(), [], "the keeper has not looked yet");
    while grants.leases().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(ask(&grants, h1, &beat(h1, boot(1))).await, Err(Refusal::NotReady));
    cluster.lead(1);
    while !grants.leases().iter().any(|lease| lease.may_be_granted) {
        tokio::task::yield_now().await;
    }
    for (host, boot, epoch) in [(h1, boot(1), epochs[0]), (h2, boot(2), epochs[1])] {
        let grant = ask(&grants, host, &beat(host, boot)).await.unwrap();
        assert_eq!((grant.nonce, grant.epochs), (Nonce(7), vec![epoch]));
    }
    cluster.has_majority.store(false, Ordering::SeqCst);
    assert_eq!(ask(&grants, h1, &beat(h1, boot(1))).await, Err(Refusal::NoMajority));
}

#[tokio::test]
async fn a_heartbeat_in_anothers_name_or_in_no_form_gets_nothing() {
    let site = Arc::new(Site::with_hosts(2));
    let cluster = TestCluster::of(&site, site.hosts[0]);
    cluster.lead(1);
    let grants = Grants::spawn(Timers::default(), cluster);
    let stolen = beat(site.hosts[0], boot(1));
    assert_eq!(ask(&grants, site.hosts[1], &stolen).await, Err(Refusal::WrongSender));
    let answer = grants.handle(site.hosts[0], Bytes::from_static(b"\xff\xff\xff")).await;
    assert_eq!(GrantAnswer::decode(&answer).unwrap(), GrantAnswer::Refused(Refusal::Malformed));
}

#[tokio::test]
async fn silence_enters_the_log_and_a_heartbeat_ends_it() {
    let site = Arc::new(Site::with_hosts(2));
    let [h1, h2] = site.hosts[..] else { panic!() };
    let cluster = TestCluster::of(&site, h1);
    cluster.lead(1);
    let ms = Duration::from_millis;
    let timers = Timers { suspect: ms(200), lost: ms(600), round_every: ms(10) };
    let grants = Grants::spawn(timers, cluster);
    let reaches = async |host: HostId, liveness: Liveness| {
        let mut fold = site.watch();
        let is_so = |fold: &Arc<Fold>| fold.state.hosts.get(&host).is_some_and(|host| host.liveness == liveness);
        let reached = tokio::time::timeout(Duration::from_secs(30), fold.wait_for(is_so)).await;
        reached.expect("in time").expect("a site that lives");
    };
    reaches(h2, Liveness::Suspected).await;
    reaches(h2, Liveness::Unreachable).await;
    assert_eq!(ask(&grants, h2, &beat(h2, boot(2))).await, Err(Refusal::NoGrant));
    reaches(h2, Liveness::Alive).await;
    let until = Instant::now() + Duration::from_secs(30);
    while ask(&grants, h2, &beat(h2, boot(2))).await.is_err() {
        assert!(Instant::now() < until, "its recovery is applied, so it is granted again");
        tokio::time::sleep(ms(20)).await;
    }
}
