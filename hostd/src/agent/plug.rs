//! Devices of a guest that runs: handed to its vmm, or asked back. Blocking; called on a thread of the blocking pool.

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use statemachine::ids::VmId;
use statemachine::state::Nic;
use thiserror::Error;
use vmm_control::Call;
use vmm_control::ErrorCode;
use vmm_control::Fault;
use vmm_control::Message;
use vmm_control::Request;
use vmm_control::config::MAX_MTU;
use vmm_control::descriptor::send_line;
use vmm_control::protocol::MAX_LINE_BYTES;

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
    #[error("cannot talk to the vmm at {path}: {source}")]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the vmm refused: {0}")]
    Refused(#[source] Fault),
    #[error("the vmm said what this hostd does not understand: {0}")]
    Nonsense(String),
}

/// Gives the guest a device. When this returns, its vmm opens it, or never will: the answer is waited for without end, because a question
/// that was given up could be carried out after all, when the disk belongs to somebody else (S2). Whether the guest gets the device, the
/// vmm's status and notices say.
pub fn plug(launcher: &Launcher, vm: VmId, device: &Device) -> Result<(), PlugError> {
    let line = Line::to(launcher, vm);
    match device {
        Device::Disk(disk) => {
            let config = guest_files::disk_config(disk, &launcher.allowed_paths)?;
            line.ask(Call::PlugDisk { config: Box::new(config) }, None)
        }
        Device::Nic(nic) => plug_nic(&line, vm, nic),
    }
}

fn plug_nic(line: &Line, vm: VmId, nic: &Nic) -> Result<(), PlugError> {
    let mut config = guest_files::nic_config(nic, vm);
    let failed = |source| PlugError::Nic { id: nic.id.clone(), source };
    let tap = Tap::plug(&nic.bridge, config.mac).map_err(failed)?;
    config.mtu = u16::try_from(tap.mtu).unwrap_or(MAX_MTU).min(MAX_MTU);
    line.ask(Call::PlugNic { config: Box::new(config) }, Some(&tap))
}

/// Asks the guest for a device. One that is gone already is what was wanted.
pub fn unplug(launcher: &Launcher, vm: VmId, device: &str) -> Result<(), PlugError> {
    match Line::to(launcher, vm).ask(Call::Unplug { id: device.to_owned(), force: false }, None) {
        Err(PlugError::Refused(fault)) if fault.code == ErrorCode::NotFound => Ok(()),
        other => other,
    }
}

/// A connection of its own for one question, because a descriptor may go with it.
struct Line {
    path: PathBuf,
}

impl Line {
    fn to(launcher: &Launcher, vm: VmId) -> Line {
        Line { path: RunDir::of(&launcher.vms_dir, vm).control_socket() }
    }

    fn ask(&self, call: Call, tap: Option<&Tap>) -> Result<(), PlugError> {
        let failed = |source| PlugError::Socket { path: self.path.clone(), source };
        let answer = self.exchange(&Request { id: 1, call }.encode(), tap).map_err(failed)?;
        let reply = answer.iter().find_map(|line| match Message::decode(line) {
            Ok(Message::Notice(_)) => None,
            Ok(Message::Reply(reply)) => Some(Ok(reply)),
            Err(error) => Some(Err(PlugError::Nonsense(error.to_string()))),
        });
        let reply = reply.unwrap_or_else(|| Err(PlugError::Nonsense("nothing but notices".to_owned())))?;
        reply.error.map_or(Ok(()), |fault| Err(PlugError::Refused(fault)))
    }

    /// Lines until one that is a reply.
    fn exchange(&self, request: &[u8], tap: Option<&Tap>) -> io::Result<Vec<Vec<u8>>> {
        let mut stream = UnixStream::connect(&self.path)?;
        match tap {
            Some(tap) => send_line(&stream, request, tap.descriptor.as_fd())?,
            None => io::Write::write_all(&mut stream, request)?,
        }
        let mut reader = BufReader::new(stream);
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            if (&mut reader).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line)? == 0 {
                return Ok(lines);
            }
            let is_reply = !matches!(Message::decode(&line), Ok(Message::Notice(_)));
            lines.push(line);
            if is_reply || lines.len() > NOTICES_MAX {
                return Ok(lines);
            }
        }
    }
}

/// That may come before the answer.
const NOTICES_MAX: usize = 64;
