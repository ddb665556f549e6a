//! Bringing a lab up and down: what happens outside the daemon, so that it also works when the
//! daemon crashed.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::control::{self, Request};
use crate::machine::EMULATOR;
use crate::nbd::ROOT_DISK;
use crate::paths::LabDir;
use crate::process::ProcessId;
use crate::state::{LabConfig, LabState};
use crate::{image, net};

/// Where cargo put our binaries: beside this one.
pub fn own_directory() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    Ok(me.parent().context("this program has no directory")?.to_owned())
}

/// Builds images, makes the network, starts the daemon and has it start the hosts.
pub async fn up(dir: &LabDir, config: LabConfig, binaries: &Path, with_qemu: bool, timeout_s: u64) -> Result<()> {
    if let Some(state) = LabState::load(dir)? {
        if state.daemon.is_some_and(|daemon| daemon.is_alive()) {
            bail!("a lab is up in {} already: `lab status`, or `lab down` first", dir.root().display());
        }
        down(dir, true)?;
    }
    for directory in [dir.root().to_owned(), dir.logs(), dir.sockets(), dir.disks()] {
        std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    }
    remove_witnesses(dir)?;
    let start = Instant::now();
    let mut say = |line: &str| println!("[{:5.1} s] {line}", start.elapsed().as_secs_f64());
    let images = image::build(dir, binaries, with_qemu, &mut say)?;
    image::lay_root_disk(&images, &dir.shared_disk(ROOT_DISK))?;
    let state = LabState::new(config.clone());
    state.save(dir)?;
    net::create(&config)?;
    start_daemon(dir).await?;
    say(&format!("starting {} hosts, accelerator {:?}", config.hosts, config.accelerator).to_lowercase());
    control::ask(&dir.control_socket(), &Request::Up { timeout_s }, &mut say).await?;
    say("lab is up");
    Ok(())
}

async fn start_daemon(dir: &LabDir) -> Result<()> {
    let path = dir.daemon_log();
    let log = OpenOptions::new().create(true).append(true).open(&path).context("open the daemon's log")?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.arg("--dir").arg(dir.root()).arg("serve");
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Its own group: an interrupt at the terminal ends `lab up`, not the lab.
    command.process_group(0);
    let mut child = command.spawn().context("start the lab's daemon")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = control::ask(&dir.control_socket(), &Request::Hello, &mut |_| {}).await {
        if let Some(status) = child.try_wait()? {
            bail!("the lab's daemon ended with {status}: see {}", path.display());
        }
        if Instant::now() > deadline {
            return Err(error.context(format!("the lab's daemon does not answer: see {}", path.display())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Ends everything of the lab. Images, downloads and logs stay; disks too when asked.
pub fn down(dir: &LabDir, keep_disks: bool) -> Result<()> {
    let Some(state) = LabState::load(dir)? else { return Ok(()) };
    if let Some(daemon) = state.daemon {
        daemon.end().context("end the lab's daemon")?;
    }
    // What the daemon did until its end is in the file, not in what was read before.
    let state = LabState::load(dir)?.unwrap_or(state);
    for host in &state.hosts {
        if let Some(qemu) = host.qemu {
            qemu.end().with_context(|| format!("end the emulator of {}", host.id))?;
        }
    }
    for stray in emulators_in(&state.config.netns)? {
        stray.end()?;
    }
    net::remove(&state.config.netns)?;
    remove_if_there(&dir.sockets())?;
    if !keep_disks {
        remove_if_there(&dir.disks())?;
    }
    std::fs::remove_file(dir.state()).context("remove state.json")
}

/// Emulators in the lab's namespace that state.json does not know: the daemon crashed between
/// starting one and saying so.
fn emulators_in(netns: &str) -> Result<Vec<ProcessId>> {
    let output = Command::new("ip").args(["netns", "pids", netns]).output().context("run ip netns pids")?;
    let pids = String::from_utf8_lossy(&output.stdout);
    let is_emulator = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).next().is_some_and(|program| program.ends_with(EMULATOR.as_bytes()))
    };
    Ok(pids
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .filter(is_emulator)
        .filter_map(|pid| ProcessId::of(pid).ok())
        .collect())
}

fn remove_if_there(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// A witness speaks of one life of a lab.
fn remove_witnesses(dir: &LabDir) -> Result<()> {
    for entry in std::fs::read_dir(dir.root())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_witness = name.ends_with(".jsonl") && (name.starts_with("witness-") || name.starts_with("console-"));
        if is_witness {
            std::fs::remove_file(entry.path()).with_context(|| format!("remove {name}"))?;
        }
    }
    for entry in std::fs::read_dir(dir.logs())? {
        std::fs::remove_file(entry?.path()).context("remove the logs of the lab before")?;
    }
    Ok(())
}
