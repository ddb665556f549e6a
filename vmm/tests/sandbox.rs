//! The sandbox of the whole program: what a process has given up, that the filter of each role holds, and that guests use every rule.

mod support;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use serde_json::json;
use support::moving::{load, run_call, save, source, target};
use support::recorder::Recorder;
use support::tap::tap;
use support::{TestVm, flat_guests_run, plug_guest, wait_for};
use vmm::sandbox::{self, Role};
use vmm::sys::boottime_ns;
use vmm_control::{Call, DiskConfig, DiskFormat, ErrorCode, LiveLimits, Notice};

/// Which forbidden call the child of a test makes, and on which thread.
const CRIME: &str = "QUORATE_TEST_CRIME";

/// Calls that no role may make, whatever its work; the first is one that only the main thread may.
const CRIMES: [(&str, i64, fn()); 8] = [
    ("listen", libc::SYS_listen, || {
        // SAFETY: no pointer, and no descriptor.
        unsafe { libc::listen(-1, 0) };
    }),
    ("socket", libc::SYS_socket, || {
        // SAFETY: no pointer.
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    }),
    ("execve", libc::SYS_execve, || {
        // SAFETY: a path that ends, and no arguments.
        unsafe { libc::syscall(libc::SYS_execve, c"/bin/true".as_ptr(), 0, 0) };
    }),
    ("exec-memory", libc::SYS_mmap, || {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping that nobody uses.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, kind, -1, 0) };
    }),
    ("fork", libc::SYS_clone, || {
        // SAFETY: a child would end at once.
        if unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } == 0 {
            // SAFETY: no pointer.
            unsafe { libc::_exit(0) };
        }
    }),
    ("terminal", libc::SYS_ioctl, || {
        // SAFETY: the kernel reads one byte.
        unsafe { libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()) };
    }),
    ("kill", libc::SYS_kill, || {
        // SAFETY: no pointer; the signal 0 does nothing.
        unsafe { libc::kill(1, 0) };
    }),
    ("ptrace", libc::SYS_ptrace, || {
        // SAFETY: no pointer.
        unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0) };
    }),
];

/// The child of the tests below: enters the filters and breaks a rule on a thread of the role that it is told.
#[test]
#[ignore = "is run by other tests, and ends its process"]
fn break_a_rule() {
    let order = std::env::var(CRIME).unwrap_or_default();
    let Some((role, crime)) = order.split_once(' ') else { return };
    let role = Role::ALL.into_iter().find(|known| format!("{known:?}") == role).unwrap();
    let commit = CRIMES.into_iter().find_map(|(name, _, commit)| (name == crime).then_some(commit));
    let thread = std::thread::spawn(move || {
        sandbox::filter_calls().unwrap();
        if role == Role::Main {
            return commit.map_or((), |commit| commit());
        }
        role.spawn("0", move || commit.map_or((), |commit| commit())).unwrap().join().unwrap();
    });
    thread.join().unwrap();
}

fn child(role: Role, crime: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "break_a_rule", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CRIME, format!("{role:?} {crime}"))
        .output()
        .unwrap()
}

#[test]
fn a_call_that_no_rule_allows_ends_the_process_and_is_named() {
    for role in Role::ALL {
        assert!(child(role, "nothing").status.success(), "{role:?} alone does no harm");
        for (crime, call, _) in CRIMES {
            // "listen" shows that a thread has more than the filter of the main thread, which it has from that. Of the others one role shows
            // what stands for all.
            let shows_something = match crime {
                "listen" => role != Role::Main,
                "socket" | "exec-memory" => true,
                _ => role == Role::Vcpu,
            };
            if !shows_something {
                continue;
            }
            let output = child(role, crime);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?} {crime}: {said}");
            let words = format!("a thread of the kind {role:?} asked for system call {call} (");
            assert!(said.contains(&words), "{role:?} {crime}: {said}");
        }
    }
}

/// The threads of a process: their names, and what the kernel says of each.
fn threads(vm: &TestVm) -> Vec<(String, String)> {
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap();
    tasks
        .map(|task| task.unwrap().path())
        .map(|task| (read(task.join("comm")).trim().to_owned(), read(task.join("status"))))
        .filter(|(name, _)| !name.is_empty())
        .collect()
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// Who a process is in its sandbox, where it may become another.
const USER: u32 = 0x7000_0001;

/// A VM whose processes enter the sandbox, as a user of their own where this one is root.
fn sandboxed(mut vm: TestVm) -> TestVm {
    vm.argue(&["--sandbox"]);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(vm.path(""), Some(USER), Some(USER)).unwrap();
        vm.argue(&["--user", &USER.to_string()]);
    }
    vm
}

