//! I/O by threads that wait: for image formats, and for raw disks on kernels that refuse io_uring. Slower, and a request that a
//! thread is inside of cannot be taken back; one that no thread has taken can.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Completion, DISCARD_MODE, Io, Token, zero_mode};
use crate::sandbox::Role;
use crate::virtio::locked;

const THREADS: usize = 4;

/// What the threads work on. Its calls may wait as long as they like.
pub trait Medium: Send + Sync + 'static {
    /// How it works, for the log.
    fn name(&self) -> &'static str;

    /// Bytes transferred, or the negative error number. The buffers are valid until it returns.
    fn carry_out(&self, work: &Work) -> i64;
}

pub struct Workers<M: Medium> {
    shared: Arc<Shared<M>>,
}

struct Shared<M> {
    medium: M,
    state: Mutex<State>,
    wake: Condvar,
    completions: EventFd,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    ended: Vec<Completion>,
    closing: bool,
}

struct Job {
    token: Token,
    work: Work,
}

/// One request: an [`Io`] that can wait in a queue.
pub enum Work {
    Read { offset: u64, buffers: Buffers },
    Write { offset: u64, buffers: Buffers, durable: bool },
    Flush,
    Settle,
    Discard { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
}

/// Addresses in guest memory or in a bounce buffer.
pub struct Buffers(pub Vec<libc::iovec>);

// SAFETY: plain addresses; `Backend::start` obliges its caller to keep the memory behind them until the end.
unsafe impl Send for Buffers {}

impl<M: Medium> Workers<M> {
    pub fn new(medium: M) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            medium,
            state: Mutex::default(),
            wake: Condvar::new(),
            completions: EventFd::new(EFD_NONBLOCK)?,
        });
        let workers = Self { shared: Arc::clone(&shared) };
        for _ in 0..THREADS {
            let shared = Arc::clone(&shared);
            // Not joined: one that hangs in the disk must not hold up anybody.
            Role::DiskWorker.spawn("", move || shared.work())?;
        }
        Ok(workers)
    }
}

impl<M: Medium> Drop for Workers<M> {
    fn drop(&mut self) {
        locked(&self.shared.state).closing = true;
        self.shared.wake.notify_all();
    }
}

impl<M: Medium> Shared<M> {
    fn work(&self) {
        while let Some(job) = self.next() {
            let result = self.medium.carry_out(&job.work);
            self.end(job.token, result);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = locked(&self.state);
        loop {
            if state.closing {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, token: Token, result: i64) {
        locked(&self.state).ended.push(Completion { token, result });
        let _ = self.completions.write(1);
    }
}

impl Medium for File {
    fn name(&self) -> &'static str {
        "worker threads"
    }

    fn carry_out(&self, work: &Work) -> i64 {
        let fd = self.as_raw_fd();
        let allocate = |mode: i32, offset: u64, len: u64| {
            // SAFETY: the file is ours.
            unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) as isize }
        };
        // SAFETY: the buffers are valid until this request has ended (contract of `Backend::start`); the file is ours.
        let result = unsafe {
            match work {
                Work::Read { offset, buffers } => {
                    libc::preadv(fd, buffers.0.as_ptr(), buffers.0.len() as i32, *offset as i64)
                }
                Work::Write { offset, buffers, durable } => libc::pwritev2(
                    fd,
                    buffers.0.as_ptr(),
                    buffers.0.len() as i32,
                    *offset as i64,
                    if *durable { libc::RWF_DSYNC } else { 0 },
                ),
                Work::Flush | Work::Settle => libc::fdatasync(fd) as isize,
                Work::Discard { offset, len } => allocate(DISCARD_MODE, *offset, *len),
                Work::Zero { offset, len, unmap } => allocate(zero_mode(*unmap), *offset, *len),
            }
        };
        if result >= 0 {
            result as i64
        } else {
            let error = io::Error::last_os_error();
            -i64::from(error.raw_os_error().unwrap_or(libc::EIO))
        }
    }
}

impl<M: Medium> Backend for Workers<M> {
    fn name(&self) -> &'static str {
        self.shared.medium.name()
    }

    fn completions(&self) -> &EventFd {
        &self.shared.completions
    }

    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()> {
        let work = match io {
            Io::Read { offset, buffers } => Work::Read { offset, buffers: Buffers(buffers.to_vec()) },
            Io::Write { offset, buffers, durable } => {
                Work::Write { offset, buffers: Buffers(buffers.to_vec()), durable }
            }
            Io::Flush => Work::Flush,
            Io::Settle => Work::Settle,
            Io::Discard { offset, len } => Work::Discard { offset, len },
            Io::Zero { offset, len, unmap } => Work::Zero { offset, len, unmap },
        };
        locked(&self.shared.state).jobs.push_back(Job { token, work });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.shared.wake.notify_all();
        Ok(())
    }

    fn cancel(&mut self, tokens: &[Token]) -> io::Result<()> {
        let mut state = locked(&self.shared.state);
        let (back, keep): (VecDeque<Job>, VecDeque<Job>) =
            std::mem::take(&mut state.jobs).into_iter().partition(|job| tokens.contains(&job.token));
        state.jobs = keep;
        state.ended.extend(back.iter().map(|job| Completion { token: job.token, result: -i64::from(libc::ECANCELED) }));
        drop(state);
        if !back.is_empty() {
            let _ = self.shared.completions.write(1);
        }
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let _ = self.shared.completions.read();
        ended.append(&mut locked(&self.shared.state).ended);
    }
}
