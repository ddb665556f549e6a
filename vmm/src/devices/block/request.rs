//! A request of the driver, read from its chain: pure, and every number checked before anything acts on it.
//!
//! Two kinds of fault. A chain that has no room for header or status breaks the protocol: the device needs a reset.
//! A request that asks for something impossible is answered with an error status.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{GuestMemory as _, Permissions};

use super::config::{Geometry, MAX_DISCARD_SECTORS, MAX_REQUEST_BYTES, MAX_SEGMENTS, MAX_ZERO_SECTORS, SECTOR_BYTES};
use crate::memory::GuestMemory;
use crate::virtio::chain::ChainError;
use crate::virtio::{Chain, Segments};

/// type, reserved, sector
const HEADER_BYTES: usize = 16;
const STATUS_BYTES: u64 = 1;
/// sector, number of sectors, flags
const RANGE_BYTES: usize = 16;

/// The status byte of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What to do on the disk. Offsets and lengths are bytes, inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Discard { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
}

/// A request that the disk has to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    pub operation: Operation,
    /// Of a read or a write.
    pub data: Segments,
    pub status: Segments,
}

/// A request that is answered at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub head: u16,
    pub status: Status,
    pub status_at: Segments,
    /// Bytes written before the status.
    pub written: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    Disk(Request),
    Now(Answer),
}

/// Reads one chain.
pub fn parse(mut chain: Chain, memory: &GuestMemory, disk: &Geometry) -> Result<Parsed, ChainError> {
    let head = chain.head;
    let too_short = |what| ChainError::TooShort { head, what };
    let header_at = chain.readable.take_front(HEADER_BYTES as u64).ok_or(too_short("no request header"))?;
    let status_at = chain.writable.take_back(STATUS_BYTES).ok_or(too_short("no status byte"))?;
    let mut header = [0; HEADER_BYTES];
    if !header_at.read(memory, &mut header) {
        return Err(ChainError::Copy { head });
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64_at(&header, 8);
    let (to_device, to_driver) = (chain.readable, chain.writable);

    let outcome = match kind {
        VIRTIO_BLK_T_IN if to_device.is_empty() => {
            span(disk, sector, to_driver.len()).map(|offset| (Operation::Read { offset }, to_driver))
        }
        VIRTIO_BLK_T_OUT if to_driver.is_empty() => writable(disk)
            .and_then(|()| span(disk, sector, to_device.len()))
            .map(|offset| (Operation::Write { offset }, to_device)),
        // Buffers of the wrong direction.
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Status::IoError),
        VIRTIO_BLK_T_FLUSH => Ok((Operation::Flush, Segments::default())),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut range = [0; RANGE_BYTES];
            if to_device.len() != RANGE_BYTES as u64 {
                // We said that one range is the most.
                Err(Status::Unsupported)
            } else if !to_device.read(memory, &mut range) {
                return Err(ChainError::Copy { head });
            } else {
                writable(disk)
                    .and_then(|()| range_operation(kind, &range, disk))
                    .map(|operation| (operation, Segments::default()))
            }
        }
        VIRTIO_BLK_T_GET_ID => {
            let len = (to_driver.len() as usize).min(disk.serial.len());
            if !to_driver.write(memory, &disk.serial[..len]) {
                return Err(ChainError::Copy { head });
            }
            return Ok(Parsed::Now(Answer { head, status: Status::Ok, status_at, written: len as u32 }));
        }
        _ => Err(Status::Unsupported),
    };
    Ok(match outcome {
        Ok((operation, data)) => Parsed::Disk(Request { head, operation, data, status: status_at }),
        Err(status) => Parsed::Now(Answer { head, status, status_at, written: 0 }),
    })
}

fn writable(disk: &Geometry) -> Result<(), Status> {
    if disk.read_only { Err(Status::IoError) } else { Ok(()) }
}

/// The byte offset of a transfer that lies on whole blocks inside the disk.
fn span(disk: &Geometry, sector: u64, len: u64) -> Result<u64, Status> {
    let block = u64::from(disk.block_bytes);
    if len == 0 || len > MAX_REQUEST_BYTES || !len.is_multiple_of(block) {
        return Err(Status::IoError);
    }
    let end = sector.checked_add(len / SECTOR_BYTES).ok_or(Status::IoError)?;
    let aligned = sector.is_multiple_of(block / SECTOR_BYTES);
    if !aligned || end > disk.capacity_sectors {
        return Err(Status::IoError);
    }
    Ok(sector * SECTOR_BYTES)
}

