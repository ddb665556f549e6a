//! The disk under a driver: real files, with io_uring and with worker threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use vmm_control::{DiskFault, DiskFormat, OnError};

use super::backend::Backend;
use super::disk::FileFacts;
use super::worker::Workers;
use super::*;
use crate::lease::quiesce::DiskGate;
use crate::virtio::testing::{Buffer, Descriptor, FakeDriver, NEXT, PATIENCE, WRITE, attach};

pub(super) const DISK_BYTES: u64 = 1 << 20;
pub(super) const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A driver with a disk.
pub(super) struct Guest {
    pub(super) driver: FakeDriver,
    pub(super) handle: Arc<BlockHandle>,
    pub(super) gate: Arc<DiskGate>,
    pub(super) path: PathBuf,
    pub(super) faults: Arc<Faults>,
    _dir: tempfile::TempDir,
}

/// Keeps what stopped the guest.
#[derive(Default)]
pub(super) struct Faults(pub(super) Mutex<Vec<DiskFault>>);

impl DiskFaults for Faults {
    fn stopped(&self, fault: DiskFault) {
        self.0.lock().unwrap().push(fault);
    }
}

pub(super) fn config(path: &std::path::Path) -> BlockConfig {
    BlockConfig {
        name: "vda".into(),
        path: path.to_owned(),
        read_only: false,
        serial: "disk-0001".into(),
        block_size: BlockSize::B512,
        format: DiskFormat::Raw,
        backing: Vec::new(),
        on_error: OnError::Report,
        rate_limit: None,
    }
}

fn disk_file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    (dir, path)
}

pub(super) fn guest_with(change: impl FnOnce(&mut BlockConfig)) -> Guest {
    let (dir, path) = disk_file();
    let mut config = config(&path);
    change(&mut config);
    guest_in(dir, config)
}

/// A guest with the disk of this configuration, whose files are in `dir`.
pub(super) fn guest_in(dir: tempfile::TempDir, config: BlockConfig) -> Guest {
    let (gate, faults) = (DiskGate::new(), Arc::new(Faults::default()));
    let path = config.path.clone();
    let (block, handle) = Block::open(config, DiskFiles::by_path(), gate.clone(), faults.clone()).unwrap();
    Guest { driver: attach(block), handle, gate, path, faults, _dir: dir }
}

pub(super) fn guest_on(backend: Box<dyn Backend>) -> Guest {
    guest_on_with(backend, |_| {})
}

pub(super) fn guest_on_with(backend: Box<dyn Backend>, change: impl FnOnce(&mut BlockConfig)) -> Guest {
    let (dir, path) = disk_file();
    let mut config = config(&path);
    change(&mut config);
    let (gate, faults) = (DiskGate::new(), Arc::new(Faults::default()));
    let facts = FileFacts { bytes: DISK_BYTES, is_device: false };
    let (block, handle) = Block::on_backend(config, facts, gate.clone(), backend, faults.clone());
    Guest { driver: attach(block), handle, gate, path, faults, _dir: dir }
}

/// A request that was submitted, and where its answer will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    head: u16,
    status_at: u64,
}

pub(super) const NO_ANSWER: u8 = 0xee;

impl Guest {
    pub(super) fn started(change: impl FnOnce(&mut BlockConfig)) -> Self {
        let mut guest = guest_with(change);
        guest.driver.start();
        guest
    }

