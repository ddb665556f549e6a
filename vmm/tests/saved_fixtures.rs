//! Guests that were saved by this format before: what was written once is read for ever, or refused in words.
//!
//! `fixtures/saved` has one guest a version of the format or of a state, each a guest `m` of [`support::guest`] with 16 MiB. A change that
//! makes one of them unreadable needs a higher version and another file here. A new one is written by
//! `QUORATE_WRITE_FIXTURE=NAME cargo nextest run -p vmm --test saved_fixtures --run-ignored only`.

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{TestVm, flat_guests_run, wait_for};
use vmm::devices::legacy::pm::SavedPowerManagement;
use vmm::devices::legacy::reset::SavedResetPort;
use vmm::devices::legacy::rtc::SavedRealTimeClock;
use vmm::devices::legacy::serial::SavedSerial;
use vmm::machine::layout::Layout;
use vmm::saved::frame::{FrameKind, FrameReader};
use vmm::saved::header::Header;
use vmm::saved::payload::{PayloadKind, Payloads};
use vmm::saved::stream::{GuestReader, Item};
use vmm::saved::vcpu::SavedVcpu;
use vmm::saved::vm::{SavedClock, SavedIrqchip, SavedPit};
use vmm_control::{Call, ExitReason};

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
        let pci: Value = payloads.take(PayloadKind::Pci, 0).unwrap();
        assert!(pci.as_object().unwrap().contains_key("00:00.0"), "{name}: {pci}");
        payloads.finish().unwrap();
    }
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
            .argue(&["--incoming"])
            .start();
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
    vm.set("memory_bytes", json!(16u64 << 20)).start();
    vm.wait_console("xyz");
    let mut client = vm.client();
    assert!(client.ask(Call::SaveAttach { migration: None, live: None }).error.is_none());
    let mut saved = Vec::new();
    client.reader.read_to_end(&mut saved).unwrap();
    read(&saved);
    std::fs::write(directory().join(name), saved).unwrap();
}
