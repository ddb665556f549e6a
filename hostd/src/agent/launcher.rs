//! Starts the vmm of one guest, so that it outlives hostd: own session, parent is init, own control group, and the VM's lock in
//! its hands from the first moment (hazard H20). Blocking; called on a thread of the blocking pool.

use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::VmSpec;
use thiserror::Error;
use vmm_control::LeaseConfig;
use vmm_control::VmmConfig;
use vmm_control::config::MAX_MTU;

use super::asleep::Asleep;
use super::first_boot;
use super::first_boot::FirstBootError;
use super::group::Bounds;
use super::group::CpuShares;
use super::group::CpuSharesError;
use super::group::Group;
use super::group::Groups;
use super::guest_files;
use super::guest_files::GuestFilesError;
use super::guest_files::GuestIdentity;
use super::guest_files::GuestPlaces;
use super::marks::MarkError;
use super::marks::Marks;
use super::run_dir::Lock;
use super::run_dir::RunDir;
use super::run_dir::RunDirError;
use super::user::GuestUser;
use crate::guest_agent::agents::Agents;
use crate::lease::clock::Boottime;
use crate::migration::Road;
use crate::network::NetworkError;
use crate::network::tap::Tap;

#[derive(Debug, Error)]
pub enum LaunchError {
    /// Nothing was started because something of this VM lives: look again.
    #[error("a process of this VM is still there")]
    StillThere,
    #[error("this epoch was used already; the VM needs a new permit")]
    Used,
    #[error(transparent)]
    Files(#[from] GuestFilesError),
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error("the guest's part of the processors: {0}")]
    CpuShares(#[from] CpuSharesError),
    #[error(transparent)]
    FirstBoot(#[from] FirstBootError),
    #[error(transparent)]
    Mark(#[from] MarkError),
    #[error("network card {id}: {source}")]
    Nic {
        id: String,
        #[source]
        source: NetworkError,
    },
    #[error("cannot make the guest's control group: {0}")]
    Group(#[source] io::Error),
    #[error("cannot start {program}: {source}; is it installed, and does `vmm` in hostd.toml name it?")]
    Spawn {
        program: String,
        #[source]
        source: io::Error,
    },
}

/// A tap and the card that it belongs to.
struct Cable {
    nic: String,
    tap: Tap,
}

impl Cable {
    fn argument(&self) -> [String; 2] {
        ["--tap-fd".to_owned(), format!("{}={}", self.nic, self.tap.descriptor.as_raw_fd())]
    }
}

/// A tap for each card, in the bridge that the spec names; each card is told its bridge's MTU.
fn plug_in(config: &mut VmmConfig, spec: &VmSpec, incoming: Option<MigrationId>) -> Result<Vec<Cable>, LaunchError> {
    let mut cables = Vec::with_capacity(config.nics.len());
    for (card, nic) in config.nics.iter_mut().zip(&spec.nics) {
        let failed = |source| LaunchError::Nic { id: nic.id.clone(), source };
        let tap = Tap::plug(&nic.bridge, card.mac).map_err(failed)?;
        card.mtu = u16::try_from(tap.mtu).unwrap_or(MAX_MTU).min(MAX_MTU);
        cables.push(Cable { nic: nic.id.clone(), tap });
    }
    guest_files::check(config, incoming)?;
    Ok(cables)
}

/// What the guest may take of this host.
fn bounds(spec: &VmSpec) -> Result<Bounds, CpuSharesError> {
    let weight = spec.cpu.weight.map_or(CpuShares::EQUAL_WEIGHT, |weight| u16::try_from(weight).unwrap_or(u16::MAX));
    Ok(Bounds { vcpus: spec.vcpus, cpu: CpuShares::new(weight, spec.cpu.cap_percent)? })
}

/// What every launch on this host needs.
#[derive(Clone)]
pub struct Launcher {
    /// `<run_dir>/vm`.
    pub vms_dir: PathBuf,
    pub marks: Marks,
    pub(super) asleep: Asleep,
    pub vmm: PathBuf,
    pub allowed_paths: Vec<PathBuf>,
    pub groups: Groups,
    /// Those of the guests that run.
    pub agents: Agents,
    /// To other hosts, for guests that leave.
    pub road: Arc<dyn Road>,
}

impl Launcher {
    /// Starts the guest. When this returns, a process has the lock; whether the guest runs is told by its control socket.
    pub fn launch(&self, identity: &GuestIdentity, spec: &VmSpec) -> Result<(), LaunchError> {
        let run_dir = RunDir::of(&self.vms_dir, identity.vm);
        let group = self.groups.of(identity.vm);
        let user = GuestUser::of(identity.vm);
        run_dir.create()?;
        run_dir.create_for(user)?;
        let lock = run_dir.try_lock()?.ok_or(LaunchError::StillThere)?;
        if !group.is_empty().map_err(LaunchError::Group)? {
            return Err(LaunchError::StillThere);
        }
        if self.marks.contains(identity.vm, identity.epoch) {
            return Err(LaunchError::Used);
        }
        self.marks.prepare_for(identity.vm, user)?;
        let mark = self.marks.path(identity.vm, identity.epoch);
        let places = GuestPlaces { run_dir: run_dir.of_process(), mark };
        let mut config = guest_files::vmm_config(identity, spec, &self.allowed_paths, places)?;
        if let Some(first_boot) = &spec.first_boot {
            run_dir.write_seed(&lock, &first_boot::image(identity.vm, spec, first_boot)?)?;
            config.disks.push(first_boot::disk(&run_dir));
        }
        // Last, so that a definition that makes no guest moves no cable.
        let taps = plug_in(&mut config, spec, identity.incoming)?;
        run_dir.prepare(&lock, &config, identity.incoming)?;
        self.spawn(&run_dir, user, (&group, bounds(spec)?), &lock, &taps, identity.incoming)
    }

    /// A guest that came from elsewhere runs under its permit now: its files say so, as those of one that was started here.
    pub fn settle(&self, vm: VmId, epoch: Epoch, deadline: Option<Boottime>) -> Result<(), RunDirError> {
        let run_dir = RunDir::of(&self.vms_dir, vm);
        let Some(mut config) = run_dir.config() else { return Ok(()) };
        config.epoch = epoch.0;
        config.started_marker = self.marks.path(vm, epoch);
        config.lease = deadline.map(|deadline| LeaseConfig { deadline_boottime_ns: deadline.as_ns() });
        run_dir.settle(&config)
    }

    fn spawn(
        &self,
        run_dir: &RunDir,
        user: Option<GuestUser>,
        (group, bounds): (&Group, Bounds),
        lock: &Lock,
        taps: &[Cable],
        incoming: Option<MigrationId>,
    ) -> Result<(), LaunchError> {
        let mut words = group.launch_prefix(bounds);
        words.push(self.vmm.display().to_string());
        let program = words.remove(0);
        let failed = |source| LaunchError::Spawn { program: program.clone(), source };
        let log = run_dir.vmm_log();
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(failed)?;
        let mut command = Command::new(&program);
        command
            .args(words)
            .arg("run")
            .arg("--config")
            .arg(run_dir.config_file())
            .arg("--control")
            .arg(run_dir.control_socket())
            .arg("--lock-fd")
            .arg(lock.file.as_raw_fd().to_string())
            .args(taps.iter().flat_map(Cable::argument))
            .args(incoming.map(|_| "--incoming"))
            .arg("--sandbox")
            .args(user.map(|user| format!("--user={}", user.id())))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log);
        // hostd's own standing with its service manager is not the guest's.
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"] {
            command.env_remove(name);
        }
        let group_file = match group.prepare(bounds) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!("no control group for this guest, its lock alone tells when it ends: {error}");
                None
            }
        };
        let group_file = group_file.map(|path| OpenOptions::new().write(true).open(path)).transpose();
        let group_file = group_file.map_err(LaunchError::Group)?;
        let taps = taps.iter().map(|cable| cable.tap.descriptor.as_raw_fd());
        let inherited: Vec<i32> = std::iter::once(lock.file.as_raw_fd()).chain(taps).collect();
        let detach = move || detach(&inherited, group_file.as_ref());
        // SAFETY: between fork and exec only system calls run: setsid, fork, _exit, fcntl, and one write of a constant.
        unsafe { command.pre_exec(detach) };
        let mut middle = command.spawn().map_err(failed)?;
        // The process in the middle ends at once, so that the vmm is a child of init and never a zombie of ours.
        middle.wait().map_err(failed)?;
        Ok(())
    }
}

fn detach(inherited: &[i32], mut group: Option<&std::fs::File>) -> io::Result<()> {
    let checked = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: plain system calls on descriptors that the caller keeps open.
    unsafe {
        checked(libc::setsid())?;
        if checked(libc::fork())? > 0 {
            libc::_exit(0);
        }
        // The vmm inherits its lock and its taps; every other descriptor of hostd closes at exec.
        for descriptor in inherited {
            let flags = checked(libc::fcntl(*descriptor, libc::F_GETFD))?;
            checked(libc::fcntl(*descriptor, libc::F_SETFD, flags & !libc::FD_CLOEXEC))?;
        }
    }
    match &mut group {
        Some(file) => file.write_all(b"0"),
        None => Ok(()),
    }
}
