//! Hosts that openraft does not carry: they pull what was committed (ADR 13).

use consensus::node::NodeConfig;
use consensus::node::Role;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::batch::SealedBatch;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;

use crate::world::Site;
use crate::world::keyed;
use crate::world::root;

/// The whole stream of a host, from its oldest batch to its head, checked for gaps.
async fn stream(site: &Site, host: HostId) -> Vec<SealedBatch> {
    let node = site.node(host);
    let mut batches = Vec::new();
    let mut after = Seq(node.events().oldest().0 - 1);
    while after < node.events().head() {
        for batch in node.events().read(after, 64, 1 << 20).await.unwrap() {
            assert_eq!(batch.seq, after.next(), "gapless on host {host}");
            after = batch.seq;
            batches.push((*batch.sealed).clone());
        }
    }
    batches
}

async fn until_it_pulls(site: &Site, host: HostId) {
    site.until("the host pulls and knows the leader", async || {
        let status = site.node(host).status();
        status.role == Role::Puller && status.leader.is_some() && status.voters.len() == 3
    })
    .await;
}

async fn accept_many(site: &Site, name: &str, count: usize) {
    for number in 0..count {
        site.accept(keyed(&format!("{name}{number}"))).await;
    }
}

/// Snapshots and purges after a few entries, and a puller takes one soon.
fn short_log(config: &mut NodeConfig) {
    config.snapshot_every = 20;
    config.keep_behind_snapshot = 5;
    config.snapshot_ahead = 40;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_outside_the_raft_group_reads_writes_and_streams_like_any_other() {
    let mut site = Site::over_memory().await.of_three().await;
    accept_many(&site, "before", 5).await;
    let outside = [site.join().await, site.join().await];
    for host in outside {
        until_it_pulls(&site, host).await;
        let name = format!("by-{host}");
        let answer = site.accept_at(host, Request { origin: host, ..keyed(&name) }).await;
        assert!(site.read_at(host).await >= answer.seq, "it reads what it wrote");
        assert!(site.node(host).fold().state.vms.iter().any(|(_, vm)| vm.name == name));
    }
    accept_many(&site, "after", 5).await;
    site.agree().await;
    let leader = site.leader().await;
    let expected = stream(&site, leader).await;
    for host in outside {
        assert_eq!(stream(&site, host).await, expected, "host {host}");
        assert!(!site.node(leader).status().learners.contains(&host), "openraft does not carry it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_puller_goes_on_where_it_was_and_takes_a_snapshot_when_that_is_far() {
    let mut site = Site::over_memory_with(short_log).await.of_three().await;
    let outside = site.join().await;
    until_it_pulls(&site, outside).await;
    accept_many(&site, "seen", 30).await;
    site.agree().await;
    site.stop(outside).await;
    site.start(outside).await;
    let kept = site.node(outside).fold().head.seq;
    assert!(kept > Seq::ZERO, "what it pulled, it keeps");
    accept_many(&site, "little", 3).await;
    site.agree().await;
    assert_eq!(site.node(outside).metrics().disk.snapshots_installed, 0);
    site.stop(outside).await;
    accept_many(&site, "much", 80).await;
    site.start(outside).await;
    site.agree().await;
    assert!(site.node(outside).metrics().disk.snapshots_installed > 0, "a snapshot is shorter");
    accept_many(&site, "then", 3).await;
    site.agree().await;
    let leader = site.leader().await;
    assert_eq!(stream(&site, outside).await, stream(&site, leader).await);
}

/// Its fold is ahead of the snapshot that the leader offers, and of the entries that follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_puller_becomes_a_voter_and_loses_nothing() {
    let mut site = Site::over_memory_with(short_log).await.of_three().await;
    accept_many(&site, "early", 50).await;
    let outside = site.join().await;
    until_it_pulls(&site, outside).await;
    accept_many(&site, "pulled", 10).await;
    site.agree().await;
    let pulled = site.node(outside).fold().head;
    let installed = site.node(outside).metrics().disk.snapshots_installed;
    let leader = site.leader().await;
    let gone = site.nodes().map(|node| node.host()).find(|host| *host != leader && *host != outside).unwrap();
    site.accept(root(Command::HostMaintenance { host: gone })).await;
    site.accept(root(Command::HostRemove { host: gone })).await;
    site.stop(gone).await;
    site.forget(gone);
    site.until("the host that pulled votes", async || {
        let _ = site.node(leader).reconcile_membership().await;
        assert!(site.node(outside).fold().head.seq >= pulled.seq, "a host never forgets what it has shown");
        site.node(outside).status().voters.contains(&outside)
    })
    .await;
    let metrics = site.node(outside).metrics();
    assert!(metrics.snapshot_index > 0, "the leader's log does not go back far enough, so it sent a snapshot");
    assert_eq!(metrics.disk.snapshots_installed, installed, "of which only the place in the log was new");
    accept_many(&site, "late", 30).await;
    site.agree().await;
    site.stop(outside).await;
    site.start(outside).await;
    site.accept(keyed("last")).await;
    site.agree().await;
    assert_eq!(stream(&site, outside).await, stream(&site, leader).await);
}

/// Its log calls it a member for ever: nobody appends to it to say otherwise (found by the simulation, seed 260).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_lost_its_slot_while_it_was_away_pulls_and_gets_another() {
    let mut site = Site::over_memory_with(|config| config.replace_voter_after_ms = 100).await.of_three().await;
    for _ in 0..5 {
        site.join().await;
    }
    let members = |current: &consensus::membership::Current| current.addresses.keys().copied().collect::<Vec<_>>();
    let leader = site.leader().await;
    let reconciled = async |site: &Site| {
        let _ = site.node(leader).reconcile_membership().await;
        site.node(leader).membership().filter(|current| !current.is_changing)
    };
    site.until("seven are members", async || reconciled(&site).await.is_some_and(|now| now.addresses.len() == 7)).await;
    site.agree().await;
    let current = site.node(leader).membership().unwrap();
    let away = current.learners().next().unwrap();
    let eighth = site.hosts().into_iter().find(|host| !current.addresses.contains_key(host)).unwrap();
    site.stop(away).await;
    let duty = Actor::Duty(leader);
    let silent = [Command::HostSuspect { host: away }, Command::HostLost { host: away }];
    for command in silent {
        site.accept(Request { actor: duty.clone(), origin: leader, idempotency: None, command }).await;
    }
    site.until("another host has its slot", async || {
        let now = reconciled(&site).await.map(|now| members(&now)).unwrap_or_default();
        now.contains(&eighth) && !now.contains(&away)
    })
    .await;
    accept_many(&site, "meanwhile", 10).await;

    site.start(away).await;
    until_it_pulls(&site, away).await;
    site.agree().await;
    site.stop(away).await;
    accept_many(&site, "again", 5).await;
    site.start(away).await;
    until_it_pulls(&site, away).await;
    site.agree().await;

    let other = current.learners().find(|host| *host != away).unwrap();
    site.accept(root(Command::HostMaintenance { host: other })).await;
    site.accept(root(Command::HostRemove { host: other })).await;
    site.stop(other).await;
    site.forget(other);
    site.until("it has a slot again", async || {
        let is_member = reconciled(&site).await.is_some_and(|now| now.addresses.contains_key(&away));
        is_member && site.node(away).status().role == Role::Learner
    })
    .await;
    accept_many(&site, "last", 10).await;
    site.agree().await;
    assert_eq!(stream(&site, away).await, stream(&site, leader).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_puller_follows_the_next_leader() {
    let mut site = Site::over_memory().await.of_three().await;
    let outside = site.join().await;
    until_it_pulls(&site, outside).await;
    let first = site.leader().await;
    site.stop(first).await;
    site.until("it knows the new leader and its word is heard", async || {
        let known = site.node(outside).status().leader.is_some_and(|leader| leader != first);
        known && site.node(outside).propose(Request { origin: outside, ..keyed("heard") }).await.is_ok()
    })
    .await;
    site.agree().await;
}
