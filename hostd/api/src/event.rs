//! The event stream of DESIGN §10 as its readers see it: `GET /v1/events`, Server-Sent Events.
//!
//! | SSE `event:` | `data:` | `id:` | meaning |
//! |---|---|---|---|
//! | `event` | [`EventView`] | cursor | something was decided or seen |
//! | `state` | [`StateItem`] | none | `from=state`: one thing as it is at the snapshot's seq |
//! | `synced` | [`Mark`] | cursor | `from=state`: the snapshot is complete, live events follow |
//! | `bookmark` | [`Mark`] | cursor | nothing that you asked for was left out up to here; at least every 5 s |
//! | `end` | [`Mark`] | cursor | `follow=false`: the head at the time of the request is reached |
//! | `closed` | [`crate::Problem`] | cursor | the server ends the stream and says why; its cursor goes on without a gap |
//!
//! A `state` item has no id on purpose: a reader that breaks off before `synced` begins again with `from=state`.

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use serde_json::Value;
use statemachine::Batch;
use statemachine::Event;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::State;
use statemachine::command::Actor;
use thiserror::Error;
use utoipa::IntoParams;
use utoipa::ToSchema;

use crate::cursor::Cursor;
use crate::host::HostView;
use crate::host::SpmView;
use crate::time;
use crate::vm::VmView;

/// A quiet stream says where it is at least this often.
pub const BOOKMARK_EVERY_MS: u64 = 5_000;
/// Most terms in one filter.
pub const FILTER_TERMS_MAX: usize = 64;

pub const SSE_EVENT: &str = "event";
pub const SSE_STATE: &str = "state";
pub const SSE_SYNCED: &str = "synced";
pub const SSE_BOOKMARK: &str = "bookmark";
pub const SSE_END: &str = "end";
pub const SSE_CLOSED: &str = "closed";

/// Query of `GET /v1/events`. The header `Last-Event-ID` counts as `after`, and wins over it: a browser that
/// reconnects repeats its URL. Unknown parameters are refused.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Go on after this cursor. Not together with `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Where to begin without a cursor; `now` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub from: Option<StartFrom>,
    /// Kinds, separated by commas: `VmPermitGranted,VmObservedExit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Entities, separated by commas: `vm/<id>`, `host/<id>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entity: Option<String>,
    /// Actors, separated by commas: `token/<id>`, `root@host/<id>`, `host/<id>`, `duty@host/<id>`, `joiner`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// `false`: end at the head as it was when the request came. Default `true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follow: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartFrom {
    Oldest,
    Now,
    /// Synthetic `state` items for everything that is, then live.
    State,
}

/// One event of one batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventView {
    /// Pass it as `after` to go on behind this event.
    #[schema(value_type = String)]
    pub cursor: Cursor,
    #[schema(value_type = u64)]
    pub seq: Seq,
    /// Index of the event in its batch.
    pub position: u32,
    /// The log's time: it never runs backwards.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    #[schema(example = "VmPermitGranted")]
    pub kind: String,
    /// What it is about: `vm/<id>`, `host/<id>`, ...
    pub entities: Vec<String>,
    /// Who asked: `token/<id>`, `root@host/<id>`, `host/<id>`, `duty@host/<id>`, `joiner`.
    pub actor: String,
    /// The host whose API or agent received the command.
    #[schema(value_type = u64)]
    pub origin: HostId,
    #[schema(value_type = Object)]
    pub data: Value,
}

impl EventView {
    /// All events of a batch, in order.
    pub fn of_batch(site: SiteId, batch: &Batch) -> Vec<EventView> {
        let seq = batch.seq();
        let actor = actor_name(&batch.actor);
        let views = batch.events.iter().zip(0..).map(|(event, position)| EventView {
            cursor: Cursor { site, seq, position },
            seq,
            position,
            at: time::of_ms(batch.stamp.at_ms),
            kind: event.name().to_owned(),
            entities: event.entities(),
            actor: actor.clone(),
            origin: batch.origin,
            data: data_of(event),
        });
        views.collect()
    }
}

/// Who asked, as streams and filters name it.
pub fn actor_name(actor: &Actor) -> String {
    match actor {
        Actor::Root(host) => format!("root@host/{host}"),
        Actor::Token(token) => format!("token/{token}"),
        Actor::Host(host) => format!("host/{host}"),
        Actor::Duty(host) => format!("duty@host/{host}"),
        Actor::Joiner => "joiner".to_owned(),
    }
}

fn data_of(event: &Event) -> Value {
    // Externally tagged: {"VmDefined": {...}}; the name is `kind` already. Encoding a plain enum to a value cannot fail.
    let tagged = serde_json::to_value(event).unwrap_or_default();
    let Value::Object(fields) = tagged else { return Value::Null };
    let mut data = fields.into_iter().next().map(|(_, data)| data).unwrap_or_default();
    if let Value::Object(fields) = &mut data {
        // The hash of a token's secret is of use to nobody who reads the stream.
        fields.remove("secret_hash");
    }
    hashes_to_hex(&mut data);
    data
}

