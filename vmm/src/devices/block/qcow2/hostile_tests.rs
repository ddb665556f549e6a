//! Images that lie: each is refused in words before anything is done with it, or fails its requests; nothing panics, nothing hangs.

use proptest::prelude::*;

use super::ImageError;
use super::exercise::{Step, exercise, open_bytes};

const CLUSTER: usize = 512;
const L1: u64 = 3;
const L2: u64 = 4;
const DATA: u64 = 5;
pub(super) const DISK_BYTES: u64 = 16 << 10;

/// A small image by hand, so that each field can be wrong: header, refcount table, one refcount block, an L1 table, one L2 table
/// and one cluster of data.
pub(in crate::devices::block) fn image() -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER * 6];
    let offset = |cluster: u64| cluster * CLUSTER as u64;
    put(&mut bytes, 0, b"QFI\xfb");
    put(&mut bytes, 4, &3u32.to_be_bytes());
    put(&mut bytes, 20, &9u32.to_be_bytes());
    put(&mut bytes, 24, &DISK_BYTES.to_be_bytes());
    put(&mut bytes, 36, &1u32.to_be_bytes());
    put(&mut bytes, 40, &offset(L1).to_be_bytes());
    put(&mut bytes, 48, &offset(1).to_be_bytes());
    put(&mut bytes, 56, &1u32.to_be_bytes());
    put(&mut bytes, 96, &4u32.to_be_bytes());
    put(&mut bytes, 100, &104u32.to_be_bytes());
    put(&mut bytes, CLUSTER, &offset(2).to_be_bytes());
    for cluster in 0..6 {
        put(&mut bytes, 2 * CLUSTER + cluster * 2, &1u16.to_be_bytes());
    }
    put(&mut bytes, 3 * CLUSTER, &(1 << 63 | offset(L2)).to_be_bytes());
    put(&mut bytes, 4 * CLUSTER, &(1 << 63 | offset(DATA)).to_be_bytes());
    bytes[5 * CLUSTER..].fill(0xda);
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn with(at: usize, value: &[u8]) -> Result<super::Image, ImageError> {
    let mut bytes = image();
    put(&mut bytes, at, value);
    open_bytes(&bytes)
}

fn every_kind_of_step() -> Vec<Step> {
    let mut steps = Vec::new();
    for offset in [0, 512, 8192, DISK_BYTES - 512] {
        steps.extend([
            Step::Read { offset, len: 4096 },
            Step::Write { offset, len: 1024, byte: 7 },
            Step::Discard { offset, len: 2048 },
            Step::Write { offset, len: 512, byte: 8 },
            Step::Zero { offset, len: 1024, unmap: false },
            Step::Zero { offset, len: 1024, unmap: true },
            Step::Flush,
        ]);
    }
    steps
}

#[test]
fn the_honest_image_works() {
    let image = open_bytes(&image()).unwrap();
    assert_eq!(image.bytes(), DISK_BYTES);
    let mut buffer = vec![0; 1024];
    image.read(0, &mut buffer).unwrap();
    assert!(buffer[..512].iter().all(|b| *b == 0xda) && buffer[512..].iter().all(|b| *b == 0));
    let steps = every_kind_of_step();
    assert_eq!(exercise(&self::image(), &steps).unwrap(), steps.len());
}

#[test]
fn what_is_no_qcow2_image_is_not_opened() {
    for bytes in [&b""[..], b"QFI", b"short", &[0; 4096]] {
        assert!(matches!(open_bytes(bytes).err(), Some(ImageError::NotQcow2 { .. })));
    }
    assert!(matches!(open_bytes(b"QFI\xfb\0\0\0\x03").err(), Some(ImageError::Malformed { .. })));
}

