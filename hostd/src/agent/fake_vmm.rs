//! A vmm without a guest, for the agent's tests: a real process with the real lock, mark, control socket and exit report.
//!
//! It is this very test binary: a small script, in the place of the vmm program, runs the ignored test [`process`], with the
//! command line in [`ARGUMENTS`].

use std::fs::OpenOptions;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;

use serde_json::json;
use vmm_control::Call;
use vmm_control::ExitReason;
use vmm_control::ExitReport;
use vmm_control::Hello;
use vmm_control::Message;
use vmm_control::Reply;
use vmm_control::Request;
use vmm_control::RunState;
use vmm_control::Status;
use vmm_control::VmmConfig;

const ARGUMENTS: &str = "QUORATE_FAKE_VMM";

/// One line a process: `start EPOCH PID`, then what it was told.
pub const JOURNAL: &str = "journal";

/// Writes the script that stands for the vmm program.
pub fn install(dir: &Path) -> PathBuf {
    let path = dir.join("vmm");
    let binary = std::env::current_exe().expect("a test knows its binary");
    let test = "agent::fake_vmm::process";
    let script = format!(
        "#!/bin/sh\n{ARGUMENTS}=\"$*\" exec {} --exact {test} --ignored --nocapture --test-threads=1\n",
        binary.display()
    );
    std::fs::write(&path, script).expect("the script is written");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("the script is made a program");
    path
}

#[test]
#[ignore = "the agent's tests run it as a process of its own"]
fn process() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let words: Vec<&str> = arguments.split(' ').collect();
    let ["run", "--config", config, "--control", control, "--lock-fd", _lock, "--sandbox", ..] = words[..] else {
        panic!("not how a vmm is started: {arguments}")
    };
    let config = VmmConfig::load(Path::new(config)).expect("a configuration that reads");
    if OpenOptions::new().write(true).create_new(true).open(&config.started_marker).is_err() {
        leave(&config, ExitReason::AlreadyStarted, false);
    }
    note(&config, &format!("start {} {}", config.epoch, std::process::id()));
    let listener = UnixListener::bind(control).expect("a control socket");
    for client in listener.incoming() {
        let config = config.clone();
        std::thread::spawn(move || serve(&config, client.expect("a client")));
    }
}

fn note(config: &VmmConfig, line: &str) {
    let journal = config.run_dir.join(JOURNAL);
    let mut file = OpenOptions::new().create(true).append(true).open(journal).expect("a journal");
    file.write_all(format!("{line}\n").as_bytes()).expect("a line");
}

fn leave(config: &VmmConfig, reason: ExitReason, ran: bool) -> ! {
    let report =
        ExitReport { vm: config.vm, epoch: config.epoch, reason, detail: String::new(), ran, drained: true, panics: 0 };
    report.write(&config.run_dir).expect("an exit report");
    std::process::exit(i32::from(reason.exit_code()));
}

fn serve(config: &VmmConfig, client: UnixStream) {
    let mut answers = client.try_clone().expect("a second handle");
    for line in BufReader::new(client).split(b'\n') {
        let Ok(Request { id, call }) = Request::decode(&line.unwrap_or_default()) else { return };
        let reply = match call.clone() {
            Call::Hello => {
                let (name, pid) = (config.name.clone(), std::process::id());
                Reply::ok(id, Hello { protocol: 1, vm: config.vm, name, epoch: config.epoch, pid })
            }
            Call::Status => Reply::ok(id, status(config)),
            call => {
                note(config, &format!("{call:?}"));
                Reply::ok(id, json!({}))
            }
        };
        let _ = answers.write_all(&Message::Reply(reply).encode());
        match call {
            Call::PowerButton => leave(config, ExitReason::GuestPoweredOff, true),
            Call::PowerOff => leave(config, ExitReason::PoweredOff, true),
            _ => {}
        }
    }
}

fn status(config: &VmmConfig) -> Status {
    Status {
        run: RunState::Running,
        quiesced: false,
        deadline_ns: config.lease.map(|lease| lease.deadline_boottime_ns),
        vcpus: config.vcpus,
        boot_time_us: None,
        overhead_bytes: None,
        resets: 0,
        agent_open: false,
        io_error: None,
        saving: None,
        incoming: None,
        panic: None,
        panics: 0,
        watchdog_expired: 0,
        devices: Vec::new(),
        files_wanted: Vec::new(),
    }
}
