//! The observer: sees every host at once, keeps the one true log, and says which invariant of DESIGN §5 broke. What can be
//! said of a state alone is [`statemachine::invariants`], the same code that production runs.

mod answers;
mod grants;
mod guests;
mod log;
mod rest;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::fmt;

use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::batch::ChainHash;
use statemachine::digest::Digest;
use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;

use crate::sim::coverage::Coverage;
use crate::sim::host::Host;
use crate::sim::network::Network;

const STORE_LOOK_MS: u64 = 50;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
    pub at_ms: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.invariant, self.at_ms as f64 / 1000.0, self.what)
    }
}

#[derive(Clone, Copy)]
struct Place {
    hash: ChainHash,
    digest: Digest,
}

/// What was seen of one host.
#[derive(Default)]
struct Seen {
    life: u64,
    head: Seq,
    session: u64,
    session_term: u64,
    installs: u64,
    superseded: u64,
    purged: u64,
    pulled: u64,
    was_taken_in: bool,
    /// Since when the log calls it unreachable.
    unreachable_since_ms: Option<u64>,
    /// Where in the log it was unreachable: from a seq, before a seq.
    unreachable: Vec<(Seq, Option<Seq>)>,
    granted_deadline_ns: u64,
    /// When it was last seen leading, in this life of its hostd.
    led_ms: Option<u64>,
}

pub struct Checker {
    pub fold: Fold,
    places: Vec<Place>,
    /// What the log was lately, newest last.
    recent: VecDeque<Fold>,
    /// When the log was first seen at a seq.
    heads: Vec<(u64, Seq)>,
    /// Epochs that a grant to a host has named.
    granted: BTreeSet<(HostId, Epoch)>,
    /// Key of an accepted command, by the seq of its batch.
    keys: BTreeMap<Seq, String>,
    /// Acknowledged by somebody, and not yet in the log as this checker knows it.
    unproven: BTreeMap<Seq, String>,
    seen: BTreeMap<HostId, Seen>,
    launched: BTreeSet<(VmId, Epoch)>,
    /// Files that guests went on from.
    woken: BTreeSet<(VmId, MigrationId)>,
    /// Which life of which host led in a term.
    led: BTreeMap<u64, (HostId, u64)>,
    members: Vec<HostId>,
    pub coverage: Coverage,
    pub violation: Option<Violation>,
    now_ms: u64,
}

impl Default for Checker {
    fn default() -> Self {
        let fold = Fold::default();
        let origin = Place { hash: fold.head.hash, digest: fold.state.digest() };
        Checker {
            fold,
            places: vec![origin],
            recent: VecDeque::new(),
            heads: Vec::new(),
            granted: BTreeSet::new(),
            keys: BTreeMap::new(),
            unproven: BTreeMap::new(),
            seen: BTreeMap::new(),
            launched: BTreeSet::new(),
            woken: BTreeSet::new(),
            led: BTreeMap::new(),
            members: Vec::new(),
            coverage: Coverage::default(),
            violation: None,
            now_ms: 0,
        }
    }
}

impl Checker {
    fn violate(&mut self, invariant: &'static str, what: String) {
        let at_ms = self.now_ms;
        self.violation.get_or_insert(Violation { invariant, what, at_ms });
    }

    /// Looks at everything after a step.
    pub fn look(&mut self, hosts: &BTreeMap<HostId, Host>, network: &Network, now_ms: u64) {
        self.now_ms = now_ms;
        for host in hosts.values() {
            self.look_at_log(host);
        }
        for host in hosts.values() {
            self.look_at_node(host, network);
        }
        let mut runners = BTreeMap::new();
        for host in hosts.values() {
            self.look_at_guests(host, &mut runners);
        }
    }

    fn look_at_node(&mut self, host: &Host, network: &Network) {
        let Some(hostd) = host.hostd() else { return };
        self.look_at_lead(host, &hostd.node);
        if self.now_ms.is_multiple_of(STORE_LOOK_MS) {
            self.look_at_store(host.id, &hostd.node);
        }
        self.look_at_lease(host, &hostd, network);
    }

    /// A process that may end only for a broken disk, on a disk that is whole.
    pub fn ended(&mut self, host: HostId, why: &str) {
        self.violate("D1", format!("host {host} gave up: {why}"));
    }

    pub fn panicked(&mut self, words: &str) {
        self.violate("panic", words.to_owned());
    }

    pub fn never_came(&mut self, what: &str) {
        self.violate("L1", format!("in vain: {what}"));
    }

    /// A host that was removed before it ever ran stays away.
    pub fn admits(&self, host: HostId) -> bool {
        !self.fold.state.removed_hosts.contains(&host)
    }
}
