//! A fresh lab with an operator on it: commands in hosts, disturbances, witnesses, and waiting with a deadline.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::Value;

use super::StoryOptions;
use super::memory::MOST_BEYOND_RAM_MIB;
use crate::clock;
use crate::control;
use crate::control::LinkChange;
use crate::control::PowerAction;
use crate::control::Request;
use crate::lifecycle;
use crate::paths::LabDir;
use crate::state::HostId;
use crate::state::LabConfig;

/// Between two looks at something that is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A host boots in 15 to 20 s on two cores; a boot that takes longer than this has been stopped by the emulator.
const UP_WITHIN_S: u64 = 90;
const BOOT_TRIES: u32 = 3;
/// What a host's kernel writes to its serial line when the emulation of nested guests has broken it.
const EMULATOR_SAYS: [&str; 2] = ["Kernel panic", "soft lockup"];

/// What a program in a host printed, and its exit code.
pub struct Finished {
    pub code: i64,
    pub stdout: String,
    pub stderr: String,
}

/// A line of a guest's console by the lab's clock.
#[derive(Debug, Clone, Deserialize)]
pub struct ConsoleLine {
    pub t_ns: u64,
    pub vm: String,
    pub line: String,
}

/// A write to a shared disk by the lab's clock.
#[derive(Debug, Clone, Deserialize)]
pub struct DiskWrite {
    pub t_ns: u64,
    pub host: u8,
    #[serde(default)]
    pub head: String,
}

impl DiskWrite {
    /// The guest's stamp `epoch=7 boot=1a2b3c4d n=12`, if this write is one.
    pub fn stamp(&self) -> Option<(u64, &str, u64)> {
        let fields: BTreeMap<&str, &str> =
            self.head.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        Some((
            fields.get("epoch")?.parse().ok()?,
            fields.get("boot")?,
            fields.get("n")?.trim_end_matches('.').parse().ok()?,
        ))
    }
}

pub struct Stage {
    pub dir: LabDir,
    hosts: u8,
    /// Of each host.
    pub cpus: u32,
    started: Instant,
    /// Print each command and what it said, as a terminal would show it.
    pub echo: bool,
    /// The most that a vmm had beyond its guest's RAM when the guest was up, MiB. `None`: no guest was.
    beyond_ram_mib: Cell<Option<f64>>,
}

impl Stage {
    pub fn weighed(&self, beyond_ram_mib: f64) {
        let most = self.beyond_ram_mib.get().map_or(beyond_ram_mib, |most| most.max(beyond_ram_mib));
        self.beyond_ram_mib.set(Some(most));
    }

    /// The promise that holds of every story with a guest.
    pub fn vmms_were_light(&self) -> Result<()> {
        let Some(most) = self.beyond_ram_mib.get() else { return Ok(()) };
        println!("\nmost beyond guest RAM in a vmm: {most:.2} MiB, promised {MOST_BEYOND_RAM_MIB} MiB");
        ensure!(most <= MOST_BEYOND_RAM_MIB, "a vmm has {most:.2} MiB beyond guest RAM");
        Ok(())
    }

    /// Brings a fresh lab up.
    pub async fn set(dir: &LabDir, hosts: u8, cpus: u32, with_qemu: bool, options: &StoryOptions) -> Result<Stage> {
        let config = LabConfig {
            hosts,
            accelerator: options.accel.resolve()?,
            memory_mib: 2048,
            cpus,
            ignore_flush: options.ignore_flush,
            netns: format!("quorate-lab-{}", dir.tag()),
        };
        let (started, beyond_ram_mib) = (Instant::now(), Cell::new(None));
        let stage = Stage { dir: dir.clone(), hosts, cpus, started, echo: true, beyond_ram_mib };
        lifecycle::up(dir, config, &lifecycle::own_directory()?, with_qemu, 180).await?;
        Ok(stage)
    }

    /// Takes the lab down; a story that failed says so after showing what its hosts logged last.
    pub async fn leave(self, told: Result<()>, keep: bool) -> Result<()> {
        if let Err(error) = &told {
            eprintln!("\nlab: the story broke off: {error:#}");
            for host in self.hosts() {
                let log = std::fs::read_to_string(self.dir.serial_log(host)).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(15).collect();
                eprintln!("--- last lines of {host}'s serial log");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
                let logs = "tail -n 20 /var/log/hostd.log /run/quorate/vm/*/vmm.log 2>/dev/null | cut -c1-300";
                match self.run(host, &["/bin/sh", "-c", logs]).await {
                    Ok(said) => eprint!("{}", said.stdout),
                    Err(error) => eprintln!("its logs cannot be read: {error:#}"),
                }
            }
        }
        if keep {
            println!("the lab stays up; `lab down` ends it");
        } else {
            lifecycle::down(&self.dir, false)?;
        }
        told
    }

