//! Witness files: JSON lines appended by the daemon, one record each, stamped with the lab's
//! clock. Written at once and unbuffered: a reader sees a record as soon as it is made.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde::Serialize;

pub struct Witness {
    file: Mutex<File>,
}

/// A write that reached a shared export.
#[derive(Debug, Serialize)]
pub struct WriteRecord<'a> {
    pub t_ns: u64,
    pub host: u8,
    pub export: &'a str,
    pub offset: u64,
    pub length: usize,
    /// The first bytes as text, up to the first zero; `.` stands for what is not printable.
    pub head: String,
}

/// A line of a guest's console, as it left its host.
#[derive(Debug, Serialize)]
pub struct ConsoleRecord<'a> {
    pub t_ns: u64,
    pub host: u8,
    /// Name of the guest's directory below /run/quorate/vm.
    pub vm: &'a str,
    pub line: &'a str,
}

/// What the lab did to a host, among the records of what the host did.
#[derive(Debug, Serialize)]
pub struct EventRecord<'a> {
    pub t_ns: u64,
    pub host: u8,
    pub event: &'a str,
}

impl Witness {
    pub fn append_to(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        Ok(Self { file: Mutex::new(file) })
    }

    /// Failing to record must not fail what is recorded; the daemon's log says so instead.
    pub fn record(&self, record: &impl Serialize) {
        let line = match serde_json::to_vec(record) {
            Ok(mut line) => {
                line.push(b'\n');
                line
            }
            Err(error) => return tracing::error!(%error, "cannot encode a witness record"),
        };
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = file.write_all(&line) {
            tracing::error!(%error, "cannot append to a witness file");
        }
    }
}

/// How much of a write the witness keeps.
const HEAD_BYTES: usize = 64;

pub fn head_text(data: &[u8]) -> String {
    data.iter()
        .take(HEAD_BYTES)
        .take_while(|byte| **byte != 0)
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { *byte as char } else { '.' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_a_write_is_printable_and_short() {
        assert_eq!(head_text(b"epoch=7 n=3\n\0\0junk"), "epoch=7 n=3.");
        assert_eq!(head_text(&[0xff; 100]).len(), HEAD_BYTES);
    }
}
