//! Memory of a process beyond the RAM of its guest, from /proc/PID/smaps: the sums of `Pss` (its share of each page that it maps:
//! a page of libc in five processes counts as a fifth) and of `Private_Clean` and `Private_Dirty` over all mappings but guest RAM.
//! Guest RAM is the mapping of exactly its size; both programs ask the kernel for one of its own.

use anyhow::Result;
use anyhow::ensure;

/// DESIGN §14.
pub const MOST_BEYOND_RAM_MIB: f64 = 5.0;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct BeyondRam {
    pub pss_kib: u64,
    pub private_kib: u64,
}

impl BeyondRam {
    pub fn pss_mib(self) -> f64 {
        self.pss_kib as f64 / 1024.0
    }
}

/// Of a process whose smaps these are.
pub fn beyond_ram(smaps: &str, ram_mib: u64) -> Result<BeyondRam> {
    let ram_kib = ram_mib << 10;
    let (mut sum, mut rams, mut is_ram) = (BeyondRam::default(), 0, false);
    for line in smaps.lines() {
        let Some((name, kib)) = field(line) else { continue };
        match name {
            // The first field of a mapping.
            "Size" => {
                is_ram = kib == ram_kib;
                rams += u32::from(is_ram);
            }
            "Pss" if !is_ram => sum.pss_kib += kib,
            "Private_Clean" | "Private_Dirty" if !is_ram => sum.private_kib += kib,
            _ => {}
        }
    }
    ensure!(rams == 1, "{rams} mappings of {ram_kib} KiB, and guest RAM is one");
    Ok(sum)
}

/// `Pss:   12 kB`.
fn field(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.split_once(':')?;
    Some((name, value.trim().strip_suffix(" kB")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0-55d1 r-xp 00000000 00:02 77 /usr/bin/vmm
Size:               1024 kB
Pss:                 300 kB
Private_Clean:       200 kB
Private_Dirty:         0 kB
7f00-7f10 rw-p 00000000 00:00 0
Size:             196608 kB
Pss:               90000 kB
Private_Clean:         0 kB
Private_Dirty:     90000 kB
7f20-7f21 rw-p 00000000 00:00 0
Size:                 64 kB
Pss:                  40 kB
Private_Clean:         8 kB
Private_Dirty:        32 kB
VmFlags: rd wr mr mw me ac
";

    #[test]
    fn guest_ram_is_left_out_and_all_else_counts() {
        assert_eq!(beyond_ram(SMAPS, 192).expect("sums"), BeyondRam { pss_kib: 340, private_kib: 240 });
    }

    #[test]
    fn a_process_whose_guest_ram_cannot_be_told_apart_is_not_measured() {
        beyond_ram(SMAPS, 128).expect_err("no mapping of that size");
        beyond_ram(&SMAPS.repeat(2), 192).expect_err("two mappings of that size");
    }
}
