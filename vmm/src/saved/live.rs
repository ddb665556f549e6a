//! The part of a live save in which the guest runs: all of memory once, then in rounds what was written meanwhile, until little enough is
//! left. Whatever ends it early leaves the guest running as if nothing had been.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_control::{LiveLimits, RateLimit};

use super::dirty::DirtyLog;
use super::frame::{MAX_RUN_PAGES, PAGE_BYTES};
use super::memory;
use super::parts::Parts;
use super::precopy::{Limits, Next, Precopy, Round};
use super::session::{SaveError, Saves};
use super::stream::GuestWriter;
use super::throttle::Throttle;
use crate::devices::block::limit::Limiter;

/// How often a copy that waits for its turn looks around.
const LOOK: Duration = Duration::from_secs(1);

/// Copies until the guest may stop. What is left to send is in `log`, which was started before. The guest is held back as before until what
/// this returns is dropped, which is for after it was stopped.
pub(super) fn copy<W: Write>(
    saves: &Saves,
    parts: &Parts,
    socket: &UnixStream,
    limits: LiveLimits,
    (log, writer): (&mut DirtyLog<'_>, &mut GuestWriter<W>),
) -> Result<Throttle, SaveError> {
    let memory_bytes = parts.pages() * PAGE_BYTES;
    let total = limits.timeout_ms.map(Duration::from_millis);
    let mut precopy =
        Precopy::new(Limits::new(Duration::from_millis(limits.downtime_ms), total, memory_bytes), memory_bytes);
    let rate = RateLimit { bytes_per_second: limits.bytes_per_second, ..RateLimit::default() };
    let (began, limiter) = (Instant::now(), Limiter::new(&rate));
    let mut pace = Pace { saves, socket, began, limiter, paid_bytes: writer.bytes() };
    let mut throttle = Throttle::new(Arc::clone(&parts.shared.gate));
    let progress = saves.progress();
    loop {
        let nth = progress.round.fetch_add(1, Ordering::Relaxed) + 1;
        let (began, before) = (Instant::now(), writer.bytes());
        let pages = if nth == 1 { parts.pages() } else { log.pages() };
        let mut ended = Ok(());
        let go_on = |done: u64, writer: &GuestWriter<W>| {
            if nth == 1 {
                progress.pages_done.store(done, Ordering::Relaxed);
            }
            progress.remaining_bytes.store((pages - done) * PAGE_BYTES, Ordering::Relaxed);
            progress.has_sent(writer);
            ended = pace.keep(&precopy, began, writer.bytes());
            ended.is_ok()
        };
        let copied = match nth {
            1 => memory::send_all(&parts.memory, writer, go_on),
            _ => memory::send_again(&parts.memory, writer, log.take(MAX_RUN_PAGES), go_on),
        };
        // Why it does not go on says more than that it does not.
        ended?;
        copied?;
        writer.flush()?;
        let took = began.elapsed();
        log.collect()?;
        // Untouched memory costs nothing and says nothing about the connection. A page that has become zero counts as any other: in the
        // last pass it may be none.
        let sent_bytes = if nth == 1 { writer.bytes() - before } else { pages * PAGE_BYTES };
        let dirty_bytes = log.pages() * PAGE_BYTES;
        progress.remaining_bytes.store(dirty_bytes, Ordering::Relaxed);
        progress.dirty_bytes_per_second.store(per_second(dirty_bytes, took), Ordering::Relaxed);
        let next = precopy.after(Round { sent_bytes, took, dirty_bytes });
        tracing::debug!(round = nth, sent_bytes, ?took, dirty_bytes, ?next, "a round of the copy has ended");
        match next {
            Next::Round { throttle_percent } => {
                throttle.set(throttle_percent).map_err(SaveError::Throttle)?;
                progress.throttle_percent.store(throttle_percent, Ordering::Relaxed);
            }
            Next::Final => return Ok(throttle),
            Next::GiveUp(reason) => return Err(reason.into()),
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let per_second = u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1);
    u64::try_from(per_second).unwrap_or(u64::MAX)
}

/// How fast the copy may go, and whether it may go on.
struct Pace<'a> {
    saves: &'a Saves,
    socket: &'a UnixStream,
    began: Instant,
    limiter: Option<Limiter>,
    paid_bytes: u64,
}

impl Pace<'_> {
    /// Waits until what was sent last is paid for.
    fn keep(&mut self, precopy: &Precopy, round: Instant, written_bytes: u64) -> Result<(), SaveError> {
        let price = written_bytes - self.paid_bytes;
        self.paid_bytes = written_bytes;
        loop {
            if self.saves.is_given_up() {
                return Err(SaveError::GivenUp);
            }
            if let Some(reason) = precopy.overtime(round.elapsed()) {
                return Err(reason.into());
            }
            let paid = match &mut self.limiter {
                Some(limiter) => limiter.pay(self.began.elapsed(), price),
                None => Ok(()),
            };
            let wait = paid.err().map_or(Duration::ZERO, |wait| wait.min(LOOK));
            if hangs_up_within(self.socket, wait)? {
                // Who gives a save up cuts its connection.
                return Err(if self.saves.is_given_up() { SaveError::GivenUp } else { SaveError::ClientGone });
            }
            if paid.is_ok() {
                return Ok(());
            }
        }
    }
}

/// Whether the other end of a connection is closed, or ours, as it is for a save that is given up. Waits at most so long for that.
fn hangs_up_within(socket: &UnixStream, wait: Duration) -> Result<bool, SaveError> {
    let millis = if wait.is_zero() { 0 } else { u16::try_from(wait.as_millis() + 1).unwrap_or(u16::MAX) };
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::from(millis)) {
        Ok(_) => Ok(fds[0].revents().is_none_or(|found| !found.is_empty())),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(SaveError::Connection(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    #[test]
    fn a_client_that_is_gone_is_noticed_though_nothing_is_sent_to_it() {
        let patience = Duration::from_secs(60);
        let (near, far) = UnixStream::pair().unwrap();
        assert!(!hangs_up_within(&near, Duration::ZERO).unwrap());
        // It has nothing more to say, and listens.
        far.shutdown(Shutdown::Write).unwrap();
        assert!(!hangs_up_within(&near, Duration::from_micros(1)).unwrap());
        let client = std::thread::spawn(move || drop(far));
        assert!(hangs_up_within(&near, patience).unwrap());
        client.join().unwrap();

        let (near, _far) = UnixStream::pair().unwrap();
        near.shutdown(Shutdown::Both).unwrap();
        assert!(hangs_up_within(&near, patience).unwrap());
    }
}
