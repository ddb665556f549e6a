//! The store of a host that goes on alone after the majority of the voters was lost for good ([`crate::recover`]).
//!
//! Everything in its own log counts from here on: what a majority had acknowledged is at worst what this host never received,
//! and what it received and nobody acknowledged was never refused to anybody either. The membership becomes this host, as
//! if an entry had said so; the log is empty behind a snapshot that says where it ended.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use openraft::storage::RaftLogStorage;
use openraft::vote::RaftLeaderId;
use statemachine::Fold;
use statemachine::HostId;

use super::Store;
use super::StoreError;
use crate::types::LogId;
use crate::types::Membership;
use crate::types::PeerAddress;
use crate::types::StoredMembership;
use crate::types::TypeConfig;
use crate::types::Vote;

impl Store {
    /// What this host would go on with: its snapshot and every entry of its own log, applied.
    pub async fn apply_whole_log(&mut self) -> Result<Arc<Fold>, StoreError> {
        let log = self.log.reader();
        let Some(last) = log.last() else { return Ok(self.fold.borrow().clone()) };
        let mut next = self.state_machine.applied.last_applied.map_or(0, |applied| applied.index + 1);
        while next <= last.index {
            let entries = log.read_some(next, last.index + 1).await.map_err(StoreError::Log)?;
            let Some(end) = entries.last().map(|entry| entry.log_id.index) else { break };
            for entry in &entries {
                self.state_machine.apply_entry(entry).await?;
            }
            next = end + 1;
        }
        Ok(Arc::new(self.state_machine.applied.fold.clone()))
    }

    /// Makes `host` the only member, for good. Durable when it returns; a power cut before leaves what was there.
    pub async fn go_on_alone(mut self, host: HostId, address: String) -> Result<(), StoreError> {
        self.apply_whole_log().await?;
        // A host that pulled has no log, so it begins one.
        let last = self.state_machine.applied.last_applied.unwrap_or_else(|| LogId::new_term_index(1, 1));
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
        let closing = self.closing.clone();
        drop(self);
        closing.closed().await;
        Ok(())
    }

    /// Lets go of the directory.
    pub async fn close(self) {
        let closing = self.closing.clone();
        drop(self);
        closing.closed().await;
    }
}
