//! The keeper of grants: who may be granted a lease now, and which hosts are silent. Pure; the shell in [`super`] brings
//! heartbeats, rounds, applied state and time.
//!
//! One component owns grants and the loss of hosts (hazard C3). Its rules:
//!
//! - A heartbeat is answered by a ReadIndex round that *started after it arrived* (C4): [`Keeper::begin_round`] takes who
//!   waits, and whoever arrives later waits for the next round.
//! - Before a host's loss is proposed it is in `no_grant`; only an applied `HostRecovered` takes it out. What an applied state
//!   calls unreachable is in `no_grant` for every leader, also one that was elected a moment ago.
//! - A session that is not ready (its barrier is not applied) grants nothing.
//! - Silence counts on this host's monotonic clock, from the last heartbeat or from this leader's own election.
//!
//! The leader's own host has no other way: it sends itself heartbeats.

use std::collections::BTreeMap;
use std::time::Duration;

use statemachine::command::Command;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use statemachine::state::Liveness;

use super::wire::Grant;
use super::wire::Heartbeat;
use super::wire::Refusal;

/// A moment of this host's monotonic clock, counted from the start of the process.
pub type Mono = Duration;

/// After a proposal about a host failed, the next waits this long.
const RETRY: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy)]
pub struct Timers {
    pub suspect: Duration,
    pub lost: Duration,
    /// Rounds start at least this far apart; one serves all that wait.
    pub round_every: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            suspect: Duration::from_secs(5),
            lost: Duration::from_secs(10),
            round_every: Duration::from_millis(250),
        }
    }
}

/// Names a heartbeat that waits, for the shell to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names a ReadIndex round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(pub u64);

/// An answer that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub ticket: Ticket,
    pub outcome: Result<Grant, Refusal>,
}

/// What the leader has to say about a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Word {
    Suspect,
    Lost,
    Recover,
}

impl Word {
    pub fn command(self, host: HostId) -> Command {
        match self {
            Word::Suspect => Command::HostSuspect { host },
            Word::Lost => Command::HostLost { host },
            Word::Recover => Command::HostRecover { host },
        }
    }
}

/// What became of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Decided, and applied here up to this seq.
    Settled(Seq),
    /// Refused, lost or unknown. Whatever is true of it is in the log before the next proposal is decided, because a decider
    /// session that ended begins again with a barrier.
    Unsettled,
}

#[derive(Debug, Clone)]
struct Waiting {
    ticket: Ticket,
    heartbeat: Heartbeat,
}

/// What this session knows of a host.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    heard: Option<Mono>,
    granted: Option<Mono>,
    /// Its loss was proposed in this session and its recovery has not been seen in applied state since.
    condemned: bool,
    in_flight: Option<Word>,
    not_before: Mono,
    /// Its wall clock less the leader's, at the last heartbeat.
    clock_offset_ms: i64,
}

#[derive(Debug, Clone)]
struct Session {
    number: u64,
    ready: bool,
    since: Mono,
    hosts: BTreeMap<HostId, Known>,
    /// At most one a host, so bounded by the hosts that hold a certificate.
    waiting: BTreeMap<HostId, Waiting>,
    /// The round under way, and those that it serves.
    round: Option<(Round, BTreeMap<HostId, Waiting>)>,
    last_round: Option<Mono>,
}

#[derive(Debug, Clone)]
pub struct Keeper {
    timers: Timers,
    session: Option<Session>,
    tickets: u64,
    rounds: u64,
}

/// What a host's lease looks like from the leader, for metrics and status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostLease {
    pub host: HostId,
    /// Since its last heartbeat, or since the election.
    pub silent: Duration,
    /// Since the last grant, or since the election, before which another leader may have granted.
    pub last_possible_grant: Duration,
    pub may_be_granted: bool,
}

impl Keeper {
    pub fn new(timers: Timers) -> Keeper {
        Keeper { timers, session: None, tickets: 0, rounds: 0 }
    }

    /// This host leads, in this session. A new session remembers nothing of an older one. Returns who waited in vain.
    pub fn lead(&mut self, number: u64, ready: bool, now: Mono) -> Vec<Verdict> {
        if let Some(session) = self.session.as_mut().filter(|session| session.number == number) {
            session.ready = ready;
            return Vec::new();
        }
        let left = self.follow();
        self.session = Some(Session {
            number,
            ready,
            since: now,
            hosts: BTreeMap::new(),
            waiting: BTreeMap::new(),
            round: None,
            last_round: None,
        });
        left
    }

    /// This host does not lead. Returns who waited in vain.
    pub fn follow(&mut self) -> Vec<Verdict> {
        let Some(session) = self.session.take() else { return Vec::new() };
        let in_round = session.round.into_iter().flat_map(|(_, served)| served.into_values());
        in_round.chain(session.waiting.into_values()).map(|waiting| refuse(&waiting, Refusal::NotLeader)).collect()
    }

