//! Taking requests back from the kernel, and making what was written last.

use super::{Engine, Io, Token};

/// The drain's own flush.
pub(super) const DRAIN_FLUSH: Token = 1 << 32;

/// Counts of a drain that is under way.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    pub completed: u64,
    pub cancelled: u64,
    pub(super) flushing: bool,
    pub(super) flush_failed: bool,
}

impl Engine {
    /// Asks the kernel for everything back.
    pub(super) fn cancel(&mut self) {
        let tokens: Vec<Token> = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.as_ref().is_some_and(|p| p.in_flight))
            .map(|(slot, _)| slot as Token)
            .collect();
        if tokens.is_empty() {
            return;
        }
        if let Some(open) = self.open.as_mut()
            && let Err(error) = open.backend.cancel(&tokens)
        {
            tracing::warn!(%error, "the kernel was not asked to cancel");
        }
    }

    /// Begins to take everything back from the kernel. The gate is closed.
    pub fn begin_drain(&mut self) {
        self.draining = Some(Drain::default());
        self.cancel();
        self.go_on_draining();
        self.publish();
    }

    /// When requests are back and dirty pages remain, syncs them: the kernel would write them out later, onto a disk
    /// that may have another writer by then (hazard C8).
    pub(super) fn go_on_draining(&mut self) {
        let Some(drain) = self.draining.as_mut() else {
            return;
        };
        if self.in_flight > 0 || !self.dirty || drain.flushing || drain.flush_failed {
            return;
        }
        let Some(open) = self.open.as_mut() else {
            return;
        };
        // SAFETY: a flush has no buffers.
        let started = unsafe { open.backend.start(DRAIN_FLUSH, Io::Settle) };
        match started.and_then(|()| open.backend.submit()) {
            Ok(()) => {
                drain.flushing = true;
                self.in_flight += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "the drain's flush was not taken");
                drain.flush_failed = true;
            }
        }
    }

    /// The end of the drain: its counts, or `None` while it goes on (or cannot end, because the sync failed).
    pub fn drained(&self) -> Option<Drain> {
        let drain = self.draining?;
        (self.in_flight == 0 && !self.dirty).then_some(drain)
    }
}
