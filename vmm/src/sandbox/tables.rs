//! What each role may ask the kernel for: what all threads do, what some do alike, and what one role alone does.

use std::collections::BTreeSet;

use super::kvm_requests::*;
use super::role::Role;
use super::rule::Rule;

macro_rules! call {
    ($call:ident) => {
        Rule::any(libc::$call, stringify!($call))
    };
}

macro_rules! ioctl {
    ($request:ident) => {
        Rule::any(libc::SYS_ioctl, stringify!($request)).is(1, $request)
    };
    (libc $request:ident) => {
        Rule::any(libc::SYS_ioctl, stringify!($request)).is(1, libc::$request as u32)
    };
}

/// Of memory that is mapped, nothing may be carried out.
const EXEC: u32 = libc::PROT_EXEC as u32;
/// `sys::kick_signal`: glibc keeps the first two real-time signals to itself.
pub const KICK: u32 = 35;
/// A thread as glibc makes one.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// The second of the two real-time signals that glibc keeps to itself.
const SIGSETXID: u32 = 33;
/// As `sys::raise_priority` asks for it.
const FIRST: u32 = (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK) as u32;
/// Not in the libc crate yet.
const MADV_GUARD_INSTALL: i32 = 102;

const fn advice(advice: i32) -> Rule {
    Rule::any(libc::SYS_madvise, "SYS_madvise").is(2, advice as u32)
}

const fn fcntl(command: i32) -> Rule {
    Rule::any(libc::SYS_fcntl, "SYS_fcntl").is(1, command as u32)
}

/// Memory, locks, event descriptors, signals, the end.
const EVERY: &[Rule] = &[
    call!(SYS_read),
    call!(SYS_write),
    call!(SYS_close),
    call!(SYS_futex),
    call!(SYS_poll),
    call!(SYS_mmap).without(2, EXEC),
    call!(SYS_mprotect).without(2, EXEC),
    call!(SYS_munmap),
    call!(SYS_mremap).unseen("a list that grows beyond what the allocator takes from its heap"),
    call!(SYS_brk),
    advice(libc::MADV_DONTNEED),
    fcntl(libc::F_GETFD),
    fcntl(libc::F_DUPFD_CLOEXEC),
    call!(SYS_getrandom)
        .unseen("the first hash table of a thread; and a guest's entropy, for which no test guest asks"),
    call!(SYS_rt_sigprocmask),
    call!(SYS_rt_sigreturn),
    call!(SYS_sigaltstack),
    call!(SYS_gettid),
    call!(SYS_getpid),
    call!(SYS_tgkill).is(2, KICK),
    call!(SYS_tgkill).is(2, libc::SIGABRT as u32).unseen("the end of a panic within a panic"),
    call!(SYS_clock_nanosleep),
    call!(SYS_clock_gettime).unseen("the vDSO answers, but for clock sources that it cannot read"),
    call!(SYS_restart_syscall).unseen("after a SIGSTOP"),
    call!(SYS_sched_yield).unseen("a channel of the standard library whose other end is halfway through a message"),
    call!(SYS_exit),
    call!(SYS_exit_group),
];

/// The new thread begins under the filters of the one that starts it.
const STARTS: &[Rule] = &[
    call!(SYS_clone).is(0, THREAD),
    call!(SYS_clone3)
        .unseen("another filter answers that it does not exist, as its flags are where no filter sees them"),
    call!(SYS_set_robust_list),
    call!(SYS_rseq),
    call!(SYS_sched_getaffinity),
    advice(MADV_GUARD_INSTALL).unseen("how glibc 2.42 and later guard a stack"),
    call!(SYS_prctl).is(0, libc::PR_SET_NAME as u32),
    call!(SYS_prctl).is(0, libc::PR_SET_NO_NEW_PRIVS as u32),
    call!(SYS_seccomp).is(0, libc::SECCOMP_SET_MODE_FILTER),
];

