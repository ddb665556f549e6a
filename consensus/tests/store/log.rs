//! The log across restarts: what was acknowledged is there, what was overruled is not.

use consensus::store::StoreError;
use consensus::store::wal::WalError;

use crate::world::*;

async fn restart(world: &World, store: consensus::store::Store) -> consensus::store::Store {
    close(store).await;
    world.open().await.expect("a closed store opens")
}

#[tokio::test]
async fn a_restart_keeps_vote_and_entries_over_many_segments() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..40);
    save_vote(&mut store, 3).await.expect("saved");
    for chunk in entries.chunks(4) {
        append(&mut store, chunk.to_vec()).await.expect("durable");
    }
    let store = restart(&world, store).await;
    assert_eq!(all_entries(&store).await, entries);
    assert_eq!(store.log.reader().vote(), Some(vote(3)));
    assert!(store.health.counters().wal_disk_bytes > 4 * world.config.wal_segment_bytes, "the story crossed segments");
}

#[tokio::test]
async fn overruled_entries_do_not_come_back() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let kept = chain.entries(1, 1..6);
    append(&mut store, kept.clone()).await.expect("durable");
    append(&mut store, chain.clone().entries(1, 6..20)).await.expect("durable");
    truncate(&mut store, Some(log_id(1, 5))).await.expect("cut");
    let mut store = restart(&world, store).await;
    assert_eq!(all_entries(&store).await, kept);
    let replaced = chain.entries(2, 6..9);
    append(&mut store, replaced.clone()).await.expect("durable");
    let store = restart(&world, store).await;
    assert_eq!(all_entries(&store).await, [kept, replaced].concat());
}

#[tokio::test]
async fn purged_entries_free_their_segments_and_stay_away() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..60);
    for chunk in entries.chunks(5) {
        append(&mut store, chunk.to_vec()).await.expect("durable");
    }
    apply(&mut store, entries[..50].to_vec()).await.expect("applied");
    build_snapshot(&mut store).await.expect("built");
    let before = store.health.counters().wal_disk_bytes;
    purge(&mut store, log_id(1, 50)).await.expect("purged");
    assert!(store.health.counters().wal_disk_bytes < before / 2, "most segments are unlinked");
    let mut store = restart(&world, store).await;
    assert_eq!(all_entries(&store).await, entries[50..]);
    // A snapshot far beyond the end: the log goes on after it, and is nothing without it.
    purge(&mut store, log_id(4, 500)).await.expect("purged");
    append(&mut store, vec![blank(4, 501)]).await.expect("durable");
    assert_eq!(all_entries(&store).await, [blank(4, 501)]);
    assert_eq!(store.log.reader().purged(), Some(log_id(4, 500)));
    close(store).await;
    let error = world.open().await.map(|_| ()).expect_err("the snapshot is missing");
    assert!(matches!(error, StoreError::SnapshotLost { purged: 500 }), "{error}");
}

#[tokio::test]
async fn a_hole_in_the_log_is_refused() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    append(&mut store, vec![blank(1, 1)]).await.expect("durable");
    let error = append(&mut store, vec![blank(1, 3)]).await.expect_err("entry 2 is missing");
    assert!(error.to_string().contains("entry 3 was appended where 2 must follow"), "{error}");
}

#[tokio::test]
async fn a_torn_tail_is_cut_and_the_log_goes_on() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let mut chain = Chain::default();
    let entries = chain.entries(1, 1..3);
    append(&mut store, entries.clone()).await.expect("durable");
    let end = store.health.counters().wal_bytes;
    close(store).await;
    // The first bytes of a record that was never completed.
    let path = world.dir.join("wal/0000000000000001.wal");
    let file = consensus::platform::Disk::open(&world.disk, &path).expect("the segment exists");
    let header = record_end(&world, &path);
    file.write_at(header + end, b"Qr\x01\x02torn").expect("written");
    file.sync_data().expect("synced");

    let mut store = world.open().await.expect("a torn tail is no damage");
    assert_eq!(all_entries(&store).await, entries);
    let more = chain.entries(1, 3..5);
    append(&mut store, more.clone()).await.expect("durable");
    let store = restart(&world, store).await;
    assert_eq!(all_entries(&store).await, [entries, more].concat());
}

/// Length of a segment's header record.
fn record_end(world: &World, path: &std::path::Path) -> u64 {
    let bytes = consensus::platform::Disk::read(&world.disk, path).expect("readable");
    let kind = statemachine::codec::RecordKind::WalHeader;
    statemachine::codec::open_prefix(kind, &bytes, 64).expect("a header").1 as u64
}

