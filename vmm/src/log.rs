//! The log of a vmm process: lines of JSON on stderr, written by a thread of their own. A reader that does not read, or a disk that
//! hangs, costs lines and never the time of a vCPU.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use vmm_control::LogLevel;

use crate::sandbox::Role;

const QUEUE_LINES: usize = 1024;
const FLUSH: Duration = Duration::from_millis(500);

enum Item {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

static LOST_LINES: AtomicU64 = AtomicU64::new(0);
static QUEUE: OnceLock<SyncSender<Item>> = OnceLock::new();

/// Lines that wait for their writer.
pub struct Waiting(Receiver<Item>);

/// Starts logging, without a thread yet. Called once.
pub fn start(level: LogLevel) -> io::Result<Waiting> {
    let (sender, receiver) = sync_channel(QUEUE_LINES);
    let _ = QUEUE.set(sender);
    // Not an `EnvFilter`: for the sake of patterns that nobody writes here, each vmm would carry and set up a regex engine.
    let subscriber = tracing_subscriber::fmt().json().with_max_level(most(level)).with_writer(ToQueue);
    subscriber.try_init().map_err(io::Error::other)?;
    Ok(Waiting(receiver))
}

fn most(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

impl Waiting {
    /// Writes what was said so far and what will be.
    pub fn write(self) -> io::Result<()> {
        Role::Log.spawn("", move || write_lines(&self.0)).map(drop)
    }
}

/// Lines that were dropped because the log did not keep up.
pub fn lost_lines() -> u64 {
    LOST_LINES.load(Ordering::Relaxed)
}

/// Waits until the lines so far are written, for a short time.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        let (done, is_done) = sync_channel(1);
        if queue.try_send(Item::Flush(done)).is_ok() {
            let _ = is_done.recv_timeout(FLUSH);
        }
    }
}

fn write_lines(queue: &Receiver<Item>) {
    while let Ok(item) = queue.recv() {
        match item {
            // Nobody is left to tell that stderr cannot be written.
            Item::Line(line) => drop(io::stderr().write_all(&line)),
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

struct ToQueue;

/// One line on its way.
struct Line(Vec<u8>);

impl<'a> MakeWriter<'a> for ToQueue {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let line = std::mem::take(&mut self.0);
        let sent = QUEUE.get().map(|q| q.try_send(Item::Line(line)));
        if !matches!(sent, Some(Ok(()))) {
            LOST_LINES.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_configuration() {
        for level in [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace] {
            assert_eq!(most(level).to_string(), level.as_str());
        }
    }
}
