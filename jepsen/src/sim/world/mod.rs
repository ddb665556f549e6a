//! The loop of a run: faults, network, hosts, clients, checker; then the faults end and everything must come to rest (L1).

mod form;
mod strike;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;

use statemachine::HostId;
use statemachine::command::Command;

use self::form::secret_hash;
use self::strike::End;
use crate::sim::Options;
use crate::sim::Outcome;
use crate::sim::STEP_MS;
use crate::sim::checker::Checker;
use crate::sim::clients::Clients;
use crate::sim::coverage::Met;
use crate::sim::faults;
use crate::sim::faults::Planned;
use crate::sim::host::Host;
use crate::sim::network::Network;
use crate::sim::panics;
use crate::sim::random::Dice;
use crate::sim::random::seed_product;
use crate::sim::roads::Roads;
use crate::sim::trace::Trace;

/// Faults begin this long after the site is formed, and go on for so long.
const CALM_MS: u64 = 2_000;
const STORM_MS: u64 = 45_000;
/// L1: after the last fault has ended, everything is as desired within this time.
const REST_MS: u64 = 120_000;
/// A machine whose disk failed is back after this.
const DISK_MENDED_MS: u64 = 1_500;
/// What a host says that ends for a disk that failed, and one whose disk hangs while it leads.
const POWER_GONE: &str = "the power is gone";
const GRAY: &str = "this leader's disk hangs";
/// A quiet site is looked at no more often.
const REST_LOOK_MS: u64 = 100;

pub struct World {
    seed: u64,
    now_ms: u64,
    hosts: BTreeMap<HostId, Host>,
    network: Network,
    roads: Roads,
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
        let network = Network::new(seed, trace.clone());
        World {
            seed,
            now_ms: 0,
            hosts: BTreeMap::new(),
            roads: Roads::new(network.clone()),
            network,
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
        // Beyond seven openraft carries no host: the others pull.
        let size = if self.seed % 5 == 4 { 9 } else { size };
        self.form(size);
        self.spread_votes();
        // Made even when they are given, so that all that comes after draws the same.
        let (from_ms, until_ms) = (self.now_ms + CALM_MS, self.now_ms + CALM_MS + STORM_MS);
        let own = faults::plan(&mut self.dice, size, from_ms, until_ms);
        let planned = self.faults.take().unwrap_or(own);
        self.clients.wishes = true;
        // The others draw as they did before guests moved.
        self.clients.moves = self.seed % 3 == 1;
        self.clients.sleeps = self.seed % 6 == 5;
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
        if let Some(panic) = panics::take() {
            self.checker.panicked(&panic);
        }
        // First seen, then buried: what a host did in its last turn counts.
        self.checker.look(&self.hosts, &self.network, self.now_ms);
        self.bury();
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
            if why.contains(POWER_GONE) && self.hosts.get(&id).is_some_and(|host| host.disk_fails) {
                self.checker.coverage.add(Met::DiskFailures, 1);
                self.cut_power(id, DISK_MENDED_MS, self.now_ms);
                continue;
            }
            let hung = self.hosts.get(&id).is_some_and(|host| self.now_ms <= host.excused_until_ms);
            if !(hung && why.contains(GRAY)) {
                self.checker.ended(id, &why);
            }
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
        for host in self.hosts.values_mut().filter(|host| host.disk_fails) {
            host.hardware.disk.mend();
            host.disk_fails = false;
        }
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
