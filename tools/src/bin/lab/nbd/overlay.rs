//! The volatile part of a disk: sectors that were written and not flushed, by the host that wrote
//! them. Pure; the server applies what [`Overlay::flush`] answers to the durable file.
//!
//! A shared disk has several writers. All see the newest write at once; power loss of one host
//! takes away that host's unflushed sectors alone, and an older write of another host below them
//! comes back. At most one version a host is kept for a sector, because a host's flush or loss
//! always covers all of its versions.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::state::HostId;

/// Requests are aligned to it; the handshake tells clients so.
pub const SECTOR: usize = 512;

struct Version {
    writer: HostId,
    data: Bytes,
}

/// Bytes that became durable: consecutive sectors starting at `offset`.
#[derive(Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub data: Vec<u8>,
}

/// Extents are joined up to this size, so that one flush needs no buffer of its own size.
const MAX_EXTENT: usize = 1 << 20;

#[derive(Default)]
pub struct Overlay {
    /// Versions of a sector, oldest first, each of another writer.
    sectors: BTreeMap<u64, Vec<Version>>,
    dirty: BTreeMap<HostId, BTreeSet<u64>>,
}

impl Overlay {
    /// Takes a write in; it is visible to every reader from now on. `offset` and the length are
    /// multiples of [`SECTOR`], checked where the request was parsed.
    pub fn write(&mut self, writer: HostId, offset: u64, data: &Bytes) {
        debug_assert!(offset.is_multiple_of(SECTOR as u64) && data.len().is_multiple_of(SECTOR));
        let dirty = self.dirty.entry(writer).or_default();
        for (number, at) in (0..data.len()).step_by(SECTOR).enumerate() {
            let sector = offset / SECTOR as u64 + number as u64;
            let versions = self.sectors.entry(sector).or_default();
            versions.retain(|version| version.writer != writer);
            versions.push(Version { writer, data: data.slice(at..at + SECTOR) });
            dirty.insert(sector);
        }
    }

    /// Lays what is volatile over `buffer`, which holds the durable bytes from `offset` on.
    pub fn read_over(&self, offset: u64, buffer: &mut [u8]) {
        let first = offset / SECTOR as u64;
        let end = first + (buffer.len() / SECTOR) as u64;
        for (sector, versions) in self.sectors.range(first..end) {
            let Some(newest) = versions.last() else { continue };
            let at = usize::try_from(sector - first).unwrap_or(usize::MAX) * SECTOR;
            if let Some(place) = buffer.get_mut(at..at + SECTOR) {
                place.copy_from_slice(&newest.data);
            }
        }
    }

    /// Makes all of a host's completed writes durable: the extents must reach the file.
    pub fn flush(&mut self, writer: HostId) -> Vec<Extent> {
        let sectors = self.dirty.remove(&writer).unwrap_or_default();
        self.settle(writer, sectors)
    }

    /// Makes one range of a host's writes durable (a write with FUA).
    pub fn flush_range(&mut self, writer: HostId, offset: u64, length: usize) -> Vec<Extent> {
        let first = offset / SECTOR as u64;
        let end = first + (length / SECTOR) as u64;
        let Some(dirty) = self.dirty.get_mut(&writer) else { return Vec::new() };
        let sectors: BTreeSet<u64> = dirty.range(first..end).copied().collect();
        for sector in &sectors {
            dirty.remove(sector);
        }
        self.settle(writer, sectors)
    }

    /// The host lost power: what it did not flush never was.
    pub fn lose_power(&mut self, writer: HostId) -> usize {
        let lost = self.dirty.remove(&writer).unwrap_or_default();
        for sector in &lost {
            if let Some(versions) = self.sectors.get_mut(sector) {
                versions.retain(|version| version.writer != writer);
                if versions.is_empty() {
                    self.sectors.remove(sector);
                }
            }
        }
        lost.len() * SECTOR
    }

    /// Bytes that a power loss of this host would take.
    pub fn volatile_bytes(&self, writer: HostId) -> usize {
        self.dirty.get(&writer).map_or(0, |sectors| sectors.len() * SECTOR)
    }

