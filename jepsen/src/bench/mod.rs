//! Measurements beside a peer: three hostd as processes of their own on loopback, with fsync on, and three members of Debian's
//! etcd on the same disk, taking turns under the same load. Nothing here asserts a time: it prints.
//!
//! - [`load`]: clients in a closed loop, and what they measured. [`site`]: three processes and a door to them.
//! - [`quorate`], [`etcd`]: the two kinds of site.
//! - [`compare`] (commits and reads), [`watch`], [`failover`], [`syncs`]: what is measured beside the peer; [`replay`]: one host alone with a long log.
//! - [`newcomer`]: a fourth host over a slow link. [`carry`]: a guest's bytes from host to host. [`network`]: slow links.
//! - [`followers`]: a site of hundreds of hosts in this process. [`words`]: what the last two say to a log.

pub mod carry;
pub mod compare;
pub mod etcd;
pub mod failover;
pub mod followers;
pub mod load;
pub mod network;
pub mod newcomer;
pub mod process;
pub mod quorate;
pub mod replay;
pub mod site;
pub mod syncs;
pub mod watch;
pub mod words;

use std::path::PathBuf;

use clap::Args;
use clap::Subcommand;
use clap::ValueEnum;

use self::load::Work;

/// Whom to measure beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Debian's etcd (package etcd-server), with TLS for clients and members, as Quorate has it
    Etcd,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    /// Where the data directories are made; must be on a disk, since fsync in memory costs nothing
    #[arg(long, global = true, default_value = "target/jepsen-bench")]
    dir: PathBuf,
    /// Take turns with it
    #[arg(long, global = true, value_enum)]
    peer: Option<Peer>,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Commits a second, and how long each takes, with so many clients at once
    Commit(compare::CommitArgs),
    /// Linearizable reads a second, and how long each takes
    Read(compare::Rounds),
    /// Events that reach watchers while others commit, and how late
    Watch(watch::WatchArgs),
    /// Syncs of each member for one commit, counted by strace
    Syncs(syncs::SyncsArgs),
    /// One host with a long log: deciding, storing, starting again, reading the stream, folding it
    Replay(replay::ReplayArgs),
    /// Commits of a site with hundreds of hosts that pull
    Followers(followers::FollowersArgs),
    /// A host that joins over a slow link, and what commits notice of it (root: it makes a network namespace)
    Newcomer(newcomer::NewcomerArgs),
    /// From the leader's SIGKILL to the next acknowledged commit
    Failover(failover::FailoverArgs),
    /// A guest's bytes from host to host over 1, 2, 4 and 8 connections
    Carry(carry::CarryArgs),
}

pub fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    // It can be installed once a process; a second time changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match &args.bench {
        Bench::Newcomer(newcomer) => newcomer.narrow_network()?,
        Bench::Failover(failover) => failover.delay_network()?,
        Bench::Carry(carry) => carry.delay_network()?,
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match &args.bench {
            Bench::Commit(commit) => {
                compare::run(&commit.rounds, Work::Commit { bytes: commit.bytes }, &args.dir, args.peer).await
            }
            Bench::Read(rounds) => compare::run(rounds, Work::Read, &args.dir, args.peer).await,
            Bench::Watch(watch) => watch::run(watch, &args.dir, args.peer).await,
            Bench::Syncs(syncs) => syncs::run(syncs, &args.dir, args.peer).await,
            Bench::Replay(replay) => replay::run(replay, &args.dir).await,
            Bench::Followers(followers) => followers::run(followers, &args.dir).await,
            Bench::Newcomer(newcomer) => newcomer::run(newcomer, &args.dir).await,
            Bench::Failover(failover) => failover::run(failover, &args.dir, args.peer).await,
            Bench::Carry(carry) => carry::run(carry).await,
        }
    })?;
    Ok(true)
}
