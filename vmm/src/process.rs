//! The life of one vmm process: configuration, lock, sandbox, marker, then one machine after the other until the guest has ended, then
//! the exit report.
//!
//! A guest may also come from another process ([`arrival`]): then the machine is built first, and the marker written last.
//!
//! The main thread owns the machine and sleeps until somebody says how it ends. The control thread answers hostd meanwhile.

mod arrival;

use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvError;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ioctls::Kvm;
use vmm_control::open::{Access, open_files};
use vmm_control::{ExitReason, ExitReport, Notice, PauseReason, VmmConfig};

use crate::agent_channel::AgentChannel;
use crate::boot::BootFiles;
use crate::console_hub::ConsoleHub;
use crate::control::{Control, ControlServer, Running};
use crate::cpu::gate::{RunGate, Stop};
use crate::cpu::{cpuid, model};
use crate::devices::legacy::boot_timer::BootTime;
use crate::devices::net::{KernelTap, TapFd, tap};
use crate::incident::{Incident, Incidents};
use crate::io_stop::IoStop;
use crate::lease::quiesce::DiskGate;
use crate::lease::{self, Lease, LeaseChange};
use crate::log;
use crate::machine::device_manager::{DeviceManager, OpenFiles};
use crate::machine::layout::Layout;
use crate::machine::open_device::Host;
use crate::machine::{self, Beginning, Context, Ending, Endings, EndingsReceiver, Machine, kvm};
use crate::memory::huge_pages::Reserved;
use crate::metrics::{self, ExitCounters};
use crate::program_pages;
use crate::sandbox::{self, UserId};
use crate::saved::incoming::Incoming;
use crate::saved::session::Saves;
use crate::start_once::{StartError, VmLock, mark_started};

/// What the command line says.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub config: PathBuf,
    pub control: PathBuf,
    /// The VM's lock, as hostd hands it over. Without one the process locks its run directory.
    pub lock_fd: Option<RawFd>,
    /// The tap of each network card.
    pub tap_fds: Vec<TapFd>,
    /// The guest comes from elsewhere, over the control socket.
    pub incoming: bool,
    /// Everything that is not needed is given up before anything is looked at (ADR 0016).
    pub sandbox: bool,
    /// Who the process is in its sandbox, as user and as group.
    pub user: Option<UserId>,
}

/// How a process ended, before it is a report.
struct Outcome {
    reason: ExitReason,
    detail: String,
    ran: bool,
    drained: bool,
    panics: u64,
}

impl Outcome {
    fn not_started(reason: ExitReason, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { reason, detail: chain(error), ran: false, drained: true, panics: 0 }
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

/// Runs a guest to its end and returns the process's exit code.
pub fn run(options: &RunOptions, process_start: Instant) -> u8 {
    let load = if options.incoming { VmmConfig::load_incoming } else { VmmConfig::load };
    let config = match load(&options.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vmm: {}", chain(&error));
            return ExitReason::StartFailed.exit_code();
        }
    };
    let log = match log::start(config.log_level) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("vmm: cannot start the log: {error}");
            return ExitReason::StartFailed.exit_code();
        }
    };
    let span = tracing::info_span!("vm", vm = %config.vm, epoch = config.epoch);
    let _entered = span.enter();
    let lock = match take_lock(options, &config) {
        Ok(lock) => lock,
        Err(error) => {
            // Without the lock nothing in the run directory is ours, the exit report neither.
            eprintln!("vmm: {}", chain(&error));
            return ExitReason::StartFailed.exit_code();
        }
    };
    let opened = open(options, &config);
    // The first thread of its own: a sandbox is entered by one alone.
    if let Err(error) = log.write() {
        eprintln!("vmm: cannot start the log: {error}");
        return ExitReason::StartFailed.exit_code();
    }
    let End { outcome, epoch, server } = match opened {
        Ok(opened) => run_locked(options, &config, opened, process_start),
        Err(outcome) => End { outcome, epoch: config.epoch, server: None },
    };
    let code = outcome.reason.exit_code();
    report(&config, epoch, outcome);
    // Only now may hostd see the end of the connection: it finds the report.
    if let Some(server) = server {
        server.finish();
    }
    log::flush();
    drop(lock);
    code
}

fn take_lock(options: &RunOptions, config: &VmmConfig) -> Result<VmLock, StartError> {
    match options.lock_fd {
        Some(fd) => VmLock::inherit(fd),
        None => VmLock::take(&config.run_dir),
    }
}

