//! What goes wrong, and its end.

use statemachine::HostId;
use statemachine::command::Command;

use super::World;
use crate::sim::coverage::Met;
use crate::sim::faults::Fault;
use crate::sim::host::Host;
use crate::sim::network::Network;

/// Three more than openraft carries.
const HOSTS: usize = 10;
/// What a leader whose disk hung may decide about itself, it decides within this time.
const AFTER_HANG_MS: u64 = 1_000;

/// What ends later.
pub(super) enum End {
    PowerOn(HostId),
    StartHostd(HostId),
    KillHostd { host: HostId, for_ms: u64 },
    GoOn(HostId),
    DiskGoesOn(HostId),
    Heal(Vec<(HostId, HostId)>),
    Fast(HostId),
    NoLoss,
}

impl World {
    /// Ends what is due, or all there is.
    pub(super) fn end_due(&mut self, all: bool) {
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
                End::KillHostd { host, for_ms } => self.kill_hostd(host, for_ms),
                End::GoOn(id) => self.on_host(id, |host, _| host.go_on()),
                End::DiskGoesOn(id) => self.on_host(id, |host, _| host.hardware.disk.hang(false)),
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

    pub(super) fn happen(&mut self, fault: &Fault) {
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
                if let Some(id) = self.nth(host) {
                    self.kill_hostd(id, for_ms);
                }
            }
            Fault::GuestsEnd { host, how, number, kill_after_ms, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.on_host(id, |host, _| host.hardware.machine().guests_end(how, number));
                self.after(kill_after_ms, End::KillHostd { host: id, for_ms });
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
            Fault::EndsUnheard { host, how, number, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                self.cut_links(for_ms, |_, to| to == id);
                self.on_host(id, |host, _| host.hardware.machine().guests_end(how, number));
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
            Fault::DiskFails { host, after_changes } => {
                let Some(id) = self.nth(host) else { return };
                self.on_host(id, |host, _| {
                    host.disk_fails = true;
                    host.hardware.disk.fail_after(after_changes);
                });
            }
            Fault::DiskHangs { host, for_ms } => {
                let Some(id) = self.nth(host) else { return };
                let runs = self.hosts.get(&id).is_some_and(Host::runs);
                self.checker.coverage.add(Met::DiskHangs, u64::from(runs));
                let excused_until_ms = self.now_ms + for_ms + AFTER_HANG_MS;
                self.on_host(id, |host, _| {
                    host.excused_until_ms = excused_until_ms;
                    host.hardware.disk.hang(true);
                });
                self.after(for_ms, End::DiskGoesOn(id));
            }
            Fault::TransferLead { to } => self.transfer_lead(to),
            Fault::Join if self.hosts.len() + self.joining.len() < HOSTS => self.begin_join(),
            Fault::Join => {}
            Fault::Remove { host } => self.begin_removal(host),
        }
    }

    fn kill_hostd(&mut self, id: HostId, for_ms: u64) {
        self.checker.coverage.add(Met::HostdKills, 1);
        self.on_host(id, |host, network| host.kill(network));
        self.after(for_ms, End::StartHostd(id));
    }

    pub(super) fn cut_power(&mut self, id: HostId, for_ms: u64, seed: u64) {
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

    pub(super) fn remove_in_maintenance(&mut self) {
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
}
