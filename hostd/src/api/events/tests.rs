//! The contract of DESIGN §10, over a log that is a list.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Bytes;
use hostd_api::Cursor;
use hostd_api::Problem;
use hostd_api::event::EventFilter;
use hostd_api::event::EventsQuery;
use hostd_api::event::StartFrom;
use hostd_api::problem::Code;
use statemachine::Batch;
use statemachine::Event;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::Stamp;
use statemachine::batch::Head;
use statemachine::command::Actor;
use statemachine::event::CertificateIssued;
use statemachine::event::HostActivated;
use statemachine::event::HostSuspected;
use statemachine::state::Fingerprint;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Source;
use super::SourceError;
use super::pump::Patience;
use super::pump::Pump;
use super::pump::buffer_of;
use super::reader::Reader;
use super::rendered::Rendered;
use super::start;
use crate::metrics::Metrics;

const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct List {
    batches: Arc<Mutex<Vec<Batch>>>,
    oldest: Seq,
    head: watch::Sender<Seq>,
    /// Batches that were read so far.
    read: Arc<AtomicUsize>,
}

impl List {
    fn of(batches: Vec<Batch>) -> List {
        let head = batches.last().map_or(Seq::ZERO, Batch::seq);
        let head = watch::Sender::new(head);
        List { batches: Arc::new(Mutex::new(batches)), oldest: Seq(1), head, read: Arc::default() }
    }

    fn append(&self, batch: Batch) {
        let seq = batch.seq();
        self.batches.lock().unwrap().push(batch);
        self.head.send_replace(seq);
    }
}

impl Source for List {
    async fn read(&self, after: Seq, limit: usize) -> Result<Vec<Batch>, SourceError> {
        if after.next() < self.oldest {
            return Err(SourceError::Trimmed { oldest: self.oldest });
        }
        // As a store that reads from its disk.
        tokio::task::yield_now().await;
        let batches = self.batches.lock().unwrap();
        let read: Vec<Batch> = batches.iter().filter(|batch| batch.seq() > after).take(limit).cloned().collect();
        self.read.fetch_add(read.len(), Ordering::Relaxed);
        Ok(read)
    }

    fn oldest(&self) -> Seq {
        self.oldest
    }

    fn watch_head(&self) -> watch::Receiver<Seq> {
        self.head.subscribe()
    }
}

fn site() -> SiteId {
    SiteId(uuid::Uuid::from_u128(9))
}

fn suspected(host: u64) -> Event {
    HostSuspected { host: HostId(host) }.into()
}

fn activated(host: u64) -> Event {
    HostActivated { host: HostId(host) }.into()
}

fn issued(serial: String) -> Event {
    CertificateIssued { host: HostId(1), serial, fingerprint: Fingerprint([0; 32]), not_after_ms: 0 }.into()
}

fn batch(seq: u64, events: Vec<Event>) -> Batch {
    Batch {
        previous: Head { seq: Seq(seq - 1), ..Head::default() },
        stamp: Stamp::default(),
        actor: Actor::Duty(HostId(1)),
        origin: HostId(1),
        idempotency: None,
        created: None,
        events,
    }
}

/// `count` batches, each with three events about hosts 1, 2 and 3; `activated` only in every tenth.
fn log(count: u64) -> Vec<Batch> {
    let third = |seq: u64| if seq.is_multiple_of(10) { activated(3) } else { suspected(3) };
    (1..=count).map(|seq| batch(seq, vec![suspected(1), suspected(2), third(seq)])).collect()
}

fn filter(kind: Option<&str>, entity: Option<&str>) -> EventFilter {
    let query =
        EventsQuery { kind: kind.map(str::to_owned), entity: entity.map(str::to_owned), ..EventsQuery::default() };
    EventFilter::of(&query).unwrap()
}

fn shared(source: List) -> Arc<Rendered<List>> {
    Arc::new(Rendered::new(site(), source))
}

fn pump(source: List, after: Cursor, filter: EventFilter, follow: bool) -> Pump<List> {
    Pump {
        reader: Reader::new(after, filter),
        source: shared(source),
        snapshot: None,
        follow,
        patience: Patience::default(),
        cancel: CancellationToken::new(),
        metrics: Arc::new(Metrics::new().unwrap()),
        allowed: Box::new(|| Ok(())),
    }
}

/// A frame, taken apart as a client does.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    event: String,
    id: Option<Cursor>,
    data: serde_json::Value,
}

fn parse(bytes: &Bytes) -> Frame {
    let text = std::str::from_utf8(bytes).unwrap();
    assert!(text.ends_with("\n\n") && text.matches("\n\n").count() == 1, "one frame: {text:?}");
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    Frame {
        event: field("event: ").unwrap(),
        id: field("id: ").map(|id| id.parse().unwrap()),
        data: serde_json::from_str(&field("data: ").unwrap()).unwrap(),
    }
}

