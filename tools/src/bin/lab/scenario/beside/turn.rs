//! One turn, inside the host: a guest is started under one of the programs, measured from all sides, moved, and ended.

use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::ensure;

use super::console::Keyboard;
use super::console::Log;
use super::console::finished;
use super::figures::Figures;
use super::figures::Measure;
use super::guest;
use super::guest::PROGRAM_AT_MIB;
use super::moving::move_guest;
use super::peer::Order;
use super::peer::Peer;
use super::peer::RAM_MIB;
use super::place::Disk;
use super::place::Tap;
use crate::scenario::memory::BeyondRam;
use crate::scenario::memory::beyond_ram;

/// In memory, as is all that a turn leaves behind.
pub const DIRECTORY: &str = "/run/beside";
/// For each pattern of requests, and for the network.
const SECONDS: u64 = 3;
/// The guest counts once a second: by then it has come to rest.
const AT_REST: &str = " n=15 ";
const DOOR: &str = "10.77.0.1:9000";

#[derive(Debug, clap::Args)]
pub struct TurnOptions {
    #[arg(long, value_enum)]
    peer: Peer,
    #[arg(long)]
    vcpus: u32,
}

/// A running program. It ends when dropped.
struct Running {
    child: Child,
    started: Instant,
}

impl Running {
    fn start(peer: Peer, order: &Order<'_>) -> Result<Running> {
        std::fs::create_dir_all(order.directory).context("make the program's directory")?;
        let mut command: Command = peer.command(order)?;
        let said = File::create(order.directory.join("said")).context("keep what the program says")?;
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Running { child, started })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes a turn; its figures as JSON.
pub fn take(options: &TurnOptions) -> Result<String> {
    let directory = Path::new(DIRECTORY);
    let taken = measured(options, directory);
    let said = |name: &str| std::fs::read_to_string(directory.join(name).join("said")).unwrap_or_default();
    let figures = taken.with_context(|| format!("{:?}: {}{}", options.peer, said("first"), said("second")))?;
    Ok(serde_json::to_string(&figures)?)
}

fn memory_of(pid: u32) -> Result<BeyondRam> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    beyond_ram(&smaps, RAM_MIB)
}

fn measured(options: &TurnOptions, directory: &Path) -> Result<Figures> {
    let TurnOptions { peer, vcpus } = *options;
    let (first, second) = (directory.join("first"), directory.join("second"));
    std::fs::create_dir_all(directory).context("make the turn's directory")?;
    let disk = Disk::make(directory)?;
    let mut figures = Figures::new();

    let tap = Tap::plug()?;
    let order = |directory, tap: &Tap, incoming| {
        anyhow::Ok(Order { vcpus, directory, disk: &disk.device, tap: tap.hand_over()?, incoming })
    };
    let mut source = Running::start(peer, &order(&first, &tap, false)?)?;
    drop(tap);
    let mut log = Log::of(&first);
    let (up, _) = log.until("quorate-guest up", &mut source.child)?;
    figures.insert(Measure::InitS, (up - source.started).as_secs_f64());

    log.until(AT_REST, &mut source.child)?;
    let beyond = memory_of(source.child.id())?;
    figures.insert(Measure::PssMib, beyond.pss_mib());
    figures.insert(Measure::PrivateMib, beyond.private_kib as f64 / 1024.0);

    let mut keyboard = Keyboard::of(peer, &first)?;
    let unpack =
        format!("dd if=/dev/vda bs=1M skip={PROGRAM_AT_MIB} count={} iflag=direct | tar -x -C /", disk.program_mib);
    keyboard.type_line(&unpack)?;
    finished(&mut log, &mut source.child)?;
    keyboard.type_line(&format!("/usr/bin/lab in-guest blocks --device /dev/vda --seconds {SECONDS}"))?;
    figures.extend(guest::figures_in(&finished(&mut log, &mut source.child)?)?);

    let receiver = receive()?;
    keyboard.type_line(&format!("/usr/bin/lab in-guest send --to {DOOR} --seconds {SECONDS}"))?;
    let said = finished(&mut log, &mut source.child)?;
    ensure!(said.contains("sent"), "the guest sent nothing: {said}");
    let rate = receiver.join().map_err(|_| anyhow!("the receiver broke"))??;
    figures.insert(Measure::NetworkMibS, rate);

    let tap = Tap::plug()?;
    let mut target = Running::start(peer, &order(&second, &tap, true)?)?;
    drop(tap);
    let moved = move_guest(peer, &first, &second)?;
    figures.insert(Measure::MigrationS, moved.total.as_secs_f64());
    figures.insert(Measure::DowntimeMs, moved.downtime.as_secs_f64() * 1000.0);
    // It counts on there, or it was not moved.
    Log::of(&second).until("counter boot=", &mut target.child)?;
    Ok(figures)
}

/// Takes one connection, and what it brings; MiB a second from its first byte to its end.
fn receive() -> Result<JoinHandle<Result<f64>>> {
    let listener = TcpListener::bind(DOOR).with_context(|| format!("listen on {DOOR}"))?;
    Ok(std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().context("hear the guest")?;
        let mut buffer = vec![0; 256 << 10];
        let (begun, mut bytes) = (Instant::now(), 0);
        loop {
            match stream.read(&mut buffer).context("read from the guest")? {
                0 => return Ok(bytes as f64 / f64::from(1 << 20) / begun.elapsed().as_secs_f64()),
                count => bytes += count,
            }
        }
    }))
}
