//! A guest moves from one process to another of the same kind in this host, over a Unix socket, while it runs.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::pipe::SpliceFlags;
use serde_json::Value;
use serde_json::json;

use super::peer;
use super::peer::EPOCHS;
use super::peer::Peer;
use super::wire;
use super::wire::Wire;

/// For both; the vmm's default.
const DOWNTIME_MS: u64 = 300;
/// QEMU's default is 128 MiB a second, and the vmm's none.
const QEMU_BYTES_PER_SECOND: u64 = 1 << 40;
const QEMU_LOOK_EVERY: Duration = Duration::from_millis(20);
const QEMU_LIMIT: Duration = Duration::from_secs(240);
/// A pipe's usual size.
const PIPE_BYTES: usize = 64 << 10;

pub struct Moved {
    pub total: Duration,
    pub downtime: Duration,
}

/// Both ends are told apart by their directories. Times are those at which the programs' own words arrive here.
pub fn move_guest(peer: Peer, from: &Path, to: &Path) -> Result<Moved> {
    match peer {
        Peer::Vmm => vmm(from, to),
        Peer::Pc | Peer::Q35 | Peer::Microvm => qemu(from, to),
    }
}

fn vmm(from: &Path, to: &Path) -> Result<Moved> {
    let (source, target) = (peer::control(from), peer::control(to));
    let (mut source_wire, mut target_wire) = (Wire::connect(&source)?, Wire::connect(&target)?);
    let notice = |name: &'static str| move |message: &Value| message["notice"] == name;

    let begun = Instant::now();
    let mut into = wire::attach(&target, json!({"method": "restore_attach"}))?;
    let live = json!({"downtime_ms": DOWNTIME_MS});
    let out = wire::attach(&source, json!({"method": "save_attach", "params": {"migration": 1, "live": live}}))?;
    carry(&out, &into).context("carry the guest over")?;
    into.shutdown(Shutdown::Write).context("end the stream")?;
    // The target ends the connection when all is in its place.
    std::io::copy(&mut into, &mut std::io::sink()).context("hear the target")?;
    let marker = peer::started_marker(to, EPOCHS[1]);
    target_wire.ask(json!({"method": "run", "params": {"epoch": EPOCHS[1], "started_marker": marker}}))?;
    let (resumed, _) = target_wire.wait("the guest to go on", notice("resumed"))?;
    let (paused, _) = source_wire.wait("the guest's stop", notice("paused"))?;
    Ok(Moved { total: resumed - begun, downtime: resumed - paused })
}

/// Two processes of QEMU are connected without anybody between them; here the bytes are at least not copied on their way.
fn carry(from: &UnixStream, to: &UnixStream) -> std::io::Result<()> {
    let (out, into) = rustix::pipe::pipe()?;
    loop {
        let mut held = rustix::pipe::splice(from, None, &into, None, PIPE_BYTES, SpliceFlags::empty())?;
        if held == 0 {
            return Ok(());
        }
        while held > 0 {
            held -= rustix::pipe::splice(&out, None, to, None, held, SpliceFlags::empty())?;
        }
    }
}

fn qemu(from: &Path, to: &Path) -> Result<Moved> {
    let (mut source, mut target) = (Wire::connect(&peer::control(from))?, Wire::connect(&peer::control(to))?);
    let event = |name: &'static str| move |message: &Value| message["event"] == name;
    for wire in [&mut source, &mut target] {
        wire.ask(json!({"execute": "qmp_capabilities"}))?;
    }
    let limits = json!({"downtime-limit": DOWNTIME_MS, "max-bandwidth": QEMU_BYTES_PER_SECOND});
    source.ask(json!({"execute": "migrate-set-parameters", "arguments": limits}))?;

    let begun = Instant::now();
    let uri = format!("unix:{}", peer::incoming(to).display());
    source.ask(json!({"execute": "migrate", "arguments": {"uri": uri}}))?;
    until_sent(&mut source, begun)?;
    let (resumed, _) = target.wait("the guest to go on", event("RESUME"))?;
    let (paused, _) = source.wait("the guest's stop", event("STOP"))?;
    Ok(Moved { total: resumed - begun, downtime: resumed - paused })
}

fn until_sent(source: &mut Wire, begun: Instant) -> Result<()> {
    loop {
        let state = source.ask(json!({"execute": "query-migrate"}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => bail!("QEMU gave the migration up: {state}"),
            _ if begun.elapsed() > QEMU_LIMIT => bail!("QEMU did not end the migration: {state}"),
            _ => std::thread::sleep(QEMU_LOOK_EVERY),
        }
    }
}
