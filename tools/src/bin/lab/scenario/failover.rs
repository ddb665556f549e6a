//! `lab show failover`: the leader loses its power, or its disk hangs, again and again; how long until the next commit? With
//! `--delay-ms` on slow links.

use std::time::Duration;

use anyhow::Result;

use super::StoryOptions;
use super::probe::Probe;
use super::stage::Stage;
use super::stage::first_line;
use super::table::Table;
use super::table::spread;
use crate::control::LinkChange;
use crate::control::PowerAction;
use crate::nbd::OWN_DISK;
use crate::state::HostId;

/// `election_min_ms` of `lab/hostd.toml.in`, less what clocks are apart.
const ELECTION_MIN_NS: u64 = 500_000_000;

/// How the leader is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    PowerOff,
    /// Its own disk takes no write and answers nothing: a gray leader.
    DiskHangs,
}

pub async fn tell(stage: &mut Stage, runs: u32, options: &StoryOptions) -> Result<()> {
    let blow = if options.hang { Blow::DiskHangs } else { Blow::PowerOff };
    stage.form_cluster().await?;
    if options.delay_ms > 0 {
        let timers = Timers::for_links(options.delay_ms);
        stage.say(&format!("every link is {} ms slower, one way; timers {timers}", options.delay_ms));
        for host in stage.hosts() {
            timers.set(stage, host).await?;
            stage.link(host, LinkChange::Delay { ms: options.delay_ms }).await?;
        }
    }
    let probe = Probe::start(stage).await?;
    stage.echo = false;
    let (mut seconds, mut emulator_stops) = (Vec::new(), 0);
    while seconds.len() < runs as usize {
        match lose_the_leader(stage, &probe, blow).await {
            Ok(Failover { lost, next, took_s }) => {
                seconds.push(took_s);
                println!("  run {:2}: {lost} lost, {next} leads, next commit after {took_s:.2} s", seconds.len());
            }
            // Known of the emulator, see docs/operations/lab.md. Hosts that all answer have broken a promise instead.
            Err(error) if emulator_stops < runs / 5 && stage.revive(None).await? => {
                emulator_stops += 1;
                println!("  this run does not count: {}", first_line(&error));
            }
            Err(error) => return Err(error),
        }
        stage.voters_reach(stage.host_count()).await?;
        caught_up(stage).await?;
    }
    let mut table = Table::default();
    let what = match blow {
        Blow::PowerOff => "leader's power off -> next commit",
        Blow::DiskHangs => "leader's disk hangs: largest gap between commits",
    };
    table.row(what, spread(&mut seconds), "max <= 1.5 s at the default timers");
    table.row("commits answered in all", probe.commits().to_string(), "");
    table.row("runs that the emulator stopped, not counted", emulator_stops.to_string(), "");
    table.print();
    Ok(())
}

/// Raft's times. On slow links an operator sets longer ones, as hostd's log asks for: a heartbeat is three round trips. Leases bound the
/// others (three elections fit into one).
struct Timers {
    heartbeat_ms: u32,
}

impl Timers {
    /// `heartbeat_ms` of `lab/hostd.toml.in`, and what a round trip between emulated hosts may take by itself.
    const SHORTEST_MS: u32 = 200;
    const OWN_ROUND_TRIP_MS: u32 = 60;

    fn for_links(delay_ms: u32) -> Timers {
        Timers { heartbeat_ms: Self::SHORTEST_MS.max(3 * (2 * delay_ms + Self::OWN_ROUND_TRIP_MS)) }
    }

    fn lines(&self) -> [(&'static str, u32); 3] {
        let heartbeat = self.heartbeat_ms;
        [("heartbeat_ms", heartbeat), ("election_min_ms", 2 * heartbeat), ("election_max_ms", 4 * heartbeat)]
    }

    /// Kept on the host's disk, where they win over the image's.
    async fn set(&self, stage: &Stage, host: HostId) -> Result<()> {
        let edits: Vec<String> = self.lines().map(|(name, ms)| format!("-e 's/^{name} = .*/{name} = {ms}/'")).into();
        let file = "/etc/quorate/hostd.toml";
        let line = format!("sed -i {} {file} && cp {file} /var/lib/quorate/ && service hostd restart", edits.join(" "));
        stage.sh(host, &line).await?;
        stage.hostd_answers(host).await
    }
}

impl std::fmt::Display for Timers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [heartbeat, least, most] = self.lines().map(|(_, ms)| ms);
        write!(f, "{heartbeat}/{least}/{most} ms")
    }
}

struct Failover {
    lost: HostId,
    next: HostId,
    /// From the power off to the next commit's answer; the largest gap between two answers when the disk hung.
    took_s: f64,
}

/// Waits for a commit, strikes the leader, waits for the next commit and leader, and makes the one that was lost whole again.
async fn lose_the_leader(stage: &Stage, probe: &Probe, blow: Blow) -> Result<Failover> {
    let begun_ns = stage.now_ns();
    stage.until("commits", Duration::from_secs(30), async || Ok(probe.first_after(begun_ns))).await?;
    let lost = stage.leader(stage.hosts().next().expect("a lab has hosts")).await?;
    let off_ns = stage.now_ns();
    match blow {
        Blow::PowerOff => stage.power(lost, PowerAction::Off).await?,
        Blow::DiskHangs => stage.hang_disk(lost, OWN_DISK, true).await?,
    }
    // An answer that was under way when the power went is not the next commit, and no follower campaigns sooner than this.
    let soonest_ns = stage.now_ns() + ELECTION_MIN_NS;
    let next_commit = async |after_ns| {
        stage.until("the next commit", Duration::from_secs(30), async || Ok(probe.first_after(after_ns))).await
    };
    let next_ns = next_commit(soonest_ns).await;
    let asked = stage.hosts().find(|host| *host != lost).expect("a lab has hosts");
    let next = stage
        .until("another leader", Duration::from_secs(30), async || {
            Ok(Some(stage.leader(asked).await?).filter(|next| *next != lost))
        })
        .await;
    // A leader whose own disk hangs may go on with the disks of two others: the gap comes when it hands over.
    let took_ns = match (blow, next_ns) {
        (Blow::PowerOff, next_ns) => next_ns.map(|next_ns| next_ns - off_ns),
        (Blow::DiskHangs, _) => next_commit(stage.now_ns()).await.map(|last_ns| probe.largest_gap_ns(off_ns, last_ns)),
    };
    if blow == Blow::DiskHangs {
        stage.power(lost, PowerAction::Off).await?;
        stage.hang_disk(lost, OWN_DISK, false).await?;
    }
    stage.power(lost, PowerAction::On).await?;
    stage.hostd_answers(lost).await?;
    Ok(Failover { lost, next: next?, took_s: took_ns? as f64 / 1e9 })
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
