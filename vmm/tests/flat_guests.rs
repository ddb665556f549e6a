//! The whole program with small guests, on whatever KVM this machine has. Linux guests run in the lab.

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use serde_json::json;
use support::{TestVm, flat_guests_run, wait_for};
use vmm::sys::boottime_ns;
use vmm_control::{Call, ErrorCode, ExitReason, Notice, PauseReason, RunState};

const SECOND_NS: u64 = 1_000_000_000;

#[test]
fn a_guest_runs_and_powers_off_and_its_epoch_is_used_up() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("off");
    assert_eq!(vm.start().wait_exit().code(), Some(0));
    let report = vm.report().unwrap();
    assert_eq!((report.reason, report.epoch, report.ran), (ExitReason::GuestPoweredOff, 41, true));
    assert_eq!(vm.console(), "up\n");
    assert!(!vm.path("control").exists());

    // The same permit again: refused, and how the guest ended is still known.
    assert_eq!(vm.start().wait_exit().code(), Some(i32::from(ExitReason::AlreadyStarted.exit_code())));
    assert_eq!(vm.report().unwrap().reason, ExitReason::GuestPoweredOff);
    // Without a report of this epoch the refusal is the report.
    std::fs::remove_file(vm.path("exit.json")).unwrap();
    vm.start().wait_exit();
    let report = vm.report().unwrap();
    assert_eq!((report.reason, report.ran), (ExitReason::AlreadyStarted, false));
    assert_eq!(vm.console(), "up\n");

    // A new permit: the guest runs again.
    let marker = vm.path("started-42");
    vm.set("epoch", json!(42)).set("started_marker", json!(marker));
    assert_eq!(vm.start().wait_exit().code(), Some(0));
    assert_eq!(vm.report().unwrap().epoch, 42);
}

#[test]
fn what_cannot_start_says_why() {
    let mut vm = TestVm::new("off");
    vm.set("kernel", json!("/nonexistent/vmlinuz"));
    assert_eq!(vm.start().wait_exit().code(), Some(i32::from(ExitReason::StartFailed.exit_code())));
    if flat_guests_run() {
        let report = vm.report().unwrap();
        assert!(report.detail.contains("/nonexistent/vmlinuz"), "{}", report.detail);
        assert!(!report.ran);
    }
    assert!(!vm.path("started-41").exists(), "the epoch was not used up");
}

#[test]
fn two_processes_never_run_one_vm() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    vm.client();
    let pid = vm.pid();
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["run", "--config"])
        .arg(vm.path("config.json"))
        .arg("--control")
        .arg(vm.path("control"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(i32::from(ExitReason::StartFailed.exit_code())));
    assert!(String::from_utf8_lossy(&second.stderr).contains("has a vmm already"));
    let hello = vm.client().ask(Call::Hello).result.unwrap();
    assert_eq!(hello["pid"], json!(pid));
}

#[test]
fn a_guest_pauses_and_resumes_on_request() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    let mut client = vm.client();
    vm.wait_console("...");
    assert!(client.status().boot_time_us.is_some());
    client.ask(Call::Pause);
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Requested });
    // What was printed before the pause may still be on its way to the log.
    let mut metrics = || client.ask(Call::Metrics).result.unwrap()["console_bytes"].as_u64().unwrap();
    let mut printed = metrics();
    wait_for("the guest to stand", || {
        let before = std::mem::replace(&mut printed, metrics());
        (before == printed).then_some(())
    });
    client.ask(Call::Resume);
    wait_for("the guest to go on", || {
        let now = client.ask(Call::Metrics).result.unwrap()["console_bytes"].as_u64().unwrap();
        (now > printed).then_some(())
    });
    client.ask(Call::PowerOff);
    client.wait_notice(|n| matches!(n, Notice::ShuttingDown { reason: ExitReason::PoweredOff }));
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(vm.report().unwrap().reason, ExitReason::PoweredOff);
}

#[test]
fn a_guest_stops_at_the_end_of_its_lease_and_goes_on_when_confirmed() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    let first = boottime_ns() + 3 * SECOND_NS;
    vm.set("release", json!("lease")).set("lease", json!({ "deadline_boottime_ns": first }));
    vm.start();
    let mut client = vm.client();
    // Its dots may take longer than the lease where others use the processors.
    vm.wait_console("up");

    let wrong_epoch = client.ask(Call::Confirm { epoch: 40, deadline_ns: first + SECOND_NS });
    assert_eq!(wrong_epoch.error.unwrap().code, ErrorCode::WrongEpoch);
    let too_far = client.ask(Call::Confirm { epoch: 41, deadline_ns: boottime_ns() + 60 * SECOND_NS });
    assert_eq!(too_far.error.unwrap().code, ErrorCode::BadDeadline);

    let paused = |quiesced| move |n: &Notice| *n == Notice::Paused { reason: PauseReason::LeaseExpired, quiesced };
    client.wait_notice(paused(false));
    assert!(boottime_ns() >= first);
    client.wait_notice(paused(true));
    let status = client.status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::LeaseExpired });
    assert!(status.quiesced);
    let passed = client.ask(Call::Confirm { epoch: 41, deadline_ns: first });
    assert_eq!(passed.error.unwrap().code, ErrorCode::BadDeadline);

    // A pause on request and the lease are two reasons: both must go.
    client.ask(Call::Pause);
    client.ask(Call::Confirm { epoch: 41, deadline_ns: boottime_ns() + 10 * SECOND_NS });
    client.wait_notice(|n| *n == Notice::Resumed);
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Requested });
    client.ask(Call::Resume);
    assert_eq!(client.status().run, RunState::Running);
    let before = vm.console().len();
    wait_for("the guest to go on", || (vm.console().len() > before).then_some(()));
}

