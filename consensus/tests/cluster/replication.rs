//! What three healthy hosts do, and what they keep through restarts.

use std::collections::BTreeSet;
use std::time::Duration;

use consensus::decider::ProposeError;
use statemachine::Rejection;
use statemachine::Seq;

use crate::world::FIRST;
use crate::world::Site;
use crate::world::define_vm;
use crate::world::keyed;
use crate::world::root;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_host_takes_a_command_and_all_hosts_agree() {
    let site = Site::over_memory().await.of_three().await;
    for (index, host) in site.hosts().into_iter().enumerate() {
        let answer = site.node(host).propose(root(define_vm(&format!("vm{index}")))).await.unwrap();
        // Read your own writes on the host that took it.
        let fold = site.node(host).wait_applied(answer.seq, Duration::from_secs(10)).await.unwrap();
        assert!(fold.state.vm_by_name(&format!("vm{index}")).is_some());
    }
    site.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commands_at_once_get_gapless_seqs_and_the_stream_has_each_batch_once() {
    let site = Site::over_memory().await.of_three().await;
    let before = site.node(FIRST).fold().head.seq;
    let proposals = (0..400).map(|index| {
        let node = site.node(site.hosts()[index % 3]);
        async move { node.propose(root(define_vm(&format!("vm{index}")))).await.unwrap().seq }
    });
    let seqs: BTreeSet<Seq> = futures::future::join_all(proposals).await.into_iter().collect();
    assert_eq!(seqs, (before.0 + 1..=before.0 + 400).map(Seq).collect());
    site.agree().await;
    for node in site.nodes() {
        let mut after = Seq::ZERO;
        while after < node.events().head() {
            let batches = node.events().read(after, 64, 1 << 20).await.unwrap();
            for batch in &batches {
                assert_eq!(batch.seq, after.next(), "gapless on host {}", node.host());
                assert_eq!(batch.sealed.open().unwrap().seq(), batch.seq);
                after = batch.seq;
            }
        }
        assert_eq!(after, Seq(before.0 + 400));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_with_its_key_is_answered_as_the_first_time_and_another_body_is_refused() {
    let site = Site::over_memory().await.of_three().await;
    let first = site.node(site.hosts()[0]).propose(keyed("web1")).await.unwrap();
    let again = site.node(site.hosts()[1]).propose(keyed("web1")).await.unwrap();
    assert_eq!(first, again);

    let mut other_body = keyed("web1");
    other_body.idempotency.as_mut().unwrap().body_hash = [2; 32];
    let refused = site.node(site.hosts()[2]).propose(other_body).await.unwrap_err();
    assert_eq!(refused, ProposeError::from(Rejection::IdempotencyConflict { seq: first.seq }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_index_on_any_host_covers_what_was_answered_before() {
    let site = Site::over_memory().await.of_three().await;
    for round in 0..5 {
        let answer = site.accept(keyed(&format!("vm{round}"))).await;
        for node in site.nodes() {
            let seq = node.read_index().await.unwrap();
            assert!(seq >= answer.seq, "a read on host {} after an answer sees it", node.host());
            assert!(node.fold().head.seq >= seq);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_commands_survive_a_restart_of_every_host_and_no_seq_is_given_twice() {
    let mut site = Site::over_memory().await.of_three().await;
    let mut last = Seq::ZERO;
    for round in 0..3 {
        for index in 0..20 {
            let seq = site.accept(keyed(&format!("vm{round}-{index}"))).await.seq;
            assert!(seq > last, "seqs only rise (C2)");
            last = seq;
        }
        for host in site.hosts() {
            site.stop(host).await;
        }
        for host in site.hosts() {
            site.start(host).await;
        }
        site.leader().await;
        site.agree().await;
        let fold = site.node(FIRST).fold();
        assert_eq!(fold.state.vms.len(), 20 * (round + 1), "nothing acknowledged is lost (D1)");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_is_initialised_once() {
    let site = Site::over_memory().await;
    let again = site.node(FIRST).initialise(root(define_vm("x"))).await.unwrap_err();
    assert!(matches!(again, consensus::node::NodeError::AlreadyInitialised));
}
