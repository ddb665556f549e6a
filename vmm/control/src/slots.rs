//! The slots of a guest that disks and network cards may name for themselves.
//!
//! A slot is a PCI address that the guest sees. Disks without a slot of their own take the first that are free, network cards the last;
//! so a definition that never changes needs no slots, and one whose devices come and go keeps those that the vmm has answered.

use std::collections::BTreeMap;

use crate::config::{ConfigError, MAX_DISKS_AND_NICS, NicConfig, invalid};
use crate::disk::DiskConfig;

/// Slot 0 is the console's.
pub const FIRST_SLOT: u8 = 1;
pub const LAST_SLOT: u8 = MAX_DISKS_AND_NICS as u8;

/// Ranges and collisions of the slots that are named.
pub(crate) fn check(disks: &[DiskConfig], nics: &[NicConfig]) -> Result<(), ConfigError> {
    let disks = disks.iter().enumerate().map(|(at, disk)| (format!("disks[{at}].slot"), disk.slot));
    let nics = nics.iter().enumerate().map(|(at, nic)| (format!("nics[{at}].slot"), nic.slot));
    let mut taken = BTreeMap::new();
    for (field, slot) in disks.chain(nics) {
        let Some(slot) = slot else {
            continue;
        };
        if !(FIRST_SLOT..=LAST_SLOT).contains(&slot) {
            return Err(invalid(field, format!("must be {FIRST_SLOT} to {LAST_SLOT}")));
        }
        if let Some(other) = taken.get(&slot) {
            return Err(invalid(field, format!("slot {slot} is that of {other} already")));
        }
        taken.insert(slot, field);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(slot: Option<u8>) -> DiskConfig {
        DiskConfig { slot, ..DiskConfig::default() }
    }

    fn nic(slot: Option<u8>) -> NicConfig {
        NicConfig { id: "lan".into(), mac: pnet_base::MacAddr::new(2, 0, 0, 0, 0, 1), mtu: 1500, slot }
    }

    #[test]
    fn slots_are_in_range_and_used_once() {
        check(&[disk(Some(FIRST_SLOT)), disk(None), disk(Some(5))], &[nic(Some(LAST_SLOT)), nic(None)]).unwrap();
        for (disks, nics) in [
            (vec![disk(Some(0))], vec![]),
            (vec![disk(Some(LAST_SLOT + 1))], vec![]),
            (vec![disk(Some(255))], vec![]),
            (vec![disk(Some(3)), disk(Some(3))], vec![]),
            (vec![disk(Some(3))], vec![nic(Some(3))]),
        ] {
            assert!(matches!(check(&disks, &nics), Err(ConfigError::Invalid { .. })));
        }
    }

    #[test]
    fn a_configuration_without_slots_is_written_as_before() {
        assert!(!serde_json::to_string(&(disk(None), nic(None))).unwrap().contains("slot"));
    }
}
