//! Events as lines: they arrive one by one, so their columns have fixed widths.

use std::collections::BTreeMap;

use hostd_api::event::EventView;
use hostd_api::event::StateItem;
use serde::Serialize;
use serde_json::Value;

use super::fields::moment;
use super::table::printable;
use crate::args::Format;
use crate::exit::Failure;

/// Longest summary of an event's fields.
const SUMMARY_MAX_CHARS: usize = 160;
/// First characters of a hash: enough to compare by eye. JSON has all of it.
const HASH_SHOWN: usize = 12;

/// Names of the entities that a reader meets: `vm/<id>` as `vm/web1`.
#[derive(Debug, Default)]
pub struct Names(BTreeMap<String, String>);

impl Names {
    pub fn learn(&mut self, entity: String, name: &str) {
        let Some((kind, _)) = entity.split_once('/') else { return };
        let named = format!("{kind}/{name}");
        self.0.insert(entity, named);
    }

    /// The entity's id form of what a person typed: `vm/web1` or `vm/<id>`.
    pub fn entity<'a>(&'a self, typed: &'a str) -> &'a str {
        self.0.iter().find(|(_, named)| *named == typed).map_or(typed, |(entity, _)| entity)
    }

    fn of<'a>(&'a self, entity: &'a str) -> &'a str {
        self.0.get(entity).map_or(entity, String::as_str)
    }

    /// `root@host/7` as `root@n2`.
    fn actor(&self, actor: &str) -> String {
        let (role, entity) = match actor.split_once('@') {
            Some((role, entity)) => (format!("{role}@"), entity),
            None => (String::new(), actor),
        };
        let named = self.of(entity);
        match role.is_empty() {
            true => named.to_owned(),
            false => format!("{role}{}", named.strip_prefix("host/").unwrap_or(named)),
        }
    }

    /// A stream tells the names of what it creates.
    fn learn_from(&mut self, event: &EventView) {
        let name = match event.kind.as_str() {
            "SiteInitialised" | "DataCenterCreated" | "ClusterCreated" | "VmDefined" | "VmRenamed" => {
                event.data.get("name")
            }
            "HostJoined" => event.data.get("candidate").and_then(|candidate| candidate.get("name")),
            _ => None,
        };
        if let (Some(Value::String(name)), Some(entity)) = (name, event.entities.first()) {
            self.learn(entity.clone(), name);
        }
    }
}

/// Turns what the stream brings into text.
pub struct EventLines {
    format: Format,
    names: Names,
    header_due: bool,
}

impl EventLines {
    pub fn new(format: Format, names: Names) -> EventLines {
        EventLines { format, names, header_due: format == Format::Table }
    }

    pub fn event(&mut self, event: &EventView) -> Result<String, Failure> {
        self.names.learn_from(event);
        match self.format {
            Format::Table => {
                let entities: Vec<&str> = event.entities.iter().map(|entity| self.names.of(entity)).collect();
                let line = line(
                    &event.seq.to_string(),
                    &moment(event.at),
                    &event.kind,
                    &entities.join(","),
                    &self.names.actor(&event.actor),
                    &summary(&event.data, &event.entities),
                );
                Ok(self.with_header(line))
            }
            format => record(format, event),
        }
    }

    pub fn state(&mut self, item: &StateItem) -> Result<String, Failure> {
        if let Some(Value::String(name)) = item.data.get("name") {
            self.names.learn(item.entity.clone(), name);
        }
        match self.format {
            Format::Table => {
                let entity = self.names.of(&item.entity).to_owned();
                let shown = summary(&item.data, std::slice::from_ref(&item.entity));
                let line = line(&item.seq.to_string(), "state", &item.kind, &entity, "-", &shown);
                Ok(self.with_header(line))
            }
            format => record(format, item),
        }
    }

    fn with_header(&mut self, text: String) -> String {
        match std::mem::take(&mut self.header_due) {
            true => line("SEQ", "TIME", "KIND", "ABOUT", "ACTOR", "WHAT") + &text,
            false => text,
        }
    }
}

fn line(seq: &str, at: &str, kind: &str, entities: &str, actor: &str, what: &str) -> String {
    let line = format!("{seq:<7} {at:<19} {kind:<22} {entities:<24} {actor:<14} {what}");
    format!("{}\n", printable(line.trim_end()))
}

/// One document a record: JSON Lines, or a YAML stream.
fn record(format: Format, value: &impl Serialize) -> Result<String, Failure> {
    let text = match format {
        Format::Yaml => serde_norway::to_string(value).map(|text| format!("---\n{text}")).map_err(|e| e.to_string()),
        _ => serde_json::to_string(value).map(|text| text + "\n").map_err(|e| e.to_string()),
    };
    text.map_err(|why| Failure::Local(format!("the event cannot be written: {why}")))
}

/// The fields that tell something beside the entities: plain ones first, one level down.
fn summary(data: &Value, entities: &[String]) -> String {
    let mut parts = Vec::new();
    collect(&mut parts, "", data, entities, 0);
    let text = parts.join(" ");
    match text.char_indices().nth(SUMMARY_MAX_CHARS) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// A stamp of the log as a moment; durations are too small to be one.
fn point_in_time(ms: Option<u64>) -> Option<String> {
    const YEAR_2001_MS: u64 = 1_000_000_000_000;
    ms.filter(|ms| *ms > YEAR_2001_MS).map(|ms| moment(hostd_api::time::of_ms(ms)).replace(' ', "T"))
}

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn collect(parts: &mut Vec<String>, prefix: &str, data: &Value, entities: &[String], depth: usize) {
    let Value::Object(fields) = data else { return };
    for (name, value) in fields {
        let value = match value {
            Value::String(text) if text.is_empty() => continue,
            Value::String(text) if text.contains(' ') => format!("{text:?}"),
            Value::String(text) if is_hash(text) => format!("{}..", &text[..HASH_SHOWN]),
            Value::String(text) => text.clone(),
            Value::Number(number) if name.ends_with("_ms") => {
                point_in_time(number.as_u64()).unwrap_or(number.to_string())
            }
            Value::Number(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            Value::Object(_) if depth == 0 => {
                collect(parts, &format!("{name}."), value, entities, depth + 1);
                continue;
            }
            Value::Null | Value::Array(_) | Value::Object(_) => continue,
        };
        // `vm=<id>` and `host=<id>` stand in the column of entities already.
        if prefix.is_empty() && entities.iter().any(|entity| *entity == format!("{name}/{value}")) {
            continue;
        }
        parts.push(format!("{prefix}{name}={value}"));
    }
}
