//! Storage under a disk, in one thread: what was started is carried out when the engine looks for what has ended, and a script says
//! how: whole, in part, later, taken back, or with an error.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use vmm::devices::block::backend::Backend;
use vmm::devices::block::backend::Completion;
use vmm::devices::block::backend::Io;
use vmm::devices::block::backend::Token;
use vmm::devices::block::worker::Buffers;
use vmm::devices::block::worker::Medium;
use vmm::devices::block::worker::Work;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// What becomes of one request. Any other byte: it is carried out.
mod fate {
    pub const LATER: u8 = 1;
    pub const TAKEN_BACK: u8 = 2;
    pub const IN_PART: u8 = 3;
    pub const AGAIN: u8 = 4;
    pub const FAILS: u8 = 5;
    pub const NO_SPACE: u8 = 6;
    pub const NOT_TAKEN: u8 = 7;
    pub const COUNT: u8 = 16;
}

/// Of all storage of a disk, whichever is open.
#[derive(Default)]
pub struct Script {
    fates: VecDeque<u8>,
}

impl Script {
    pub fn extend(&mut self, fates: &[u8]) {
        self.fates.extend(fates);
    }

    /// From here on everything is carried out.
    pub fn forget(&mut self) {
        self.fates.clear();
    }

    fn next(&mut self) -> u8 {
        self.fates.pop_front().unwrap_or(0) % fate::COUNT
    }
}

pub type SharedScript = Arc<Mutex<Script>>;

pub fn locked(script: &SharedScript) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Storage {
    medium: Arc<dyn Medium>,
    bytes: u64,
    script: SharedScript,
    started: VecDeque<(Token, Work)>,
    ended: Vec<Completion>,
    bell: EventFd,
}

impl Storage {
    /// `bytes` as the guest sees the disk.
    pub fn new(medium: Arc<dyn Medium>, bytes: u64, script: SharedScript) -> Self {
        let bell = EventFd::new(EFD_NONBLOCK).expect("an event descriptor");
        Self { medium, bytes, script, started: VecDeque::new(), ended: Vec::new(), bell }
    }

    fn is_inside(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.bytes)
    }

    fn carry_out(&self, work: Work, fate: u8) -> i64 {
        let half = |mut buffers: Buffers| {
            if let Some(last) = buffers.0.last_mut() {
                last.iov_len /= 2;
            }
            buffers
        };
        let work = match (fate, work) {
            (fate::TAKEN_BACK, _) => return -i64::from(libc::ECANCELED),
            (fate::AGAIN, _) => return -i64::from(libc::EAGAIN),
            (fate::FAILS, _) => return -i64::from(libc::EIO),
            (fate::NO_SPACE, _) => return -i64::from(libc::ENOSPC),
            (fate::IN_PART, Work::Read { offset, buffers }) => Work::Read { offset, buffers: half(buffers) },
            (fate::IN_PART, Work::Write { offset, buffers, durable }) => {
                Work::Write { offset, buffers: half(buffers), durable }
            }
            (_, work) => work,
        };
        self.medium.carry_out(&work)
    }
}

impl Backend for Storage {
    fn name(&self) -> &'static str {
        "a script"
    }

    fn completions(&self) -> &EventFd {
        &self.bell
    }

    unsafe fn start(&mut self, token: Token, io: Io<'_>) -> io::Result<()> {
        if self.script.lock().unwrap_or_else(PoisonError::into_inner).fates.front() == Some(&fate::NOT_TAKEN) {
            locked(&self.script).next();
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = |buffers: &[libc::iovec]| buffers.iter().map(|buffer| buffer.iov_len as u64).sum();
        let list = |buffers: &[libc::iovec]| Buffers(buffers.to_vec());
        let (offset, bytes, work) = match io {
            Io::Read { offset, buffers } => (offset, len(buffers), Work::Read { offset, buffers: list(buffers) }),
            Io::Write { offset, buffers, durable } => {
                (offset, len(buffers), Work::Write { offset, buffers: list(buffers), durable })
            }
            Io::Flush => (0, 0, Work::Flush),
            Io::Settle => (0, 0, Work::Settle),
            Io::Discard { offset, len } => (offset, len, Work::Discard { offset, len }),
            Io::Zero { offset, len, unmap } => (offset, len, Work::Zero { offset, len, unmap }),
        };
        assert!(self.is_inside(offset, bytes), "{bytes} bytes at {offset} of {}", self.bytes);
        self.started.push_back((token, work));
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn cancel(&mut self, tokens: &[Token]) -> io::Result<()> {
        let (back, rest) = std::mem::take(&mut self.started).into_iter().partition(|(token, _)| tokens.contains(token));
        self.started = rest;
        let back: VecDeque<(Token, Work)> = back;
        let result = -i64::from(libc::ECANCELED);
        self.ended.extend(back.into_iter().map(|(token, _)| Completion { token, result }));
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.ended);
        for (token, work) in std::mem::take(&mut self.started) {
            match locked(&self.script).next() {
                fate::LATER => self.started.push_back((token, work)),
                fate => ended.push(Completion { token, result: self.carry_out(work, fate) }),
            }
        }
    }
}

/// A file in memory.
pub fn memory_file(bytes: u64) -> File {
    // SAFETY: the name is a string, and the descriptor is nobody else's.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(bytes).expect("a small file in memory");
    file
}