#[test]
fn every_thread_of_a_guest_has_given_everything_up() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = sandboxed(TestVm::new("counter"));
    vm.start().wait_console("up\n.");
    vm.client();
    let expected =
        ["vmm", "log", "console-log", "control", "vcpu-0", "virtio-console", "virtio-rng", "virtio-balloon", "plug"];
    // The filters of the main thread, and its own on top. A new thread puts its own on before it does anything else.
    let is_filtered = |(name, status): &(String, String)| {
        let filters: u32 = field(status, "Seccomp_filters").parse().unwrap_or(0);
        filters == 2 && name == "vmm" || filters >= 3
    };
    let threads = wait_for("each thread to have its filter", || {
        let threads = threads(&vm);
        let all_are_there = expected.iter().all(|role| threads.iter().any(|(name, _)| name == role));
        (all_are_there && threads.iter().all(is_filtered)).then_some(threads)
    });
    for (name, status) in &threads {
        assert_eq!(field(status, "NoNewPrivs"), "1", "{name}");
        assert_eq!(field(status, "Seccomp"), "2", "{name}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            // Nobody takes from a user what only root may: the bounding set.
            if set != "CapBnd" || rustix::process::geteuid().is_root() {
                assert_eq!(field(status, set), "0000000000000000", "{name} {set}");
            }
        }
    }
    if rustix::process::geteuid().is_root() {
        let network = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net")).unwrap();
        assert_ne!(network(&vm.pid().to_string()), network("self"));
        for (name, status) in &threads {
            for set in ["Uid", "Gid"] {
                let all = field(status, set);
                assert!(all.split_whitespace().all(|id| id == USER.to_string()), "{name} {set} {all}");
            }
            assert_eq!(field(status, "Groups"), "", "{name}");
        }
    }
}

/// KiB of the program's code and constants that are in the guest's process.
fn resident_program_kib(vm: &TestVm) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        if line.contains(" r-xp ") || line.contains(" r--p ") {
            inside = line.ends_with("/vmm");
        } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| std::mem::take(&mut inside)) {
            sum += kib.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn a_guest_that_has_booted_keeps_less_of_the_program_in_memory() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = sandboxed(TestVm::new("counter"));
    vm.start().wait_console("up\n.");
    let before = resident_program_kib(&vm);
    wait_for("pages of the program to be let go", || (resident_program_kib(&vm) < before * 9 / 10).then_some(()));
    // And it goes on.
    let said = vm.console().len();
    wait_for("the guest to say more", || (vm.console().len() > said).then_some(()));
}

#[test]
fn without_the_flag_nothing_is_given_up() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start().wait_console("up\n.");
    vm.client();
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    for (name, status) in threads(&vm) {
        for what in ["NoNewPrivs", "Seccomp", "Seccomp_filters", "CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(field(&status, what), field(&own, what), "{name} {what}");
        }
    }
    let network = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net")).unwrap();
    assert_eq!(network(&vm.pid().to_string()), network("self"));
}

/// An image outside of everything that the configuration names.
fn elsewhere() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 4096]).unwrap();
    (dir, path)
}

#[test]
fn a_disk_comes_with_its_files_or_not_at_all() {
    if !flat_guests_run() {
        return;
    }
    let (_keep, path) = elsewhere();
    let mut vm = sandboxed(TestVm::new("counter"));
    vm.start().wait_console("up\n.");
    let mut client = vm.client();
    let disk = DiskConfig { id: "data".into(), path: path.clone(), ..DiskConfig::default() };
    let refused = client.ask(Call::PlugDisk { config: Box::new(disk.clone()) }).error.unwrap();
    assert_eq!(refused.message, "disk data has 1 files, and 0 came");
    assert!(client.plug_disk(disk).error.is_none());
    client.wait_notice(|n| matches!(n, Notice::Plugged { .. }));
    // One of the configuration is opened before the process goes in, wherever it is.
    let mut vm = sandboxed(TestVm::new("off"));
    vm.set("disks", json!([{"id": "data", "path": path}]));
    assert_eq!(vm.start().wait_exit().code(), Some(0), "{}", vm.log());
    let mut vm = sandboxed(TestVm::new("off"));
    vm.set("disks", json!([{"id": "data", "path": "/nowhere"}]));
    vm.start().wait_exit();
    let words = "disk data: cannot open its files: /nowhere: No such file or directory";
    assert!(vm.log().contains(words), "{}", vm.log());
}

