//! One reader's place in the log: rendered batches in, frames that pass and a cursor out. Pure.

use axum::body::Bytes;
use hostd_api::Cursor;
use hostd_api::event::EventFilter;
use hostd_api::event::StateItem;
use statemachine::Fold;
use statemachine::Seq;

use super::frame;
use super::rendered::RenderedBatch;

pub struct Reader {
    /// Everything up to here was framed, or did not pass the filter.
    cursor: Cursor,
    filter: EventFilter,
}

/// A frame, and where the reader stands once it has it.
pub struct Framed {
    pub bytes: Bytes,
    pub cursor: Cursor,
}

impl Reader {
    pub fn new(after: Cursor, filter: EventFilter) -> Reader {
        Reader { cursor: after, filter }
    }

    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Where to read on in the log: a cursor inside a batch needs that batch again.
    pub fn read_after(&self) -> Seq {
        match self.cursor.position {
            Cursor::WHOLE_BATCH => self.cursor.seq,
            _ => Seq(self.cursor.seq.0.saturating_sub(1)),
        }
    }

    /// Frames of a batch that pass. The reader stands behind the batch afterwards, whatever passed.
    pub fn take(&mut self, batch: &RenderedBatch) -> Vec<Framed> {
        let wanted = batch.events.iter().filter(|event| self.cursor.precedes(event.view.seq, event.view.position));
        let passing = wanted.filter(|event| self.filter.passes(&event.view));
        let framed = passing.map(|event| Framed { bytes: event.frame.clone(), cursor: event.view.cursor }).collect();
        self.cursor = self.cursor.max(Cursor::after_batch(self.cursor.site, batch.seq));
        framed
    }

    /// Items of the state that pass, for `from=state`.
    pub fn snapshot<'a>(&'a self, fold: &'a Fold) -> impl Iterator<Item = Bytes> + 'a {
        let items = StateItem::all(&fold.state, fold.head.seq);
        items.filter(|item| self.filter.passes_state(item)).map(|item| frame::state(&item))
    }
}