/// 32-byte hashes are arrays of numbers to serde; people compare hexadecimal.
fn hashes_to_hex(value: &mut Value) {
    match value {
        Value::Array(items) => match hash_bytes(items) {
            Some(bytes) => *value = Value::String(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
            None => items.iter_mut().for_each(hashes_to_hex),
        },
        Value::Object(fields) => fields.values_mut().for_each(hashes_to_hex),
        _ => {}
    }
}

fn hash_bytes(items: &[Value]) -> Option<Vec<u8>> {
    if items.len() != 32 {
        return None;
    }
    items.iter().map(|item| item.as_u64().and_then(|number| u8::try_from(number).ok())).collect()
}

/// A thing as it is, for `from=state`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StateItem {
    /// The snapshot's seq, the same for all of its items.
    #[schema(value_type = u64)]
    pub seq: Seq,
    /// `vm/<id>`, `host/<id>`, `data_center/<id>`.
    pub entity: String,
    /// `HostState`, `SpmState`, `VmState`.
    pub kind: String,
    /// As the resource's own `GET` shows it.
    #[schema(value_type = Object)]
    pub data: Value,
}

impl StateItem {
    /// Everything that is, hosts before the VMs that name them.
    pub fn all(state: &State, seq: Seq) -> impl Iterator<Item = StateItem> + '_ {
        let item = move |entity: String, kind: &str, data: serde_json::Result<Value>| StateItem {
            seq,
            entity,
            kind: kind.to_owned(),
            data: data.unwrap_or_default(),
        };
        let hosts = state.hosts.iter().map(move |(id, host)| {
            item(format!("host/{id}"), "HostState", serde_json::to_value(HostView::of(state, *id, host)))
        });
        let spm = SpmView::all(state)
            .into_iter()
            .map(move |spm| item(format!("data_center/{}", spm.data_center), "SpmState", serde_json::to_value(&spm)));
        let vms = state
            .vms
            .iter()
            .map(move |(id, vm)| item(format!("vm/{id}"), "VmState", serde_json::to_value(VmView::of(state, *id, vm))));
        hosts.chain(spm).chain(vms)
    }
}

/// Where the stream is: body of `synced`, `bookmark` and `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mark {
    #[schema(value_type = String)]
    pub cursor: Cursor,
    #[schema(value_type = u64)]
    pub seq: Seq,
}

impl Mark {
    pub fn after(site: SiteId, seq: Seq) -> Mark {
        Mark { cursor: Cursor::after_batch(site, seq), seq }
    }
}

/// What a reader asked for. An empty list asks for everything; an event passes when each list has one of its terms.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventFilter {
    kinds: Vec<String>,
    entities: Vec<String>,
    actors: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FilterError {
    #[error("no event is called {0:?}; `GET /v1/openapi.json` and the manual list the kinds")]
    UnknownKind(String),
    #[error(
        "{0:?} is not an entity; write `vm/<id>`, `host/<id>`, `token/<id>`, `cluster/<id>`, `data_center/<id>` or `site/<id>`"
    )]
    NotAnEntity(String),
    #[error("{0:?} is not an actor; write `root@host/<id>`, `token/<id>`, `host/<id>`, `duty@host/<id>` or `joiner`")]
    NotAnActor(String),
    #[error("the filter has more than {FILTER_TERMS_MAX} terms; ask for less, or filter what arrives")]
    TooMany,
}

impl EventFilter {
    pub fn of(query: &EventsQuery) -> Result<EventFilter, FilterError> {
        let filter =
            EventFilter { kinds: terms(&query.kind)?, entities: terms(&query.entity)?, actors: terms(&query.actor)? };
        let known = |kind: &String| Event::KINDS.iter().any(|(_, name)| name == kind);
        if let Some(kind) = filter.kinds.iter().find(|kind| !known(kind)) {
            return Err(FilterError::UnknownKind(shortened(kind)));
        }
        let entities = ["vm", "host", "token", "cluster", "data_center", "site"];
        if let Some(entity) = filter.entities.iter().find(|term| !is_term_of(term, &entities)) {
            return Err(FilterError::NotAnEntity(shortened(entity)));
        }
        let actors = ["root@host", "token", "host", "duty@host"];
        if let Some(actor) = filter.actors.iter().find(|term| *term != "joiner" && !is_term_of(term, &actors)) {
            return Err(FilterError::NotAnActor(shortened(actor)));
        }
        Ok(filter)
    }

    pub fn is_everything(&self) -> bool {
        self.kinds.is_empty() && self.entities.is_empty() && self.actors.is_empty()
    }

    pub fn passes(&self, event: &EventView) -> bool {
        let has = |asked: &[String], term: &String| asked.is_empty() || asked.contains(term);
        has(&self.kinds, &event.kind)
            && has(&self.actors, &event.actor)
            && (self.entities.is_empty() || event.entities.iter().any(|entity| self.entities.contains(entity)))
    }

    /// State items have neither an actor nor an event's kind: only entities choose among them.
    pub fn passes_state(&self, item: &StateItem) -> bool {
        self.entities.is_empty() || self.entities.contains(&item.entity)
    }
}

fn terms(list: &Option<String>) -> Result<Vec<String>, FilterError> {
    let Some(list) = list else { return Ok(Vec::new()) };
    let terms: Vec<String> = list
        .split(',')
        .map(str::trim)
        .filter(|term| !term.is_empty())
        .take(FILTER_TERMS_MAX + 1)
        .map(str::to_owned)
        .collect();
    match terms.len() > FILTER_TERMS_MAX {
        true => Err(FilterError::TooMany),
        false => Ok(terms),
    }
}

fn is_term_of(term: &str, heads: &[&str]) -> bool {
    term.split_once('/').is_some_and(|(head, id)| heads.contains(&head) && !id.is_empty())
}

fn shortened(term: &str) -> String {
    term.chars().take(80).collect()
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