    pub fn hosts(&self) -> impl Iterator<Item = HostId> + use<> {
        (1..=self.hosts).map(HostId)
    }

    pub fn host_count(&self) -> usize {
        usize::from(self.hosts)
    }

    pub fn say(&self, text: &str) {
        println!("\n[{:6.1} s] {text}", self.started.elapsed().as_secs_f64());
    }

    async fn ask(&self, request: Request) -> Result<Value> {
        control::ask(&self.dir.control_socket(), &request, &mut |_| {}).await
    }

    /// Changes a host's power, and waits until it is up if that is where it goes. The emulator now and then stops a host
    /// in its boot (docs/operations/lab.md): its power is then cycled, and said.
    pub async fn power(&self, host: HostId, action: PowerAction) -> Result<()> {
        if !matches!(action, PowerAction::On | PowerAction::Reset) {
            self.ask(Request::Power { host, action, wait_s: None }).await?;
            return Ok(());
        }
        let mut come_up = self.ask(Request::Power { host, action, wait_s: Some(UP_WITHIN_S) }).await;
        for _ in 1..BOOT_TRIES {
            let Err(error) = &come_up else { break };
            println!("  {host} did not come up ({}); its power is cycled", first_line(error));
            self.ask(Request::Power { host, action: PowerAction::Off, wait_s: None }).await?;
            come_up = self.ask(Request::Power { host, action: PowerAction::On, wait_s: Some(UP_WITHIN_S) }).await;
        }
        come_up.map(drop)
    }

    /// The boot in which each host is, for [`Self::revive`].
    pub async fn boots(&self) -> Result<BTreeMap<HostId, String>> {
        let mut boots = BTreeMap::new();
        for host in self.hosts() {
            boots.insert(host, self.sh(host, "cat /proc/sys/kernel/random/boot_id").await?);
        }
        Ok(boots)
    }

    /// Cycles the power of each host that the emulator stopped, which shows in that nothing in it answers; one whose kernel
    /// panicked for it has booted by itself since `before`, where no story did it. Whether there was any.
    pub async fn revive(&self, before: Option<&BTreeMap<HostId, String>>) -> Result<bool> {
        let mut revived = false;
        for host in self.hosts() {
            if let Ok(boot) = self.sh(host, "cat /proc/sys/kernel/random/boot_id").await {
                let log = std::fs::read_to_string(self.dir.serial_log(host)).unwrap_or_default();
                let panicked = EMULATOR_SAYS.iter().any(|words| log.contains(words));
                if panicked && before.is_some_and(|before| before.get(&host) != Some(&boot)) {
                    revived = true;
                    println!("  the emulator stopped {host}, whose kernel panicked and booted again");
                    self.hostd_answers(host).await?;
                }
                continue;
            }
            revived = true;
            println!("  the emulator stopped {host}; its power is cycled");
            self.power(host, PowerAction::Off).await?;
            self.power(host, PowerAction::On).await?;
            self.hostd_answers(host).await?;
        }
        Ok(revived)
    }

    pub async fn link(&self, host: HostId, change: LinkChange) -> Result<()> {
        self.ask(Request::Net { host, change }).await?;
        Ok(())
    }

    pub async fn hang_disk(&self, host: HostId, export: &str, hang: bool) -> Result<()> {
        self.ask(Request::Disk { host, export: export.to_owned(), hang }).await?;
        Ok(())
    }

    /// Copies a file into a host.
    pub async fn push(&self, host: HostId, from: &Path, to: &str) -> Result<()> {
        let source = from.display().to_string();
        self.ask(Request::Push { host, source, destination: to.to_owned() }).await?;
        Ok(())
    }

    /// Runs a program in a host.
    pub async fn run(&self, host: HostId, argv: &[&str]) -> Result<Finished> {
        let argv: Vec<String> = argv.iter().map(|word| (*word).to_owned()).collect();
        let what = argv.join(" ");
        let answer = self.ask(Request::Exec { host, argv, input: String::new(), timeout_s: 90 }).await;
        let answer = answer.with_context(|| format!("run on {host}: {what}"))?;
        let text = |field: &str| -> Result<String> {
            let bytes = BASE64.decode(answer[field].as_str().unwrap_or_default())?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Finished {
            code: answer["exit_code"].as_i64().context("no exit code")?,
            stdout: text("stdout")?,
            stderr: text("stderr")?,
        })
    }

