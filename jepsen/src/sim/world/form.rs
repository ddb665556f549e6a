//! How a site comes together, and how machines come into it later.

use std::sync::PoisonError;

use consensus::decider::ProposeError;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostChange;
use statemachine::command::Request;
use statemachine::state::Fingerprint;
use statemachine::state::TokenPurpose;
use uuid::Uuid;

use super::World;
use crate::sim::clock::Oscillator;
use crate::sim::host::Host;
use crate::sim::host::address;
use crate::sim::host::boot_id;
use crate::sim::host::facts;

/// A site must have come together by then.
const FORMED_MS: u64 = 60_000;

impl World {
    fn oscillator(&mut self) -> Oscillator {
        // Crystals are within 100 ppm; a virtual machine's clock may be a percent off for a while.
        let rate_ppm = if self.dice.one_in(4) { self.dice.range(990_000..1_010_000) } else { 1_000_000 };
        let wall_offset_ms = self.dice.range(0..3_000) as i64 - 1_500;
        Oscillator { rate_ppm, wall_offset_ms, booted_ms: self.now_ms }
    }

    fn add_host(&mut self, id: HostId, genesis: Option<Request>) {
        let oscillator = self.oscillator();
        let peers = self.hosts.keys().copied().collect();
        let mut host = Host::new(id, peers, oscillator, self.roads.clone());
        host.start(&self.network, self.now_ms, genesis);
        self.hosts.insert(id, host);
    }

    /// A site of so many hosts, all of them alive and as many voters as there should be.
    pub(super) fn form(&mut self, size: usize) {
        let command = Command::SiteInit {
            site: SiteId(Uuid::from_u128(7)),
            name: "site".to_owned(),
            ca: Fingerprint([9; 32]),
            first_host: candidate(1),
        };
        let first = HostId(1);
        let by_root = |command| Request { actor: Actor::Root(first), origin: first, idempotency: None, command };
        self.add_host(first, Some(by_root(command)));
        self.until("the first host leads", |world| world.checker.fold.head.seq.0 >= 1);
        let admin = Command::TokenCreate {
            purpose: TokenPurpose::Admin,
            secret_hash: [255; 32],
            ttl_ms: 30 * 24 * 3_600_000,
            note: String::new(),
        };
        // The first word after the birth of a site, so that its id is known.
        if let Some((host, hostd)) = self.hosts.get(&first).and_then(|host| Some((host, host.hostd()?))) {
            let request = by_root(admin);
            host.spawn(async move { drop(hostd.node.propose(request).await) });
        }
        self.until("the first token exists", |world| world.checker.fold.state.tokens.len() == 1);
        let made = self.checker.fold.state.tokens.iter().next().map(|(id, _)| *id);
        self.clients.token = made.unwrap_or_default();
        for members in 2..=size {
            self.begin_join();
            self.until("a host joins", |world| world.hosts.len() == members);
        }
        let alive = |world: &World| {
            let hosts = &world.checker.fold.state.hosts;
            hosts.len() == size && hosts.values().all(|host| host.liveness == statemachine::state::Liveness::Alive)
        };
        self.until("all hosts are alive", alive);
    }

    /// In some sites five vote, and in some the hosts stand in two racks, so that voters are exchanged for others.
    pub(super) fn spread_votes(&mut self) {
        if self.seed % 7 == 3 {
            self.clients.ask(Command::VoterCount { voters: 5 }, self.now_ms);
        }
        if self.seed % 3 == 1 {
            for host in self.hosts.keys().copied().collect::<Vec<_>>() {
                let failure_domain = Some(format!("rack{}", host.0 % 2));
                let change = HostChange { spm_priority: None, failure_domain };
                self.clients.ask(Command::HostChange { host, change }, self.now_ms);
            }
        }
    }

    /// Runs until it holds; a site that does not come together is a violation of L1.
    fn until(&mut self, what: &str, holds: impl Fn(&World) -> bool) {
        let deadline_ms = self.now_ms + FORMED_MS;
        while !self.broke() && !holds(self) {
            if self.now_ms > deadline_ms {
                self.checker.never_came(what);
                return;
            }
            self.step();
        }
    }

    pub(super) fn begin_join(&mut self) {
        self.joins += 1;
        let number = self.joins + 1;
        let token = Command::TokenCreate {
            purpose: TokenPurpose::Join,
            secret_hash: secret_hash(number),
            ttl_ms: 24 * 3_600_000,
            note: String::new(),
        };
        self.clients.ask(token, self.now_ms);
        self.joining.push(number);
    }

    /// What a machine that joins does: shows its token once the site knows it, and starts once it is a host.
    pub(super) fn take_in_joined(&mut self) {
        let refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        self.joining.retain(|number| !refused.contains(number));
        for number in self.joining.clone() {
            let state = &self.checker.fold.state;
            let key = candidate(number).public_key;
            let known = state.hosts.iter().find(|(_, host)| host.public_key == key).map(|(id, _)| *id);
            if let Some(id) = known {
                self.joining.retain(|other| *other != number);
                if self.checker.admits(id) {
                    self.add_host(id, None);
                }
                continue;
            }
            let has_token = state.tokens.iter().any(|(_, token)| token.secret_hash == secret_hash(number));
            if has_token && self.now_ms.is_multiple_of(400) {
                self.show_token(number);
            }
        }
    }

    fn show_token(&mut self, number: u64) {
        let command = Command::HostJoin { secret_hash: secret_hash(number), candidate: candidate(number) };
        let up: Vec<&Host> = self.hosts.values().filter(|host| host.runs() && host.hostd().is_some()).collect();
        let Some(host) = self.dice.pick(&up) else { return };
        let Some(hostd) = host.hostd() else { return };
        let request = Request { actor: Actor::Joiner, origin: host.id, idempotency: None, command };
        let refused = self.refused.clone();
        host.spawn(async move {
            // Full, expired: a machine that is told so does not ask again.
            if let Err(ProposeError::Rejected(_)) = hostd.node.propose(request).await {
                refused.lock().unwrap_or_else(PoisonError::into_inner).push(number);
            }
        });
    }
}

pub(super) fn secret_hash(number: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    hash
}

/// The machine that is the nth to ask for a place in the site. Its address is its host id's, which is known once it is one.
fn candidate(number: u64) -> HostCandidate {
    HostCandidate {
        name: format!("host{number}"),
        address: address(HostId(number)),
        public_key: Fingerprint([number as u8; 32]),
        facts: facts(boot_id(HostId(number), 1)),
    }
}
