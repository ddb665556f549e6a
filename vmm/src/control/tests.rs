//! What the control socket says of a guest that a disk has stopped. No socket, no KVM.

use serde_json::Value;
use vmm_control::{DiskConfig, DiskFault};

use super::*;
use crate::devices::block::DiskFaults;
use crate::lease::quiesce::DiskGate;
use crate::machine::open_device::Host;

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
    let lease = Lease::new(41, None, Arc::clone(&gate), DiskGate::new(), Box::new(|_| {})).unwrap();
    let host = Host {
        gate: Arc::clone(&gate),
        lease: Arc::clone(&lease),
        disks: Host::disk_opener(DiskGate::new(), Arc::clone(&io_stop) as _),
        notify: Box::new(|_| {}),
    };
    let devices = DeviceManager::new(&config, Vec::new(), host).unwrap();
    control.connect(Running {
        lease,
        gate: Arc::clone(&gate),
        io_stop: Arc::clone(&io_stop),
        boot_time: BootTime::new(Instant::now()),
        exits: Arc::default(),
        devices,
    });
    Stopped { control, gate, io_stop, _dir: dir }
}

impl Stopped {
    fn ask(&self, call: Call) -> Value {
        match self.control.answer(Request { id: 1, call: call.clone() }, None) {
            Answer::Reply(reply) => reply.result.unwrap(),
            _ => panic!("{call:?} is answered with a reply"),
        }
    }

    fn status(&self) -> Status {
        serde_json::from_value(self.ask(Call::Status)).unwrap()
    }
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
        let Answer::Reply(reply) = stopped.control.answer(Request { id: 7, call: call.clone() }, None) else {
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
    stopped.control.answer(Request { id: 1, call: Call::Status }, Some(writer.into()));
    // An end of file, which there is none while somebody has the other end.
    assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
}
