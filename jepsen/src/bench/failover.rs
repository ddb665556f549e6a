//! From the leader's SIGKILL to the next acknowledged commit, over and over.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use tokio::sync::RwLock;
use tokio::time::Instant;

use super::Peer;
use super::network;
use super::site::Kind;
use super::site::MEMBERS;
use super::site::Site;

const ATTEMPT: Duration = Duration::from_millis(400);
/// One attempt is so many ways long at most: TCP, TLS, the request, its way to the leader, replication.
const WAYS: u32 = 16;
const PAUSE: Duration = Duration::from_millis(5);
const WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct FailoverArgs {
    /// Leaders to kill
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// What every packet takes, one way, in milliseconds (root: it makes a network namespace)
    #[arg(long, default_value_t = 0)]
    delay_ms: u32,
}

impl FailoverArgs {
    pub fn delay_network(&self) -> anyhow::Result<()> {
        if self.delay_ms == 0 { Ok(()) } else { network::delay(self.delay_ms) }
    }
}

pub async fn run(args: &FailoverArgs, dir: &Path, peer: Option<Peer>) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    let attempt = ATTEMPT + WAYS * Duration::from_millis(u64::from(args.delay_ms));
    table.set_header(["site", "runs", "median s", "p90 s", "max s"]);
    for kind in Kind::beside(peer) {
        let site = Arc::new(RwLock::new(Site::start(kind, dir).await?));
        let mut seconds = Vec::new();
        for run in 1..=args.runs {
            let took = once(&site, attempt).await?;
            eprintln!("{} run {run}: {took:.3} s", kind.name());
            seconds.push(took);
        }
        seconds.sort_by(f64::total_cmp);
        let at = |quantile: f64| seconds[((seconds.len() - 1) as f64 * quantile) as usize];
        let cells = [at(0.5), at(0.9), at(1.0)].map(|seconds| format!("{seconds:.3}"));
        table.add_row([&[kind.name().to_owned(), args.runs.to_string()], &cells[..]].concat());
    }
    println!("{table}");
    Ok(())
}

async fn once(site: &Arc<RwLock<Site>>, attempt: Duration) -> anyhow::Result<f64> {
    // Everybody has caught up with the one that was killed before: three clients commit through three members.
    for member in 0..MEMBERS {
        commit(site, member, attempt).await?;
    }
    let leader = site.read().await.leader().await?;
    site.write().await.kill(leader);
    let killed = Instant::now();
    let others = (0..MEMBERS).filter(|member| *member != leader).map(|member| Box::pin(commit(site, member, attempt)));
    futures::future::select_ok(others).await?;
    let took = killed.elapsed().as_secs_f64();
    site.write().await.restart(leader).await?;
    Ok(took)
}

/// Asks one member until it commits.
async fn commit(site: &Arc<RwLock<Site>>, member: usize, attempt: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    while began.elapsed() < WITHIN {
        let words = format!("{:?} {member}", std::time::UNIX_EPOCH.elapsed()?);
        let site = site.read().await;
        if let Ok(Ok(())) = tokio::time::timeout(attempt, site.commit(member, &words)).await {
            return Ok(());
        }
        drop(site);
        tokio::time::sleep(PAUSE).await;
    }
    bail!("member {member} took no commit within {} s", WITHIN.as_secs())
}
