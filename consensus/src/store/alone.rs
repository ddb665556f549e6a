//! The store of a host that goes on alone after the majority of the voters was lost for good ([`crate::recover`]).
//!
//! Everything in its own log counts from here on: what a majority had acknowledged is at worst what this host never received,
//! and what it received and nobody acknowledged was never refused to anybody either. The membership becomes this host, as
//! if an entry had said so; the log is empty behind a snapshot that says where it ended.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use openraft::storage::RaftLogStorage;
use openraft::vote::RaftLeaderId;
use serde::Serialize;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::fold::Applied;

use super::Store;
use super::StoreError;
use crate::types::Entry;
use crate::types::LogId;
use crate::types::Membership;
use crate::types::Payload;
use crate::types::PeerAddress;
use crate::types::StoredMembership;
use crate::types::TypeConfig;
use crate::types::Vote;

const READ_BATCHES: usize = 4096;
const READ_BYTES: usize = 4 << 20;

/// How far a host's log goes: of two members, the one whose last entry has the higher term, then the higher index, has everything
/// that was acknowledged and that the other has (Raft's election restriction).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LastEntry {
    pub term: u64,
    pub index: u64,
}

/// What a host would go on with.
pub struct Whole {
    pub fold: Fold,
    /// `None` on a host that pulled: all that it has was committed.
    pub last: Option<LastEntry>,
}

impl Store {
    /// Folds everything that is here, and changes nothing: the snapshot, the events behind it that are sealed already (they were
    /// committed, or would not be sealed), and every entry of the own log.
    pub async fn whole(&self) -> Result<Whole, StoreError> {
        let mut fold = self.fold_sealed().await?;
        self.each_entry(async |entry| {
            if let Payload::Normal(proposal) = &entry.payload {
                for sealed in proposal.batches.iter() {
                    fold.apply_sealed(sealed)?;
                }
            }
            Ok(())
        })
        .await?;
        let last = self.last_entry().map(|last| LastEntry { term: last.leader_id.term, index: last.index });
        Ok(Whole { fold, last })
    }

    fn last_entry(&self) -> Option<LogId> {
        self.log.reader().last().max(self.state_machine.applied.last_applied)
    }

    async fn fold_sealed(&self) -> Result<Fold, StoreError> {
        let mut fold = self.state_machine.applied.fold.clone();
        loop {
            let (segments, after) = (self.state_machine.segments.clone(), fold.head.seq);
            let read = move || segments.read_sealed(after, READ_BATCHES, READ_BYTES);
            let batches = self.state_machine.platform.on_disk(read).await.ok_or(StoreError::ShuttingDown)??;
            if batches.is_empty() {
                return Ok(fold);
            }
            for batch in batches {
                if fold.apply_sealed(&batch.sealed)? == Applied::Superseded {
                    let why = format!("event {} does not follow the snapshot of this host", batch.seq);
                    return Err(StoreError::CannotRebuild { why });
                }
            }
        }
    }

    async fn each_entry(&self, mut act: impl AsyncFnMut(&Entry) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let log = self.log.reader();
        let Some(last) = log.last() else { return Ok(()) };
        let mut next = self.state_machine.applied.last_applied.map_or(0, |applied| applied.index + 1);
        while next <= last.index {
            let entries = log.read_some(next, last.index + 1).await.map_err(StoreError::Log)?;
            let Some(end) = entries.last().map(|entry| entry.log_id.index) else { break };
            for entry in &entries {
                act(entry).await?;
            }
            next = end + 1;
        }
        Ok(())
    }

    /// Makes `host` the only member, for good. Durable when it returns; a power cut before leaves what was there.
    pub async fn go_on_alone(mut self, host: HostId, address: String) -> Result<(), StoreError> {
        // A host that pulled has no log, so it begins one.
        let last = self.last_entry().unwrap_or_else(|| LogId::new_term_index(1, 1));
        self.state_machine.applied.fold = self.fold_sealed().await?;
        let mut entries = Vec::new();
        self.each_entry(async |entry| {
            entries.push(entry.clone());
            Ok(())
        })
        .await?;
        for entry in &entries {
            self.state_machine.apply_entry(entry).await?;
        }
        let nodes = BTreeMap::from([(host.0, PeerAddress { address })]);
        let membership = Membership::new(vec![BTreeSet::from([host.0])], nodes);
        let membership = membership.map_err(|error| StoreError::CannotRebuild { why: error.to_string() })?;
        self.state_machine.applied.last_applied = Some(last);
        self.state_machine.applied.membership = StoredMembership::new(Some(last), membership);
        if self.log.reader().vote().is_none_or(|vote| vote.leader_id.to_committed() < last.leader_id) {
            let vote = Vote::new(last.leader_id.term, host.0);
            RaftLogStorage::<TypeConfig>::save_vote(&mut self.log, &vote).await.map_err(StoreError::Log)?;
        }
        self.state_machine.build().await?;
        // The snapshot counts from here on, and covers all of the log.
        RaftLogStorage::<TypeConfig>::purge(&mut self.log, last).await.map_err(StoreError::Log)?;
        self.close().await;
        Ok(())
    }

    /// Lets go of the directory.
    pub async fn close(self) {
        let closing = self.closing.clone();
        drop(self);
        closing.closed().await;
    }
}
