//! `lab show failover`: the leader loses its power, again and again; how long until the next commit?

use std::time::Duration;

use anyhow::Result;

use super::probe::Probe;
use super::stage::Stage;
use super::stage::first_line;
use super::table::Table;
use super::table::spread;
use crate::control::PowerAction;
use crate::state::HostId;

/// `election_min_ms` of `lab/hostd.toml.in`, less what clocks are apart.
const ELECTION_MIN_NS: u64 = 500_000_000;

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let probe = Probe::start(stage).await?;
    stage.echo = false;
    let (mut seconds, mut emulator_stops) = (Vec::new(), 0);
    while seconds.len() < runs as usize {
        match power_off_the_leader(stage, &probe).await {
            Ok(Failover { lost, next, took_s }) => {
                seconds.push(took_s);
                println!("  run {:2}: {lost} off, {next} leads, next commit after {took_s:.2} s", seconds.len());
            }
            // Known of the emulator, see docs/operations/lab.md. Hosts that all answer have broken a promise instead.
            Err(error) if emulator_stops < runs / 5 && stage.revive().await? => {
                emulator_stops += 1;
                println!("  this run does not count: {}", first_line(&error));
            }
            Err(error) => return Err(error),
        }
        stage.voters_reach(stage.host_count()).await?;
        caught_up(stage).await?;
    }
    let mut table = Table::default();
    table.row("leader's power off -> next commit", spread(&mut seconds), "max <= 1.5 s at the default timers");
    table.row("commits answered in all", probe.commits().to_string(), "");
    table.row("runs that the emulator stopped, not counted", emulator_stops.to_string(), "");
    table.print();
    Ok(())
}

struct Failover {
    lost: HostId,
    next: HostId,
    /// From the power off to the next commit's answer.
    took_s: f64,
}

/// Waits for a commit, takes the leader's power, waits for the next commit and leader, and gives the power back.
async fn power_off_the_leader(stage: &Stage, probe: &Probe) -> Result<Failover> {
    let begun_ns = stage.now_ns();
    stage.until("commits", Duration::from_secs(30), async || Ok(probe.first_after(begun_ns))).await?;
    let lost = stage.leader(stage.hosts().next().expect("a lab has hosts")).await?;
    let off_ns = stage.now_ns();
    stage.power(lost, PowerAction::Off).await?;
    // An answer that was under way when the power went is not the next commit, and no follower campaigns sooner than this.
    let soonest_ns = stage.now_ns() + ELECTION_MIN_NS;
    let next_ns =
        stage.until("the next commit", Duration::from_secs(30), async || Ok(probe.first_after(soonest_ns))).await;
    let asked = stage.hosts().find(|host| *host != lost).expect("a lab has hosts");
    let next = stage
        .until("another leader", Duration::from_secs(10), async || {
            Ok(Some(stage.leader(asked).await?).filter(|next| *next != lost))
        })
        .await;
    stage.power(lost, PowerAction::On).await?;
    stage.hostd_answers(lost).await?;
    Ok(Failover { lost, next: next?, took_s: (next_ns? - off_ns) as f64 / 1e9 })
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
