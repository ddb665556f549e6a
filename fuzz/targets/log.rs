//! A segment of the write-ahead log as a disk might return it: opened, cut at a torn tail, or refused in words.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use consensus::platform::Disk;
use consensus::store::log_view::LogView;
use consensus::store::log_view::Reopen;
use consensus::store::memory_disk::MemoryDisk;
use consensus::store::wal::Wal;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let disk = MemoryDisk::new();
    let dir = Path::new("/wal");
    // A good beginning, and then what the disk returns.
    let opened = Wal::open(Arc::new(disk.clone()), dir, 4096, &mut Reopen(&mut LogView::new(1024)));
    drop(opened.expect("an empty log opens"));
    let path = disk.files().into_iter().map(|(path, _)| path).find(|path| path.extension().is_some_and(|it| it == "wal"));
    let file = disk.open(&path.expect("a log has a segment")).expect("opens");
    let (at, bytes) = match data {
        [at, bytes @ ..] if *at < 128 => (u64::from(*at), bytes),
        bytes => (0, bytes),
    };
    file.write_at(at, bytes).expect("written");
    let _ = Wal::open(Arc::new(disk), dir, 4096, &mut Reopen(&mut LogView::new(1024)));
});
