//! The tables of a qcow2 image, checked before the image is used: the L1 table and the refcounts of everything that is not data.
//!
//! A cluster that holds a table and counts as free would be handed out for data of the guest, which then writes the image's
//! tables. QEMU looks for that at each write; `imago` 0.2.6 does not, so it is looked for once, here. One case is worse: without a
//! block for the first clusters it places one at offset 0, which its table cannot name, looks for one without end, and overflows
//! the stack; that ends the process, and no panic handler sees it.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use super::ImageError;
use super::header::Header;

/// Reads the file, and zeros behind its end.
pub trait ReadAt {
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
}

/// Checks what the header leads to. `file_bytes` is the length of the file.
pub fn check(path: &Path, header: &Header, file: &dyn ReadAt, file_bytes: u64) -> Result<(), ImageError> {
    let tables = Tables { path, header, file, file_bytes };
    let l2_tables = tables.l2_tables()?;
    let refblocks = tables.refblocks()?;
    tables.check_refcounts(&l2_tables, &refblocks)
}

struct Tables<'a> {
    path: &'a Path,
    header: &'a Header,
    file: &'a dyn ReadAt,
    file_bytes: u64,
}

impl Tables<'_> {
    fn damaged(&self, what: impl Into<String>) -> ImageError {
        ImageError::Damaged { path: self.path.to_owned(), what: what.into() }
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let failed = |source| ImageError::Read { path: self.path.to_owned(), source };
        let len = usize::try_from(len).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        self.file.read_at(offset, len).map_err(failed)
    }

    fn entries(&self, offset: u64, count: u64) -> Result<Vec<u64>, ImageError> {
        let bytes = self.read(offset, count * 8)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    /// A cluster that something points to, by its number.
    fn cluster(&self, what: &str, offset: u64) -> Result<u64, ImageError> {
        if !offset.is_multiple_of(self.header.cluster_bytes()) {
            return Err(self.damaged(format!("{what} at {offset}, which is not the start of a cluster")));
        }
        // A table is written whole, so the file does not end within one.
        if offset.checked_add(self.header.cluster_bytes()).is_none_or(|end| end > self.file_bytes) {
            return Err(self.damaged(format!("{what} at {offset}, which lies beyond the end of the file")));
        }
        Ok(offset >> self.header.cluster_bits)
    }

    /// The clusters of all L2 tables.
    fn l2_tables(&self) -> Result<BTreeSet<u64>, ImageError> {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        const RESERVED: u64 = 0x7f00_0000_0000_01ff;
        let mut found = BTreeSet::new();
        for entry in self.entries(self.header.l1_offset, self.header.l1_entries)? {
            if entry & RESERVED != 0 {
                return Err(self.damaged(format!("an L1 entry {entry:#x} has reserved bits")));
            }
            if entry & OFFSET != 0 && !found.insert(self.cluster("an L2 table", entry & OFFSET)?) {
                return Err(self.damaged(format!("two L1 entries share the L2 table at {:#x}", entry & OFFSET)));
            }
        }
        Ok(found)
    }

    /// The clusters of the refcount blocks, by their place in the table; zero for none.
    fn refblocks(&self) -> Result<Vec<u64>, ImageError> {
        let count = self.header.reftable_clusters * self.header.cluster_bytes() / 8;
        let mut found = BTreeSet::new();
        let mut blocks = Vec::new();
        for entry in self.entries(self.header.reftable_offset, count)? {
            if entry & 0x1ff != 0 {
                return Err(self.damaged(format!("a refcount table entry {entry:#x} has reserved bits")));
            }
            let cluster = if entry == 0 { 0 } else { self.cluster("a refcount block", entry)? };
            if cluster != 0 && !found.insert(cluster) {
                return Err(self.damaged(format!("two places of the refcount table share the block at {entry:#x}")));
            }
            blocks.push(cluster);
        }
        Ok(blocks)
    }

    /// Whether every cluster that holds header or tables counts as used, and holds one thing only.
    fn check_refcounts(&self, l2_tables: &BTreeSet<u64>, refblocks: &[u64]) -> Result<(), ImageError> {
        let header = self.header;
        let span = |offset: u64, bytes: u64| {
            let first = offset >> header.cluster_bits;
            first..first + bytes.div_ceil(header.cluster_bytes())
        };
        let mut used = BTreeSet::from([0]);
        let tables = span(header.l1_offset, header.l1_entries * 8)
            .chain(span(header.reftable_offset, header.reftable_clusters * header.cluster_bytes()))
            .chain(l2_tables.iter().copied())
            .chain(refblocks.iter().copied().filter(|cluster| *cluster != 0));
        for cluster in tables {
            if !used.insert(cluster) {
                return Err(self.damaged(format!("two tables share the cluster {cluster}")));
            }
        }
        let counts_in_block = (header.cluster_bytes() * 8) >> header.refcount_order;
        let mut loaded: Option<(u64, Vec<u8>)> = None;
        // In rising order, so that each block is read once.
        for cluster in used {
            let index = cluster / counts_in_block;
            let block = usize::try_from(index).ok().and_then(|i| refblocks.get(i)).copied().unwrap_or(0);
            let is_used = block != 0 && {
                if loaded.as_ref().is_none_or(|(at, _)| *at != index) {
                    let bytes = self.read(block << header.cluster_bits, header.cluster_bytes())?;
                    loaded = Some((index, bytes));
                }
                let bytes = loaded.as_ref().map(|(_, bytes)| &bytes[..]).unwrap_or_default();
                refcount_is_set(bytes, cluster % counts_in_block, header.refcount_order)
            };
            if !is_used {
                return Err(self.damaged(format!("the cluster {cluster} holds a table and counts as free")));
            }
        }
        Ok(())
    }
}

/// Whether the count at `index` of a refcount block is not zero.
fn refcount_is_set(block: &[u8], index: u64, order: u32) -> bool {
    let bits = 1u64 << order;
    let first_bit = index * bits;
    let Ok(at) = usize::try_from(first_bit / 8) else {
        return false;
    };
    if bits < 8 {
        let mask = ((1u16 << bits) - 1) as u8;
        return block.get(at).is_some_and(|byte| byte >> (first_bit % 8) & mask != 0);
    }
    block.get(at..at + (bits / 8) as usize).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_found() {
        for order in 0..=6 {
            let bits = 1usize << order;
            for index in [0usize, 1, 5, 7, 31] {
                let mut block = [0u8; 512];
                block[(index * bits) / 8] = 1 << (index * bits % 8);
                for other in 0..32u64 {
                    let expected = other == index as u64;
                    assert_eq!(refcount_is_set(&block, other, order), expected, "{order} {index} {other}");
                }
            }
        }
    }
}
