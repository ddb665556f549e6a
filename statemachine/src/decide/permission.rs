//! Who may ask for what. A host speaks for itself alone; duties belong to the leader's planner; tokens
//! act by their purpose.

use super::Context;
use crate::command::Actor;
use crate::command::Command;
use crate::ids::HostId;
use crate::rejection::Rejection;
use crate::state::TokenPurpose;
use crate::state::TokenStatus;

enum Needs {
    Administrator,
    /// The host that the command is about.
    Itself(HostId),
    /// The host that holds the thing, checked by the rule itself, or an administrator.
    HolderOrAdministrator,
    Duty,
    DutyOrAdministrator,
    Joiner,
}

fn needs(command: &Command) -> Needs {
    match command {
        Command::ReportHost { report, .. }
        | Command::ReportVmStatus { report, .. }
        | Command::ReportVmExited { report, .. }
        | Command::ReportVmGuest { report, .. }
        | Command::ReportVmDiskFault { report, .. }
        | Command::ReportVmDevice { report, .. }
        | Command::ReportProcessor { report, .. }
        | Command::ReportMigrationProgress { report, .. }
        | Command::ReportMigrationLoaded { report, .. }
        | Command::ReportMigrationFailed { report, .. }
        | Command::ReportVmSuspended { report, .. }
        | Command::ReportSuspensionFailed { report, .. } => Needs::Itself(report.host),
        Command::CertificateIssue { .. }
        | Command::HostSuspect { .. }
        | Command::HostLost { .. }
        | Command::HostRecover { .. }
        | Command::VmPlace { .. }
        | Command::EventsTrim { .. }
        | Command::FeatureLevelActivate { .. }
        | Command::SiteRecover { .. }
        | Command::SpmGrant { .. } => Needs::Duty,
        Command::SpmRelease { .. } => Needs::HolderOrAdministrator,
        Command::VmMigrate { .. } => Needs::DutyOrAdministrator,
        Command::HostJoin { .. } => Needs::Joiner,
        Command::SiteInit { .. }
        | Command::TokenCreate { .. }
        | Command::TokenRevoke { .. }
        | Command::HostMaintenance { .. }
        | Command::HostActivate { .. }
        | Command::HostRemove { .. }
        | Command::HostChange { .. }
        | Command::VoterCount { .. }
        | Command::VmDefine { .. }
        | Command::VmChange { .. }
        | Command::VmDelete { .. }
        | Command::VmStart { .. }
        | Command::VmStop { .. }
        | Command::VmReset { .. }
        | Command::VmPause { .. }
        | Command::VmMemory { .. }
        | Command::VmSuspend { .. }
        | Command::ClusterMigrationPolicy { .. }
        | Command::VmCancelMigration { .. } => Needs::Administrator,
    }
}

pub(super) fn check(context: &Context<'_>) -> Result<(), Rejection> {
    let actor = &context.request.actor;
    check_member(context, context.request.origin)?;
    let allowed = match (needs(&context.request.command), actor) {
        (Needs::Administrator | Needs::HolderOrAdministrator, Actor::Root(host)) => *host == context.request.origin,
        (Needs::Administrator | Needs::HolderOrAdministrator, Actor::Token(_)) => return check_token(context),
        (Needs::HolderOrAdministrator, Actor::Host(host)) => *host == context.request.origin,
        (Needs::Itself(about), Actor::Host(host)) => about == *host && *host == context.request.origin,
        (Needs::DutyOrAdministrator, Actor::Root(host)) => *host == context.request.origin,
        (Needs::DutyOrAdministrator, Actor::Token(_)) => return check_token(context),
        (Needs::Duty | Needs::DutyOrAdministrator, Actor::Duty(host)) => *host == context.request.origin,
        (Needs::Joiner, Actor::Joiner) => true,
        _ => false,
    };
    match allowed {
        true => Ok(()),
        false => Err(forbidden(actor, "it is not among this actor's rights")),
    }
}

fn check_member(context: &Context<'_>, host: HostId) -> Result<(), Rejection> {
    if context.state.hosts.contains(&host) {
        return Ok(());
    }
    match context.state.removed_hosts.get(&host) {
        Some(at) => Err(Rejection::HostRemoved { name: host.to_string(), at: *at }),
        None => Err(forbidden(&context.request.actor, "its host does not belong to this site")),
    }
}

fn check_token(context: &Context<'_>) -> Result<(), Rejection> {
    let actor = &context.request.actor;
    let Actor::Token(id) = actor else { return Err(forbidden(actor, "it shows no token")) };
    let Some(token) = context.state.tokens.get(id) else {
        return Err(forbidden(actor, "the token is unknown; ask for one with `quorate token create --admin`"));
    };
    if token.status != TokenStatus::Valid || token.expires_ms <= context.stamp.at_ms {
        return Err(forbidden(actor, "the token is revoked or has expired"));
    }
    match token.purpose {
        TokenPurpose::Admin => Ok(()),
        TokenPurpose::Viewer => Err(forbidden(actor, "the token may only look")),
        TokenPurpose::Join => Err(forbidden(actor, "the token admits a host and nothing else")),
    }
}

fn forbidden(actor: &Actor, why: &str) -> Rejection {
    let who = match actor {
        Actor::Root(host) => format!("root on host {host}"),
        Actor::Token(token) => format!("token {token}"),
        Actor::Host(host) => format!("host {host}"),
        Actor::Duty(host) => format!("the leader's duty on host {host}"),
        Actor::Joiner => "a machine that is not a host".to_owned(),
    };
    Rejection::Forbidden { who, why: why.to_owned() }
}
