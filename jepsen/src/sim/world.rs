//! The loop of a run: faults, network, hosts, clients, checker; then the faults end and everything must come to rest (L1).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use consensus::decider::ProposeError;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::Request;
use statemachine::decide::HOSTS_MAX;
use statemachine::state::Fingerprint;
use statemachine::state::TokenPurpose;
use uuid::Uuid;

use super::Options;
use super::Outcome;
use super::STEP_MS;
use super::checker::Checker;
use super::clients::Clients;
use super::clock::Oscillator;
use super::coverage::Met;
use super::faults;
use super::faults::Fault;
use super::faults::Planned;
use super::host::Host;
use super::host::address;
use super::host::boot_id;
use super::host::facts;
use super::network::Network;
use super::panics;
use super::random::Dice;
use super::random::seed_product;
use super::trace::Trace;

/// A site must have come together by then.
const FORMED_MS: u64 = 60_000;
/// Faults begin this long after the site is formed, and go on for so long.
const CALM_MS: u64 = 2_000;
const STORM_MS: u64 = 45_000;
/// L1: after the last fault has ended, everything is as desired within this time.
const REST_MS: u64 = 120_000;
/// A quiet site is looked at no more often.
const REST_LOOK_MS: u64 = 100;

/// What ends later.
enum End {
    PowerOn(HostId),
    StartHostd(HostId),
    GoOn(HostId),
    Heal(Vec<(HostId, HostId)>),
    Fast(HostId),
    NoLoss,
}

pub struct World {
    seed: u64,
    now_ms: u64,
    hosts: BTreeMap<HostId, Host>,
    network: Network,
    checker: Checker,
    clients: Clients,
    dice: Dice,
    trace: Trace,
    faults: Option<Vec<Planned>>,
    ends: Vec<(u64, End)>,
    joins: u64,
    /// Joins asked for and not answered: the candidate's number.
    joining: Vec<u64>,
    /// Of those, the ones that were told no.
    refused: Arc<Mutex<Vec<u64>>>,
    removing: Option<HostId>,
    /// The last host that led, in which life.
    led: Option<(HostId, u64)>,
}

impl World {
    pub fn new(seed: u64, options: &Options) -> World {
        seed_product(seed);
        panics::watch();
        let trace = Trace::new(options.prints);
        World {
            seed,
            now_ms: 0,
            hosts: BTreeMap::new(),
            network: Network::new(seed, trace.clone()),
            checker: Checker::default(),
            clients: Clients::default(),
            dice: Dice::new(seed),
            trace,
            faults: options.faults.clone(),
            ends: Vec::new(),
            joins: 0,
            joining: Vec::new(),
            refused: Arc::default(),
            removing: None,
            led: None,
        }
    }

    pub fn run(mut self) -> Outcome {
        let size = [3, 3, 4, 5, 7][self.dice.below(5) as usize];
        self.form(size);
        // Made even when they are given, so that all that comes after draws the same.
        let (from_ms, until_ms) = (self.now_ms + CALM_MS, self.now_ms + CALM_MS + STORM_MS);
        let own = faults::plan(&mut self.dice, size, from_ms, until_ms);
        let planned = self.faults.take().unwrap_or(own);
        self.clients.wishes = true;
        self.storm(&planned, until_ms);
        self.rest();
        let mut coverage = self.checker.coverage.clone();
        coverage.add(Met::LateAnswers, self.network.late_answers());
        self.trace.note(self.now_ms, format_args!("digest {:?}", self.checker.fold.state.digest()));
        Outcome {
            seed: self.seed,
            violation: self.checker.violation.take(),
            trace_hash: self.trace.hash(),
            simulated_ms: self.now_ms,
            coverage,
            faults: planned,
            messages: self.network.delivered(),
            batches: self.checker.fold.head.seq.0,
        }
    }

    fn broke(&self) -> bool {
        self.checker.violation.is_some()
    }

