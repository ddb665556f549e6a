//! The memory map of `q-direct-1`: where RAM is, and where it is not. Q35's, so that stock firmware fits later
//! (hazards §7); guests see these addresses, so they change only with a new machine type.
//!
//! ```text
//! 0x0000_0000 .. 0x8000_0000  RAM below 4 GiB (at most 2 GiB)
//! 0xb000_0000 .. 0xc000_0000  PCI configuration (ECAM, PCIEXBAR): QEMU's place, which stock OVMF programs too
//! 0xc000_0000 .. 0xfec0_0000  PCI window below 4 GiB
//! 0xfec0_0000                 I/O APIC            0xfee0_0000  local APICs
//! 0xfeff_c000 .. 0xff00_0000  pages that KVM needs on Intel hosts (identity map, TSS)
//! 0xff00_0000 .. 4 GiB        left free for firmware flash
//! 4 GiB ..                    the rest of RAM, up to the most that the guest may ever have
//! above, 32 GiB aligned       PCI window above 4 GiB
//! ```

/// 1 KiB below the legacy hole holds what a BIOS would keep there.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI and SMBIOS tables live where a BIOS puts them.
pub const TABLES_START: u64 = 0xe_0000;
/// The page that holds the generation of the VM, and nothing else: reserved in the memory map, as the tables around it.
pub const VM_GENERATION_ID: u64 = 0xe_f000;
pub const SMBIOS_START: u64 = 0xf_0000;
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// A constant, 1 GiB aligned split: huge pages fit, and the 32-bit map does not depend on the guest's size.
pub const RAM_BELOW_4G_MAX: u64 = 0x8000_0000;

pub const ECAM_BASE: u64 = 0xb000_0000;
pub const ECAM_BUSES: u16 = 256;
/// 1 MiB a bus.
pub const ECAM_SIZE: u64 = (ECAM_BUSES as u64) << 20;
pub const MMIO32_BASE: u64 = 0xc000_0000;
pub const MMIO32_SIZE: u64 = IOAPIC_BASE - MMIO32_BASE;
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
pub const LAPIC_BASE: u64 = 0xfee0_0000;
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
pub const KVM_TSS: u64 = 0xfeff_d000;
pub const KVM_PAGES_END: u64 = 0xff00_0000;
pub const FOUR_GIB: u64 = 1 << 32;
/// Alignment and size of the window above 4 GiB.
pub const MMIO64_ALIGN: u64 = 32 << 30;
pub const MMIO64_SIZE: u64 = 32 << 30;

// Ports. 0x60/0x64, 0x70/0x71 and 0xcf8..0xcff are where a PC has them; 0x510..0x51b stays free for fw_cfg.
pub const PORT_COM1: u16 = 0x3f8;
pub const PORT_DEBUG: u16 = 0x402;
/// pvpanic's place in QEMU's machines.
pub const PORT_PVPANIC: u16 = 0x505;
pub const PORT_BOOT_TIMER: u16 = 0x5f0;
pub const PORT_PM_BASE: u16 = 0x600;
pub const PORT_RESET: u16 = 0xcf9;

// Global system interrupts.
pub const GSI_COM1: u32 = 4;
pub const GSI_SCI: u32 = 9;
/// The in-kernel I/O APIC has 24 pins; message-signalled interrupts take the numbers after them.
pub const IOAPIC_PINS: u32 = 24;

/// An address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub base: u64,
    pub size: u64,
}

impl Window {
    pub fn end(self) -> u64 {
        self.base + self.size
    }
}

/// Whether a range of the map is the guest's to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    Ram,
    Reserved,
}

/// The map of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    memory_bytes: u64,
    max_memory_bytes: u64,
}

impl Layout {
    /// For a guest of this much RAM that may grow to the second figure. Both were checked by `VmmConfig::check`.
    pub fn new(memory_bytes: u64, max_memory_bytes: u64) -> Self {
        Self { memory_bytes, max_memory_bytes: max_memory_bytes.max(memory_bytes) }
    }