    pub fn leads(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.number)
    }

    /// Takes a heartbeat that arrived at `now`, when the leader's wall clock showed `wall_ms`. The answer comes from a later
    /// [`Self::end_round`]; what is answered at once comes back here.
    pub fn heartbeat(&mut self, heartbeat: Heartbeat, now: Mono, wall_ms: u64) -> (Ticket, Vec<Verdict>) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let waiting = Waiting { ticket, heartbeat };
        let Some(session) = &mut self.session else {
            return (ticket, vec![refuse(&waiting, Refusal::NotLeader)]);
        };
        let known = session.hosts.entry(waiting.heartbeat.host).or_default();
        known.heard = Some(now);
        known.clock_offset_ms = (i128::from(waiting.heartbeat.wall_ms) - i128::from(wall_ms)) as i64;
        if !session.ready {
            return (ticket, vec![refuse(&waiting, Refusal::NotReady)]);
        }
        let replaced = session.waiting.insert(waiting.heartbeat.host, waiting);
        (ticket, replaced.iter().map(|older| refuse(older, Refusal::Superseded)).collect())
    }

    /// When the next round may start; `None` while nobody waits or a round is under way.
    pub fn next_round_at(&self) -> Option<Mono> {
        let session = self.session.as_ref().filter(|session| session.ready)?;
        if session.waiting.is_empty() || session.round.is_some() {
            return None;
        }
        Some(session.last_round.map_or(Mono::ZERO, |last| last + self.timers.round_every))
    }

    /// Begins a round for all that wait now, if one is due. The caller starts the ReadIndex *after* this call.
    pub fn begin_round(&mut self, now: Mono) -> Option<(Round, u64)> {
        if self.next_round_at().is_none_or(|at| now < at) {
            return None;
        }
        let session = self.session.as_mut()?;
        self.rounds += 1;
        let round = Round(self.rounds);
        session.round = Some((round, std::mem::take(&mut session.waiting)));
        session.last_round = Some(now);
        Some((round, session.number))
    }

    /// Ends a round. `read` is the seq that the ReadIndex proved, `None` when it proved nothing; `fold` is this host's
    /// applied state, read after the round ended.
    pub fn end_round(&mut self, round: Round, read: Option<Seq>, fold: &Fold, now: Mono) -> Vec<Verdict> {
        let Some(session) = &mut self.session else { return Vec::new() };
        let Some((_, served)) = session.round.take_if(|(current, _)| *current == round) else { return Vec::new() };
        let proven = session.ready && read.is_some_and(|read| fold.head.seq >= read);
        served.into_values().map(|waiting| session.judge(&waiting, proven, fold, now)).collect()
    }

    /// Notes what applied state says: recoveries take hosts out of `no_grant`, removed hosts are forgotten.
    pub fn observe(&mut self, fold: &Fold) {
        let Some(session) = &mut self.session else { return };
        session.hosts.retain(|host, known| known.in_flight.is_some() || fold.state.hosts.contains(host));
    }

    /// This process did not run for that long (its host was paused, or starved): heartbeats may wait unread, so the time does
    /// not count as silence of others.
    pub fn stalled(&mut self, gap: Duration) {
        let Some(session) = &mut self.session else { return };
        session.since += gap;
        for heard in session.hosts.values_mut().filter_map(|known| known.heard.as_mut()) {
            *heard += gap;
        }
    }

    /// Words that are due, by silence and by heartbeats. Each that is returned is in flight until [`Self::settle`].
    pub fn due(&mut self, fold: &Fold, now: Mono) -> Vec<(HostId, Word)> {
        let timers = self.timers;
        let Some(session) = self.session.as_mut().filter(|session| session.ready) else { return Vec::new() };
        let mut due = Vec::new();
        for (host, seen) in fold.state.hosts.iter() {
            let known = session.hosts.entry(*host).or_default();
            if known.in_flight.is_some() || now < known.not_before {
                continue;
            }
            let silent = now.saturating_sub(known.heard.unwrap_or(session.since));
            let Some(word) = word(seen.liveness, known.condemned, silent, &timers) else { continue };
            // The order of C3: no grant from here on, whatever becomes of the proposal.
            known.condemned |= word == Word::Lost;
            known.in_flight = Some(word);
            due.push((*host, word));
        }
        due
    }

    /// A word that was in flight has ended. `fold` is applied state, read after the outcome came.
    pub fn settle(&mut self, host: HostId, word: Word, outcome: Outcome, fold: &Fold, now: Mono) {
        let Some(session) = &mut self.session else { return };
        let Some(known) = session.hosts.get_mut(&host).filter(|known| known.in_flight == Some(word)) else { return };
        known.in_flight = None;
        let Outcome::Settled(seq) = outcome else {
            known.not_before = now + RETRY;
            return;
        };
        // One word a host is in flight at a time, so nothing about its loss can come after this recovery.
        let alive = fold.state.hosts.get(&host).is_some_and(|host| host.liveness == Liveness::Alive);
        if word == Word::Recover && fold.head.seq >= seq && alive {
            known.condemned = false;
        }
    }

    /// Is the host refused, whatever it sends?
    pub fn in_no_grant(&self, host: HostId, fold: &Fold) -> bool {
        self.session.as_ref().is_none_or(|session| session.in_no_grant(host, fold))
    }

    pub fn leases(&self, fold: &Fold, now: Mono) -> Vec<HostLease> {
        let Some(session) = &self.session else { return Vec::new() };
        let lease = |host: &HostId| {
            let known = session.hosts.get(host).copied().unwrap_or_default();
            HostLease {
                host: *host,
                silent: now.saturating_sub(known.heard.unwrap_or(session.since)),
                last_possible_grant: now.saturating_sub(known.granted.unwrap_or(session.since)),
                may_be_granted: session.ready && !session.in_no_grant(*host, fold),
            }
        };
        fold.state.hosts.iter().map(|(host, _)| lease(host)).collect()
    }

    /// How far this leader's wall clock is from the median of the hosts that were heard lately, in milliseconds, and the
    /// host that is nearest to it. `None` with fewer than three clocks: two cannot say which of them is wrong (hazard H17).
    pub fn clock_error(&self, now: Mono) -> Option<(i64, HostId)> {
        let session = self.session.as_ref()?;
        let fresh = |known: &&Known| known.heard.is_some_and(|heard| now.saturating_sub(heard) < self.timers.suspect);
        let heard = session.hosts.iter().filter(|(_, known)| fresh(known));
        let mut offsets: Vec<(i64, HostId)> = heard.map(|(host, known)| (known.clock_offset_ms, *host)).collect();
        if offsets.len() < 3 {
            return None;
        }
        offsets.sort_unstable();
        let (median, nearest) = offsets[offsets.len() / 2];
        Some((median.saturating_neg(), nearest))
    }
}

