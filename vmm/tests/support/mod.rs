//! A small guest, and a vmm process that runs it, for the tests of the whole program.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod guest;
pub mod moving;
pub mod plug_guest;
pub mod recorder;
pub mod tap;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use recorder::Recorder;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_control::descriptor::send_line;
use vmm_control::open::{Access, open_files};
use vmm_control::{Call, DiskConfig, ExitReport, Message, Notice, Reply, Request, Status};

/// Ends a test that waits for something that does not come. Nothing is measured with it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the tests of this file can run, which is said when not.
pub fn flat_guests_run() -> bool {
    let report = vmm::check::run();
    if !report.runs_flat_guests() {
        eprintln!("skipped: {report}");
    }
    report.runs_flat_guests()
}

pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A VM's directory, and the process that runs it now.
pub struct TestVm {
    dir: TempDir,
    child: Option<Child>,
    config: Value,
    arguments: Vec<String>,
}

impl TestVm {
    /// A VM whose guest does what the first letter of its command line says (see [`guest`]).
    pub fn new(behaviour: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("kernel"), guest::elf()).unwrap();
        let config = json!({
            "vm": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d",
            "name": "flat",
            "epoch": 41,
            "machine": "q-direct-1",
            "vcpus": 1,
            "memory_bytes": 32u64 << 20,
            "kernel": path("kernel"),
            "cmdline": behaviour,
            "identity": {"uuid": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d"},
            "release": "operator",
            "started_marker": path("started-41"),
            "run_dir": dir.path(),
        });
        Self { dir, child: None, config, arguments: Vec::new() }
    }

    pub fn set(&mut self, field: &str, value: Value) -> &mut Self {
        self.config[field] = value;
        self
    }

    /// Adds to the command line.
    pub fn argue(&mut self, arguments: &[&str]) -> &mut Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Starts a process with the configuration of now.
    pub fn start(&mut self) -> &mut Self {
        std::fs::write(self.path("config.json"), self.config.to_string()).unwrap();
        let log = std::fs::File::create(self.path("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command
            .args(["run", "--config"])
            .arg(self.path("config.json"))
            .arg("--control")
            .arg(self.path("control"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stderr(log);
        let child = match Recorder::installed() {
            Some(recorder) => recorder.spawn(&mut command),
            None => command.spawn(),
        };
        self.child = Some(child.unwrap());
        self
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        wait_for("the process to end", || child.try_wait().unwrap())
    }

    pub fn report(&self) -> Option<ExitReport> {
        ExitReport::read(self.dir.path()).unwrap()
    }

    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.path("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the process of now has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn wait_console(&self, text: &str) {
        wait_for(text, || self.console().contains(text).then_some(()));
    }

    pub fn client(&self) -> TestClient {
        let stream = wait_for("the control socket", || UnixStream::connect(self.path("control")).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        TestClient { reader: BufReader::new(stream), next_id: 1, notices: Vec::new() }
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what the vmm said:\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// hostd's end of the control socket.
pub struct TestClient {
    pub reader: BufReader<UnixStream>,
    next_id: u64,
    notices: Vec<Notice>,
}

impl TestClient {
    pub fn send_line(&mut self, line: &[u8]) {
        self.reader.get_mut().write_all(line).unwrap();
    }

    fn next_message(&mut self) -> Message {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).unwrap();
        assert!(count > 0, "the vmm closed the connection");
        Message::decode(line.as_bytes()).unwrap()
    }

    pub fn next_reply(&mut self) -> Reply {
        loop {
            match self.next_message() {
                Message::Reply(reply) => return reply,
                Message::Notice(notice) => self.notices.push(notice),
            }
        }
    }

    pub fn ask(&mut self, call: Call) -> Reply {
        let id = self.next_id;
        self.next_id += 1;
        self.send_line(&Request { id, call }.encode());
        let reply = self.next_reply();
        assert_eq!(reply.id, id);
        reply
    }

    /// Asks with a descriptor.
    pub fn ask_with(&mut self, call: Call, descriptor: BorrowedFd<'_>) -> Reply {
        self.ask_with_all(call, &[descriptor])
    }

    /// Gives the process a disk, with its files.
    pub fn plug_disk(&mut self, disk: DiskConfig) -> Reply {
        let files = open_files(&disk, Access::Use).unwrap();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.ask_with_all(Call::PlugDisk { config: Box::new(disk) }, &files)
    }

    /// Brings the files of a disk when it wants them.
    pub fn hand_files(&mut self, epoch: u64, disk: &DiskConfig) -> Reply {
        self.wait_notice(|notice| *notice == Notice::FilesWanted { disk: disk.id.clone() });
        self.hand_files_now(epoch, disk)
    }

    pub fn hand_files_now(&mut self, epoch: u64, disk: &DiskConfig) -> Reply {
        let files = open_files(disk, Access::Use).unwrap();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.ask_with_all(Call::DiskFiles { epoch, disk: disk.id.clone() }, &files)
    }

    fn ask_with_all(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> Reply {
        let id = self.next_id;
        self.next_id += 1;
        send_line(self.reader.get_ref(), &Request { id, call }.encode(), descriptors).unwrap();
        let reply = self.next_reply();
        assert_eq!(reply.id, id);
        reply
    }

    pub fn status(&mut self) -> Status {
        serde_json::from_value(self.ask(Call::Status).result.unwrap()).unwrap()
    }

    /// The next notice that fits, of those that came or will come.
    pub fn wait_notice(&mut self, fits: impl Fn(&Notice) -> bool) -> Notice {
        loop {
            if let Some(at) = self.notices.iter().position(&fits) {
                return self.notices.remove(at);
            }
            match self.next_message() {
                Message::Notice(notice) => self.notices.push(notice),
                Message::Reply(reply) => panic!("an answer that nobody waits for: {reply:?}"),
            }
        }
    }
}
