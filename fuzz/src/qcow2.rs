//! A small qcow2 image, written by hand: header, refcount table, one refcount block, an L1 table, an L2 table, a cluster of data.

use std::sync::Once;

pub const CLUSTER: usize = 512;
pub const CLUSTERS: usize = 6;
pub const DISK_BYTES: u64 = 16 << 10;

const REFCOUNT_TABLE: u64 = 1;
const REFCOUNT_BLOCK: u64 = 2;
const L1: u64 = 3;
const L2: u64 = 4;
const DATA: u64 = 5;
/// Of an entry: nobody else uses the cluster.
const COPIED: u64 = 1 << 63;

pub fn image() -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER * CLUSTERS];
    let offset = |cluster: u64| cluster * CLUSTER as u64;
    put(&mut bytes, 0, b"QFI\xfb");
    put(&mut bytes, 4, &3u32.to_be_bytes());
    put(&mut bytes, 20, &CLUSTER.ilog2().to_be_bytes());
    put(&mut bytes, 24, &DISK_BYTES.to_be_bytes());
    put(&mut bytes, 36, &1u32.to_be_bytes());
    put(&mut bytes, 40, &offset(L1).to_be_bytes());
    put(&mut bytes, 48, &offset(REFCOUNT_TABLE).to_be_bytes());
    put(&mut bytes, 56, &1u32.to_be_bytes());
    put(&mut bytes, 96, &4u32.to_be_bytes());
    put(&mut bytes, 100, &104u32.to_be_bytes());
    put(&mut bytes, CLUSTER, &offset(REFCOUNT_BLOCK).to_be_bytes());
    for cluster in 0..CLUSTERS {
        put(&mut bytes, 2 * CLUSTER + cluster * 2, &1u16.to_be_bytes());
    }
    put(&mut bytes, 3 * CLUSTER, &(COPIED | offset(L2)).to_be_bytes());
    put(&mut bytes, 4 * CLUSTER, &(COPIED | offset(DATA)).to_be_bytes());
    bytes[5 * CLUSTER..].fill(0xda);
    bytes
}

/// Writes as much as there is room for.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let Some(place) = bytes.get_mut(at..) else { return };
    let len = value.len().min(place.len());
    place[..len].copy_from_slice(&value[..len]);
}

/// Lets the qcow2 library panic, whose panics the vmm catches: the image breaks, and the process goes on. Those of everybody else end the
/// process, as libFuzzer's hook has it.
pub fn let_the_library_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let aborts = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let in_library = panic.location().is_some_and(|location| location.file().contains("/imago-"));
            if !in_library {
                aborts(panic);
            }
        }));
    });
}
