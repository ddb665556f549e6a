//! The whole program with devices that come and go, on whatever KVM this machine has. What guests, storage and hostd can do wrong is told
//! in `machine::plug_tests` and `pci::plug_tests`.

mod support;

use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;
use support::tap::tap;
use support::{TestVm, flat_guests_run, plug_guest, wait_for};
use vmm_control::{Call, DeviceState, DeviceStatus, DiskConfig, ErrorCode, Notice};

fn plug_disk(path: &Path) -> Call {
    let config = DiskConfig { id: "data".into(), path: path.to_owned(), read_only: true, ..DiskConfig::default() };
    Call::PlugDisk { config: Box::new(config) }
}

fn unplug(id: &str, force: bool) -> Call {
    Call::Unplug { id: id.into(), force }
}

fn plug_nic(id: &str) -> Call {
    let config = serde_json::from_value(json!({"id": id, "mac": "52:54:00:00:00:01"})).unwrap();
    Call::PlugNic { config: Box::new(config) }
}

/// Whether the vmm has the file open.
fn is_open(vm: &TestVm, path: &Path) -> bool {
    let open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
    open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path))
}

#[test]
fn a_guest_finds_a_disk_that_is_plugged_reads_it_and_gives_it_back() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("plug");
    std::fs::write(vm.path("kernel"), plug_guest::elf()).unwrap();
    let disk = vm.path("data");
    vm.start();
    vm.wait_console("up\n");
    let mut client = vm.client();
    for content in ["sector-1", "sector-2"] {
        std::fs::write(&disk, format!("{content:<4096}")).unwrap();
        let reply = client.ask(plug_disk(&disk));
        let asked: DeviceStatus = serde_json::from_value(reply.result.unwrap()).unwrap();
        assert_eq!((asked.slot, asked.address.as_str()), (1, "02:00.0"));
        client.wait_notice(|n| matches!(n, Notice::Plugged { id, slot: 1, .. } if id == "data"));
        assert_eq!(client.status().devices[0].state, DeviceState::Present);
        vm.wait_console(content);
        let read = client.ask(Call::Metrics).result.unwrap()["disks"]["data"]["reads"].as_u64();
        assert_eq!(read, Some(1));

        client.ask(unplug("data", false));
        client.wait_notice(|n| *n == Notice::Unplugged { id: "data".into() });
        assert!(client.status().devices.is_empty() && !is_open(&vm, &disk));
        wait_for("the guest to see it go", || {
            let console = vm.console();
            console.rsplit_once(content).is_some_and(|(_, after)| after.contains("gone")).then_some(())
        });
    }
    assert_eq!(client.ask(unplug("data", false)).error.unwrap().code, ErrorCode::NotFound);
}

#[test]
fn a_guest_without_a_driver_loses_its_disk_by_force_or_by_a_reset() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = TestVm::new("counter");
    let disk = vm.path("data");
    std::fs::write(&disk, [0; 4096]).unwrap();
    vm.set("disks", json!([{"id": "boot", "path": disk, "read_only": true}]));
    vm.start();
    vm.wait_console("up\n.");
    let mut client = vm.client();
    client.ask(plug_disk(&disk));
    client.wait_notice(|n| matches!(n, Notice::Plugged { slot: 2, .. }));
    // The guest has not even powered its slot on: there is nobody to ask.
    client.ask(unplug("data", false));
    client.wait_notice(|n| *n == Notice::Unplugged { id: "data".into() });
    // This one had power from the start.
    client.ask(unplug("boot", false));
    assert_eq!(client.status().devices[0].state, DeviceState::Unplugging, "and the guest goes on");
    client.ask(unplug("boot", true));
    client.wait_notice(|n| *n == Notice::Unplugged { id: "boot".into() });

    let slot_2 = DiskConfig { id: "data".into(), path: disk.clone(), slot: Some(2), ..DiskConfig::default() };
    client.ask(Call::PlugDisk { config: Box::new(slot_2) });
    client.wait_notice(|n| matches!(n, Notice::Plugged { slot: 2, .. }));
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|n| *n == Notice::Reset);
    let devices = client.status().devices;
    assert_eq!((devices.len(), devices[0].id.as_str(), devices[0].slot), (1, "data", 2));
    wait_for("the guest to start again", || (vm.console().matches("up").count() == 2).then_some(()));
    client.ask(unplug("data", false));
    assert_eq!(client.status().devices[0].state, DeviceState::Unplugging);
    client.ask(Call::Reset { id: 2 });
    client.wait_notice(|n| *n == Notice::Unplugged { id: "data".into() });
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn a_card_is_plugged_with_its_tap_with_tun() {
    if !flat_guests_run() {
        return;
    }
    let (tap, second) = (tap(), std::fs::File::open("/dev/null").unwrap());
    let mut vm = TestVm::new("counter");
    vm.start();
    vm.wait_console("up\n.");
    let mut client = vm.client();
    let without = client.ask(plug_nic("lan")).error.unwrap();
    assert_eq!(without.code, ErrorCode::BadRequest, "{without}");
    client.ask_with(plug_nic("lan"), second.as_fd());
    client
        .wait_notice(|n| matches!(n, Notice::PlugFailed { message, .. } if message.contains("not attached to a tap")));

    let taps = || {
        let open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        open.flatten().filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("net/tun"))).count()
    };
    // The test's own is inherited.
    let before = taps();
    let reply = client.ask_with(plug_nic("lan"), tap.as_fd());
    let asked: DeviceStatus = serde_json::from_value(reply.result.unwrap()).unwrap();
    assert_eq!(asked.slot, vmm_control::slots::LAST_SLOT);
    client.wait_notice(|n| matches!(n, Notice::Plugged { id, .. } if id == "lan"));
    let held = taps();
    let again = client.ask_with(plug_nic("lan"), tap.as_fd());
    assert_eq!(again.result.unwrap()["state"], json!("present"));
    // A descriptor that nobody asked for.
    client.ask_with(Call::Hello, tap.as_fd());
    assert_eq!(taps(), held, "closed");

    let link = |client: &mut support::TestClient| client.status().devices[0].link_up;
    assert_eq!(link(&mut client), Some(true));
    client.ask(Call::SetLink { nic: "lan".into(), up: false });
    assert_eq!(link(&mut client), Some(false));
    // The next machine has the card, on the same tap and with the cable out.
    client.ask(Call::Reset { id: 1 });
    client.wait_notice(|n| *n == Notice::Reset);
    wait_for("the next machine", || {
        let metrics = client.ask(Call::Metrics).result.unwrap();
        metrics["nics"]["lan"].is_object().then_some(())
    });
    assert_eq!(link(&mut client), Some(false));
    client.ask(unplug("lan", true));
    client.wait_notice(|n| *n == Notice::Unplugged { id: "lan".into() });
    assert_eq!(taps(), before, "the tap is given back");
    let unknown = client.ask(Call::SetLink { nic: "lan".into(), up: true }).error.unwrap();
    assert_eq!(unknown.code, ErrorCode::NotFound);
}
