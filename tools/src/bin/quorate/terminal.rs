//! The operator's terminal while a guest's console has it.

use std::io;
use std::io::IsTerminal;
use std::io::Read;

use nix::sys::termios;
use nix::sys::termios::SetArg;
use nix::sys::termios::Termios;
use tokio::sync::mpsc;

/// `Ctrl-]`, as telnet and virsh have it.
pub const ESCAPE: u8 = 0x1d;

/// Raw mode of standard input, put back when dropped. A pipe has none and needs none.
pub struct RawMode(Option<Termios>);

impl RawMode {
    pub fn enter() -> io::Result<RawMode> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawMode(None));
        }
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(RawMode(Some(before)))
    }

    pub fn is_terminal(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nothing can be done about a terminal that is gone.
            let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Standard input as it is typed. Its thread blocks in `read` and is left behind when the process ends, which tokio's own
/// standard input would wait for.
pub fn typed() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// What to send of `keys`, and whether the escape was among them. Only a terminal has an escape: a pipe's bytes are data.
pub fn before_escape(keys: &[u8], is_terminal: bool) -> (&[u8], bool) {
    match keys.iter().position(|key| *key == ESCAPE) {
        Some(at) if is_terminal => (&keys[..at], true),
        _ => (keys, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_ends_a_terminals_session_and_is_data_in_a_pipe() {
        assert_eq!(before_escape(b"ls\n", true), (&b"ls\n"[..], false));
        assert_eq!(before_escape(b"ls\x1drm", true), (&b"ls"[..], true));
        assert_eq!(before_escape(b"ls\x1drm", false), (&b"ls\x1drm"[..], false));
    }
}
