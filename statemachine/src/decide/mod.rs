//! The rules: a request against the state becomes events, or a rejection in words.
//!
//! Pure and run by the leader alone; the log carries the events, so replay never decides again
//! (DESIGN §3). Each family of commands has a file: [`site`], [`host`], [`vm`], [`migration`], [`suspension`], ...; who may ask
//! for what is [`permission`]; the form of names, paths and sizes is [`form`].

mod devices;
mod form;
mod host;
mod migration;
mod permission;
mod recover;
mod site;
mod spm;
mod suspension;
mod vm;

pub use self::host::HOSTS_MAX;
pub use self::site::FEATURE_LEVEL;

use crate::command::Command;
use crate::command::IdempotencyKey;
use crate::command::Request;
use crate::event::Event;
use crate::ids::Seq;
use crate::rejection::Rejection;
use crate::stamp::Stamp;
use crate::state::Created;
use crate::state::State;

/// The events of an accepted request; none when it asks for what already is.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Decided {
    pub events: Vec<Event>,
    pub created: Option<Created>,
}

impl Decided {
    fn nothing() -> Decided {
        Decided::default()
    }

    fn one(event: impl Into<Event>) -> Decided {
        Decided { events: vec![event.into()], created: None }
    }

    fn many(events: Vec<Event>) -> Decided {
        Decided { events, created: None }
    }

    fn creating(mut self, created: Created) -> Decided {
        self.created = Some(created);
        self
    }
}

/// What a rule may look at.
struct Context<'a> {
    state: &'a State,
    request: &'a Request,
    /// The seq that the batch will have: ids and epochs are made of it.
    seq: Seq,
    stamp: Stamp,
}

/// Decides `request` as batch `seq` at `stamp`.
pub fn decide(state: &State, request: &Request, seq: Seq, stamp: Stamp) -> Result<Decided, Rejection> {
    let context = Context { state, request, seq, stamp };
    check_idempotency_key(request)?;
    match (&state.site, &request.command) {
        (None, Command::SiteInit { .. }) => {}
        (None, _) => return Err(Rejection::NotInitialised),
        (Some(_), Command::SiteInit { .. }) => return Err(Rejection::AlreadyInitialised),
        (Some(_), _) => permission::check(&context)?,
    }
    let decided = judge(&context)?;
    let activated = decided.events.iter().filter_map(|event| match event {
        Event::FeatureLevelActivated(activated) => Some(activated.level),
        _ => None,
    });
    let level = state.site.as_ref().map_or(site::FEATURE_LEVEL, |site| site.feature_level);
    let level = activated.max().unwrap_or(level);
    match decided.events.iter().map(Event::feature_level).max() {
        Some(needed) if needed > level => Err(Rejection::FeatureLevel { needed, level }),
        _ => Ok(decided),
    }
}

fn judge(context: &Context<'_>) -> Result<Decided, Rejection> {
    match &context.request.command {
        Command::SiteInit { site, name, ca, first_host } => site::init(context, *site, name, *ca, first_host),
        Command::TokenCreate { purpose, secret_hash, ttl_ms, note } => {
            site::token_create(context, *purpose, secret_hash, *ttl_ms, note)
        }
        Command::TokenRevoke { token } => site::token_revoke(context, *token),

        Command::HostJoin { secret_hash, candidate } => host::join(context, secret_hash, candidate),
        Command::CertificateIssue { host, serial, fingerprint, not_after_ms } => {
            host::certificate_issue(context, *host, serial, *fingerprint, *not_after_ms)
        }
        Command::HostMaintenance { host } => host::maintenance(context, *host),
        Command::HostActivate { host } => host::activate(context, *host),
        Command::HostRemove { host } => host::remove(context, *host),
        Command::HostChange { host, change } => host::change(context, *host, change),
        Command::ReportHost { report, facts } => host::report(context, report, facts),
        Command::HostSuspect { host } => host::suspect(context, *host),
        Command::HostLost { host } => host::lost(context, *host),
        Command::HostRecover { host } => host::recover(context, *host),

        Command::VmDefine { name, cluster, spec, run_strategy } => {
            vm::define(context, name, *cluster, spec, *run_strategy)
        }
        Command::VmChange { vm, change } => vm::change(context, *vm, change),
        Command::VmDelete { vm } => vm::delete(context, *vm),
        Command::VmStart { vm, host } => vm::start(context, *vm, *host),
        Command::VmStop { vm, mode } => vm::stop(context, *vm, *mode),
        Command::VmReset { vm } => vm::reset(context, *vm),
        Command::VmPause { vm, paused } => vm::pause(context, *vm, *paused),
        Command::VmPlace { vm } => vm::place(context, *vm),
        Command::ReportVmStatus { report, vm, epoch, status } => {
            vm::report_status(context, report, *vm, *epoch, *status)
        }
        Command::ReportVmExited { report, vm, epoch, reason, detail } => {
            vm::report_exited(context, report, *vm, *epoch, *reason, detail)
        }
        Command::ReportVmGuest { report, vm, epoch, facts } => vm::report_guest(context, report, *vm, *epoch, facts),
        Command::ReportVmDiskFault { report, vm, epoch, fault } => {
            vm::report_disk_fault(context, report, *vm, *epoch, fault.as_ref())
        }

        Command::VmMigrate { vm, host } => migration::start(context, *vm, *host),
        Command::VmCancelMigration { vm } => migration::cancel(context, *vm),
        Command::VmMemory { vm, mib } => devices::memory(context, *vm, *mib),
        Command::ReportVmDevice { report, vm, epoch, device, word } => {
            devices::report(context, report, *vm, *epoch, device, word)
        }
        Command::ReportProcessor { report, processor } => host::report_processor(context, report, processor),
        Command::ClusterMigrationPolicy { cluster, policy } => migration::policy(context, *cluster, *policy),
        Command::ReportMigrationProgress { report, vm, migration, progress } => {
            migration::progressed(context, report, *vm, *migration, *progress)
        }
        Command::ReportMigrationLoaded { report, vm, migration } => migration::loaded(context, report, *vm, *migration),
        Command::ReportMigrationFailed { report, vm, migration, detail } => {
            migration::failed(context, report, *vm, *migration, detail)
        }

        Command::VmSuspend { vm } => suspension::start(context, *vm),
        Command::ReportVmSuspended { report, vm, suspension, bytes } => {
            suspension::completed(context, report, *vm, *suspension, *bytes)
        }
        Command::ReportSuspensionFailed { report, vm, suspension, detail } => {
            suspension::failed(context, report, *vm, *suspension, detail)
        }

        Command::VoterCount { voters } => site::voter_count(context, *voters),
        Command::SiteRecover { generation, ca } => recover::site(context, *generation, *ca),
        Command::FeatureLevelActivate { level } => site::feature_level_activate(context, *level),

        Command::EventsTrim { upto } => site::events_trim(context, *upto),

        Command::SpmGrant { data_center, host } => spm::grant(context, *data_center, *host),
        Command::SpmRelease { data_center } => spm::release(context, *data_center),
    }
}

fn check_idempotency_key(request: &Request) -> Result<(), Rejection> {
    let Some(idempotency) = &request.idempotency else { return Ok(()) };
    if idempotency.key.is_empty() || idempotency.key.len() > IdempotencyKey::MAX_LEN {
        let why = format!("it must have 1 to {} bytes", IdempotencyKey::MAX_LEN);
        return Err(Rejection::Invalid { field: "idempotency key".to_owned(), why });
    }
    Ok(())
}
