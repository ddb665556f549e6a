//! How an event changes the state. Total and without rules: an event about something that is not there
//! changes nothing, and nothing here can fail (DESIGN §3).

use std::sync::Arc;

use crate::event::Event;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::VmId;
use crate::state::Administrative;
use crate::state::Certificate;
use crate::state::Cluster;
use crate::state::Cpu;
use crate::state::DataCenter;
use crate::state::Desired;
use crate::state::DeviceWord;
use crate::state::Exit;
use crate::state::ExitReason;
use crate::state::GuestStatus;
use crate::state::Host;
use crate::state::HostUsage;
use crate::state::Liveness;
use crate::state::Migration;
use crate::state::MigrationPhase;
use crate::state::Observed;
use crate::state::Pause;
use crate::state::Permit;
use crate::state::Plugs;
use crate::state::RunStrategy;
use crate::state::Saved;
use crate::state::Site;
use crate::state::SpmPermit;
use crate::state::State;
use crate::state::StopMode;
use crate::state::Suspension;
use crate::state::SuspensionPhase;
use crate::state::Token;
use crate::state::TokenStatus;
use crate::state::Vm;
use crate::state::VmSpec;

/// Where in the log an event stands.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub seq: Seq,
    pub at_ms: u64,
}

pub fn evolve(state: &mut State, event: &Event, at: At) {
    match event {
        Event::SiteInitialised(e) => {
            state.site = Some(Site {
                id: e.site,
                name: e.name.clone(),
                ca: e.ca,
                feature_level: e.feature_level,
                trimmed_upto: Seq::ZERO,
                voters: Site::VOTERS,
                generation: 0,
                recovered_at: Seq::ZERO,
            });
        }
        Event::FeatureLevelActivated(e) => update_site(state, |site| site.feature_level = e.level),
        Event::VoterCountChanged(e) => update_site(state, |site| site.voters = e.voters),
        Event::SiteRecovered(e) => update_site(state, |site| {
            site.generation = e.generation;
            site.ca = e.ca;
            site.recovered_at = at.seq;
        }),
        Event::EventsTrimmed(e) => update_site(state, |site| site.trimmed_upto = e.upto),
        Event::DataCenterCreated(e) => {
            state.data_centers.insert(e.data_center, DataCenter { name: e.name.clone(), spm: None });
        }
        Event::ClusterCreated(e) => {
            let cluster =
                Cluster { name: e.name.clone(), data_center: e.data_center, scheduling: e.scheduling.clone() };
            state.clusters.insert(e.cluster, cluster);
        }
        Event::TokenCreated(e) => {
            let token = Token {
                purpose: e.purpose,
                secret_hash: e.secret_hash,
                created_ms: at.at_ms,
                expires_ms: e.expires_ms,
                note: e.note.clone(),
                status: TokenStatus::Valid,
            };
            state.tokens.insert(e.token, token);
        }
        Event::TokenRevoked(e) => state.tokens.update(&e.token, |token| token.status = TokenStatus::Revoked),
        Event::TokenUsed(e) => state.tokens.update(&e.token, |token| token.status = TokenStatus::UsedBy(e.host)),

        Event::HostJoined(e) => {
            let host = Host {
                name: e.candidate.name.clone(),
                address: e.candidate.address.clone(),
                cluster: e.cluster,
                public_key: e.candidate.public_key,
                certificate: None,
                facts: e.candidate.facts.clone(),
                previous_boots: Vec::new(),
                report_counter: 0,
                administrative: Administrative::Active,
                liveness: Liveness::New,
                spm_priority: 5,
                usage: HostUsage::default(),
                failure_domain: String::new(),
            };
            state.hosts.insert(e.host, host);
        }
        Event::CertificateIssued(e) => state.hosts.update(&e.host, |host| {
            host.certificate = Some(Certificate {
                serial: e.serial.clone(),
                fingerprint: e.fingerprint,
                not_after_ms: e.not_after_ms,
            });
        }),
        Event::HostReported(e) => state.hosts.update(&e.host, |host| {
            host.facts = e.facts.clone();
            host.report_counter = e.counter;
            if host.liveness == Liveness::New {
                host.liveness = Liveness::Alive;
            }
        }),
        Event::HostRebooted(e) => state.hosts.update(&e.host, |host| {
            if host.previous_boots.len() >= Host::PREVIOUS_BOOTS_MAX {
                host.previous_boots.remove(0);
            }
            host.previous_boots.push(e.from);
            host.facts.boot = e.to;
            host.report_counter = 0;
            host.liveness = Liveness::Alive;
        }),
        Event::HostSuspected(e) => set_liveness(state, e.host, Liveness::Suspected),
        Event::HostUnreachable(e) => set_liveness(state, e.host, Liveness::Unreachable),
        Event::HostRecovered(e) => set_liveness(state, e.host, Liveness::Alive),
        Event::HostMaintenanceRequested(e) => {
            state.hosts.update(&e.host, |host| host.administrative = Administrative::Maintenance);
        }
        Event::HostActivated(e) => state.hosts.update(&e.host, |host| host.administrative = Administrative::Active),
        Event::HostRemoved(e) => {
            state.hosts.remove(&e.host);
            state.processors.remove(&e.host);
            state.removed_hosts.insert(e.host, at.seq);
            // Their files are gone with it.
            let lost = state.suspensions.iter().filter(|(_, it)| it.host == e.host).map(|(vm, _)| *vm);
            for vm in lost.collect::<Vec<_>>() {
                state.suspensions.remove(&vm);
            }
        }
        Event::HostFailureDomainChanged(e) => {
            state.hosts.update(&e.host, |host| host.failure_domain = e.domain.clone());
        }
        Event::HostProcessorReported(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            state.processors.insert(e.host, e.processor.clone());
        }
        Event::ClusterMigrationPolicyChanged(e) => {
            state.migration_policies.insert(e.cluster, e.policy);
        }
        Event::HostSpmPriorityChanged(e) => state.hosts.update(&e.host, |host| host.spm_priority = e.priority),

        Event::VmDefined(e) => {
            let vm = Vm {
                name: e.name.clone(),
                cluster: e.cluster,
                spec: e.spec.clone(),
                run_strategy: e.run_strategy,
                desired: match e.run_strategy {
                    RunStrategy::Always => Desired::Running,
                    RunStrategy::Manual | RunStrategy::Halted => Desired::Stopped(StopMode::PowerOff),
                },
                desired_at: at.seq,
                reset_at: None,
                permit: None,
                granted_spec: None,
                observed: None,
                last_exit: None,
                placement: None,
            };
            state.vm_names.insert(e.name.clone(), e.vm);
            state.vms.insert(e.vm, vm);
        }
        Event::VmRenamed(e) => {
            if let Some(vm) = state.vms.get(&e.vm) {
                state.vm_names.remove(&vm.name.clone());
                state.vm_names.insert(e.name.clone(), e.vm);
            }
            state.vms.update(&e.vm, |vm| vm.name = e.name.clone());
        }
        Event::VmSpecChanged(e) => state.vms.update(&e.vm, |vm| vm.spec = e.spec.clone()),
        Event::VmRunStrategyChanged(e) => state.vms.update(&e.vm, |vm| vm.run_strategy = e.run_strategy),
        Event::VmDeleted(e) => {
            if let Some(vm) = state.vms.remove(&e.vm) {
                state.vm_names.remove(&vm.name);
                state.suspensions.remove(&e.vm);
            }
        }
        Event::VmDesiredChanged(e) => state.vms.update(&e.vm, |vm| {
            vm.desired = e.desired;
            vm.desired_at = at.seq;
        }),
        Event::VmDesiredReset(e) => state.vms.update(&e.vm, |vm| vm.reset_at = Some(at.seq)),
        Event::VmPlaced(e) => state.vms.update(&e.vm, |vm| vm.placement = Some(e.explanation.clone())),
        Event::VmPermitGranted(e) => {
            let mut spec = None;
            let settled = wake(state, e.vm, Epoch::from(at.seq))
                .or_else(|| state.vms.get(&e.vm).and_then(|vm| settled_spec(state, vm)));
            state.vms.update(&e.vm, |vm| {
                vm.permit = Some(Permit { epoch: Epoch::from(at.seq), host: e.host, boot: e.boot, release: e.release });
                vm.granted_spec = Some(settled.unwrap_or_else(|| vm.spec.clone()));
                vm.observed = None;
                spec = vm.granted_spec.clone();
            });
            if let Some(spec) = spec {
                take(state, e.host, &spec);
            }
        }
        Event::VmPermitReleased(e) => release(state, e.vm, e.epoch),
        Event::VmObservedStatus(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            let arrived = state.migrations.get(&e.vm).is_some_and(|migration| {
                migration.phase == MigrationPhase::Committed { epoch: e.epoch } && e.status != GuestStatus::PoweringUp
            });
            if arrived {
                state.migrations.remove(&e.vm);
            }
            if waking_in(state, e.vm, e.epoch).is_some() && e.status != GuestStatus::PoweringUp {
                state.suspensions.remove(&e.vm);
            }
            state.vms.update(&e.vm, |vm| {
                vm.observed = Some(Observed { epoch: e.epoch, host: e.host, status: e.status, at: at.seq });
            });
        }
        Event::VmObservedExit(e) => {
            if !matches!(e.reason, ExitReason::HostRebooted | ExitReason::HostGone) {
                state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            }
            // It never ran, so its file is as good as before.
            if let Some(saved) = waking_in(state, e.vm, e.epoch).filter(|_| e.reason == ExitReason::StartFailed) {
                state.suspensions.update(&e.vm, |it| it.phase = SuspensionPhase::Asleep(saved));
            }
            state.vms.update(&e.vm, |vm| {
                vm.observed = None;
                vm.last_exit =
                    Some(Exit { epoch: e.epoch, host: e.host, reason: e.reason, detail: e.detail.clone(), at: at.seq });
            });
        }
        Event::VmObservedGuest(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            state.guests.insert(e.vm, e.facts.clone());
        }

        Event::VmObservedDiskFault(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            match &e.fault {
                Some(fault) => state.disk_faults.insert(e.vm, fault.clone()),
                None => {
                    state.disk_faults.remove(&e.vm);
                }
            }
        }
        Event::VmDesiredDevices(e) => {
            state.vms.update(&e.vm, |vm| {
                let more = |spec: Arc<VmSpec>| {
                    let placed = VmSpec::clone(&spec).with_slots().unwrap_or_else(|| VmSpec::clone(&spec));
                    Arc::new(placed.with(&e.plug))
                };
                vm.granted_spec = vm.granted_spec.take().map(more);
            });
            let mut plugs = state.plugs.get(&e.vm).cloned().unwrap_or_default();
            plugs.coming.extend(e.plug.ids().map(str::to_owned));
            for device in &e.unplug {
                plugs.coming.remove(device);
                plugs.said.remove(device);
                plugs.leaving.insert(device.clone());
            }
            state.plugs.insert(e.vm, plugs);
        }
        Event::VmObservedDevice(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            let mut plugs = state.plugs.get(&e.vm).cloned().unwrap_or_default();
            if e.word == DeviceWord::Unplugged {
                plugs.leaving.remove(&e.device);
                plugs.said.remove(&e.device);
                state.vms.update(&e.vm, |vm| {
                    vm.granted_spec =
                        vm.granted_spec.take().map(|spec| Arc::new(VmSpec::clone(&spec).without(&e.device)));
                });
            } else {
                if e.word == DeviceWord::Plugged {
                    plugs.coming.remove(&e.device);
                }
                plugs.said.insert(e.device.clone(), e.word.clone());
            }
            if plugs == Plugs::default() {
                state.plugs.remove(&e.vm);
            } else {
                state.plugs.insert(e.vm, plugs);
            }
        }
        Event::VmDesiredMemory(e) => {
            state.memory_targets.insert(e.vm, e.mib);
        }
        Event::VmDesiredPause(e) => {
            state.pauses.insert(e.vm, Pause { wanted: e.paused, at: at.seq });
        }

        Event::MigrationStarted(e) => {
            let migration = Migration {
                id: at.seq.into(),
                epoch: e.epoch,
                from: e.from,
                to: e.to,
                to_boot: e.to_boot,
                phase: MigrationPhase::Moving,
                progress: None,
            };
            state.migrations.insert(e.vm, migration);
            state.vms.update(&e.vm, |vm| vm.placement = Some(e.explanation.clone()));
            if let Some(spec) = running_spec(state, e.vm) {
                take(state, e.to, &spec);
            }
        }
        Event::MigrationProgressed(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            state.migrations.update(&e.vm, |migration| migration.progress = Some(e.progress));
        }
        Event::MigrationCommitted(e) => {
            let epoch = Epoch::from(at.seq);
            state.hosts.update(&e.to, |host| host.report_counter = e.counter);
            state.vms.update(&e.vm, |vm| {
                vm.permit = Some(Permit { epoch, host: e.to, boot: e.boot, release: e.release });
                vm.observed = None;
            });
            state.migrations.update(&e.vm, |migration| migration.phase = MigrationPhase::Committed { epoch });
            if let Some(spec) = running_spec(state, e.vm) {
                give_back(state, e.from, &spec);
            }
        }
        Event::MigrationAborted(e) => {
            if let Some(spec) = running_spec(state, e.vm).filter(|_| state.moving(e.vm).is_some()) {
                give_back(state, e.to, &spec);
            }
            state.migrations.remove(&e.vm);
        }

        Event::SuspensionStarted(e) => {
            let phase = SuspensionPhase::Saving { epoch: e.epoch };
            state.suspensions.insert(e.vm, Suspension { id: at.seq.into(), host: e.host, phase });
        }
        Event::SuspensionCompleted(e) => {
            state.hosts.update(&e.host, |host| host.report_counter = e.counter);
            if let Some(spec) = running_spec(state, e.vm) {
                let saved = Saved { bytes: e.bytes, spec };
                state.suspensions.update(&e.vm, |it| it.phase = SuspensionPhase::Asleep(saved));
            }
        }
        Event::SuspensionAborted(e) => {
            state.suspensions.remove(&e.vm);
        }
        Event::SuspensionDiscarded(e) => {
            state.suspensions.remove(&e.vm);
        }

        Event::SpmGranted(e) => state.data_centers.update(&e.data_center, |data_center| {
            data_center.spm = Some(SpmPermit { host: e.host, token: at.seq });
        }),
        Event::SpmReleased(e) => state.data_centers.update(&e.data_center, |data_center| data_center.spm = None),
    }
}

