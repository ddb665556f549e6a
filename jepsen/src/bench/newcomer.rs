//! A host that joins a busy site over a slow link: how long it takes to catch up, and what commits notice of it (hazard H25).
//!
//! The newcomer's address has a narrow link ([`super::network`]).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::load;
use super::load::Load;
use super::load::Measured;
use super::load::Work;
use super::network;
use super::quorate::NEWCOMER;
use super::site::Kind;
use super::site::Site;

/// So many batches behind the leader it has caught up: others commit meanwhile.
const NEAR: u64 = 200;
const WINDOW: Duration = Duration::from_secs(4);
const WITHIN: Duration = Duration::from_secs(600);

#[derive(Debug, Args)]
pub struct NewcomerArgs {
    /// What the newcomer's link carries, in kilobits a second, each way
    #[arg(long, default_value_t = 8_000)]
    kbit: u32,
    /// Seconds for which 64 clients fill the log before it joins
    #[arg(long, default_value_t = 15)]
    fill: u64,
    /// Clients that commit before and while it catches up
    #[arg(long, default_value_t = 4)]
    clients: usize,
}

impl NewcomerArgs {
    pub fn narrow_network(&self) -> anyhow::Result<()> {
        network::narrow(&format!("127.0.0.{}", NEWCOMER + 1), self.kbit)
    }
}

pub async fn run(args: &NewcomerArgs, dir: &Path) -> anyhow::Result<()> {
    let Site::Quorate(mut site) = Site::start(Kind::Quorate, dir).await? else {
        bail!("a site of hostd was asked for")
    };
    let leader = site.leader().await?;
    let share = |site| Arc::new(Site::Quorate(site));
    let shared = share(site);
    let fill = Load {
        clients: 64,
        work: Work::Commit { bytes: 256 },
        warm_up: Duration::ZERO,
        measure: Duration::from_secs(args.fill),
        pace: None,
    };
    load::put(&shared, fill).await?;
    let window = Load { clients: args.clients, measure: WINDOW, ..fill };
    let before = load::put(&shared, window).await?;
    let Ok(Site::Quorate(taken)) = Arc::try_unwrap(shared) else { bail!("a client did not end") };
    site = taken;

    let behind = site.applied(leader).await?;
    let began = Instant::now();
    site.add_newcomer().await?;
    let joined = began.elapsed();
    let shared = share(site);
    let mut meanwhile = Measured { answers: 0, errors: 0, seconds: 0.0, took_us: Histogram::new(3)? };
    let mut leaders = 0;
    let caught_up = loop {
        let measured = load::put(&shared, window).await?;
        meanwhile.answers += measured.answers;
        meanwhile.errors += measured.errors;
        meanwhile.seconds += measured.seconds;
        meanwhile.took_us.add(&measured.took_us)?;
        let Site::Quorate(site) = &*shared else { bail!("a site of hostd was started") };
        leaders += usize::from(site.leader().await? != leader);
        let (newcomer, head) = (site.applied(NEWCOMER).await?, site.applied(leader).await?);
        eprintln!("after {:5.1} s: the newcomer is at {newcomer} of {head}", began.elapsed().as_secs_f64());
        if newcomer + NEAR >= head {
            break began.elapsed();
        }
        if began.elapsed() > WITHIN {
            bail!("the newcomer is at {newcomer} of {head} after {} s", WITHIN.as_secs());
        }
    };
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header([
        format!("{} clients", args.clients).as_str(),
        "commits/s",
        "p50 ms",
        "p99 ms",
        "max ms",
        "errors",
    ]);
    for (when, measured) in [("before", &before), ("while it catches up", &meanwhile)] {
        let mut cells = vec![when.to_owned(), format!("{:.0}", measured.rate())];
        cells.extend([0.5, 0.99, 1.0].map(|quantile| format!("{:.2}", measured.ms_at(quantile))));
        cells.push(measured.errors.to_string());
        table.add_row(cells);
    }
    println!("{table}");
    println!(
        "{behind} batches to catch up with over {} kbit/s: joined after {:.2} s, caught up after {:.1} s, {leaders} changes of the leader",
        args.kbit,
        joined.as_secs_f64(),
        caught_up.as_secs_f64(),
    );
    Ok(())
}
