//! Invariant D1 on one host: the power is cut at every single change of the disk, and what was acknowledged before is
//! there after.

use consensus::platform::Blocking;
use consensus::store::Store;
use consensus::types::Entry;
use consensus::types::LogId;

use crate::world::*;

/// Ways to lose what was not synced, at each change.
const TORN: u64 = 3;

/// What the host was told is durable, and what was under way when the power went.
#[derive(Default)]
struct Story {
    term: u64,
    acked: Vec<Entry>,
    /// Acknowledged to be gone up to here.
    purged: Option<LogId>,
    /// A truncation or purge was asked for and not answered.
    unsure: Option<LogId>,
    unsure_purge: Option<LogId>,
    snapshot_seq: u64,
}

/// A day of a host: votes, appends, an overruled tail, snapshots, purges. Ends early when the power goes.
async fn live(store: &mut Store, story: &mut Story) -> std::io::Result<()> {
    let mut chain = Chain::default();
    save_vote(store, 1).await?;
    story.term = 1;
    for chunk in chain.entries(1, 1..13).chunks(3) {
        append(store, chunk.to_vec()).await?;
        story.acked.extend_from_slice(chunk);
    }
    append(store, chain.clone().entries(1, 13..16)).await?;
    save_vote(store, 2).await?;
    story.term = 2;
    // Entries 13 to 15 were never in the story: another leader overrules them.
    story.unsure = Some(log_id(1, 12));
    truncate(store, Some(log_id(1, 12))).await?;
    story.unsure = None;
    let entries = chain.entries(2, 13..30);
    append(store, entries.clone()).await?;
    story.acked.extend_from_slice(&entries);
    apply(store, story.acked[..20].to_vec()).await?;
    let snapshot = build_snapshot(store).await?;
    story.snapshot_seq = snapshot.snapshot.manifest.head.seq.0;
    story.unsure_purge = Some(log_id(2, 20));
    purge(store, log_id(2, 20)).await?;
    story.unsure_purge = None;
    story.purged = Some(log_id(2, 20));
    let entries = chain.entries(2, 30..40);
    append(store, entries.clone()).await?;
    story.acked.extend_from_slice(&entries);
    apply(store, story.acked[20..39].to_vec()).await?;
    let snapshot = build_snapshot(store).await?;
    story.snapshot_seq = snapshot.snapshot.manifest.head.seq.0;
    Ok(())
}

/// After the power is back: nothing acknowledged is missing.
async fn check(store: &Store, story: &Story, at: u64) {
    let reader = store.log.reader();
    let term = reader.vote().map_or(0, |vote| vote.leader_id.term);
    assert!(term >= story.term, "change {at}: the vote of term {} turned back to {term}", story.term);

    let purged = reader.purged();
    assert!(purged >= story.purged, "change {at}: purged entries came back");
    let surely_purged_or_asked = story.purged.max(story.unsure_purge);
    assert!(purged <= surely_purged_or_asked, "change {at}: entries are gone that nobody purged");
    let from = purged.map_or(1, |purged| purged.index + 1);
    let entries = all_entries(store).await;
    let expected: Vec<&Entry> = story.acked.iter().filter(|entry| entry.log_id.index >= from).collect();
    assert!(entries.len() >= expected.len(), "change {at}: {} of {} entries", entries.len(), expected.len());
    for (found, expected) in entries.iter().zip(&expected) {
        assert_eq!(found, *expected, "change {at}");
    }

    let current = store.snapshots.current();
    let seq = current.map_or(0, |snapshot| snapshot.manifest.head.seq.0);
    assert!(seq >= story.snapshot_seq, "change {at}: snapshot {} turned back to {seq}", story.snapshot_seq);
    if let Some(purged) = purged {
        let covered = store.snapshots.current().and_then(|snapshot| snapshot.manifest.last_applied);
        assert!(covered >= Some(purged), "change {at}: the log was purged beyond what a snapshot covers");
    }
    let seqs = all_seqs(store).await;
    let head = store.events.head().0;
    assert_eq!(seqs, (1..=head).collect::<Vec<_>>(), "change {at}: the stream has a gap");
}

fn changes_of_a_whole_life() -> u64 {
    let world = World::new();
    runtime().block_on(async {
        let mut store = world.open().await.expect("opens");
        live(&mut store, &mut Story::default()).await.expect("nothing fails");
        close(store).await;
    });
    assert_eq!(world.fatal.reasons(), Vec::<String>::new());
    world.disk.changes()
}

#[test]
fn a_power_cut_at_any_change_loses_nothing_acknowledged() {
    let changes = changes_of_a_whole_life();
    assert!(changes > 100, "the story touches the disk {changes} times");
    let mut tallies = Tallies::default();
    for (at, torn) in (0..changes).flat_map(|at| (0..TORN).map(move |torn| (at, torn))) {
        let seed = (at * TORN + torn) * 7919 + 1;
        let world = World::new();
        let mut story = Story::default();
        world.disk.fail_after(at);
        let first = runtime();
        first.block_on(async {
            if let Ok(mut store) = world.open().await {
                live(&mut store, &mut story).await.ok();
            }
        });
        drop(first);
        world.disk.power_cut(seed);
        runtime().block_on(async {
            let store = match world.open().await {
                Ok(store) => store,
                Err(error) => panic!("change {at}, seed {seed}: {error}"),
            };
            check(&store, &story, at).await;
            close(store).await;
        });
        // Whatever is wrong has panicked above, with its change and seed.
        if let Some((_, path)) = world.disk.failed_at() {
            tallies.of(&path).harmless += 1;
        }
    }
    tallies.print("power cut at");
}

/// redb writes once more when it is dropped: a start that met it halfway found `meta.redb` damaged.
#[test]
fn a_closed_store_holds_no_file_and_writes_no_more() {
    let mut world = World::new();
    world.platform.blocking = Blocking::Threads;
    runtime().block_on(async {
        for round in 1..=40 {
            let mut store = world.open().await.unwrap_or_else(|error| panic!("round {round}: {error}"));
            save_vote(&mut store, round).await.expect("durable");
            append(&mut store, vec![blank(round, round)]).await.expect("durable");
            close(store).await;
            assert_eq!(world.disk.open_files(), Vec::<std::path::PathBuf>::new(), "round {round}");
        }
    });
}

#[test]
fn a_disk_error_ends_the_host_and_is_not_retried() {
    let world = World::new();
    runtime().block_on(async {
        let mut store = world.open().await.expect("opens");
        append(&mut store, vec![blank(1, 1)]).await.expect("durable");
        world.disk.fail_after(0);
        append(&mut store, vec![blank(1, 2)]).await.expect_err("the disk is gone");
        append(&mut store, vec![blank(1, 3)]).await.expect_err("and stays gone");
    });
    assert_eq!(world.fatal.reasons().len(), 1, "{:?}", world.fatal.reasons());
}
