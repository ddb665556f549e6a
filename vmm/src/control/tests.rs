//! What the control socket says of a guest that a disk, its own panic or its watchdog has stopped. No socket, no KVM.

use serde_json::Value;
use vmm_control::{DiskConfig, DiskFault, OnPanic, PanicKind, SaveState, WatchdogAction};

use super::*;
use crate::devices::block::DiskFaults;
use crate::incident::{PanicSink, WatchdogSink};
use crate::lease::quiesce::DiskGate;
use crate::machine::device_manager::OpenFiles;
use crate::machine::open_device::Host;

struct Stopped {
    control: Arc<Control>,
    gate: Arc<RunGate>,
    io_stop: Arc<IoStop>,
    incidents: Arc<Incidents>,
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
    let agent = crate::agent_channel::AgentChannel::new().unwrap();
    let control = Control::new(&config, console, agent, Arc::clone(&endings)).unwrap();
    let incidents = {
        let control = Arc::clone(&control);
        let listener = Box::new(move |incident| control.notify(crate::process::incident_notice(incident)));
        Incidents::new(OnPanic::Pause, WatchdogAction::Pause, Arc::clone(&gate), endings, listener)
    };
    let io_stop = {
        let control = Arc::clone(&control);
        let listener = move || control.notify(Notice::Paused { reason: PauseReason::IoError, quiesced: false });
        IoStop::new(Arc::clone(&gate), Box::new(listener))
    };
    let lease = Lease::new(41, None, Arc::clone(&gate), DiskGate::new(), Box::new(|_| {})).unwrap();
    let host = Host {
        gate: Arc::clone(&gate),
        lease: Arc::clone(&lease),
        disks: Host::disk_opener(DiskGate::new(), Arc::clone(&io_stop) as _),
        opens_paths: true,
        notify: Arc::new(|_| {}),
    };
    let devices = DeviceManager::new(&config, Vec::new(), OpenFiles::new(), host).unwrap();
    control.connect(Running {
        lease,
        gate: Arc::clone(&gate),
        io_stop: Arc::clone(&io_stop),
        incidents: Arc::clone(&incidents),
        boot_time: BootTime::new(Instant::now()),
        exits: Arc::default(),
        saves: Saves::new(Arc::clone(&gate), DiskGate::new()),
        incoming: None,
        devices,
    });
    Stopped { control, gate, io_stop, incidents, _dir: dir }
}

