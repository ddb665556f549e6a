//! Devices of a guest that runs: handed to its vmm, or asked back. The vmm opens nothing by itself, so taps and the files of disks are
//! opened here and go with the line. Blocking; called on a thread of the blocking pool.

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::state::Nic;
use statemachine::state::VmSpec;
use thiserror::Error;
use vmm_control::Call;
use vmm_control::DiskConfig;
use vmm_control::ErrorCode;
use vmm_control::Fault;
use vmm_control::Hello;
use vmm_control::Message;
use vmm_control::Request;
use vmm_control::config::MAX_MTU;
use vmm_control::descriptor::send_line;
use vmm_control::open::Access;
use vmm_control::open::open_files;
use vmm_control::protocol::MAX_LINE_BYTES;

use super::first_boot;
use super::guest_files;
use super::guest_files::GuestFilesError;
use super::launcher::Launcher;
use super::plan::Device;
use super::run_dir::RunDir;
use crate::network::NetworkError;
use crate::network::tap::Tap;

#[derive(Debug, Error)]
pub enum PlugError {
    #[error(transparent)]
    Files(#[from] GuestFilesError),
    #[error("network card {id}: {source}")]
    Nic {
        id: String,
        #[source]
        source: NetworkError,
    },
    #[error("disk {id}: {source}")]
    Disk {
        id: String,
        #[source]
        source: io::Error,
    },
    #[error("it wants the files of {0}, which is no disk of its guest")]
    NotItsDisk(String),
    #[error("cannot talk to the vmm at {path}: {source}")]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the vmm refused: {0}")]
    Refused(#[source] Fault),
    #[error("another process runs the VM by now, or none")]
    Superseded,
    #[error("the vmm said what this hostd does not understand: {0}")]
    Nonsense(String),
}

/// Gives the guest a device. When this returns, its vmm opens it, or never will: the answer is waited for without end, because a question
/// that was given up could be carried out after all, when the disk belongs to somebody else (S2). Whether the guest gets the device, the
/// vmm's status and notices say.
pub fn plug(launcher: &Launcher, vm: VmId, epoch: Epoch, device: &Device) -> Result<(), PlugError> {
    match device {
        Device::Disk(disk) => {
            // Its storage may hang for as long as it likes: only then is the guest looked for that it is for.
            let config = guest_files::disk_config(disk, &launcher.allowed_paths)?;
            let files = open(&config)?;
            Line::to(launcher, vm, epoch)?.ask(Call::PlugDisk { config: Box::new(config) }, &files)
        }
        Device::Nic(nic) => plug_nic(Line::to(launcher, vm, epoch)?, vm, nic),
    }
}

fn plug_nic(mut line: Line, vm: VmId, nic: &Nic) -> Result<(), PlugError> {
    let mut config = guest_files::nic_config(nic, vm);
    let failed = |source| PlugError::Nic { id: nic.id.clone(), source };
    let tap = Tap::plug(&nic.bridge, config.mac).map_err(failed)?;
    config.mtu = u16::try_from(tap.mtu).unwrap_or(MAX_MTU).min(MAX_MTU);
    line.ask(Call::PlugNic { config: Box::new(config) }, &[tap.descriptor])
}

fn open(disk: &DiskConfig) -> Result<Vec<OwnedFd>, PlugError> {
    open_files(disk, Access::Use).map_err(|source| PlugError::Disk { id: disk.id.clone(), source })
}

/// Gives the process of a guest the files of a disk that it wants. One that does not want them any more refuses them.
pub fn hand_files(launcher: &Launcher, vm: VmId, epoch: Epoch, disk: &str, spec: &VmSpec) -> Result<(), PlugError> {
    let config = match spec.disks.iter().find(|known| known.id == disk) {
        Some(known) => guest_files::disk_config(known, &launcher.allowed_paths)?,
        None if disk == first_boot::DISK && spec.first_boot.is_some() => {
            first_boot::disk(&RunDir::of(&launcher.vms_dir, vm))
        }
        None => return Err(PlugError::NotItsDisk(disk.to_owned())),
    };
    let files = open(&config)?;
    Line::to(launcher, vm, epoch)?.ask(Call::DiskFiles { epoch: epoch.0, disk: disk.to_owned() }, &files)
}

/// Asks the guest for a device. One that is gone already is what was wanted.
pub fn unplug(launcher: &Launcher, vm: VmId, epoch: Epoch, device: &str) -> Result<(), PlugError> {
    match Line::to(launcher, vm, epoch)?.ask(Call::Unplug { id: device.to_owned(), force: false }, &[]) {
        Err(PlugError::Refused(fault)) if fault.code == ErrorCode::NotFound => Ok(()),
        other => other,
    }
}

/// A connection of its own, because a descriptor may go with a question. It leads to the process that runs the guest of this epoch, for as long
/// as it lives: what is asked over it reaches no other, which may not have the device (S2).
struct Line {
    path: PathBuf,
    reader: BufReader<UnixStream>,
}

impl Line {
    fn to(launcher: &Launcher, vm: VmId, epoch: Epoch) -> Result<Line, PlugError> {
        Line::at(RunDir::of(&launcher.vms_dir, vm).control_socket(), vm, epoch)
    }

    fn at(path: PathBuf, vm: VmId, epoch: Epoch) -> Result<Line, PlugError> {
        let stream = UnixStream::connect(&path).map_err(|source| PlugError::Socket { path: path.clone(), source })?;
        let mut line = Line { path, reader: BufReader::new(stream) };
        let hello = line.call(Call::Hello, &[])?.unwrap_or_default();
        let hello: Hello = serde_json::from_value(hello).map_err(|error| PlugError::Nonsense(error.to_string()))?;
        match hello.vm == vm.0 && hello.epoch == epoch.0 {
            true => Ok(line),
            false => Err(PlugError::Superseded),
        }
    }

    fn ask(&mut self, call: Call, descriptors: &[OwnedFd]) -> Result<(), PlugError> {
        self.call(call, descriptors).map(drop)
    }

    fn call(&mut self, call: Call, descriptors: &[OwnedFd]) -> Result<Option<serde_json::Value>, PlugError> {
        let reply = self.exchange(&Request { id: 1, call }.encode(), descriptors);
        let reply = reply.map_err(|source| PlugError::Socket { path: self.path.clone(), source })?;
        match Message::decode(&reply) {
            Ok(Message::Reply(reply)) => reply.error.map_or(Ok(reply.result), |fault| Err(PlugError::Refused(fault))),
            Ok(Message::Notice(_)) => Err(PlugError::Nonsense("nothing but notices".to_owned())),
            Err(error) => Err(PlugError::Nonsense(error.to_string())),
        }
    }

    /// The first line that is no notice; the last one where too many come.
    fn exchange(&mut self, request: &[u8], descriptors: &[OwnedFd]) -> io::Result<Vec<u8>> {
        let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
        send_line(self.reader.get_ref(), request, &descriptors)?;
        let mut line = Vec::new();
        for _ in 0..=NOTICES_MAX {
            line.clear();
            if (&mut self.reader).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !matches!(Message::decode(&line), Ok(Message::Notice(_))) {
                break;
            }
        }
        Ok(line)
    }
}

/// That may come before the answer.
const NOTICES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use uuid::Uuid;

    use super::*;

    /// A process that runs this epoch, and says how many lines it was sent.
    fn process(path: &std::path::Path, vm: VmId, epoch: u64) -> std::thread::JoinHandle<usize> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut answers = stream.try_clone().unwrap();
            let mut lines = 0;
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { break };
                lines += 1;
                let id = Request::decode(line.as_bytes()).unwrap().id;
                let hello = serde_json::json!({"protocol": 1, "vm": vm.0, "name": "web", "epoch": epoch, "pid": 1});
                writeln!(answers, "{}", serde_json::json!({"id": id, "result": hello})).unwrap();
            }
            lines
        })
    }

    #[test]
    fn a_device_goes_to_the_guest_that_it_was_given_to_and_to_no_later_one() {
        // S2: the plug of an earlier epoch may have hung in its storage until the VM runs again, without the right to that disk.
        let vm = VmId(Uuid::from_u128(7));
        let dir = tempfile::tempdir().unwrap();
        let asked = |epoch: u64, name: &str| {
            let path = dir.path().join(name);
            let process = process(&path, vm, 42);
            let unplug = Call::Unplug { id: "data".to_owned(), force: false };
            let said = Line::at(path, vm, Epoch(epoch)).and_then(|mut line| line.ask(unplug, &[]));
            (said, process.join().unwrap())
        };
        assert!(matches!(asked(42, "same"), (Ok(()), 2)));
        assert!(matches!(asked(41, "later"), (Err(PlugError::Superseded), 1)), "nothing but who it is was asked");
    }
}
