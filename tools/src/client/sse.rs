//! Server-Sent Events, from bytes to events. Pure; lengths are bounded.

use thiserror::Error;

/// Longest line or event. A batch has at most 1 MiB of bincode; its JSON may be a few times as long.
const EVENT_MAX_BYTES: usize = 8 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SseEvent {
    /// `message` when the server named none.
    pub name: String,
    pub data: String,
    /// The last id seen so far, as the standard has it.
    pub id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SseError {
    #[error("an event is longer than {EVENT_MAX_BYTES} bytes")]
    TooLong,
    #[error("an event is not UTF-8")]
    NotUtf8,
}

#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed that follows belongs to it.
    after_cr: bool,
    name: String,
    data: Option<String>,
    id: Option<String>,
}

impl SseParser {
    /// Takes bytes as they come and adds the events that they complete to `events`.
    pub fn push(&mut self, bytes: &[u8], events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        for byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, *byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => self.end_line(events)?,
                byte => {
                    if self.line.len() >= EVENT_MAX_BYTES {
                        return Err(SseError::TooLong);
                    }
                    self.line.push(*byte);
                }
            }
        }
        Ok(())
    }

    fn end_line(&mut self, events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        let line = String::from_utf8(std::mem::take(&mut self.line)).map_err(|_| SseError::NotUtf8)?;
        if line.is_empty() {
            events.extend(self.end_event());
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.to_owned(),
            "data" => match &mut self.data {
                Some(data) if data.len() + value.len() > EVENT_MAX_BYTES => return Err(SseError::TooLong),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            "id" => self.id = Some(value.to_owned()),
            // A comment (empty field), `retry`, or something newer than this reader.
            _ => {}
        }
        Ok(())
    }

    fn end_event(&mut self) -> Option<SseEvent> {
        let name = std::mem::take(&mut self.name);
        let data = self.data.take()?;
        let name = if name.is_empty() { "message".to_owned() } else { name };
        Some(SseEvent { name, data, id: self.id.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&[u8]]) -> Result<Vec<SseEvent>, SseError> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for chunk in chunks {
            parser.push(chunk, &mut events)?;
        }
        Ok(events)
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let text = "id: a\nevent: event\ndata: {\"x\":\ndata: 1}\n\n: keep-alive\n\nevent:bookmark\r\ndata:ü\r\n\r\n"
            .as_bytes();
        let whole = parse(&[text]).unwrap();
        assert_eq!(whole.len(), 2);
        assert_eq!((whole[0].name.as_str(), whole[0].data.as_str()), ("event", "{\"x\":\n1}"));
        assert_eq!((whole[1].name.as_str(), whole[1].data.as_str()), ("bookmark", "ü"));
        assert_eq!(whole[1].id.as_deref(), Some("a"));
        for cut in 0..text.len() {
            assert_eq!(parse(&[&text[..cut], &text[cut..]]).unwrap(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn an_event_that_is_not_finished_is_not_delivered() {
        assert_eq!(parse(&[b"data: 1\n"]).unwrap(), []);
        assert_eq!(parse(&[b"event: x\n\n"]).unwrap(), []);
    }

    #[test]
    fn a_line_without_end_is_refused_instead_of_filling_memory() {
        let mut parser = SseParser::default();
        let megabyte = vec![b'x'; 1 << 20];
        let refused = (0..9).find_map(|_| parser.push(&megabyte, &mut Vec::new()).err());
        assert_eq!(refused, Some(SseError::TooLong));
        assert_eq!(parse(&[b"data: \xff\n"]), Err(SseError::NotUtf8));
    }
}
