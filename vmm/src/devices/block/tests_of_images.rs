//! A qcow2 disk under a driver: the whole path from the ring to the file, and its pauses.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_control::{BackingImage, DiskFormat};

use super::qcow2::hostile_tests::image;
use super::tests::{Faults, Guest, NO_ANSWER, OK, config, guest_in, pattern};
use super::*;
use crate::lease::quiesce::{DiskGate, Quiesce, QuiesceError};
use crate::virtio::testing::Buffer;

/// The disk of [`image`].
const DISK_BYTES: u64 = 16 << 10;
const SECTORS: u64 = DISK_BYTES / 512;

fn image_guest() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    std::fs::write(&path, image()).unwrap();
    let mut guest = guest_in(dir, qcow2(&path));
    guest.driver.start();
    guest
}

fn qcow2(path: &Path) -> BlockConfig {
    BlockConfig { format: DiskFormat::Qcow2, ..config(path) }
}

impl Guest {
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, unmap: bool) -> u8 {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12] = unmap.into();
        let at = self.driver.buffer(&range);
        self.carry_out(kind, 0, &[Buffer::Out(at, 16)]).0
    }

    /// The end of a lease and its confirmation.
    fn pause_and_resume(&mut self) {
        self.gate.close();
        self.handle.cancel_and_drain(self.soon()).unwrap();
        self.handle.close();
        self.handle.reopen().unwrap();
        self.gate.open();
        self.handle.kick();
    }
}

#[test]
fn a_driver_sees_the_disk_and_not_the_file() {
    let mut guest = image_guest();
    let mut capacity = [0; 8];
    for (i, byte) in capacity.iter_mut().enumerate() {
        *byte = guest.driver.read(0x2000 + i as u64, 1) as u8;
    }
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    assert_eq!(guest.read_disk(0, 1024), (OK, [vec![0xda; 512], vec![0; 512]].concat()));
    let bytes = pattern(4096, 5);
    assert_eq!(guest.write_disk(4, &bytes), OK);
    assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(guest.read_disk(4, 4096), (OK, bytes));
    assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 4, 2, false), OK);
    assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 6, 2, true), OK);
    assert_eq!(guest.read_disk(6, 1024), (OK, vec![0; 1024]));
}

#[test]
fn what_was_written_before_a_pause_is_in_the_file() {
    let mut guest = image_guest();
    let bytes = pattern(8192, 9);
    // No flush by the driver: the drain does it.
    assert_eq!(guest.write_disk(8, &bytes), OK);
    guest.gate.close();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    let file = std::fs::read(&guest.path).unwrap();
    let on_disk = super::qcow2::exercise::open_bytes(&file).unwrap();
    let mut found = vec![0; 8192];
    on_disk.read(4096, &mut found).unwrap();
    assert_eq!(found, bytes);

    let later = guest.driver.buffer(&[3; 512]);
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(later, 512)]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.status(asked), NO_ANSWER);
    assert_eq!(std::fs::read(&guest.path).unwrap(), file, "a closed disk is not written");
    guest.handle.reopen().unwrap();
    guest.gate.open();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
    assert_eq!(guest.read_disk(8, 8192), (OK, bytes));
}

#[test]
fn tables_that_changed_during_a_pause_are_read_anew() {
    let mut guest = image_guest();
    assert_eq!(guest.read_disk(0, 512), (OK, vec![0xda; 512]));
    guest.gate.close();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    let mut file = std::fs::read(&guest.path).unwrap();
    // The L2 entry of the first cluster: nothing is there any more.
    file[4 * 512..4 * 512 + 8].fill(0);
    std::fs::write(&guest.path, &file).unwrap();
    guest.handle.reopen().unwrap();
    guest.gate.open();
    guest.handle.kick();
    assert_eq!(guest.read_disk(0, 512), (OK, vec![0; 512]));
}

#[test]
fn another_image_in_the_place_of_the_closed_one_is_refused() {
    let guest = image_guest();
    guest.gate.close();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.handle.close();
    let mut other = image();
    other[24..32].copy_from_slice(&(DISK_BYTES / 2).to_be_bytes());
    std::fs::write(&guest.path, &other).unwrap();
    assert!(matches!(guest.handle.reopen(), Err(QuiesceError::Changed { .. })));
    other[..4].fill(0);
    std::fs::write(&guest.path, &other).unwrap();
    assert!(matches!(guest.handle.reopen(), Err(QuiesceError::Changed { .. })));
}

