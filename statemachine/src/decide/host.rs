//! Hosts: join, certificates, maintenance, removal, reports, and the leader's word on their silence.

use super::Context;
use super::Decided;
use super::form;
use super::migration;
use super::suspension;
use crate::command::HostCandidate;
use crate::command::HostChange;
use crate::command::HostFacts;
use crate::command::ReportId;
use crate::event::CertificateIssued;
use crate::event::Event;
use crate::event::HostActivated;
use crate::event::HostFailureDomainChanged;
use crate::event::HostJoined;
use crate::event::HostMaintenanceRequested;
use crate::event::HostProcessorReported;
use crate::event::HostRebooted;
use crate::event::HostRecovered;
use crate::event::HostRemoved;
use crate::event::HostReported;
use crate::event::HostSpmPriorityChanged;
use crate::event::HostSuspected;
use crate::event::HostUnreachable;
use crate::event::ReleaseEvidence;
use crate::event::TokenUsed;
use crate::event::VmDesiredChanged;
use crate::event::VmObservedExit;
use crate::event::VmPermitReleased;
use crate::ids::HostId;
use crate::mutant;
use crate::mutant::Mutant;
use crate::rejection::Noun;
use crate::rejection::Rejection;
use crate::rejection::TokenFault;
use crate::state::AbortReason;
use crate::state::Administrative;
use crate::state::CpuModel;
use crate::state::Created;
use crate::state::Desired;
use crate::state::ExitReason;
use crate::state::Fingerprint;
use crate::state::Host;
use crate::state::HostProcessor;
use crate::state::Liveness;
use crate::state::StopMode;
use crate::state::TokenPurpose;
use crate::state::TokenStatus;

/// Hosts of a site. Seven of them openraft carries (3 voters, 4 standby learners), all others pull (DESIGN §4); 500 were measured.
pub const HOSTS_MAX: usize = 500;

pub(super) fn find<'a>(context: &Context<'a>, host: HostId) -> Result<&'a Host, Rejection> {
    if let Some(found) = context.state.hosts.get(&host) {
        return Ok(found);
    }
    match context.state.removed_hosts.get(&host) {
        Some(at) => Err(Rejection::HostRemoved { name: host.to_string(), at: *at }),
        None => Err(Rejection::NotFound { noun: Noun::Host, name: host.to_string() }),
    }
}

pub(super) fn check_candidate(candidate: &HostCandidate) -> Result<(), Rejection> {
    form::name("host name", &candidate.name)?;
    form::address(&candidate.address)?;
    form::capacity(&candidate.facts.capacity)?;
    form::text("version", &candidate.facts.version, 64)
}

pub(super) fn join(
    context: &Context<'_>,
    secret_hash: &[u8; 32],
    candidate: &HostCandidate,
) -> Result<Decided, Rejection> {
    let refused = |fault| Rejection::TokenRefused { fault };
    let Some((token, known)) = context.state.token_by_hash(secret_hash) else {
        return Err(refused(TokenFault::Unknown));
    };
    if known.purpose != TokenPurpose::Join {
        return Err(refused(TokenFault::WrongPurpose));
    }
    match known.status {
        TokenStatus::Revoked => return Err(refused(TokenFault::Revoked)),
        TokenStatus::UsedBy(host) => return join_again(context, host, candidate),
        TokenStatus::Valid if known.expires_ms <= context.stamp.at_ms => return Err(refused(TokenFault::Expired)),
        TokenStatus::Valid => {}
    }
    check_candidate(candidate)?;
    if context.state.host_by_name(&candidate.name).is_some() {
        return Err(Rejection::NameTaken { noun: Noun::Host, name: candidate.name.clone() });
    }
    if let Some(twin) = context.state.hosts.values().find(|host| host.address == candidate.address) {
        let why = format!("{} is the address of host {}", candidate.address, twin.name);
        return Err(form::invalid("address", why));
    }
    if context.state.hosts.values().any(|host| host.public_key == candidate.public_key) {
        return Err(form::invalid("key", "another host has this key pair; was its state directory copied?"));
    }
    if context.state.hosts.len() >= HOSTS_MAX {
        let why = format!("this release runs at most {HOSTS_MAX} hosts in a site");
        return Err(Rejection::HostState { name: candidate.name.clone(), why });
    }
    let level = context.state.site.as_ref().map_or(0, |site| site.feature_level);
    if candidate.facts.feature_level < level {
        let why = format!("this site is at feature level {level}; install a newer quorate on the host");
        return Err(form::invalid("feature level", why));
    }
    let Some(cluster) = context.state.clusters.iter().next().map(|(id, _)| *id) else {
        return Err(Rejection::NotInitialised);
    };
    let removed = context.state.removed_hosts.iter().next().map(|(id, _)| *id);
    let host = match removed.filter(|_| mutant::is_on(Mutant::HostIdReused)) {
        Some(removed) => removed,
        None => HostId(context.seq.0),
    };
    let events =
        vec![HostJoined { host, cluster, candidate: candidate.clone() }.into(), TokenUsed { token, host }.into()];
    Ok(Decided::many(events).creating(Created::Host(host)))
}

