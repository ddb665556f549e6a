//! Says once that a host fell silent, and once that it is back; openraft would say it at every heartbeat.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use statemachine::HostId;
use tokio::time::Instant;

/// A heartbeat that is late now and then is no news.
const SILENT_FOR: Duration = Duration::from_secs(1);

/// Whether the heartbeats to one host are answered.
#[derive(Debug, Clone, Default)]
pub(super) struct Reach(Arc<Mutex<Silence>>);

#[derive(Debug, Default)]
struct Silence {
    /// When the oldest heartbeat left that was not answered, nor any after it.
    since: Option<Instant>,
    is_told: bool,
}

impl Reach {
    fn silence(&self) -> MutexGuard<'_, Silence> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A heartbeat is about to leave.
    pub(super) fn leaves(&self, host: HostId, now: Instant) {
        if let Some(silent) = self.silence().leaves(now) {
            tracing::warn!(%host, silent_s = silent.as_secs_f32(), "a host does not answer this leader's heartbeats");
        }
    }

    /// One was answered.
    pub(super) fn answers(&self, host: HostId, now: Instant) {
        if let Some(silent) = self.silence().answers(now) {
            tracing::info!(%host, after_s = silent.as_secs_f32(), "a host answers this leader's heartbeats again");
        }
    }
}

impl Silence {
    /// How long it has been silent, if that is to be told now.
    fn leaves(&mut self, now: Instant) -> Option<Duration> {
        let silent = now - *self.since.get_or_insert(now);
        let is_news = !self.is_told && silent >= SILENT_FOR;
        self.is_told |= is_news;
        is_news.then_some(silent)
    }

    /// How long it was silent, if that was told.
    fn answers(&mut self, now: Instant) -> Option<Duration> {
        let since = self.since.take();
        std::mem::take(&mut self.is_told).then_some(now - since?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_once_and_its_end_once_and_a_late_heartbeat_not_at_all() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut silence = Silence::default();
        assert_eq!(silence.leaves(at(0)), None);
        assert_eq!(silence.leaves(at(100)), None, "the first is late");
        assert_eq!(silence.answers(at(150)), None);
        for ms in [200, 300, 1_100] {
            assert_eq!(silence.leaves(at(ms)), None);
        }
        assert_eq!(silence.leaves(at(1_200)), Some(Duration::from_secs(1)));
        assert_eq!(silence.leaves(at(9_000)), None);
        assert_eq!(silence.answers(at(10_200)), Some(Duration::from_secs(10)));
        assert_eq!(silence.answers(at(10_300)), None);
    }
}