fn update_site(state: &mut State, change: impl FnOnce(&mut Site)) {
    if let Some(site) = state.site.as_mut() {
        change(site);
    }
}

fn set_liveness(state: &mut State, host: HostId, liveness: Liveness) {
    state.hosts.update(&host, |host| host.liveness = liveness);
}

fn take(state: &mut State, host: HostId, spec: &Arc<VmSpec>) {
    state.hosts.update(&host, |host| {
        host.usage.vcpus += spec.vcpus;
        host.usage.memory_mib += spec.memory_mib;
        host.usage.vms += 1;
    });
}

fn release(state: &mut State, vm: VmId, epoch: Epoch) {
    let mut freed = None;
    if state.vms.get(&vm).is_some_and(|vm| vm.permit.is_some_and(|permit| permit.epoch == epoch)) {
        state.vms.update(&vm, |vm| {
            freed = vm.permit.take().zip(vm.granted_spec.take());
            vm.observed = None;
        });
        state.guests.remove(&vm);
        state.migrations.remove(&vm);
        state.pauses.remove(&vm);
        state.disk_faults.remove(&vm);
        state.plugs.remove(&vm);
        state.memory_targets.remove(&vm);
        if state.suspensions.get(&vm).is_some_and(|it| it.epoch() == Some(epoch)) {
            state.suspensions.remove(&vm);
        }
    }
    if let Some((permit, spec)) = freed {
        give_back(state, permit.host, &spec);
    }
}

