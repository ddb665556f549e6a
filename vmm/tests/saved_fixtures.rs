//! Guests that were saved by this format before: what was written once is read for ever, or refused in words.
//!
//! `fixtures/saved` has one guest a version of the format or of a state, each a guest `m` of [`support::guest`] with 16 MiB and every device
//! that a guest can have, one of them plugged while it ran. A change that makes one of them unreadable needs a higher version and
//! another file here. A new one is written by
//! `QUORATE_WRITE_FIXTURE=NAME cargo nextest run -p vmm --test saved_fixtures --run-ignored only`.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use pnet_base::MacAddr;
use serde_json::{Value, json};
use support::tap::tap;
use support::{TestVm, flat_guests_run, wait_for};
use vmm::devices::legacy::pm::SavedPowerManagement;
use vmm::devices::legacy::pvpanic::SavedPvPanic;
use vmm::devices::legacy::reset::SavedResetPort;
use vmm::devices::legacy::rtc::SavedRealTimeClock;
use vmm::devices::legacy::serial::SavedSerial;
use vmm::devices::legacy::vmgenid::SavedVmGeneration;
use vmm::machine::layout::Layout;
use vmm::pci::topology::{FIRST_SLOT_DEVICE, MAX_SLOTS};
use vmm::saved::frame::{FrameKind, FrameReader};
use vmm::saved::header::{DeviceShape, DiskShape, Header, NicShape};
use vmm::saved::payload::{PayloadKind, Payloads};
use vmm::saved::stream::{GuestReader, Item};
use vmm::saved::vcpu::SavedVcpu;
use vmm::saved::vm::{SavedClock, SavedIrqchip, SavedPit};
use vmm_control::slots::LAST_SLOT;
use vmm_control::{Call, DiskConfig, ExitReason, Notice};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/saved")
}

/// All of them; it is an error when there is none, or this test would rot (rule 35 of reference peers-vmm §4.2).
fn fixtures() -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<_> = std::fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no fixture in {}", directory().display());
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Header, pages with something in them, and states.
fn read(saved: &[u8]) -> (Header, u64, Payloads) {
    let (header, mut reader) = GuestReader::start(saved).unwrap();
    reader.accept(&Layout::new(header.shape.memory_bytes, header.shape.max_memory_bytes));
    let mut payloads = Payloads::default();
    loop {
        match reader.item().unwrap() {
            Item::Pages { .. } | Item::Zeros { .. } => {}
            Item::State(payload) => payloads.add(payload).unwrap(),
            Item::End => break,
        }
    }
    reader.nothing_follows().unwrap();
    (header, reader.totals().pages, payloads)
}

#[test]
fn every_state_of_every_fixture_can_be_read() {
    for (path, saved) in fixtures() {
        let name = path.display();
        let (header, pages, mut payloads) = read(&saved);
        assert!(pages > 0, "{name}");
        for index in 0..u32::from(header.shape.vcpus) {
            let vcpu: SavedVcpu = payloads.take(PayloadKind::Vcpu, index).unwrap();
            assert_eq!(vcpu.tsc_khz(), header.tsc_khz, "{name}");
        }
        payloads.take::<SavedIrqchip>(PayloadKind::Irqchip, 0).unwrap();
        payloads.take::<SavedPit>(PayloadKind::Pit, 0).unwrap();
        payloads.take::<SavedClock>(PayloadKind::Clock, 0).unwrap();
        payloads.take::<SavedPowerManagement>(PayloadKind::PowerManagement, 0).unwrap();
        payloads.take::<SavedRealTimeClock>(PayloadKind::RealTimeClock, 0).unwrap();
        payloads.take::<SavedSerial>(PayloadKind::Serial, 0).unwrap();
        payloads.take::<SavedResetPort>(PayloadKind::ResetPort, 0).unwrap();
        payloads.take::<SavedPvPanic>(PayloadKind::PanicPort, 0).unwrap();
        payloads.take::<SavedVmGeneration>(PayloadKind::Generation, 0).unwrap();
        let pci: Value = payloads.take(PayloadKind::Pci, 0).unwrap();
        // The bridges, and the watchdog, entropy and balloon. Each slot that the header names has a device, and the console's.
        for address in ["00:00.0", "00:1b.0", "00:1c.0", "00:1d.0", "00:1f.0"] {
            assert!(!pci[address].is_null(), "{name}: {address}");
        }
        for slot in 0..MAX_SLOTS {
            let child = &pci[format!("00:{:02x}.0", slot + FIRST_SLOT_DEVICE)]["child"];
            let named = slot == 0 || header.shape.slots.contains_key(&slot);
            assert_eq!(!child.is_null(), named, "{name}: slot {slot}");
        }
        payloads.finish().unwrap();
    }
}

