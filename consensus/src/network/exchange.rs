//! One session of appends on a long stream: requests go out as openraft makes them, answers come back in order.
//!
//! Everything is polled by the stream that openraft holds, with no task beside it: when openraft drops a session, no
//! half of it goes on taking entries from the state that its successor reads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::Stream;
use futures::StreamExt;
use futures::future::BoxFuture;
use openraft::AsyncRuntime;
use openraft::EntryPayload;
use openraft::OptionalSend;
use openraft::base::BoxStream;
use openraft::errors::RPCError;
use openraft::raft::AppendEntriesRequest;
use openraft::raft::StreamAppendResult;
use statemachine::HostId;
use statemachine::codec;
use tokio::sync::Notify;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::messages::AppendAnswer;
use super::rpc_error;
use crate::transport::PeerStream;
use crate::transport::RecordSink;
use crate::transport::RecordSource;
use crate::transport::TransportError;
use crate::types::Entry;
use crate::types::TypeConfig;

/// Requests that a follower may leave unanswered before the next one waits.
const IN_FLIGHT: usize = 64;
/// A request is cut into records of about this size, so that none comes near the limit of one.
const RECORD_BYTES: usize = 4 << 20;

/// The long stream between two sessions. A session takes it, and gives it back only when every request was answered.
#[derive(Clone, Default)]
pub(super) struct Slot(Arc<Mutex<Option<PeerStream>>>);

impl Slot {
    pub(super) fn take(&self) -> Option<PeerStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, stream: PeerStream) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }
}

/// When each unanswered request left, and a bell for the next one.
#[derive(Default)]
struct Unanswered {
    sent_at: Mutex<VecDeque<Instant>>,
    sent: Notify,
}

impl Unanswered {
    fn push(&self) {
        self.sent_at.lock().unwrap_or_else(PoisonError::into_inner).push_back(Instant::now());
        self.sent.notify_one();
    }

    fn pop(&self) -> Option<Instant> {
        self.sent_at.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn oldest(&self) -> Option<Instant> {
        self.sent_at.lock().unwrap_or_else(PoisonError::into_inner).front().copied()
    }
}

type Sent = (Box<dyn RecordSink>, Result<(), TransportError>);
type Received = (Box<dyn RecordSource>, Result<Option<Bytes>, TransportError>);

/// The reading half: at rest while nothing is unanswered, so that a finished session leaves no half-read record.
enum Reading {
    Rest(Box<dyn RecordSource>),
    Busy(BoxFuture<'static, Received>),
    Gone,
}

struct Exchange {
    host: HostId,
    slot: Slot,
    /// Sends until openraft has no more to send.
    sending: BoxFuture<'static, Sent>,
    /// The sink, once everything is sent.
    sink: Option<Box<dyn RecordSink>>,
    reading: Reading,
    unanswered: Arc<Unanswered>,
    window: Arc<Semaphore>,
    limit: Duration,
}

/// What openraft is told of one request.
type Answered<R> = Result<StreamAppendResult<TypeConfig<R>>, RPCError<TypeConfig<R>>>;

enum Step {
    Answer(AppendAnswer),
    /// All sent, all answered.
    Finished,
}

pub(super) fn exchange<R, S>(
    host: HostId,
    slot: Slot,
    stream: PeerStream,
    input: S,
    limit: Duration,
) -> BoxStream<'static, Answered<R>>
where
    R: AsyncRuntime,
    S: Stream<Item = AppendEntriesRequest<TypeConfig<R>>> + OptionalSend + Unpin + 'static,
{
    let unanswered = Arc::new(Unanswered::default());
    let window = Arc::new(Semaphore::new(IN_FLIGHT));
    let exchange = Exchange {
        host,
        slot,
        sending: send_all(stream.sink, input, unanswered.clone(), window.clone()).boxed(),
        sink: None,
        reading: Reading::Rest(stream.source),
        unanswered,
        window,
        limit,
    };
    let answers = futures::stream::unfold(Some(exchange), |exchange| async move {
        let mut exchange = exchange?;
        match exchange.step().await {
            Ok(Step::Answer(answer @ AppendAnswer::Matching(_))) => Some((Ok(answer.into_result()), Some(exchange))),
            // After any other answer the follower has ended the stream: it is not kept.
            Ok(Step::Answer(answer)) => Some((Ok(answer.into_result()), None)),
            Ok(Step::Finished) => {
                exchange.give_back();
                None
            }
            Err(error) => Some((Err(rpc_error(error)), None)),
        }
    });
    answers.boxed()
}

impl Exchange {
    async fn step(&mut self) -> Result<Step, TransportError> {
        loop {
            let oldest = self.unanswered.oldest();
            if self.sink.is_some() && oldest.is_none() {
                return Ok(Step::Finished);
            }
            if oldest.is_some() {
                self.start_reading();
            }
            let deadline = oldest.unwrap_or_else(Instant::now) + self.limit;
            tokio::select! {
                biased;
                (source, received) = read(&mut self.reading) => {
                    self.reading = Reading::Rest(source);
                    return self.received(received?).map(Step::Answer);
                }
                (sink, sent) = &mut self.sending, if self.sink.is_none() => {
                    sent?;
                    self.sink = Some(sink);
                }
                () = self.unanswered.sent.notified() => {}
                () = tokio::time::sleep_until(deadline), if oldest.is_some() => {
                    return Err(TransportError::timeout(self.host, self.limit));
                }
            }
        }
    }