    /// Runs a line of shell in a host, which must succeed.
    pub async fn sh(&self, host: HostId, line: &str) -> Result<String> {
        let done = self.run(host, &["/bin/sh", "-c", line]).await?;
        if done.code != 0 {
            bail!("{line:?} on {host} ended with {}: {}{}", done.code, done.stdout, done.stderr);
        }
        Ok(done.stdout)
    }

    /// Runs `quorate` in a host as an operator would, shows it, and lets it succeed or fail.
    pub async fn try_quorate(&self, host: HostId, arguments: &[&str]) -> Result<Finished> {
        let done = self.try_quorate_quietly(host, arguments).await?;
        if self.echo {
            println!("{host}# quorate {}", shell_words(arguments));
            done.stdout.lines().chain(done.stderr.lines()).for_each(|line| println!("  {line}"));
        }
        Ok(done)
    }

    /// The same, shown to nobody.
    pub async fn try_quorate_quietly(&self, host: HostId, arguments: &[&str]) -> Result<Finished> {
        let argv: Vec<&str> = std::iter::once("/usr/bin/quorate").chain(arguments.iter().copied()).collect();
        self.run(host, &argv).await
    }

    /// The same, which must succeed; its output.
    pub async fn quorate(&self, host: HostId, arguments: &[&str]) -> Result<String> {
        let done = self.try_quorate(host, arguments).await?;
        if done.code != 0 {
            bail!("`quorate {}` on {host} ended with {}: {}", arguments.join(" "), done.code, done.stderr.trim());
        }
        Ok(done.stdout)
    }

    /// Runs `quorate -o json` quietly and decodes what it says.
    pub async fn query(&self, host: HostId, arguments: &[&str]) -> Result<Value> {
        let argv: Vec<&str> = ["/usr/bin/quorate", "-o", "json"].into_iter().chain(arguments.iter().copied()).collect();
        let done = self.run(host, &argv).await?;
        if done.code != 0 {
            bail!("`quorate {}` on {host} ended with {}: {}", arguments.join(" "), done.code, done.stderr.trim());
        }
        serde_json::from_str(&done.stdout).with_context(|| format!("`quorate {}` printed no JSON", arguments.join(" ")))
    }

    /// Looks again and again until there is an answer; an error of a look is an answer that is not there yet.
    pub async fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let last = match look().await {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => None,
                Err(error) => Some(error),
            };
            if Instant::now() > deadline {
                let why = last.map(|error| format!(" ({error:#})")).unwrap_or_default();
                bail!("{what}: not within {:.0} s{why}", limit.as_secs_f64());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until hostd on this host answers.
    pub async fn hostd_answers(&self, host: HostId) -> Result<()> {
        let what = format!("hostd on {host} answers");
        self.until(&what, Duration::from_secs(60), async || self.query(host, &["status"]).await.map(Some)).await?;
        Ok(())
    }

    /// Forms the cluster: `init` on the first host, one token and one `join` for each other. Seconds each join took.
    pub async fn form_cluster(&self) -> Result<Vec<f64>> {
        for host in self.hosts() {
            self.hostd_answers(host).await?;
        }
        let first = HostId(1);
        self.quorate(first, &["init"]).await?;
        let mut took = Vec::new();
        for host in self.hosts().skip(1) {
            let token = self.new_token(first).await?;
            let begun = Instant::now();
            self.quorate(host, &["join", &token]).await?;
            took.push(begun.elapsed().as_secs_f64());
        }
        self.voters_reach(self.host_count()).await?;
        Ok(took)
    }

    /// A fresh join token, as `quorate token create` prints it on its own line.
    pub async fn new_token(&self, host: HostId) -> Result<String> {
        let said = self.quorate(host, &["token", "create", "--ttl", "3h"]).await?;
        let token = said.split_whitespace().find(|word| word.starts_with("qrt1."));
        token.map(str::to_owned).context("`quorate token create` printed no token")
    }

    pub async fn voters_reach(&self, voters: usize) -> Result<()> {
        let what = format!("{voters} hosts vote");
        self.until(&what, Duration::from_secs(60), async || {
            let status = self.query(HostId(1), &["status"]).await?;
            Ok((status["member"]["voters"].as_array().map_or(0, Vec::len) == voters).then_some(()))
        })
        .await
    }

    /// No host is missed by the leader: each can be given a guest.
    pub async fn hosts_are_up(&self) -> Result<()> {
        self.until("all hosts are up", Duration::from_secs(60), async || {
            let listed = self.query(HostId(1), &["host", "list"]).await?;
            let hosts = listed["items"].as_array().context("`host list` lists nothing")?;
            Ok(hosts.iter().all(|host| host["status"] == "Up").then_some(()))
        })
        .await
    }

    /// The host that leads, as `asked` sees it.
    pub async fn leader(&self, asked: HostId) -> Result<HostId> {
        self.until("there is a leader", Duration::from_secs(30), async || {
            let status = self.query(asked, &["status"]).await?;
            Ok(status["member"]["leader_name"].as_str().and_then(|name| name.parse().ok()))
        })
        .await
    }

    /// Console lines that came from guests of `host`.
    pub fn console(&self, host: HostId) -> Result<Vec<ConsoleLine>> {
        read_witness(&self.dir.console_witness(host))
    }

    /// Waits for a console line that holds `text`, at or after `since_ns` of the lab's clock.
    pub async fn console_says(&self, host: HostId, text: &str, since_ns: u64, limit: Duration) -> Result<ConsoleLine> {
        let what = format!("a guest on {host} says {text:?}");
        self.until(&what, limit, async || {
            let lines = self.console(host)?;
            Ok(lines.into_iter().find(|line| line.t_ns >= since_ns && line.line.contains(text)))
        })
        .await
    }

    /// Writes that reached a shared disk, guests' stamps with them.
    pub fn writes(&self, export: &str) -> Result<Vec<DiskWrite>> {
        read_witness(&self.dir.write_witness(export))
    }

    /// One counter a line that a guest of `host` printed, at or after `since_ns`.
    pub fn counters(&self, host: HostId, vm: &str, since_ns: u64) -> Result<Vec<Counter>> {
        let lines = self.console(host)?;
        Ok(lines.iter().filter(|line| line.t_ns >= since_ns && line.vm == vm).filter_map(Counter::parse).collect())
    }

    pub fn now_ns(&self) -> u64 {
        clock::now_ns()
    }
}

/// Records of a witness file; none where it does not exist yet, and a last line in the making is left out.
pub fn read_witness<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let Ok(file) = std::fs::File::open(path) else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line.with_context(|| format!("read {}", path.display()))?;
        if let Ok(record) = serde_json::from_str(&line) {
            records.push(record);
        }
    }
    Ok(records)
}