/// The same machine asks again, because the first answer was lost: same key pair, same host.
fn join_again(context: &Context<'_>, host: HostId, candidate: &HostCandidate) -> Result<Decided, Rejection> {
    match context.state.hosts.get(&host) {
        Some(known) if known.public_key == candidate.public_key => Ok(Decided::nothing().creating(Created::Host(host))),
        _ => Err(Rejection::TokenRefused { fault: TokenFault::Used }),
    }
}

pub(super) fn certificate_issue(
    context: &Context<'_>,
    host: HostId,
    serial: &str,
    fingerprint: Fingerprint,
    not_after_ms: u64,
) -> Result<Decided, Rejection> {
    find(context, host)?;
    form::text("serial", serial, 64)?;
    Ok(Decided::one(CertificateIssued { host, serial: serial.to_owned(), fingerprint, not_after_ms }))
}

pub(super) fn maintenance(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    match find(context, host)?.administrative {
        Administrative::Active => {
            let mut events: Vec<Event> = vec![HostMaintenanceRequested { host }.into()];
            // It takes no guest any more, so those on their way to it would stand still for ever.
            events.extend(migration::abort_into(context.state, host, AbortReason::Cancelled));
            Ok(Decided::many(events))
        }
        Administrative::Maintenance => Ok(Decided::nothing()),
    }
}

pub(super) fn activate(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    match find(context, host)?.administrative {
        Administrative::Maintenance => Ok(Decided::one(HostActivated { host })),
        Administrative::Active => Ok(Decided::nothing()),
    }
}

pub(super) fn remove(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    let known = find(context, host)?;
    let refused = |why: String| Err(Rejection::HostState { name: known.name.clone(), why });
    if context.state.hosts.len() == 1 {
        return refused("it is the only host of the site; stop hostd and wipe its state instead".to_owned());
    }
    if known.administrative != Administrative::Maintenance {
        return refused(format!("put it into maintenance first: `quorate host maintenance {}`", known.name));
    }
    if known.usage.vms > 0 {
        return refused(format!("{} VMs still hold a permit on it; stop them first", known.usage.vms));
    }
    let sleeper = context.state.suspensions.iter().find(|(_, it)| it.host == host);
    if let Some(name) = sleeper.and_then(|(vm, _)| Some(&context.state.vms.get(vm)?.name)) {
        return refused(format!(
            "{name} is suspended on it; wake it up there, `quorate vm start {name}`, \
             or throw its memory away, `quorate vm stop {name} --power-off`"
        ));
    }
    if context.state.data_centers.values().any(|dc| dc.spm.is_some_and(|spm| spm.host == host)) {
        return refused(
            "it is the storage manager and gives that up within seconds of maintenance; try again".to_owned(),
        );
    }
    Ok(Decided::one(HostRemoved { host }))
}

pub(super) fn change(context: &Context<'_>, host: HostId, change: &HostChange) -> Result<Decided, Rejection> {
    let known = find(context, host)?;
    let mut events: Vec<Event> = Vec::new();
    if let Some(priority) = change.spm_priority
        && priority != known.spm_priority
    {
        if !(-1..=10).contains(&priority) {
            return Err(form::invalid("spm priority", "it is -1 (never) or 0 to 10"));
        }
        events.push(HostSpmPriorityChanged { host, priority }.into());
    }
    if let Some(domain) = &change.failure_domain
        && *domain != known.failure_domain
    {
        if !domain.is_empty() {
            form::name("failure domain", domain)?;
        }
        events.push(HostFailureDomainChanged { host, domain: domain.clone() }.into());
    }
    Ok(Decided::many(events))
}