fn report(config: &VmmConfig, epoch: u64, outcome: Outcome) {
    let mut detail = outcome.detail;
    if detail.len() > vmm_control::exit::MAX_DETAIL_BYTES {
        let mut end = vmm_control::exit::MAX_DETAIL_BYTES;
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        detail.truncate(end);
    }
    match outcome.reason {
        ExitReason::GuestPoweredOff | ExitReason::PoweredOff => {
            tracing::info!(reason = ?outcome.reason, "the guest has ended");
        }
        ExitReason::GuestPanicked | ExitReason::WatchdogExpired => {
            tracing::warn!(reason = ?outcome.reason, "the guest has been ended");
        }
        ExitReason::AlreadyStarted => tracing::warn!("{detail}"),
        ExitReason::GuestFault | ExitReason::StartFailed | ExitReason::Internal | ExitReason::RestoreFailed => {
            tracing::error!(reason = ?outcome.reason, "{detail}");
            eprintln!("vmm: {detail}");
        }
    }
    let report = ExitReport {
        vm: config.vm,
        epoch,
        reason: outcome.reason,
        detail,
        ran: outcome.ran,
        drained: outcome.drained,
        panics: outcome.panics,
    };
    // A second start of a used epoch must not hide how the first one ended.
    let earlier = ExitReport::read(&config.run_dir).ok().flatten();
    if report.reason == ExitReason::AlreadyStarted && earlier.is_some_and(|e| e.epoch == report.epoch) {
        return;
    }
    if let Err(error) = report.write(&config.run_dir) {
        tracing::error!(error = chain(&error), "no exit report");
    }
}

/// What a sandbox leaves no way to.
struct Opened {
    taps: Vec<KernelTap>,
    kvm: Kvm,
    reserved: Option<Reserved>,
    files: BootFiles,
    /// Of a process that cannot open them later.
    disks: OpenFiles,
}

/// Opens it, looks at none of its bytes, and gives the rest up where that is asked for. The process has one thread.
fn open(options: &RunOptions, config: &VmmConfig) -> Result<Opened, Outcome> {
    // Cheap, and before anything else: a used epoch must not even open its disks. The marker itself decides later.
    if !options.incoming && config.started_marker.exists() {
        let error = StartError::AlreadyStarted { epoch: config.epoch, path: config.started_marker.clone() };
        return Err(Outcome::not_started(ExitReason::AlreadyStarted, &error));
    }
    remove_old_report(&config.run_dir);
    open_and_confine(options, config).map_err(|error| Outcome::not_started(ExitReason::StartFailed, error.as_ref()))
}

fn open_and_confine(options: &RunOptions, config: &VmmConfig) -> Result<Opened, PrepareError> {
    let taps = tap::adopt_all(&config.nics, &options.tap_fds, options.lock_fd)?;
    let kvm = kvm::open()?;
    let layout = Layout::new(config.memory_bytes, config.max_memory_bytes());
    // What the host cannot give is said before the epoch is used up.
    model::leaves(config.cpu().model, &cpuid::supported(&kvm)?, layout.address_bits())?;
    let reserve = |pages| Reserved::take_from_host(pages, config.memory_bytes);
    let reserved = config.huge_pages.map(reserve).transpose()?;
    let files = BootFiles::open(&config.kernel, config.initrd.as_deref(), &config.cmdline)?;
    let mut disks = OpenFiles::new();
    if options.sandbox {
        metrics::open()?;
        let access = if options.incoming { Access::Look } else { Access::Use };
        for disk in &config.disks {
            let opened = open_files(disk, access);
            let opened = opened.map_err(|source| DiskOpenError { disk: disk.id.clone(), source })?;
            disks.insert(disk.id.clone(), opened);
        }
        sandbox::enter(&sandbox::Reach::of(config, &options.control), options.user)?;
    }
    Ok(Opened { taps, kvm, reserved, files, disks })
}

#[derive(Debug, thiserror::Error)]
#[error("disk {disk}: cannot open its files")]
struct DiskOpenError {
    disk: String,
    #[source]
    source: std::io::Error,
}

/// What must be there before the epoch is used up.
struct Prepared {
    context: Context,
    control: Arc<Control>,
    endings: EndingsReceiver,
    /// For a guest that comes from elsewhere.
    incoming: Option<Arc<Incoming>>,
}

type PrepareError = Box<dyn std::error::Error>;

