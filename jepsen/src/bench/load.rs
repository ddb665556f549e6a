//! Clients in a closed loop: each asks again as soon as it was answered, or keeps to a pace.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::site::Site;

/// A client that was refused tries again after this.
const AFTER_ERROR: Duration = Duration::from_millis(20);

/// What clients do.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Commits that carry so many bytes.
    Commit { bytes: usize },
    /// Linearizable reads.
    Read,
}

#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub clients: usize,
    pub work: Work,
    /// Before anything is counted.
    pub warm_up: Duration,
    pub measure: Duration,
    /// A client asks at most once in this time.
    pub pace: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct Measured {
    pub answers: u64,
    pub errors: u64,
    pub seconds: f64,
    /// Microseconds from question to answer.
    pub took_us: Histogram<u64>,
}

impl Measured {
    pub fn rate(&self) -> f64 {
        self.answers as f64 / self.seconds
    }

    pub fn ms_at(&self, quantile: f64) -> f64 {
        self.took_us.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// Puts a load on a site.
pub async fn put(site: &Arc<Site>, load: Load) -> anyhow::Result<Measured> {
    let began = Instant::now();
    let (from, until) = (began + load.warm_up, began + load.warm_up + load.measure);
    let errors = Arc::new(AtomicU64::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..load.clients {
        let (site, errors) = (site.clone(), errors.clone());
        clients.spawn(async move {
            let mut took_us = Histogram::<u64>::new(3)?;
            for n in 0u64.. {
                let asked = Instant::now();
                if asked >= until {
                    break;
                }
                let answer = match load.work {
                    Work::Commit { bytes } => site.commit(client, &words(client, n, bytes)).await,
                    Work::Read => site.read(client).await,
                };
                let answered = Instant::now();
                let counts = (from..=until).contains(&answered);
                match answer {
                    Ok(()) if counts => took_us.record((answered - asked).as_micros() as u64)?,
                    Ok(()) => {}
                    Err(error) => {
                        if counts && errors.fetch_add(1, Ordering::Relaxed) == 0 {
                            eprintln!("  first refusal: {error:#}");
                        }
                        tokio::time::sleep(AFTER_ERROR).await;
                    }
                }
                if let Some(pace) = load.pace {
                    tokio::time::sleep_until(asked + pace).await;
                }
            }
            anyhow::Ok(took_us)
        });
    }
    let mut took_us = Histogram::<u64>::new(3)?;
    while let Some(client) = clients.join_next().await {
        took_us.add(client??)?;
    }
    let errors = errors.load(Ordering::Relaxed);
    Ok(Measured { answers: took_us.len(), errors, seconds: load.measure.as_secs_f64(), took_us })
}

pub fn now_ns() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64)
}

/// Words that no other commit carries, of that many bytes.
fn words(client: usize, n: u64, bytes: usize) -> String {
    let unique = format!("t={} client={client} n={n} ", now_ns());
    format!("{unique:x<bytes$}")
}

/// When words were made, as they say themselves.
pub fn asked_ns(words: &str) -> Option<u64> {
    words.strip_prefix("t=")?.split(' ').next()?.parse().ok()
}