/// `counter boot=1a2b3c4d n=12 up=13.37`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    pub t_ns: u64,
    pub boot: String,
    pub n: u64,
}

impl Counter {
    pub fn parse(line: &ConsoleLine) -> Option<Counter> {
        let rest = line.line.trim().strip_prefix("counter ")?;
        let fields: BTreeMap<&str, &str> = rest.split(' ').filter_map(|word| word.split_once('=')).collect();
        Some(Counter { t_ns: line.t_ns, boot: (*fields.get("boot")?).to_owned(), n: fields.get("n")?.parse().ok()? })
    }
}

/// The largest time between two counter lines that follow each other, in seconds, with its numbers.
pub fn largest_gap(counters: &[Counter]) -> Option<(f64, u64, u64)> {
    let gap = |pair: &[Counter]| ((pair[1].t_ns - pair[0].t_ns) as f64 / 1e9, pair[0].n, pair[1].n);
    counters.windows(2).map(gap).max_by(|a, b| a.0.total_cmp(&b.0))
}

/// An error's first line: those of the lab carry the ends of logs after it.
pub fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

fn shell_words(words: &[&str]) -> String {
    let quoted = words.iter().map(|word| {
        let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:@,%+".contains(c));
        if plain { (*word).to_owned() } else { format!("'{word}'") }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(t_s: u64, text: &str) -> ConsoleLine {
        ConsoleLine { t_ns: t_s * 1_000_000_000, vm: "v".to_owned(), line: text.to_owned() }
    }

    #[test]
    fn the_largest_gap_names_the_lines_around_it() {
        let lines = [
            line(1, "counter boot=ab n=1 up=1.0"),
            line(2, "counter boot=ab n=2 up=2.0\r"),
            line(3, "something else"),
            line(5, "counter boot=ab n=3 up=3.0"),
        ];
        let counters: Vec<Counter> = lines.iter().filter_map(Counter::parse).collect();
        assert_eq!(counters.len(), 3);
        assert_eq!(largest_gap(&counters), Some((3.0, 2, 3)));
    }

    #[test]
    fn commands_are_shown_as_one_would_type_them() {
        assert_eq!(
            shell_words(&["vm", "create", "--cmdline", "console=ttyS0 quiet"]),
            "vm create --cmdline 'console=ttyS0 quiet'"
        );
    }
}
