//! A qcow2 image that anybody may have made: opened, read, written, or refused in words.
//!
//! The input changes a small image that is right, piece by piece, and then works on it.
#![no_main]

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::qcow2;
use fuzz::qcow2::CLUSTER;
use fuzz::qcow2::put;
use libfuzzer_sys::fuzz_target;
use vmm::devices::block::qcow2::exercise::Step;
use vmm::devices::block::qcow2::exercise::exercise;
use vmm::devices::block::qcow2::exercise::open_bytes;

/// Bytes of the image: where, and which.
const BYTES: u8 = 0;
/// A number of eight bytes, as tables have them: where, flags, the cluster that it means.
const ENTRY: u8 = 1;
/// A refcount: of which cluster, how much.
const REFCOUNT: u8 = 2;
/// How long the file is.
const LENGTH: u8 = 3;
/// The whole file, as it is.
const FILE: u8 = 4;
/// A request: kind, offset, length, byte.
const STEP: u8 = 5;
const TAGS: u8 = 6;

const MAX_FILE: usize = 1 << 16;
const MAX_STEPS: usize = 32;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    qcow2::let_the_library_panic();
    let (mut image, mut steps) = (qcow2::image(), Vec::new());
    for (tag, body) in Pieces(data) {
        let mut fields = Fields(body);
        match tag % TAGS {
            BYTES => {
                let at = usize::from(fields.u16());
                put(&mut image, at, fields.rest());
            }
            ENTRY => {
                let at = usize::from(fields.u16()) * 8;
                let (flags, cluster) = (u64::from(fields.u8()), u64::from(fields.u16()));
                let (far, low) = (fields.u8() % 56, u64::from(fields.u8()));
                let entry = flags << 56 | (cluster * CLUSTER as u64) << far | low;
                put(&mut image, at, &entry.to_be_bytes());
            }
            REFCOUNT => {
                let at = 2 * CLUSTER + usize::from(fields.u8()) * 2;
                put(&mut image, at, &fields.u16().to_be_bytes());
            }
            LENGTH => image.resize(usize::from(fields.u16()).min(MAX_FILE), 0),
            FILE => image = fields.bytes(MAX_FILE).to_vec(),
            _ if steps.len() < MAX_STEPS => steps.push(step(fields)),
            _ => {}
        }
    }
    let before = open_bytes(&image).map(|image| image.bytes()).ok();
    let done = exercise(&image, &steps);
    assert_eq!(done.is_ok(), before.is_some(), "an image opens each time, or never");
});

fn step(mut fields: Fields) -> Step {
    let (kind, offset, len, byte) = (fields.u8(), u64::from(fields.u16()), u32::from(fields.u16()), fields.u8());
    match kind % 6 {
        0 | 1 => Step::Read { offset, len },
        2 => Step::Write { offset, len, byte },
        3 => Step::Zero { offset, len, unmap: byte & 1 != 0 },
        4 => Step::Discard { offset, len },
        _ => Step::Flush,
    }
}

fn samples() -> Vec<Vec<u8>> {
    let step = |kind: u8, offset: u16, len: u16| {
        let mut body = vec![kind];
        body.extend(offset.to_le_bytes());
        body.extend(len.to_le_bytes());
        body.push(7);
        (STEP, body)
    };
    let steps: Vec<_> =
        (0..6).flat_map(|kind| [step(kind, 0, 1024), step(kind, 8192, 512), step(kind, 512, 4096)]).collect();
    let with = |first: &[(u8, Vec<u8>)]| {
        let pieces: Vec<_> = first.iter().chain(&steps).collect();
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    let entry = |at: u16, flags: u8, cluster: u8| (ENTRY, [&at.to_le_bytes()[..], &[flags, cluster, 0, 0, 0]].concat());
    let l2 = (4 * CLUSTER / 8) as u16;
    vec![
        with(&[]),
        with(&[(LENGTH, 8192u16.to_le_bytes().to_vec())]),
        // Data in two more places, one of them compressed, one of zeros.
        with(&[entry(l2 + 1, 0x80, 5), entry(l2 + 2, 0x40, 5), (ENTRY, vec![(l2 + 3) as u8, 0, 0x80, 5, 0, 0, 1])]),
        with(&[(BYTES, [&24u16.to_le_bytes()[..], &(1u64 << 30).to_be_bytes()].concat())]),
        joined([(FILE, qcow2::image().as_slice()), (STEP, &[2, 0, 0, 0, 4, 9])]),
    ]
}
