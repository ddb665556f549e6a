//! `GET /v1/events`: the log as Server-Sent Events (DESIGN §10, docs/protocol/events.md).
//!
//! Four parts: [`start`] decides where a reader begins, or why it cannot; [`rendered`] turns batches into frames, once
//! for all readers; [`reader`] chooses among them, and owns the cursor; [`pump`] moves frames to one reader, within
//! bounds. None of them knows HTTP or Raft.

mod frame;
mod pump;
mod reader;
mod rendered;
mod source;
mod start;

#[cfg(test)]
mod tests;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use futures::StreamExt;
use hostd_api::Problem;
use hostd_api::event::EventFilter;
use hostd_api::event::EventsQuery;
use hostd_api::problem::Code;
use tokio_stream::wrappers::ReceiverStream;

use super::Api;
use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;
use crate::auth::Right;
use pump::Patience;
use pump::Pump;
use reader::Reader;
pub use rendered::Rendered;
pub use source::Source;
pub use source::SourceError;

/// Streams that one host serves at a time.
const SUBSCRIBERS_MAX: i64 = 1500;
const LAST_EVENT_ID: &str = "last-event-id";

/// The log as a stream of Server-Sent Events, after a cursor or from a chosen place.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventsQuery),
    responses((status = 200, body = String, content_type = "text/event-stream"), (status = "default", body = Problem)))]
pub async fn stream(
    State(api): State<Api>,
    looker: Looker,
    Params(query): Params<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let filter = EventFilter::of(&query).map_err(|error| Problem::new(Code::BadRequest, error.to_string()))?;
    let last_event_id = match headers.get(LAST_EVENT_ID).map(|value| value.to_str()) {
        None => None,
        Some(Ok(text)) => Some(text),
        Some(Err(_)) => return Err(Failure::new(Code::BadRequest, "the header Last-Event-ID is not a cursor")),
    };
    let member = looker.member;
    let source = member.events().clone();
    let follow = query.follow.unwrap_or(true);
    let begin = start::resolve(&query, last_event_id, member.site(), &source).await?;

    let gauge = member.metrics.events_subscribers.clone();
    if gauge.get() >= SUBSCRIBERS_MAX {
        let problem = Problem::new(Code::Busy, format!("{SUBSCRIBERS_MAX} streams are open on this host"));
        return Err(problem.action("read from another host").into());
    }
    gauge.inc();
    let caller = looker.caller;
    let allowed = {
        let member = member.clone();
        move || member.still(caller, Right::Look)
    };
    let (sender, receiver) = pump::buffer();
    let snapshot = begin.with_state.then(|| member.fold());
    let after = match &snapshot {
        Some(fold) => hostd_api::Cursor::after_batch(member.site(), fold.head.seq),
        None => begin.after,
    };
    let pump = Pump {
        reader: Reader::new(after, filter),
        source,
        snapshot,
        follow,
        patience: Patience::default(),
        cancel: api.daemon().cancel(),
        metrics: member.metrics.clone(),
        allowed: Box::new(allowed),
    };
    tokio::spawn(async move {
        pump.run(sender).await;
        gauge.dec();
    });
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, std::convert::Infallible>));
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, body).into_response())
}