/// A guest that sleeps gets the permit of this epoch: what it is made of.
fn wake(state: &mut State, vm: VmId, epoch: Epoch) -> Option<Arc<VmSpec>> {
    let saved = state.suspensions.get(&vm)?.asleep()?.clone();
    let spec = saved.spec.clone();
    state.suspensions.update(&vm, |it| it.phase = SuspensionPhase::Waking { epoch, saved });
    Some(spec)
}

/// The file of a guest that wakes up under this permit.
fn waking_in(state: &State, vm: VmId, epoch: Epoch) -> Option<Saved> {
    match &state.suspensions.get(&vm)?.phase {
        SuspensionPhase::Waking { epoch: its, saved } if *its == epoch => Some(saved.clone()),
        _ => None,
    }
}

fn give_back(state: &mut State, host: HostId, spec: &VmSpec) {
    state.hosts.update(&host, |host| {
        host.usage.vcpus = host.usage.vcpus.saturating_sub(spec.vcpus);
        host.usage.memory_mib = host.usage.memory_mib.saturating_sub(spec.memory_mib);
        host.usage.vms = host.usage.vms.saturating_sub(1);
    });
}

/// What a guest that starts now is made of, where that is more than its definition says.
fn settled_spec(state: &State, vm: &Vm) -> Option<Arc<VmSpec>> {
    let model = state.settled_model(vm.cluster, vm.spec.cpu.model);
    let cpu = Cpu { model, ..vm.spec.cpu };
    (model != vm.spec.cpu.model).then(|| Arc::new(VmSpec { cpu, ..VmSpec::clone(&vm.spec) }))
}

/// What the guest that holds a permit is made of.
fn running_spec(state: &State, vm: VmId) -> Option<Arc<VmSpec>> {
    state.vms.get(&vm)?.granted_spec.clone()
}