/// Finds out what a disk is, and makes it ready for I/O in one of two ways.
const OPENS_DISKS: &[Rule] = &[
    fcntl(libc::F_GETFL),
    fcntl(libc::F_SETFL),
    call!(SYS_statx),
    call!(SYS_lseek),
    call!(SYS_pread64),
    call!(SYS_preadv),
    call!(SYS_fdatasync),
    call!(SYS_pwritev2).unseen("the header of an image that another program has left in use"),
    call!(SYS_io_uring_setup),
    call!(SYS_io_uring_register),
    call!(SYS_eventfd2),
];

/// Whoever holds a device may be the one that interrupts the guest, or the last that lets go of its doorbells and vectors.
const HOLDS_DEVICES: &[Rule] = &[
    ioctl!(KVM_IRQ_LINE),
    ioctl!(KVM_SIGNAL_MSI),
    ioctl!(KVM_IRQFD),
    ioctl!(KVM_IOEVENTFD),
    ioctl!(KVM_SET_GSI_ROUTING),
];

/// A byte stream to hostd.
const SPEAKS: &[Rule] = &[
    call!(SYS_sendto),
    call!(SYS_recvfrom),
    ioctl!(libc FIONBIO),
    call!(SYS_setsockopt).is(1, libc::SOL_SOCKET as u32),
    call!(SYS_shutdown),
];

/// The lease's two kinds of timers get another deadline.
const SETS_TIMERS: &[Rule] = &[call!(SYS_timerfd_settime), call!(SYS_timer_settime)];

const MAIN: &[Rule] = &[
    // The epoch's mark. The end of the guest: its report, its socket.
    call!(SYS_openat),
    call!(SYS_rename),
    call!(SYS_unlink),
    call!(SYS_fsync),
    // The control socket.
    call!(SYS_socket).is(0, libc::AF_UNIX as u32),
    call!(SYS_bind),
    call!(SYS_listen),
    call!(SYS_chmod),
    call!(SYS_signalfd4),
    call!(SYS_timerfd_create),
    call!(SYS_uname),
    // glibc's handler for its own signal, with the first thread that is started.
    call!(SYS_rt_sigaction).is(0, SIGSETXID),
    // A machine.
    advice(libc::MADV_DONTDUMP),
    advice(libc::MADV_HUGEPAGE),
    ioctl!(KVM_CREATE_VM),
    ioctl!(KVM_CHECK_EXTENSION),
    ioctl!(KVM_GET_VCPU_MMAP_SIZE),
    ioctl!(KVM_GET_SUPPORTED_CPUID),
    ioctl!(KVM_GET_MSR_INDEX_LIST),
    ioctl!(KVM_SET_IDENTITY_MAP_ADDR),
    ioctl!(KVM_SET_TSS_ADDR),
    ioctl!(KVM_CREATE_IRQCHIP),
    ioctl!(KVM_CREATE_PIT2),
    ioctl!(KVM_SET_USER_MEMORY_REGION),
    ioctl!(KVM_CREATE_VCPU),
    ioctl!(KVM_SET_CPUID2),
    ioctl!(KVM_GET_TSC_KHZ),
    ioctl!(KVM_SET_MSRS),
    ioctl!(KVM_GET_MSRS),
    ioctl!(KVM_GET_LAPIC),
    ioctl!(KVM_SET_LAPIC),
    ioctl!(KVM_GET_SREGS),
    ioctl!(KVM_SET_SREGS),
    ioctl!(KVM_SET_REGS),
    // A guest from elsewhere.
    ioctl!(KVM_SET_CLOCK),
    ioctl!(KVM_SET_IRQCHIP),
    ioctl!(KVM_SET_PIT2),
    ioctl!(KVM_SET_MP_STATE),
    ioctl!(KVM_SET_XCRS),
    ioctl!(KVM_SET_XSAVE),
    ioctl!(KVM_SET_DEBUGREGS),
    ioctl!(KVM_SET_VCPU_EVENTS),
    ioctl!(KVM_SET_SREGS2).unseen("guests with PAE that run, which flat ones are not"),
    ioctl!(KVM_SET_TSC_KHZ).unseen("guests from a host with another frequency"),
];

