//! What `lab` does inside an emulated host: it follows the console files of all guests there and
//! sends each line through the virtio port to the lab's daemon, as `VM<tab>line`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The lines' times are the witness of pauses of a second: 20 ms is short against that, and a
/// look costs some system calls.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Every how many looks the directory is read for new guests.
const RESCAN_EVERY: u32 = 10;
/// A guest may write without ever ending a line; it is sent in pieces.
const MAX_LINE: usize = 8 << 10;
/// Read from one guest before the next has its turn.
const MAX_READ: usize = 64 << 10;

pub fn follow_consoles(root: &Path, port: &Path) -> Result<()> {
    let mut port = File::options().write(true).open(port).with_context(|| format!("open {}", port.display()))?;
    let mut followed: BTreeMap<PathBuf, Followed> = BTreeMap::new();
    // Files that are there already were followed by the process before this one.
    scan(root, &mut followed, true);
    for look in 0u32.. {
        if look % RESCAN_EVERY == 0 {
            scan(root, &mut followed, false);
        }
        let mut gone = Vec::new();
        for (path, file) in &mut followed {
            if look % RESCAN_EVERY == 0 && !path.exists() {
                gone.push(path.clone());
            }
            for line in file.new_lines() {
                let mut record = format!("{}\t", file.vm).into_bytes();
                record.extend_from_slice(&line);
                record.push(b'\n');
                port.write_all(&record).context("write to the lab's console port")?;
            }
        }
        for path in gone {
            followed.remove(&path);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// CLOCK_BOOTTIME, the clock of leases.
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Asks a guest's vmm for its status, past hostd, which may be dead.
pub fn vmm_status(vm: &str) -> Result<String> {
    let path = Path::new("/run/quorate/vm").join(vm).join("vmm/control.sock");
    let mut socket = UnixStream::connect(&path).with_context(|| format!("connect to {}", path.display()))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.write_all(b"{\"id\":1,\"method\":\"status\"}\n")?;
    for line in BufReader::new(socket.take(1 << 20)).lines() {
        let message: serde_json::Value = serde_json::from_str(&line?).context("the vmm's answer is no JSON")?;
        if message["id"] == 1 {
            return Ok(message["result"].to_string());
        }
    }
    bail!("the vmm of {vm} closed the connection without an answer")
}

/// What the API at `server` (`ip:port`) says to a machine that shows this identity's certificate: its status and its
/// sentence, or how the connection ended. The server's own name is not checked: the question is whether it lets us in.
pub fn knock(server: &str, identity: &Path) -> Result<String> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let read = |name: &str| {
        let path = identity.join(name);
        std::fs::read(&path).with_context(|| format!("read {}", path.display()))
    };
    let mut pem = read("host.pem")?;
    pem.extend(read("host.key")?);
    let client = reqwest::Client::builder()
        .identity(reqwest::Identity::from_pem(&pem)?)
        .danger_accept_invalid_certs(true)
        .no_proxy()
        .timeout(Duration::from_secs(10))
        .build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let answer = match client.get(format!("https://{server}/v1/vms")).send().await {
            Ok(answer) => answer,
            Err(error) => return Ok(format!("no connection: {:#}", anyhow::Error::from(error))),
        };
        let status = answer.status();
        Ok(format!("{status}: {}", answer.text().await.unwrap_or_default()))
    })
}

/// Counts the vmm processes of this host again and again until `enough` exists; the most that were there at once.
/// A process counts while its command line is `... vmm run ...`: a start that is refused in time never gets there twice.
pub fn most_vmm_at_once(enough: &Path) -> Result<usize> {
    let mut most = 0;
    while !enough.exists() {
        most = most.max(vmm_processes()?);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(most)
}

fn vmm_processes() -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").context("read /proc")? {
        let path = entry?.path();
        let is_process = path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
        let command = if is_process { std::fs::read(path.join("cmdline")).unwrap_or_default() } else { Vec::new() };
        let mut words = command.split(|byte| *byte == 0);
        count += usize::from(words.next().is_some_and(|it| it.ends_with(b"/vmm")) && words.next() == Some(b"run"));
    }
    Ok(count)
}

struct Followed {
    vm: String,
    file: File,
    position: u64,
    lines: Lines,
}

fn scan(root: &Path, followed: &mut BTreeMap<PathBuf, Followed>, from_the_end: bool) {
    let Ok(entries) = std::fs::read_dir(root) else { return };
    for entry in entries.filter_map(|entry| entry.ok()) {
        let path = entry.path().join("vmm/console.log");
        if followed.contains_key(&path) {
            continue;
        }
        let Ok(mut file) = File::open(&path) else { continue };
        let position = if from_the_end { file.seek(SeekFrom::End(0)).unwrap_or(0) } else { 0 };
        let vm = entry.file_name().to_string_lossy().replace(['\t', '\n'], "?");
        followed.insert(path, Followed { vm, file, position, lines: Lines::default() });
    }
}

impl Followed {
    /// Complete lines that were appended since the last look.
    fn new_lines(&mut self) -> Vec<Vec<u8>> {
        // A file that became shorter was begun anew.
        if self.file.metadata().is_ok_and(|metadata| metadata.len() < self.position) {
            self.position = 0;
            let _ = self.file.seek(SeekFrom::Start(0));
        }
        let mut bytes = Vec::new();
        match Read::by_ref(&mut self.file).take(MAX_READ as u64).read_to_end(&mut bytes) {
            Ok(count) => self.position += count as u64,
            Err(_) => return Vec::new(),
        }
        self.lines.push(&bytes)
    }
}

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => lines.push(std::mem::take(&mut self.partial)),
                b'\r' => {}
                other => {
                    self.partial.push(*other);
                    if self.partial.len() == MAX_LINE {
                        lines.push(std::mem::take(&mut self.partial));
                    }
                }
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_and_bounded() {
        let mut lines = Lines::default();
        assert!(lines.push(b"counter n=").is_empty());
        assert_eq!(lines.push(b"1\r\ncounter n=2\nco"), [b"counter n=1".to_vec(), b"counter n=2".to_vec()]);
        assert_eq!(lines.push(&vec![b'x'; MAX_LINE]).len(), 1);
    }

    #[test]
    fn a_guest_that_appears_later_is_followed_from_its_first_line() {
        let root = tempfile::tempdir().expect("a directory");
        let console = |vm: &str| {
            let directory = root.path().join(vm).join("vmm");
            std::fs::create_dir_all(&directory).expect("a guest's directory");
            File::options().create(true).append(true).open(directory.join("console.log")).expect("a console")
        };
        console("old").write_all(b"before\n").expect("write");
        let mut followed = BTreeMap::new();
        scan(root.path(), &mut followed, true);
        console("old").write_all(b"after\n").expect("write");
        console("new").write_all(b"first\n").expect("write");
        scan(root.path(), &mut followed, false);
        let seen: Vec<_> = followed
            .values_mut()
            .flat_map(|file| {
                let vm = file.vm.clone();
                file.new_lines().into_iter().map(move |line| (vm.clone(), String::from_utf8(line).expect("text")))
            })
            .collect();
        assert_eq!(seen, [("new".to_owned(), "first".to_owned()), ("old".to_owned(), "after".to_owned())]);
    }
}
