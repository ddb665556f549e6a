//! Guests that are saved with their devices and go on with them elsewhere: what was plugged, asked for, counted, told and reported. On
//! whatever KVM this machine has.

mod support;

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use support::moving::{load, refuse, run, save, source, target};
use support::tap::tap;
use support::{TestClient, TestVm, flat_guests_run, plug_guest, wait_for};
use vmm_control::balloon::BalloonCounters;
use vmm_control::slots::LAST_SLOT;
use vmm_control::{Call, DeviceState, DiskConfig, ErrorCode, Notice, PanicKind};

const MIB: u64 = 1 << 20;

/// A disk that both ends have open.
fn image(vm: &TestVm, content: &str) -> PathBuf {
    let path = vm.path("data");
    std::fs::write(&path, format!("{content:<4096}")).unwrap();
    path
}

fn plug(client: &mut TestClient, path: &Path) {
    let config = DiskConfig { id: "data".into(), path: path.to_owned(), read_only: true, ..DiskConfig::default() };
    let reply = client.ask(Call::PlugDisk { config: Box::new(config) });
    assert!(reply.error.is_none(), "{reply:?}");
    client.wait_notice(|notice| matches!(notice, Notice::Plugged { id, slot: 1, .. } if id == "data"));
}

fn unplug(force: bool) -> Call {
    Call::Unplug { id: "data".into(), force }
}

fn with_disk(vm: &mut TestVm, path: &Path, slot: u8) {
    vm.set("disks", json!([{"id": "data", "path": path, "read_only": true, "slot": slot}]));
}

#[test]
fn a_disk_that_was_plugged_goes_along_and_its_slot_has_to_be_there() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    let disk = image(&first, "");
    first.start();
    first.wait_console("xyz");
    plug(&mut first.client(), &disk);
    let saved = save(&first);
    let words = "device in slot 1 is a read-only disk of 4096 bytes with the serial \"\", here it is none";
    refuse(&mut target("m"), &saved, words);
    let mut elsewhere = target("m");
    with_disk(&mut elsewhere, &disk, 2);
    refuse(&mut elsewhere, &saved, words);
    let mut watched = target("m");
    with_disk(&mut watched, &disk, 1);
    refuse(watched.set("watchdog", json!({})), &saved, "watchdog is false, here it is true");

    let mut second = target("m");
    with_disk(&mut second, &disk, 1);
    second.start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    let devices = client.status().devices;
    assert_eq!((devices.len(), devices[0].slot, devices[0].state), (1, 1, DeviceState::Present));
    // It goes as one that was there from the start.
    client.ask(unplug(true));
    client.wait_notice(|notice| *notice == Notice::Unplugged { id: "data".into() });
    let saved = save(&second);
    let mut has_it_still = target("m");
    with_disk(&mut has_it_still, &disk, 1);
    refuse(&mut has_it_still, &saved, "device in slot 1 is none, here it is a read-only disk");
    let mut third = target("m");
    third.start();
    load(&third, &saved);
    run(&third, 43);
    wait_for("the guest to go on", || (third.console().len() > 30).then_some(()));
    assert!(!third.console().contains('!'));
}

#[test]
fn a_guest_that_was_asked_for_a_disk_gives_it_up_where_it_goes() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("plug");
    std::fs::write(first.path("kernel"), plug_guest::elf()).unwrap();
    let disk = image(&first, "sector-1");
    first.start();
    first.wait_console("up\n");
    let mut client = first.client();
    plug(&mut client, &disk);
    first.wait_console("sector-1\n");
    // So that it cannot answer here.
    client.ask(Call::Pause);
    client.ask(unplug(false));
    let saved = save(&first);
    assert_eq!(client.status().devices[0].state, DeviceState::Unplugging);
    assert!(!first.console().contains("gone"));

    let mut second = target("plug");
    std::fs::write(second.path("kernel"), plug_guest::elf()).unwrap();
    with_disk(&mut second, &disk, 1);
    second.start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    client.wait_notice(|notice| *notice == Notice::Unplugged { id: "data".into() });
    second.wait_console("gone");
    assert!(client.status().devices.is_empty());
    // And what it has given up is not saved.
    let saved = save(&second);
    let mut third = target("plug");
    std::fs::write(third.path("kernel"), plug_guest::elf()).unwrap();
    third.start();
    load(&third, &saved);
    let mut client = run(&third, 43);
    std::fs::write(&disk, format!("{:<4096}", "sector-3")).unwrap();
    plug(&mut client, &disk);
    third.wait_console("sector-3");
}

