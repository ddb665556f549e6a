//! What only the inside can do to a member: put into its log what a decider never would.

use std::sync::Arc;
use std::time::Duration;

use openraft::impls::ProgressResponder;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::RecordKind;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::fold::Applied;
use statemachine::state::Fingerprint;
use statemachine::state::TokenPurpose;
use uuid::Uuid;

use super::*;
use crate::platform::Clock;
use crate::store::memory_disk::MemoryDisk;
use crate::transport::memory::Switchboard;
use crate::types::Proposal;
use crate::types::ProposalResult;

fn root(command: Command) -> Request {
    Request { actor: Actor::Root(HostId(1)), origin: HostId(1), idempotency: None, command }
}

fn token(number: u8) -> Request {
    root(Command::TokenCreate {
        purpose: TokenPurpose::Viewer,
        secret_hash: [number; 32],
        ttl_ms: 1000,
        note: String::new(),
    })
}

/// A member alone in its site.
async fn alone() -> Node {
    alone_on(Platform::real()).await
}

async fn alone_on(platform: Platform) -> Node {
    let platform = Platform { disk: Arc::new(MemoryDisk::new()), ..platform };
    let config = NodeConfig::new("/data", "0.0.0.0:0".parse().unwrap(), "192.0.2.1:7443");
    let node = Node::start_on(config, platform, Switchboard::new().transport(HostId(1))).await.unwrap();
    let first_host = statemachine::command::HostCandidate {
        name: "host1".to_owned(),
        address: "192.0.2.1:7443".to_owned(),
        public_key: Fingerprint([1; 32]),
        facts: statemachine::command::HostFacts {
            boot: statemachine::BootId(Uuid::from_u128(1)),
            capacity: statemachine::state::Capacity { cpu_threads: 4, memory_mib: 4096 },
            feature_level: FEATURE_LEVEL,
            version: "0.1.0".to_owned(),
            clock_runs_while_stopped: true,
            watchdog_timeout_ms: None,
        },
    };
    let site = SiteId(Uuid::from_u128(7));
    let command = Command::SiteInit { site, name: "site".to_owned(), ca: Fingerprint([9; 32]), first_host };
    node.initialise(root(command)).await.unwrap();
    node
}

async fn write(node: &Node, batches: Vec<SealedBatch>) -> ProposalResult {
    let (responder, completion) = ProgressResponder::complete_only();
    node.inner.raft.write(Proposal::new(batches)).responder(responder).await.unwrap();
    completion.await.unwrap().unwrap().data
}

fn decided(fold: &Fold, number: u8) -> SealedBatch {
    match fold.decide(&token(number), 1_763_000_000_000) {
        statemachine::fold::Decision::Batch { sealed, .. } => sealed,
        other => panic!("a token is created, not {other:?}"),
    }
}

/// Hazard C1: openraft refused batch 4 of a pipeline and committed 5: it must be a no-op, not a poison pill.
#[tokio::test]
async fn a_batch_behind_a_hole_is_superseded_and_halts_nobody() {
    let node = alone().await;
    let fold = node.fold();
    let mut ahead = Fold::clone(&fold);
    let lost = decided(&ahead, 1);
    ahead.apply_sealed(&lost).unwrap();
    let behind_the_hole = decided(&ahead, 2);

    assert_eq!(write(&node, vec![behind_the_hole]).await.applied, [Applied::Superseded]);
    assert_eq!(node.fold().head, fold.head, "nothing changed");
    let answer = node.propose(token(3)).await.unwrap();
    assert_eq!(answer.seq, fold.head.seq.next(), "and the member goes on");
    node.close().await;
}

/// A batch of somebody else's takes the place of ours: the session ends, and its callers retry.
#[tokio::test]
async fn a_decider_whose_batch_is_superseded_begins_a_new_session_and_repeats_no_seq() {
    let node = alone().await;
    let session = node.leadership().borrow().ready_session().unwrap();
    // Behind the decider's back: its speculative head is now wrong.
    let stranger = decided(&node.fold(), 1);
    assert_eq!(write(&node, vec![stranger]).await.applied, [Applied::Applied(Seq(2))]);

    let refused = node.propose(token(2)).await.unwrap_err();
    assert!(matches!(refused, ProposeError::Retry { .. }), "{refused:?}");
    let mut leadership = node.leadership();
    let next = leadership.wait_for(|leadership| leadership.ready_session().is_some_and(|next| next > session));
    tokio::time::timeout(Duration::from_secs(30), next).await.unwrap().unwrap();
    assert_eq!(node.propose(token(3)).await.unwrap().seq, Seq(3));
    node.close().await;
}

