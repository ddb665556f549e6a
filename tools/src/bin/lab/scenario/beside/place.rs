//! What a turn needs of its host: a disk in memory, taps in the bridge. Both programs get the same, opened in the same way.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::io::FdFlags;
use rustix::io::fcntl_setfd;

use super::guest::PROGRAM_AT_MIB;

const LOOP_DEVICE: &str = "/dev/loop0";
const DISK_MIB: u64 = PROGRAM_AT_MIB + 64;
/// Of the host.
const BRIDGE: &str = "br0";
const TUN: &str = "/dev/net/tun";
/// The kernel puts the lowest free number in.
const TAP_PATTERN: &[u8] = b"btap%d\0";

mod ioctl {
    use nix::libc::c_int;
    // The kernel declares it as writing an int; it takes a struct ifreq, and writes the interface's name back into it.
    nix::ioctl_readwrite_bad!(set_iff, nix::request_code_write!(b'T', 202, size_of::<c_int>()), nix::libc::ifreq);
}

/// A file in the host's memory as a block device: what is behind it is as fast as it can be, and what is before it shows.
pub struct Disk {
    pub device: PathBuf,
    /// Length of the archive behind [`PROGRAM_AT_MIB`] that holds this program and its libraries, for the guest.
    pub program_mib: u64,
}

impl Disk {
    pub fn make(directory: &Path) -> Result<Disk> {
        let path = directory.join("disk");
        let file = File::create(&path).context("create the disk")?;
        file.set_len(DISK_MIB << 20).context("make the disk as long as it is")?;
        let archive = directory.join("program.tar");
        let mut tar = Command::new("tar");
        tar.args(["-c", "-h", "-f"]).arg(&archive).args(own_files()?);
        run(&mut tar)?;
        let length = archive.metadata().context("measure this program's archive")?.len();
        let program_mib = length.div_ceil(1 << 20);
        if PROGRAM_AT_MIB + program_mib > DISK_MIB {
            bail!("this program takes {program_mib} MiB, for which the disk has no room");
        }
        let input = format!("if={}", archive.display());
        let output = format!("of={}", path.display());
        run(Command::new("dd").args([&input, &output, "bs=1M", "conv=notrunc"]).arg(format!("seek={PROGRAM_AT_MIB}")))?;
        std::fs::remove_file(&archive).context("remove this program's archive")?;
        run(Command::new("losetup").arg(LOOP_DEVICE).arg(&path))?;
        Ok(Disk { device: LOOP_DEVICE.into(), program_mib })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// This program and the libraries that it has loaded, which are all that it needs elsewhere.
fn own_files() -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = vec![std::env::current_exe().context("find this program")?];
    let maps = std::fs::read_to_string("/proc/self/maps").context("find this program's libraries")?;
    for path in maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..]))) {
        if !files.contains(&path) {
            files.push(path);
        }
    }
    Ok(files)
}

/// A tap in the host's bridge. Closing every copy of the descriptor removes it.
pub struct Tap {
    descriptor: OwnedFd,
}

impl Tap {
    pub fn plug() -> Result<Tap> {
        let file = File::options().read(true).write(true).open(TUN).with_context(|| format!("open {TUN}"))?;
        // SAFETY: ifreq is plain data; all zeros is an empty name and no flags.
        let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(TAP_PATTERN) {
            *to = *from as nix::libc::c_char;
        }
        // Frames carry the header of virtio-net, as both programs open a tap by themselves.
        let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as nix::libc::c_short;
        // SAFETY: the request lives over the call, and is of the type that the kernel reads and writes.
        unsafe { ioctl::set_iff(file.as_raw_fd(), &mut request) }.context("make a tap")?;
        let name: Vec<u8> = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        let name = String::from_utf8_lossy(&name).into_owned();
        run(Command::new("ip").args(["link", "set", &name, "master", BRIDGE, "up"]))?;
        Ok(Tap { descriptor: file.into() })
    }

    /// Its number, under which a child has it too. The tap is this process's until it is dropped.
    pub fn hand_over(&self) -> Result<RawFd> {
        fcntl_setfd(&self.descriptor, FdFlags::empty()).context("hand a tap over")?;
        Ok(self.descriptor.as_raw_fd())
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
