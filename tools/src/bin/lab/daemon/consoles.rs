//! Collects the lines of guests' consoles: in each host `lab in-host consoles` sends them through
//! a virtio port, here they get the lab's clock and go to the host's console witness.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;

use crate::clock;
use crate::state::HostId;
use crate::witness::{ConsoleRecord, Witness};

/// The sender cuts lines below this; a guest can make no line that grows without end here.
const MAX_LINE: u64 = 16 << 10;
const CONNECT_ATTEMPTS: u32 = 100;

/// Reads until the emulator ends. The socket appears shortly after the emulator started.
pub async fn collect(host: HostId, socket: PathBuf, witness: Arc<Witness>) {
    let Some(stream) = connect(&socket).await else {
        tracing::error!(%host, "no console port: guests' lines of this host are not recorded");
        return;
    };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let t_ns = clock::now_ns();
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\r', '\n']);
        let (vm, line) = text.split_once('\t').unwrap_or(("", text));
        witness.record(&ConsoleRecord { t_ns, host: host.0, vm, line });
    }
}

async fn connect(socket: &PathBuf) -> Option<UnixStream> {
    for _ in 0..CONNECT_ATTEMPTS {
        if let Ok(stream) = UnixStream::connect(socket).await {
            return Some(stream);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}
