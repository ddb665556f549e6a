//! Watchers of the stream while others commit: how many events reach them all, and how long after the question of its client.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;

use super::Peer;
use super::load;
use super::load::Load;
use super::load::Work;
use super::site::Kind;
use super::site::Site;

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Watchers at once, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100])]
    watchers: Vec<usize>,
    /// Clients that commit meanwhile
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Commits a second, of all clients together; without it as many as the site takes
    #[arg(long)]
    rate: Option<u32>,
    /// Seconds that clients commit
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Rounds; with a peer both take turns in each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

pub async fn run(args: &WatchArgs, dir: &Path, peer: Option<Peer>) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header(["round", "watchers", "site", "commits/s", "delivered", "due", "p50 ms", "p99 ms"]);
    for round in 1..=args.rounds {
        for &watchers in &args.watchers {
            for kind in Kind::beside(peer) {
                let site = Arc::new(Site::start(kind, dir).await?);
                let (heard, mut lags) = mpsc::channel(1 << 16);
                let mut tasks = tokio::task::JoinSet::new();
                for watcher in 0..watchers {
                    let mut words = site.watch(watcher).await?;
                    let heard = heard.clone();
                    tasks.spawn(async move {
                        while let Some(word) = words.recv().await {
                            let Some(asked_ns) = load::asked_ns(&word) else { continue };
                            if heard.send(load::now_ns().saturating_sub(asked_ns)).await.is_err() {
                                return;
                            }
                        }
                    });
                }
                let counting = tokio::spawn(async move {
                    let mut took_us = Histogram::<u64>::new(3)?;
                    // Until nothing more comes.
                    while let Ok(Some(lag_ns)) = tokio::time::timeout(Duration::from_secs(3), lags.recv()).await {
                        took_us.record(lag_ns / 1000)?;
                    }
                    anyhow::Ok(took_us)
                });
                let measure = Duration::from_secs(args.seconds);
                let pace = args.rate.map(|rate| Duration::from_secs(args.clients as u64) / rate.max(1));
                let work = Work::Commit { bytes: 256 };
                let load = Load { clients: args.clients, work, warm_up: Duration::ZERO, measure, pace };
                let written = load::put(&site, load).await?;
                let took_us = counting.await??;
                tasks.abort_all();
                let ms = |quantile| took_us.value_at_quantile(quantile) as f64 / 1000.0;
                table.add_row([
                    round.to_string(),
                    watchers.to_string(),
                    kind.name().to_owned(),
                    format!("{:.0}", written.rate()),
                    took_us.len().to_string(),
                    (written.answers * watchers as u64).to_string(),
                    format!("{:.1}", ms(0.5)),
                    format!("{:.1}", ms(0.99)),
                ]);
            }
        }
    }
    for column in [0, 1, 3, 4, 5, 6, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    Ok(())
}
