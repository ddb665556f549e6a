//! Network cards.

use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Serialize;

use crate::ids::VmId;

/// A network card, plugged into a bridge of whatever host the guest runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name within the VM.
    pub id: String,
    /// Name of the bridge; every host that may run the guest has one of this name.
    pub bridge: String,
    /// Hardware address; `None` takes the one of [`Nic::mac_of`].
    pub mac: Option<MacAddr>,
    /// Where the guest finds it, 1 to [`VmSpec::SLOTS`](super::VmSpec::SLOTS). `None`: the last slot that is free.
    #[serde(default)]
    pub slot: Option<u8>,
}

impl Nic {
    /// Linux's IFNAMSIZ, without the zero at the end.
    pub const MAX_BRIDGE_NAME: usize = 15;

    /// The address that the guest sees. It follows from the VM and the card, so it stays for life, on every host, without a pool to
    /// give out. 46 bits of a hash, locally administered and unicast: two of 20,000 cards meet with a chance of 3 in a million, and
    /// `decide` refuses the second then.
    pub fn mac_of(&self, vm: VmId) -> MacAddr {
        self.mac.unwrap_or_else(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(b"nic");
            hasher.update(vm.0.as_bytes());
            hasher.update(self.id.as_bytes());
            let hash = hasher.finalize();
            let [first, b, c, d, e, f, ..] = *hash.as_bytes();
            MacAddr::new(first & 0b1111_1100 | 0b10, b, c, d, e, f)
        })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn nic(id: &str) -> Nic {
        Nic { id: id.to_owned(), bridge: "br0".to_owned(), mac: None, slot: None }
    }

    #[test]
    fn a_card_has_one_address_for_life_and_no_two_have_the_same() {
        let vm = |number| VmId(Uuid::from_u128(number));
        let address = nic("lan").mac_of(vm(1));
        assert_eq!(Nic { bridge: "br1".to_owned(), ..nic("lan") }.mac_of(vm(1)), address);
        assert!(address.is_local() && address.is_unicast(), "{address}");
        assert_ne!(nic("wan").mac_of(vm(1)), address);
        assert_ne!(nic("lan").mac_of(vm(2)), address);
        let chosen = MacAddr::new(0x52, 0x54, 0, 1, 2, 3);
        assert_eq!(Nic { mac: Some(chosen), ..nic("lan") }.mac_of(vm(1)), chosen);
    }
}
