//! What the control socket says of a guest that a disk has stopped. No socket, no KVM.

use serde_json::Value;
use vmm_control::{DiskFault, SaveState};

use super::*;
use crate::devices::block::DiskFaults;
use crate::lease::quiesce::DiskGate;

struct Stopped {
    control: Arc<Control>,
    gate: Arc<RunGate>,
    io_stop: Arc<IoStop>,
    _dir: tempfile::TempDir,
}

fn control() -> Stopped {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "vm": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d",
        "name": "web1",
        "epoch": 41,
        "machine": "q-direct-1",
        "vcpus": 1,
        "memory_bytes": 32u64 << 20,
        "kernel": "/vmlinuz",
        "identity": {"uuid": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d"},
        "release": "operator",
        "started_marker": "/started",
        "run_dir": "/run",
    });
    let config = VmmConfig::parse(config.to_string().as_bytes()).unwrap();
    let console = ConsoleHub::with_log(&dir.path().join("console.log")).unwrap();
    let gate = RunGate::new();
    let (endings, _) = Endings::new(Arc::clone(&gate));
    let control = Control::new(&config, console, crate::agent_channel::AgentChannel::new().unwrap(), endings).unwrap();
    let io_stop = {
        let control = Arc::clone(&control);
        let listener = move || control.notify(Notice::Paused { reason: PauseReason::IoError, quiesced: false });
        IoStop::new(Arc::clone(&gate), Box::new(listener))
    };
    control.connect(Running {
        lease: Lease::new(41, None, Arc::clone(&gate), DiskGate::new(), Box::new(|_| {})).unwrap(),
        gate: Arc::clone(&gate),
        io_stop: Arc::clone(&io_stop),
        boot_time: BootTime::new(Instant::now()),
        exits: Arc::default(),
        saves: Saves::new(Arc::clone(&gate), DiskGate::new()),
        incoming: None,
    });
    Stopped { control, gate, io_stop, _dir: dir }
}

impl Stopped {
    fn ask(&self, call: Call) -> Value {
        match self.control.answer(Request { id: 1, call: call.clone() }) {
            Answer::Reply(reply) => reply.result.unwrap(),
            _ => panic!("{call:?} is answered with a reply"),
        }
    }

    fn status(&self) -> Status {
        serde_json::from_value(self.ask(Call::Status)).unwrap()
    }
}

impl Stopped {
    fn refusal(&self, call: Call) -> ErrorCode {
        match self.control.answer(Request { id: 1, call: call.clone() }) {
            Answer::Reply(reply) => reply.error.unwrap().code,
            _ => panic!("{call:?} is answered with a reply"),
        }
    }
}

#[test]
fn a_guest_is_not_resumed_while_it_is_being_saved() {
    let stopped = control();
    let running = stopped.control.running.get().unwrap();
    let session = running.saves.begin(None, None).unwrap();
    stopped.ask(Call::Pause);
    let status = stopped.status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::Saved });
    assert_eq!(status.saving.unwrap().state, SaveState::Saving);
    assert_eq!(stopped.refusal(Call::Resume), ErrorCode::NotNow);
    assert!(stopped.gate.holds(Stop::Saved) && stopped.gate.holds(Stop::Requested), "a refusal changes nothing");

    drop(session);
    assert_eq!(stopped.status().saving.unwrap().state, SaveState::Failed);
    stopped.ask(Call::Resume);
    let status = stopped.status();
    assert_eq!((status.run, status.saving), (RunState::Running, None));
}

#[test]
fn a_process_that_waits_for_no_guest_takes_none() {
    let stopped = control();
    let run = |deadline_ns| Call::Run { epoch: 42, deadline_ns, started_marker: "/started/42".into() };
    assert_eq!(stopped.refusal(run(None)), ErrorCode::NotNow);
    assert_eq!(stopped.refusal(run(Some(u64::MAX))), ErrorCode::NoLease);
    assert_eq!(stopped.control.reserve_incoming().err().unwrap().0, ErrorCode::NotNow);
    // And without a machine there is nothing to save.
    assert_eq!(stopped.control.begin_save(None, None).err().unwrap().0, ErrorCode::NotNow);
    assert!(stopped.gate.is_open());
}

#[test]
fn an_io_error_is_shown_and_told_until_somebody_resumes_the_guest() {
    let stopped = control();
    let fault = DiskFault { disk: "root".into(), what: "write: no space".into(), no_space: true };
    stopped.io_stop.stopped(fault.clone());
    stopped.ask(Call::Pause);
    let status = stopped.status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::IoError });
    assert_eq!(status.io_error, Some(fault));
    let notices: Vec<_> = lock(&stopped.control.notices).drain(..).collect();
    assert!(notices.contains(&Notice::Paused { reason: PauseReason::IoError, quiesced: false }));

    stopped.gate.shut(Stop::Lease);
    stopped.ask(Call::Resume);
    assert!(stopped.gate.holds(Stop::Lease) && !stopped.gate.holds(Stop::IoError));
    assert!(lock(&stopped.control.notices).is_empty(), "the lease still holds the guest");
    assert_eq!(stopped.status().io_error, None);
    stopped.gate.open(Stop::Lease);
    assert_eq!(stopped.status().run, RunState::Running);
}
