//! One Server-Sent Event as bytes.

use axum::body::Bytes;
use hostd_api::Cursor;
use hostd_api::Problem;
use hostd_api::event::EventView;
use hostd_api::event::Mark;
use hostd_api::event::SSE_CLOSED;
use hostd_api::event::SSE_EVENT;
use hostd_api::event::SSE_STATE;
use hostd_api::event::StateItem;
use serde::Serialize;

pub fn event(view: &EventView) -> Bytes {
    frame(SSE_EVENT, Some(view.cursor), view)
}

pub fn state(item: &StateItem) -> Bytes {
    frame(SSE_STATE, None, item)
}

/// `synced`, `bookmark`, `end`.
pub fn mark(name: &str, cursor: Cursor) -> Bytes {
    frame(name, Some(cursor), &Mark { cursor, seq: cursor.seq })
}

/// The last word of the server. `cursor` goes on without a gap; none while a `from=state` snapshot is incomplete.
pub fn closed(problem: Problem, cursor: Option<Cursor>) -> Bytes {
    frame(SSE_CLOSED, cursor, &problem)
}

/// JSON has no raw line break, so one `data:` line is enough.
fn frame(name: &str, id: Option<Cursor>, data: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(data).unwrap_or_else(|_| "null".to_owned());
    let id = id.map(|cursor| format!("id: {cursor}\n")).unwrap_or_default();
    Bytes::from(format!("{id}event: {name}\ndata: {data}\n\n"))
}
