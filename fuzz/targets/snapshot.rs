//! A snapshot as a peer offers it: its manifest, the names of its parts, and the parts, up to the state that is installed.
//!
//! The input is a list of offers. Hashes and digest are made right, so that it is the content that is judged.
#![no_main]

use std::path::Path;
use std::sync::Arc;
use std::sync::LazyLock;

use consensus::platform::Disk;
use consensus::store::index::MemoryIndex;
use consensus::store::memory_disk::MemoryDisk;
use consensus::store::segments::Segments;
use consensus::store::segments::StoredBatch;
use consensus::store::segments::file;
use consensus::store::segments::file::SegmentId;
use consensus::store::snapshot::MANIFEST_FORMAT;
use consensus::store::snapshot::Manifest;
use consensus::store::snapshot::Part;
use consensus::store::snapshot::Receiving;
use consensus::store::snapshot::SnapshotError;
use consensus::store::snapshot::Snapshots;
use consensus::store::snapshot::StateId;
use consensus::types::LogId;
use consensus::types::StoredMembership;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::log;
use fuzz::payload;
use fuzz::sealed;
use fuzz::site;
use fuzz::site::SmallSite;
use libfuzzer_sys::fuzz_target;
use statemachine::Fold;
use statemachine::Seq;
use statemachine::Stamp;
use statemachine::State;
use statemachine::batch::Head;
use statemachine::codec;
use statemachine::codec::RecordKind;
use statemachine::digest::Digest;
use statemachine::state::StateImage;

/// The piece is the manifest; its parts are what the piece says they are.
const MANIFEST: u8 = 0;
/// The piece is the content of the state file.
const STATE: u8 = 1;
/// The piece is the content of the state file, and the site's events come with it.
const WITH_EVENTS: u8 = 2;
/// The piece is a part's name.
const NAME: u8 = 3;
const KINDS: u8 = 4;

/// A peer's pieces are this long.
const CHUNK_BYTES: usize = 600;

type StateFile = (Head, Stamp, StateImage);

static SITE: LazyLock<SmallSite> = LazyLock::new(SmallSite::new);
static EVENTS: LazyLock<(SegmentId, Vec<u8>)> = LazyLock::new(events);

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut host = Host::new();
    host.offer(data, &[]);
    for (tag, piece) in Pieces(data) {
        match tag % KINDS {
            MANIFEST => host.offer(&sealed(RecordKind::SnapshotManifest, piece), piece),
            NAME => name(piece),
            kind => host.offer_state(piece, kind == WITH_EVENTS),
        }
    }
});

/// A host that receives snapshots.
struct Host {
    disk: Arc<dyn Disk>,
    snapshots: Arc<Snapshots>,
}

impl Host {
    fn new() -> Host {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
        let index = Arc::new(MemoryIndex::default());
        let segments =
            Segments::open(disk.clone(), Path::new("/segments"), index, 1 << 20, &[]).expect("an empty folder");
        let snapshots =
            Snapshots::new(disk.clone(), Path::new("/snapshots"), Path::new("/incoming"), Arc::new(segments), None);
        Host { disk, snapshots: snapshots.expect("an empty folder") }
    }

    /// A manifest, with some bytes for whatever part it asks for.
    fn offer(&mut self, manifest: &[u8], bytes: &[u8]) {
        if let Ok(manifest) = Manifest::decode(manifest, Path::new("manifest")) {
            let again = Manifest::decode(&manifest.encode(), Path::new("manifest"));
            assert_eq!(again.expect("it was encoded"), manifest, "a manifest survives being written");
        }
        let Ok(receiving) = self.snapshots.receive(manifest) else { return };
        for _ in 0..8 {
            let Ok(Some((part, offset))) = receiving.wants() else { break };
            name(part.name().as_bytes());
            let left = part.bytes().saturating_sub(offset).min(bytes.len() as u64);
            if receiving.write(&part, offset, &bytes[..left as usize]).is_err() {
                break;
            }
        }
        self.install(&receiving);
    }

