//! One bit of one byte of every file of a data directory is flipped while the host is down: the next start says so, or
//! everything that was acknowledged is there. Never a third thing.

use std::path::PathBuf;

use consensus::store::Store;
use consensus::types::Entry;
use statemachine::Fold;

use crate::world::*;

/// Every so manieth byte; `QUORATE_FLIP_EVERY=1` takes all of them.
const FLIP_EVERY: usize = 5;

/// All that a host says of itself after a start.
#[derive(Debug, PartialEq)]
struct Told {
    entries: Vec<Entry>,
    vote: Option<consensus::types::Vote>,
    fold: Fold,
    seqs: Vec<u64>,
}

async fn told(store: &mut Store) -> Result<Told, String> {
    let mut reader = store.log.reader();
    let read = openraft::storage::RaftLogReader::<C>::try_get_log_entries(&mut reader, ..).await;
    let vote = openraft::storage::RaftLogReader::<C>::read_vote(&mut reader).await;
    Ok(Told {
        entries: read.map_err(|error| error.to_string())?,
        vote: vote.map_err(|error| error.to_string())?,
        fold: Fold::clone(&store.fold.borrow()),
        seqs: served(store).await?,
    })
}

async fn served(store: &Store) -> Result<Vec<u64>, String> {
    let mut after = statemachine::Seq(store.events.oldest().0 - 1);
    let mut seqs = Vec::new();
    loop {
        let batches = store.events.read(after, 64, 1 << 20).await.map_err(|error| error.to_string())?;
        let Some(last) = batches.last() else { return Ok(seqs) };
        after = last.seq;
        seqs.extend(batches.iter().map(|batch| batch.seq.0));
    }
}

/// A directory with everything in it: votes, many log segments, a truncation, a purge, two snapshots, event segments.
pub async fn a_life(world: &World) {
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    save_vote(&mut store, 1).await.expect("durable");
    let entries = chain.entries(1, 1..13);
    append(&mut store, entries.clone()).await.expect("durable");
    append(&mut store, chain.clone().entries(1, 13..16)).await.expect("durable");
    save_vote(&mut store, 2).await.expect("durable");
    truncate(&mut store, Some(log_id(1, 12))).await.expect("durable");
    apply(&mut store, entries).await.expect("applied");
    let entries = chain.entries(2, 13..30);
    append(&mut store, entries.clone()).await.expect("durable");
    apply(&mut store, entries[..8].to_vec()).await.expect("applied");
    build_snapshot(&mut store).await.expect("a snapshot");
    purge(&mut store, log_id(2, 16)).await.expect("purged");
    apply(&mut store, entries[8..].to_vec()).await.expect("applied");
    build_snapshot(&mut store).await.expect("a snapshot");
    let entries = chain.entries(2, 30..34);
    append(&mut store, entries).await.expect("durable");
    // A clean stop remembers what is committed: a cut of the log's end is told from a torn write by it.
    let last = Some(log_id(2, 33));
    openraft::storage::RaftLogStorage::<C>::save_committed(&mut store.log, last).await.expect("taken");
    close(store).await;
}

#[test]
fn no_flipped_bit_of_any_file_is_taken_for_true() {
    let every = std::env::var("QUORATE_FLIP_EVERY").ok().and_then(|it| it.parse().ok()).unwrap_or(FLIP_EVERY);
    let world = World::new();
    runtime().block_on(a_life(&world));
    let truth = runtime().block_on(async {
        let copy = World { disk: world.disk.copy(), ..world.clone() }.on_its_disk();
        let mut store = copy.open().await.expect("opens");
        told(&mut store).await.expect("is whole")
    });
    let mut tallies = Tallies::default();
    let mut wrong: Vec<(PathBuf, u64)> = Vec::new();
    for (path, len) in world.disk.files() {
        for byte in (0..len).step_by(every) {
            let bit = byte as u64 * 8 + (byte as u64 * 5 + 3) % 8;
            let copy = World { disk: world.disk.copy(), ..world.clone() }.on_its_disk();
            assert!(copy.disk.flip_bit(&path, bit));
            let after = runtime().block_on(async {
                let mut store = copy.open().await.map_err(|error| error.to_string())?;
                told(&mut store).await
            });
            let tally = tallies.of(&path);
            match after {
                Err(_) => tally.detected += 1,
                Ok(after) if after == truth => tally.harmless += 1,
                Ok(_) => {
                    tally.wrong += 1;
                    wrong.push((path.clone(), bit));
                }
            }
        }
    }
    tallies.print("flips in");
    assert_eq!(wrong, [], "flips that nobody noticed");
}
