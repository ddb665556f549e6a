//! What one commit costs a disk: strace counts the syncs of every member while one client commits, one commit after the other.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use tokio::time::Instant;

use super::Peer;
use super::process::Process;
use super::site::Kind;
use super::site::MEMBERS;
use super::site::Site;

const PROGRAM: &str = "/usr/bin/strace";
/// So long after it was started, a strace has attached and seen a sync.
const ATTACHED_WITHIN: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub struct SyncsArgs {
    /// Commits that are counted
    #[arg(long, default_value_t = 200)]
    commits: usize,
}

/// One strace on one member; it lets go when it is dropped.
struct Tracer {
    output: PathBuf,
    _strace: Process,
}

impl Tracer {
    fn attach(dir: &Path, member: usize, process: u32) -> anyhow::Result<Tracer> {
        let output = dir.join(format!("strace-{member}.txt"));
        let _ = std::fs::remove_file(&output);
        let mut command = Command::new(PROGRAM);
        command.args(["-f", "-q", "-e", "trace=fsync,fdatasync", "-p", &process.to_string(), "-o"]).arg(&output);
        Ok(Tracer { output, _strace: Process::start(command, &dir.join("strace.log"))? })
    }

    fn syncs(&self) -> usize {
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        // A call that was interrupted by another thread's line is told twice; the second time without its bracket.
        text.lines().filter(|line| line.contains("sync(")).count()
    }
}

pub async fn run(args: &SyncsArgs, dir: &Path, peer: Option<Peer>) -> anyhow::Result<()> {
    if !Path::new(PROGRAM).exists() {
        bail!("{PROGRAM} is not here: apt-get install strace");
    }
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header([
        "site",
        "commits",
        "syncs a commit: leader",
        "followers",
        "syncs a second, idle: leader",
        "followers",
    ]);
    for kind in Kind::beside(peer) {
        let site = Site::start(kind, dir).await?;
        let leader = site.leader().await?;
        let tracers: Vec<Tracer> = (0..MEMBERS)
            .zip(site.processes())
            .map(|(member, process)| Tracer::attach(dir, member, process))
            .collect::<anyhow::Result<_>>()?;
        let began = Instant::now();
        while tracers.iter().any(|tracer| tracer.syncs() == 0) {
            if began.elapsed() > ATTACHED_WITHIN {
                bail!("strace saw no sync; see {}", dir.join("strace.log").display());
            }
            site.commit(leader, &format!("attached? {:?}", began.elapsed())).await?;
        }
        let count = || tracers.iter().map(Tracer::syncs).collect::<Vec<_>>();
        let (before, began) = (count(), Instant::now());
        for n in 0..args.commits {
            site.commit(leader, &format!("{n:x<256}")).await?;
        }
        let (after, took) = (count(), began.elapsed());
        tokio::time::sleep(took).await;
        let idle = count();
        let per = |from: &[usize], to: &[usize], all: f64| {
            let of = |member: usize| (to[member] - from[member]) as f64 / all;
            let others = (0..MEMBERS).filter(|member| *member != leader).map(of).sum::<f64>();
            [format!("{:.2}", of(leader)), format!("{:.2}", others / (MEMBERS - 1) as f64)]
        };
        let [lead, follow] = per(&before, &after, args.commits as f64);
        let [lead_idle, follow_idle] = per(&after, &idle, took.as_secs_f64());
        table.add_row([kind.name().to_owned(), args.commits.to_string(), lead, follow, lead_idle, follow_idle]);
    }
    println!("{table}");
    Ok(())
}
