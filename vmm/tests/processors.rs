//! Processors and huge pages as the configuration asks for them, with small guests on whatever KVM this machine has.

mod support;

use std::io::Read;
use std::process::Command;

use serde_json::json;
use support::moving::{hand_over, load, run, save, source, target};
use support::{TestVm, flat_guests_run, wait_for};
use vmm_control::{Call, CpuModel, ErrorCode, ExitReason, HostProcessor, LiveLimits};

/// What `vmm processor` says. `None` where there is no KVM.
fn this_host() -> Option<HostProcessor> {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm")).arg("processor").output().unwrap();
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.starts_with("vmm: ") && output.stdout.is_empty(), "{words}");
        eprintln!("skipped: {words}");
        return None;
    }
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_host_tells_the_cluster_what_it_offers() {
    let Some(host) = this_host() else { return };
    assert_eq!(host.models[0], CpuModel::Host);
    assert!(host.models.is_sorted() && !host.vendor.is_empty() && host.tsc_khz > 0, "{host:?}");
    for named in CpuModel::NAMED {
        assert_ne!(host.models.contains(&named), host.missing.contains_key(&named), "{host:?}");
    }
    assert!(host.missing.values().all(|missing| !missing.is_empty()));
    // Asked again it is the same host.
    assert_eq!(this_host().unwrap().fingerprint, host.fingerprint);
}

#[test]
fn a_guest_has_the_model_that_it_asks_for_or_is_refused_by_what_is_missing() {
    if !flat_guests_run() {
        return;
    }
    let Some(host) = this_host() else { return };
    for model in CpuModel::NAMED {
        let mut vm = TestVm::new("off");
        vm.set("cpu", json!({"model": model, "sockets": 1, "cores": 1, "threads": 1})).start();
        let code = vm.wait_exit().code();
        let report = vm.report().unwrap();
        match host.missing.get(&model) {
            None => assert_eq!((code, vm.console().as_str()), (Some(0), "up\n")),
            Some(missing) => {
                assert_eq!(code, Some(i32::from(ExitReason::StartFailed.exit_code())));
                assert!(report.detail.contains(model.as_str()), "{}", report.detail);
                assert!(report.detail.contains(&missing.join(", ")), "{}", report.detail);
                assert_eq!((report.ran, vm.console()), (false, String::new()));
                assert!(!vm.path("started-41").exists(), "the epoch was not used up");
            }
        }
    }
}

#[test]
fn a_second_processor_starts_by_the_id_of_its_place() {
    if !flat_guests_run() {
        return;
    }
    // Two sockets of three cores: the ids are 0, 1, 2, 4, 5, 6.
    let mut vm = TestVm::new("26");
    vm.set("vcpus", json!(6)).set("cpu", json!({"sockets": 2, "cores": 3, "threads": 1})).start();
    let mut client = vm.client();
    wait_for("the second processor", || vm.console().contains(|c: char| c.is_ascii_digit()).then_some(()));
    assert!(!vm.console().contains('!'), "{}", vm.console());
    assert_eq!(client.status().vcpus, 6);
    client.ask(Call::PowerOff);
    vm.wait_exit();
}

#[test]
fn a_guest_moves_with_its_places_and_only_to_the_same() {
    if !flat_guests_run() {
        return;
    }
    let places = json!({"sockets": 2, "cores": 3, "threads": 1});
    let mut first = source("26");
    first.set("vcpus", json!(6)).set("cpu", places.clone()).start();
    wait_for("both to count", || {
        let text = first.console();
        (text.contains('z') && text.contains('9')).then_some(())
    });
    let saved = save(&first);
    let mut other = target("26");
    other.set("vcpus", json!(6)).set("cpu", json!({"sockets": 3, "cores": 2, "threads": 1})).start();
    let answers = hand_over(&other, &saved);
    assert_eq!(answers.len(), 1, "refused before memory moves: {answers:?}");
    assert!(answers[0].1.contains("number of sockets is 2, here it is 3"), "{answers:?}");

    let mut second = target("26");
    second.set("vcpus", json!(6)).set("cpu", places).start();
    load(&second, &saved);
    run(&second, 42);
    wait_for("both to go on", || {
        let text = second.console();
        (text.contains('z') && text.contains('9')).then_some(())
    });
    assert!(!first.console().contains('!') && !second.console().contains('!'), "{}", second.console());
}

/// A guest in huge pages, or the words on why there are none. Others may have them.
fn in_huge_pages(mut vm: TestVm) -> Option<TestVm> {
    vm.set("huge_pages", json!("mib2")).start();
    let runs = wait_for("a start or a report", || {
        vm.report().map(|_| false).or_else(|| vm.console().contains("up").then_some(true))
    });
    if runs {
        return Some(vm);
    }
    assert_eq!(vm.wait_exit().code(), Some(i32::from(ExitReason::StartFailed.exit_code())));
    let report = vm.report().unwrap();
    assert!(report.detail.contains("huge pages of 2 MiB") && !report.ran, "{}", report.detail);
    assert!(!vm.path("started-41").exists(), "the epoch was not used up");
    eprintln!("skipped: {}", report.detail);
    None
}

#[test]
fn a_guest_is_in_huge_pages_for_all_of_its_lives_or_does_not_start() {
    if !flat_guests_run() {
        return;
    }
    let Some(mut vm) = in_huge_pages(TestVm::new("counter")) else { return };
    let mut client = vm.client();
    let refused = client.ask(Call::BalloonSet { bytes: 31 << 20 }).error.unwrap();
    assert_eq!(refused.code, ErrorCode::BadRequest, "{refused}");
    // They stay the guest's: nobody has them between two machines.
    for id in 1..=3 {
        assert!(client.ask(Call::Reset { id }).error.is_none());
        let lives = id as usize + 1;
        wait_for("the next life", || (vm.console().matches("up\n").count() == lives).then_some(()));
    }
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn a_guest_moves_out_of_huge_pages_while_it_runs() {
    if !flat_guests_run() {
        return;
    }
    let Some(first) = in_huge_pages(source("m")) else { return };
    first.wait_console("xyz");
    let mut client = first.client();
    assert!(client.ask(Call::SaveAttach { migration: None, live: Some(LiveLimits::default()) }).error.is_none());
    let mut saved = Vec::new();
    client.reader.read_to_end(&mut saved).unwrap();
    let mut second = target("m");
    second.start();
    load(&second, &saved);
    run(&second, 42);
    second.wait_console("xyz");
    assert!(!first.console().contains('!') && !second.console().contains('!'), "{}", second.console());
}