/// A report of the host's current incarnation that is newer than all before it.
pub(super) fn check_report<'a>(context: &Context<'a>, report: &ReportId) -> Result<&'a Host, Rejection> {
    let host = find(context, report.host)?;
    match report.boot == host.facts.boot && report.counter > host.report_counter {
        true => Ok(host),
        false => Err(Rejection::StaleReport),
    }
}

pub(super) fn report_processor(
    context: &Context<'_>,
    report: &ReportId,
    processor: &HostProcessor,
) -> Result<Decided, Rejection> {
    check_report(context, report)?;
    let HostProcessor { vendor, model_name, models, fingerprint, .. } = processor;
    for (field, words) in [("vendor", vendor), ("model name", model_name), ("fingerprint", fingerprint)] {
        form::text(field, words, HostProcessor::MAX_WORDS)?;
    }
    if models.iter().any(|model| !CpuModel::NAMED.contains(model)) || models.len() > CpuModel::NAMED.len() {
        return Err(form::invalid("models", "only named models, each once, say what a host can run"));
    }
    if context.state.processors.get(&report.host) == Some(processor) {
        return Ok(Decided::nothing());
    }
    let (host, counter, processor) = (report.host, report.counter, processor.clone());
    Ok(Decided::one(HostProcessorReported { host, counter, processor }))
}

pub(super) fn report(context: &Context<'_>, report: &ReportId, facts: &HostFacts) -> Result<Decided, Rejection> {
    let host = find(context, report.host)?;
    form::capacity(&facts.capacity)?;
    form::text("version", &facts.version, 64)?;
    if facts.boot != report.boot {
        return Err(form::invalid("boot id", "the report and its facts name different incarnations"));
    }
    let reported = HostReported { host: report.host, counter: report.counter, facts: facts.clone() };
    if report.boot == host.facts.boot {
        check_report(context, report)?;
        let news = host.facts != *facts || host.liveness == Liveness::New;
        return Ok(if news { Decided::one(reported) } else { Decided::nothing() });
    }
    // A late word of an incarnation that is known to be over must not end the present one.
    if host.previous_boots.contains(&report.boot) {
        return Err(Rejection::StaleReport);
    }
    let mut events: Vec<Event> = Vec::new();
    events.push(HostRebooted { host: report.host, from: host.facts.boot, to: report.boot }.into());
    events.push(reported.into());
    events.extend(migration::abort_into(context.state, report.host, AbortReason::TargetLost));
    for (vm, known, permit) in context.state.permits_on(report.host) {
        events.extend(migration::abort(context.state, vm, AbortReason::SourceLost));
        events.extend(suspension::abort(context.state, vm, AbortReason::SourceLost));
        let exit = VmObservedExit {
            vm,
            epoch: permit.epoch,
            host: report.host,
            counter: report.counter,
            reason: ExitReason::HostRebooted,
            detail: String::new(),
        };
        events.push(exit.into());
        events.push(VmPermitReleased { vm, epoch: permit.epoch, evidence: ReleaseEvidence::BootId }.into());
        if known.desired == Desired::Running && !known.restarts_after(ExitReason::HostRebooted) {
            events.push(VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::PowerOff) }.into());
        }
    }
    Ok(Decided::many(events))
}

pub(super) fn suspect(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    match find(context, host)?.liveness {
        Liveness::Alive => Ok(Decided::one(HostSuspected { host })),
        Liveness::New | Liveness::Suspected | Liveness::Unreachable => Ok(Decided::nothing()),
    }
}

pub(super) fn lost(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    match find(context, host)?.liveness {
        Liveness::Alive | Liveness::Suspected => {
            let mut events: Vec<Event> = vec![HostUnreachable { host }.into()];
            events.extend(migration::abort_into(context.state, host, AbortReason::TargetLost));
            Ok(Decided::many(events))
        }
        Liveness::New | Liveness::Unreachable => Ok(Decided::nothing()),
    }
}

pub(super) fn recover(context: &Context<'_>, host: HostId) -> Result<Decided, Rejection> {
    match find(context, host)?.liveness {
        Liveness::Suspected | Liveness::Unreachable => Ok(Decided::one(HostRecovered { host })),
        Liveness::New | Liveness::Alive => Ok(Decided::nothing()),
    }
}
