//! The write-ahead log as a disk might return it: opened, cut at a torn tail, or refused in words.
//!
//! The input is what the segments hold. What opens stays as it is when it is opened again, and what is appended after that
//! is there at the next start.
#![no_main]

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use consensus::platform::Disk;
use consensus::store::log_view::LogView;
use consensus::store::log_view::Reopen;
use consensus::store::log_view::Source;
use consensus::store::memory_disk::MemoryDisk;
use consensus::store::wal::Opened;
use consensus::store::wal::Wal;
use consensus::store::wal::record;
use consensus::store::wal::record::RecordRef;
use consensus::store::wal::record::SegmentHeader;
use consensus::store::wal::record::WAL_FORMAT;
use consensus::types::Entry;
use consensus::types::LogId;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::log;
use fuzz::payload;
use fuzz::sealed;
use libfuzzer_sys::fuzz_target;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::RecordKind;

/// An entry that follows the one before it; the piece is its batch.
const ENTRY: u8 = 0;
/// A record of the log whose checksum is right; the piece is what comes after the group's start.
const RECORD: u8 = 1;
/// Bytes, as they are.
const BYTES: u8 = 2;
/// The next segment, with the right header.
const SEGMENT: u8 = 3;
/// The next segment; the piece is its header.
const HEADER: u8 = 4;
const KINDS: u8 = 5;
/// Of a tag: the record belongs to the write group of the one before it.
const SAME_GROUP: u8 = 64;
/// Of a tag: the record has lost a bit.
const DAMAGED: u8 = 128;

const DIR: &str = "/wal";
const SEGMENT_BYTES: u64 = 4096;
/// Of entries in memory: few, so that the others are read from the log.
const CACHE_BYTES: usize = 200;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let disk = written(data);
    let Some((_, mut view, opened)) = open(&disk) else { return };
    let entries = read(&mut view);
    let (mut wal, mut again, second) = open(&disk).expect("what opened once opens again");
    assert!(!second.torn_tail_cut, "a tail is cut once: {opened:?}");
    assert_eq!((again.last, again.purged), (view.last, view.purged));
    assert_eq!(read(&mut again), entries, "a start changes no entry");

    let next = again.next_index().unwrap_or(1);
    if next == u64::MAX {
        // An index that has none after it is refused.
        return;
    }
    let entry = log::entry(next, &[SealedBatch::from_bytes(vec![7; 100])]);
    let appended = wal.append(std::slice::from_ref(&entry), &mut Reopen(&mut again));
    appended.expect("a log that opens takes the entry that follows");
    let (_, mut third, opened) = open(&disk).expect("what was appended opens");
    assert_eq!((third.last, opened.torn_tail_cut), (Some(entry.log_id), false));
    if let (Some(mut expected), Some(found)) = (entries, read(&mut third)) {
        expected.push(entry);
        assert_eq!(found, expected, "an append adds its entry and no more");
    }
});

/// A disk with the segments that the input describes.
fn written(data: &[u8]) -> MemoryDisk {
    let disk = MemoryDisk::new();
    let (mut segment, mut bytes) = (1, header(1, 0));
    let (mut index, mut group) = (0, bytes.len());
    for (tag, piece) in Pieces(data) {
        let begins = bytes.len();
        if tag & SAME_GROUP == 0 {
            group = begins;
        }
        match tag % SAME_GROUP % KINDS {
            ENTRY => {
                index += 1;
                let entry = log::entry(index, &[SealedBatch::from_bytes(piece.to_vec())]);
                bytes.extend(record::encode(group as u32, RecordRef::Entry(&entry)));
            }
            RECORD => {
                let payload = [&(group as u32).to_le_bytes(), piece].concat();
                bytes.extend(sealed(RecordKind::RaftEntry, &payload));
            }
            BYTES => bytes.extend(piece),
            kind => {
                write(&disk, segment, &bytes);
                segment += 1;
                bytes = match kind {
                    SEGMENT => header(segment, begins as u64),
                    _ => sealed(RecordKind::WalHeader, piece),
                };
                group = bytes.len();
                continue;
            }
        }
        if tag & DAMAGED != 0
            && let Some(last) = bytes[begins..].last_mut()
        {
            *last ^= 1;
        }
    }
    // The last one is not full: its space is preallocated.
    bytes.resize(bytes.len().max(SEGMENT_BYTES as usize), 0);
    write(&disk, segment, &bytes);
    disk
}

fn header(number: u64, previous_end: u64) -> Vec<u8> {
    codec::seal_value(RecordKind::WalHeader, &SegmentHeader { format: WAL_FORMAT, number, previous_end })
}

fn write(disk: &MemoryDisk, segment: u64, bytes: &[u8]) {
    let path = PathBuf::from(format!("{DIR}/{segment:016}.wal"));
    disk.create(&path).and_then(|file| file.write_at(0, bytes)).expect("memory takes it");
}

fn open(disk: &MemoryDisk) -> Option<(Wal, LogView, Opened)> {
    let mut view = LogView::new(CACHE_BYTES);
    match Wal::open(Arc::new(disk.clone()), Path::new(DIR), SEGMENT_BYTES, &mut Reopen(&mut view)) {
        Ok((wal, opened)) => Some((wal, view, opened)),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// Every entry; `None` when one cannot be read, which an operator is told.
fn read(view: &mut LogView) -> Option<Vec<Entry>> {
    let (mut start, end) = view.clamp(0, u64::MAX);
    let mut entries: Vec<Entry> = Vec::new();
    while start < end {
        let some = match view.source(start, end, CACHE_BYTES) {
            Source::Memory(some) => some,
            Source::Disk(plan) => plan.read(CACHE_BYTES).ok()?,
            Source::Missing => return None,
        };
        assert!(!some.is_empty(), "a range that is not empty has a first entry");
        for entry in some {
            assert_eq!(entry.log_id.index, start, "entries come in order");
            start += 1;
            entries.push(entry);
        }
    }
    Some(entries)
}

fn samples() -> Vec<Vec<u8>> {
    let after_group = |record: Vec<u8>| payload(&record)[4..].to_vec();
    let id = |index| LogId::new_term_index(log::TERM, index);
    let blank = log::entry(1, &[]);
    let entry = after_group(record::encode(0, RecordRef::Entry(&blank)));
    let truncate = after_group(record::encode(0, RecordRef::Truncate(Some(id(1)))));
    let truncate_all = after_group(record::encode(0, RecordRef::Truncate(None)));
    let reset = after_group(record::encode(0, RecordRef::Reset(id(9))));
    let second = header(2, header(1, 0).len() as u64);
    let tenth = after_group(record::encode(0, RecordRef::Entry(&log::entry(10, &[]))));
    let batch: &[u8] = &[5; 90];
    let three = [(ENTRY, batch), (ENTRY | SAME_GROUP, batch), (ENTRY, batch)];
    let samples: [&[(u8, &[u8])]; 10] = [
        &three,
        &[(RECORD, &entry)],
        &[three[0], three[1], (RECORD, &truncate)],
        &[three[0], (RECORD, &truncate_all)],
        &[three[0], (RECORD, &reset)],
        &[(RECORD, &reset), (RECORD, &tenth)],
        &[three[0], (SEGMENT, &[]), three[1]],
        &[(HEADER, payload(&second)), three[0]],
        &[three[0], (ENTRY | DAMAGED, batch), (ENTRY | SAME_GROUP, batch)],
        &[three[0], (BYTES, b"Qr\x01\x02 torn")],
    ];
    samples.iter().map(|pieces| joined(pieces.iter().copied())).collect()
}
