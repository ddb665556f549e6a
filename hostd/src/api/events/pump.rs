//! Moves frames to one reader. Nothing is dropped silently: a reader that is too slow for too long is told so, with the
//! cursor of the last frame that it gets.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use hostd_api::Cursor;
use hostd_api::Problem;
use hostd_api::event::BOOKMARK_EVERY_MS;
use hostd_api::event::SSE_BOOKMARK;
use hostd_api::event::SSE_END;
use hostd_api::event::SSE_SYNCED;
use hostd_api::problem::Code;
use statemachine::Fold;
use statemachine::Seq;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Source;
use super::SourceError;
use super::frame;
use super::reader::Reader;
use super::rendered::Rendered;
use super::rendered::RenderedBatch;
use super::start;
use crate::metrics::Metrics;

/// Frames that wait for one reader.
const BUFFER_FRAMES: usize = 256;
/// Batches that are read from the store at once.
const READ_BATCHES: usize = 64;

/// How long a stream waits.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// A bookmark goes out before the promised interval is over, so that it arrives within it.
    pub bookmark: Duration,
    /// A full buffer may stay full this long.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { bookmark: Duration::from_millis(BOOKMARK_EVERY_MS * 4 / 5), stall: Duration::from_secs(10) }
    }
}

/// The way to one reader. One place beyond the buffer is kept for the last word.
pub struct Sender {
    frames: mpsc::Sender<Bytes>,
    last_word: mpsc::OwnedPermit<Bytes>,
}

pub fn buffer() -> (Sender, mpsc::Receiver<Bytes>) {
    buffer_of(BUFFER_FRAMES)
}

pub(super) fn buffer_of(frames: usize) -> (Sender, mpsc::Receiver<Bytes>) {
    let (sender, receiver) = mpsc::channel(frames + 1);
    let last_word = sender.clone().try_reserve_owned();
    let last_word = last_word.unwrap_or_else(|_| unreachable!("a new channel has room for one frame"));
    (Sender { frames: sender, last_word }, receiver)
}

pub struct Pump<S> {
    pub reader: Reader,
    pub source: Arc<Rendered<S>>,
    /// `from=state`: what is sent first. The reader begins behind its head.
    pub snapshot: Option<Arc<Fold>>,
    pub follow: bool,
    pub patience: Patience,
    pub cancel: CancellationToken,
    pub metrics: Arc<Metrics>,
    /// Asked at each bookmark: a revoked token ends its streams.
    pub allowed: Box<dyn Fn() -> Result<(), Problem> + Send + Sync>,
}

/// Why a stream ends.
enum Ending {
    /// The reader went away.
    Gone,
    /// `follow=false`, and its head is reached.
    Reached,
    Closed(Problem),
}

impl<S: Source> Pump<S> {
    /// Runs until the reader goes away, is too slow, or is not served any more.
    pub async fn run(mut self, sender: Sender) {
        let Sender { frames, last_word } = sender;
        let mut delivered = match self.snapshot {
            Some(_) => None,
            None => Some(self.reader.cursor()),
        };
        let ending = match self.pump(&frames, &mut delivered).await {
            Ok(never) => match never {},
            Err(ending) => ending,
        };
        match ending {
            Ending::Gone => {}
            Ending::Reached => drop(last_word.send(frame::mark(SSE_END, self.reader.cursor()))),
            Ending::Closed(mut problem) => {
                // A trimmed cursor keeps its own: going on where the reader stands is what is impossible.
                if problem.cursor.is_none() {
                    problem.cursor = delivered;
                }
                drop(last_word.send(frame::closed(problem.clone(), problem.cursor)));
            }
        }
    }

    /// `delivered` is where the reader stands once it has read everything that was sent to it.
    async fn pump(
        &mut self,
        frames: &mpsc::Sender<Bytes>,
        delivered: &mut Option<Cursor>,
    ) -> Result<std::convert::Infallible, Ending> {
        let mut head = self.source.watch_head();
        let goal = *head.borrow();
        if let Some(fold) = self.snapshot.take() {
            for bytes in self.reader.snapshot(&fold) {
                self.send(frames, bytes).await?;
            }
            self.mark(frames, SSE_SYNCED, delivered).await?;
        }
        let mut marked = Instant::now();
        loop {
            head.mark_unchanged();
            let batches = self.read().await?;
            for batch in &batches {
                for framed in self.reader.take(batch) {
                    self.send(frames, framed.bytes).await?;
                    self.metrics.events_delivered.inc();
                    *delivered = Some(framed.cursor);
                }
            }
            if marked.elapsed() >= self.patience.bookmark {
                (self.allowed)().map_err(Ending::Closed)?;
                self.mark(frames, SSE_BOOKMARK, delivered).await?;
                marked = Instant::now();
            }
            if !batches.is_empty() {
                continue;
            }
            if !self.follow && self.reader.cursor().seq >= goal {
                return Err(Ending::Reached);
            }
            self.wait(frames, &mut head, marked).await?;
        }
    }

    async fn read(&mut self) -> Result<Vec<Arc<RenderedBatch>>, Ending> {
        if self.cancel.is_cancelled() {
            return Err(stopping());
        }
        match self.source.read(self.reader.read_after(), READ_BATCHES).await {
            // A cursor at the last event of the newest batch reads that batch again, and finds nothing in it.
            Ok(batches) => Ok(batches),
            Err(SourceError::Trimmed { oldest }) => {
                Err(Ending::Closed(start::trimmed(self.reader.cursor().site, oldest)))
            }
            Err(SourceError::Broken(why)) => {
                tracing::error!(why, "the event store cannot be read");
                Err(Ending::Closed(
                    Problem::new(Code::Internal, "the event store of this host cannot be read")
                        .action("go on at another host"),
                ))
            }
        }
    }

    /// Until there is news, a bookmark is due, or nobody listens any more.
    async fn wait(
        &self,
        frames: &mpsc::Sender<Bytes>,
        head: &mut watch::Receiver<Seq>,
        marked: Instant,
    ) -> Result<(), Ending> {
        tokio::select! {
            changed = head.changed() => changed.map_err(|_| stopping()),
            () = tokio::time::sleep_until(marked + self.patience.bookmark) => Ok(()),
            () = frames.closed() => Err(Ending::Gone),
            () = self.cancel.cancelled() => Err(stopping()),
        }
    }

    async fn mark(
        &self,
        frames: &mpsc::Sender<Bytes>,
        name: &str,
        delivered: &mut Option<Cursor>,
    ) -> Result<(), Ending> {
        let cursor = self.reader.cursor();
        self.send(frames, frame::mark(name, cursor)).await?;
        *delivered = Some(cursor);
        Ok(())
    }

    async fn send(&self, frames: &mpsc::Sender<Bytes>, bytes: Bytes) -> Result<(), Ending> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(stopping()),
            sent = frames.send_timeout(bytes, self.patience.stall) => match sent {
                Ok(()) => Ok(()),
                Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Ending::Gone),
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                    self.metrics.events_overflows.inc();
                    Err(Ending::Closed(self.overflow()))
                }
            },
        }
    }

    fn overflow(&self) -> Problem {
        let stalled = self.patience.stall.as_secs();
        let words = format!("the reader took nothing for {stalled} s while {BUFFER_FRAMES} events waited");
        Problem::new(Code::Overflow, words).action("go on after the `cursor` of this answer; nothing is lost")
    }
}

fn stopping() -> Ending {
    Ending::Closed(Problem::new(Code::ShuttingDown, "this host stops serving").action("go on at another host"))
}
