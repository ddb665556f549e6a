//! `lab console`: the terminal on a host's serial line.

use std::io::{IsTerminal, stdin};

use anyhow::{Context, Result};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::paths::LabDir;
use crate::state::HostId;

/// Ctrl-], as in telnet.
const LEAVE: u8 = 0x1d;

pub async fn attach(dir: &LabDir, host: HostId) -> Result<()> {
    let stream = UnixStream::connect(dir.host_socket(host, "serial"))
        .await
        .with_context(|| format!("connect to the serial line of {host}: is it on? (`lab status`)"))?;
    let raw = RawTerminal::enter()?;
    if raw.is_some() {
        eprint!("serial line of {host}; leave with Ctrl-]\r\n");
    }
    let (mut from_host, mut to_host) = stream.into_split();
    let typed = async {
        let (mut input, mut buffer) = (tokio::io::stdin(), [0; 1024]);
        loop {
            let count = input.read(&mut buffer).await?;
            let bytes = &buffer[..count];
            let end = bytes.iter().position(|byte| raw.is_some() && *byte == LEAVE);
            to_host.write_all(&bytes[..end.unwrap_or(count)]).await?;
            if end.is_some() {
                return Ok(());
            }
            if count == 0 {
                // Input from a pipe ended: what the host still says is shown until it is off.
                return std::future::pending::<std::io::Result<()>>().await;
            }
        }
    };
    let shown = async {
        let (mut output, mut buffer) = (tokio::io::stdout(), [0; 4096]);
        loop {
            let count = from_host.read(&mut buffer).await?;
            if count == 0 {
                return Ok::<_, std::io::Error>(());
            }
            output.write_all(&buffer[..count]).await?;
            output.flush().await?;
        }
    };
    tokio::select! {
        result = typed => result?,
        result = shown => result?,
    }
    Ok(())
}

/// The terminal passes every key on; as it was before when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin()).context("read the terminal's mode")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin(), SetArg::TCSANOW, &raw).context("set the terminal's mode")?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that went away.
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &self.before);
    }
}