    pub(super) fn ask(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Asked {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header_at = self.driver.buffer(&header);
        let status_at = self.driver.buffer(&[NO_ANSWER]);
        let mut chain = vec![Buffer::Out(header_at, 16)];
        chain.extend_from_slice(data);
        chain.push(Buffer::In(status_at, 1));
        let head = self.driver.submit(0, &chain);
        Asked { head, status_at }
    }

    pub(super) fn driver_head(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u16 {
        self.ask(kind, sector, data).head
    }

    pub(super) fn status(&self, asked: Asked) -> u8 {
        self.driver.bytes(asked.status_at, 1)[0]
    }

    /// Submits and waits. Returns (status, used length).
    pub(super) fn carry_out(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let asked = self.ask(kind, sector, data);
        let (head, len) = self.driver.used(0);
        assert_eq!(head, asked.head);
        (self.status(asked), len)
    }

    pub(super) fn write_disk(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        let at = self.driver.buffer(bytes);
        self.carry_out(VIRTIO_BLK_T_OUT, sector, &[Buffer::Out(at, bytes.len() as u32)]).0
    }

    pub(super) fn read_disk(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let at = self.driver.buffer(&vec![0; len as usize]);
        let (status, used) = self.carry_out(VIRTIO_BLK_T_IN, sector, &[Buffer::In(at, len)]);
        if status == OK {
            assert_eq!(used, len + 1);
        }
        (status, self.driver.bytes(at, len as usize))
    }

    pub(super) fn soon(&self) -> Instant {
        Instant::now() + PATIENCE
    }
}

pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn what_is_written_is_read_again_and_is_in_the_file() {
    let mut guest = Guest::started(|_| {});
    let bytes = pattern(8192, 1);
    assert_eq!(guest.write_disk(16, &bytes), OK);
    assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(guest.read_disk(16, 8192), (OK, bytes.clone()));
    let mut in_file = vec![0; 8192];
    File::open(&guest.path).unwrap().read_exact_at(&mut in_file, 16 * 512).unwrap();
    assert_eq!(in_file, bytes);
    let counters = guest.handle.metrics().counters();
    assert_eq!((counters.reads, counters.writes, counters.flushes, counters.bytes_written), (1, 1, 1, 8192));
    assert!(guest.driver.interrupts(0) >= 3);
}

#[test]
fn worker_threads_do_the_same_as_io_uring() {
    let (dir, path) = disk_file();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut guest = guest_on(Box::new(Workers::new(file).unwrap()));
    guest.driver.start();
    let bytes = pattern(4096, 2);
    assert_eq!(guest.write_disk(0, &bytes), OK);
    assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(guest.read_disk(0, 4096), (OK, bytes));
    drop(dir);
}

#[test]
fn scattered_and_unaligned_buffers_arrive_in_order() {
    let mut guest = Guest::started(|_| {});
    let bytes = pattern(2048, 3);
    // Pieces of odd lengths at odd addresses, which O_DIRECT cannot use as they are.
    let area = guest.driver.buffer(&[0; 8192]);
    let pieces = [(3u64, 701usize), (1001, 11), (1503, 1336)];
    let mut done = 0;
    for (offset, len) in pieces {
        use vm_memory::Bytes;
        let at = vm_memory::GuestAddress(area + offset);
        guest.driver.memory.write_slice(&bytes[done..done + len], at).unwrap();
        done += len;
    }
    let buffers = pieces.map(|(offset, len)| Buffer::Out(area + offset, len as u32));
    assert_eq!(guest.carry_out(VIRTIO_BLK_T_OUT, 4, &buffers).0, OK);
    let back = guest.driver.buffer(&[0; 4096]);
    let into = [Buffer::In(back + 1, 2000), Buffer::In(back + 2501, 48)];
    assert_eq!(guest.carry_out(VIRTIO_BLK_T_IN, 4, &into), (OK, 2049));
    let mut read = guest.driver.bytes(back + 1, 2000);
    read.extend(guest.driver.bytes(back + 2501, 48));
    assert_eq!(read, bytes);
}

#[test]
fn pages_that_the_disk_wrote_are_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    let mut guest = Guest::started(|_| {});
    // A page that the driver has not written.
    let at = crate::virtio::testing::MEMORY_BYTES as u64 - 4096;
    let region = guest.driver.memory.find_region(GuestAddress(at)).unwrap();
    assert!(!region.bitmap().dirty_at(at as usize));
    let (status, _) = guest.carry_out(VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 4096)]);
    assert_eq!(status, OK);
    let region = guest.driver.memory.find_region(GuestAddress(at)).unwrap();
    assert!(region.bitmap().dirty_at(at as usize));
}

#[test]
fn a_read_only_disk_is_read_but_never_written() {
    let mut guest = Guest::started(|config| config.read_only = true);
    assert_ne!(guest.driver.offered() & 1 << 5, 0, "the driver is told");
    assert_eq!(guest.write_disk(0, &[7; 512]), IO_ERROR);
    assert_eq!(guest.read_disk(0, 512), (OK, vec![0; 512]));
}