    /// Takes the writer's versions of `sectors` out, with every older version below them: durable
    /// bytes replace those for good.
    fn settle(&mut self, writer: HostId, sectors: BTreeSet<u64>) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for sector in sectors {
            let Some(versions) = self.sectors.get_mut(&sector) else { continue };
            let Some(own) = versions.iter().position(|version| version.writer == writer) else { continue };
            let settled = versions.drain(..=own).collect::<Vec<_>>();
            if versions.is_empty() {
                self.sectors.remove(&sector);
            }
            for older in &settled[..own] {
                if let Some(dirty) = self.dirty.get_mut(&older.writer) {
                    dirty.remove(&sector);
                }
            }
            let offset = sector * SECTOR as u64;
            let data = &settled[own].data;
            match extents.last_mut() {
                Some(last) if last.offset + last.data.len() as u64 == offset && last.data.len() < MAX_EXTENT => {
                    last.data.extend_from_slice(data);
                }
                _ => extents.push(Extent { offset, data: data.to_vec() }),
            }
        }
        extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId(1);
    const B: HostId = HostId(2);

    /// A disk of eight sectors: durable bytes under an overlay.
    struct Disk {
        durable: Vec<u8>,
        overlay: Overlay,
    }

    impl Disk {
        fn blank() -> Self {
            Self { durable: vec![b'.'; 8 * SECTOR], overlay: Overlay::default() }
        }

        fn write(&mut self, host: HostId, sector: usize, letters: &str) {
            let data: Vec<u8> = letters.bytes().flat_map(|letter| [letter; SECTOR]).collect();
            self.overlay.write(host, (sector * SECTOR) as u64, &data.into());
        }

        fn apply(&mut self, extents: Vec<Extent>) {
            for extent in extents {
                let at = extent.offset as usize;
                self.durable[at..at + extent.data.len()].copy_from_slice(&extent.data);
            }
        }

        fn flush(&mut self, host: HostId) {
            let extents = self.overlay.flush(host);
            self.apply(extents);
        }

        /// One letter a sector, as every host reads them.
        fn text(&self) -> String {
            let mut bytes = self.durable.clone();
            self.overlay.read_over(0, &mut bytes);
            bytes.chunks(SECTOR).map(|sector| sector[0] as char).collect()
        }
    }

    #[test]
    fn flushed_writes_survive_power_loss_and_others_do_not() {
        let mut disk = Disk::blank();
        disk.write(A, 0, "aa");
        disk.flush(A);
        disk.write(A, 1, "AA");
        assert_eq!(disk.text(), "aAA.....");
        assert_eq!(disk.overlay.lose_power(A), 2 * SECTOR);
        assert_eq!(disk.text(), "aa......");
    }

    #[test]
    fn power_loss_of_one_host_leaves_the_writes_of_another() {
        let mut disk = Disk::blank();
        disk.write(A, 0, "aaa");
        disk.write(B, 1, "b");
        assert_eq!(disk.text(), "aba.....");
        disk.overlay.lose_power(B);
        assert_eq!(disk.text(), "aaa.....");
        disk.write(B, 1, "b");
        disk.overlay.lose_power(A);
        assert_eq!(disk.text(), ".b......");
    }

    #[test]
    fn a_flush_of_the_newer_write_buries_the_older_one_of_another_host() {
        let mut disk = Disk::blank();
        disk.write(A, 0, "a");
        disk.write(B, 0, "b");
        disk.flush(B);
        assert_eq!(disk.overlay.volatile_bytes(A), 0);
        disk.flush(A);
        assert_eq!(disk.text(), "b.......", "what A wrote before B must not come back");
    }

    #[test]
    fn a_flush_of_the_older_write_stays_below_the_newer_one() {
        let mut disk = Disk::blank();
        disk.write(A, 0, "a");
        disk.write(B, 0, "b");
        disk.flush(A);
        assert_eq!(disk.text(), "b.......");
        disk.overlay.lose_power(B);
        assert_eq!(disk.text(), "a.......");
    }

    #[test]
    fn a_forced_write_is_durable_alone() {
        let mut disk = Disk::blank();
        disk.write(A, 0, "aaaa");
        disk.write(A, 2, "f");
        let extents = disk.overlay.flush_range(A, 2 * SECTOR as u64, SECTOR);
        disk.apply(extents);
        disk.overlay.lose_power(A);
        assert_eq!(disk.text(), "..f.....");
    }

    #[test]
    fn consecutive_sectors_reach_the_file_as_one_extent() {
        let mut disk = Disk::blank();
        disk.write(A, 3, "c");
        disk.write(A, 1, "ab");
        disk.write(A, 6, "x");
        let extents = disk.overlay.flush(A);
        let shape: Vec<_> = extents.iter().map(|extent| (extent.offset, extent.data.len())).collect();
        assert_eq!(shape, [(512, 3 * SECTOR), (6 * 512, SECTOR)]);
    }
}
