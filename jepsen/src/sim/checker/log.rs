//! The one log: every host's copy of it, who leads it, and what is kept of it on disk.

use consensus::decider::Leadership;
use futures::FutureExt;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::batch::Batch;
use statemachine::fold::Applied;
use statemachine::invariants;
use statemachine::state::Liveness;

use super::Checker;
use super::Place;
use super::Seen;
use crate::sim::coverage::Met;
use crate::sim::host::Host;
use crate::sim::host::SimNode;

/// Batches taken from a host at a time.
pub(super) const READ_BATCHES: usize = 256;
pub(super) const READ_BYTES: usize = 4 << 20;
/// States that are kept, for answers that rest on them.
const RECENT: usize = 512;

impl Checker {
    pub(super) fn look_at_log(&mut self, host: &Host) {
        let (Some(process), Some(hostd)) = (&host.process, host.hostd()) else { return };
        let seen = self.seen.entry(host.id).or_default();
        if seen.life != process.life.number {
            // Volatile things of the life before.
            *seen = Seen {
                life: process.life.number,
                unreachable_since_ms: seen.unreachable_since_ms,
                unreachable: std::mem::take(&mut seen.unreachable),
                ..Seen::default()
            };
        }
        let fold = hostd.node.fold();
        if fold.head.seq != seen.head {
            seen.head = fold.head.seq;
            self.follow(&hostd.node, host.id);
            self.agrees(host.id, &fold);
        }
    }

    /// Extends the one true log by what this host has applied.
    fn follow(&mut self, node: &SimNode, host: HostId) {
        while self.fold.head.seq < node.fold().head.seq {
            let read = node.events().read(self.fold.head.seq, READ_BATCHES, READ_BYTES).now_or_never();
            let batches = match read {
                Some(Ok(batches)) => batches,
                other => {
                    let what = format!("host {host} does not serve what follows {}: {other:?}", self.fold.head.seq);
                    return self.violate("E1", what);
                }
            };
            if batches.is_empty() {
                return self.violate("E1", format!("host {host} serves nothing after {}", self.fold.head.seq));
            }
            for stored in batches {
                let Ok(batch) = stored.sealed.open() else {
                    return self.violate("E1", format!("batch {} of host {host} does not decode", stored.seq));
                };
                let before = self.fold.state.clone();
                match self.fold.apply_sealed(&stored.sealed) {
                    Ok(Applied::Applied(seq)) if seq == stored.seq => {}
                    other => {
                        return self
                            .violate("E1", format!("batch {} of host {host} does not follow: {other:?}", stored.seq));
                    }
                }
                self.take(&batch, &before);
                if self.violation.is_some() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, batch: &Batch, before: &statemachine::state::State) {
        let seq = self.fold.head.seq;
        self.places.push(Place { hash: self.fold.head.hash, digest: self.fold.state.digest() });
        let mut found = invariants::check_step(before, &self.fold.state);
        found.extend(invariants::check(&self.fold.state));
        if let Some(broken) = found.into_iter().next() {
            self.violate(broken.invariant, format!("by batch {seq}: {}", broken.what));
        }
        self.heads.push((self.now_ms, seq));
        self.recent.push_back(self.fold.clone());
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        if let Some(key) = &batch.idempotency {
            self.keys.insert(seq, key.key.clone());
        }
        if let Some(key) = self.unproven.remove(&seq) {
            self.proven(seq, &key);
        }
        let now_ms = self.now_ms;
        for (id, host) in self.fold.state.hosts.iter() {
            let lost = host.liveness == Liveness::Unreachable;
            let seen = self.seen.entry(*id).or_default();
            if !lost {
                seen.unreachable_since_ms = None;
                if let Some((_, end @ None)) = seen.unreachable.last_mut() {
                    *end = Some(seq);
                }
            } else if seen.unreachable_since_ms.is_none() {
                seen.unreachable_since_ms = Some(now_ms);
                seen.unreachable.push((seq, None));
                self.coverage.add(Met::HostsLost, 1);
            }
        }
        let removed = before.removed_hosts.iter().count() < self.fold.state.removed_hosts.iter().count();
        self.coverage.add(Met::HostsRemoved, u64::from(removed));
    }

    /// E2: equal seq, equal chain, equal digest.
    fn agrees(&mut self, host: HostId, fold: &Fold) {
        let Some(place) = self.places.get(fold.head.seq.0 as usize).copied() else { return };
        if place.hash != fold.head.hash {
            self.violate("E2", format!("host {host} has another batch {} than the log", fold.head.seq));
        } else if place.digest != fold.state.digest() {
            self.violate("E2", format!("host {host} has another state at {} than the log", fold.head.seq));
        }
    }

    pub(super) fn look_at_lead(&mut self, host: &Host, node: &SimNode) {
        let Leadership::Leading { session, ready } = *node.leadership().borrow() else { return };
        let metrics = node.metrics();
        if !metrics.is_leader {
            // Deposed in this moment, and its term is already the next one's; the decider has not looked yet.
            return;
        }
        let term = metrics.term;
        let Some(seen) = self.seen.get_mut(&host.id) else { return };
        if session != seen.session {
            let same_term = seen.session != 0 && seen.session_term == term;
            (seen.session, seen.session_term) = (session, term);
            self.coverage.add(if same_term { Met::RefusedProposals } else { Met::LeaderChanges }, 1);
        }
        if !ready {
            return;
        }
        // Standard Raft has one leader a term; and a life never inherits the lead of the one before it (hazard C2).
        let (id, life) = *self.led.entry(term).or_insert((host.id, host.lives));
        if (id, life) != (host.id, host.lives) {
            let what =
                format!("host {} in life {} leads term {term} that host {id} led in life {life}", host.id, host.lives);
            self.violate("C2", what);
        }
    }

    pub(super) fn look_at_store(&mut self, host: HostId, node: &SimNode) {
        let metrics = node.metrics();
        let Some(seen) = self.seen.get_mut(&host) else { return };
        let installs = metrics.disk.snapshots_installed;
        let superseded = metrics.disk.batches_superseded;
        self.coverage.add(Met::SnapshotInstalls, installs.saturating_sub(seen.installs));
        self.coverage.add(Met::SupersededBatches, superseded.saturating_sub(seen.superseded));
        self.coverage.add(Met::Purges, u64::from(metrics.purged_index > seen.purged));
        (seen.installs, seen.superseded, seen.purged) = (installs, superseded, metrics.purged_index);
        let pulled = metrics.disk.batches_pulled;
        self.coverage.add(Met::PulledBatches, pulled.saturating_sub(seen.pulled));
        let taken_in = pulled > 0 && metrics.applied_index > 0;
        self.coverage.add(Met::PullersTakenIn, u64::from(taken_in && !seen.was_taken_in));
        (seen.pulled, seen.was_taken_in) = (pulled, taken_in);
        if metrics.is_leader {
            let voters = node.status().voters;
            if voters != self.members {
                self.members = voters;
                self.coverage.add(Met::MembershipChanges, 1);
            }
        }
    }
}
