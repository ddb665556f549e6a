//! A snapshot's manifest and the names of its parts, as a peer sends them.
#![no_main]

use std::path::Path;

use consensus::store::snapshot::Manifest;
use consensus::store::snapshot::Part;
use libfuzzer_sys::fuzz_target;
use statemachine::codec;
use statemachine::codec::RecordKind;

fn take(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::decode(bytes, Path::new("manifest")) {
        assert!(Manifest::decode(&manifest.encode(), Path::new("manifest")).is_ok(), "a manifest survives being written");
    }
}

fuzz_target!(|data: &[u8]| {
    take(data);
    if data.len() <= codec::MAX_PAYLOAD {
        take(&codec::seal(RecordKind::SnapshotManifest, data));
    }
    if let Some(part) = std::str::from_utf8(data).ok().and_then(Part::from_name) {
        assert_eq!(Part::from_name(&part.name()), Some(part), "a part survives being named");
    }
});
