use super::*;
use crate::agent::cluster::MembershipStep;
use crate::test_site::Site;
use crate::test_site::TestCluster;

/// Found by the simulation: a leader that was to leave asked for its hand-over again and again without a pause, until it was
/// made or its processor was spent.
#[tokio::test(start_paused = true)]
async fn a_hand_over_is_asked_for_once_a_look() {
    let site = Arc::new(Site::with_hosts(1));
    let cluster = TestCluster::of(&site, site.hosts[0]);
    let what = "TransferLeader".to_owned();
    *cluster.membership_step.lock().unwrap() = Some(MembershipStep { what, is_done: false });
    cluster.lead(1);
    let duties = spawn(cluster.clone(), Retention::default());
    tokio::time::sleep(5 * LOOK_EVERY).await;
    duties.shutdown();
    let looks = cluster.membership_looks.load(Ordering::SeqCst);
    assert!((4..8).contains(&looks), "{looks} looks in five seconds");
}