#[test]
fn a_malformed_image_is_an_error_in_words_before_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let open = |config| Block::open(config, DiskFiles::by_path(), DiskGate::new(), Arc::new(Faults::default())).err();
    let mut bytes = image();
    bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = open(qcow2(&path)).unwrap();
    assert!(matches!(error, BlockError::Image { .. }));
    // The same bytes as a raw disk are just bytes.
    assert!(open(config(&path)).is_none());
    let missing = BackingImage { path: dir.path().join("none"), format: DiskFormat::Raw };
    std::fs::write(&path, image()).unwrap();
    let error = open(BlockConfig { backing: vec![missing], ..qcow2(&path) }).unwrap();
    assert!(matches!(error, BlockError::Open { .. }), "{error}");
}

#[test]
fn a_read_only_image_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    std::fs::write(&path, image()).unwrap();
    let mut guest = guest_in(dir, BlockConfig { read_only: true, ..qcow2(&path) });
    guest.driver.start();
    assert_ne!(guest.write_disk(0, &[1; 512]), OK);
    assert_eq!(guest.read_disk(0, 512), (OK, vec![0xda; 512]));
    drop(guest.driver);
    assert_eq!(std::fs::read(&guest.path).unwrap(), image());
}

/// One request of a random guest.
#[derive(Debug, Clone)]
enum Op {
    Write { sector: u64, sectors: u64, seed: u8 },
    Read { sector: u64, sectors: u64 },
    Zero { sector: u64, sectors: u64, unmap: bool },
    Discard { sector: u64, sectors: u64 },
    Flush,
    Pause,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let span = (0..SECTORS, 1..12u64).prop_map(|(sector, sectors)| (sector, sectors.min(SECTORS - sector)));
    let op = prop_oneof![
        4 => (span.clone(), any::<u8>()).prop_map(|((sector, sectors), seed)| Op::Write { sector, sectors, seed }),
        4 => span.clone().prop_map(|(sector, sectors)| Op::Read { sector, sectors }),
        2 => (span.clone(), any::<bool>()).prop_map(|((sector, sectors), unmap)| Op::Zero { sector, sectors, unmap }),
        2 => span.prop_map(|(sector, sectors)| Op::Discard { sector, sectors }),
        1 => Just(Op::Flush),
        1 => Just(Op::Pause),
    ];
    prop::collection::vec(op, 1..40)
}

/// The disk as it should be. A discarded sector may hold what it held, or zeros, until somebody has looked.
struct Model {
    bytes: Vec<u8>,
    loose: Vec<bool>,
}

impl Model {
    fn new() -> Self {
        let mut bytes = vec![0; DISK_BYTES as usize];
        bytes[..512].fill(0xda);
        Self { bytes, loose: vec![false; SECTORS as usize] }
    }

    fn put(&mut self, sector: u64, bytes: &[u8]) {
        self.bytes[sector as usize * 512..][..bytes.len()].copy_from_slice(bytes);
        self.loose[sector as usize..][..bytes.len() / 512].fill(false);
    }

    /// Whether the disk may read as `found`; from now on it has to.
    fn agrees(&mut self, sector: u64, found: &[u8]) -> bool {
        found.chunks(512).enumerate().all(|(i, found)| {
            let at = sector as usize + i;
            let expected = &self.bytes[at * 512..][..512];
            let is_right = found == expected || (self.loose[at] && found.iter().all(|b| *b == 0));
            let found = found.to_vec();
            self.put(at as u64, &found);
            is_right
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a guest does, and however often its lease ends, the disk is what it wrote.
    #[test]
    fn a_disk_on_an_image_is_a_disk(ops in ops()) {
        let mut guest = image_guest();
        let mut model = Model::new();
        for op in &ops {
            match *op {
                Op::Write { sector, sectors, seed } => {
                    let bytes = pattern(sectors as usize * 512, seed);
                    prop_assert_eq!(guest.write_disk(sector, &bytes), OK);
                    model.put(sector, &bytes);
                }
                Op::Read { sector, sectors } => {
                    let (status, found) = guest.read_disk(sector, sectors as u32 * 512);
                    prop_assert_eq!(status, OK);
                    prop_assert!(model.agrees(sector, &found), "{:?}", op);
                }
                Op::Zero { sector, sectors, unmap } => {
                    prop_assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, sectors as u32, unmap), OK);
                    model.put(sector, &vec![0; sectors as usize * 512]);
                }
                Op::Discard { sector, sectors } => {
                    prop_assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, sector, sectors as u32, false), OK);
                    model.loose[sector as usize..][..sectors as usize].fill(true);
                }
                Op::Flush => prop_assert_eq!(guest.carry_out(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK),
                Op::Pause => guest.pause_and_resume(),
            }
        }
        guest.gate.close();
        guest.handle.cancel_and_drain(Instant::now() + Duration::from_secs(20)).unwrap();
        guest.handle.close();
        let left = super::qcow2::exercise::open_bytes(&std::fs::read(&guest.path).unwrap()).unwrap();
        let mut found = vec![0; DISK_BYTES as usize];
        left.read(0, &mut found).unwrap();
        prop_assert!(model.agrees(0, &found), "the file holds something else");
    }
}