#[test]
fn a_guest_from_elsewhere_has_no_file_to_write_to_before_it_is_told_to_run() {
    if !flat_guests_run() {
        return;
    }
    let (_keep, path) = elsewhere();
    let disk = DiskConfig { id: "data".into(), path, shared: true, ..DiskConfig::default() };
    let mut first = sandboxed(source("counter"));
    first.set("disks", json!([disk])).start().wait_console("up\n.");
    let saved = save(&first);
    let mut second = sandboxed(target("counter"));
    second.set("disks", json!([disk])).start();
    load(&second, &saved);
    let open_for_writing = |vm: &TestVm| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().map(|fd| fd.unwrap().path());
        fds.filter(|fd| std::fs::read_link(fd).is_ok_and(|file| file == disk.path)).count()
    };
    assert_eq!(open_for_writing(&second), 0, "nothing of the disk is open");
    let mut client = second.client();
    assert!(client.ask(run_call(&second, 42)).error.is_none());
    let status = wait_for("the disk to want its files", || {
        let status = client.status();
        (!status.files_wanted.is_empty()).then_some(status)
    });
    assert_eq!(status.files_wanted, ["data"]);
    assert!(status.incoming.is_some(), "it waits for them");
    let other = client.hand_files(41, &disk).error.unwrap();
    assert_eq!(other.code, ErrorCode::WrongEpoch, "files for an earlier permit are not taken");
    let files = DiskConfig { read_only: true, ..disk.clone() };
    let mut again = second.client();
    let read_only = again.hand_files_now(42, &files).error.unwrap();
    assert!(read_only.message.contains("for reading only"), "{read_only}");
    assert!(again.hand_files_now(42, &disk).error.is_none());
    client.wait_notice(|notice| *notice == Notice::Resumed);
    assert!(open_for_writing(&second) > 0);
    assert_eq!(again.hand_files_now(42, &disk).error.unwrap().code, ErrorCode::NotNow, "it has them");
    client.ask(Call::PowerOff);
    assert_eq!(second.wait_exit().code(), Some(0));
}

// -- every rule is used

/// A qcow2 image of one cluster of metadata each and nothing in it: header, refcounts, the first table.
fn empty_qcow2() -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    // One entry of the first table, in cluster 3; the refcount table in 1, its block in 2, of 16 bits each.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    image
}

