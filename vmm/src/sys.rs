//! System calls that no crate wraps in the form needed here, each with its reason: kicks that interrupt `KVM_RUN`, per-thread timers
//! on `CLOCK_BOOTTIME`, locks held by an inherited descriptor.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_BOOTTIME`: runs while the machine sleeps, as a lease must. Served by the vDSO, so cheap enough to ask
/// before each entry into the guest.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The signal that takes a vCPU thread out of the guest. Real-time, so that it cannot meet one of libc's or a library's.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// One heap for all threads. glibc makes more of them by the number of processors, and gives memory of those back by the kernel's
/// policy: both stand in files that the sandbox has out of reach, and that any thread would open at any time.
#[cfg(target_env = "gnu")]
const ALLOCATOR_ARENAS: libc::c_int = 1;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs, else null. No destructor, so the signal
    /// handler may look at it at any moment of the thread's life.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The whole handler: a kick that arrives between the last check and `KVM_RUN` makes that `KVM_RUN` return at once.
extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.with(Cell::get);
    if !flag.is_null() {
        // SAFETY: set by `ImmediateExit::install` on this very thread to a byte that lives until it is dropped, which
        // also happens on this thread; a store to an atomic is allowed in a signal handler.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::SeqCst);
    }
}

/// Installs the handler, once a process. Without SA_RESTART: an interrupted `KVM_RUN` must return EINTR.
fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid, and `on_kick` does only what a signal handler may.
        let result = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(kick_signal(), &action, ptr::null_mut())
        };
        // The only error is a signal number out of range.
        debug_assert_eq!(result, 0);
    });
}

/// The link from this thread's kicks to its vCPU's `immediate_exit`.
#[derive(Debug)]
pub struct ImmediateExit {
    flag: *mut u8,
}

impl ImmediateExit {
    /// From now on a kick of this thread sets the byte.
    ///
    /// # Safety
    /// `flag` points to `kvm_run.immediate_exit` of a vCPU that outlives the result and runs on this thread alone.
    pub unsafe fn install(flag: *mut u8) -> Self {
        install_kick_handler();
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        Self { flag }
    }

    /// Forgets kicks so far. The reasons to stop must be looked at after this and before the next `KVM_RUN`,
    /// so that a later kick is seen by one of the two.
    pub fn clear(&self) {
        // SAFETY: valid by the contract of `install`.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(0, Ordering::SeqCst);
    }

    /// Makes the next `KVM_RUN` finish what is pending and return.
    pub fn set(&self) {
        // SAFETY: valid by the contract of `install`.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// A thread of this process that can be kicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadId(libc::pid_t);

impl ThreadId {
    pub fn current() -> Self {
        install_kick_handler();
        Self(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Interrupts the thread's system call. A thread that is gone is not an error: it runs no guest any more.
    pub fn kick(self) {
        // SAFETY: tgkill takes no pointer, and the thread group is our own.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, kick_signal());
        }
    }
}

/// A timer on `CLOCK_BOOTTIME` that kicks one thread. It lives in the kernel: it needs no other thread of ours to run.
#[derive(Debug)]
pub struct KickTimer {
    id: libc::timer_t,
}

// SAFETY: a timer id is a number to the kernel, usable from every thread of the process.
unsafe impl Send for KickTimer {}
// SAFETY: timer_settime on one timer from two threads is ordered by the kernel.
unsafe impl Sync for KickTimer {}

impl KickTimer {
    /// A timer for the given thread, not armed.
    pub fn new(thread: ThreadId) -> io::Result<Self> {
        let mut id = MaybeUninit::<libc::timer_t>::uninit();
        // SAFETY: a zeroed sigevent is valid; the kernel fills `id` on success.
        let result = unsafe {
            let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = kick_signal();
            event.sigev_notify_thread_id = thread.0;
            libc::timer_create(libc::CLOCK_BOOTTIME, &mut event, id.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: timer_create succeeded.
        let id = unsafe { id.assume_init() };
        Ok(Self { id })
    }

    /// Fires once at this time, or at once when it has passed.
    pub fn arm(&self, deadline_ns: u64) -> io::Result<()> {
        // All zero would disarm; no deadline of ours is 0, and 1 ns is as much in the past.
        let deadline_ns = deadline_ns.max(1);
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: (deadline_ns / 1_000_000_000) as libc::time_t,
                tv_nsec: (deadline_ns % 1_000_000_000) as libc::c_long,
            },
        };
        // SAFETY: `id` is a live timer and `spec` a valid itimerspec.
        let result = unsafe { libc::timer_settime(self.id, libc::TIMER_ABSTIME, &spec, ptr::null_mut()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: `id` is a live timer, deleted once.
        unsafe {
            libc::timer_delete(self.id);
        }
    }
}

/// Takes over a descriptor that the parent left open for us.
pub fn inherit_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the number is open.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFD takes no pointer.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, and it is the parent's contract that nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Does what is done once a process, and which the sandbox does not allow later: asks the kernel where the vDSO is, installs the handler
/// of kicks, and has the allocator open no files.
pub fn prepare() {
    let _ = boottime_ns();
    install_kick_handler();
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ALLOCATOR_ARENAS);
    }
}

/// Raises the calling thread above all ordinary ones. Refused without CAP_SYS_NICE.
pub fn raise_priority() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread, and the pointer is valid for the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_interrupts_its_own_thread_and_sets_its_flag() {
        let mut flag = Box::new(0u8);
        // SAFETY: the box outlives the link and nothing else uses the byte.
        let link = unsafe { ImmediateExit::install(&mut *flag) };
        let timer = KickTimer::new(ThreadId::current()).unwrap();
        timer.arm(boottime_ns() + 2_000_000).unwrap();
        // SAFETY: waits for a signal; no pointer.
        let result = unsafe { libc::pause() };
        assert_eq!(result, -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
        // SAFETY: the flag byte is live.
        let seen = || unsafe { AtomicU8::from_ptr(link.flag) }.load(Ordering::SeqCst);
        assert_eq!(seen(), 1);
        link.clear();
        assert_eq!(seen(), 0);
        // A deadline that has passed fires too.
        timer.arm(1).unwrap();
        while seen() == 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_closed_descriptor_is_not_inherited() {
        assert!(inherit_fd(9999).is_err());
    }
}
