//! What every guest has beside its disks and network cards, with the whole program and on whatever KVM this machine has. What the devices
//! do with a driver is told where they are.

mod support;

use serde_json::{Value, json};
use support::{TestClient, TestVm, flat_guests_run};
use vmm_control::balloon::BalloonCounters;
use vmm_control::protocol::PROTOCOL_VERSION;
use vmm_control::{Call, ErrorCode, Notice};

const MIB: u64 = 1 << 20;

#[test]
fn a_guest_finds_its_fixed_functions_and_a_watchdog_only_if_it_has_one() {
    if !flat_guests_run() {
        return;
    }
    for (watchdog, found) in [(Value::Null, "up\nnyyny"), (json!({}), "up\nyyyny")] {
        let mut vm = TestVm::new("x-ray");
        vm.set("watchdog", watchdog);
        assert_eq!(vm.start().wait_exit().code(), Some(0));
        assert_eq!(vm.console(), found);
    }
}

fn balloon(client: &mut TestClient) -> BalloonCounters {
    let metrics = client.ask(Call::Metrics).result.unwrap();
    assert_eq!(metrics["rng"]["errors"], json!(0));
    serde_json::from_value(metrics["balloon"].clone()).unwrap()
}

#[test]
fn a_balloons_target_is_bounded_and_outlives_a_reset() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    vm.set("memory_bytes", json!(128 * MIB)).start();
    let mut client = vm.client();
    vm.wait_console("up");
    assert_eq!(client.ask(Call::Hello).result.unwrap()["protocol"], json!(PROTOCOL_VERSION));
    assert_eq!(balloon(&mut client).target_bytes, 128 * MIB);
    assert!(client.ask(Call::BalloonSet { bytes: 100 * MIB }).error.is_none());
    for bytes in [0, 64 * MIB - 1, 128 * MIB + 1, u64::MAX] {
        assert_eq!(client.ask(Call::BalloonSet { bytes }).error.unwrap().code, ErrorCode::BadRequest);
    }
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|n| *n == Notice::Reset);
    support::wait_for("the next machine", || {
        let metrics = client.ask(Call::Metrics).result.unwrap();
        (metrics["balloon"]["target_bytes"] == json!(100 * MIB)).then_some(())
    });
    let counters = balloon(&mut client);
    // Nobody drives it.
    assert_eq!((counters.actual_bytes, counters.guest), (128 * MIB, None));
}
