//! What a vmm process gives up before it looks at anything that a guest, an image or a stream brings: with `vmm run --sandbox`, as hostd
//! starts it (ADR 0016). Without the flag threads have their roles and their names, and may ask for everything.
//!
//! ```text
//! hostd: fork, exec          root, the lock and the taps open
//!   main thread, alone       reads the configuration, takes the lock
//!                            opens the taps, /dev/kvm, huge pages, kernel, initrd, disks, not a byte of which is looked at
//!   sandbox::enter           no new privileges
//!                            an empty network            [taps stay open]
//!                            Landlock: run directory, marker
//!                            the VM's own user and group
//!                            no capability
//!                            system call filter of the main thread, which all others inherit
//!   first other thread       log
//!   every thread             its own filter on top       [Role::spawn]
//!   guest, stream, disks     parsed, run, served         [all of the above holds]
//! ```
//!
//! A call that no rule allows ends the process with SIGSYS, and with words on stderr that name the call ([`violation`]). That is a mistake
//! in [`tables`] or an attack; both must be seen, and neither may go on.
//!
//! [`role`] knows the threads, [`tables`] what each may ask for, [`rule`] what a rule is, [`filter`] how the kernel is told, [`confine`] the
//! rest. `tests/sandbox.rs` shows that each role's filter holds, and that guests use every rule that gives no reason for being there without.

mod confine;
mod filter;
pub mod kvm_requests;
mod role;
mod rule;
pub mod tables;
mod violation;

use crate::sys;

pub use confine::{ConfineError, Reach};
pub use filter::FilterError;
pub use role::Role;
pub use rule::Rule;
pub use rustix::process::RawUid as UserId;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot enter the sandbox")]
    Confine(#[from] ConfineError),
    #[error("cannot enter the sandbox")]
    Filter(#[from] FilterError),
    #[error("cannot enter the sandbox: no handler for its end")]
    Handler(#[source] std::io::Error),
}

/// Gives everything up that is not on the lists, for good. Called by the main thread before there is another one.
/// `user` is who the process is from then on, if it may become another.
pub fn enter(reach: &Reach, user: Option<UserId>) -> Result<(), SandboxError> {
    confine::enter(reach, user)?;
    filter_calls()
}

/// The filters alone, from now on for every thread that is started as a [`Role`].
pub fn filter_calls() -> Result<(), SandboxError> {
    sys::prepare();
    // A backtrace is made of files that are out of reach.
    std::panic::set_hook(Box::new(|panic| eprintln!("vmm: {panic}")));
    violation::install_handler().map_err(SandboxError::Handler)?;
    filter::activate()?;
    Ok(())
}
