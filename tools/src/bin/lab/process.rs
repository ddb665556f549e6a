//! Processes that the lab started, known by pid and start time, so that a pid which another
//! process got later is never signalled.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks since boot, field 22 of /proc/PID/stat.
    pub started: u64,
}

impl ProcessId {
    pub fn of(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).context("a pid out of range")?;
        let stat = Stat::read(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Self { pid, started: stat.started })
    }

    /// Running or stopped; a zombie counts as ended, once no other thread of it is left: until then its taps, locks and sockets
    /// are taken. A killed emulator whose disk hangs dies thread by thread.
    pub fn is_alive(&self) -> bool {
        let known = Stat::read(self.pid).filter(|stat| stat.started == self.started);
        known.is_some_and(|stat| stat.state != 'Z' || threads(self.pid) > 1)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            bail!("process {} has ended", self.pid);
        }
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("send {signal} to process {}", self.pid))
    }

    /// Kills and waits for the end; answers at once when it has ended before.
    pub fn end(&self) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        self.signal(Signal::SIGKILL)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!("process {} does not end", self.pid);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

struct Stat {
    state: char,
    started: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }
}

fn threads(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// The name in parentheses may hold spaces and parentheses, so fields count from the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some(Stat { state, started: fields.nth(18)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 4242 99 1";
        let stat = parse_stat(text).expect("a stat line");
        assert_eq!((stat.state, stat.started), ('S', 4242));
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_lives_on() {
        // The thread outlives the first one by a pipe's end that this process holds.
        let script = "import ctypes,sys,threading\nthreading.Thread(target=sys.stdin.read).start()\nctypes.CDLL(None).pthread_exit(None)";
        let mut python = std::process::Command::new("python3");
        let spawned = python.args(["-c", script]).stdin(std::process::Stdio::piped()).spawn();
        let mut child = spawned.expect("python3, which Debian has");
        let process = ProcessId::of(child.id()).expect("it runs");
        let deadline = Instant::now() + Duration::from_secs(20);
        while Stat::read(process.pid).is_some_and(|stat| stat.state != 'Z') {
            assert!(Instant::now() < deadline, "its first thread does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(process.is_alive(), "a thread of it lives");
        drop(child.stdin.take());
        while process.is_alive() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait().expect("it has ended");
    }

    #[test]
    fn a_pid_that_was_given_to_another_is_not_ours() {
        let me = ProcessId::of(std::process::id()).expect("this process runs");
        assert!(me.is_alive());
        assert!(!ProcessId { started: me.started + 1, ..me }.is_alive());
    }
}