#[test]
fn a_guest_without_a_lease_refuses_one() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    let reply = vm.client().ask(Call::Confirm { epoch: 41, deadline_ns: boottime_ns() + SECOND_NS });
    assert_eq!(reply.error.unwrap().code, ErrorCode::NoLease);
}

#[test]
fn a_guest_resets_within_its_process_under_the_same_epoch() {
    if !flat_guests_run() {
        return;
    }
    for behaviour in ["reset", "keyboard"] {
        let mut vm = TestVm::new(behaviour);
        vm.start();
        let pid = vm.pid();
        vm.wait_console("up\nup\nup\n");
        let mut client = vm.client();
        let hello = client.ask(Call::Hello).result.unwrap();
        assert_eq!((&hello["pid"], &hello["epoch"]), (&json!(pid), &json!(41)));
        assert!(client.status().resets >= 2);
        client.ask(Call::PowerOff);
        assert_eq!(vm.wait_exit().code(), Some(0));
        assert_eq!(vm.report().unwrap().reason, ExitReason::PoweredOff);
    }
}

#[test]
fn a_repeated_reset_resets_once() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    let mut client = vm.client();
    vm.wait_console("up\n.");
    client.ask(Call::Reset { id: 7 });
    client.wait_notice(|n| *n == Notice::Reset);
    client.ask(Call::Reset { id: 7 });
    wait_for("the guest to start again", || (vm.console().matches("up").count() == 2).then_some(()));
    client.ask(Call::Reset { id: 8 });
    client.wait_notice(|n| *n == Notice::Reset);
    assert_eq!(client.status().resets, 2);
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("button");
    vm.start();
    vm.wait_console("up");
    vm.client().ask(Call::PowerButton);
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(vm.report().unwrap().reason, ExitReason::GuestPoweredOff);
}

#[test]
fn sigterm_powers_the_guest_off() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    vm.wait_console("up");
    let pid = rustix::process::Pid::from_raw(vm.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(vm.report().unwrap().reason, ExitReason::PoweredOff);
}

#[test]
fn a_guest_that_dies_resets_and_one_that_the_host_cannot_run_is_reported() {
    if !flat_guests_run() {
        return;
    }
    // `ud2` without an interrupt table is a triple fault on a processor. A KVM that cannot carry it out reports a fault.
    let mut vm = TestVm::new("?");
    vm.start();
    let mut client = vm.client();
    let reset = wait_for("a reset or a report", || {
        vm.report().map(|_| false).or_else(|| vm.console().contains("up\nup\n").then_some(true))
    });
    if reset {
        assert!(client.status().resets > 0);
    } else {
        let report = vm.report().unwrap();
        assert_eq!(report.reason, ExitReason::GuestFault);
        assert!(report.detail.contains("rip="), "{}", report.detail);
    }
}

#[test]
fn the_console_is_a_byte_stream_both_ways() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    vm.wait_console("up\n...");
    let mut client = vm.client();
    assert!(client.ask(Call::ConsoleAttach).error.is_none());
    let mut seen = [0; 6];
    client.reader.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"up\n...", "what was printed before comes first");
    client.reader.get_mut().write_all(b"typed").unwrap();
    client.reader.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"......");
}

#[test]
fn the_control_socket_is_ours_alone_and_survives_nonsense() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    let mut client = vm.client();
    let mode = std::fs::metadata(vm.path("control")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    client.send_line(b"\x00\xff nonsense\n");
    assert_eq!(client.next_reply().error.unwrap().code, ErrorCode::BadRequest);
    client.send_line(b"{\"id\":77,\"method\":\"explode\"}\n");
    let refused = client.next_reply();
    assert_eq!((refused.id, refused.error.unwrap().code), (77, ErrorCode::BadRequest));

    // A line without end costs the connection, not the guest.
    let mut endless = vm.client();
    let chunk = [b'x'; 8192];
    wait_for("the connection to be cut", || endless.reader.get_mut().write_all(&chunk).is_err().then_some(()));
    assert_eq!(client.status().run, RunState::Running);

    // More clients than there is room for: the first are served, the others cut off.
    let mut others: Vec<_> = (0..20).map(|_| vm.client()).collect();
    assert_eq!(client.status().run, RunState::Running);
    others.truncate(3);
    for other in &mut others {
        assert_eq!(other.status().run, RunState::Running);
    }
}

#[test]
fn the_agents_port_has_one_client_at_a_time() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.start();
    let mut first = vm.client();
    assert!(!first.status().agent_open, "this guest has no driver");
    assert!(first.ask(Call::AgentAttach).error.is_none());
    let mut second = vm.client();
    let refused = second.ask(Call::AgentAttach).error.unwrap();
    assert_eq!(refused.code, ErrorCode::Taken, "{refused}");
    // The connection of the one who was refused still speaks the line protocol.
    assert_eq!(second.status().run, RunState::Running);
    drop(first);
    wait_for("the first to be gone", || second.ask(Call::AgentAttach).error.is_none().then_some(()));
}
