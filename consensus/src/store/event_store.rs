//! The read side of the event stream: batches by seq, on every host, up to what this host has applied.

use std::sync::Arc;

use statemachine::Seq;
use thiserror::Error;
use tokio::sync::watch;

use crate::platform::Platform;
use crate::store::segments::SegmentError;
use crate::store::segments::Segments;
use crate::store::segments::StoredBatch;

#[derive(Debug, Error)]
pub enum EventStoreError {
    #[error("events after {after} were trimmed; the oldest that is kept is {oldest}")]
    Trimmed { after: Seq, oldest: Seq },
    #[error("{after} lies ahead of this host, which has applied {head}")]
    Ahead { after: Seq, head: Seq },
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("this host is shutting down")]
    ShuttingDown,
}

/// Cheap to copy; any number of readers.
#[derive(Clone)]
pub struct EventStore {
    platform: Platform,
    segments: Arc<Segments>,
    head: watch::Receiver<Seq>,
}

impl EventStore {
    pub fn new(platform: Platform, segments: Arc<Segments>, head: watch::Receiver<Seq>) -> EventStore {
        EventStore { platform, segments, head }
    }

    /// Batches after `after`, oldest first: at least one unless `after` is the head, then as many as the limits allow
    /// and one place holds. Ask again with the last seq for more.
    pub async fn read(
        &self,
        after: Seq,
        limit_batches: usize,
        limit_bytes: usize,
    ) -> Result<Vec<StoredBatch>, EventStoreError> {
        let head = self.head();
        if after > head {
            return Err(EventStoreError::Ahead { after, head });
        }
        if after == head {
            return Ok(Vec::new());
        }
        if let Some(batches) = self.segments.read_tail(after, head, limit_batches, limit_bytes) {
            return Ok(batches);
        }
        let oldest = self.oldest();
        if after.next() < oldest {
            return Err(EventStoreError::Trimmed { after, oldest });
        }
        let segments = self.segments.clone();
        let read = self.platform.on_disk(move || segments.read_sealed(after, limit_batches, limit_bytes)).await;
        let mut batches = match read.ok_or(EventStoreError::ShuttingDown)? {
            // The segment was trimmed while it was being read.
            Err(_) if after.next() < self.oldest() => {
                return Err(EventStoreError::Trimmed { after, oldest: self.oldest() });
            }
            read => read?,
        };
        batches.retain(|batch| batch.seq <= head);
        Ok(batches)
    }

    /// Seq of the last batch that this host has applied.
    pub fn head(&self) -> Seq {
        *self.head.borrow()
    }

    /// First seq that can still be read.
    pub fn oldest(&self) -> Seq {
        self.segments.oldest()
    }

    /// Changes each time more can be read.
    pub fn watch_head(&self) -> watch::Receiver<Seq> {
        self.head.clone()
    }
}
