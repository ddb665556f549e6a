//! Who a guest's process is on its host: a user and a group of each VM's own, which nobody else has. What gets out of one guest meets the
//! files and processes of another as a stranger.
//!
//! The number follows from the VM's id, so that nothing has to be handed out, remembered or given back. It lies above all ranges that
//! systemd's documentation of users and groups gives away; two VMs of one host have the same once in 134 million pairs, and then
//! have one wall less between them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use statemachine::ids::VmId;

const FIRST: u32 = 0x7000_0000;
const BITS: u32 = 27;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestUser(u32);

impl GuestUser {
    /// `None` when this hostd is not root, and so cannot be anybody else.
    pub fn of(vm: VmId) -> Option<GuestUser> {
        rustix::process::geteuid().is_root().then(|| GuestUser::numbered(vm))
    }

    fn numbered(vm: VmId) -> GuestUser {
        let mixed = blake3::hash(vm.0.as_bytes());
        let [a, b, c, d, ..] = *mixed.as_bytes();
        GuestUser(FIRST + (u32::from_le_bytes([a, b, c, d]) >> (u32::BITS - BITS)))
    }

    pub fn id(self) -> u32 {
        self.0
    }

    /// Makes a directory the guest's process's own. What is in it stays whose it is.
    pub fn own(self, dir: &Path) -> io::Result<()> {
        if fs::symlink_metadata(dir)?.uid() == self.0 {
            return Ok(());
        }
        std::os::unix::fs::lchown(dir, Some(self.0), Some(self.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use uuid::Uuid;

    use super::*;

    #[test]
    fn each_vm_has_its_own_user_in_a_range_that_nobody_has() {
        let ids = (0..1000).map(|n| GuestUser::numbered(VmId(Uuid::from_u128(n))).id());
        let ids: BTreeSet<u32> = ids.collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| (0x7000_0000..0x7800_0000).contains(id)));
        let one = VmId(Uuid::from_u128(1));
        assert_eq!(GuestUser::numbered(one), GuestUser::numbered(one));
    }
}