async fn next(frames: &mut mpsc::Receiver<Bytes>) -> Option<Frame> {
    tokio::time::timeout(DEADLINE, frames.recv()).await.expect("a frame within the deadline").as_ref().map(parse)
}

/// Everything until the stream ends.
async fn collect(pump: Pump<List>) -> Vec<Frame> {
    let (sender, mut receiver) = buffer_of(4);
    tokio::spawn(pump.run(sender));
    let mut frames = Vec::new();
    while let Some(frame) = next(&mut receiver).await {
        frames.push(frame);
    }
    frames
}

fn events(frames: &[Frame]) -> Vec<(u64, u64)> {
    let events = frames.iter().filter(|frame| frame.event == "event");
    events.map(|frame| (frame.data["seq"].as_u64().unwrap(), frame.data["position"].as_u64().unwrap())).collect()
}

fn oldest() -> Cursor {
    Cursor::after_batch(site(), Seq::ZERO)
}

#[tokio::test]
async fn a_reader_that_resumes_anywhere_gets_the_rest_and_nothing_twice() {
    let log = log(30);
    let whole = collect(pump(List::of(log.clone()), oldest(), EventFilter::default(), false)).await;
    let all = events(&whole);
    assert_eq!(all.len(), 90);
    assert!(all.is_sorted());
    assert_eq!(whole.last().unwrap().event, "end");
    for at in [0, 1, 2, 3, 44, 88, 89] {
        let cursor = whole[at].id.unwrap();
        let rest = collect(pump(List::of(log.clone()), cursor, EventFilter::default(), false)).await;
        assert_eq!(events(&rest), all[at + 1..], "after {cursor:?}");
    }
}

#[tokio::test]
async fn a_filter_skips_no_match_and_its_bookmark_resumes_behind_what_did_not_match() {
    let log = log(200);
    let wanted = || filter(Some("HostActivated"), Some("host/3"));
    let found = collect(pump(List::of(log.clone()), oldest(), wanted(), false)).await;
    assert_eq!(events(&found), (1..=20).map(|tenth| (tenth * 10, 2)).collect::<Vec<_>>());
    // The mark at the end stands behind everything that was looked at, not behind the last match.
    let mark = found.last().unwrap();
    assert_eq!((mark.event.as_str(), mark.id), ("end", Some(Cursor::after_batch(site(), Seq(200)))));
    let none = collect(pump(List::of(log), oldest(), filter(None, Some("vm/x")), false)).await;
    assert_eq!(none.len(), 1);
}

#[tokio::test]
async fn live_events_arrive_without_a_gap_after_stored_ones() {
    let source = List::of(log(3));
    let (sender, mut receiver) = buffer_of(64);
    tokio::spawn(pump(source.clone(), oldest(), EventFilter::default(), true).run(sender));
    for seq in 4..=6 {
        source.append(batch(seq, vec![suspected(seq)]));
    }
    let mut seen = Vec::new();
    while seen.last() != Some(&(6, 0)) {
        seen.extend(events(&[next(&mut receiver).await.unwrap()]));
    }
    assert_eq!(seen.len(), 12);
    assert!(seen.is_sorted());
}

#[tokio::test]
async fn a_quiet_stream_says_where_it_is() {
    let mut quiet = pump(List::of(log(7)), Cursor::after_batch(site(), Seq(7)), EventFilter::default(), true);
    assert!(quiet.patience.bookmark < Duration::from_secs(5), "the promise is 5 s");
    quiet.patience.bookmark = Duration::from_millis(20);
    let (sender, mut receiver) = buffer_of(4);
    tokio::spawn(quiet.run(sender));
    for _ in 0..3 {
        let mark = next(&mut receiver).await.unwrap();
        assert_eq!((mark.event.as_str(), mark.id), ("bookmark", Some(Cursor::after_batch(site(), Seq(7)))));
        assert_eq!(mark.data["seq"], 7);
    }
}

#[tokio::test]
async fn a_slow_reader_is_told_where_to_go_on_and_loses_nothing() {
    let log = log(30);
    let mut slow = pump(List::of(log.clone()), oldest(), EventFilter::default(), true);
    slow.patience.stall = Duration::from_millis(20);
    let metrics = slow.metrics.clone();
    let (sender, mut receiver) = buffer_of(4);
    // Nothing is read until the pump has given up.
    tokio::time::timeout(DEADLINE, slow.run(sender)).await.unwrap();
    let mut frames = Vec::new();
    while let Some(frame) = next(&mut receiver).await {
        frames.push(frame);
    }
    let closed = frames.pop().unwrap();
    assert_eq!(closed.event, "closed");
    assert_eq!(closed.data["type"], "urn:quorate:problem:overflow");
    assert_eq!(closed.id, frames.last().unwrap().id, "the cursor of the last frame that was delivered");
    assert_eq!(metrics.events_overflows.get(), 1);
    let rest = collect(pump(List::of(log), closed.id.unwrap(), EventFilter::default(), false)).await;
    assert_eq!(events(&frames).len() + events(&rest).len(), 90);
}