impl Stopped {
    fn ask(&self, call: Call) -> Value {
        match self.control.answer(Request { id: 1, call: call.clone() }, Vec::new()) {
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
        match self.control.answer(Request { id: 1, call: call.clone() }, Vec::new()) {
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

#[test]
fn a_panic_is_shown_and_told_and_a_pause_for_it_ends_with_resume() {
    let stopped = control();
    assert_eq!(stopped.status().panic, None);
    stopped.incidents.panicked(PanicKind::Panicked);
    let reason = PauseReason::GuestPanicked;
    let notices: Vec<_> = lock(&stopped.control.notices).drain(..).collect();
    let told = [Notice::GuestPanicked { kind: PanicKind::Panicked }, Notice::Paused { reason, quiesced: false }];
    assert_eq!(notices, told);
    let status = stopped.status();
    assert_eq!((status.run, status.panic, status.panics), (RunState::Paused { reason }, Some(PanicKind::Panicked), 1));

    // A pause on request is another reason; `resume` ends both.
    stopped.ask(Call::Pause);
    assert_eq!(stopped.status().run, RunState::Paused { reason });
    stopped.ask(Call::Resume);
    assert_eq!((stopped.status().run, stopped.status().panic), (RunState::Running, Some(PanicKind::Panicked)));

    stopped.incidents.expired();
    let status = stopped.status();
    assert_eq!((status.run, status.watchdog_expired), (RunState::Paused { reason: PauseReason::Watchdog }, 1));
    assert_eq!(stopped.ask(Call::Metrics)["watchdog_expired"], json!(1));
    stopped.ask(Call::Resume);
    assert!(stopped.gate.is_open());
}

#[test]
fn a_balloons_target_is_refused_where_no_guest_could_live_with_it() {
    let stopped = control();
    // All of it: the guest of this test is smaller than the least that a guest can be asked to live with.
    assert_eq!(stopped.ask(Call::BalloonSet { bytes: 32 << 20 }), json!({ "target_bytes": 32 << 20 }));
    for bytes in [0, (32 << 20) - 1, (32 << 20) + 1, u64::MAX] {
        let Answer::Reply(reply) =
            stopped.control.answer(Request { id: 1, call: Call::BalloonSet { bytes } }, Vec::new())
        else {
            panic!("a reply");
        };
        assert_eq!(reply.error.unwrap().code, ErrorCode::BadRequest);
    }
}

#[test]
fn devices_are_asked_for_in_vain_in_words() {
    let stopped = control();
    let nic = |id: &str| serde_json::from_value(json!({"id": id, "mac": "02:00:00:00:00:01"})).unwrap();
    let disk = DiskConfig { id: "data".into(), path: "relative".into(), ..DiskConfig::default() };
    for (call, code) in [
        (Call::PlugNic { config: Box::new(nic("lan")) }, ErrorCode::BadRequest),
        (Call::PlugDisk { config: Box::new(disk) }, ErrorCode::BadRequest),
        (Call::Unplug { id: "data".into(), force: true }, ErrorCode::NotFound),
        (Call::SetLink { nic: "lan".into(), up: true }, ErrorCode::NotFound),
    ] {
        let Answer::Reply(reply) = stopped.control.answer(Request { id: 7, call: call.clone() }, Vec::new()) else {
            panic!("{call:?} is answered with a reply");
        };
        assert_eq!((reply.id, reply.error.unwrap().code), (7, code), "{call:?}");
    }
    assert!(stopped.status().devices.is_empty());
}

#[test]
fn a_descriptor_that_was_not_asked_for_is_closed() {
    let stopped = control();
    let (mut reader, writer) = std::io::pipe().unwrap();
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    stopped.control.answer(Request { id: 1, call: Call::Status }, vec![writer.into()]);
    // An end of file, which there is none while somebody has the other end.
    assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
}

#[test]
fn devices_stay_as_they_are_while_a_guest_is_saved() {
    let stopped = control();
    let disk = DiskConfig { id: "data".into(), path: "/data".into(), ..DiskConfig::default() };
    let calls = [
        Call::PlugDisk { config: Box::new(disk) },
        Call::Unplug { id: "data".into(), force: false },
        Call::SetLink { nic: "lan".into(), up: true },
        Call::BalloonSet { bytes: 32 << 20 },
    ];
    let session = stopped.control.running.get().unwrap().saves.begin(None, None).unwrap();
    for call in &calls {
        assert_eq!(stopped.refusal(call.clone()), ErrorCode::NotNow, "{call:?}");
    }
    // What was saved stays true until somebody says that it does not matter.
    drop(session);
    for call in &calls {
        assert_eq!(stopped.refusal(call.clone()), ErrorCode::NotNow, "{call:?}");
    }
    stopped.ask(Call::Resume);
    assert_eq!(stopped.refusal(calls[1].clone()), ErrorCode::NotFound);
}

#[test]
fn a_guest_is_not_saved_while_a_device_comes() {
    let stopped = control();
    let path = stopped._dir.path().join("data");
    std::fs::write(&path, [0; 4096]).unwrap();
    let config = Box::new(DiskConfig { id: "data".into(), path, ..DiskConfig::default() });
    // There is no machine yet that it could be connected to.
    stopped.ask(Call::PlugDisk { config });
    let (code, words) = stopped.control.begin_save(None, None).err().unwrap();
    assert_eq!((code, words.contains("data is being plugged")), (ErrorCode::NotNow, true), "{words}");
    assert!(stopped.gate.is_open(), "a refusal changes nothing");
    stopped.ask(Call::Unplug { id: "data".into(), force: false });
    let (_, words) = stopped.control.begin_save(None, None).err().unwrap();
    assert!(words.contains("restarting or ending"), "{words}");
}