    fn step(&mut self) {
        self.now_ms += STEP_MS;
        self.network.deliver(self.now_ms);
        let mut order: Vec<HostId> = self.hosts.keys().copied().collect();
        self.dice.shuffle(&mut order);
        for id in order {
            if let Some(host) = self.hosts.get_mut(&id) {
                host.run(self.now_ms);
            }
        }
        self.bury();
        if let Some(panic) = panics::take() {
            self.checker.panicked(&panic);
        }
        self.checker.look(&self.hosts, &self.network, self.now_ms);
        self.clients.step(&self.hosts, &mut self.checker, &mut self.dice, &self.trace, self.now_ms);
        self.watch_lead();
        self.take_in_joined();
    }

    /// A process that found that it may not go on has ended; the service manager starts another.
    fn bury(&mut self) {
        let ended = self.hosts.values().filter_map(|host| Some((host.id, host.process.as_ref()?.ending.why()?)));
        for (id, why) in ended.collect::<Vec<_>>() {
            self.trace.note(self.now_ms, format_args!("host {id} ended: {why}"));
            if self.checker.fold.state.removed_hosts.contains(&id) {
                self.bury_removed(id);
                continue;
            }
            self.checker.ended(id, &why);
            if let Some(host) = self.hosts.get_mut(&id) {
                host.kill(&self.network);
            }
            self.ends.push((self.now_ms + 1_000, End::StartHostd(id)));
        }
    }

    fn watch_lead(&mut self) {
        let leads = self.leader();
        let Some(id) = leads else { return };
        let life = self.hosts.get(&id).map_or(0, |host| host.lives);
        if let Some((before, old_life)) = self.led
            && before == id
            && old_life != life
        {
            self.checker.coverage.add(Met::RestoredLeaders, 1);
        }
        self.led = Some((id, life));
    }

    fn leader(&self) -> Option<HostId> {
        let leads =
            |host: &&Host| host.hostd().is_some_and(|it| it.node.leadership().borrow().ready_session().is_some());
        self.hosts.values().find(leads).map(|host| host.id)
    }

    fn oscillator(&mut self) -> Oscillator {
        // Crystals are within 100 ppm; a virtual machine's clock may be a percent off for a while.
        let rate_ppm = if self.dice.one_in(4) { self.dice.range(990_000..1_010_000) } else { 1_000_000 };
        let wall_offset_ms = self.dice.range(0..3_000) as i64 - 1_500;
        Oscillator { rate_ppm, wall_offset_ms, booted_ms: self.now_ms }
    }

    fn add_host(&mut self, id: HostId, genesis: Option<Request>) {
        let oscillator = self.oscillator();
        let mut host = Host::new(id, oscillator);
        host.start(&self.network, self.now_ms, genesis);
        self.hosts.insert(id, host);
    }

