//! The lease thread: takes a guest's I/O back when its lease is over, and opens its disks when it is confirmed again.
//!
//! It does nothing else, so that nothing can keep it: no logging to disk, no socket. A disk's close and reopen may hang on dead
//! storage; then the guest stays stopped and is not reported as quiesced, and the host's watchdog decides (DESIGN §5).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::quiesce::Quiesce;
use super::{Lease, LeaseChange, Phase};
use crate::cpu::gate::Stop;
use crate::sandbox::Role;
use crate::sys::raise_priority;

/// hostd counts 5 s from the deadline; the first attempt leaves it one.
const FIRST_DRAIN: Duration = Duration::from_secs(4);
const NEXT_DRAIN: Duration = Duration::from_secs(1);
/// A vCPU leaves the guest in microseconds once kicked.
const PARK: Duration = Duration::from_secs(2);
/// Between attempts, and while a submission that began before the gate closed ends.
const PAUSE: Duration = Duration::from_millis(1);
const RETRY: Duration = Duration::from_millis(200);

/// Starts the thread. It ends after [`Lease::end`].
pub fn start(lease: Arc<Lease>) -> std::io::Result<JoinHandle<()>> {
    Role::Lease.spawn("", move || {
        if let Err(error) = raise_priority() {
            tracing::debug!(%error, "the lease thread has ordinary priority");
        }
        run(&lease);
    })
}

fn run(lease: &Lease) {
    let mut attempts = 0;
    loop {
        let (phase, ended) = {
            let state = lease.state();
            (state.phase, state.ended)
        };
        if ended {
            return;
        }
        match phase {
            Phase::Valid if lease.is_over() => {
                attempts = 0;
                lease.expire();
            }
            Phase::Valid | Phase::Quiesced => wait(lease, PollTimeout::NONE),
            Phase::Expired => {
                let budget = if attempts == 0 { FIRST_DRAIN } else { NEXT_DRAIN };
                if !lease.quiesce(Instant::now() + budget, attempts == 0) {
                    attempts += 1;
                    let retry = PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::MAX);
                    wait(lease, retry);
                }
            }
            Phase::Reviving => {
                attempts = 0;
                if !lease.revive() {
                    wait(lease, PollTimeout::NONE);
                }
            }
        }
    }
}

/// Until the bell rings or the deadline passes.
fn wait(lease: &Lease, timeout: PollTimeout) {
    let mut fds =
        [PollFd::new(lease.bell.as_fd(), PollFlags::POLLIN), PollFd::new(lease.timer.as_fd(), PollFlags::POLLIN)];
    // An interrupted wait is a short one: the loop looks at the state again.
    let _ = poll(&mut fds, timeout);
    lease.bell.clear();
    // A timer that fired stays readable until it is read or armed again.
    let _ = rustix::io::read(&lease.timer, &mut [0; 8]);
}

impl Lease {
    /// One attempt. True when the phase is `Quiesced` or is no longer `Expired`.
    fn quiesce(&self, until: Instant, first: bool) -> bool {
        let (disks, generation) = {
            let state = self.state();
            (state.disks.clone(), state.generation)
        };
        if let Err(why) = self.drain(&disks, until) {
            self.counters.drain_failures.add(1);
            if first {
                tracing::error!(why, "the lease is over and I/O is still under way: not quiesced");
            }
            return self.phase() != Phase::Expired;
        }
        for disk in &disks {
            disk.close();
        }
        {
            let mut state = self.state();
            if state.phase != Phase::Expired || state.generation != generation {
                // Confirmed meanwhile, or the machine was replaced: look again.
                return true;
            }
            state.phase = Phase::Quiesced;
        }
        (self.listener)(LeaseChange::Quiesced);
        true
    }

    fn drain(&self, disks: &[Arc<dyn Quiesce>], until: Instant) -> Result<(), String> {
        if !self.gate.wait_parked(until.min(Instant::now() + PARK)) {
            return Err("a vCPU has not stopped".to_owned());
        }
        while self.disk_gate.submitters() > 0 {
            if Instant::now() >= until {
                return Err("a thread hangs while it submits I/O".to_owned());
            }
            std::thread::sleep(PAUSE);
        }
        for disk in disks {
            disk.cancel_and_drain(until).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Opens the disks and lets the guest run. When a disk does not open, all are closed again and the next confirmation tries anew.
    /// False when there is nothing to do before files are handed over or the lease ends.
    fn revive(&self) -> bool {
        let disks = self.state().disks.clone();
        let waiting: Vec<_> = disks.iter().filter(|disk| !disk.has_file()).collect();
        if !waiting.is_empty() {
            waiting.iter().for_each(|disk| disk.want_file());
            let mut state = self.state();
            let is_over = self.is_over() && state.phase == Phase::Reviving;
            if is_over {
                state.phase = Phase::Expired;
            }
            return is_over;
        }
        for disk in &disks {
            if let Err(error) = disk.reopen() {
                tracing::error!(%error, "the lease is confirmed, but the guest stays stopped");
                let mut state = self.state();
                if state.phase == Phase::Reviving {
                    // What did open is closed again by the next attempt to quiesce.
                    state.phase = Phase::Expired;
                }
                return true;
            }
        }
        {
            let mut state = self.state();
            if state.phase != Phase::Reviving {
                return true;
            }
            if self.is_over() {
                state.phase = Phase::Expired;
                return true;
            }
            state.phase = Phase::Valid;
            self.disk_gate.open();
            self.gate.open(Stop::Lease);
        }
        self.counters.resumed.add(1);
        (self.listener)(LeaseChange::Resumed);
        true
    }
}