#[test]
fn every_cut_is_an_error_or_an_image() {
    let whole = image();
    for len in 0..whole.len() {
        if let Ok(done) = exercise(&whole[..len], &every_kind_of_step()) {
            assert!(len >= 5 * CLUSTER, "{len} bytes cannot hold the tables");
            assert!(done > 0);
        }
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let long_name = [&0u64.to_be_bytes()[..], &600u32.to_be_bytes()].concat();
    for (what, at, value) in [
        ("clusters of 4 GiB", 20, &32u32.to_be_bytes()[..]),
        ("clusters of 256 bytes", 20, &8u32.to_be_bytes()),
        ("a shift by 200", 20, &200u32.to_be_bytes()),
        ("no size", 24, &0u64.to_be_bytes()),
        ("half a sector", 24, &100u64.to_be_bytes()),
        ("a size without end", 24, &(u64::MAX - 511).to_be_bytes()),
        ("a size that the L1 table does not cover", 24, &(1u64 << 30).to_be_bytes()),
        ("an L1 table of 32 GiB", 36, &u32::MAX.to_be_bytes()),
        ("an L1 table beyond the file", 36, &1024u32.to_be_bytes()),
        ("an L1 table at zero", 40, &0u64.to_be_bytes()),
        ("an L1 table between clusters", 40, &100u64.to_be_bytes()),
        ("an L1 table at the end of the world", 40, &(u64::MAX - 511).to_be_bytes()),
        ("a refcount table at zero", 48, &0u64.to_be_bytes()),
        ("a refcount table at the end of the world", 48, &(u64::MAX - 511).to_be_bytes()),
        ("a refcount table of 2 TiB", 56, &u32::MAX.to_be_bytes()),
        ("no refcount table", 56, &0u32.to_be_bytes()),
        ("refcounts of 128 bits", 96, &7u32.to_be_bytes()),
        ("refcounts by a shift of 200", 96, &200u32.to_be_bytes()),
        ("a short header", 100, &72u32.to_be_bytes()),
        ("a header of 4 GiB", 100, &u32::MAX.to_be_bytes()),
        ("a header of odd length", 100, &105u32.to_be_bytes()),
        ("a backing file's name outside", 8, &(1u64 << 40).to_be_bytes()),
        ("a backing file's name at the end of the world", 8, &u64::MAX.to_be_bytes()),
        ("a backing file's name across the end", 8, &[&500u64.to_be_bytes()[..], &100u32.to_be_bytes()].concat()),
        ("an extension of 4 GiB", 104, &[&1u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat()),
        ("extensions without an end", 104, &[&1u32.to_be_bytes()[..], &400u32.to_be_bytes()].concat()),
        ("feature names of one byte", 104, &[&0x6803_f857u32.to_be_bytes()[..], &1u32.to_be_bytes()].concat()),
        ("too many snapshots", 60, &u32::MAX.to_be_bytes()),
    ] {
        let error = with(at, value).err().unwrap_or_else(|| panic!("{what} is opened"));
        assert!(matches!(error, ImageError::Malformed { .. }), "{what}: {error}");
    }
    assert!(with(8, &long_name).is_ok(), "no offset is no name, whatever its length");
}

#[test]
fn what_we_cannot_do_is_said() {
    for (what, at, value) in [
        ("version 4", 4, &4u32.to_be_bytes()[..]),
        ("AES", 32, &1u32.to_be_bytes()),
        ("LUKS", 32, &2u32.to_be_bytes()),
        ("an external data file", 72, &4u64.to_be_bytes()),
        ("zstd", 72, &8u64.to_be_bytes()),
        ("extended L2 entries", 72, &16u64.to_be_bytes()),
        ("something new", 72, &(1u64 << 40).to_be_bytes()),
    ] {
        let error = with(at, value).err().unwrap_or_else(|| panic!("{what} is opened"));
        assert!(matches!(error, ImageError::Unsupported { .. }), "{what}: {error}");
    }
}

#[test]
fn damage_is_told_from_nonsense() {
    let l1 = 3 * CLUSTER;
    let reftable = CLUSTER;
    let refcount = |cluster: usize| 2 * CLUSTER + cluster * 2;
    for (what, at, value) in [
        ("a dirty image", 72, &1u64.to_be_bytes()[..]),
        ("a corrupt image", 72, &2u64.to_be_bytes()),
        ("an L2 table beyond the file", l1, &(1u64 << 63 | 1 << 40).to_be_bytes()),
        ("an L1 entry with reserved bits", l1, &(1u64 << 60).to_be_bytes()),
        ("an L2 table in the L1 table", l1, &((1u64 << 63) | (3 * 512)).to_be_bytes()),
        ("a refcount block beyond the file", reftable, &(1u64 << 40).to_be_bytes()),
        ("a refcount block at the end of the world", reftable, &(u64::MAX - 511).to_be_bytes()),
        ("a refcount block with reserved bits", reftable, &(2u64 * 512 + 1).to_be_bytes()),
        ("one refcount block for two places", reftable + 8, &(2u64 * 512).to_be_bytes()),
        ("no refcount block", reftable, &0u64.to_be_bytes()),
        ("a header that counts as free", refcount(0), &[0, 0]),
        ("a refcount table that counts as free", refcount(1), &[0, 0]),
        ("a refcount block that counts as free", refcount(2), &[0, 0]),
        ("an L1 table that counts as free", refcount(3), &[0, 0]),
        ("an L2 table that counts as free", refcount(4), &[0, 0]),
    ] {
        let error = with(at, value).err().unwrap_or_else(|| panic!("{what} is opened"));
        assert!(matches!(error, ImageError::Damaged { .. }), "{what}: {error}");
        assert!(error.to_string().contains("qemu-img check"), "{error}");
    }
}

#[test]
fn two_l1_entries_cannot_share_a_table() {
    let mut bytes = image();
    put(&mut bytes, 36, &2u32.to_be_bytes());
    put(&mut bytes, 3 * CLUSTER + 8, &((1u64 << 63) | (4 * 512)).to_be_bytes());
    assert!(matches!(open_bytes(&bytes).err(), Some(ImageError::Damaged { .. })));
}

#[test]
fn a_backing_file_that_nobody_listed_is_not_opened() {
    let mut bytes = image();
    let name = b"/etc/hostname";
    put(&mut bytes, 8, &[&256u64.to_be_bytes()[..], &(name.len() as u32).to_be_bytes()].concat());
    put(&mut bytes, 256, name);
    let error = open_bytes(&bytes).err().unwrap();
    assert!(matches!(&error, ImageError::BackingName { name, .. } if name == "/etc/hostname"), "{error}");
}

#[test]
fn l2_entries_that_lie_fail_their_requests_and_nothing_else() {
    for entry in [
        u64::MAX,
        1 << 63 | 1 << 55,
        1 << 63 | 0x00ff_ffff_ffff_fe00,
        1 << 62 | 0x3fff_ffff_ffff_ffff,
        (1 << 62) | (5 * 512),
        1 << 62 | 1 << 61,
        1 << 63 | 1,
        (1 << 63) | (3 * 512),
        1 << 63,
        0x1ff,
    ] {
        let mut bytes = image();
        put(&mut bytes, 4 * CLUSTER, &entry.to_be_bytes());
        exercise(&bytes, &every_kind_of_step()).unwrap();
    }
}

/// Steps of all kinds.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = (0..DISK_BYTES, 0u32..8192);
    let step = prop_oneof![
        place.clone().prop_map(|(offset, len)| Step::Read { offset, len }),
        (place.clone(), any::<u8>()).prop_map(|((offset, len), byte)| Step::Write { offset, len, byte }),
        (place.clone(), any::<bool>()).prop_map(|((offset, len), unmap)| Step::Zero { offset, len, unmap }),
        place.prop_map(|(offset, len)| Step::Discard { offset, len }),
        Just(Step::Flush),
    ];
    prop::collection::vec(step, 0..24)
}

/// More by `PROPTEST_CASES`.
fn cases() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig { cases: default.cases.max(512), ..default }
}