fn prepare(
    options: &RunOptions,
    config: &VmmConfig,
    opened: Opened,
    process_start: Instant,
) -> Result<Prepared, PrepareError> {
    let Opened { taps, kvm, reserved, files, disks } = opened;
    let console = ConsoleHub::with_log(&config.run_dir.join("console.log"))?;
    let gate = RunGate::new();
    let disk_gate = DiskGate::new();
    let (endings, receiver) = Endings::new(Arc::clone(&gate));
    let agent = AgentChannel::new()?;
    let control = Control::new(config, Arc::clone(&console), Arc::clone(&agent), Arc::clone(&endings))?;
    let listener = {
        let control = Arc::clone(&control);
        Box::new(move |change| control.lease_changed(change))
    };
    let deadline = config.lease.map(|l| l.deadline_boottime_ns);
    let lease = Lease::new(config.epoch, deadline, Arc::clone(&gate), Arc::clone(&disk_gate), listener)?;
    let io_stop = {
        let control = Arc::clone(&control);
        let listener = move || control.notify(Notice::Paused { reason: PauseReason::IoError, quiesced: false });
        IoStop::new(Arc::clone(&gate), Box::new(listener))
    };
    let incidents = {
        let control = Arc::clone(&control);
        let listener = move |incident| control.notify(incident_notice(incident));
        let on_watchdog = config.watchdog.unwrap_or_default().action;
        Incidents::new(config.on_panic, on_watchdog, Arc::clone(&gate), Arc::clone(&endings), Box::new(listener))
    };
    let devices = {
        let control = Arc::clone(&control);
        let host = Host {
            gate: Arc::clone(&gate),
            lease: Arc::clone(&lease),
            disks: Host::disk_opener(Arc::clone(&disk_gate), Arc::clone(&io_stop) as _),
            opens_paths: !options.sandbox,
            notify: Arc::new(move |notice| control.notify(notice)),
        };
        DeviceManager::new(config, taps, disks, host)?
    };
    let boot_time = BootTime::new(process_start);
    let exits = Arc::new(ExitCounters::default());
    let saves = Saves::new(Arc::clone(&gate), Arc::clone(&disk_gate));
    let incoming = options.incoming.then(Arc::<Incoming>::default);
    if incoming.is_some() {
        gate.shut(Stop::Incoming);
        disk_gate.hold();
    }
    control.connect(Running {
        lease: Arc::clone(&lease),
        gate: Arc::clone(&gate),
        io_stop: Arc::clone(&io_stop),
        incidents: Arc::clone(&incidents),
        boot_time: Arc::clone(&boot_time),
        exits: Arc::clone(&exits),
        saves: Arc::clone(&saves),
        incoming: incoming.clone(),
        devices: Arc::clone(&devices),
    });
    if deadline.is_some() {
        lease::thread::start(Arc::clone(&lease))?;
    }
    let context = Context {
        config: config.clone(),
        kvm,
        files,
        reserved,
        devices,
        console,
        agent,
        gate,
        disk_gate,
        io_stop,
        incidents,
        watchdog_has_fired: Arc::default(),
        lease,
        endings,
        boot_time,
        exits,
        saves,
        given_cpuid: OnceLock::new(),
    };
    Ok(Prepared { context, control, endings: receiver, incoming })
}

/// What is left of a process.
struct End {
    outcome: Outcome,
    /// The permit that it ran under: a guest from elsewhere brings none.
    epoch: u64,
    server: Option<ControlServer>,
}

fn run_locked(options: &RunOptions, config: &VmmConfig, opened: Opened, process_start: Instant) -> End {
    let early = |outcome| End { outcome, epoch: config.epoch, server: None };
    let prepared = match prepare(options, config, opened, process_start) {
        Ok(prepared) => prepared,
        Err(error) => {
            return early(Outcome::not_started(ExitReason::StartFailed, error.as_ref()));
        }
    };
    let server = match ControlServer::start(&options.control, Arc::clone(&prepared.control)) {
        Ok(server) => server,
        Err(error) => {
            return early(Outcome::not_started(ExitReason::StartFailed, &error));
        }
    };
    let outcome = match begin(&prepared) {
        Ok(first) => run_machines(&prepared, first),
        Err(outcome) => outcome,
    };
    prepared.context.lease.end();
    prepared.control.notify(Notice::ShuttingDown { reason: outcome.reason });
    End { outcome, epoch: prepared.context.lease.epoch(), server: Some(server) }
}

/// Uses the epoch up, for a guest that starts here: its first machine is built after that. For one that comes from elsewhere the machine
/// is built first, and the epoch used up when everything else that can fail has not.
fn begin(prepared: &Prepared) -> Result<Option<Machine>, Outcome> {
    let config = &prepared.context.config;
    match &prepared.incoming {
        Some(incoming) => arrival::receive(prepared, incoming).map(Some),
        None => mark(&config.started_marker, config.epoch).map(|()| None),
    }
}

