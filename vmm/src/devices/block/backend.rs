//! What carries requests to the disk: started now, ended later, in any order.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Names a request between its start and its end.
pub type Token = u64;

/// One piece of work. Memory is named by address: see [`Backend::start`].
#[derive(Debug, Clone, Copy)]
pub enum Io<'a> {
    Read {
        offset: u64,
        buffers: &'a [libc::iovec],
    },
    Write {
        offset: u64,
        buffers: &'a [libc::iovec],
        /// On stable storage when it ends, for drivers that do not flush.
        durable: bool,
    },
    /// Everything that ended before is on stable storage when it ends.
    Flush,
    /// A flush after which nothing that was written before reaches the file: the last step of a drain.
    Settle,
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
}

/// The end of a request: bytes transferred, or the negative error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    pub token: Token,
    pub result: i64,
}

/// Carries out I/O on one open file. Owned by the disk's thread; none of its methods waits for the disk.
pub trait Backend: Send {
    /// How it works, for the log.
    fn name(&self) -> &'static str;

    /// Readable when [`reap`](Self::reap) finds something.
    fn completions(&self) -> &EventFd;

    /// Queues one request. At most the queue's size are under way at a time.
    ///
    /// # Safety
    /// The memory of the buffers must stay mapped, and the list of buffers in place, until the request's completion
    /// was reaped.
    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()>;

    /// Hands the queued requests to the kernel.
    fn submit(&mut self) -> io::Result<()>;

    /// Asks the kernel to take these requests back. Each still ends once, with its result or with `-ECANCELED`.
    fn cancel(&mut self, tokens: &[Token]) -> io::Result<()>;

    /// Appends what has ended.
    fn reap(&mut self, ended: &mut Vec<Completion>);
}

/// `fallocate` modes of the two requests that change no data buffer.
pub const DISCARD_MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

pub fn zero_mode(unmap: bool) -> i32 {
    if unmap { DISCARD_MODE } else { libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE }
}
