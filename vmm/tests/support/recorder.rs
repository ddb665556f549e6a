//! Sees every system call of a process: a filter around the process's own hands each one to the test, which notes it and lets it go on.
//! Calls that the process's own filters refuse never come here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Mutex, OnceLock};
use std::{io, mem};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use vmm::sandbox::Role;
use vmm::sandbox::tables::{self, Table};

/// The descriptor over which the listener leaves the new process: what is sent over it is not held up.
const WAY_OUT: i32 = 1000;

/// Enough to see what is missing.
const MAX_BORROWED: usize = 200;

/// Set by the one test of a process that records.
static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Which rules were used by all the processes that were started under it: the table, and the place in it.
#[derive(Default)]
pub struct Recorder {
    used: Mutex<BTreeSet<(Table, usize)>>,
    /// Calls that go through only because a thread may also do what those need that it starts.
    borrowed: Mutex<BTreeSet<String>>,
}

/// A thread of a process that is recorded.
struct Thread {
    role: Role,
    /// It has its own filter, and so the name and the role that it keeps.
    settled: bool,
}

impl Recorder {
    /// From now on every `TestVm` of this process is recorded.
    pub fn install() -> &'static Self {
        RECORDER.get_or_init(Self::default)
    }

    pub fn installed() -> Option<&'static Self> {
        RECORDER.get()
    }

    /// The rules that nobody has used and that give no reason for it.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().unwrap();
        let mut unused = Vec::new();
        for table in Table::all() {
            for (at, rule) in table.rules().iter().enumerate() {
                if !used.contains(&(table, at)) && rule.why_unseen().is_none() {
                    unused.push(format!("{table:?}: {rule}"));
                }
            }
        }
        unused
    }

    /// The calls of roles whose own tables do not say that they make them.
    pub fn borrowed(&self) -> Vec<String> {
        self.borrowed.lock().unwrap().iter().cloned().collect()
    }

    /// Starts a process whose calls are seen until it and all that it starts have ended.
    pub fn spawn(&'static self, command: &mut Command) -> io::Result<Child> {
        let (near, far) = UnixStream::pair()?;
        let number = far.as_raw_fd();
        // SAFETY: `hand_out_listener` makes system calls only, on memory of its own stack.
        unsafe { command.pre_exec(move || hand_out_listener(number)) };
        std::thread::spawn(move || {
            if let Some(listener) = receive(&near) {
                self.listen(&listener);
            }
        });
        command.spawn()
    }

    fn listen(&self, listener: &OwnedFd) {
        let mut threads = BTreeMap::new();
        // Before its first filter a process may do anything.
        let mut filtered = false;
        loop {
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let found = match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) => ready[0].revents().unwrap_or(PollFlags::empty()),
                Err(_) => continue,
            };
            if !found.contains(PollFlags::POLLIN) {
                return;
            }
            // SAFETY: all zeros are what the kernel wants to find here.
            let mut call: libc::seccomp_notif = unsafe { mem::zeroed() };
            // SAFETY: the kernel writes one notification.
            if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &mut call) } < 0 {
                // Its thread has ended or was interrupted meanwhile.
                continue;
            }
            let number = libc::c_long::from(call.data.nr);
            if filtered {
                self.note(&mut threads, call.pid, number, &call.data.args);
            }
            filtered |= number == libc::SYS_seccomp;
            let answer = libc::seccomp_notif_resp {
                id: call.id,
                val: 0,
                error: 0,
                flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            };
            // SAFETY: the kernel reads one answer; it refuses one that comes too late.
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &answer) };
        }
    }

    fn note(&self, threads: &mut BTreeMap<u32, Thread>, thread: u32, call: libc::c_long, arguments: &[u64; 6]) {
        let known = threads.entry(thread).or_insert_with(|| Thread { role: role_of(thread), settled: false });
        match tables::find(known.role, call, arguments) {
            Some(rule) => drop(self.used.lock().unwrap().insert(rule)),
            None => {
                let mut borrowed = self.borrowed.lock().unwrap();
                if borrowed.len() < MAX_BORROWED {
                    borrowed.insert(format!("{:?}: call {call}, second argument {:#x}", known.role, arguments[1]));
                }
            }
        }
        if call == libc::SYS_seccomp && !known.settled {
            // A new thread has had its name by then, and the role of the one that started it until now.
            *known = Thread { role: role_of(thread), settled: true };
        }
    }
}

/// By its name, which a new thread has from the one that started it.
fn role_of(thread: u32) -> Role {
    let name = std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default();
    let fits = Role::ALL.into_iter().filter(|role| name.trim_end().starts_with(role.thread_name()));
    fits.max_by_key(|role| role.thread_name().len()).unwrap_or(Role::Main)
}

/// In the new process: puts the filter on and sends its other end away.
fn hand_out_listener(socket: i32) -> io::Result<()> {
    let checked = |result: i64| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let step =
        |code: u32, k, jump_if: (u8, u8)| libc::sock_filter { code: code as u16, jt: jump_if.0, jf: jump_if.1, k };
    let (load, equal, answer) =
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::BPF_RET);
    // The number of the call, then the lower half of its first argument.
    let mut steps = [
        step(load, 0, (0, 0)),
        step(equal, libc::SYS_sendmsg as u32, (0, 3)),
        step(load, 16, (0, 0)),
        step(equal, WAY_OUT as u32, (0, 1)),
        step(answer, libc::SECCOMP_RET_ALLOW, (0, 0)),
        step(answer, libc::SECCOMP_RET_USER_NOTIF, (0, 0)),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: system calls on a descriptor that the parent keeps open and on a program that lives to the end of this function; the new
    // descriptor has no other owner.
    let listener = unsafe {
        checked(libc::dup3(socket, WAY_OUT, libc::O_CLOEXEC).into())?;
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let listener = checked(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program))?;
        BorrowedFd::borrow_raw(listener as i32)
    };
    let descriptors = [listener];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    // SAFETY: open since the first of the calls above.
    let way_out = unsafe { BorrowedFd::borrow_raw(WAY_OUT) };
    sendmsg(way_out, &[IoSlice::new(b"l")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(near: &UnixStream) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(near, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}
