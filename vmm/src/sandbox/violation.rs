//! The last words of a thread that asks the kernel for what no rule allows: which call, with which arguments. hostd finds them at
//! the end of the log of a process that left no report.

use std::io::{Cursor, Write};
use std::mem::MaybeUninit;
use std::{io, ptr};

use super::role::Role;

const MAX_WORDS: usize = 512;

/// Has the process say why before it dies of SIGSYS. Once a process.
pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is valid, and `on_violation` does only what a signal handler may.
    let result = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_violation as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &action, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel has put the registers back to what they were at the call.
extern "C" fn on_violation(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the third argument is the context of the interrupted thread.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut space = [0; MAX_WORDS];
    let mut words = Cursor::new(&mut space[..]);
    let register = |at: libc::c_int| registers[at as usize];
    // Into memory of this frame: nothing is allocated, and what does not fit is cut.
    let _ = writeln!(
        words,
        "vmm: the sandbox ends this process: a thread of the kind {:?} asked for system call {} \
         ({:#x}, {:#x}, {:#x}, {:#x}), which no rule allows",
        Role::current(),
        register(libc::REG_RAX),
        register(libc::REG_RDI),
        register(libc::REG_RSI),
        register(libc::REG_RDX),
        register(libc::REG_R10),
    );
    let len = words.position() as usize;
    // SAFETY: the bytes are on this stack; reboot(2) is on no list, and with SIGSYS blocked, as it is in its own handler, a second
    // violation ends the process whatever handler there is. Its arguments are not those that the call asks for.
    unsafe {
        libc::write(libc::STDERR_FILENO, space.as_ptr().cast(), len);
        libc::syscall(libc::SYS_reboot, 0, 0, 0, 0);
        libc::_exit(libc::SIGSYS + 128);
    }
}