#[test]
fn a_disk_that_works_goes_on_working() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("plug");
    std::fs::write(first.path("kernel"), plug_guest::elf()).unwrap();
    let disk = image(&first, "sector-1");
    first.start();
    first.wait_console("up\n");
    plug(&mut first.client(), &disk);
    first.wait_console("sector-1\n");
    let saved = save(&first);
    let mut second = target("plug");
    std::fs::write(second.path("kernel"), plug_guest::elf()).unwrap();
    with_disk(&mut second, &disk, 1);
    second.start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    client.ask(unplug(false));
    client.wait_notice(|notice| *notice == Notice::Unplugged { id: "data".into() });
    second.wait_console("gone");
}

#[test]
fn a_card_goes_along_with_its_cable_with_tun() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    first.start();
    first.wait_console("xyz");
    let mut client = first.client();
    let nic = json!({"id": "lan", "mac": "52:54:00:00:00:01"});
    let config = serde_json::from_value(nic.clone()).unwrap();
    client.ask_with(Call::PlugNic { config: Box::new(config) }, tap().as_fd());
    client.wait_notice(|notice| matches!(notice, Notice::Plugged { id, .. } if id == "lan"));
    client.ask(Call::SetLink { nic: "lan".into(), up: false });
    let saved = save(&first);
    refuse(&mut target("m"), &saved, &format!("device in slot {LAST_SLOT} is a network card 52:54:00:00:00:01"));

    let there = tap();
    let mut second = target("m");
    second.set("nics", json!([nic])).argue(&["--tap-fd", &format!("lan={}", there.as_raw_fd())]).start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    assert_eq!(client.status().devices[0].link_up, Some(false));
    client.ask(Call::SetLink { nic: "lan".into(), up: true });
    assert_eq!(client.status().devices[0].link_up, Some(true));
}

#[test]
fn a_watchdog_waits_for_a_guest_that_is_saved_and_goes_on_with_it() {
    if !flat_guests_run() {
        return;
    }
    let watched = |vm: &mut TestVm| {
        vm.set("watchdog", json!({"action": "none"})).start();
    };
    let mut first = source("watchdog");
    watched(&mut first);
    first.wait_console("up\n.");
    let saved = save(&first);
    let mut client = first.client();
    assert_eq!(client.status().watchdog_expired, 0, "this machine is too slow for the test: two seconds have passed");
    let mut second = target("watchdog");
    watched(&mut second);
    load(&second, &saved);
    // Longer than the watchdog, which stands here and there.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert_eq!((client.status().watchdog_expired, second.client().status().watchdog_expired), (0, 0));
        std::thread::sleep(Duration::from_millis(50));
    }
    run(&second, 42).wait_notice(|notice| *notice == Notice::WatchdogExpired);
    assert_eq!(client.status().watchdog_expired, 0);
    client.ask(Call::Resume);
    client.wait_notice(|notice| *notice == Notice::WatchdogExpired);
}

#[test]
fn a_panic_is_known_where_the_guest_goes_and_not_told_again() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("panic");
    first.start();
    first.wait_console("up\n...");
    let saved = save(&first);
    let mut second = target("panic");
    // What was done about it was done.
    second.set("on_panic", json!("power_off")).start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    second.wait_console("...");
    let status = client.status();
    assert_eq!((status.panic, status.panics), (Some(PanicKind::Panicked), 0));
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|notice| *notice == Notice::GuestPanicked { kind: PanicKind::Panicked });
}

