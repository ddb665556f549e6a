//! Where batches come from: the event store of this host, or a test's list.

use std::future::Future;

use statemachine::Batch;
use statemachine::Seq;
use thiserror::Error;
use tokio::sync::watch;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    #[error("events up to {} are trimmed", Seq(.oldest.0.saturating_sub(1)))]
    Trimmed { oldest: Seq },
    #[error("{0}")]
    Broken(String),
}

pub trait Source: Send + Sync + 'static {
    /// Batches behind `after`, in order, without a gap, at most `limit`; none when there are none yet.
    fn read(&self, after: Seq, limit: usize) -> impl Future<Output = Result<Vec<Batch>, SourceError>> + Send;

    /// Seq of the oldest batch that can be read; of the next one when there is none.
    fn oldest(&self) -> Seq;

    /// Seq of the newest batch, as it changes.
    fn watch_head(&self) -> watch::Receiver<Seq>;

    fn head(&self) -> Seq {
        *self.watch_head().borrow()
    }
}
