//! The host's watchdog (optional): armed with nowayout, fed while every `lease` guest obeys its deadline (DESIGN §5, *Self-fence*).
//!
//! A guest that is not quiesced 5 s after its deadline, or a hostd that hangs, ends the feeding; the device then resets the host.
//! Armed, it stays armed: stopping hostd for longer than its timeout resets the host too.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use statemachine::state::ReleaseClass;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::agent::GuestView;
use crate::agent::plan::Phase;
use crate::lease::clock::Boottime;

/// Time that a guest has from its deadline to be quiet.
const QUIESCE_MS: u64 = 5_000;
/// The timeout that evidence by lease counts with (DESIGN §5: 12 + 5 + 10 + 2 s).
const TIMEOUT_S: i32 = 10;
const FEED_EVERY: Duration = Duration::from_secs(1);

nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);

#[derive(Debug, Error)]
pub enum WatchdogError {
    #[error("cannot arm the watchdog {path}: {source}; name another device in hostd.toml, or remove [watchdog]")]
    Arm {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the watchdog {path} takes a timeout of {got} s, {TIMEOUT_S} s is needed; use another device (i6300esb, iTCO, softdog)"
    )]
    Timeout { path: PathBuf, got: i32 },
}

/// An armed watchdog. Dropping it does not disarm it.
#[derive(Debug)]
pub struct Watchdog {
    device: File,
    path: PathBuf,
}

impl Watchdog {
    /// Opens the device, which arms it, and sets its timeout.
    pub fn arm(path: &Path) -> Result<Watchdog, WatchdogError> {
        let arm = |source| WatchdogError::Arm { path: path.to_owned(), source };
        let device = OpenOptions::new().write(true).open(path).map_err(arm)?;
        let mut timeout: libc::c_int = TIMEOUT_S;
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which lives here.
        unsafe { set_timeout(device.as_raw_fd(), &mut timeout) }.map_err(|errno| arm(errno.into()))?;
        if timeout != TIMEOUT_S {
            return Err(WatchdogError::Timeout { path: path.to_owned(), got: timeout });
        }
        Ok(Watchdog { device, path: path.to_owned() })
    }

    pub fn timeout_ms(&self) -> u32 {
        TIMEOUT_S as u32 * 1000
    }

    /// Feeds it until shutdown, or until a guest disobeys.
    pub fn spawn(self, guests: watch::Receiver<Arc<Vec<GuestView>>>) -> CancellationToken {
        let shutdown = CancellationToken::new();
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(self.feed(guests)));
        shutdown
    }

    async fn feed(mut self, guests: watch::Receiver<Arc<Vec<GuestView>>>) {
        let mut every = tokio::time::interval(FEED_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut starving = false;
        loop {
            every.tick().await;
            let disobeys = disobedient(&guests.borrow(), Boottime::now()).cloned();
            match disobeys {
                Some(guest) => {
                    if !std::mem::replace(&mut starving, true) {
                        tracing::error!(
                            vm = %guest.vm, epoch = %guest.epoch,
                            "the guest is not quiet after its lease ended; the watchdog is not fed and resets this host"
                        );
                    }
                }
                None => {
                    starving = false;
                    if let Err(error) = self.device.write_all(b"\n") {
                        tracing::error!(path = %self.path.display(), "the watchdog cannot be fed: {error}");
                    }
                }
            }
        }
    }
}

/// A `lease` guest that should be quiet by now and is not known to be.
pub fn disobedient(guests: &[GuestView], now: Boottime) -> Option<&GuestView> {
    guests.iter().find(|guest| {
        let quiet = match guest.phase {
            Phase::Gone(_) | Phase::Incoming { .. } => true,
            Phase::Alive { quiesced, .. } => quiesced,
            Phase::Launching => false,
        };
        let overdue = guest.deadline.is_some_and(|deadline| now >= deadline.plus_ms(QUIESCE_MS));
        guest.release == ReleaseClass::Lease && overdue && !quiet
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use statemachine::ids::Epoch;
    use statemachine::ids::VmId;
    use statemachine::state::GuestStatus;

    fn guest(release: ReleaseClass, quiesced: bool) -> GuestView {
        GuestView {
            vm: VmId::default(),
            epoch: Epoch(1),
            release,
            phase: Phase::Alive { status: GuestStatus::Up, quiesced },
            deadline: Some(Boottime::from_ms(10_000)),
            pid: None,
            overhead_bytes: None,
            incoming: None,
        }
    }

    #[test]
    fn a_lease_guest_that_is_not_quiet_five_seconds_after_its_deadline_starves_the_watchdog() {
        let disobeys = |guest: GuestView, ms| disobedient(&[guest], Boottime::from_ms(ms)).is_some();
        assert!(!disobeys(guest(ReleaseClass::Lease, false), 14_999));
        assert!(disobeys(guest(ReleaseClass::Lease, false), 15_000));
        assert!(!disobeys(guest(ReleaseClass::Lease, true), 60_000), "paused is what it should be");
        assert!(!disobeys(guest(ReleaseClass::Operator, false), 60_000), "it stops for nobody");
        let launching = GuestView { phase: Phase::Launching, ..guest(ReleaseClass::Lease, false) };
        assert!(disobeys(launching, 15_000), "a vmm that never answered is not known to be quiet");
    }
}
