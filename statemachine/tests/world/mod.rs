//! A small world in which random steps become requests about things that exist, or nearly do.

mod devices;

use pnet_base::MacAddr;
use proptest::prelude::*;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::HostChange;
use statemachine::command::HostFacts;
use statemachine::command::IdempotencyKey;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::DataCenterId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::Seq;
use statemachine::ids::SiteId;
use statemachine::ids::TokenId;
use statemachine::ids::VmId;
use statemachine::planner;
use statemachine::state::BackingImage;
use statemachine::state::Capacity;
use statemachine::state::Disk;
use statemachine::state::DiskFault;
use statemachine::state::DiskFormat;
use statemachine::state::ExitReason;
use statemachine::state::Fingerprint;
use statemachine::state::GuestFacts;
use statemachine::state::GuestInterface;
use statemachine::state::GuestStatus;
use statemachine::state::Migration;
use statemachine::state::MigrationProgress;
use statemachine::state::Nic;
use statemachine::state::RunStrategy;
use statemachine::state::State;
use statemachine::state::StopMode;
use statemachine::state::Suspension;
use statemachine::state::SuspensionPhase;
use statemachine::state::TokenPurpose;
use statemachine::state::VmSpec;
use uuid::Uuid;

/// A choice of action, and numbers that pick its objects.
#[derive(Debug, Clone)]
pub struct Step {
    pub action: u8,
    pub a: u16,
    pub b: u16,
    pub keyed: bool,
}

pub fn step() -> impl Strategy<Value = Step> {
    (0..73u8, any::<u16>(), any::<u16>(), prop::bool::weighted(0.2)).prop_map(|(action, a, b, keyed)| Step {
        action,
        a,
        b,
        keyed,
    })
}

pub struct World {
    clock_ms: u64,
    counter: u64,
    tokens: u16,
    hosts: u16,
}

pub fn facts(boot: u128, cpu_threads: u32, memory_mib: u64) -> HostFacts {
    HostFacts {
        boot: BootId(Uuid::from_u128(boot)),
        capacity: Capacity { cpu_threads, memory_mib },
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".to_owned(),
        clock_runs_while_stopped: true,
        watchdog_timeout_ms: None,
    }
}

pub fn candidate(number: u16) -> HostCandidate {
    HostCandidate {
        name: format!("host{number}"),
        address: format!("10.0.{}.{}:7443", number / 250, number % 250 + 1),
        public_key: Fingerprint([number as u8; 32]),
        facts: facts(u128::from(number), 4, 2048),
    }
}

pub fn spec(a: u16) -> VmSpec {
    let mut disks = vec![Disk::raw("root", &format!("/srv/disk{}", a % 12))];
    if a.is_multiple_of(5) {
        disks.push(Disk { shareable: true, ..Disk::raw("common", "/srv/common") });
    }
    if a.is_multiple_of(6) {
        // On what another may write as its own.
        let backing = vec![BackingImage { path: format!("/srv/disk{}", a % 12 / 2), format: DiskFormat::Raw }];
        disks.push(Disk { format: DiskFormat::Qcow2, backing, ..Disk::raw("data", &format!("/srv/top{a}")) });
    }
    // Few addresses, so that two VMs ask for the same; a card without one gets its own.
    let nic = |mac| Nic { id: "lan".to_owned(), bridge: "br0".to_owned(), mac, slot: None };
    let nics = match a % 7 {
        2 => vec![nic(None)],
        4 => vec![nic(Some(MacAddr::new(2, 0, 0, 0, 0, (a % 4) as u8)))],
        _ => Vec::new(),
    };
    VmSpec {
        vcpus: u32::from(a % 5),
        memory_mib: 64 << (a % 6),
        kernel: "/srv/vmlinuz".to_owned(),
        cmdline: "console=ttyS0".to_owned(),
        disks,
        nics,
        highly_available: a.is_multiple_of(3),
        ..VmSpec::default()
    }
}

fn pick<T: Copy>(items: &[T], n: u16) -> Option<T> {
    items.get(usize::from(n) % items.len().max(1)).copied()
}