    fn start_reading(&mut self) {
        self.reading = match std::mem::replace(&mut self.reading, Reading::Gone) {
            Reading::Rest(mut source) => Reading::Busy(Box::pin(async move {
                let received = source.next().await;
                (source, received)
            })),
            busy => busy,
        };
    }

    fn received(&mut self, record: Option<Bytes>) -> Result<AppendAnswer, TransportError> {
        let host = self.host;
        let record =
            record.ok_or_else(|| TransportError::Closed { host, why: "it ended a stream of appends".to_owned() })?;
        let answer = codec::decode(&record).map_err(|source| TransportError::BadRecord { host, source })?;
        self.unanswered.pop();
        self.window.add_permits(1);
        Ok(answer)
    }

    fn give_back(self) {
        if let (Some(sink), Reading::Rest(source)) = (self.sink, self.reading) {
            self.slot.keep(PeerStream { sink, source });
        }
    }
}

async fn read(reading: &mut Reading) -> Received {
    match reading {
        Reading::Busy(receiving) => receiving.await,
        Reading::Rest(_) | Reading::Gone => std::future::pending().await,
    }
}

async fn send_all<R, S>(
    mut sink: Box<dyn RecordSink>,
    mut input: S,
    unanswered: Arc<Unanswered>,
    window: Arc<Semaphore>,
) -> Sent
where
    R: AsyncRuntime,
    S: Stream<Item = AppendEntriesRequest<TypeConfig<R>>> + OptionalSend + Unpin + 'static,
{
    // Room first, request second: a request that waits here would be stale when it leaves.
    let mut room = room_for_one(&window).await;
    while let Some(request) = input.next().await {
        for part in cut(request) {
            if !std::mem::take(&mut room) {
                room_for_one(&window).await;
            }
            unanswered.push();
            if let Err(error) = sink.send(Bytes::from(codec::encode(&part))).await {
                return (sink, Err(error));
            }
        }
        room = room_for_one(&window).await;
    }
    (sink, Ok(()))
}

async fn room_for_one(window: &Semaphore) -> bool {
    match window.acquire().await {
        Ok(permit) => permit.forget(),
        // The window is never closed.
        Err(_) => std::future::pending().await,
    }
    true
}

/// Cuts a request whose entries would not fit one record. Each part names the entry before it, so it is a request of
/// its own.
fn cut<R: AsyncRuntime>(request: AppendEntriesRequest<TypeConfig<R>>) -> Vec<AppendEntriesRequest<TypeConfig<R>>> {
    let AppendEntriesRequest { vote, mut prev_log_id, entries, leader_commit } = request;
    let mut parts = Vec::with_capacity(1);
    let mut part = Vec::with_capacity(entries.len());
    let mut part_bytes = 0;
    for entry in entries {
        let entry_bytes = match &entry.payload {
            EntryPayload::Normal(proposal) => proposal.size_bytes(),
            _ => 0,
        };
        if !part.is_empty() && part_bytes + entry_bytes > RECORD_BYTES {
            let last = part.last().map(|entry: &Entry| entry.log_id);
            let entries = std::mem::take(&mut part);
            parts.push(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit });
            prev_log_id = last;
            part_bytes = 0;
        }
        part_bytes += entry_bytes;
        part.push(entry);
    }
    parts.push(AppendEntriesRequest { vote, prev_log_id, entries: part, leader_commit });
    parts
}