fn mark(started_marker: &Path, epoch: u64) -> Result<(), Outcome> {
    mark_started(started_marker, epoch).map_err(|error| {
        let reason = match error {
            StartError::AlreadyStarted { .. } => ExitReason::AlreadyStarted,
            _ => ExitReason::StartFailed,
        };
        Outcome::not_started(reason, &error)
    })
}

/// hostd must not take the report of an earlier epoch for this one's.
fn remove_old_report(run_dir: &Path) {
    let path = ExitReport::path(run_dir);
    if let Err(error) = fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove an old exit report");
    }
}

/// One machine after the other, until one ends for good.
fn run_machines(prepared: &Prepared, mut first: Option<Machine>) -> Outcome {
    let Prepared { context, control, endings, .. } = prepared;
    let mut ran = false;
    loop {
        let panics = context.incidents.panics();
        let built = first.take().map_or_else(|| machine::build(context, Beginning::Boot), Ok);
        let mut machine = match built {
            Ok(machine) => machine,
            Err(error) => {
                return Outcome { reason: ExitReason::StartFailed, detail: chain(&error), ran, drained: true, panics };
            }
        };
        control.machine_is(&machine);
        let ending = match run_machine(&mut machine, prepared, &mut ran) {
            Ok(ending) => ending,
            Err(detail) => {
                machine.stop();
                return Outcome { reason: ExitReason::Internal, detail, ran, drained: true, panics };
            }
        };
        let drained = machine.stop();
        let panics = context.incidents.panics();
        context.devices.forget(drained);
        let (reason, detail) = match ending {
            Ending::Reset if drained => match endings.drain() {
                None => {
                    drop(machine);
                    control.machine_was_reset();
                    continue;
                }
                Some(_) => (ExitReason::PoweredOff, String::new()),
            },
            Ending::Reset => (ExitReason::Internal, "the guest reset, and its storage does not answer".to_owned()),
            Ending::GuestPoweredOff => (ExitReason::GuestPoweredOff, String::new()),
            Ending::PoweredOff => (ExitReason::PoweredOff, String::new()),
            Ending::GuestPanicked => (ExitReason::GuestPanicked, "the guest's kernel panicked".to_owned()),
            Ending::WatchdogExpired => (ExitReason::WatchdogExpired, "the guest did not feed its watchdog".to_owned()),
            Ending::Fault(detail) => (ExitReason::GuestFault, detail),
        };
        control.machine_is_gone();
        return Outcome { reason, detail, ran, drained, panics };
    }
}

fn run_machine(machine: &mut Machine, prepared: &Prepared, ran: &mut bool) -> Result<Ending, String> {
    let Prepared { context, endings, .. } = prepared;
    // An error of the last machine's disks went with it, and its end closed the gate.
    context.io_stop.forget();
    context.incidents.machine_is(machine.nmi(), machine.panic());
    context.lease.open_disks_if_valid();
    if let Some(ending) = endings.drain() {
        return Ok(ending);
    }
    *ran = true;
    machine.start().map_err(|e| chain(&e))?;
    arrival::let_go(prepared);
    wait_for_end(endings).map_err(|e| e.to_string())
}

fn wait_for_end(endings: &EndingsReceiver) -> Result<Ending, RecvError> {
    let mut intervals = program_pages::Intervals::default();
    loop {
        if let Some(ending) = endings.wait(intervals.present())? {
            return Ok(ending);
        }
        let bytes = program_pages::let_go();
        tracing::debug!(bytes, "pages of the program are let go until they are needed");
        intervals.grow();
    }
}

/// What hostd is told about the lease.
pub(crate) fn lease_notice(change: LeaseChange) -> Notice {
    let reason = PauseReason::LeaseExpired;
    match change {
        LeaseChange::Expired => Notice::Paused { reason, quiesced: false },
        LeaseChange::Quiesced => Notice::Paused { reason, quiesced: true },
        LeaseChange::Resumed => Notice::Resumed,
    }
}

/// What hostd is told about a guest in trouble.
pub(crate) fn incident_notice(incident: Incident) -> Notice {
    match incident {
        Incident::Panic(kind) => Notice::GuestPanicked { kind },
        Incident::WatchdogExpired => Notice::WatchdogExpired,
        Incident::Paused(reason) => Notice::Paused { reason, quiesced: false },
    }
}