proptest! {
    #![proptest_config(cases())]

    /// Whatever is wrong in an image, working on it returns.
    #[test]
    fn a_damaged_image_is_refused_or_served(
        damage in prop::collection::vec((0usize..6 * CLUSTER, any::<u8>()), 1..6),
        words in prop::collection::vec((0usize..6 * CLUSTER / 8, any::<u64>(), 0u32..64), 0..3),
        steps in steps(),
    ) {
        let mut bytes = image();
        for (at, word, shift) in words {
            put(&mut bytes, at * 8, &(word >> shift).to_be_bytes());
        }
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        let _ = exercise(&bytes, &steps);
    }

    /// An image that opens, with entries for its clusters that mean anything: near and far, compressed, zero, on top of its tables.
    #[test]
    fn any_l2_table_is_served(
        entries in prop::collection::vec((0usize..64, 0u64..16, 0u64..(1 << 12), any::<bool>()), 1..32),
        refcounts in prop::collection::vec((5usize..256, 0u16..3), 0..8),
        steps in steps(),
    ) {
        let mut bytes = image();
        for (at, flags, place, is_far) in entries {
            let place = if is_far { place << 44 } else { place << 7 };
            let entry = flags >> 1 << 61 | place & 0x00ff_ffff_ffff_ff80 | flags & 1;
            put(&mut bytes, 4 * CLUSTER + at * 8, &entry.to_be_bytes());
        }
        for (cluster, count) in refcounts {
            put(&mut bytes, 2 * CLUSTER + cluster * 2, &count.to_be_bytes());
        }
        prop_assert!(exercise(&bytes, &steps).is_ok());
    }
}