impl World {
    pub fn new() -> World {
        World { clock_ms: 1_000_000_000, counter: 0, tokens: 0, hosts: 0 }
    }

    pub fn wall_ms(&self) -> u64 {
        self.clock_ms
    }

    pub fn resolve(&mut self, step: &Step, fold: &Fold) -> Request {
        let state = &fold.state;
        // The clock mostly runs, and sometimes jumps back.
        self.clock_ms =
            if step.b.is_multiple_of(50) { self.clock_ms.saturating_sub(500_000) } else { self.clock_ms + 700 };
        self.counter += 1;
        let Step { action, a, b, .. } = *step;
        // Rare ways need many steps.
        let action = match action {
            60..=63 => 41,
            64..=67 => 45,
            other => other,
        };
        let hosts: Vec<HostId> = state.hosts.iter().map(|(id, _)| *id).collect();
        let vms: Vec<VmId> = state.vms.iter().map(|(id, _)| *id).collect();
        let tokens: Vec<TokenId> = state.tokens.iter().map(|(id, _)| *id).collect();
        let any_host = pick(&hosts, a).unwrap_or(HostId(1));
        let vm = pick(&vms, a).unwrap_or_default();
        let leader = hosts.first().copied().unwrap_or(HostId(1));
        let root = Actor::Root(leader);
        if state.site.is_none() {
            let command = Command::SiteInit {
                site: SiteId(Uuid::from_u128(7)),
                name: "site".to_owned(),
                ca: Fingerprint([9; 32]),
                first_host: candidate(0),
            };
            return Request { actor: root, origin: leader, idempotency: None, command };
        }
        let boot = state.hosts.get(&any_host).map_or(BootId::default(), |host| host.facts.boot);
        let report = ReportId { host: any_host, boot, counter: self.counter };
        // A permit to report about, on its own host.
        let permits: Vec<(VmId, Epoch, HostId)> =
            state.vms.iter().filter_map(|(id, vm)| vm.permit.map(|permit| (*id, permit.epoch, permit.host))).collect();
        let permit = pick(&permits, a);
        let (about, epoch, holder) = permit.unwrap_or((vm, Epoch(3), any_host));
        let holder_boot = state.hosts.get(&holder).map_or(BootId::default(), |host| host.facts.boot);
        let holder_report = ReportId { host: holder, boot: holder_boot, counter: self.counter };

        let (actor, origin, command) = match action {
            0 | 1 => {
                self.tokens += 1;
                let purpose = [TokenPurpose::Join, TokenPurpose::Join, TokenPurpose::Admin][usize::from(a % 3)];
                let secret_hash = [(self.tokens % 200) as u8; 32];
                let ttl_ms = if b.is_multiple_of(7) { 1 } else { 10_000_000 };
                (root, leader, Command::TokenCreate { purpose, secret_hash, ttl_ms, note: String::new() })
            }
            2 => (root, leader, Command::TokenRevoke { token: pick(&tokens, b).unwrap_or_default() }),
            3..=6 => {
                self.hosts += 1;
                let secret_hash = state.tokens.values().nth(usize::from(a) % tokens.len().max(1));
                let secret_hash = secret_hash.map_or([255; 32], |token| token.secret_hash);
                (Actor::Joiner, leader, Command::HostJoin { secret_hash, candidate: candidate(self.hosts) })
            }
            7 if b.is_multiple_of(16) => {
                let generation = state.site.as_ref().map_or(0, |site| site.generation) + 1;
                (Actor::Duty(any_host), any_host, Command::SiteRecover { generation, ca: Fingerprint([b as u8; 32]) })
            }
            7 if b.is_multiple_of(5) => (root, leader, Command::VoterCount { voters: [3, 5][usize::from(a % 2)] }),
            7 => (
                Actor::Duty(leader),
                leader,
                Command::CertificateIssue {
                    host: any_host,
                    serial: b.to_string(),
                    fingerprint: Fingerprint([a as u8; 32]),
                    not_after_ms: 1,
                },
            ),
            8 => (root, leader, Command::HostMaintenance { host: any_host }),
            9 | 10 => (root, leader, Command::HostActivate { host: any_host }),
            11 => {
                let resting = state.hosts.iter().find(|(_, host)| {
                    host.administrative == statemachine::state::Administrative::Maintenance && host.usage.vms == 0
                });
                let host = resting.map_or(any_host, |(id, _)| *id);
                (root, leader, Command::HostRemove { host })
            }
            12 => {
                let domains = [None, Some(String::new()), Some("rack1".to_owned()), Some("rack2".to_owned())];
                let failure_domain = domains[usize::from(b) % 4].clone();
                let change = HostChange { spm_priority: Some((b % 12) as i8 - 1), failure_domain };
                (root, leader, Command::HostChange { host: any_host, change })
            }
            13..=15 => (Actor::Host(any_host), any_host, {
                let facts = state.hosts.get(&any_host).map(|host| host.facts.clone());
                let mut facts = facts.unwrap_or_else(|| facts_of(1));
                facts.capacity.memory_mib = 1024 + u64::from(b % 4) * 512;
                Command::ReportHost { report, facts }
            }),
            16 => (Actor::Host(any_host), any_host, {
                let old = b.is_multiple_of(4);
                let reboot = if old { u128::from(b % 8) } else { u128::from(self.counter) << 20 };
                let facts = facts(reboot, 4, 2048);
                Command::ReportHost { report: ReportId { boot: facts.boot, ..report }, facts }
            }),
            17 => (Actor::Duty(leader), leader, Command::HostSuspect { host: any_host }),
            18 => (Actor::Duty(leader), leader, Command::HostLost { host: any_host }),
            19 | 20 => (Actor::Duty(leader), leader, Command::HostRecover { host: any_host }),
            21..=23 => {
                let strategy = [RunStrategy::Always, RunStrategy::Manual, RunStrategy::Halted][usize::from(b % 3)];
                let name = format!("vm{}", a % 20);
                let spec = spec(b);
                (root, leader, Command::VmDefine { name, cluster: None, spec, run_strategy: strategy })
            }
            24 => {
                let change = VmChange {
                    name: b.is_multiple_of(2).then(|| format!("vm{}", b % 20)),
                    run_strategy: b.is_multiple_of(3).then(|| {
                        [RunStrategy::Always, RunStrategy::Manual, RunStrategy::Halted][usize::from(b % 9 / 3)]
                    }),
                    spec: some_change(b),
                };
                (root, leader, Command::VmChange { vm, change })
            }
            25 => (root, leader, Command::VmDelete { vm }),
            26..=28 => {
                let host = b.is_multiple_of(4).then_some(any_host);
                (root, leader, Command::VmStart { vm, host })
            }
            29 | 30 => {
                let mode = if b.is_multiple_of(2) { StopMode::Shutdown } else { StopMode::PowerOff };
                (root, leader, Command::VmStop { vm, mode })
            }
            31 => (root, leader, Command::VmReset { vm: about }),
            32 | 33 => (Actor::Host(holder), holder, {
                let all =
                    [GuestStatus::PoweringUp, GuestStatus::Up, GuestStatus::PausedLease, GuestStatus::PoweringDown];
                let status = all[usize::from(b % 4)];
                // Sometimes about an epoch that is over.
                let epoch = if b.is_multiple_of(9) { Epoch(epoch.0.saturating_sub(1)) } else { epoch };
                Command::ReportVmStatus { report: holder_report, vm: about, epoch, status }
            }),
            34..=36 => (Actor::Host(holder), holder, {
                let all = [
                    ExitReason::GuestPoweredOff,
                    ExitReason::PoweredOff,
                    ExitReason::GuestFault,
                    ExitReason::Lost,
                    ExitReason::StartFailed,
                ];
                let reason = all[usize::from(b % 5)];
                Command::ReportVmExited { report: holder_report, vm: about, epoch, reason, detail: String::new() }
            }),
            37 => {
                let data_center = DataCenterId(1);
                let spm = state.data_centers.get(&data_center).and_then(|dc| dc.spm).map_or(any_host, |spm| spm.host);
                (Actor::Host(spm), spm, Command::SpmRelease { data_center })
            }
            40 if b.is_multiple_of(3) => (Actor::Host(holder), holder, {
                let what = ["no space", "I/O error"][usize::from(b % 2)].to_owned();
                let fault = DiskFault { disk: "root".to_owned(), what, no_space: b.is_multiple_of(2) };
                let fault = (!a.is_multiple_of(4)).then_some(fault);
                Command::ReportVmDiskFault { report: holder_report, vm: about, epoch, fault }
            }),
            40 => {
                let paused = b.is_multiple_of(2);
                (root, leader, Command::VmPause { vm: about, paused })
            }
            41..=44 if !is_up(state, about) => {
                let status = GuestStatus::Up;
                let command = Command::ReportVmStatus { report: holder_report, vm: about, epoch, status };
                (Actor::Host(holder), holder, command)
            }
            41..=44 => {
                let host = b.is_multiple_of(4).then_some(any_host);
                (root, leader, Command::VmMigrate { vm: about, host })
            }
            45..=48 => {
                migration_step(state, step, self.counter).unwrap_or((root, leader, Command::VmCancelMigration { vm }))
            }
            68..=72 => {
                suspension_step(state, step, self.counter).unwrap_or((root, leader, Command::VmSuspend { vm: about }))
            }
            53..=59 => match devices::step(state, step, about, epoch, holder_report) {
                devices::Said::User(command) => (root, leader, command),
                devices::Said::Host(command) => (Actor::Host(holder), holder, command),
            },
            38 | 39 => (Actor::Host(holder), holder, {
                let interface = GuestInterface {
                    name: "eth0".to_owned(),
                    mac: None,
                    addresses: [format!("10.0.0.{}/24", b % 3 + 1).parse().expect("an address")].into(),
                };
                let facts = GuestFacts { interfaces: [interface].into(), ..GuestFacts::default() };
                let epoch = if b.is_multiple_of(9) { Epoch(epoch.0.saturating_sub(1)) } else { epoch };
                Command::ReportVmGuest { report: holder_report, vm: about, epoch, facts: facts.into() }
            }),
            // What the leader owes, or a stray duty.
            _ => {
                let owed = planner::due(state, leader);
                let stray = match b % 3 {
                    0 => Command::SpmGrant { data_center: DataCenterId(1), host: any_host },
                    1 if a.is_multiple_of(2) => Command::EventsTrim { upto: Seq(u64::from(b % 64)) },
                    _ => Command::VmPlace { vm },
                };
                let command = owed.get(usize::from(b) % (owed.len() + 1)).cloned().unwrap_or(stray);
                (Actor::Duty(leader), leader, command)
            }
        };
        let idempotency =
            step.keyed.then(|| IdempotencyKey { key: format!("k{}", a % 8), body_hash: [(b % 2) as u8; 32] });
        Request { actor, origin, idempotency, command }
    }
}

