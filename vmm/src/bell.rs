//! Wakes a thread that polls: an event descriptor that is rung and cleared.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::event::{EventfdFlags, eventfd};

#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(0, flags)?))
    }

    /// Never blocks. A counter that is full is rung already.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets all rings so far.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Sleeps until it is rung, at most so long, and forgets the rings. A signal ends the wait too.
    pub fn wait(&self, at_most: Option<Duration>) {
        let timeout = at_most.map_or(PollTimeout::NONE, poll_timeout);
        let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout);
        self.clear();
    }
}

/// At least as long as asked: a wait that is cut to whole milliseconds would end before its time and start again.
pub fn poll_timeout(wait: Duration) -> PollTimeout {
    let millis = wait.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis).ok().and_then(|millis| PollTimeout::try_from(millis).ok()).unwrap_or(PollTimeout::MAX)
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_wait_ends_by_the_bell_or_in_its_time() {
        let bell = Bell::new().unwrap();
        bell.ring();
        bell.wait(None);
        let start = Instant::now();
        bell.wait(Some(Duration::from_micros(2_500)));
        assert!(start.elapsed() >= Duration::from_micros(2_500), "the ring was forgotten, and no time is cut off");
    }

    #[test]
    fn waits_are_whole_milliseconds_and_never_shorter() {
        for (wait, millis) in [(Duration::ZERO, 0), (Duration::from_nanos(1), 1), (Duration::from_millis(7), 7)] {
            assert_eq!(poll_timeout(wait), PollTimeout::from(millis as u16));
        }
        assert_eq!(poll_timeout(Duration::MAX), PollTimeout::MAX);
    }
}
