//! A descriptor chain, read once and checked whole: every length, every address, every direction.
//!
//! `virtio-queue` ends a broken chain as if it were complete. Here the difference matters (a cut request must not be
//! executed), so a chain whose last descriptor promises another one is an error.

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::memory::GuestMemory;

/// What is wrong with a chain. The driver is at fault: the device asks for a reset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    #[error("descriptor chain {head} is empty or its head does not exist")]
    Empty { head: u16 },
    #[error("descriptor chain {head} loops, leaves its table, or is longer than 4 GiB")]
    Broken { head: u16 },
    #[error("descriptor chain {head} has more than {limit} buffers")]
    TooLong { head: u16, limit: usize },
    #[error("descriptor chain {head} has a readable buffer behind a writable one")]
    WrongOrder { head: u16 },
    #[error("descriptor chain {head} points to {address:#x}+{len:#x}, which is not guest memory")]
    OutOfMemory { head: u16, address: u64, len: u32 },
    #[error("descriptor chain {head} has too few bytes: {what}")]
    TooShort { head: u16, what: &'static str },
    #[error("cannot copy to or from the buffers of descriptor chain {head}")]
    Copy { head: u16 },
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub len: u32,
}

/// Buffers of one direction, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segments(Vec<Segment>);

/// One request of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name in the used ring.
    pub head: u16,
    /// From the driver.
    pub readable: Segments,
    /// To the driver.
    pub writable: Segments,
}

impl Chain {
    /// Reads and checks a chain of at most `limit` buffers.
    pub fn read(chain: DescriptorChain<&GuestMemory>, memory: &GuestMemory, limit: usize) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let (mut seen, mut promises_more) = (0, false);
        for descriptor in chain {
            seen += 1;
            if seen > limit {
                return Err(ChainError::TooLong { head, limit });
            }
            promises_more = descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
            let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            if !memory.check_range(segment.address, segment.len as usize, access) {
                return Err(ChainError::OutOfMemory { head, address: segment.address.0, len: segment.len });
            }
            if descriptor.is_write_only() {
                writable.push(segment);
            } else if writable.is_empty() {
                readable.push(segment);
            } else {
                return Err(ChainError::WrongOrder { head });
            }
        }
        if seen == 0 {
            return Err(ChainError::Empty { head });
        }
        if promises_more {
            return Err(ChainError::Broken { head });
        }
        // An empty buffer carries nothing, and no later step has to think of it.
        readable.retain(|s| s.len > 0);
        writable.retain(|s| s.len > 0);
        Ok(Self { head, readable: Segments(readable), writable: Segments(writable) })
    }
}

impl Segments {
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Buffers.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|s| u64::from(s.len)).sum()
    }

    /// Takes the first `len` bytes off. `None`, and nothing is taken, when there are fewer.
    pub fn take_front(&mut self, len: u64) -> Option<Segments> {
        let rest = self.split_off(len)?;
        Some(std::mem::replace(self, rest))
    }

    /// Takes the last `len` bytes off.
    pub fn take_back(&mut self, len: u64) -> Option<Segments> {
        self.split_off(self.len().checked_sub(len)?)
    }

    /// Keeps the first `at` bytes and returns the others.
    fn split_off(&mut self, at: u64) -> Option<Segments> {
        let mut left = at;
        for i in 0..self.0.len() {
            let segment = self.0[i];
            let len = u64::from(segment.len);
            if left < len {
                let mut rest = self.0.split_off(i);
                if left > 0 {
                    self.0.push(Segment { len: left as u32, ..segment });
                    rest[0] = Segment { address: GuestAddress(segment.address.0 + left), len: (len - left) as u32 };
                }
                return Some(Segments(rest));
            }
            left -= len;
        }
        (left == 0).then(Segments::default)
    }

    /// Fills `buffer` from the front. Returns false when guest memory does not give it.
    #[must_use]
    pub fn read(&self, memory: &GuestMemory, buffer: &mut [u8]) -> bool {
        let mut rest = buffer;
        for segment in &self.0 {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
            if memory.read_slice(now, segment.address).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Writes `bytes` to the front. Returns false when they do not fit.
    #[must_use]
    pub fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for segment in &self.0 {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            if memory.write_slice(now, segment.address).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Appends the host addresses of all but the first `skip` bytes, for the kernel to read (`Permissions::Read`) or to write.
    /// They are valid while `memory` is mapped. Returns false when guest memory does not give them.
    #[must_use]
    pub fn host_buffers(
        &self,
        memory: &GuestMemory,
        access: Permissions,
        skip: u64,
        list: &mut Vec<libc::iovec>,
    ) -> bool {
        let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
        for segment in &self.0 {
            let Ok(slices) = memory.get_slices(segment.address, segment.len as usize, access) else {
                return false;
            };
            for slice in slices {
                let Ok(slice) = slice else {
                    return false;
                };
                let skipped = skip.min(slice.len());
                skip -= skipped;
                if skipped == slice.len() {
                    continue;
                }
                list.push(libc::iovec {
                    // SAFETY: inside of the slice.
                    iov_base: unsafe { slice.ptr_guard_mut().as_ptr().add(skipped) }.cast(),
                    iov_len: slice.len() - skipped,
                });
            }
        }
        true
    }

    /// Notes that the kernel wrote to the first `len` bytes, for migration: it does not do so itself. Returns false when
    /// guest memory does not give them.
    #[must_use]
    pub fn mark_written(&self, memory: &GuestMemory, len: u64) -> bool {
        let mut left = len;
        for segment in &self.0 {
            if left == 0 {
                break;
            }
            let now = left.min(u64::from(segment.len));
            left -= now;
            let Ok(slices) = memory.get_slices(segment.address, now as usize, Permissions::Write) else {
                return false;
            };
            for slice in slices {
                let Ok(slice) = slice else {
                    return false;
                };
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        left == 0
    }
}

impl FromIterator<Segment> for Segments {
    fn from_iter<T: IntoIterator<Item = Segment>>(iter: T) -> Self {
        Self(iter.into_iter().filter(|s| s.len > 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Splitting keeps every byte in its place, wherever the cut is.
        #[test]
        fn a_cut_keeps_all_bytes(lens in prop::collection::vec(1u32..50, 0..8), cut in 0u64..300) {
            let bytes = |segments: &Segments| -> Vec<u64> {
                segments.iter().flat_map(|s| (0..u64::from(s.len)).map(|i| s.address.0 + i)).collect()
            };
            let mut at = 0x1000;
            let whole: Segments = lens.iter().map(|len| {
                at += 0x100;
                Segment { address: GuestAddress(at), len: *len }
            }).collect();
            let mut back = whole.clone();
            match back.take_front(cut) {
                Some(front) => {
                    prop_assert_eq!(front.len(), cut);
                    let mut joined = bytes(&front);
                    joined.extend(bytes(&back));
                    prop_assert_eq!(joined, bytes(&whole));
                }
                None => {
                    prop_assert!(cut > whole.len());
                    prop_assert_eq!(back, whole);
                }
            }
        }
    }
}