const CONTROL: &[Rule] = &[
    call!(SYS_accept4),
    call!(SYS_recvmsg),
    call!(SYS_eventfd2),
    // Files that are handed over.
    fcntl(libc::F_GETFL),
    // The memory map, which is open.
    call!(SYS_statx),
    call!(SYS_lseek),
];

const STREAM: &[Rule] = &[
    call!(SYS_uname),
    ioctl!(KVM_SET_USER_MEMORY_REGION),
    ioctl!(KVM_GET_DIRTY_LOG),
    ioctl!(KVM_GET_CLOCK),
    ioctl!(KVM_GET_IRQCHIP),
    ioctl!(KVM_GET_PIT2),
];

const VCPU: &[Rule] = &[
    // First, because the kernel asks in this order.
    ioctl!(KVM_RUN),
    ioctl!(KVM_KVMCLOCK_CTRL),
    call!(SYS_timer_create),
    call!(SYS_timer_delete),
    // For a save; the first two for the report of a fault too.
    ioctl!(KVM_GET_REGS),
    ioctl!(KVM_GET_SREGS),
    ioctl!(KVM_GET_SREGS2),
    ioctl!(KVM_GET_MP_STATE),
    ioctl!(KVM_GET_MSRS),
    ioctl!(KVM_GET_LAPIC),
    ioctl!(KVM_GET_XSAVE),
    ioctl!(KVM_GET_XSAVE2).unseen("processors whose state is longer than a page"),
    ioctl!(KVM_GET_XCRS),
    ioctl!(KVM_GET_DEBUGREGS),
    ioctl!(KVM_GET_VCPU_EVENTS),
    ioctl!(KVM_GET_TSC_KHZ),
];

const DISK: &[Rule] = &[call!(SYS_io_uring_enter)];

const IMAGE_IO: &str = "the test guests read only what an image does not hold; Linux guests do all of it";

const DISK_WORKER: &[Rule] = &[
    call!(SYS_preadv).unseen(IMAGE_IO),
    call!(SYS_pwritev2).unseen(IMAGE_IO),
    call!(SYS_fdatasync).unseen(IMAGE_IO),
    call!(SYS_fallocate).unseen(IMAGE_IO),
    call!(SYS_lseek).unseen(IMAGE_IO),
];

/// A log that has grown long is renamed, and a new one begun.
const CONSOLE_LOG: &[Rule] = &[
    call!(SYS_rename).unseen("no test guest prints that much"),
    call!(SYS_openat).unseen("no test guest prints that much"),
    call!(SYS_statx).unseen("no test guest prints that much"),
];

const NIC: &[Rule] =
    &[call!(SYS_readv).unseen(NO_FRAMES), call!(SYS_writev).unseen(NO_FRAMES), ioctl!(libc TUNSETOFFLOAD)];

const NO_FRAMES: &str = "the test guests have no driver for their cards; Linux guests send and receive";

const ANNOUNCE: &[Rule] = &[call!(SYS_writev)];

/// Above all others, so that it takes a guest's disks away in time.
const LEASE: &[Rule] = &[call!(SYS_sched_setscheduler).is(1, FIRST)];

const PLUG_OPEN: &[Rule] = &[ioctl!(libc TUNGETIFF), ioctl!(libc TUNSETVNETHDRSZ), ioctl!(libc TUNSETOFFLOAD)];

/// Lists of rules. A role has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    Every,
    Starts,
    OpensDisks,
    HoldsDevices,
    Speaks,
    SetsTimers,
    Own(Role),
}