/// Devices as those of the saved guest. The taps are open while they are kept.
fn add_devices(vm: &mut TestVm, watchdog: bool, slots: &BTreeMap<u8, DeviceShape>) -> Vec<OwnedFd> {
    let (mut disks, mut nics, mut taps) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, device) in slots {
        let id = format!("slot-{slot}");
        match device {
            DeviceShape::Disk(disk) => {
                let path = vm.path(&id);
                std::fs::File::create(&path).unwrap().set_len(disk.bytes).unwrap();
                let DiskShape { serial, read_only, .. } = disk;
                disks.push(json!({"id": id, "path": path, "serial": serial, "read_only": read_only, "slot": slot}));
            }
            DeviceShape::Nic(nic) => {
                let tap = tap();
                vm.argue(&["--tap-fd", &format!("{id}={}", tap.as_raw_fd())]);
                nics.push(json!({"id": id, "mac": nic.mac, "mtu": nic.mtu, "slot": slot}));
                taps.push(tap);
            }
        }
    }
    if watchdog {
        vm.set("watchdog", json!({"action": "none"}));
    }
    vm.set("disks", json!(disks)).set("nics", json!(nics));
    taps
}

#[test]
fn every_fixture_runs_here_or_is_refused_in_words() {
    if !flat_guests_run() {
        return;
    }
    for (path, saved) in fixtures() {
        let (header, ..) = read(&saved);
        let mut vm = TestVm::new("m");
        vm.set("vm", json!(header.shape.vm))
            .set("memory_bytes", json!(header.shape.memory_bytes))
            .set("vcpus", json!(header.shape.vcpus))
            .argue(&["--incoming"]);
        let _taps = add_devices(&mut vm, header.shape.watchdog, &header.shape.slots);
        vm.start();
        let mut client = vm.client();
        assert!(client.ask(Call::RestoreAttach).error.is_none());
        let _ = client.reader.get_mut().write_all(&saved);
        let mut answers = FrameReader::answers(&mut client.reader);
        let (mut last, mut words) = (FrameKind::End, String::new());
        while let Ok((kind, body)) = answers.read() {
            (last, words) = (kind, String::from_utf8(body.to_vec()).unwrap());
        }
        if last == FrameKind::Loaded {
            let run = Call::Run { epoch: 42, deadline_ns: None, started_marker: vm.path("started-42") };
            assert!(vm.client().ask(run).error.is_none());
            wait_for("the alphabet", || vm.console().contains("abcdefghijklmnopqrstuvwxyz").then_some(()));
            assert!(!vm.console().contains('!'), "{}: {}", path.display(), vm.console());
        } else {
            // Another processor or another KVM: the guest never ran, and somebody is told why.
            eprintln!("{} is refused: {words}", path.display());
            assert_eq!(last, FrameKind::Refused);
            assert_eq!(vm.wait_exit().code(), Some(i32::from(ExitReason::RestoreFailed.exit_code())));
            assert_eq!((vm.report().unwrap().detail, vm.console()), (words, String::new()));
        }
    }
}

#[test]
#[ignore = "writes a fixture, which is done once for each version"]
fn write_a_fixture() {
    let name = std::env::var("QUORATE_WRITE_FIXTURE").expect("its name");
    let mut vm = TestVm::new("m");
    let disk = |bytes, serial: &str| DeviceShape::Disk(DiskShape { bytes, serial: serial.into(), read_only: false });
    let nic = DeviceShape::Nic(NicShape { mac: MacAddr::new(0x52, 0x54, 0, 0, 0, 1), mtu: 1500 });
    let slots = BTreeMap::from([(1, disk(1 << 20, "first")), (LAST_SLOT, nic)]);
    let _taps = add_devices(&mut vm, true, &slots);
    vm.set("memory_bytes", json!(16u64 << 20)).start();
    vm.wait_console("xyz");
    let mut client = vm.client();
    let path = vm.path("plugged");
    std::fs::File::create(&path).unwrap().set_len(1 << 16).unwrap();
    let plugged = DiskConfig { id: "plugged".into(), path, serial: "second".into(), ..DiskConfig::default() };
    assert!(client.ask(Call::PlugDisk { config: Box::new(plugged) }).error.is_none());
    client.wait_notice(|notice| matches!(notice, Notice::Plugged { slot: 2, .. }));
    assert!(client.ask(Call::SaveAttach { migration: None, live: None }).error.is_none());
    let mut saved = Vec::new();
    client.reader.read_to_end(&mut saved).unwrap();
    read(&saved);
    std::fs::write(directory().join(name), saved).unwrap();
}