    /// A site of so many hosts, all of them alive and as many voters as there should be.
    fn form(&mut self, size: usize) {
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

    /// What every host says of itself, for whoever reads the trace of a run that never came to rest.
    fn describe(&self) {
        for host in self.hosts.values() {
            let Some(hostd) = host.hostd() else {
                self.trace.note(self.now_ms, format_args!("host {} has not started", host.id));
                continue;
            };
            self.trace.note(self.now_ms, format_args!("{:?} {:?}", hostd.node.status(), hostd.node.membership()));
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

    fn begin_join(&mut self) {
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
    fn take_in_joined(&mut self) {
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

    fn storm(&mut self, planned: &[Planned], until_ms: u64) {
        let mut next = 0;
        while self.now_ms < until_ms && !self.broke() {
            while let Some(due) = planned.get(next).filter(|due| due.at_ms <= self.now_ms) {
                next += 1;
                self.trace.note(self.now_ms, format_args!("fault {:?}", due.fault));
                self.happen(&due.fault.clone());
            }
            self.end_due(false);
            self.remove_in_maintenance();
            self.step();
        }
    }

    /// Ends what is due, or all there is.
    fn end_due(&mut self, all: bool) {
        let now_ms = self.now_ms;
        let due: Vec<_> = self.ends.extract_if(.., |(at, _)| all || *at <= now_ms).collect();
        for (_, end) in due {
            match end {
                End::PowerOn(id) => self.on_host(id, |host, network| {
                    if !host.is_powered {
                        host.power_on(network, now_ms);
                    }
                }),
                End::StartHostd(id) => self.on_host(id, |host, network| {
                    if host.is_powered && host.process.is_none() {
                        host.start(network, now_ms, None);
                    }
                }),
                End::GoOn(id) => self.on_host(id, |host, _| host.go_on()),
                End::Heal(links) => links.into_iter().for_each(|(from, to)| self.network.heal(from, to)),
                End::Fast(id) => self.network.slow(id, 0),
                End::NoLoss => self.network.lose_one_in(0),
            }
        }
    }

    fn on_host(&mut self, id: HostId, act: impl FnOnce(&mut Host, &Network)) {
        let removed = self.checker.fold.state.removed_hosts.contains(&id);
        if let Some(host) = self.hosts.get_mut(&id).filter(|_| !removed) {
            act(host, &self.network);
        }
    }

    /// The nth host by age, of those that there are.
    fn nth(&self, number: usize) -> Option<HostId> {
        let ids: Vec<HostId> = self.hosts.keys().copied().collect();
        ids.get(number % ids.len().max(1)).copied()
    }

    fn after(&mut self, for_ms: u64, end: End) {
        self.ends.push((self.now_ms + for_ms, end));
    }

    fn happen(&mut self, fault: &Fault) {
        match *fault {
            Fault::PowerCut { host, for_ms, seed } => {
                if let Some(id) = self.nth(host) {
                    self.cut_power(id, for_ms, seed);
                }
            }
            Fault::AllPowerCut { for_ms, seed } => {
                for id in self.hosts.keys().copied().collect::<Vec<_>>() {
                    let more_ms = self.dice.below(500);
                    self.cut_power(id, for_ms + more_ms, seed ^ id.0);
                }
            }
            Fault::RestartLeader { for_ms } => {
                if let Some(id) = self.leader() {
                    self.cut_power(id, for_ms, self.now_ms);
                }
            }
            Fault::KillHostd { host, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.checker.coverage.add(Met::HostdKills, 1);
                self.on_host(id, |host, network| host.kill(network));
                self.after(for_ms, End::StartHostd(id));
            }
            Fault::Stop { host, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.checker.coverage.add(Met::Pauses, 1);
                self.on_host(id, |host, _| host.stop());
                self.after(for_ms, End::GoOn(id));
            }
            Fault::Isolate { host, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.cut_links(for_ms, |from, to| from == id || to == id);
            }
            Fault::MuteLeader { for_ms } => {
                let Some(id) = self.leader() else { return };
                self.cut_links(for_ms, |from, _| from == id);
            }
            Fault::OneWay { from, to, for_ms } => {
                let (Some(from), Some(to)) = (self.nth(from), self.nth(to)) else { return };
                self.cut_links(for_ms, |a, b| a == from && b == to);
            }
            Fault::Ring { for_ms } => {
                let ids: Vec<HostId> = self.hosts.keys().copied().collect();
                let place = |id| ids.iter().position(|other| *other == id).unwrap_or(0);
                let count = ids.len();
                self.cut_links(for_ms, |from, to| {
                    let apart = place(from).abs_diff(place(to));
                    apart.min(count - apart) > 1
                });
            }
            Fault::Split { at, for_ms } => {
                let ids: Vec<HostId> = self.hosts.keys().copied().collect();
                let left: Vec<HostId> = ids.into_iter().take(at).collect();
                self.cut_links(for_ms, |from, to| left.contains(&from) != left.contains(&to));
            }
            Fault::Slow { host, extra_ms, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.network.slow(id, extra_ms);
                self.after(for_ms, End::Fast(id));
            }
            Fault::Loss { one_in, for_ms } => {
                self.network.lose_one_in(one_in);
                self.after(for_ms, End::NoLoss);
            }
            Fault::WallJump { host, by_ms } => {
                if let Some(id) = self.nth(host) {
                    self.on_host(id, |host, _| host.oscillator.wall_offset_ms += by_ms);
                }
            }
            Fault::TransferLead { to } => self.transfer_lead(to),
            Fault::Join if self.hosts.len() + self.joining.len() < HOSTS_MAX => self.begin_join(),
            Fault::Join => {}
            Fault::Remove { host } => self.begin_removal(host),
        }
    }

    fn cut_power(&mut self, id: HostId, for_ms: u64, seed: u64) {
        self.checker.coverage.add(Met::PowerCuts, 1);
        let mut lost = 0;
        self.on_host(id, |host, network| lost = host.cut_power(network, seed));
        self.checker.coverage.add(Met::UnsyncedWritesLost, lost);
        self.after(for_ms, End::PowerOn(id));
    }

    fn cut_links(&mut self, for_ms: u64, is_cut: impl Fn(HostId, HostId) -> bool) {
        self.checker.coverage.add(Met::Partitions, 1);
        let ids: Vec<HostId> = self.hosts.keys().copied().collect();
        let pairs = ids.iter().flat_map(|from| ids.iter().map(|to| (*from, *to)));
        let links: Vec<_> = pairs.filter(|(from, to)| from != to && is_cut(*from, *to)).collect();
        links.iter().for_each(|(from, to)| self.network.cut(*from, *to));
        self.after(for_ms, End::Heal(links));
    }

    fn transfer_lead(&mut self, to: usize) {
        let (Some(from), Some(to)) = (self.leader(), self.nth(to)) else { return };
        let Some((host, hostd)) = self.hosts.get(&from).and_then(|host| Some((host, host.hostd()?))) else { return };
        host.spawn(async move { drop(hostd.node.transfer_leader(to).await) });
    }

    /// Maintenance first; the rest follows when no guest is left there.
    fn begin_removal(&mut self, host: usize) {
        let enough = self.hosts.len() > 3 && self.removing.is_none();
        let Some(id) = self.nth(host).filter(|_| enough) else { return };
        self.removing = Some(id);
        self.clients.ask(Command::HostMaintenance { host: id }, self.now_ms);
        let here: Vec<_> = self.checker.fold.state.permits_on(id).map(|(vm, _, _)| vm).collect();
        for vm in here {
            let stop = Command::VmStop { vm, mode: statemachine::state::StopMode::PowerOff };
            self.clients.ask(stop, self.now_ms);
        }
    }

    fn remove_in_maintenance(&mut self) {
        let Some(id) = self.removing else { return };
        if self.checker.fold.state.removed_hosts.contains(&id) {
            self.removing = None;
            self.bury_removed(id);
            return;
        }
        let empty = self.checker.fold.state.permits_on(id).next().is_none();
        if empty && self.now_ms.is_multiple_of(1_000) {
            self.clients.ask(Command::HostRemove { host: id }, self.now_ms);
        }
    }

    fn bury_removed(&mut self, id: HostId) {
        if let Some(mut host) = self.hosts.remove(&id) {
            host.kill(&self.network);
        }
    }

    /// No fault any more: everything must come to rest.
    fn rest(&mut self) {
        if self.broke() {
            return;
        }
        self.trace.note(self.now_ms, "the faults end");
        self.clients.wishes = false;
        // Whoever is half out of the site comes back into it.
        if let Some(id) = self.removing.take() {
            if self.checker.fold.state.removed_hosts.contains(&id) {
                self.bury_removed(id);
            } else {
                self.clients.ask(Command::HostActivate { host: id }, self.now_ms);
            }
        }
        self.end_due(true);
        let deadline_ms = self.now_ms + REST_MS;
        loop {
            self.end_due(false);
            self.step();
            if self.broke() {
                return;
            }
            if !self.now_ms.is_multiple_of(REST_LOOK_MS) {
                continue;
            }
            for id in self.checker.fold.state.removed_hosts.iter().map(|(id, _)| *id).collect::<Vec<_>>() {
                self.bury_removed(id);
            }
            if self.clients.is_idle() {
                // Whose token was never made has nothing to show.
                let tokens = &self.checker.fold.state.tokens;
                self.joining.retain(|number| tokens.values().any(|token| token.secret_hash == secret_hash(*number)));
            }
            let rest = if self.clients.is_idle() && self.joining.is_empty() {
                self.checker.at_rest(&self.hosts)
            } else {
                Err("clients wait".to_owned())
            };
            match rest {
                Ok(()) => return,
                Err(why) if self.now_ms > deadline_ms => {
                    self.describe();
                    return self.checker.never_came(&why);
                }
                Err(_) => {}
            }
        }
    }
}

fn secret_hash(number: u64) -> [u8; 32] {
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
