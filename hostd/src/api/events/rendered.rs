//! The newest batches as frames, made once for all readers of this host.
//!
//! A reader at the head takes what the first of them had made; one that reads old batches makes its own, and
//! leaves nothing here. What is kept is bounded in bytes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use axum::body::Bytes;
use hostd_api::event::EventView;
use statemachine::Batch;
use statemachine::Seq;
use statemachine::SiteId;
use tokio::sync::watch;

use super::Source;
use super::SourceError;
use super::frame;

/// Bytes of frames that are kept. A reader this far behind the head reads the store.
const KEPT_BYTES: usize = 4 << 20;
/// A reader at most this far behind the head makes frames for the others, too.
const KEPT_BATCHES: u64 = 1024;

/// One event: what a filter looks at, and what is sent.
pub struct RenderedEvent {
    pub view: EventView,
    pub frame: Bytes,
}

pub struct RenderedBatch {
    pub seq: Seq,
    pub events: Vec<RenderedEvent>,
}

impl RenderedBatch {
    fn of(site: SiteId, batch: &Batch) -> RenderedBatch {
        let views = EventView::of_batch(site, batch).into_iter();
        let events = views.map(|view| RenderedEvent { frame: frame::event(&view), view }).collect();
        RenderedBatch { seq: batch.seq(), events }
    }

    fn bytes(&self) -> usize {
        self.events.iter().map(|event| event.frame.len()).sum()
    }
}

/// A log, and the frames of its newest batches.
pub struct Rendered<S> {
    site: SiteId,
    source: S,
    newest: Mutex<Newest>,
    /// One reader makes what all wait for.
    making: tokio::sync::Mutex<()>,
}

/// Batches without a gap between them.
#[derive(Default)]
struct Newest {
    batches: VecDeque<Arc<RenderedBatch>>,
    bytes: usize,
}

impl<S: Source> Rendered<S> {
    pub fn new(site: SiteId, source: S) -> Rendered<S> {
        Rendered { site, source, newest: Mutex::default(), making: tokio::sync::Mutex::default() }
    }

    pub fn oldest(&self) -> Seq {
        self.source.oldest()
    }

    pub fn head(&self) -> Seq {
        self.source.head()
    }

    pub fn watch_head(&self) -> watch::Receiver<Seq> {
        self.source.watch_head()
    }

    /// As [`Source::read`].
    pub async fn read(&self, after: Seq, limit: usize) -> Result<Vec<Arc<RenderedBatch>>, SourceError> {
        let head = self.source.head();
        if after >= head {
            return Ok(Vec::new());
        }
        if let Some(batches) = self.newest().after(after, limit) {
            return Ok(batches);
        }
        if head.0 - after.0 > KEPT_BATCHES {
            return self.make(after, limit).await;
        }
        let _making = self.making.lock().await;
        // Another reader made it while this one waited.
        if let Some(batches) = self.newest().after(after, limit) {
            return Ok(batches);
        }
        let batches = self.make(after, limit).await?;
        self.newest().append(&batches);
        Ok(batches)
    }

    async fn make(&self, after: Seq, limit: usize) -> Result<Vec<Arc<RenderedBatch>>, SourceError> {
        let batches = self.source.read(after, limit).await?;
        Ok(batches.iter().map(|batch| Arc::new(RenderedBatch::of(self.site, batch))).collect())
    }

    fn newest(&self) -> std::sync::MutexGuard<'_, Newest> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newest {
    /// None when they are not here.
    fn after(&self, after: Seq, limit: usize) -> Option<Vec<Arc<RenderedBatch>>> {
        let first = self.batches.front()?.seq;
        let skip = usize::try_from(after.next().0.checked_sub(first.0)?).ok()?;
        let batches: Vec<_> = self.batches.iter().skip(skip).take(limit).cloned().collect();
        (!batches.is_empty()).then_some(batches)
    }

    /// What does not join on to what is here takes its place, if it is newer.
    fn append(&mut self, batches: &[Arc<RenderedBatch>]) {
        let Some(first) = batches.first() else { return };
        match self.batches.back() {
            Some(last) if first.seq <= last.seq => return,
            Some(last) if first.seq != last.seq.next() => *self = Newest::default(),
            _ => {}
        }
        self.bytes += batches.iter().map(|batch| batch.bytes()).sum::<usize>();
        self.batches.extend(batches.iter().cloned());
        while self.bytes > KEPT_BYTES
            && let Some(oldest) = self.batches.pop_front()
        {
            self.bytes -= oldest.bytes();
        }
    }
}
