//! A guest's console from beside it: the log that its program writes, and lines typed on its serial line.

use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde_json::json;

use super::peer;
use super::peer::Peer;
use super::wire;

/// The time of a line is known this well.
const LOOK_EVERY: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(120);

/// Typed as two words, so that only the answer is one.
const TYPED_END: &str = "all-''done";
const END: &str = "all-done";

/// Reads a console's log from its beginning or from where it was read up to.
pub struct Log {
    path: PathBuf,
    /// Bytes that were looked at.
    read: usize,
}

impl Log {
    pub fn of(directory: &Path) -> Self {
        Self { path: peer::console_log(directory), read: 0 }
    }

    /// Waits until the log holds `text` behind what was read; what came up to it and in its line, and when it was seen.
    pub fn until(&mut self, text: &str, child: &mut Child) -> Result<(Instant, String)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let bytes = std::fs::read(&self.path).unwrap_or_default();
            let at = Instant::now();
            let new = String::from_utf8_lossy(bytes.get(self.read..).unwrap_or_default()).into_owned();
            if let Some(whole) = up_to(&new, text) {
                self.read += whole.len();
                return Ok((at, whole.to_owned()));
            }
            if let Some(status) = child.try_wait().context("look after the program")? {
                bail!("the program ended ({status}) before its guest said {text:?}; the last that it said: {new}");
            }
            if at > deadline {
                bail!("the guest did not say {text:?} in {} s; the last that it said: {new}", PATIENCE.as_secs());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The text up to the end of the line that holds `wanted`, once that line has ended.
fn up_to<'a>(text: &'a str, wanted: &str) -> Option<&'a str> {
    let at = text.find(wanted)?;
    let end = at + text[at..].find('\n')?;
    text.get(..=end)
}

/// The serial line of a guest, for typing. What the guest says is read and dropped, as it is in the log: a program waits for a
/// console that does not read.
pub struct Keyboard {
    stream: UnixStream,
}

impl Keyboard {
    pub fn of(peer: Peer, directory: &Path) -> Result<Self> {
        let stream = match peer {
            Peer::Vmm => wire::attach(&peer::control(directory), json!({"method": "console_attach"}))?,
            Peer::Pc | Peer::Q35 | Peer::Microvm => wire::connect(&peer::serial(directory))?,
        };
        stream.set_read_timeout(None)?;
        let mut said = stream.try_clone().context("duplicate a console")?;
        std::thread::spawn(move || {
            let mut dropped = [0; 4096];
            while said.read(&mut dropped).is_ok_and(|count| count > 0) {}
        });
        Ok(Self { stream })
    }

    /// Has the guest's shell do a line. It has ended when [`finished`] finds its end.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let typed = format!("sh {line}; echo {TYPED_END}\n");
        self.stream.write_all(typed.as_bytes()).context("type on the guest's console")
    }
}

/// What a typed line said.
pub fn finished(log: &mut Log, child: &mut Child) -> Result<String> {
    Ok(log.until(END, child)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_when_it_is_whole() {
        assert_eq!(up_to("boot\nquorate-gu", "quorate-guest up"), None);
        assert_eq!(up_to("boot\nquorate-guest up ker", "quorate-guest up"), None);
        assert_eq!(up_to("boot\nup n=1\r\nmore\n", "up "), Some("boot\nup n=1\r\n"));
    }

    #[test]
    fn the_echo_of_what_was_typed_is_not_its_answer() {
        assert_eq!(up_to(&format!("sh true; echo {TYPED_END}\n"), END), None);
    }
}
