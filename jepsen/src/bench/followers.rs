//! What hosts beyond seven cost a site: three voters on the disk with fsync on, and hundreds of hosts that pull, all in one process
//! over a network that takes no time (DESIGN §4, hazard H24). The pulling hosts share the two cores with the voters, so a real
//! site pays less.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
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
use statemachine::HostId;
use statemachine::Seq;
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
    /// Pulling hosts, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [0, 200, 500])]
    followers: Vec<usize>,
    /// Clients at once, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64])]
    clients: Vec<usize>,
    #[arg(long, default_value_t = 5)]
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
        let mut site = Site { switchboard, voters: vec![first], followers: Vec::new(), hosts: 1, vm };
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

    /// Commits by clients in a closed loop.
    async fn load(&self, clients: usize, seconds: u64, bytes: usize) -> anyhow::Result<u64> {
        let done = Arc::new(AtomicBool::new(false));
        let numbers = Arc::new(AtomicU64::new(1));
        let tasks: Vec<_> = (0..clients)
            .map(|_| {
                let (node, done, numbers, vm) = (self.leader().cloned(), done.clone(), numbers.clone(), self.vm);
                tokio::spawn(async move {
                    let node = node?;
                    let mut commits = 0;
                    while !done.load(Ordering::Relaxed) {
                        let n = numbers.fetch_add(1, Ordering::Relaxed);
                        node.propose(by_root(words::vm_change(vm, n, bytes))).await?;
                        commits += 1;
                    }
                    anyhow::Ok(commits)
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        done.store(true, Ordering::Relaxed);
        let mut commits = 0;
        for task in tasks {
            commits += task.await??;
        }
        Ok(commits)
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
        "clients",
        "commits/s",
        "to no follower",
        "all level after s",
        "resident MiB",
    ]);
    let mut alone: Vec<f64> = Vec::new();
    for followers in &args.followers {
        site.grow(*followers).await?;
        for (place, clients) in args.clients.iter().enumerate() {
            let before = site.leader()?.fold().head.seq;
            let began = Instant::now();
            let commits = site.load(*clients, args.seconds, args.bytes).await?;
            let rate = commits as f64 / began.elapsed().as_secs_f64();
            let level = site.level().await?;
            if site.leader()?.fold().head.seq < Seq(before.0 + commits) {
                bail!("commits were answered and are not there");
            }
            if alone.len() <= place {
                alone.push(rate);
            }
            let resident = resident_mib(std::process::id()).map_or(String::new(), |mib| format!("{mib:.0}"));
            table.add_row([
                followers.to_string(),
                clients.to_string(),
                format!("{rate:.0}"),
                format!("{:.2}", rate / alone[place]),
                format!("{:.2}", level.as_secs_f64()),
                resident,
            ]);
            eprintln!("{followers} followers, {clients} clients: {rate:.0} commits/s");
        }
    }
    println!("{table}");
    Ok(())
}
