//! `console.log`: written by a thread of its own, so that a log disk that hangs costs log lines and never the guest's time.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use super::{ConsoleError, LOG_ROTATE_BYTES, Shared, locked};
use crate::sandbox::Role;

pub(super) struct LogThread {
    thread: JoinHandle<()>,
}

impl LogThread {
    pub(super) fn start(path: &Path, shared: Arc<Shared>) -> Result<Self, ConsoleError> {
        let mut file = LogFile::open(path).map_err(|source| ConsoleError::OpenLog { path: path.to_owned(), source })?;
        let thread = Role::ConsoleLog
            .spawn("", move || {
                while let Some((bytes, lost)) = next_log_batch(&shared) {
                    if let Err(error) = file.append(&bytes, lost) {
                        tracing::warn!(path = %file.path.display(), %error, "cannot write the console log");
                    }
                }
            })
            .map_err(ConsoleError::LogThread)?;
        Ok(Self { thread })
    }

    pub(super) fn finish(self, shared: &Shared) {
        locked(&shared.log).closing = true;
        shared.log_wake.notify_one();
        // The buffer is bounded, so the rest is written soon; a hung disk is the only exception, and the process
        // is about to end then, with or without this thread.
        if self.thread.join().is_err() {
            tracing::warn!("the console log's thread ended badly");
        }
    }
}

fn next_log_batch(shared: &Shared) -> Option<(VecDeque<u8>, u64)> {
    let mut log = locked(&shared.log);
    loop {
        if !log.bytes.is_empty() || log.lost > 0 {
            return Some((std::mem::take(&mut log.bytes), std::mem::take(&mut log.lost)));
        }
        if log.closing {
            return None;
        }
        log = shared.log_wake.wait(log).unwrap_or_else(PoisonError::into_inner);
    }
}

struct LogFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl LogFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    fn append(&mut self, bytes: &VecDeque<u8>, lost: u64) -> io::Result<()> {
        if lost > 0 {
            self.write(format!("\r\n[{lost} bytes of console output lost: slow log]\r\n").as_bytes())?;
        }
        let (first, second) = bytes.as_slices();
        self.write(first)?;
        self.write(second)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len + bytes.len() as u64 > LOG_ROTATE_BYTES && self.len > 0 {
            self.rotate()?;
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        *self = Self::open(&self.path)?;
        Ok(())
    }
}