    fn offer_state(&mut self, content: &[u8], with_events: bool) {
        let record = sealed(RecordKind::SnapshotState, content);
        let state = StateId { bytes: record.len() as u64, hash: *blake3::hash(&record).as_bytes() };
        let (head, digest) = match codec::decode::<StateFile>(content) {
            Ok((head, _, image)) => (head, State::from(image).recompute_digest()),
            Err(_) => (Head::default(), Digest::default()),
        };
        let (id, events) = &*EVENTS;
        let segments = with_events.then_some(*id).into_iter().collect();
        let last_applied = Some(LogId::new_term_index(log::TERM, 40));
        let membership = StoredMembership::default();
        let manifest = Manifest { format: MANIFEST_FORMAT, last_applied, membership, head, digest, state, segments };
        let receiving = self.snapshots.receive(&manifest.encode()).expect("a manifest that was just written");
        let whole = |part: &Part| if *part == Part::State(state) { &record } else { events };
        // What an earlier offer left of a part may have to be thrown away first.
        for _ in 0..2 * (record.len() + events.len()) / CHUNK_BYTES + 8 {
            match next_piece(&receiving, whole) {
                Ok(true) | Err(SnapshotError::PartDamaged { .. }) => {}
                Ok(false) => break,
                Err(error) => panic!("a right part is refused: {error}"),
            }
        }
        receiving.finish().expect("right parts arrive in the end");
        self.install(&receiving);
    }

    fn install(&mut self, receiving: &Receiving) {
        let Ok(handle) = receiving.finish() else { return };
        let Ok(installed) = self.snapshots.install(handle) else { return };
        site::look_at(&installed.fold);
        let loaded = Snapshots::load(self.disk.as_ref(), Path::new("/snapshots"));
        let (_, loaded) = loaded.expect("what was installed is read").expect("what was installed is there");
        assert_eq!(loaded.fold, installed.fold, "the next start has what was installed");
    }
}

/// Sends the piece that is asked for. False when none is.
fn next_piece<'a>(receiving: &Receiving, whole: impl Fn(&Part) -> &'a Vec<u8>) -> Result<bool, SnapshotError> {
    let Some((part, offset)) = receiving.wants()? else { return Ok(false) };
    let rest = whole(&part).get(offset as usize..).unwrap_or_default();
    receiving.write(&part, offset, &rest[..rest.len().min(CHUNK_BYTES)])?;
    Ok(true)
}

fn name(name: &[u8]) {
    let Some(part) = std::str::from_utf8(name).ok().and_then(Part::from_name) else { return };
    assert_eq!(Part::from_name(&part.name()), Some(part), "a part survives being named");
}

/// The site's events, as one segment.
fn events() -> (SegmentId, Vec<u8>) {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
    let stored = SITE
        .batches
        .iter()
        .zip(1..)
        .map(|(sealed, seq)| StoredBatch { seq: Seq(seq), sealed: Arc::new(sealed.clone()) });
    let stored: Vec<StoredBatch> = stored.collect();
    let (segment, _) = file::write(&disk, Path::new("/"), Head::default(), &stored).expect("memory takes it");
    (segment.id, disk.read(&segment.path).expect("memory is read"))
}

fn samples() -> Vec<Vec<u8>> {
    let content = |fold: &Fold| codec::encode(&(fold.head, fold.stamp, StateImage::from(&fold.state)));
    let (state, empty) = (content(&SITE.fold), content(&Fold::default()));
    let id = StateId { bytes: 400, hash: [7; 32] };
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        last_applied: Some(LogId::new_term_index(log::TERM, 40)),
        membership: StoredMembership::default(),
        head: SITE.fold.head,
        digest: SITE.fold.state.digest(),
        state: id,
        segments: vec![EVENTS.0],
    };
    let (whole, names) = (manifest.encode(), [Part::State(id).name(), Part::Segment(EVENTS.0).name()]);
    let mut samples = vec![
        joined([(MANIFEST, payload(&whole))]),
        joined([(STATE, empty.as_slice())]),
        joined([(STATE, state.as_slice())]),
        joined([(WITH_EVENTS, state.as_slice())]),
        joined([(STATE, empty.as_slice()), (WITH_EVENTS, state.as_slice())]),
        joined(names.iter().map(|name| (NAME, name.as_bytes()))),
    ];
    samples.push(whole);
    samples
}
