//! A sealed event segment as a disk or a peer might hand it over.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use consensus::platform::Disk;
use consensus::store::memory_disk::MemoryDisk;
use consensus::store::segments::file;
use libfuzzer_sys::fuzz_target;
use statemachine::Seq;

fuzz_target!(|data: &[u8]| {
    let disk = MemoryDisk::new();
    let path = Path::new("/segments/one.seg");
    disk.create(path).and_then(|it| it.write_at(0, data)).expect("written");
    let disk: Arc<dyn Disk> = Arc::new(disk);
    if let Ok(segment) = file::open(&disk, path) {
        let _ = file::verify(data, &segment.id);
        let _ = segment.marks();
        let _ = segment.read(None, Seq(segment.id.first.0.saturating_sub(1)), 64, 1 << 16);
        let _ = segment.chunk(3, 100);
    }
});
