//! The whole program with network cards: how their taps are handed over, and what is said when that goes wrong. What the cards do
//! with frames is told in `devices::net`, on taps of the kernel too.

mod support;

use std::os::fd::AsRawFd;

use serde_json::json;
use support::tap::{inherited, tap};
use support::{TestVm, flat_guests_run, wait_for};
use vmm_control::{Call, ExitReason};

fn vm(behaviour: &str, nics: &[&str]) -> TestVm {
    let nics: Vec<_> =
        (1..).zip(nics).map(|(i, id)| json!({"id": id, "mac": format!("52:54:00:00:00:0{i}")})).collect();
    let mut vm = TestVm::new(behaviour);
    vm.set("nics", json!(nics));
    vm
}

/// What the report says of a vmm that does not start, whose epoch is not used up.
fn refusal(vm: &mut TestVm) -> String {
    assert_eq!(vm.start().wait_exit().code(), Some(i32::from(ExitReason::StartFailed.exit_code())));
    let report = vm.report().unwrap();
    assert_eq!((report.reason, report.ran), (ExitReason::StartFailed, false));
    assert!(!vm.path("started-41").exists(), "the epoch was used up");
    report.detail
}

#[test]
fn a_card_without_a_tap_does_not_start() {
    let detail = refusal(&mut vm("off", &["lan"]));
    assert!(detail.contains("network card lan") && detail.contains("--tap-fd lan=FD"), "{detail}");
}

#[test]
fn a_descriptor_that_is_no_tap_is_refused() {
    let file = inherited(tempfile::tempfile().unwrap().into()).unwrap();
    let detail = refusal(vm("off", &["lan"]).argue(&["--tap-fd", &format!("lan={}", file.as_raw_fd())]));
    assert!(detail.contains("not attached to a tap"), "{detail}");
    let detail = refusal(vm("off", &["lan"]).argue(&["--tap-fd", "lan=999"]));
    assert!(detail.contains("lan=999") && detail.contains("not open"), "{detail}");
}

#[test]
fn a_tap_for_a_card_that_is_not_there_is_refused() {
    let detail = refusal(vm("off", &["lan"]).argue(&["--tap-fd", "lan=900", "--tap-fd", "dmz=901"]));
    assert!(detail.contains("no network card dmz"), "{detail}");
}

#[test]
fn an_argument_of_another_form_is_explained() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["run", "--config", "/nonexistent", "--control", "/nonexistent", "--tap-fd", "lan"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("ID=FD"), "{text}");
}

#[test]
fn a_real_tap_is_taken_with_tun() {
    let tap = tap();
    let mut vm = vm("reset", &["lan"]);
    vm.argue(&["--tap-fd", &format!("lan={}", tap.as_raw_fd())]);
    if !flat_guests_run() {
        // As far as this machine goes: the next thing that is wrong is KVM.
        let detail = refusal(&mut vm);
        assert!(!detail.contains("tap"), "{detail}");
        return;
    }
    // The machine after a reset has the tap of the one before.
    vm.start().wait_console("up\nup\nup\n");
    let mut client = vm.client();
    let counters = wait_for("a machine", || {
        let metrics = client.ask(Call::Metrics).result.unwrap();
        metrics["nics"]["lan"].as_object().cloned()
    });
    assert_eq!(counters["tx_frames"], json!(0));
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}
