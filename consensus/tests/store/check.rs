//! `quorate store check` and `rebuild`: damage is named, a check changes nothing, and a state comes back from its events.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use consensus::platform::Disk;
use consensus::platform::Platform;
use consensus::store::Store;
use consensus::store::StoreError;
use consensus::store::check::Finding;
use consensus::store::check::Inspection;
use consensus::store::check::Part;
use consensus::store::memory_disk::MemoryDisk;

use crate::flips::a_life;
use crate::world::*;

fn inspect(disk: &MemoryDisk) -> Inspection {
    Inspection::begin_on(Arc::new(disk.clone()), Path::new("/data")).expect("nobody else uses it")
}

fn check(disk: &MemoryDisk) -> Vec<Finding> {
    inspect(disk).check(&mut |_, _| {}).expect("readable")
}

fn damaged(findings: &[Finding]) -> Vec<Part> {
    findings.iter().filter(|finding| finding.damage.is_some()).map(|finding| finding.part).collect()
}

fn contents(disk: &MemoryDisk) -> Vec<(PathBuf, Vec<u8>)> {
    let read = |(path, _): (PathBuf, usize)| (path.clone(), disk.read(&path).expect("readable"));
    disk.files().into_iter().filter(|(path, _)| !path.ends_with("lock")).map(read).collect()
}

fn state_files(disk: &MemoryDisk) -> Vec<PathBuf> {
    let files = disk.files().into_iter().map(|(path, _)| path);
    files.filter(|path| path.extension().is_some_and(|it| it == "state")).collect()
}

async fn lived() -> World {
    let world = World::new();
    a_life(&world).await;
    world
}

#[tokio::test]
async fn a_whole_directory_is_sound_and_a_check_changes_none_of_it() {
    let world = lived().await;
    let before = contents(&world.disk);
    let found = check(&world.disk);
    assert_eq!(damaged(&found), [], "{found:#?}");
    let events = found.iter().find(|finding| finding.part == Part::Events).expect("events are judged");
    assert_eq!(events.holds, "batches 1 to 58");
    assert_eq!(contents(&world.disk), before);
}

#[tokio::test]
async fn a_directory_in_use_and_one_that_is_not_there_are_refused_in_words() {
    let dir = tempfile::tempdir().expect("a folder");
    let data = dir.path().join("data");
    let begin = |dir: &Path| Inspection::begin(dir).map(|_| ());
    assert!(matches!(begin(&data), Err(StoreError::NoStore { .. })));
    let store = Store::open(Platform::real(), &data).await.expect("opens");
    assert!(matches!(begin(&data), Err(StoreError::InUse { .. })));
    close(store).await;
    assert!(begin(&data).is_ok());
}

/// Every byte of the events and of the snapshot that counts.
#[tokio::test]
async fn any_flipped_bit_of_a_segment_or_of_the_snapshot_is_named() {
    let world = lived().await;
    let kept = world.disk.files();
    let mut flips = 0;
    for (path, len) in kept {
        let part = match path.parent().and_then(Path::file_name).and_then(|name| name.to_str()) {
            Some("segments") => Part::Events,
            Some("snapshots") => Part::State,
            _ => continue,
        };
        // The state before the current one stays for peers that are pulling it; no manifest of ours names it.
        let is_named = part == Part::Events || names_current(&world, &path);
        for byte in 0..len {
            let disk = world.disk.copy();
            assert!(disk.flip_bit(&path, byte as u64 * 8 + byte as u64 % 8));
            let found = damaged(&check(&disk));
            assert_eq!(found.contains(&part), is_named, "byte {byte} of {}: {found:?}", path.display());
            flips += 1;
        }
    }
    assert!(flips > 1000, "{flips} flips");
}

/// Damage to it is damage to the snapshot.
fn names_current(world: &World, path: &Path) -> bool {
    let disk = world.disk.copy();
    disk.remove(path).expect("removed");
    // Without a manifest nothing tells what is missing but the log, which was purged behind it.
    let found = damaged(&check(&disk));
    found.contains(&Part::State) || found.contains(&Part::Log)
}

#[tokio::test]
async fn a_lost_or_damaged_state_is_made_again_bit_for_bit_from_the_events() {
    let world = lived().await;
    let before = contents(&world.disk);
    let current = state_files(&world.disk).into_iter().find(|path| names_current(&world, path)).expect("a state");
    // A manifest that nobody can read cannot be made up.
    let disk = world.disk.copy();
    assert!(disk.flip_bit(Path::new("/data/snapshots/current"), 999));
    assert!(matches!(inspect(&disk).rebuild(&mut |_, _| {}), Err(StoreError::CannotRebuild { .. })));
    assert!(check(&disk).iter().all(|it| it.part != Part::State || !it.can_be_rebuilt));
    for is_lost in [true, false] {
        let disk = world.disk.copy();
        match is_lost {
            true => disk.remove(&current).expect("removed"),
            false => assert!(disk.flip_bit(&current, 4321)),
        }
        assert_eq!(damaged(&check(&disk)), [Part::State]);
        let done = inspect(&disk).rebuild(&mut |_, _| {}).expect("rebuilt");
        assert_eq!(done.len(), 1, "{done:?}");
        assert_eq!(damaged(&check(&disk)), []);
        assert_eq!(contents(&disk), before);
        let store = World { disk, ..world.clone() }.on_its_disk().open().await.expect("opens");
        close(store).await;
    }
}

/// What a check calls sound must start, and what it calls damaged must not be taken for whole.
#[tokio::test]
async fn a_part_that_is_gone_is_missed_by_the_check_as_by_the_next_start() {
    let world = lived().await;
    for gone in ["/data/wal", "/data/snapshots"] {
        let disk = world.disk.copy();
        disk.remove_dir_all(Path::new(gone)).expect("removed");
        assert_eq!(damaged(&check(&disk)), [Part::Log], "{gone}");
        let opened = World { disk, ..world.clone() }.on_its_disk().open().await.map(|_| ());
        let lost = matches!(opened, Err(StoreError::CommittedLost { .. } | StoreError::SnapshotLost { .. }));
        assert!(lost, "{gone}: {opened:?}");
    }
}

#[tokio::test]
async fn votes_and_log_are_never_made_up() {
    let world = lived().await;
    let disk = world.disk.copy();
    disk.remove(Path::new("/data/meta.redb")).expect("removed");
    let found = check(&disk);
    assert_eq!(damaged(&found), [Part::Votes]);
    assert!(found.iter().all(|it| it.damage.is_none() || !it.can_be_rebuilt));
    // A damaged segment is no ground to build on.
    let disk = world.disk.copy();
    let segment =
        disk.files().into_iter().map(|(path, _)| path).find(|path| path.extension().is_some_and(|it| it == "seg"));
    assert!(disk.flip_bit(&segment.expect("a segment"), 999));
    assert!(matches!(inspect(&disk).rebuild(&mut |_, _| {}), Err(StoreError::CannotRebuild { .. })));
}