/// Disks of both formats come, are read, and go; a card comes with its tap.
fn devices_come_and_go() {
    let mut vm = sandboxed(TestVm::new("plug"));
    std::fs::write(vm.path("kernel"), plug_guest::elf()).unwrap();
    vm.start().wait_console("up\n");
    let mut client = vm.client();
    for (format, content) in [(DiskFormat::Raw, vec![7; 1 << 20]), (DiskFormat::Qcow2, empty_qcow2())] {
        let path = vm.path("image");
        std::fs::write(&path, content).unwrap();
        let disk = DiskConfig { id: "data".into(), path, format, ..DiskConfig::default() };
        client.plug_disk(disk);
        client.wait_notice(|n| matches!(n, Notice::Plugged { .. }));
        wait_for("a read", || {
            let metrics = client.ask(Call::Metrics).result.unwrap();
            (metrics["disks"]["data"]["reads"] == json!(1)).then_some(())
        });
        client.ask(Call::Unplug { id: "data".into(), force: false });
        client.wait_notice(|n| matches!(n, Notice::Unplugged { .. }));
    }
    let nic = serde_json::from_value(json!({"id": "lan", "mac": "52:54:00:00:00:01"})).unwrap();
    client.ask_with(Call::PlugNic { config: Box::new(nic) }, tap().as_fd());
    client.wait_notice(|n| matches!(n, Notice::Plugged { .. }));
    client.ask(Call::Unplug { id: "lan".into(), force: true });
    client.wait_notice(|n| matches!(n, Notice::Unplugged { .. }));
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

/// A guest loses its lease and its disks with it, gets both back, and resets.
fn a_lease_ends_and_is_renewed() {
    let mut vm = sandboxed(TestVm::new("counter"));
    let (raw, image) = (vm.path("raw"), vm.path("image"));
    std::fs::write(&raw, [7; 8192]).unwrap();
    std::fs::write(&image, empty_qcow2()).unwrap();
    let shared =
        |id: &str, path, format| DiskConfig { id: id.into(), path, format, shared: true, ..Default::default() };
    let disks = [shared("raw", raw, DiskFormat::Raw), shared("image", image, DiskFormat::Qcow2)];
    vm.set("disks", json!(disks));
    let deadline = boottime_ns() + 4_000_000_000;
    vm.set("release", json!("lease")).set("lease", json!({ "deadline_boottime_ns": deadline }));
    vm.start();
    let mut client = vm.client();
    // Not by the notice, which comes before the client where the processors have other work.
    wait_for("the lease to end", || client.status().quiesced.then_some(()));
    let deadline_ns = boottime_ns() + 12_000_000_000;
    let confirmed = client.ask(Call::Confirm { epoch: 41, deadline_ns });
    assert!(confirmed.error.is_none(), "{confirmed:?}");
    for disk in &disks {
        assert!(client.hand_files(41, disk).error.is_none());
    }
    client.wait_notice(|n| *n == Notice::Resumed);
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|n| *n == Notice::Reset);
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

/// A guest is slowed down and copied while it runs, and goes on elsewhere with a disk and a card.
fn a_guest_moves() {
    let mut first = sandboxed(source("q"));
    first.start().wait_console("bcd");
    let mut client = first.client();
    let there = tap();
    let nic = json!({"id": "lan", "mac": "52:54:00:00:00:01"});
    let (_keep, path) = elsewhere();
    let disk = DiskConfig { id: "data".into(), path, shared: true, ..DiskConfig::default() };
    client.plug_disk(disk.clone());
    client.wait_notice(|n| matches!(n, Notice::Plugged { .. }));
    let config = serde_json::from_value(nic.clone()).unwrap();
    client.ask_with(Call::PlugNic { config: Box::new(config) }, tap().as_fd());
    client.wait_notice(|n| matches!(n, Notice::Plugged { .. }));
    let live = LiveLimits { downtime_ms: 10, bytes_per_second: Some(4 << 20), timeout_ms: None };
    assert!(client.ask(Call::SaveAttach { migration: Some(9), live: Some(live) }).error.is_none());
    let mut saved = Vec::new();
    client.reader.read_to_end(&mut saved).unwrap();

    let mut second = sandboxed(target("q"));
    second
        .set("disks", json!([disk]))
        .set("nics", json!([nic]))
        .argue(&["--tap-fd", &format!("lan={}", there.as_raw_fd())]);
    second.set("release", json!("lease")).start();
    load(&second, &saved);
    let deadline_ns = Some(boottime_ns() + 10_000_000_000);
    let mut client = second.client();
    client.ask(Call::Run { epoch: 42, deadline_ns, started_marker: second.path("started-42") });
    assert!(client.hand_files(42, &disk).error.is_none());
    client.wait_notice(|n| *n == Notice::Resumed);
    // The announcements are over within a second, and the guest writes on meanwhile.
    wait_for("the guest to go on", || (second.console().len() > 3).then_some(()));
    client.ask(Call::PowerOff);
    assert_eq!(second.wait_exit().code(), Some(0));
}

/// What people and hostd do with a guest that stays where it is.
fn a_guest_is_looked_after() {
    let mut vm = sandboxed(TestVm::new("watchdog"));
    vm.set("watchdog", json!({"action": "inject_nmi"})).set("vcpus", json!(2)).start();
    let mut client = vm.client();
    let mut console = vm.client();
    console.ask(Call::ConsoleAttach);
    console.reader.get_mut().write_all(b"typed").unwrap();
    console.reader.read_exact(&mut [0; 3]).unwrap();
    vm.client().ask(Call::AgentAttach);
    client.ask(Call::BalloonSet { bytes: 32 << 20 });
    client.ask(Call::PowerButton);
    client.ask(Call::Pause);
    client.ask(Call::Resume);
    client.wait_notice(|n| *n == Notice::WatchdogExpired);
    // SAFETY: no pointer; the child is ours.
    unsafe { libc::kill(vm.pid() as i32, libc::SIGTERM) };
    assert_eq!(vm.wait_exit().code(), Some(0));
}

/// A guest that the processor gives up on.
fn a_guest_dies() {
    let mut vm = sandboxed(TestVm::new("?"));
    vm.start();
    wait_for("a reset or a report", || (vm.report().is_some() || vm.console().contains("up\nup\n")).then_some(()));
}

#[test]
fn guests_use_every_rule_with_tun() {
    if !flat_guests_run() {
        return;
    }
    let recorder = Recorder::install();
    let stories =
        [devices_come_and_go, a_lease_ends_and_is_renewed, a_guest_moves, a_guest_is_looked_after, a_guest_dies];
    let told = stories.map(std::thread::spawn);
    let told = told.map(std::thread::JoinHandle::join);
    let borrowed = recorder.borrowed();
    assert!(borrowed.is_empty(), "these belong into the tables of the roles\n{}", borrowed.join("\n"));
    let unused = recorder.unused();
    assert!(unused.is_empty(), "no guest uses these rules: take them out, or say why not\n{}", unused.join("\n"));
    assert!(told.iter().all(Result::is_ok), "a story has ended badly");
}