impl Session {
    fn in_no_grant(&self, host: HostId, fold: &Fold) -> bool {
        if mutant::is_on(Mutant::GrantWhileFencing) {
            return false;
        }
        let condemned = self.hosts.get(&host).is_some_and(|known| known.condemned);
        condemned || fold.state.hosts.get(&host).is_none_or(|host| host.liveness == Liveness::Unreachable)
    }

    fn judge(&mut self, waiting: &Waiting, proven: bool, fold: &Fold, now: Mono) -> Verdict {
        let Heartbeat { host, boot, nonce, .. } = waiting.heartbeat;
        if fold.state.removed_hosts.contains(&host) {
            return refuse(waiting, Refusal::Removed);
        }
        if !proven {
            return refuse(waiting, Refusal::NoMajority);
        }
        if !fold.state.hosts.contains(&host) {
            return refuse(waiting, Refusal::Unknown);
        }
        if self.in_no_grant(host, fold) {
            return refuse(waiting, Refusal::NoGrant);
        }
        self.hosts.entry(host).or_default().granted = Some(now);
        let permits = fold.state.permits_on(host).filter(|(_, _, permit)| permit.boot == boot);
        let epochs = permits.map(|(_, _, permit)| permit.epoch).collect();
        let grant = Grant { host, boot, nonce, epochs, applied: fold.head.seq, session: self.number };
        Verdict { ticket: waiting.ticket, outcome: Ok(grant) }
    }
}

fn refuse(waiting: &Waiting, why: Refusal) -> Verdict {
    Verdict { ticket: waiting.ticket, outcome: Err(why) }
}

/// What silence and liveness together ask for.
fn word(liveness: Liveness, condemned: bool, silent: Duration, timers: &Timers) -> Option<Word> {
    let quiet = silent >= timers.suspect;
    let lost = silent >= timers.lost;
    match liveness {
        // It has never spoken; nothing runs there and nobody waits for it.
        Liveness::New => None,
        Liveness::Alive if lost => Some(Word::Lost),
        Liveness::Alive if quiet => Some(Word::Suspect),
        Liveness::Alive => condemned.then_some(Word::Recover),
        Liveness::Suspected if lost => Some(Word::Lost),
        Liveness::Suspected if quiet => None,
        Liveness::Unreachable if quiet => None,
        Liveness::Suspected | Liveness::Unreachable => Some(Word::Recover),
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