/// Ends nothing, and remembers what was said.
#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl crate::platform::Exit for Said {
    fn fatal(&self, why: &dyn std::fmt::Display) {
        self.0.lock().unwrap().push(why.to_string());
    }
}

/// Only a batch that fits and does not decode stops a host; one that is no batch at all cannot be shown not to fit.
#[tokio::test]
async fn bytes_that_are_no_batch_stop_the_host_in_words() {
    let said = Arc::new(Said::default());
    let platform = Platform { disk: Arc::new(MemoryDisk::new()), exit: said.clone(), ..Platform::real() };
    let config = NodeConfig::new("/data", "0.0.0.0:0".parse().unwrap(), "192.0.2.1:7443");
    let node = Node::start_on(config, platform, Switchboard::new().transport(HostId(1))).await.unwrap();
    node.inner
        .raft
        .initialize(BTreeMap::from([(1, PeerAddress { address: "192.0.2.1:7443".to_owned() })]))
        .await
        .unwrap();
    node.wait_to_lead(Duration::from_secs(30)).await.unwrap();

    let garbage = SealedBatch::from_bytes(codec::seal(RecordKind::Batch, b"garbage"));
    let (responder, completion) = ProgressResponder::complete_only();
    node.inner.raft.write(Proposal::new(vec![garbage])).responder(responder).await.unwrap();
    assert!(completion.await.is_err(), "its proposer is not answered");
    assert!(said.0.lock().unwrap()[0].contains("does not decode"), "{:?}", said.0.lock().unwrap());
}

/// A clock that runs ahead of the real one by as much as the test says.
#[derive(Default)]
struct Skewed(AtomicU64);

impl Clock for Skewed {
    fn wall_ms(&self) -> u64 {
        crate::platform::RealClock.wall_ms()
    }

    fn boottime_ns(&self) -> u64 {
        crate::platform::RealClock.boottime_ns() + self.0.load(Ordering::Relaxed)
    }
}

/// A lone voter is acknowledged by nobody: that is no refusal, and it goes on for ever.
#[tokio::test]
async fn a_lone_leader_is_not_refused_by_silence() {
    let node = alone().await;
    // Longer than a refused leader of several voters is given.
    tokio::time::sleep(Duration::from_millis(config::REFUSED_LEADER_MS + 1000)).await;
    assert!(!node.metrics().guard.is_refused);
    assert_eq!(node.metrics().quorum_ack_age_ms, None);
    node.propose(token(1)).await.unwrap();
    node.close().await;
}

/// Hazard H21: heartbeats do not need the leader's disk, so a leader whose disk hangs would lead for ever.
#[tokio::test]
async fn a_leader_whose_disk_hangs_gives_up_the_lead_or_ends() {
    let (said, clock) = (Arc::new(Said::default()), Arc::new(Skewed::default()));
    let node = alone_on(Platform { exit: said.clone(), clock: clock.clone(), ..Platform::real() }).await;
    let until = async |holds: &dyn Fn() -> bool| {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", node.metrics().guard);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // Whatever else the writer ends meanwhile, this append does not.
    let hung_since_ns = clock.boottime_ns();
    let hang = || node.inner.health.append_began(hung_since_ns);
    clock.0.fetch_add(3_000_000_000, Ordering::Relaxed);
    until(&|| {
        hang();
        node.metrics().guard.is_gray
    })
    .await;
    assert_eq!(node.metrics().guard.hand_overs, 1, "it asked for a successor");
    assert!(said.0.lock().unwrap().is_empty(), "and gave it time");
    clock.0.fetch_add(3_000_000_000, Ordering::Relaxed);
    until(&|| {
        hang();
        !said.0.lock().unwrap().is_empty()
    })
    .await;
    assert!(said.0.lock().unwrap()[0].contains("disk hangs"));
    node.close().await;
}
