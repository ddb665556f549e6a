//! I/O through io_uring: no thread waits, and what waits in the kernel can be asked to come back.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Completion, DISCARD_MODE, Io, Token, zero_mode};
use super::config::QUEUE_SIZE;

/// Completions of cancel requests themselves, which say nothing.
const CANCEL: Token = u64::MAX;

pub struct Uring {
    ring: IoUring,
    file: File,
    completions: EventFd,
}

impl Uring {
    /// Fails where the kernel has no io_uring, forbids it (`kernel.io_uring_disabled`), or lacks an operation.
    /// The file comes back then.
    pub fn new(file: File) -> Result<Self, (File, io::Error)> {
        let ring = match Self::ring() {
            Ok(ring) => ring,
            Err(error) => return Err((file, error)),
        };
        let completions = match EventFd::new(EFD_NONBLOCK) {
            Ok(completions) => completions,
            Err(error) => return Err((file, error)),
        };
        match ring.submitter().register_eventfd(completions.as_raw_fd()) {
            Ok(()) => Ok(Self { ring, file, completions }),
            Err(error) => Err((file, error)),
        }
    }

    fn ring() -> io::Result<IoUring> {
        let ring = IoUring::new(u32::from(QUEUE_SIZE))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if needed.iter().all(|code| probe.is_supported(*code)) {
            Ok(ring)
        } else {
            Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring lacks an operation that disks need"))
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: what the entry points to stays valid until its completion: the caller of `start` promises it.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        // Full: hand over what is there and try once more.
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))
    }
}

impl Backend for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn completions(&self) -> &EventFd {
        &self.completions
    }

    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = match io {
            Io::Read { offset, buffers } => {
                opcode::Readv::new(fd, buffers.as_ptr(), buffers.len() as u32).offset(offset).build()
            }
            Io::Write { offset, buffers, durable } => opcode::Writev::new(fd, buffers.as_ptr(), buffers.len() as u32)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Io::Flush | Io::Settle => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Io::Discard { offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(DISCARD_MODE).build(),
            Io::Zero { offset, len, unmap } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(zero_mode(unmap)).build()
            }
        };
        self.push(&entry.user_data(token))
    }

    fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The completion queue is full, or the kernel is short of memory: what was not taken stays queued, and
                // goes with the next submit, after completions were reaped.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    let _ = self.completions.write(1);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn cancel(&mut self, tokens: &[Token]) -> io::Result<()> {
        for token in tokens {
            let entry = opcode::AsyncCancel::new(*token).build();
            self.push(&entry.user_data(CANCEL))?;
        }
        self.submit()
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let _ = self.completions.read();
        let own = self.ring.completion().filter(|e| e.user_data() != CANCEL);
        ended.extend(own.map(|entry| Completion { token: entry.user_data(), result: i64::from(entry.result()) }));
        // Entries that `submit` had to leave behind.
        if !self.ring.submission().is_empty() {
            let _ = self.submit();
        }
    }
}
