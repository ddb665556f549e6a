//! Snapshots: built, restarted from, sent in pieces, broken off, damaged on the way, installed across power cuts.

use std::sync::Arc;

use consensus::store::Store;
use consensus::store::event_store::EventStoreError;
use consensus::store::snapshot::Manifest;
use consensus::store::snapshot::SnapshotError;
use consensus::store::state_machine::PulledEnd;
use openraft::storage::RaftStateMachine;
use statemachine::Seq;
use statemachine::batch::SealedBatch;

use crate::world::*;

/// A host that has applied entries 1 to 39 and holds a snapshot of them.
async fn leader(world: &World) -> Store {
    let mut store = world.open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..40);
    append(&mut store, entries.clone()).await.expect("durable");
    apply(&mut store, entries).await.expect("applied");
    build_snapshot(&mut store).await.expect("built");
    store
}

async fn install(store: &mut Store, snapshot: consensus::types::Snapshot) -> std::io::Result<()> {
    RaftStateMachine::<C>::install_snapshot(&mut store.state_machine, &snapshot.meta, snapshot.snapshot).await
}

#[tokio::test]
async fn a_restart_begins_at_the_snapshot_and_serves_the_whole_stream() {
    let world = World::new();
    let mut store = leader(&world).await;
    purge(&mut store, log_id(1, 39)).await.expect("purged");
    let fold = store.fold.borrow().clone();
    close(store).await;
    let store = world.open().await.expect("opens");
    assert_eq!(*store.fold.borrow(), fold);
    assert_eq!(all_seqs(&store).await, (1..=78).collect::<Vec<_>>());
}

#[tokio::test]
async fn batches_sealed_after_the_snapshot_are_applied_again_and_not_stored_twice() {
    let world = World::new();
    let mut store = leader(&world).await;
    let mut chain = Chain { head: store.fold.borrow().head };
    let more = chain.entries(1, 40..80);
    append(&mut store, more.clone()).await.expect("durable");
    apply(&mut store, more.clone()).await.expect("applied");
    close(store).await;
    let mut store = world.open().await.expect("opens");
    assert_eq!(store.events.head(), Seq(78), "applied is what the snapshot says until the log is applied again");
    apply(&mut store, more).await.expect("applied");
    assert_eq!(all_seqs(&store).await, (1..=158).collect::<Vec<_>>());
    assert_eq!(world.fatal.reasons(), Vec::<String>::new());
}

