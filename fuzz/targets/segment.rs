//! Event segments as a disk or a peer might hand them over: opened, walked, served, and judged by `quorate store check`.
//!
//! The input is what the segments hold. Chain, hash and seal are made right where a piece does not say otherwise.
#![no_main]

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::LazyLock;

use consensus::platform::Disk;
use consensus::store::check::Inspection;
use consensus::store::index::MemoryIndex;
use consensus::store::memory_disk::MemoryDisk;
use consensus::store::segments::Segments;
use consensus::store::segments::file;
use consensus::store::segments::file::SegmentFile;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::payload;
use fuzz::sealed;
use fuzz::site::SmallSite;
use libfuzzer_sys::fuzz_target;
use statemachine::Seq;
use statemachine::batch::Head;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::RecordKind;

/// The batch of the small site that follows.
const NEXT: u8 = 0;
/// A batch that follows; the piece is what comes after its head.
const BATCH: u8 = 1;
/// A batch; the piece is all of it.
const RECORD: u8 = 2;
/// Bytes, as they are.
const BYTES: u8 = 3;
/// The end of a segment, with the right seal.
const SEAL: u8 = 4;
/// The end of a segment; the piece is its seal.
const ODD_SEAL: u8 = 5;
/// What the segment begins with instead of its header.
const ODD_HEADER: u8 = 6;
const KINDS: u8 = 7;

const DIR: &str = "/data/segments";

static SITE: LazyLock<SmallSite> = LazyLock::new(SmallSite::new);

/// A segment that is being written.
struct Draft {
    header: Vec<u8>,
    batches: Vec<u8>,
    first: Seq,
}

impl Draft {
    fn after(head: Head) -> Draft {
        let header = codec::seal_value(RecordKind::SegmentHeader, &(file::SEGMENT_FORMAT, head));
        Draft { header, batches: Vec::new(), first: Seq(head.seq.0.saturating_add(1)) }
    }

    /// The file. Without a seal, it gets the right one.
    fn sealed(&self, head: Head, seal: Option<&[u8]>) -> Vec<u8> {
        let content = [self.header.as_slice(), &self.batches].concat();
        let hash = *blake3::hash(&content).as_bytes();
        let right = codec::encode(&(self.first, head.seq, head, hash));
        let seal = sealed(RecordKind::SegmentSeal, seal.unwrap_or(&right));
        [content.as_slice(), &seal, &(seal.len() as u32).to_le_bytes()].concat()
    }
}

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let memory = MemoryDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(memory.clone());
    let mut count = 0;
    let mut look = |bytes: &[u8]| {
        count += 1;
        let path = PathBuf::from(format!("{DIR}/{count:02}{}", file::SUFFIX));
        disk.create(&path).and_then(|it| it.write_at(0, bytes)).expect("memory takes it");
        look_at(&disk, &path, bytes);
    };
    look(data);
    memory.remove_dir_all(Path::new(DIR)).expect("memory forgets it");
    segments(data).iter().for_each(|bytes| look(bytes));
    serve(&disk);
    let inspection = Inspection::begin_on(disk.clone(), Path::new("/data"));
    if let Ok(inspection) = inspection {
        inspection.check(&mut |_, _| {}).expect("memory is read");
        let _ = inspection.rebuild(&mut |_, _| {});
    }
});

/// The segments that the input describes.
fn segments(data: &[u8]) -> Vec<Vec<u8>> {
    let mut head = Head::default();
    let mut draft = Draft::after(head);
    let mut files = Vec::new();
    let mut ended = true;
    for (tag, piece) in Pieces(data) {
        let record = match tag % KINDS {
            NEXT => SITE.batches.get(head.seq.0 as usize).map(|it| it.as_bytes().to_vec()).unwrap_or_default(),
            BATCH => sealed(RecordKind::Batch, &[codec::encode(&head).as_slice(), piece].concat()),
            RECORD => sealed(RecordKind::Batch, piece),
            BYTES => piece.to_vec(),
            ODD_HEADER => {
                draft.header = sealed(RecordKind::SegmentHeader, piece);
                continue;
            }
            kind => {
                files.push(draft.sealed(head, (kind == ODD_SEAL).then_some(piece)));
                draft = Draft::after(head);
                ended = true;
                continue;
            }
        };
        draft.batches.extend_from_slice(&record);
        if tag % KINDS != BYTES && !record.is_empty() {
            head = Head { seq: head.seq.next(), hash: SealedBatch::from_bytes(record).hash() };
        }
        ended = false;
    }
    if !ended {
        files.push(draft.sealed(head, None));
    }
    files
}

fn look_at(disk: &Arc<dyn Disk>, path: &Path, bytes: &[u8]) {
    let Ok(segment) = file::open(disk, path) else { return };
    let id = segment.id;
    assert_eq!(id.bytes, bytes.len() as u64);
    let _ = file::verify(bytes, &id);
    assert_eq!(segment.chunk(0, u64::MAX).expect("memory is read"), bytes, "a peer gets the file");
    assert_eq!(segment.chunk(3, 100).expect("memory is read"), &bytes[3..bytes.len().min(103)]);
    let from_first = read(&segment, None, Seq(id.first.0.saturating_sub(1)));
    let Ok(marks) = segment.marks() else { return };
    for mark in marks {
        let found = read(&segment, Some(mark), Seq(mark.0.0.saturating_sub(1)));
        if mark.0 == id.first {
            assert_eq!(found, from_first, "the first mark is where the batches begin");
        }
    }
}

fn read(segment: &SegmentFile, mark: Option<(Seq, u64)>, after: Seq) -> Option<Vec<Seq>> {
    let batches = segment.read(mark, after, 64, 1 << 16).ok()??;
    Some(batches.iter().map(|batch| batch.seq).collect())
}

/// What a host does with the folder that it finds, and its readers.
fn serve(disk: &Arc<dyn Disk>) {
    let index = Arc::new(MemoryIndex::default());
    let Ok(segments) = Segments::open(disk.clone(), Path::new(DIR), index, 1 << 20, &[]) else { return };
    let mut after = Seq(segments.oldest().0.saturating_sub(1));
    for _ in 0..64 {
        let Ok(batches) = segments.read_sealed(after, 2, 1 << 16) else { return };
        let Some(last) = batches.last() else { return };
        assert!(last.seq > after, "a reader goes on");
        after = last.seq;
    }
}

fn samples() -> Vec<Vec<u8>> {
    let first = payload(SITE.batches[0].as_bytes());
    let rest = &first[codec::encode(&Head::default()).len()..];
    let header = codec::encode(&(file::SEGMENT_FORMAT, Head::default()));
    let seal = codec::encode(&(Seq(1), Seq(1), Head { seq: Seq(1), hash: SITE.batches[0].hash() }, [1u8; 32]));
    let next: (u8, &[u8]) = (NEXT, &[]);
    let end: (u8, &[u8]) = (SEAL, &[]);
    let pieces: [&[(u8, &[u8])]; 8] = [
        &[next],
        &[next, next, next, end, next, next],
        &[next, end, next, end, next, end],
        &[(BATCH, rest), end],
        &[(RECORD, first), next],
        &[(ODD_HEADER, &header), next],
        &[next, (ODD_SEAL, &seal)],
        &[next, (BYTES, b"Qr\x01\x01")],
    ];
    let mut samples: Vec<Vec<u8>> = pieces.iter().map(|pieces| joined(pieces.iter().copied())).collect();
    samples.extend(segments(&samples[1]));
    samples
}
