//! A snapshot is a manifest: one state file and the event segments that lead to it (DESIGN §4, hazard H23).

use serde::Deserialize;
use serde::Serialize;

/// What openraft passes around as "the snapshot": the manifest's bytes. The files that it names are pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHandle {
    pub manifest: Vec<u8>,
}
