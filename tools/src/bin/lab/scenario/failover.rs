//! `lab show failover`: the leader loses its power, again and again; how long until the next commit?

use std::time::Duration;

use anyhow::Result;

use super::probe::Probe;
use super::stage::Stage;
use super::table::Table;
use super::table::spread;
use crate::control::PowerAction;

/// `election_min_ms` of `lab/hostd.toml.in`, less what clocks are apart.
const ELECTION_MIN_NS: u64 = 500_000_000;

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let probe = Probe::start(stage).await?;
    stage.echo = false;
    let mut seconds = Vec::new();
    for run in 1..=runs {
        let begun_ns = stage.now_ns();
        stage.until("commits", Duration::from_secs(30), async || Ok(probe.first_after(begun_ns))).await?;
        let leader = stage.leader(stage.hosts().next().expect("a lab has hosts")).await?;
        let off_ns = stage.now_ns();
        stage.power(leader, PowerAction::Off).await?;
        let gone_ns = stage.now_ns();
        // An answer that was under way when the power went is not the next commit, and no follower campaigns sooner than this.
        let soonest_ns = gone_ns + ELECTION_MIN_NS;
        let next_ns =
            stage.until("the next commit", Duration::from_secs(30), async || Ok(probe.first_after(soonest_ns))).await?;
        let took = (next_ns - off_ns) as f64 / 1e9;
        let asked = stage.hosts().find(|host| *host != leader).expect("a lab has hosts");
        let next = stage
            .until("another leader", Duration::from_secs(10), async || {
                Ok(Some(stage.leader(asked).await?).filter(|next| *next != leader))
            })
            .await?;
        println!("  run {run:2}: {leader} off, {next} leads, next commit after {took:.2} s");
        seconds.push(took);
        stage.power(leader, PowerAction::On).await?;
        stage.hostd_answers(leader).await?;
        stage.voters_reach(stage.host_count()).await?;
        caught_up(stage).await?;
    }
    let mut table = Table::default();
    table.row("leader's power off -> next commit", spread(&mut seconds), "max <= 1.5 s at the default timers");
    table.row("commits answered in all", probe.commits().to_string(), "");
    table.print();
    Ok(())
}

/// All hosts tell the same digest at the same seq at least once: the one that was away follows again.
async fn caught_up(stage: &Stage) -> Result<()> {
    stage
        .until("every host applies what is committed", Duration::from_secs(60), async || {
            let mut applied = Vec::new();
            for host in stage.hosts() {
                let status = stage.query(host, &["status"]).await?;
                applied.push(status["member"]["applied_seq"].as_u64().unwrap_or(0));
            }
            let (least, most) = (applied.iter().min().copied(), applied.iter().max().copied());
            let near = least.zip(most).is_some_and(|(least, most)| least > 0 && most - least < 500);
            Ok(near.then_some(()))
        })
        .await
}