fn range_operation(kind: u32, range: &[u8; RANGE_BYTES], disk: &Geometry) -> Result<Operation, Status> {
    let sector = u64_at(range, 0);
    let count = u32::from_le_bytes([range[8], range[9], range[10], range[11]]);
    let flags = u32::from_le_bytes([range[12], range[13], range[14], range[15]]);
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let is_discard = kind == VIRTIO_BLK_T_DISCARD;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (is_discard && unmap) {
        return Err(Status::Unsupported);
    }
    let limit = if is_discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
    let end = sector.checked_add(u64::from(count));
    let block = u64::from(disk.block_bytes) / SECTOR_BYTES;
    let inside = end.is_some_and(|end| end <= disk.capacity_sectors);
    let aligned = sector.is_multiple_of(block) && u64::from(count).is_multiple_of(block);
    if count == 0 || count > limit || !inside || !aligned {
        return Err(Status::IoError);
    }
    let (offset, len) = (sector * SECTOR_BYTES, u64::from(count) * SECTOR_BYTES);
    Ok(if is_discard { Operation::Discard { offset, len } } else { Operation::Zero { offset, len, unmap } })
}

impl Request {
    /// Whether the request is one that [`parse`] could have made for this disk.
    pub fn fits(&self, disk: &Geometry, memory: &GuestMemory) -> bool {
        let (data, status) = (&self.data, &self.status);
        let operation = match self.operation {
            Operation::Read { offset } => span(disk, offset / SECTOR_BYTES, data.len()).is_ok_and(|at| at == offset),
            Operation::Write { offset } => {
                !disk.read_only && span(disk, offset / SECTOR_BYTES, data.len()).is_ok_and(|at| at == offset)
            }
            Operation::Flush => data.is_empty(),
            Operation::Discard { offset, len } => data.is_empty() && range_fits(disk, offset, len, MAX_DISCARD_SECTORS),
            Operation::Zero { offset, len, .. } => data.is_empty() && range_fits(disk, offset, len, MAX_ZERO_SECTORS),
        };
        let access = match self.operation {
            Operation::Read { .. } => Permissions::Write,
            _ => Permissions::Read,
        };
        let in_memory = |segments: &Segments, access| {
            segments.iter().all(|segment| memory.check_range(segment.address, segment.len as usize, access))
        };
        // One more than we ask drivers to keep to: a header or a status can share its buffer with data.
        let buffers = data.count() <= MAX_SEGMENTS as usize + 1 && in_memory(data, access);
        operation && buffers && status.len() == STATUS_BYTES && in_memory(status, Permissions::Write)
    }
}

