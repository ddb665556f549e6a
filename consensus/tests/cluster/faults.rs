//! Lost leaders, lost links, and what must not happen then.

use std::collections::BTreeMap;
use std::time::Duration;

use consensus::decider::ProposeError;
use statemachine::Seq;
use statemachine::command::Command;
use statemachine::state::Created;

use crate::world::Site;
use crate::world::keyed;
use crate::world::root;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_is_lost_another_goes_on_and_the_old_one_comes_back_as_a_follower() {
    let mut site = Site::over_memory().await.of_three().await;
    let before = site.accept(keyed("before")).await.seq;
    let old = site.leader().await;
    site.stop(old).await;
    let after = site.accept(keyed("after")).await.seq;
    assert!(after > before);
    assert_ne!(site.leader().await, old);

    site.start(old).await;
    site.agree().await;
    assert!(site.node(old).fold().state.vm_by_name("after").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_host_raises_no_term_and_disturbs_nobody_when_it_returns() {
    let site = Site::over_memory().await.of_three().await;
    let leader = site.leader().await;
    let lonely = site.hosts().into_iter().find(|host| *host != leader).unwrap();
    let term = site.node(leader).metrics().term;
    site.switchboard().isolate(lonely);
    site.until("the lonely host knows no leader", async || site.node(lonely).status().leader.is_none()).await;
    assert!(matches!(site.node(lonely).propose(keyed("nobody")).await, Err(ProposeError::NoLeader)));
    // Several more of its election timeouts, in which the others go on.
    for index in 0..10 {
        site.accept(keyed(&format!("vm{index}"))).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(site.node(lonely).metrics().term, term, "a host without a majority raises no term (H25)");
    site.switchboard().heal();
    site.until("it follows again", async || site.node(lonely).status().leader == Some(leader)).await;
    site.agree().await;
    assert_eq!(site.node(leader).metrics().term, term, "its return caused no election");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_answers_nothing_and_loses_nothing_that_it_answered() {
    let site = Site::over_memory().await.of_three().await;
    let old = site.leader().await;
    let mut answered: BTreeMap<String, Seq> = BTreeMap::new();
    for round in 0..4 {
        // Commands in flight on every host while the leader's links go down.
        let mut waiting = Vec::new();
        for index in 0..60 {
            let name = format!("vm{round}-{index}");
            let node = site.node(site.hosts()[index % 3]);
            waiting.push(tokio::spawn(async move { (name.clone(), node.propose(keyed(&name)).await) }));
            if index == 30 {
                site.switchboard().isolate(site.leader().await);
            }
        }
        for outcome in futures::future::join_all(waiting).await {
            match outcome.unwrap() {
                (name, Ok(answer)) => drop(answered.insert(name, answer.seq)),
                (_, Err(ProposeError::Rejected(why))) => panic!("nothing here may be rejected: {why}"),
                (_, Err(_)) => {}
            }
        }
        site.switchboard().heal();
        site.accept(keyed(&format!("healed{round}"))).await;
        // What was not answered is asked again with its key: done once, whatever happened before.
        for index in 0..60 {
            let name = format!("vm{round}-{index}");
            let seq = site.accept(keyed(&name)).await.seq;
            assert_eq!(*answered.entry(name).or_insert(seq), seq, "an answer never changes (C13)");
        }
    }
    site.agree().await;
    let state = &site.node(old).fold().state;
    assert_eq!(state.vms.len(), 60 * 4 + 4);
    let mut seqs: Vec<Seq> = answered.values().copied().collect();
    seqs.sort();
    seqs.dedup();
    assert_eq!(seqs.len(), 60 * 4, "no seq was given to two commands");
}

/// A refusal, or a yes that changes nothing, needs no entry of its own; and so a leader that was deposed without knowing it
/// could give one from the past.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposed_leader_tells_nobody_what_was_so_before() {
    let site = Site::over_memory().await.of_three().await;
    let deposed = site.leader().await;
    let old = site.node(deposed);
    site.switchboard().isolate(deposed);
    let other = site.hosts().into_iter().find(|host| *host != deposed).unwrap();
    let others_lead = async || site.node(other).status().leader.is_some_and(|leader| leader != deposed);
    site.until("the others have a leader", others_lead).await;
    let node = site.node(other);
    let mut made = None;
    site.until("the others commit", async || {
        made = node.propose(keyed("web1")).await.ok().and_then(|answer| answer.created);
        made.is_some()
    })
    .await;
    assert!(old.status().leader == Some(deposed), "it believes that it leads");
    // Before the others committed this was so. Now it is not.
    let Some(Created::Vm(vm)) = made else { panic!("a VM was defined, not {made:?}") };
    let outcome = old.propose(root(Command::VmDelete { vm })).await;
    assert!(matches!(outcome, Err(ProposeError::Retry { .. } | ProposeError::NoLeader)), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_accepted_and_no_read_is_called_current() {
    let site = Site::over_memory().await.of_three().await;
    let leader = site.leader().await;
    site.switchboard().isolate(leader);
    site.until("the cut-off leader stops to answer", async || {
        matches!(
            site.node(leader).propose(keyed("lonely")).await,
            Err(ProposeError::Retry { .. } | ProposeError::NoLeader)
        )
    })
    .await;
    assert!(site.node(leader).read_index().await.is_err());
    site.switchboard().heal();
    site.accept(keyed("lonely")).await;
    site.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_was_away_through_a_purge_gets_a_snapshot_and_the_whole_stream() {
    let mut site = Site::over_memory_with(|config| {
        config.snapshot_every = 40;
        config.keep_behind_snapshot = 5;
    })
    .await
    .of_three()
    .await;
    let leader = site.leader().await;
    let away = site.hosts().into_iter().find(|host| *host != leader).unwrap();
    site.stop(away).await;
    for index in 0..150 {
        site.accept(keyed(&format!("vm{index}"))).await;
    }
    site.until("the log is purged", async || site.node(leader).metrics().purged_index > 40).await;
    site.start(away).await;
    site.accept(keyed("after")).await;
    site.agree().await;
    let node = site.node(away);
    let mut after = Seq::ZERO;
    while after < node.events().head() {
        for batch in node.events().read(after, 50, 1 << 20).await.unwrap() {
            assert_eq!(batch.seq, after.next(), "the stream has no gap where the snapshot came in");
            after = batch.seq;
        }
    }
}

/// Hazard C15: answers that come later than a lease lasts take it from every leader; when the network is quick again,
/// so is the site.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_answers_stop_commits_and_wedge_nobody() {
    let site = Site::over_memory().await.of_three().await;
    site.accept(keyed("before")).await;
    site.switchboard().set_delay(Duration::from_millis(600));
    let mut round = 0;
    site.until("no leader holds its lease", async || {
        round += 1;
        site.node(site.hosts()[0]).propose(keyed(&format!("slow{round}"))).await.is_err()
    })
    .await;
    site.switchboard().set_delay(Duration::ZERO);
    site.accept(keyed("after")).await;
    site.agree().await;
}