    /// RAM, as mapped: the legacy hole below 1 MiB is backed too, because the tables live there.
    pub fn ram(&self) -> Vec<Window> {
        let low = self.memory_bytes.min(RAM_BELOW_4G_MAX);
        let mut ram = vec![Window { base: 0, size: low }];
        if self.memory_bytes > low {
            ram.push(Window { base: FOUR_GIB, size: self.memory_bytes - low });
        }
        ram
    }

    /// End of RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.memory_bytes.min(RAM_BELOW_4G_MAX)
    }

    pub fn mmio32(&self) -> Window {
        Window { base: MMIO32_BASE, size: MMIO32_SIZE }
    }

    /// Follows the most memory that the guest may have, and never the host's number of physical bits: the
    /// same guest has the same map on every host.
    pub fn mmio64(&self) -> Window {
        let high = self.max_memory_bytes.saturating_sub(RAM_BELOW_4G_MAX);
        Window { base: (FOUR_GIB + high).next_multiple_of(MMIO64_ALIGN), size: MMIO64_SIZE }
    }

    /// Bits of the highest address.
    pub fn address_bits(&self) -> u32 {
        (self.mmio64().end() - 1).ilog2() + 1
    }

    /// What the guest's kernel is told (E820 or PVH), in order.
    pub fn memory_map(&self) -> Vec<(Window, RangeKind)> {
        let range = |base, end| Window { base, size: end - base };
        let mut map = vec![
            (range(0, LOW_RAM_END), RangeKind::Ram),
            (range(LOW_RAM_END, 0xa_0000), RangeKind::Reserved),
            (range(TABLES_START, HIGH_MEMORY_START), RangeKind::Reserved),
            (range(HIGH_MEMORY_START, self.low_ram_end()), RangeKind::Ram),
            // Linux uses ECAM early only when it is reserved here.
            (range(ECAM_BASE, ECAM_BASE + ECAM_SIZE), RangeKind::Reserved),
            (range(KVM_IDENTITY_MAP, KVM_PAGES_END), RangeKind::Reserved),
        ];
        map.extend(self.ram().into_iter().skip(1).map(|w| (w, RangeKind::Ram)));
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_large_guest_continues_above_4_gib() {
        let layout = Layout::new(5 * GIB, 5 * GIB);
        let sizes: Vec<u64> = layout.ram().iter().map(|w| w.size / GIB).collect();
        assert_eq!(sizes, [2, 3]);
        assert_eq!(layout.mmio64().base, 32 * GIB);
    }

    #[test]
    fn the_generation_has_a_reserved_page_of_its_own() {
        let page = Window { base: VM_GENERATION_ID, size: 4096 };
        assert!(page.base.is_multiple_of(4096) && page.end() <= SMBIOS_START);
        for (range, kind) in Layout::new(GIB, GIB).memory_map() {
            let apart = range.end() <= page.base || range.base >= page.end();
            assert!(apart || (kind == RangeKind::Reserved && range.base <= page.base && range.end() >= page.end()));
        }
    }

    #[test]
    fn the_high_window_follows_what_memory_may_become() {
        let now = Layout::new(GIB, 64 * GIB);
        let later = Layout::new(64 * GIB, 64 * GIB);
        assert_eq!(now.mmio64(), later.mmio64());
        assert_eq!(now.mmio64().base, 96 * GIB);
        assert_eq!((now.address_bits(), Layout::new(GIB, GIB).address_bits()), (37, 36));
        assert_eq!(Layout::new(GIB, 16 << 40).address_bits(), 45);
    }

    proptest! {
        #[test]
        fn nothing_overlaps(memory in 8u64..2048, more in 0u64..2048) {
            let granule = 2 << 20;
            let layout = Layout::new(memory * granule, (memory + more) * granule);
            let mut ranges: Vec<Window> = layout.memory_map().into_iter().map(|(w, _)| w).collect();
            ranges.extend([layout.mmio32(), layout.mmio64()]);
            ranges.sort_by_key(|w| w.base);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].base, "{pair:x?}");
            }
            let told: u64 = layout.memory_map().iter().filter(|(_, k)| *k == RangeKind::Ram).map(|(w, _)| w.size).sum();
            let hole = HIGH_MEMORY_START - LOW_RAM_END;
            prop_assert_eq!(told, memory * granule - hole);
        }
    }
}