#[tokio::test]
async fn a_newcomer_pulls_the_snapshot_in_pieces_and_goes_on_after_a_break() {
    let (leader_world, newcomer_world) = (World::new(), World::new());
    let from = leader(&leader_world).await;
    let mut to = newcomer_world.open().await.expect("opens");
    let offered = from.snapshots.current().expect("a snapshot");
    let manifest = offered.manifest.encode();
    let mut pieces = 0;
    // The transfer breaks off after each piece and begins again.
    let handle = loop {
        let receiving = to.snapshots.receive(&manifest).expect("a valid manifest");
        let Some((part, offset)) = receiving.wants().expect("readable") else {
            break receiving.finish().expect("all here");
        };
        let piece = from.snapshots.chunk(&part, offset, 300).expect("readable").expect("held");
        receiving.write(&part, offset, &piece).expect("fits");
        pieces += 1;
    };
    assert!(pieces > 20, "small pieces, {pieces} of them");
    install(&mut to, handle.snapshot()).await.expect("installed");
    assert_eq!(to.fold.borrow().head, from.fold.borrow().head);
    assert_eq!(to.fold.borrow().state.digest(), from.fold.borrow().state.digest());
    assert_eq!(all_seqs(&to).await, (1..=78).collect::<Vec<_>>());
    close(to).await;
    let to = newcomer_world.open().await.expect("opens");
    assert_eq!(all_seqs(&to).await, (1..=78).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_follower_pulls_only_the_segments_that_it_lacks() {
    let (leader_world, follower_world) = (World::new(), World::new());
    let from = leader(&leader_world).await;
    let mut to = follower_world.open().await.expect("opens");
    apply(&mut to, Chain::default().entries(1, 1..30)).await.expect("applied");
    let offered = from.snapshots.current().expect("a snapshot");
    let receiving = to.snapshots.receive(&offered.manifest.encode()).expect("a valid manifest");
    let (first, _) = receiving.wants().expect("readable").expect("something is lacking");
    let consensus::store::snapshot::Part::Segment(id) = first else { panic!("events come before the state") };
    assert!(id.last > Seq(40), "what the follower has sealed is not asked for again, {first} was");
    install(&mut to, offered.snapshot()).await.expect("installed");
    assert_eq!(all_seqs(&to).await, (1..=78).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_part_that_was_damaged_on_the_way_is_fetched_again() {
    let (leader_world, newcomer_world) = (World::new(), World::new());
    let from = leader(&leader_world).await;
    let to = newcomer_world.open().await.expect("opens");
    let offered = from.snapshots.current().expect("a snapshot");
    let receiving = to.snapshots.receive(&offered.manifest.encode()).expect("a valid manifest");
    let (part, offset) = receiving.wants().expect("readable").expect("something is lacking");
    let mut piece = from.snapshots.chunk(&part, offset, 1 << 20).expect("readable").expect("held");
    piece[40] ^= 1;
    let refused = receiving.write(&part, offset, &piece);
    assert!(matches!(refused, Err(SnapshotError::PartDamaged { .. })));
    assert_eq!(receiving.wants().expect("readable"), Some((part, 0)), "it begins again");
    assert!(matches!(receiving.finish(), Err(SnapshotError::Incomplete(_))));
}

#[tokio::test]
async fn a_manifest_that_names_what_no_host_writes_is_refused() {
    let world = World::new();
    let store = leader(&world).await;
    let sound = (*store.snapshots.current().expect("a snapshot").manifest).clone();
    assert!(store.snapshots.receive(&sound.encode()).is_ok());
    type Change = fn(&mut Manifest);
    let changes: [(&str, Change); 5] = [
        ("a state that fills the disk", |manifest| manifest.state.bytes = 1 << 40),
        ("a segment that fills the disk", |manifest| manifest.segments[0].bytes = u64::MAX),
        ("a segment that ends before it begins", |manifest| manifest.segments[0].first = Seq(1 << 40)),
        ("segments out of order", |manifest| manifest.segments.reverse()),
        ("events after its head", |manifest| manifest.segments.last_mut().expect("some").last = Seq(1 << 40)),
    ];
    for (what, change) in changes {
        let mut manifest = sound.clone();
        change(&mut manifest);
        let refused = store.snapshots.receive(&manifest.encode()).map(|_| ());
        assert!(matches!(refused, Err(SnapshotError::Implausible { .. })), "{what}: {refused:?}");
    }
}

#[tokio::test]
async fn a_member_that_sends_rubbish_does_not_end_a_host_that_pulls() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let first = Arc::new(chain.next());
    let sound = chain.next();
    let mut rubbish = sound.as_bytes().to_vec();
    *rubbish.last_mut().expect("bytes") ^= 1;
    let batches = vec![first, Arc::new(SealedBatch::from_bytes(rubbish))];
    let ended = store.state_machine.append_pulled(batches, 1000).await;
    assert!(matches!(ended, Ok(PulledEnd::Unsound { .. })), "{ended:?}");
    assert_eq!(store.fold.borrow().head.seq, Seq(1), "what came before it counts");
    let ended = store.state_machine.append_pulled(vec![Arc::new(sound)], 1000).await;
    assert_eq!(ended.expect("another member's"), PulledEnd::At(Seq(2)));
    assert_eq!(world.fatal.reasons(), Vec::<String>::new());
}

#[test]
fn a_power_cut_at_any_change_of_an_install_leaves_the_old_state_or_the_new() {
    let leader_world = World::new();
    let home = runtime();
    let from = home.block_on(leader(&leader_world));
    let offered = from.snapshots.current().expect("a snapshot");
    let mut interrupted = 0;
    let mut tallies = Tallies::default();
    for at in 0.. {
        let world = World::new();
        let first = runtime();
        let done = first.block_on(async {
            let mut to = world.open().await.expect("opens");
            let entries = Chain::default().entries(1, 1..10);
            append(&mut to, entries.clone()).await.expect("durable");
            apply(&mut to, entries).await.expect("applied");
            build_snapshot(&mut to).await.expect("built");
            world.disk.fail_after(at);
            install(&mut to, offered.clone().snapshot()).await.is_ok()
        });
        drop(first);
        world.disk.power_cut(at + 11);
        runtime().block_on(async {
            let store = world.open().await.unwrap_or_else(|error| panic!("change {at}: {error}"));
            let head = store.events.head().0;
            assert!(head == 78 || (head == 18 && !done), "change {at}: the state is at seq {head}");
            assert_eq!(all_seqs(&store).await, (1..=head).collect::<Vec<_>>(), "change {at}");
            close(store).await;
        });
        if done {
            break;
        }
        interrupted += 1;
        let (_, path) = world.disk.failed_at().expect("it was interrupted");
        tallies.of(&path).harmless += 1;
    }
    tallies.print("install cut");
    assert!(interrupted > 20, "the install was interrupted at {interrupted} places");
}

/// A site that is born, and then trims its stream.
fn trimming(chain: &mut Chain, upto: u64) -> statemachine::batch::SealedBatch {
    let events = vec![statemachine::event::EventsTrimmed { upto: Seq(upto) }.into()];
    chain.seal(events)
}

#[tokio::test]
async fn a_trim_takes_effect_with_the_next_snapshot_and_whoever_reads_behind_it_is_told() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let born = chain.born();
    let mut entries = vec![entry(1, 1, vec![born])];
    entries.extend(chain.entries(1, 2..40));
    append(&mut store, entries.clone()).await.expect("durable");
    apply(&mut store, entries).await.expect("applied");
    build_snapshot(&mut store).await.expect("built");
    assert_eq!(store.events.oldest(), Seq(1));

    let trim = vec![entry(1, 40, vec![trimming(&mut chain, 50)])];
    append(&mut store, trim.clone()).await.expect("durable");
    apply(&mut store, trim).await.expect("applied");
    assert_eq!(store.events.oldest(), Seq(1), "nothing goes before a snapshot says so");
    build_snapshot(&mut store).await.expect("built");
    let oldest = store.events.oldest();
    assert!(oldest > Seq(1) && oldest <= Seq(51), "oldest is {oldest}");
    assert!(matches!(store.events.read(Seq(0), 1, 1).await, Err(EventStoreError::Trimmed { .. })));
    let seqs = all_seqs(&store).await;
    assert_eq!(seqs, (oldest.0..=78).collect::<Vec<_>>());

    // A host that starts, and one that comes new, begin there too.
    let offered = store.snapshots.current().expect("a snapshot");
    let newcomer = World::new();
    let mut other = newcomer.open().await.expect("opens");
    let own = Chain::default().entries(1, 1..4);
    append(&mut other, own.clone()).await.expect("durable");
    install(&mut other, offered.clone().snapshot()).await.expect("installed");
    assert_eq!(all_seqs(&other).await, seqs, "what it had before lies before a gap, and is gone");
    close(other).await;
    let other = newcomer.open().await.expect("opens");
    assert_eq!(all_seqs(&other).await, seqs);
    close(other).await;
    close(store).await;
    let store = world.open().await.expect("opens");
    assert_eq!(all_seqs(&store).await, seqs);
    close(store).await;
}

#[tokio::test]
async fn names_of_parts_from_other_hosts_cannot_be_paths() {
    use consensus::store::snapshot::Part;
    let world = World::new();
    let store = leader(&world).await;
    let manifest = store.snapshots.current().expect("a snapshot").manifest;
    for part in manifest.segments.iter().map(|id| Part::Segment(*id)).chain([Part::State(manifest.state)]) {
        assert_eq!(Part::from_name(&part.name()), Some(part));
    }
    for name in ["", "state", "../lock", "state-1-../../etc/passwd", "events-1-2-3-4", "state--0"] {
        assert_eq!(Part::from_name(name), None, "{name}");
    }
}
