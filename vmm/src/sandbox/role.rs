//! The threads of a vmm process by what they do: their names, who starts whom, and the one way to start one.
//!
//! A thread's filter is added to that of the thread that started it, and the kernel asks all of them. So a thread may ask for
//! what it needs itself and for what those need that it starts; the main thread may ask for everything on the lists.

use std::cell::Cell;
use std::io;
use std::thread::{Builder, JoinHandle};

use super::filter;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Builds machines, loads the guest from its kernel or from a stream, waits for the end.
    Main,
    Log,
    ConsoleLog,
    Control,
    /// A client of the control socket that has become a stream: console, agent, or the saver of the guest.
    Stream,
    Throttle,
    Lease,
    Vcpu,
    /// The queue of one disk, and its I/O where that is io_uring.
    Disk,
    /// Does the I/O of a disk where it is not.
    DiskWorker,
    Nic,
    Announce,
    Console,
    /// Entropy source and balloon.
    Virtio,
    Watchdog,
    Plug,
    PlugOpen,
    Unplug,
}

/// Stacks of threads that call nothing deep, of those that do, and of those that run the code of libraries. A stack of 2 MiB, the
/// default, becomes a huge page where it happens to be aligned, and is resident whole from the first call.
const SMALL_STACK: usize = 64 << 10;
const MIDDLE_STACK: usize = 256 << 10;
const LARGE_STACK: usize = 1 << 20;
/// The kernel keeps no more of a name.
const MAX_NAME_BYTES: usize = 15;

thread_local! {
    /// For the last words of a thread that breaks a rule. No destructor, so a signal handler may read it.
    static ROLE: Cell<Role> = const { Cell::new(Role::Main) };
}

impl Role {
    pub const ALL: [Self; 18] = [
        Self::Main,
        Self::Log,
        Self::ConsoleLog,
        Self::Control,
        Self::Stream,
        Self::Throttle,
        Self::Lease,
        Self::Vcpu,
        Self::Disk,
        Self::DiskWorker,
        Self::Nic,
        Self::Announce,
        Self::Console,
        Self::Virtio,
        Self::Watchdog,
        Self::Plug,
        Self::PlugOpen,
        Self::Unplug,
    ];

    /// The name of its thread, or what the names of its threads begin with.
    pub const fn thread_name(self) -> &'static str {
        match self {
            // As the program is called.
            Self::Main => "vmm",
            Self::Log => "log",
            Self::ConsoleLog => "console-log",
            Self::Control => "control",
            Self::Stream => "stream",
            Self::Throttle => "throttle",
            Self::Lease => "lease",
            Self::Vcpu => "vcpu-",
            Self::Disk => "disk-",
            Self::DiskWorker => "disk-worker",
            Self::Nic => "nic-",
            Self::Announce => "announce",
            Self::Console => "virtio-console",
            Self::Virtio => "virtio-",
            Self::Watchdog => "watchdog",
            Self::Plug => "plug",
            Self::PlugOpen => "plug-open",
            Self::Unplug => "unplug",
        }
    }

    /// Whose threads it starts.
    pub const fn starts(self) -> &'static [Self] {
        match self {
            Self::Main => &Self::ALL,
            Self::Control => &[Self::Stream, Self::PlugOpen],
            Self::Stream => &[Self::Throttle],
            // Disks that are opened again.
            Self::Lease => &[Self::DiskWorker],
            Self::Plug => &[Self::Unplug],
            Self::PlugOpen => &[Self::Disk, Self::DiskWorker, Self::Nic],
            _ => &[],
        }
    }

    const fn stack_bytes(self) -> usize {
        match self {
            Self::Throttle | Self::Announce => SMALL_STACK,
            Self::Vcpu | Self::Stream => MIDDLE_STACK,
            _ => LARGE_STACK,
        }
    }

    /// Starts a thread under its filter; `which` follows in the name where there are several.
    pub fn spawn<T: Send + 'static>(
        self,
        which: &str,
        life: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let program = filter::program(self).map_err(io::Error::other)?;
        let mut name = format!("{}{which}", self.thread_name());
        name.truncate(name.floor_char_boundary(MAX_NAME_BYTES));
        Builder::new().name(name).stack_size(self.stack_bytes()).spawn(move || {
            ROLE.set(self);
            if let Some(program) = program {
                filter::install_or_die(program);
            }
            life()
        })
    }

    /// That of the calling thread.
    pub fn current() -> Self {
        ROLE.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_is_listed_once_in_its_order() {
        assert!(Role::ALL.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_thread_has_the_name_and_the_role_that_it_was_started_with() {
        let started = Role::Vcpu.spawn("3", || (std::thread::current().name().map(str::to_owned), Role::current()));
        assert_eq!(started.unwrap().join().unwrap(), (Some("vcpu-3".to_owned()), Role::Vcpu));
        let long = Role::Disk.spawn("of-a-long-näme", || std::thread::current().name().map(str::to_owned)).unwrap();
        assert_eq!(long.join().unwrap().as_deref(), Some("disk-of-a-long-"));
    }
}