#[test]
fn the_end_of_the_disk_is_the_end() {
    let mut guest = Guest::started(|_| {});
    let last = DISK_BYTES / 512 - 1;
    assert_eq!(guest.write_disk(last, &[5; 512]), OK);
    assert_eq!(guest.write_disk(last, &[5; 1024]), IO_ERROR);
    assert_eq!(guest.write_disk(u64::MAX, &[5; 512]), IO_ERROR);
    assert_eq!(guest.handle.metrics().counters().errors, 2);
    assert_eq!(std::fs::metadata(&guest.path).unwrap().len(), DISK_BYTES);
}

#[test]
fn a_file_that_somebody_cut_gives_errors_and_no_zeros() {
    let mut guest = Guest::started(|_| {});
    File::options().write(true).open(&guest.path).unwrap().set_len(4096).unwrap();
    assert_eq!(guest.read_disk(64, 512).0, IO_ERROR);
    assert_eq!(guest.read_disk(0, 512).0, OK);
}

#[test]
fn the_serial_is_twenty_bytes() {
    let mut guest = Guest::started(|_| {});
    let at = guest.driver.buffer(&[0xff; 20]);
    let (status, used) = guest.carry_out(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::In(at, 20)]);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(&guest.driver.bytes(at, 20), b"disk-0001\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discard_and_zeros_leave_zeros() {
    let mut guest = Guest::started(|_| {});
    guest.write_disk(0, &[9; 16384]);
    for (kind, sector) in [(VIRTIO_BLK_T_DISCARD, 0u64), (VIRTIO_BLK_T_WRITE_ZEROES, 16)] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&8u32.to_le_bytes());
        let at = guest.driver.buffer(&range);
        let (status, _) = guest.carry_out(kind, 0, &[Buffer::Out(at, 16)]);
        // A file system without the operation says so, and the guest writes zeros itself.
        if status == UNSUPPORTED {
            continue;
        }
        assert_eq!(status, OK);
        assert_eq!(guest.read_disk(sector, 4096), (OK, vec![0; 4096]));
    }
    assert_eq!(guest.read_disk(8, 512), (OK, vec![9; 512]));
}

#[test]
fn a_ring_full_of_requests_is_answered_completely() {
    let mut guest = Guest::started(|_| {});
    let at = guest.driver.buffer(&pattern(512, 4));
    let mut heads: Vec<u16> = (0..80).map(|i| guest.ask(VIRTIO_BLK_T_OUT, i, &[Buffer::Out(at, 512)]).head).collect();
    let mut answered: Vec<u16> = (0..80).map(|_| guest.driver.used(0).0).collect();
    heads.sort_unstable();
    answered.sort_unstable();
    assert_eq!(answered, heads);
}

#[test]
fn a_hostile_chain_stops_the_disk_until_the_reset() {
    let mut guest = Guest::started(|_| {});
    // A header that points out of memory.
    guest.driver.descriptor(0, 0, Descriptor { address: u64::MAX - 8, len: 16, flags: NEXT, next: 1 });
    guest.driver.offer(0, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
    guest.driver.reset();
    guest.driver.start();
    assert_eq!(guest.write_disk(0, &[1; 512]), OK);
}

#[test]
fn a_chain_without_a_status_byte_stops_the_disk() {
    let mut guest = Guest::started(|_| {});
    let header = guest.driver.buffer(&[0; 16]);
    guest.driver.descriptor(0, 0, Descriptor { address: header, len: 16, flags: 0, next: 0 });
    guest.driver.offer(0, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
}

#[test]
fn a_status_byte_of_length_zero_stops_the_disk() {
    let mut guest = Guest::started(|_| {});
    let header = guest.driver.buffer(&[0; 16]);
    for (i, (len, flags)) in [(16, NEXT), (0, WRITE)].into_iter().enumerate() {
        guest.driver.descriptor(0, i as u16, Descriptor { address: header, len, flags, next: 1 });
    }
    guest.driver.offer(0, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
}

#[test]
fn a_missing_small_or_wrong_file_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let gate = DiskGate::new();
    let open = |config| Block::open(config, DiskFiles::by_path(), gate.clone(), Arc::new(Faults::default())).err();
    let missing = open(config(&dir.path().join("none")));
    assert!(matches!(missing, Some(BlockError::Open { .. })));
    let small = dir.path().join("small");
    std::fs::write(&small, b"tiny").unwrap();
    assert!(matches!(open(config(&small)), Some(BlockError::Empty { bytes: 4, .. })));
    let mut null = config("/dev/null".as_ref());
    null.read_only = true;
    assert!(matches!(open(null), Some(BlockError::Kind { .. })));
}
