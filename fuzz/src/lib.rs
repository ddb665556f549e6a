//! What the targets share: an input as a list of pieces, a small site that pieces are judged against, and samples.
//!
//! Checksums and chain hashes stop random bytes at the door, so the targets put right ones on the fuzzer's bytes: what is
//! tried is the code behind the checksum. Each target also takes the bytes as they are, to try the checksum itself.

pub mod disk;
pub mod fields;
pub mod guest;
#[cfg(feature = "hosts")]
pub mod log;
pub mod machine;
pub mod pieces;
pub mod qcow2;
pub mod recorder;
pub mod saved;
#[cfg(feature = "hosts")]
pub mod site;
pub mod states;

pub use self::fields::Fields;
pub use self::pieces::Pieces;
pub use self::pieces::joined;

use std::path::Path;
use std::path::PathBuf;

use statemachine::codec;
use statemachine::codec::RecordKind;

/// A record around a payload; one that no record may hold is cut.
pub fn sealed(kind: RecordKind, payload: &[u8]) -> Vec<u8> {
    codec::seal(kind, &payload[..payload.len().min(codec::MAX_PAYLOAD)])
}

/// The payload of a record that is whole.
pub fn payload(record: &[u8]) -> &[u8] {
    &record[codec::HEADER_LEN..]
}

/// Writes samples into the corpus folder that libFuzzer was given, so that it begins with whole input and a changed format
/// leaves no stale file behind. With a single input instead of a folder (a crash that is looked at), nothing is written.
pub fn keep_samples(samples: &[Vec<u8>]) {
    let arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let Some(corpus) = arguments.map(PathBuf::from).find(|path| path.is_dir()) else { return };
    for (number, sample) in samples.iter().enumerate() {
        keep(&corpus, number, sample);
    }
}

fn keep(corpus: &Path, number: usize, sample: &[u8]) {
    let path = corpus.join(format!("sample-{number:02}"));
    std::fs::write(&path, sample).unwrap_or_else(|error| panic!("{} cannot be written: {error}", path.display()));
}
