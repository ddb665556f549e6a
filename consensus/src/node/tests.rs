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
use statemachine::fold::Applied;
use statemachine::state::Fingerprint;
use statemachine::state::TokenPurpose;
use uuid::Uuid;

use super::*;
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
    let platform = Platform { disk: Arc::new(MemoryDisk::new()), ..Platform::real() };
    let config = NodeConfig::new("/data", "0.0.0.0:0".parse().unwrap(), "192.0.2.1:7443");
    let node = Node::start_on(config, platform, Switchboard::new().transport(HostId(1))).await.unwrap();
    let first_host = statemachine::command::HostCandidate {
        name: "host1".to_owned(),
        address: "192.0.2.1:7443".to_owned(),
        public_key: Fingerprint([1; 32]),
        facts: statemachine::command::HostFacts {
            boot: statemachine::BootId(Uuid::from_u128(1)),
            capacity: statemachine::state::Capacity { cpu_threads: 4, memory_mib: 4096 },
            feature_level: 1,
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

/// Only a batch that fits and does not decode stops a host; one that is no batch at all cannot be shown not to fit.
#[tokio::test]
async fn bytes_that_are_no_batch_stop_the_host_in_words() {
    #[derive(Default)]
    struct Said(Mutex<Vec<String>>);
    impl crate::platform::Exit for Said {
        fn fatal(&self, why: &dyn std::fmt::Display) {
            self.0.lock().unwrap().push(why.to_string());
        }
    }
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
