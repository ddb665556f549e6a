//! The life of one vmm process: configuration, lock, marker, then one machine after the other until the guest has ended, then the
//! exit report.
//!
//! The main thread owns the machine and sleeps until somebody says how it ends. The control thread answers hostd meanwhile.

use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vmm_control::{ExitReason, ExitReport, Notice, PauseReason, VmmConfig};

use crate::agent_channel::AgentChannel;
use crate::boot::BootFiles;
use crate::console_hub::ConsoleHub;
use crate::control::{Control, ControlServer, Running};
use crate::cpu::gate::RunGate;
use crate::devices::legacy::boot_timer::BootTime;
use crate::devices::net::{TapFd, tap};
use crate::io_stop::IoStop;
use crate::lease::quiesce::DiskGate;
use crate::lease::{self, Lease, LeaseChange};
use crate::log;
use crate::machine::device_manager::DeviceManager;
use crate::machine::open_device::Host;
use crate::machine::{self, Context, Ending, Endings, EndingsReceiver, Machine, kvm};
use crate::metrics::ExitCounters;
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
}

/// How a process ended, before it is a report.
struct Outcome {
    reason: ExitReason,
    detail: String,
    ran: bool,
    drained: bool,
}

impl Outcome {
    fn not_started(reason: ExitReason, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { reason, detail: chain(error), ran: false, drained: true }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
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
    let config = match VmmConfig::load(&options.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vmm: {}", chain(&error));
            return ExitReason::StartFailed.exit_code();
        }
    };
    if let Err(error) = log::start(config.log_level) {
        eprintln!("vmm: cannot start the log: {error}");
        return ExitReason::StartFailed.exit_code();
    }
    let span = tracing::info_span!("vm", vm = %config.vm, epoch = config.epoch);
    let _entered = span.enter();
    let lock = match take_lock(options, &config) {
        Ok(lock) => lock,
        Err(error) => {
            // Without the lock nothing in the run directory is ours, the exit report neither.
            eprintln!("vmm: {}", chain(&error));
            log::flush();
            return ExitReason::StartFailed.exit_code();
        }
    };
    let (outcome, server) = run_locked(options, &config, process_start);
    let code = outcome.reason.exit_code();
    report(&config, outcome);
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

fn report(config: &VmmConfig, outcome: Outcome) {
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
        ExitReason::AlreadyStarted => tracing::warn!("{detail}"),
        ExitReason::GuestFault | ExitReason::StartFailed | ExitReason::Internal => {
            tracing::error!(reason = ?outcome.reason, "{detail}");
            eprintln!("vmm: {detail}");
        }
    }
    let report = ExitReport {
        vm: config.vm,
        epoch: config.epoch,
        reason: outcome.reason,
        detail,
        ran: outcome.ran,
        drained: outcome.drained,
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

/// What must be there before the epoch is used up.
struct Prepared {
    context: Context,
    control: Arc<Control>,
    endings: EndingsReceiver,
}

type PrepareError = Box<dyn std::error::Error>;

fn prepare(options: &RunOptions, config: &VmmConfig, process_start: Instant) -> Result<Prepared, PrepareError> {
    let taps = tap::adopt_all(&config.nics, &options.tap_fds, options.lock_fd)?;
    let kvm = kvm::open()?;
    let files = BootFiles::open(&config.kernel, config.initrd.as_deref(), &config.cmdline)?;
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
    let devices = {
        let control = Arc::clone(&control);
        let host = Host {
            gate: Arc::clone(&gate),
            lease: Arc::clone(&lease),
            disks: Host::disk_opener(Arc::clone(&disk_gate), Arc::clone(&io_stop) as _),
            notify: Box::new(move |notice| control.notify(notice)),
        };
        DeviceManager::new(config, taps, host)?
    };
    let boot_time = BootTime::new(process_start);
    let exits = Arc::new(ExitCounters::default());
    control.connect(Running {
        lease: Arc::clone(&lease),
        gate: Arc::clone(&gate),
        io_stop: Arc::clone(&io_stop),
        boot_time: Arc::clone(&boot_time),
        exits: Arc::clone(&exits),
        devices: Arc::clone(&devices),
    });
    if deadline.is_some() {
        lease::thread::start(Arc::clone(&lease))?;
    }
    let context = Context {
        config: config.clone(),
        kvm,
        files,
        devices,
        console,
        agent,
        gate,
        disk_gate,
        io_stop,
        lease,
        endings,
        boot_time,
        exits,
    };
    Ok(Prepared { context, control, endings: receiver })
}

fn run_locked(options: &RunOptions, config: &VmmConfig, process_start: Instant) -> (Outcome, Option<ControlServer>) {
    // Cheap, and before anything else: a used epoch must not even open its disks. The marker itself decides below.
    if config.started_marker.exists() {
        let error = StartError::AlreadyStarted { epoch: config.epoch, path: config.started_marker.clone() };
        let outcome = Outcome::not_started(ExitReason::AlreadyStarted, &error);
        return (outcome, None);
    }
    remove_old_report(&config.run_dir);
    let prepared = match prepare(options, config, process_start) {
        Ok(prepared) => prepared,
        Err(error) => {
            let outcome = Outcome::not_started(ExitReason::StartFailed, error.as_ref());
            return (outcome, None);
        }
    };
    let server = match ControlServer::start(&options.control, Arc::clone(&prepared.control)) {
        Ok(server) => server,
        Err(error) => {
            let outcome = Outcome::not_started(ExitReason::StartFailed, &error);
            return (outcome, None);
        }
    };
    if let Err(error) = mark_started(&config.started_marker, config.epoch) {
        let reason = match error {
            StartError::AlreadyStarted { .. } => ExitReason::AlreadyStarted,
            _ => ExitReason::StartFailed,
        };
        return (Outcome::not_started(reason, &error), Some(server));
    }
    let outcome = run_machines(&prepared);
    prepared.context.lease.end();
    prepared.control.notify(Notice::ShuttingDown { reason: outcome.reason });
    (outcome, Some(server))
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
fn run_machines(prepared: &Prepared) -> Outcome {
    let Prepared { context, control, endings } = prepared;
    let mut ran = false;
    loop {
        let mut machine = match machine::build(context) {
            Ok(machine) => machine,
            Err(error) => {
                return Outcome { reason: ExitReason::StartFailed, detail: chain(&error), ran, drained: true };
            }
        };
        control.machine_is(&machine);
        let ending = match run_machine(&mut machine, context, endings, &mut ran) {
            Ok(ending) => ending,
            Err(detail) => {
                machine.stop();
                return Outcome { reason: ExitReason::Internal, detail, ran, drained: true };
            }
        };
        let drained = machine.stop();
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
            Ending::Fault(detail) => (ExitReason::GuestFault, detail),
        };
        control.machine_is_gone();
        return Outcome { reason, detail, ran, drained };
    }
}

fn run_machine(
    machine: &mut Machine,
    context: &Context,
    endings: &EndingsReceiver,
    ran: &mut bool,
) -> Result<Ending, String> {
    // An error of the last machine's disks went with it, and its end closed the gate.
    context.io_stop.forget();
    context.lease.open_disks_if_valid();
    if let Some(ending) = endings.drain() {
        return Ok(ending);
    }
    *ran = true;
    machine.start().map_err(|e| chain(&e))?;
    endings.wait().map_err(|e| e.to_string())
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