#[tokio::test]
async fn no_flipped_bit_hides_an_entry_that_later_ones_prove() {
    let mut refused = 0;
    for bit in (0..2048 * 8).step_by(97) {
        let world = World::new();
        let mut store = world.open().await.expect("opens");
        let entries = Chain::default().entries(1, 1..4);
        for entry in &entries {
            append(&mut store, vec![entry.clone()]).await.expect("durable");
        }
        close(store).await;
        assert!(world.disk.flip_bit(&world.dir.join("wal/0000000000000001.wal"), bit));
        match world.open().await {
            // In the free space, or in the last write, which looks like one that never completed.
            Ok(store) => assert!(all_entries(&store).await.starts_with(&entries[..2]), "bit {bit} lost a proven entry"),
            Err(StoreError::Wal(WalError::Damaged { .. })) => refused += 1,
            Err(other) => panic!("bit {bit}: {other}"),
        }
    }
    assert!(refused > 20, "flips before the last write are refused, {refused} were");
}

#[tokio::test]
async fn a_flipped_bit_in_the_vote_file_is_refused_or_harmless() {
    let probe = World::new();
    let mut store = probe.open().await.expect("opens");
    save_vote(&mut store, 1).await.expect("saved");
    close(store).await;
    let bytes = consensus::platform::Disk::read(&probe.disk, &probe.dir.join("meta.redb")).expect("readable").len();
    for step in 0..150 {
        let bit = (bytes as u64 * 8 / 150) * step + step * 7 % 64;
        let world = World::new();
        let mut store = world.open().await.expect("opens");
        save_vote(&mut store, 7).await.expect("saved");
        save_vote(&mut store, 8).await.expect("saved");
        close(store).await;
        world.disk.flip_bit(&world.dir.join("meta.redb"), bit);
        match world.open().await {
            Ok(store) => assert_eq!(store.log.reader().vote(), Some(vote(8)), "bit {bit} turned a vote back"),
            Err(StoreError::Meta(_)) => {}
            Err(other) => panic!("bit {bit}: {other}"),
        }
    }
}

#[tokio::test]
async fn a_log_without_its_votes_is_refused() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    save_vote(&mut store, 5).await.expect("saved");
    close(store).await;
    consensus::platform::Disk::remove(&world.disk, &world.dir.join("meta.redb")).expect("removed");
    let error = world.open().await.err().expect("it might vote twice in a term").to_string();
    assert!(error.contains("forgotten its votes"), "{error}");
}

#[tokio::test]
async fn a_second_hostd_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().expect("a test folder");
    let platform = consensus::platform::Platform::real();
    let first = consensus::store::Store::open(platform.clone(), dir.path()).await.expect("opens");
    let second = consensus::store::Store::open(platform.clone(), dir.path()).await;
    assert!(matches!(second, Err(StoreError::InUse { .. })));
    close(first).await;
    let again = consensus::store::Store::open(platform, dir.path()).await;
    assert!(again.is_ok(), "the lock goes with its holder");
}

#[tokio::test]
async fn a_follower_that_lags_reads_old_entries_from_disk_in_pieces() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..200);
    for chunk in entries.chunks(9) {
        append(&mut store, chunk.to_vec()).await.expect("durable");
    }
    let reader = store.log.reader();
    let mut next = 1;
    while next < 200 {
        let some = reader.read_some(next, 200).await.expect("readable");
        assert_eq!(some, entries[next as usize - 1..next as usize - 1 + some.len()]);
        next += some.len() as u64;
    }
}

#[tokio::test]
async fn a_cut_tail_that_held_a_committed_entry_is_refused() {
    let world = World::new();
    let mut store = world.open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..4);
    append(&mut store, entries).await.expect("durable");
    let committed = Some(log_id(1, 3));
    openraft::storage::RaftLogStorage::<C>::save_committed(&mut store.log, committed).await.expect("noted");
    let end = store.health.counters().wal_bytes;
    close(store).await;
    let path = world.dir.join("wal/0000000000000001.wal");
    let last_byte = record_end(&world, &path) + end - 1;
    assert!(world.disk.flip_bit(&path, last_byte * 8));
    let refused = world.open().await;
    assert!(matches!(refused, Err(StoreError::CommittedLost { last: 2, committed: 3 })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_together_share_a_sync_and_survive_a_restart() {
    let dir = tempfile::tempdir().expect("a test folder");
    let config =
        consensus::store::StoreConfig { wal_segment_bytes: 64 << 10, log_cache_bytes: 8 << 10, ..Default::default() };
    let open = || consensus::store::Store::open_with(consensus::platform::Platform::real(), dir.path(), config.clone());
    let mut store = open().await.expect("opens");
    let entries = Chain::default().entries(1, 1..2001);
    let mut waiting = Vec::new();
    for entry in &entries {
        waiting.push(begin_append(&mut store, vec![entry.clone()]).await.expect("queued"));
    }
    for is_durable in waiting {
        is_durable.await.expect("durable");
    }
    let counters = store.health.counters();
    assert_eq!(counters.wal_entries, 2000);
    assert!(counters.wal_syncs < 1000, "{} syncs for 2000 appends", counters.wal_syncs);
    assert!(counters.wal_disk_bytes > 4 * config.wal_segment_bytes, "the story crossed segments");
    close(store).await;
    let store = open().await.expect("opens");
    assert_eq!(all_entries(&store).await, entries);
}
