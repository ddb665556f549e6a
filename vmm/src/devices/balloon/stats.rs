//! Statistics of the guest, decoded (virtio 1.2, 5.5.6.4): pairs of a 16-bit tag and a 64-bit value, without padding.

use vmm_control::balloon::GuestMemoryStats;

const PAIR_BYTES: usize = 10;
/// Pairs that are looked at. There are 16 tags.
const MAX_PAIRS: usize = 64;
/// The most that is read of an answer.
pub const MAX_BYTES: usize = MAX_PAIRS * PAIR_BYTES;
/// "Not known", in Linux's words.
const NOT_KNOWN: u64 = u64::MAX;

/// What is not understood is left out; of what is said twice the last counts.
pub fn decode(bytes: &[u8]) -> GuestMemoryStats {
    let mut stats = GuestMemoryStats::default();
    for pair in bytes.chunks_exact(PAIR_BYTES).take(MAX_PAIRS) {
        let (tag, value) = pair.split_at(2);
        let tag = u16::from_le_bytes([tag[0], tag[1]]);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(value);
        let value = Some(u64::from_le_bytes(bytes)).filter(|value| *value != NOT_KNOWN);
        let field = match tag {
            0 => &mut stats.swap_in_bytes,
            1 => &mut stats.swap_out_bytes,
            2 => &mut stats.major_faults,
            3 => &mut stats.minor_faults,
            4 => &mut stats.free_bytes,
            5 => &mut stats.total_bytes,
            6 => &mut stats.available_bytes,
            7 => &mut stats.disk_caches_bytes,
            8 => &mut stats.hugetlb_allocations,
            9 => &mut stats.hugetlb_failures,
            10 => &mut stats.oom_kills,
            11 => &mut stats.allocation_stalls,
            _ => continue,
        };
        *field = value;
    }
    stats
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub fn pairs(pairs: &[(u16, u64)]) -> Vec<u8> {
        pairs.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
    }

    #[test]
    fn tags_are_told_apart_and_unknown_ones_skipped() {
        let bytes = pairs(&[(4, 100), (0x8000, 1), (5, 200), (6, NOT_KNOWN), (11, 7), (4, 101)]);
        let wanted = GuestMemoryStats {
            free_bytes: Some(101),
            total_bytes: Some(200),
            allocation_stalls: Some(7),
            ..GuestMemoryStats::default()
        };
        assert_eq!(decode(&bytes), wanted);
        assert_eq!(decode(&bytes[..19]).free_bytes, Some(100), "a pair that is cut off does not count");
    }

    proptest! {
        #[test]
        fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let whole = decode(&bytes);
            prop_assert_eq!(decode(&bytes[..bytes.len().min(MAX_BYTES)]), whole);
        }
    }
}