/// One whose first byte in memory is this letter: a GUID's first field is little endian there.
fn generation(letter: u8) -> serde_json::Value {
    json!(format!("000000{letter:02x}-0000-4000-8000-000000000001"))
}

#[test]
fn a_guest_that_was_taken_back_is_told_and_one_that_was_migrated_is_not() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("generation");
    first.set("generation", generation(b'A')).start();
    first.wait_console("up\nA...");
    let saved = save(&first);
    let letters = |vm: &TestVm| vm.console().replace(['.', '\n', 'u', 'p'], "");

    let mut migrated = target("generation");
    migrated.set("generation", generation(b'A')).start();
    load(&migrated, &saved);
    run(&migrated, 42);
    let mut taken_back = target("generation");
    taken_back.set("generation", generation(b'B')).start();
    load(&taken_back, &saved);
    let mut client = run(&taken_back, 43);
    taken_back.wait_console("B...");
    migrated.wait_console("...............");
    assert_eq!((letters(&migrated), letters(&taken_back)), (String::new(), "B".to_owned()));

    // It has it from then on: where it goes next it is told of none, and a reset begins with it.
    let saved = save(&taken_back);
    let mut next = target("generation");
    next.set("generation", generation(b'B')).start();
    load(&next, &saved);
    run(&next, 44);
    next.wait_console("...............");
    assert_eq!(letters(&next), "");
    client.ask(Call::Resume);
    client.ask(Call::Reset { id: 1 });
    taken_back.wait_console("up\nB");
}

#[test]
fn a_balloons_target_goes_along() {
    if !flat_guests_run() {
        return;
    }
    let target_bytes = |client: &mut TestClient| {
        let metrics = client.ask(Call::Metrics).result.unwrap();
        serde_json::from_value(metrics["balloon"].clone()).ok().map(|balloon: BalloonCounters| balloon.target_bytes)
    };
    let mut first = source("m");
    first.set("memory_bytes", json!(128 * MIB)).start();
    first.wait_console("xyz");
    let mut client = first.client();
    assert!(client.ask(Call::BalloonSet { bytes: 80 * MIB }).error.is_none());
    let saved = save(&first);
    assert_eq!(client.ask(Call::BalloonSet { bytes: 90 * MIB }).error.unwrap().code, ErrorCode::NotNow);
    let mut second = target("m");
    second.set("memory_bytes", json!(128 * MIB)).start();
    assert_eq!(second.client().ask(Call::BalloonSet { bytes: 90 * MIB }).error.unwrap().code, ErrorCode::NotNow);
    load(&second, &saved);
    let mut client = run(&second, 42);
    assert_eq!(target_bytes(&mut client), Some(80 * MIB));
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|notice| *notice == Notice::Reset);
    let after = wait_for("the next machine", || target_bytes(&mut client));
    assert_eq!(after, 80 * MIB, "it stays through a reset");
}

#[test]
fn nothing_is_plugged_into_a_guest_that_is_saved_or_not_here_yet() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    let disk = image(&first, "");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);
    let mut second = target("m");
    second.start();
    for vm in [&first, &second] {
        let mut client = vm.client();
        let config = DiskConfig { id: "data".into(), path: disk.clone(), read_only: true, ..DiskConfig::default() };
        let refused = client.ask(Call::PlugDisk { config: Box::new(config) }).error.unwrap();
        assert_eq!(refused.code, ErrorCode::NotNow, "{refused}");
        assert_eq!(client.ask(unplug(false)).error.unwrap().code, ErrorCode::NotNow);
    }
    load(&second, &saved);
    plug(&mut run(&second, 42), &disk);
    let mut client = first.client();
    client.ask(Call::Resume);
    plug(&mut client, &disk);
}