fn is_up(state: &State, vm: VmId) -> bool {
    let observed = state.vms.get(&vm).and_then(|vm| vm.observed);
    observed.is_some_and(|observed| observed.status == GuestStatus::Up)
}

/// What one of the two hosts, or a user, says of a migration that is under way.
fn migration_step(state: &State, step: &Step, counter: u64) -> Option<(Actor, HostId, Command)> {
    let Step { a, b, .. } = *step;
    let moving: Vec<(VmId, Migration)> = state.migrations.iter().map(|(vm, moving)| (*vm, moving.clone())).collect();
    let (vm, Migration { id, from, to, .. }) = moving.get(usize::from(a) % moving.len().max(1))?.clone();
    // Sometimes an older one, and sometimes the wrong host.
    let migration = if b.is_multiple_of(11) { MigrationId(id.0.saturating_sub(1)) } else { id };
    let speaker = |right: HostId, wrong: HostId| if b.is_multiple_of(13) { wrong } else { right };
    let report = |host: HostId| {
        let boot = state.hosts.get(&host).map_or(BootId::default(), |host| host.facts.boot);
        ReportId { host, boot, counter }
    };
    let (host, command) = match b % 8 {
        0..=3 => {
            let host = speaker(to, from);
            (host, Command::ReportMigrationLoaded { report: report(host), vm, migration })
        }
        4 | 5 => {
            let host = speaker(from, to);
            let progress = MigrationProgress { round: u32::from(a % 4), ..MigrationProgress::default() };
            (host, Command::ReportMigrationProgress { report: report(host), vm, migration, progress })
        }
        6 => {
            let host = if a.is_multiple_of(2) { from } else { to };
            let detail = "the stream broke".to_owned();
            (host, Command::ReportMigrationFailed { report: report(host), vm, migration, detail })
        }
        _ => {
            let host = *state.hosts.iter().next()?.0;
            return Some((Actor::Root(host), host, Command::VmCancelMigration { vm }));
        }
    };
    Some((Actor::Host(host), host, command))
}