fn range_fits(disk: &Geometry, offset: u64, len: u64, limit: u32) -> bool {
    let block = u64::from(disk.block_bytes);
    let aligned = offset.is_multiple_of(block) && len.is_multiple_of(block);
    let inside = offset.checked_add(len).is_some_and(|end| end <= disk.capacity_sectors * SECTOR_BYTES);
    !disk.read_only && aligned && inside && len > 0 && len <= u64::from(limit) * SECTOR_BYTES
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::chain::Segment;
    use crate::virtio::testing::guest_memory;

    fn disk(read_only: bool, block_bytes: u32) -> Geometry {
        Geometry { capacity_sectors: 2048, block_bytes, read_only, serial: *b"serial-of-20-bytes!!" }
    }

    fn segments(parts: &[(u64, u32)]) -> Segments {
        parts.iter().map(|(address, len)| Segment { address: GuestAddress(*address), len: *len }).collect()
    }

    /// A request of `kind` at `sector` with data buffers of these lengths.
    fn ask(disk: &Geometry, kind: u32, sector: u64, out: u32, back: u32) -> Parsed {
        let memory = guest_memory();
        memory.write_obj(kind, GuestAddress(0)).unwrap();
        memory.write_obj(sector, GuestAddress(8)).unwrap();
        let chain = Chain {
            head: 0,
            // The header in two pieces, the second with data behind it: framing is the driver's choice.
            readable: segments(&[(0, 5), (5, 11 + out)]),
            writable: segments(&[(0x10_0000, back), (0x20_0000, 1)]),
        };
        parse(chain, &memory, disk).unwrap()
    }

    fn status(parsed: Parsed) -> Status {
        match parsed {
            Parsed::Now(answer) => answer.status,
            Parsed::Disk(request) => panic!("{request:?} would be carried out"),
        }
    }

    #[test]
    fn a_read_inside_of_the_disk_goes_to_it() {
        let Parsed::Disk(request) = ask(&disk(false, 512), VIRTIO_BLK_T_IN, 2040, 0, 4096) else {
            panic!("a read is carried out");
        };
        assert_eq!(request.operation, Operation::Read { offset: 2040 * 512 });
        assert_eq!(request.data.len(), 4096);
    }

    #[test]
    fn what_lies_beyond_the_end_or_between_blocks_is_an_error() {
        let small = disk(false, 512);
        for (sector, len) in [(2041, 4096), (2048, 512), (u64::MAX, 512), (0, 511), (0, 0)] {
            assert_eq!(status(ask(&small, VIRTIO_BLK_T_IN, sector, 0, len)), Status::IoError);
            assert_eq!(status(ask(&small, VIRTIO_BLK_T_OUT, sector, len, 0)), Status::IoError);
        }
        let large = disk(false, 4096);
        assert_eq!(status(ask(&large, VIRTIO_BLK_T_OUT, 1, 4096, 0)), Status::IoError);
        assert_eq!(status(ask(&large, VIRTIO_BLK_T_OUT, 0, 512, 0)), Status::IoError);
    }

    #[test]
    fn buffers_of_the_wrong_direction_are_an_error() {
        let disk = disk(false, 512);
        assert_eq!(status(ask(&disk, VIRTIO_BLK_T_IN, 0, 512, 512)), Status::IoError);
        assert_eq!(status(ask(&disk, VIRTIO_BLK_T_OUT, 0, 512, 512)), Status::IoError);
    }

    #[test]
    fn a_read_only_disk_refuses_to_change() {
        let disk = disk(true, 512);
        for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(
                status(ask(&disk, kind, 0, 16 * 32, 0)),
                if kind == VIRTIO_BLK_T_OUT { Status::IoError } else { Status::Unsupported }
            );
        }
        assert_eq!(status(ask(&disk, VIRTIO_BLK_T_DISCARD, 0, 16, 0)), Status::IoError);
        assert!(matches!(ask(&disk, VIRTIO_BLK_T_IN, 0, 0, 512), Parsed::Disk(_)));
    }

    #[test]
    fn a_request_of_as_many_buffers_as_a_chain_has_can_be_taken_over() {
        let (disk, memory) = (disk(false, 512), guest_memory());
        memory.write_obj(VIRTIO_BLK_T_OUT, GuestAddress(0)).unwrap();
        // The header shares the first buffer with data.
        let pieces = (0..MAX_SEGMENTS).map(|_| (0x1000, 2));
        let readable: Vec<(u64, u32)> = [(0, 16 + 4)].into_iter().chain(pieces).collect();
        let chain = Chain { head: 0, readable: segments(&readable), writable: segments(&[(0x2000, 1)]) };
        assert_eq!(chain.readable.count() + chain.writable.count(), MAX_SEGMENTS as usize + 2);
        let Parsed::Disk(request) = parse(chain, &memory, &disk).unwrap() else {
            panic!("a write is carried out");
        };
        assert!(request.fits(&disk, &memory));
    }

    #[test]
    fn unknown_requests_are_unsupported() {
        let disk = disk(false, 512);
        for kind in [3, 5, 99, u32::MAX] {
            assert_eq!(status(ask(&disk, kind, 0, 0, 0)), Status::Unsupported);
        }
    }

    #[test]
    fn a_chain_without_header_or_status_breaks_the_protocol() {
        let memory = guest_memory();
        for (readable, writable) in [(15, 1), (16, 0), (0, 512)] {
            let chain =
                Chain { head: 3, readable: segments(&[(0, readable)]), writable: segments(&[(0x1000, writable)]) };
            let error = parse(chain, &memory, &disk(false, 512)).unwrap_err();
            assert!(matches!(error, ChainError::TooShort { head: 3, .. }));
        }
    }

    proptest! {
        /// Whatever header and range a driver writes, what reaches the disk lies inside of it and within the limits.
        #[test]
        fn nothing_outside_of_the_disk_is_ever_asked_for(
            kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
            sector in prop_oneof![0u64..3000, any::<u64>()],
            range_sector in prop_oneof![0u64..3000, any::<u64>()],
            count in prop_oneof![0u32..3000, any::<u32>()],
            flags in 0u32..4,
            out in prop_oneof![Just(0u32), Just(16), 0u32..9000],
            back in prop_oneof![Just(0u32), 0u32..9000],
            big_blocks: bool,
        ) {
            let disk = disk(false, if big_blocks { 4096 } else { 512 });
            let memory = guest_memory();
            memory.write_obj(kind, GuestAddress(0)).unwrap();
            memory.write_obj(sector, GuestAddress(8)).unwrap();
            memory.write_obj(range_sector, GuestAddress(16)).unwrap();
            memory.write_obj(count, GuestAddress(24)).unwrap();
            memory.write_obj(flags, GuestAddress(28)).unwrap();
            let chain = Chain {
                head: 0,
                readable: segments(&[(0, 16 + out)]),
                writable: segments(&[(0x10_0000, back), (0x20_0000, 1)]),
            };
            let Parsed::Disk(request) = parse(chain, &memory, &disk).unwrap() else {
                return Ok(());
            };
            prop_assert!(request.fits(&disk, &memory));
            let capacity = disk.capacity_sectors * 512;
            let (offset, len) = match request.operation {
                Operation::Read { offset } | Operation::Write { offset } => (offset, request.data.len()),
                Operation::Discard { offset, len } | Operation::Zero { offset, len, .. } => (offset, len),
                Operation::Flush => (0, 0),
            };
            prop_assert!(offset.checked_add(len).is_some_and(|end| end <= capacity));
            prop_assert!(request.data.len() <= MAX_REQUEST_BYTES);
            prop_assert_eq!(offset % u64::from(disk.block_bytes), 0);
            prop_assert_eq!(len % u64::from(disk.block_bytes), 0);
        }
    }
}
