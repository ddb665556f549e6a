//! The event stream as this host serves it (E1: ordered, unique, gapless).

use consensus::platform::Platform;
use consensus::store::Store;
use consensus::store::StoreConfig;
use consensus::store::event_store::EventStoreError;
use consensus::types::Entry;
use consensus::types::Payload;
use consensus::types::Proposal;
use statemachine::Seq;
use statemachine::fold::Applied;

use crate::world::*;

#[tokio::test]
async fn events_are_served_from_memory_and_from_sealed_segments_alike() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    apply(&mut store, Chain::default().entries(1, 1..50)).await.expect("applied");
    assert_eq!(all_seqs(&store).await, (1..=98).collect::<Vec<_>>());
    let sealed = store.events.read(Seq(0), 1000, 1 << 20).await.expect("readable");
    assert!(sealed.len() < 90, "the oldest events come from a segment on disk");
    let newest = store.events.read(Seq(97), 1000, 1 << 20).await.expect("readable");
    assert_eq!(newest.len(), 1);
    assert!(store.events.read(Seq(98), 10, 1000).await.expect("readable").is_empty());
}

#[tokio::test]
async fn a_cursor_from_the_future_is_told_so() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    apply(&mut store, Chain::default().entries(1, 1..3)).await.expect("applied");
    let ahead = store.events.read(Seq(9), 10, 1000).await;
    assert!(matches!(ahead, Err(EventStoreError::Ahead { head: Seq(4), .. })));
}

#[tokio::test]
async fn a_batch_that_does_not_follow_the_head_changes_nothing() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let (first, lost, orphan) = (chain.next(), chain.next(), chain.next());
    let entry = |index, batch| Entry { log_id: log_id(1, index), payload: Payload::Normal(Proposal::new(vec![batch])) };
    // The proposal between them was refused (hazard C1).
    apply(&mut store, vec![entry(1, first), entry(2, orphan)]).await.expect("a no-op is no error");
    assert_eq!(store.events.head(), Seq(1));
    assert_eq!(store.fold.borrow().head.seq, Seq(1));
    apply(&mut store, vec![entry(3, lost)]).await.expect("applied");
    assert_eq!(all_seqs(&store).await, [1, 2]);
    assert_eq!(world.fatal.reasons(), Vec::<String>::new());
}

#[tokio::test]
async fn an_undecodable_batch_stops_the_host_before_it() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let good = chain.next();
    let mut bytes = chain.next().as_bytes().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let bad = statemachine::batch::SealedBatch::from_bytes(bytes);
    let entry = Entry { log_id: log_id(1, 1), payload: Payload::Normal(Proposal::new(vec![good, bad])) };
    apply(&mut store, vec![entry]).await.expect_err("it cannot be understood");
    assert_eq!(store.fold.borrow().head.seq, Seq(0), "nothing of it was published");
    assert_eq!(world.fatal.reasons().len(), 1);
}

#[tokio::test]
async fn readers_are_woken_when_the_head_moves() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut head = store.events.watch_head();
    let entries = Chain::default().entries(1, 1..2);
    assert!(matches!(
        statemachine::Fold::default().apply_sealed(match &entries[0].payload {
            Payload::Normal(proposal) => &proposal.batches[0],
            _ => unreachable!("a chain has normal entries"),
        }),
        Ok(Applied::Applied(Seq(1)))
    ));
    apply(&mut store, entries).await.expect("applied");
    assert_eq!(*head.wait_for(|seq| *seq == Seq(2)).await.expect("the store is open"), Seq(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_stale_index_is_rebuilt_from_the_segments() {
    let dir = tempfile::tempdir().expect("a test folder");
    let config = StoreConfig { event_segment_bytes: 64 << 10, ..StoreConfig::default() };
    let open = || Store::open_with(Platform::real(), dir.path(), config.clone());
    let mut store = open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..1500);
    append(&mut store, entries.clone()).await.expect("durable");
    apply(&mut store, entries).await.expect("applied");
    build_snapshot(&mut store).await.expect("built");
    close(store).await;

    std::fs::remove_dir_all(dir.path().join("index")).expect("the index is a folder of its own");
    let store = open().await.expect("an index may be lost");
    assert_eq!(all_seqs(&store).await, (1..=2998).collect::<Vec<_>>());
    close(store).await;

    std::fs::remove_dir_all(dir.path().join("index")).expect("again");
    std::fs::create_dir(dir.path().join("index")).expect("a folder");
    std::fs::write(dir.path().join("index/db"), vec![0xa5; 100_000]).expect("rubbish in its place");
    let store = open().await.expect("rubbish in the index is no reason to stop");
    assert_eq!(all_seqs(&store).await, (1..=2998).collect::<Vec<_>>());
    close(store).await;
}
