//! A process that ends with its owner.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;

pub struct Process(Child);

impl Process {
    /// Starts it, with its output in a file.
    pub fn start(mut command: Command, log: &Path) -> anyhow::Result<Process> {
        let log = OpenOptions::new().create(true).append(true).open(log).context("open a log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("start {program}: is it installed and built?"))?;
        Ok(Process(child))
    }

    /// SIGKILL, and wait for its end.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

/// Resident memory of a process.
pub fn resident_mib(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
