//! A guest that was saved once, in parts; frames with right checksums; and one value in a state that is another one.

use std::sync::OnceLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use vmm::machine::layout::Layout;
use vmm::saved::frame::FrameWriter;
use vmm::saved::header::Header;
use vmm::saved::header::Here;
use vmm::saved::payload::Payload;
use vmm::saved::stream::GuestReader;
use vmm::saved::stream::Item;

use crate::fields::Fields;

/// Smaller than any guest, so that all of it can be compared.
pub const MEMORY_BYTES: u64 = 256 << 10;

/// The fixture with every device that the vmm's own tests read.
static FILE: &[u8] = include_bytes!("../../vmm/tests/fixtures/saved/format-1.saved");

pub struct Fixture {
    /// Of a guest with less memory.
    pub header: Header,
    pub payloads: Vec<Payload>,
}

pub fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let (mut header, mut reader) = GuestReader::start(FILE).expect("a saved guest");
        reader.accept(&layout(&header));
        let mut payloads = Vec::new();
        loop {
            match reader.item().expect("a saved guest") {
                Item::State(payload) => payloads.push(payload),
                Item::End => break,
                _ => {}
            }
        }
        header.shape.memory_bytes = MEMORY_BYTES;
        header.shape.max_memory_bytes = MEMORY_BYTES;
        Fixture { header, payloads }
    })
}

pub fn layout(header: &Header) -> Layout {
    Layout::new(header.shape.memory_bytes, header.shape.max_memory_bytes)
}

/// A host on which the fixture's guest can run.
pub fn here() -> Here {
    let Header { shape, host, cpuid, tsc_khz, .. } = fixture().header.clone();
    Here { shape, host, cpuid, tsc_khz, scales_tsc: false }
}

/// The first bytes of a stream.
pub fn preamble() -> Vec<u8> {
    FrameWriter::new(Vec::new()).expect("memory takes it").into_inner()
}

/// A frame of any kind and body, with the right checksum.
pub fn frame(kind: u32, sequence: u32, body: &[u8]) -> Vec<u8> {
    frame_of(kind, sequence, body, &[])
}

/// A frame of pages with right checksums.
pub fn pages_frame(sequence: u32, run: [u64; 2], pages: &[u8]) -> Vec<u8> {
    let sum = xxhash_rust::xxh64::xxh64(pages, 0);
    let head: Vec<u8> = [run[0], run[1], sum].into_iter().flat_map(u64::to_le_bytes).collect();
    frame_of(6, sequence, &head, pages)
}

/// The frame's sum covers the body, and not the rest behind it.
fn frame_of(kind: u32, sequence: u32, body: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(kind.to_le_bytes());
    frame.extend(sequence.to_le_bytes());
    frame.extend(((body.len() + rest.len()) as u32).to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&frame), body);
    frame.extend(sum.to_le_bytes());
    frame.extend(body);
    frame.extend(rest);
    frame
}

/// Changes one value, wherever it is in a state: which, how, and to what.
pub fn change(state: &mut Value, mut fields: Fields) {
    let number = fields.u16();
    let how = fields.u8();
    let places = count(state, how).max(1);
    let mut place = usize::from(number) % places;
    if let Some(value) = nth(state, how, &mut place) {
        change_value(value, how, fields);
    }
}

/// Whether a value can be changed in this way. Lists are few among what they hold.
fn fits(value: &Value, how: u8) -> bool {
    match how % 16 {
        0..4 => value.is_number() || value.is_string(),
        8 | 9 => value.is_array(),
        10 => value.is_object(),
        11 => value.is_string(),
        _ => true,
    }
}

/// Of a value, and all those in it, those that can be changed in this way.
fn count(value: &Value, how: u8) -> usize {
    let inner: usize = match value {
        Value::Array(values) => values.iter().map(|value| count(value, how)).sum(),
        Value::Object(values) => values.values().map(|value| count(value, how)).sum(),
        _ => 0,
    };
    inner + usize::from(fits(value, how))
}

fn nth<'a>(value: &'a mut Value, how: u8, place: &mut usize) -> Option<&'a mut Value> {
    if fits(value, how) {
        if *place == 0 {
            return Some(value);
        }
        *place -= 1;
    }
    match value {
        Value::Array(values) => values.iter_mut().find_map(|value| nth(value, how, place)),
        Value::Object(values) => values.values_mut().find_map(|value| nth(value, how, place)),
        _ => None,
    }
}

fn change_value(value: &mut Value, how: u8, mut fields: Fields) {
    match (how % 16, &mut *value) {
        // A number near the one that is there, and the ends of numbers.
        (0..4, Value::Number(number)) => {
            let by = i64::from(fields.u8() as i8);
            *value = number.as_i64().map_or(Value::from(by), |number| Value::from(number.wrapping_add(by)));
        }
        (4, _) => *value = Value::from(fields.u64()),
        (5, _) => *value = Value::from(fields.u64() as i64),
        (6, _) => *value = Value::from(1u64 << (fields.u8() % 64)),
        (7, _) => *value = Value::from(u64::MAX >> (fields.u8() % 64)),
        (8, Value::Array(values)) => {
            let count = usize::from(fields.u16()).min(4096);
            let last = values.last().cloned().unwrap_or(Value::from(0));
            values.resize(count, last);
        }
        (9, Value::Array(values)) if !values.is_empty() => {
            let (from, to) = (usize::from(fields.u8()) % values.len(), usize::from(fields.u8()) % values.len());
            values[to] = values[from].clone();
        }
        (10, Value::Object(values)) => {
            let key = values.keys().nth(usize::from(fields.u8()) % values.len().max(1)).cloned();
            key.map(|key| values.remove(&key));
        }
        // Bytes as text: those that are there, with others in their place.
        (0..12, Value::String(text)) => {
            let mut bytes = STANDARD.decode(&*text).unwrap_or_default();
            let at = usize::from(fields.u16());
            for (byte, new) in bytes.iter_mut().skip(at).zip(fields.rest()) {
                *byte = *new;
            }
            *text = STANDARD.encode(bytes);
        }
        (12, _) => *value = Value::Bool(fields.u8() & 1 != 0),
        (13, _) => *value = Value::Null,
        (14, _) => *value = Value::from(String::from_utf8_lossy(fields.rest()).into_owned()),
        _ => {
            if let Ok(other) = serde_json::from_slice(fields.rest()) {
                *value = other;
            }
        }
    }
}
