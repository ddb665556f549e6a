//! Answers as people read them, or as programs do.
//!
//! JSON and YAML are the bodies of the API unchanged, so that what is learnt from one holds for the other.

mod events;
mod fields;
mod guest;
mod hosts;
mod site;
mod table;
mod vms;
mod why;

pub use events::EventLines;
pub use events::Names;
pub use site::disagreement;
pub use table::Table;
pub use table::agree;
pub use vms::exit_line;

use std::io;
use std::io::Write;

use serde::Serialize;

use crate::args::Format;
use crate::exit::Failure;

/// What has a form for people.
pub trait Show: Serialize {
    fn table(&self) -> String;
}

/// Prints an answer in the form that was asked for.
pub fn show<T: Show>(format: Format, value: &T) -> Result<(), Failure> {
    match format {
        Format::Table => print(&value.table()),
        _ => document(format, value),
    }
}

/// Prints the answer to a write: a sentence for people, the body for programs.
pub fn done(format: Format, value: &impl Serialize, sentence: &str) -> Result<(), Failure> {
    match format {
        Format::Table => print(&format!("{sentence}\n")),
        _ => document(format, value),
    }
}

fn document(format: Format, value: &impl Serialize) -> Result<(), Failure> {
    let text = match format {
        Format::Yaml => serde_norway::to_string(value).map_err(|error| error.to_string()),
        _ => serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|error| error.to_string()),
    };
    print(&text.map_err(|why| Failure::Local(format!("the answer cannot be written: {why}")))?)
}

pub fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

/// Bytes as they are, at once.
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// The name of an enum's value as the API writes it.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::from("?"),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
