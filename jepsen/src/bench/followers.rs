//! What hosts beyond seven cost a site: three voters on the disk with fsync on, and hundreds of hosts that pull, all in one process
//! over a network that takes no time (DESIGN §4, hazard H24). The processor time is that of all of them: what a member pays for a
//! follower is less.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use consensus::node::NodeConfig;
use consensus::node::Role;
use consensus::platform::Platform;
use consensus::store::StoreConfig;
use consensus::store::memory_disk::MemoryDisk;
use consensus::transport::Peer;
use consensus::transport::memory::Switchboard;
use hdrhistogram::Histogram;
use nix::sys::resource::UsageWho;
use nix::sys::resource::getrusage;
use nix::sys::time::TimeValLike;
use statemachine::HostId;
use statemachine::VmId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::state::Created;
use statemachine::state::TokenPurpose;

use super::process::resident_mib;
use super::words;
use super::words::FIRST;
use super::words::Node;

const VOTERS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub struct FollowersArgs {
    /// Pulling hosts beside the three voters, one measurement each; a site has at most 500 hosts
    #[arg(long, value_delimiter = ',', default_values_t = [0, 200, 497])]
    followers: Vec<usize>,
    /// Commits a second, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [10, 50])]
    rates: Vec<u64>,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Bytes that each commit carries
    #[arg(long, default_value_t = 256)]
    bytes: usize,
}

struct Site {
    switchboard: Switchboard,
    voters: Vec<Node>,
    followers: Vec<Node>,
    hosts: usize,
    vm: VmId,
    /// No two changes say the same.
    numbers: AtomicU64,
}

fn request(actor: Actor, command: Command) -> Request {
    Request { actor, origin: FIRST, idempotency: None, command }
}

fn by_root(command: Command) -> Request {
    request(Actor::Root(FIRST), command)
}

impl Site {
    async fn begin(dir: &Path) -> anyhow::Result<Site> {
        let switchboard = Switchboard::new();
        let first = start(&switchboard, FIRST, 1, Some(dir)).await?;
        first.initialise(by_root(words::site_init())).await?;
        let defined = first.propose(by_root(words::vm_define(0))).await?;
        let Some(Created::Vm(vm)) = defined.created else { bail!("a definition creates a VM") };
        let mut site =
            Site { switchboard, voters: vec![first], followers: Vec::new(), hosts: 1, vm, numbers: AtomicU64::new(1) };
        for _ in 1..VOTERS {
            let (host, number) = site.join().await?;
            site.voters.push(start(&site.switchboard, host, number, Some(dir)).await?);
        }
        let deadline = Instant::now() + PATIENCE;
        while site.leader()?.status().voters.len() < VOTERS {
            let _ = site.leader()?.reconcile_membership().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            if Instant::now() > deadline {
                bail!("three hosts did not become voters");
            }
        }
        Ok(site)
    }

    fn leader(&self) -> anyhow::Result<&Node> {
        let leads = |node: &&Node| node.leadership().borrow().ready_session().is_some();
        self.voters.iter().find(leads).context("nobody leads")
    }

    async fn join(&mut self) -> anyhow::Result<(HostId, usize)> {
        self.hosts += 1;
        let number = self.hosts;
        let mut secret_hash = [7; 32];
        secret_hash[..8].copy_from_slice(&(number as u64).to_le_bytes());
        let token =
            Command::TokenCreate { purpose: TokenPurpose::Join, secret_hash, ttl_ms: 3_600_000, note: String::new() };
        let leader = self.leader()?;
        leader.propose(by_root(token)).await?;
        let join = Command::HostJoin { secret_hash, candidate: words::candidate(number) };
        match leader.propose(request(Actor::Joiner, join)).await?.created {
            Some(Created::Host(host)) => Ok((host, number)),
            other => bail!("a join creates a host, not {other:?}"),
        }
    }

    /// Adds pulling hosts until there are so many, all of them up to date.
    async fn grow(&mut self, followers: usize) -> anyhow::Result<()> {
        while self.followers.len() < followers {
            let (host, number) = self.join().await?;
            self.followers.push(start(&self.switchboard, host, number, None).await?);
        }
        self.level().await?;
        let outside = |node: &Node| node.status().role == Role::Puller;
        if !self.followers.iter().all(outside) {
            bail!("a host that should pull does not");
        }
        Ok(())
    }

