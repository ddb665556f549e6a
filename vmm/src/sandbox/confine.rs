//! What the whole process gives up, in the order in which the kernel asks for it. Each is a property of the calling thread that
//! later threads inherit, so this runs while there is one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};
use rustix::fs::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use vmm_control::VmmConfig;

use super::UserId;

/// The newest rules of Landlock that are asked for. An older kernel holds those that it knows.
const RULES: ABI = ABI::V6;
/// The highest capability that a kernel can have, and one more: their sets are 64 bits wide.
const CAPABILITIES: u32 = 64;

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("the process has {0} threads, and the sandbox is entered with one: this is a mistake in the program")]
    Threads(usize),
    #[error("cannot look at this process's own threads in /proc; is it mounted?")]
    Proc(#[source] io::Error),
    #[error("cannot give up {what}")]
    GiveUp {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel refuses the rules of Landlock")]
    Landlock(#[source] RulesetError),
}

/// What of the file system is left: files come, go and change in these directories. Disks are not among it: they are open, or are handed over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    directories: BTreeSet<PathBuf>,
}

impl Reach {
    /// The directories of the process.
    pub fn of(config: &VmmConfig, control: &Path) -> Self {
        let parent = |path: &Path| path.parent().unwrap_or(Path::new("/")).to_owned();
        Self { directories: [config.run_dir.clone(), parent(&config.started_marker), parent(control)].into() }
    }
}

/// Everything but the filters.
pub(super) fn enter(reach: &Reach, user: Option<UserId>) -> Result<(), ConfineError> {
    let threads = fs::read_dir("/proc/self/task").map_err(ConfineError::Proc)?.count();
    if threads != 1 {
        return Err(ConfineError::Threads(threads));
    }
    let failed = |what| move |errno: rustix::io::Errno| ConfineError::GiveUp { what, source: errno.into() };
    rustix::thread::set_no_new_privs(true).map_err(failed("new privileges"))?;
    keep_priority();
    leave_network()?;
    restrict_files(reach)?;
    // While a capability allows it.
    empty_bounding_set().map_err(failed("capabilities"))?;
    if let Some(user) = user {
        become_user(user).map_err(failed("root"))?;
    }
    drop_capabilities().map_err(failed("capabilities"))
}

/// The lease thread may still stand above all ordinary ones when no capability says so.
fn keep_priority() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let current = getrlimit(Resource::Rtprio);
    let wanted = Rlimit { current: Some(1), maximum: Some(1) };
    if current.current.is_some()
        && let Err(error) = setrlimit(Resource::Rtprio, wanted)
    {
        tracing::debug!(%error, "the lease thread will have ordinary priority");
    }
}

/// Into a network with nothing in it. Taps stay where hostd put them, and open.
fn leave_network() -> Result<(), ConfineError> {
    // SAFETY: a new network namespace shares nothing that memory safety depends on.
    match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            tracing::warn!(
                "the sandbox keeps the host's network namespace: leaving it takes root; no socket is allowed in it"
            );
            Ok(())
        }
        Err(errno) => Err(ConfineError::GiveUp { what: "the host's network", source: errno.into() }),
    }
}

/// With no group but its own. While there is one thread: each has its own credentials.
fn become_user(user: UserId) -> rustix::io::Result<()> {
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)
}

fn restrict_files(reach: &Reach) -> Result<(), ConfineError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RULES))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(RULES)))
        .and_then(Ruleset::create)
        .map_err(ConfineError::Landlock)?;
    let rights = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::ReadDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile;
    for path in &reach.directories {
        // What is not there cannot be opened later either, and is then missed in better words.
        let Ok(place) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(place, rights)).map_err(ConfineError::Landlock)?;
    }
    let status = ruleset.restrict_self().map_err(ConfineError::Landlock)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!(
            "the sandbox does not restrict files: this kernel has no Landlock (5.13 or later, `landlock` in lsm=)"
        );
    }
    Ok(())
}

fn empty_bounding_set() -> rustix::io::Result<()> {
    for bit in 0..CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Behind the last one that this kernel has; or a user who has none to give up.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => break,
            other => other?,
        }
    }
    Ok(())
}

fn drop_capabilities() -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_files_only_the_directories_of_the_process_are_left() {
        // SAFETY: asks for the version; no pointer.
        if unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) } < 1 {
            eprintln!("skipped: this kernel has no Landlock");
            return;
        }
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mine, not_mine) = (own.path().join("console.log"), other.path().join("disk"));
        fs::write(&not_mine, "secret").unwrap();
        let reach = Reach { directories: [own.path().to_owned()].into() };
        // Of this thread alone.
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict_files(&reach).unwrap();
            fs::write(&mine, "mine").unwrap();
            assert_eq!(fs::read(&not_mine).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(fs::remove_file(&not_mine).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        });
        thread.join().unwrap();
    }
}