/// What becomes of a guest that falls asleep, sleeps, or wakes up.
fn suspension_step(state: &State, step: &Step, counter: u64) -> Option<(Actor, HostId, Command)> {
    let Step { a, b, .. } = *step;
    let all: Vec<(VmId, Suspension)> = state.suspensions.iter().map(|(vm, it)| (*vm, it.clone())).collect();
    // Sometimes another one is begun.
    let (vm, Suspension { id, host, phase }) = all.get(usize::from(a) % (all.len() + 1))?.clone();
    let leader = *state.hosts.iter().next()?.0;
    // Sometimes an older one, and sometimes the wrong host.
    let suspension = if b.is_multiple_of(11) { MigrationId(id.0.saturating_sub(1)) } else { id };
    let host = if b.is_multiple_of(13) { leader } else { host };
    let boot = state.hosts.get(&host).map_or(BootId::default(), |host| host.facts.boot);
    let report = ReportId { host, boot, counter };
    let (actor, origin, command) = match (phase, b % 4) {
        (SuspensionPhase::Saving { .. }, 0) => (Actor::Host(host), host, {
            Command::ReportSuspensionFailed { report, vm, suspension, detail: "no space".to_owned() }
        }),
        (SuspensionPhase::Saving { .. }, _) => {
            (Actor::Host(host), host, Command::ReportVmSuspended { report, vm, suspension, bytes: 1 << 20 })
        }
        (SuspensionPhase::Asleep(_), 0) => {
            (Actor::Root(leader), leader, Command::VmStop { vm, mode: StopMode::PowerOff })
        }
        (SuspensionPhase::Asleep(_), _) => (Actor::Root(leader), leader, Command::VmStart { vm, host: None }),
        (SuspensionPhase::Waking { epoch, .. }, 0) => (Actor::Host(host), host, {
            let reason = ExitReason::StartFailed;
            Command::ReportVmExited { report, vm, epoch, reason, detail: "another kernel".to_owned() }
        }),
        (SuspensionPhase::Waking { epoch, .. }, _) => {
            (Actor::Host(host), host, Command::ReportVmStatus { report, vm, epoch, status: GuestStatus::Up })
        }
    };
    Some((actor, origin, command))
}

/// Of some of what a guest is made of.
fn some_change(number: u16) -> VmSpecChange {
    let VmSpec { vcpus, memory_mib, disks, nics, release, .. } = spec(number / 3);
    VmSpecChange {
        vcpus: number.is_multiple_of(5).then_some(vcpus),
        memory_mib: number.is_multiple_of(3).then_some(memory_mib),
        disks: number.is_multiple_of(7).then_some(disks),
        nics: number.is_multiple_of(4).then_some(nics),
        release: release.filter(|_| number.is_multiple_of(2)),
        ..VmSpecChange::default()
    }
}

fn facts_of(number: u16) -> HostFacts {
    facts(u128::from(number), 4, 2048)
}