#[tokio::test]
async fn a_stream_ends_when_its_reader_may_not_look_any_more() {
    let mut stream = pump(List::of(log(1)), oldest(), EventFilter::default(), true);
    stream.patience.bookmark = Duration::from_millis(10);
    stream.allowed = Box::new(|| Err(Problem::new(Code::Unauthenticated, "it was revoked")));
    let frames = collect(stream).await;
    assert_eq!(frames.last().unwrap().data["type"], "urn:quorate:problem:unauthenticated");
}

#[tokio::test]
async fn a_stopping_host_says_goodbye_with_a_cursor() {
    let stream = pump(List::of(log(1)), oldest(), EventFilter::default(), true);
    let cancel = stream.cancel.clone();
    let (sender, mut receiver) = buffer_of(8);
    tokio::spawn(stream.run(sender));
    for _ in 0..3 {
        next(&mut receiver).await.unwrap();
    }
    cancel.cancel();
    let closed = next(&mut receiver).await.unwrap();
    assert_eq!((closed.event.as_str(), closed.id), ("closed", Some(Cursor { site: site(), seq: Seq(1), position: 2 })));
    assert_eq!(next(&mut receiver).await, None);
}

#[tokio::test]
async fn from_state_sends_what_is_then_a_mark_then_live_events() {
    let source = List::of(log(5));
    let mut stream = pump(source.clone(), Cursor::after_batch(site(), Seq(5)), EventFilter::default(), true);
    let mut fold = Fold::default();
    fold.head.seq = Seq(5);
    stream.snapshot = Some(Arc::new(fold));
    let (sender, mut receiver) = buffer_of(8);
    tokio::spawn(stream.run(sender));
    let synced = next(&mut receiver).await.unwrap();
    assert_eq!((synced.event.as_str(), synced.id), ("synced", Some(Cursor::after_batch(site(), Seq(5)))));
    source.append(batch(6, vec![suspected(1)]));
    assert_eq!(events(&[next(&mut receiver).await.unwrap()]), [(6, 0)]);
}

#[tokio::test]
async fn a_broken_off_snapshot_has_no_cursor_to_resume_from() {
    let mut stream = pump(List::of(log(1)), oldest(), EventFilter::default(), true);
    stream.snapshot = Some(Arc::new(Fold::default()));
    stream.cancel.cancel();
    let frames = collect(stream).await;
    assert_eq!((frames[0].event.as_str(), frames[0].id), ("closed", None));
}

#[tokio::test]
async fn a_reader_that_falls_behind_the_trim_is_told_the_oldest_cursor() {
    let mut source = List::of(log(20).split_off(9));
    source.oldest = Seq(10);
    let frames = collect(pump(source, Cursor::after_batch(site(), Seq(3)), EventFilter::default(), true)).await;
    assert_eq!(frames[0].data["type"], "urn:quorate:problem:cursor-trimmed");
    assert_eq!(frames[0].data["status"], 410);
    assert_eq!(frames[0].id, Some(Cursor::after_batch(site(), Seq(9))));
}

#[tokio::test]
async fn readers_at_the_head_share_what_one_of_them_made() {
    let source = List::of(log(3));
    let shared = shared(source.clone());
    let streams = (0..8).map(|reader| {
        let about = format!("host/{}", reader % 3 + 1);
        let mut stream = pump(source.clone(), Cursor::after_batch(site(), Seq(3)), filter(None, Some(&about)), true);
        stream.source = shared.clone();
        let (sender, receiver) = buffer_of(256);
        tokio::spawn(stream.run(sender));
        receiver
    });
    let mut receivers: Vec<_> = streams.collect();
    for batch in log(103).split_off(3) {
        source.append(batch);
        tokio::task::yield_now().await;
    }
    for receiver in &mut receivers {
        let mut seen = Vec::new();
        while seen.len() < 100 {
            seen.extend(events(&[next(receiver).await.unwrap()]));
        }
        assert!(seen.iter().map(|(seq, _)| *seq).eq(4..=103), "{seen:?}");
    }
    assert_eq!(source.read.load(Ordering::Relaxed), 100, "each batch once");
}

