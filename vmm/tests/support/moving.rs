//! Guests that are saved by one process and handed over to another.

use std::io::{Read, Write};

use serde_json::json;
use vmm::saved::frame::{FrameError, FrameKind, FrameReader};
use vmm_control::{Call, IncomingState, Notice, PauseReason, RunState, SaveState};

use super::{TestClient, TestVm, wait_for};

/// A guest that can be moved.
pub fn source(behaviour: &str) -> TestVm {
    let mut vm = TestVm::new(behaviour);
    vm.set("memory_bytes", json!(16u64 << 20));
    vm
}

/// The process that the same guest goes to.
pub fn target(behaviour: &str) -> TestVm {
    let mut vm = source(behaviour);
    vm.argue(&["--incoming"]);
    vm
}

pub fn run_call(vm: &TestVm, epoch: u64) -> Call {
    Call::Run { epoch, deadline_ns: None, started_marker: vm.path(&format!("started-{epoch}")) }
}

/// The whole stream. The guest stands from then on.
pub fn save(vm: &TestVm) -> Vec<u8> {
    let mut client = vm.client();
    let reply = client.ask(Call::SaveAttach { migration: None, live: None });
    assert!(reply.error.is_none(), "{reply:?}");
    let mut saved = Vec::new();
    client.reader.read_to_end(&mut saved).unwrap();
    wait_for("the save to end", || {
        let saving = vm.client().status().saving.unwrap();
        assert_eq!(saving.error, None);
        (saving.state == SaveState::Saved).then_some(())
    });
    saved
}

/// Hands a guest over, and returns the answers, the last one with its words.
pub fn hand_over(vm: &TestVm, saved: &[u8]) -> Vec<(FrameKind, String)> {
    let mut client = vm.client();
    let reply = client.ask(Call::RestoreAttach);
    assert!(reply.error.is_none(), "{reply:?}");
    // A target that refuses does not read the rest.
    let _ = client.reader.get_mut().write_all(saved);
    let _ = client.reader.get_mut().shutdown(std::net::Shutdown::Write);
    let mut reader = FrameReader::answers(&mut client.reader);
    let mut answers = Vec::new();
    loop {
        match reader.read() {
            Ok((kind, body)) => answers.push((kind, String::from_utf8(body.to_vec()).unwrap())),
            Err(FrameError::Truncated | FrameError::Read(_)) => return answers,
            Err(error) => panic!("{error}"),
        }
    }
}

pub fn load(vm: &TestVm, saved: &[u8]) {
    let answers = hand_over(vm, saved);
    let kinds: Vec<_> = answers.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [FrameKind::Accepted, FrameKind::Loaded], "{answers:?}");
    let status = vm.client().status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::Incoming });
    assert_eq!(status.incoming.unwrap().state, IncomingState::Loaded);
    assert_eq!(status.incoming.unwrap().bytes_received, saved.len() as u64);
}

pub fn run(vm: &TestVm, epoch: u64) -> TestClient {
    let mut client = vm.client();
    let reply = client.ask(run_call(vm, epoch));
    assert!(reply.error.is_none(), "{reply:?}");
    client.wait_notice(|notice| *notice == Notice::Resumed);
    client
}

/// A guest that this process refuses by its header, in these words. It never runs.
pub fn refuse(target: &mut TestVm, saved: &[u8], words: &str) {
    target.start();
    let answers = hand_over(target, saved);
    assert_eq!(answers.len(), 1, "refused before memory moves: {answers:?}");
    let (kind, said) = &answers[0];
    assert_eq!(*kind, FrameKind::Refused);
    assert!(said.contains(words), "{said} does not say {words}");
    assert_eq!(target.wait_exit().code(), Some(i32::from(vmm_control::ExitReason::RestoreFailed.exit_code())));
    assert!(!target.report().unwrap().ran);
}
