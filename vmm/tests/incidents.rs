//! Guests that panic or hang, with the whole program and on whatever KVM this machine has.

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::{TestVm, flat_guests_run, wait_for};
use vmm::incident::NmiSink;
use vmm::machine::kvm::{self, KvmVm};
use vmm::machine::layout::Layout;
use vmm::memory;
use vmm_control::{Call, ExitReason, Notice, PanicKind, PauseReason, RunState};

const PANICKED: Notice = Notice::GuestPanicked { kind: PanicKind::Panicked };

#[test]
fn a_panic_is_reported_and_the_guest_goes_on() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("panic");
    vm.start();
    let mut client = vm.client();
    vm.wait_console("up\n...");
    let status = client.status();
    assert_eq!((status.run, status.panic, status.panics), (RunState::Running, Some(PanicKind::Panicked), 1));
    // The reset button ends it, and the next life panics on its own account.
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|n| *n == PANICKED);
    client.wait_notice(|n| *n == Notice::Reset);
    client.wait_notice(|n| *n == PANICKED);
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
    let report = vm.report().unwrap();
    assert_eq!((report.reason, report.panics), (ExitReason::PoweredOff, 2));
}

#[test]
fn a_panic_ends_resets_or_pauses_a_guest_as_configured() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("panic");
    vm.set("on_panic", json!("power_off"));
    assert_eq!(vm.start().wait_exit().code(), Some(i32::from(ExitReason::GuestPanicked.exit_code())));
    let report = vm.report().unwrap();
    assert_eq!((report.reason, report.panics, report.ran), (ExitReason::GuestPanicked, 1, true));

    let mut vm = TestVm::new("panic");
    vm.set("on_panic", json!("reset")).start();
    let mut client = vm.client();
    wait_for("two lives", || (client.status().panics >= 2).then_some(()));
    assert!(client.status().resets >= 1);

    let mut vm = TestVm::new("panic");
    vm.set("on_panic", json!("pause")).start();
    let mut client = vm.client();
    let paused = RunState::Paused { reason: PauseReason::GuestPanicked };
    wait_for("the pause", || (client.status().run == paused).then_some(()));
    client.ask(Call::Resume);
    assert_eq!(client.status().run, RunState::Running);
    vm.wait_console("up\n...");
}

fn watched(action: &str) -> TestVm {
    let mut vm = TestVm::new("watchdog");
    vm.set("watchdog", json!({ "action": action }));
    vm
}

#[test]
fn a_guest_that_hangs_is_reset_and_one_without_a_watchdog_is_not() {
    if !flat_guests_run() {
        return;
    }
    let mut unwatched = TestVm::new("watchdog");
    unwatched.start();
    let mut vm = watched("reset");
    vm.start();
    let mut client = vm.client();
    client.wait_notice(|n| *n == Notice::WatchdogExpired);
    client.wait_notice(|n| *n == Notice::Reset);
    vm.wait_console("up\n");
    client.wait_notice(|n| *n == Notice::WatchdogExpired);
    assert!(client.status().watchdog_expired >= 2);
    // It has printed dots for as long.
    let status = unwatched.client().status();
    assert_eq!((status.resets, status.watchdog_expired), (0, 0));
}

#[test]
fn a_guest_that_hangs_is_ended_as_configured() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = watched("power_off");
    assert_eq!(vm.start().wait_exit().code(), Some(i32::from(ExitReason::WatchdogExpired.exit_code())));
    assert_eq!(vm.report().unwrap().reason, ExitReason::WatchdogExpired);
}

/// What a guest does with one differs between processors and the KVM of this machine; that it comes does not.
#[test]
fn the_watchdogs_interrupt_reaches_every_vcpu() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = watched("inject_nmi");
    vm.start();
    vm.client().wait_notice(|n| *n == Notice::WatchdogExpired);
    assert!(!vm.log().contains("does not reach"), "{}", vm.log());

    let kvm = kvm::open().unwrap();
    let memory = memory::allocate(&Layout::new(16 << 20, 16 << 20), None).unwrap();
    let machine = KvmVm::new(&kvm, &memory).unwrap();
    let vcpus = [machine.create_vcpu(0).unwrap(), machine.create_vcpu(1).unwrap()];
    let pending = || vcpus.each_ref().map(|vcpu| vcpu.get_vcpu_events().unwrap().nmi.pending);
    assert_eq!(pending(), [0, 0]);
    machine.inject().unwrap();
    assert_eq!(pending(), [1, 1]);
}

#[test]
fn a_watchdog_waits_with_its_guest() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = watched("pause");
    vm.start();
    let mut client = vm.client();
    // It starts its watchdog right after it has said so.
    vm.wait_console("up\n");
    client.ask(Call::Pause);
    // Longer than the watchdog.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert_eq!(client.status().watchdog_expired, 0);
        std::thread::sleep(Duration::from_millis(50));
    }
    client.ask(Call::Resume);
    client.wait_notice(|n| *n == Notice::WatchdogExpired);
    client.wait_notice(|n| matches!(n, Notice::Paused { reason: PauseReason::Watchdog, .. }));
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Watchdog });
}