impl Table {
    pub fn all() -> impl Iterator<Item = Self> {
        let shared = [Self::Every, Self::Starts, Self::OpensDisks, Self::HoldsDevices, Self::Speaks, Self::SetsTimers];
        shared.into_iter().chain(Role::ALL.into_iter().map(Self::Own))
    }

    pub const fn rules(self) -> &'static [Rule] {
        match self {
            Self::Every => EVERY,
            Self::Starts => STARTS,
            Self::OpensDisks => OPENS_DISKS,
            Self::HoldsDevices => HOLDS_DEVICES,
            Self::Speaks => SPEAKS,
            Self::SetsTimers => SETS_TIMERS,
            Self::Own(Role::Main) => MAIN,
            Self::Own(Role::Control) => CONTROL,
            Self::Own(Role::Stream) => STREAM,
            Self::Own(Role::Lease) => LEASE,
            Self::Own(Role::Vcpu) => VCPU,
            Self::Own(Role::Disk) => DISK,
            Self::Own(Role::DiskWorker) => DISK_WORKER,
            Self::Own(Role::Nic) => NIC,
            Self::Own(Role::Announce) => ANNOUNCE,
            Self::Own(Role::ConsoleLog) => CONSOLE_LOG,
            Self::Own(Role::PlugOpen) => PLUG_OPEN,
            Self::Own(
                Role::Log | Role::Throttle | Role::Console | Role::Virtio | Role::Watchdog | Role::Plug | Role::Unplug,
            ) => &[],
        }
    }

    /// Whether it is for threads of this role themselves.
    fn serves(self, role: Role) -> bool {
        use Role::{Console, Control, Disk, Lease, Main, Nic, Plug, PlugOpen, Stream, Unplug, Vcpu, Virtio, Watchdog};
        match self {
            Self::Every => true,
            Self::Starts => !role.starts().is_empty(),
            Self::OpensDisks => matches!(role, Main | Lease | PlugOpen),
            Self::HoldsDevices => matches!(
                role,
                Main | Control | Stream | Vcpu | Disk | Nic | Console | Virtio | Watchdog | Plug | PlugOpen | Unplug
            ),
            Self::Speaks => matches!(role, Main | Control | Stream),
            Self::SetsTimers => matches!(role, Main | Control | Lease | Vcpu),
            Self::Own(owner) => owner == role,
        }
    }
}

/// What a thread of this role needs itself.
pub fn of(role: Role) -> impl Iterator<Item = Table> {
    Table::all().filter(move |table| table.serves(role))
}

/// What the filter of this role allows: what it needs, and what those need whose threads it starts, and theirs.
pub fn allowed(role: Role) -> BTreeSet<Table> {
    let mut roles = vec![role];
    let mut at = 0;
    // Each role at most once.
    while let Some(role) = roles.get(at).copied() {
        at += 1;
        let more = role.starts().iter().filter(|started| !roles.contains(started)).copied();
        roles.extend(more.collect::<Vec<_>>());
    }
    roles.into_iter().flat_map(of).collect()
}

/// The rule by which a thread of this role itself may make this call.
pub fn find(role: Role, call: libc::c_long, arguments: &[u64; 6]) -> Option<(Table, usize)> {
    of(role).find_map(|table| {
        let at = table.rules().iter().position(|rule| rule.allows(call, arguments))?;
        Some((table, at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_role_is_given_a_rule_twice() {
        for role in Role::ALL {
            let rules: Vec<_> = of(role).flat_map(Table::rules).collect();
            for (at, rule) in rules.iter().enumerate() {
                let again = rules[at + 1..].iter().any(|other| rule.to_string() == other.to_string());
                assert!(!again, "{role:?} has {rule} twice");
            }
        }
    }

    #[test]
    fn the_signal_of_the_rules_is_that_of_the_kicks() {
        assert_eq!(KICK as i32, crate::sys::kick_signal());
    }
}