#[tokio::test]
async fn what_readers_share_is_bounded_and_never_out_of_place() {
    // More than two megabytes each: one batch is kept.
    let long = |seq| batch(seq, vec![issued("x".repeat(1_200_000)), issued("y".repeat(1_200_000))]);
    let source = List::of((1..=5).map(long).collect());
    let shared = shared(source.clone());
    let read = async |after: u64, limit: usize| {
        let batches = shared.read(Seq(after), limit).await.unwrap();
        batches.iter().map(|batch| batch.seq.0).collect::<Vec<_>>()
    };
    for after in (0..=5).chain([2, 0, 4, 1, 3, 4]) {
        for limit in [1, 64] {
            let some = read(after, limit).await;
            assert!(some.iter().copied().eq((after + 1..=5).take(some.len())), "{some:?} after {after}");
            assert_eq!(some.is_empty(), after == 5, "{some:?} after {after}");
            assert!(some.len() <= limit);
        }
    }
    let before = source.read.load(Ordering::Relaxed);
    assert_eq!(read(4, 64).await, [5]);
    assert_eq!(source.read.load(Ordering::Relaxed), before, "the newest is kept");
    assert_eq!(read(0, 1).await, [1]);
    assert_eq!(source.read.load(Ordering::Relaxed), before + 1, "the oldest is not");
}

#[test]
fn a_cursor_is_checked_against_what_is_here() {
    let check = |cursor: Cursor| start::check(cursor, site(), Seq(10), Seq(20));
    let inside = |seq, position| Cursor { site: site(), seq: Seq(seq), position };
    let whole = |seq| Cursor::after_batch(site(), Seq(seq));
    for good in [whole(9), whole(10), whole(20), inside(10, 0), inside(20, 5)] {
        assert_eq!(check(good), Ok(()), "{good:?}");
    }
    for (cursor, code, status, go_on) in [
        (whole(8), Code::CursorTrimmed, 410, Some(whole(9))),
        (inside(9, 0), Code::CursorTrimmed, 410, Some(whole(9))),
        (whole(21), Code::CursorFuture, 409, Some(whole(20))),
        (Cursor::after_batch(SiteId::default(), Seq(15)), Code::CursorForeign, 409, None),
    ] {
        let problem = check(cursor).unwrap_err();
        assert!(problem.is(code), "{cursor:?}: {problem:?}");
        assert_eq!((problem.status, problem.cursor), (status, go_on));
        assert!(problem.action.is_some());
    }
}

#[tokio::test]
async fn where_a_reader_begins() {
    let mut source = List::of(log(20).split_off(9));
    source.oldest = Seq(10);
    let cursor = |seq| Cursor::after_batch(site(), Seq(seq));
    let begin = async |query: EventsQuery, last: Option<Cursor>| {
        let last = last.map(|last| last.to_string());
        start::resolve(&query, last.as_deref(), site(), &shared(source.clone())).await
    };
    let from = |from| EventsQuery { from: Some(from), ..EventsQuery::default() };
    let after = |cursor: Cursor| EventsQuery { after: Some(cursor.to_string()), ..EventsQuery::default() };
    assert_eq!(begin(EventsQuery::default(), None).await.unwrap().after, cursor(20));
    assert_eq!(begin(from(StartFrom::Oldest), None).await.unwrap().after, cursor(9));
    assert!(begin(from(StartFrom::State), None).await.unwrap().with_state);
    assert_eq!(begin(after(cursor(12)), None).await.unwrap().after, cursor(12));
    // A browser that reconnects repeats its URL and adds the header.
    assert_eq!(begin(after(cursor(12)), Some(cursor(15))).await.unwrap().after, cursor(15));
    assert_eq!(begin(from(StartFrom::State), Some(cursor(15))).await.unwrap().after, cursor(15));
    let both = EventsQuery { from: Some(StartFrom::Now), ..after(cursor(12)) };
    assert!(begin(both, None).await.unwrap_err().is(Code::BadRequest));
    let nonsense = EventsQuery { after: Some("12".to_owned()), ..EventsQuery::default() };
    assert!(begin(nonsense, None).await.unwrap_err().is(Code::BadRequest));
}

#[tokio::test]
async fn a_cursor_that_another_host_gave_a_moment_ago_is_waited_for() {
    let source = List::of(log(3));
    let query = EventsQuery { after: Some(Cursor::after_batch(site(), Seq(4)).to_string()), ..EventsQuery::default() };
    let behind = shared(source.clone());
    let resolving = tokio::spawn(async move { start::resolve(&query, None, site(), &behind).await });
    source.append(batch(4, vec![suspected(1)]));
    assert_eq!(resolving.await.unwrap().unwrap().after.seq, Seq(4));
}