    /// Waits until every host has what the leader has; says how long that took.
    async fn level(&self) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let head = self.leader()?.fold().head.seq;
        for node in self.followers.iter().chain(&self.voters) {
            node.wait_applied(head, PATIENCE).await?;
        }
        Ok(began.elapsed())
    }

    /// Commits at a steady rate, whatever the site makes of it: how long they took, and how many got no answer that stands, as when
    /// the leader lost its lead.
    async fn load(&self, rate: u64, seconds: u64, bytes: usize) -> anyhow::Result<(Histogram<u64>, usize)> {
        let leader = self.leader()?.clone();
        let mut due = tokio::time::interval(Duration::from_secs(1) / rate as u32);
        let mut commits = tokio::task::JoinSet::new();
        for _ in 0..rate * seconds {
            let asked = due.tick().await;
            let (node, vm) = (leader.clone(), self.vm);
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            commits.spawn(async move {
                let answered = node.propose(by_root(words::vm_change(vm, number, bytes))).await;
                answered.map(|_| asked.elapsed())
            });
        }
        let (mut took_us, mut errors) = (Histogram::new(3)?, 0);
        while let Some(commit) = commits.join_next().await {
            match commit? {
                Ok(took) => took_us.record(took.as_micros() as u64)?,
                Err(error) => {
                    errors += 1;
                    tracing::debug!("a commit without an answer: {error}");
                }
            }
        }
        Ok((took_us, errors))
    }
}

/// A voter on the disk, or a host that pulls and keeps what it has in memory, since it is its CPU time that is asked for here.
async fn start(switchboard: &Switchboard, host: HostId, number: usize, dir: Option<&Path>) -> anyhow::Result<Node> {
    let any = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let data_dir = dir.map_or("/data".into(), |dir| dir.join(format!("host{number}")));
    let mut config = NodeConfig::new(data_dir, any, words::address(number));
    config.peers = vec![Peer { host: FIRST, address: words::address(1) }];
    let mut platform = Platform::real();
    if dir.is_none() {
        platform.disk = Arc::new(MemoryDisk::new());
        config.store =
            StoreConfig { wal_segment_bytes: 64 << 10, event_segment_bytes: 256 << 10, ..StoreConfig::default() };
    }
    Ok(Node::start_on(config, platform, switchboard.transport(host)).await?)
}

pub async fn run(args: &FollowersArgs, dir: &Path) -> anyhow::Result<()> {
    let dir = std::path::absolute(dir)?.join("followers");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    let mut site = Site::begin(&dir).await?;
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header([
        "followers",
        "commits/s",
        "p50 ms",
        "p99 ms",
        "errors",
        "last follower level after s",
        "processors",
        "resident MiB",
    ]);
    for followers in &args.followers {
        site.grow(*followers).await?;
        for rate in &args.rates {
            let (began, cpu) = (Instant::now(), cpu_time()?);
            let (took_us, errors) = site.load(*rate, args.seconds, args.bytes).await?;
            let processors = (cpu_time()? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
            let level = site.level().await?;
            let ms = |quantile: f64| format!("{:.2}", took_us.value_at_quantile(quantile) as f64 / 1000.0);
            let resident = resident_mib(std::process::id()).map_or(String::new(), |mib| format!("{mib:.0}"));
            table.add_row([
                followers.to_string(),
                rate.to_string(),
                ms(0.5),
                ms(0.99),
                errors.to_string(),
                format!("{:.2}", level.as_secs_f64()),
                format!("{processors:.2}"),
                resident,
            ]);
            let p99 = ms(0.99);
            eprintln!(
                "{followers} followers, {rate} commits/s: p99 {p99} ms, {errors} errors, {processors:.2} processors"
            );
        }
    }
    println!("{table}");
    Ok(())
}

/// Processor time of this process so far: every host of the site.
fn cpu_time() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let spent = usage.user_time() + usage.system_time();
    Ok(Duration::from_micros(spent.num_microseconds() as u64))
}
