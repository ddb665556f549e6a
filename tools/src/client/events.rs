//! The event stream, resumed by its cursor: a lost connection, a restarted host or a slow reader leaves no gap.

use std::collections::VecDeque;
use std::time::Duration;

use hostd_api::Cursor;
use hostd_api::Problem;
use hostd_api::event;
use hostd_api::event::EventView;
use hostd_api::event::EventsQuery;
use hostd_api::event::Mark;
use hostd_api::event::StartFrom;
use hostd_api::event::StateItem;
use hostd_api::problem::Code;
use reqwest::Method;
use reqwest::Response;
use reqwest::header;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::Client;
use super::ClientError;
use super::sse::SseEvent;
use super::sse::SseParser;

/// Three bookmarks missed: the connection is dead, whatever TCP thinks.
const SILENCE_MAX: Duration = Duration::from_millis(3 * event::BOOKMARK_EVERY_MS);
/// How long a reader that follows tries to come back.
const RECONNECT_FOR: Duration = Duration::from_secs(60);
const RECONNECT_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, PartialEq)]
pub enum StreamItem {
    Event(Box<EventView>),
    State(Box<StateItem>),
    Synced(Mark),
    Bookmark(Mark),
    /// The last item when `follow` is false.
    End(Mark),
}

#[derive(Debug)]
pub struct EventStream<'a> {
    client: &'a Client,
    query: EventsQuery,
    response: Option<Response>,
    whom: String,
    parser: SseParser,
    /// What arrived and was not taken yet. An error waits for its turn: a stream is taken up again behind the last item that was
    /// delivered, so what arrived before the error must have been.
    ready: VecDeque<Result<StreamItem, ClientError>>,
    /// Behind the last item that was taken out.
    cursor: Option<Cursor>,
    ended: bool,
}

impl Client {
    /// Opens the stream; an error here is a refusal of the query, or no connection.
    pub async fn events(&self, query: EventsQuery) -> Result<EventStream<'_>, ClientError> {
        let mut stream = EventStream {
            client: self,
            query,
            response: None,
            whom: String::new(),
            parser: SseParser::default(),
            ready: VecDeque::new(),
            cursor: None,
            ended: false,
        };
        stream.connect().await?;
        Ok(stream)
    }
}

impl EventStream<'_> {
    /// Where a new stream would go on without a gap.
    pub fn cursor(&self) -> Option<Cursor> {
        self.cursor
    }

    /// The next item; `None` behind [`StreamItem::End`].
    pub async fn next(&mut self) -> Result<Option<StreamItem>, ClientError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            match self.ready.pop_front() {
                Some(Ok(item)) => {
                    self.remember(&item);
                    return Ok(Some(item));
                }
                Some(Err(error)) if error.is_transient() => self.come_back(error).await?,
                Some(Err(error)) => return Err(error),
                None => {
                    if let Err(error) = self.receive().await {
                        self.ready.push_back(Err(error));
                    }
                }
            }
        }
    }

    fn remember(&mut self, item: &StreamItem) {
        match item {
            StreamItem::Event(event) => self.cursor = Some(event.cursor),
            StreamItem::State(_) => {}
            StreamItem::Synced(mark) | StreamItem::Bookmark(mark) => self.cursor = Some(mark.cursor),
            StreamItem::End(mark) => {
                self.cursor = Some(mark.cursor);
                self.ended = true;
            }
        }
    }

    async fn receive(&mut self) -> Result<(), ClientError> {
        let broken = |whom: &str, why: &str| ClientError::Broken { whom: whom.to_owned(), why: why.to_owned() };
        let Some(response) = &mut self.response else {
            return Err(broken(&self.whom, "the stream ended"));
        };
        let chunk = match tokio::time::timeout(SILENCE_MAX, response.chunk()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => return Err(broken(&self.whom, "the stream ended")),
            Ok(Err(error)) => return Err(broken(&self.whom, &error.to_string())),
            Err(_) => return Err(broken(&self.whom, "the stream fell silent")),
        };
        let mut events = Vec::new();
        self.parser.push(&chunk, &mut events).map_err(|error| ClientError::Stream { why: error.to_string() })?;
        for event in &events {
            self.ready.extend(item_of(event).transpose());
        }
        Ok(())
    }

    /// Opens the stream again behind the last item. `lost` is the answer if that is not possible.
    async fn come_back(&mut self, lost: ClientError) -> Result<(), ClientError> {
        let knows_its_place = self.query.after.is_some() || self.query.from == Some(StartFrom::Oldest);
        if self.cursor.is_none() && !knows_its_place {
            // `now` would be a later now, and `state` another state: a gap, or everything twice.
            return Err(match self.query.from {
                Some(StartFrom::State) => ClientError::StateBrokenOff { whom: self.whom.clone() },
                _ => lost,
            });
        }
        self.response = None;
        self.ready.clear();
        let deadline = Instant::now() + RECONNECT_FOR;
        loop {
            match self.connect().await {
                Ok(()) => return Ok(()),
                Err(error) if !error.is_transient() && !error.is_unreachable() => return Err(error),
                Err(_) if Instant::now() > deadline => return Err(lost),
                Err(_) => tokio::time::sleep(RECONNECT_EVERY).await,
            }
        }
    }

    async fn connect(&mut self) -> Result<(), ClientError> {
        if let Some(cursor) = self.cursor {
            self.query.after = Some(cursor.to_string());
            self.query.from = None;
        }
        let query = &self.query;
        let open = self.client.send(|endpoint| {
            endpoint.request(Method::GET, &["v1", "events"]).query(query).header(header::ACCEPT, "text/event-stream")
        });
        let (endpoint, response) = match tokio::time::timeout(SILENCE_MAX, open).await {
            Ok(opened) => opened?,
            Err(_) => {
                return Err(ClientError::Broken { whom: self.whom.clone(), why: "no answer in time".to_owned() });
            }
        };
        self.whom = endpoint.to_string();
        self.response = Some(response);
        self.parser = SseParser::default();
        Ok(())
    }
}

fn item_of(event: &SseEvent) -> Result<Option<StreamItem>, ClientError> {
    Ok(match event.name.as_str() {
        event::SSE_EVENT => Some(StreamItem::Event(Box::new(body(event)?))),
        event::SSE_STATE => Some(StreamItem::State(Box::new(body(event)?))),
        event::SSE_SYNCED => Some(StreamItem::Synced(body(event)?)),
        event::SSE_BOOKMARK => Some(StreamItem::Bookmark(body(event)?)),
        event::SSE_END => Some(StreamItem::End(body(event)?)),
        event::SSE_CLOSED => {
            let problem: Problem = body(event)?;
            // Too slow, or a host that stops: the same stream goes on elsewhere, behind the last item.
            let goes_on = problem.is(Code::Overflow) || problem.is_transient();
            return Err(match goes_on {
                true => ClientError::Broken { whom: "the stream".to_owned(), why: problem.sentence() },
                false => ClientError::Problem(Box::new(problem)),
            });
        }
        // Kinds of a newer version: skipped, as their cursors are covered by those that follow.
        _ => None,
    })
}

fn body<T: DeserializeOwned>(event: &SseEvent) -> Result<T, ClientError> {
    serde_json::from_str(&event.data)
        .map_err(|error| ClientError::Stream { why: format!("{} item: {error}", event.name) })
}
