//! Images: the kernels and first file systems of hosts and guests, made from Debian packages,
//! this machine's libraries and our own binaries, and cached by content below `.lab/images`.
//! Start reading at [`build`]; `host`, `guest` and `root_disk` say what goes in.

mod cpio;
mod guest;
mod host;
mod kernel;
mod modules;
mod packages;
pub mod root_disk;
mod tree;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::paths::LabDir;

/// What a host boots. Kept in `images/current.json` and read at each power on, so that a rebuilt
/// image is picked up by the next power cycle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    pub host_kernel: PathBuf,
    pub host_initrd: PathBuf,
    pub guest_kernel: PathBuf,
    pub guest_initrd: PathBuf,
    /// What the shared disk `root` holds when a lab begins.
    pub root_disk: PathBuf,
}

impl Images {
    pub fn current(dir: &LabDir) -> Result<Self> {
        let path = dir.images().join("current.json");
        let text = std::fs::read(&path)
            .with_context(|| format!("no images in {}: run `lab image`", dir.images().display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged: run `lab image`", path.display()))
    }
}

/// Builds what is missing and answers the set to boot. `binaries` is where cargo put ours.
/// Hosts of the story `beside` hold QEMU too.
pub fn build(dir: &LabDir, binaries: &Path, with_qemu: bool, say: &mut dyn FnMut(&str)) -> Result<Images> {
    std::fs::create_dir_all(dir.images()).with_context(|| format!("create {}", dir.images().display()))?;
    let packages = packages::fetch(dir, say)?;
    let guest = guest::build(dir, &packages, say)?;
    let root = root_disk::build(dir, &packages, say)?;
    let qemu = with_qemu.then(|| packages::fetch_qemu(dir, say)).transpose()?;
    let images = host::build(dir, &packages, &guest, &root, qemu.as_ref(), binaries, say)?;
    let text = serde_json::to_vec_pretty(&images)?;
    crate::paths::write_atomically(&dir.images().join("current.json"), &text)?;
    host::remove_old(dir, &images)?;
    Ok(images)
}

/// Lays a fresh copy of the root disk where the block server looks for it; a disk that a lab has used stays as it is.
pub fn lay_root_disk(images: &Images, at: &Path) -> Result<()> {
    if at.exists() {
        return Ok(());
    }
    let copy = at.with_extension("copy");
    packages::run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(&images.root_disk).arg(&copy))?;
    std::fs::rename(&copy, at).with_context(|| format!("move a root disk to {}", at.display()))
}

/// Packs an archive, or finds the copy that was packed before. The name holds the content's hash.
fn packed(dir: &LabDir, name: &str, archive: &[u8], packer: &[&str]) -> Result<PathBuf> {
    let hash = blake3::hash(archive).to_hex();
    let path = dir.images().join(format!("{name}-{}", &hash[..16]));
    if !path.exists() {
        crate::paths::write_atomically(&path, &pipe(packer, archive)?)?;
    }
    Ok(path)
}

/// Runs a filter over bytes.
fn pipe(command: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {}: install the packages in lab/packages.txt", command[0]))?;
    let mut stdin = child.stdin.take().context("no pipe to the filter")?;
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let output = child.wait_with_output();
        writer.join().ok();
        output
    })?;
    if !output.status.success() {
        bail!("{} failed: {}", command.join(" "), output.status);
    }
    Ok(output.stdout)
}
