//! One request between the driver and the kernel: its buffers laid out for the file, and what a result means for it.

use std::time::Duration;

use vm_memory::Permissions;

use super::backend::Io;
use super::disk::AlignedBuffer;
use super::request::{Operation, Request, Status};
use crate::memory::GuestMemory;

/// Times that a request is started again because the kernel asked for it (EAGAIN, EINTR).
const MAX_RETRIES: u32 = 16;

pub(super) struct Pending {
    pub(super) request: Request,
    /// Keeps the mapping under the buffers.
    pub(super) memory: GuestMemory,
    pub(super) buffers: Buffers,
    pub(super) done: u64,
    pub(super) retries: u32,
    pub(super) in_flight: bool,
    /// The driver was reset: no answer.
    pub(super) orphan: bool,
    pub(super) write_through: bool,
    pub(super) fare: Fare,
}

/// What a request owes to the rate limit. Paid once, however often it is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fare {
    Unpaid,
    /// Found no tokens at this time.
    WaitsSince(Duration),
    Paid,
}

#[derive(Default)]
pub(super) struct Buffers {
    /// What the kernel was given.
    pub(super) list: Vec<libc::iovec>,
    pub(super) bounce: Option<AlignedBuffer>,
}

// SAFETY: the addresses lie in guest memory that `Pending::memory` keeps mapped, or in `bounce`.
unsafe impl Send for Buffers {}

pub(super) enum Prepared {
    Ready { bounced: u64 },
    NoRoom,
    Unusable,
}

pub(super) enum Step {
    /// The kernel gave it back.
    Park,
    /// A part is done, or the kernel asks to try again.
    Again,
    End(Status),
    /// Storage failed it, with this error number.
    Failed(i32),
}

impl Pending {
    /// Lays out the buffers of what is left to transfer. The bytes of a new bounce buffer are counted.
    pub(super) fn prepare(&mut self, direct: Option<usize>, room: u64) -> Prepared {
        let is_write = match self.request.operation {
            Operation::Read { .. } => false,
            Operation::Write { .. } => true,
            _ => return Prepared::Ready { bounced: 0 },
        };
        if let Some(bounce) = self.buffers.bounce.as_mut() {
            let (start, len) = (bounce.as_mut_ptr(), bounce.len());
            let done = self.done as usize;
            self.buffers.list = vec![libc::iovec {
                // SAFETY: `done` is less than `len`.
                iov_base: unsafe { start.add(done) }.cast(),
                iov_len: len - done,
            }];
            return Prepared::Ready { bounced: 0 };
        }
        let access = if is_write { Permissions::Read } else { Permissions::Write };
        let mut list = Vec::with_capacity(self.request.data.count());
        if !self.request.data.host_buffers(&self.memory, access, self.done, &mut list) {
            return Prepared::Unusable;
        }
        let aligned = direct.is_none_or(|alignment| {
            list.iter().all(|v| (v.iov_base as usize).is_multiple_of(alignment) && v.iov_len.is_multiple_of(alignment))
        });
        if aligned && list.len() <= libc::UIO_MAXIOV as usize {
            self.buffers.list = list;
            return Prepared::Ready { bounced: 0 };
        }
        let len = self.request.data.len();
        if len > room {
            return Prepared::NoRoom;
        }
        let Some(mut bounce) = AlignedBuffer::new(len as usize) else {
            return Prepared::Unusable;
        };
        if is_write && !self.request.data.read(&self.memory, bounce.bytes_mut()) {
            return Prepared::Unusable;
        }
        self.done = 0;
        self.buffers.list = vec![libc::iovec { iov_base: bounce.as_mut_ptr().cast(), iov_len: bounce.len() }];
        self.buffers.bounce = Some(bounce);
        Prepared::Ready { bounced: len }
    }

    pub(super) fn io(&self) -> Io<'_> {
        let buffers = &self.buffers.list[..];
        match self.request.operation {
            Operation::Read { offset } => Io::Read { offset: offset + self.done, buffers },
            Operation::Write { offset } => {
                Io::Write { offset: offset + self.done, buffers, durable: self.write_through }
            }
            Operation::Flush => Io::Flush,
            Operation::Discard { offset, len } => Io::Discard { offset, len },
            Operation::Zero { offset, len, unmap } => Io::Zero { offset, len, unmap },
        }
    }

    /// What a result means for the request.
    pub(super) fn advance(&mut self, result: i64) -> Step {
        let transfers = matches!(self.request.operation, Operation::Read { .. } | Operation::Write { .. });
        match i32::try_from(-result) {
            Ok(libc::ECANCELED) => Step::Park,
            Ok(libc::EINTR | libc::EAGAIN) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Step::Again
            }
            Ok(libc::EOPNOTSUPP) if !transfers => Step::End(Status::Unsupported),
            Ok(errno) if errno > 0 => Step::Failed(errno),
            _ if !transfers => Step::End(Status::Ok),
            _ => {
                self.done += result.unsigned_abs();
                if self.done >= self.request.data.len() {
                    Step::End(Status::Ok)
                } else if result == 0 {
                    // The file ended before the disk did: somebody cut it.
                    Step::Failed(libc::EIO)
                } else {
                    Step::Again
                }
            }
        }
    }

    /// Copies a bounce buffer to the guest.
    pub(super) fn deliver(&mut self) -> bool {
        match self.buffers.bounce.as_ref() {
            Some(bounce) => self.request.data.write(&self.memory, bounce.bytes()),
            None => true,
        }
    }

    /// Marks the pages that a read may have written. False when they are not guest memory.
    pub(super) fn mark_written(&self) -> bool {
        if !matches!(self.request.operation, Operation::Read { .. }) || self.buffers.bounce.is_some() {
            return true;
        }
        self.request.data.mark_written(&self.memory, self.request.data.len())
    }
}
