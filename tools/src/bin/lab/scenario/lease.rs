//! `lab show lease`: a host is cut off; when did its `lease` guest last write, against the last grant?
//!
//! The send time of the last grant is taken from the vmm itself: its deadline on the host's `CLOCK_BOOTTIME`, less the
//! lease. Both clocks are compared through the guest agent, and the comparison's own error is part of the result.

use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Stage;
use super::table::Table;
use crate::control::LinkChange;
use crate::state::HostId;

const LEASE_S: f64 = 12.0;
/// Issue: *at most 12.1 s after the last grant's send time*.
const LAST_WRITE_MAX_S: f64 = 12.1;
const RUNNER: HostId = HostId(3);
const ASKER: HostId = HostId(1);
/// The guest stamps this one every second.
const DISK: &str = "shared1";
/// This one hangs in one variant, while the guest writes to it as fast as it can.
const OTHER_DISK: &str = "shared2";

/// What is done to the host beside cutting its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Nothing,
    HostdStopped,
    HostdDead,
    DiskHangs,
}

impl Blow {
    fn name(self) -> &'static str {
        match self {
            Blow::Nothing => "network cut, CPU load",
            Blow::HostdStopped => "network cut, hostd stopped (SIGSTOP)",
            Blow::HostdDead => "network cut, hostd dead and not restarted",
            Blow::DiskHangs => "network cut, a disk of the guest hangs",
        }
    }
}

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let leases = Guest::define(
        stage,
        ASKER,
        "lease1",
        &Shape { vcpus: 1, disks: &[DISK, OTHER_DISK], address: None, agent: false, lease: true },
    )
    .await?;
    let plain = Guest::define(
        stage,
        ASKER,
        "operator1",
        &Shape { vcpus: 1, disks: &[], address: None, agent: false, lease: false },
    )
    .await?;
    // The leader stays out of it: only the runner is cut.
    ensure!(stage.leader(ASKER).await? != RUNNER, "the runner of this story must not lead");
    leases.start(stage, ASKER, RUNNER).await?;
    plain.start(stage, ASKER, RUNNER).await?;
    stage.echo = false;
    let mut table = Table::default();
    let mut blows = vec![Blow::Nothing; runs as usize];
    blows.extend([Blow::HostdStopped, Blow::HostdDead, Blow::DiskHangs]);
    let mut worst: Vec<(Blow, f64, f64)> = Vec::new();
    for (run, blow) in blows.into_iter().enumerate() {
        stage.say(&format!("run {}: {}", run + 1, blow.name()));
        let cut = cut_off(stage, &leases, &plain, blow).await?;
        println!(
            "  last write {:.3} s after the last grant was asked for (clocks compared within {:.3} s); back {:.1} s after the network",
            cut.last_write_s, cut.uncertainty_s, cut.resumed_s
        );
        ensure!(
            cut.last_write_s <= LAST_WRITE_MAX_S + cut.uncertainty_s,
            "{}: a write {:.3} s after the last grant's send time",
            blow.name(),
            cut.last_write_s
        );
        match worst.iter_mut().find(|(known, ..)| *known == blow) {
            Some((_, write, resumed)) => {
                *write = write.max(cut.last_write_s);
                *resumed = resumed.max(cut.resumed_s);
            }
            None => worst.push((blow, cut.last_write_s, cut.resumed_s)),
        }
    }
    for (blow, write, resumed) in worst {
        table.row(&format!("{}: last write after grant, max", blow.name()), format!("{write:.3} s"), "<= 12.1 s");
        table.row(
            "  network back -> guest counts again, max",
            format!("{resumed:.1} s"),
            "goes on, same boot and epoch",
        );
    }
    table.row("operator guest on the same host", "never stopped", "never stops");
    table.print();
    Ok(())
}

struct CutOff {
    last_write_s: f64,
    uncertainty_s: f64,
    resumed_s: f64,
}

async fn cut_off(stage: &Stage, leases: &Guest, plain: &Guest, blow: Blow) -> Result<CutOff> {
    let epoch = leases.epoch(stage, ASKER).await?;
    if blow == Blow::DiskHangs {
        let flood = "sh (while :; do dd if=/dev/zero of=/dev/vdb bs=4096 count=8 oflag=direct conv=notrunc; done) >/dev/null 2>&1 &";
        leases.console(stage, ASKER, &[flood]).await?;
        stage.hang_disk(RUNNER, OTHER_DISK, true).await?;
    }
    let begun_ns = stage.now_ns();
    stage.sh(RUNNER, "for i in 1 2; do setsid timeout 17 sh -c 'while :; do :; done' >/dev/null 2>&1 & done").await?;
    stage.link(RUNNER, LinkChange::Cut).await?;
    let cut_ns = stage.now_ns();
    let (strike, mend) = match blow {
        Blow::Nothing | Blow::DiskHangs => ("true", "true"),
        Blow::HostdStopped => ("kill -STOP $(cat /run/service/hostd/pid)", "kill -CONT $(cat /run/service/hostd/pid)"),
        Blow::HostdDead => {
            ("rm /run/service/hostd/wanted; kill -9 $(cat /run/service/hostd/pid)", "service hostd start")
        }
    };
    stage.sh(RUNNER, strike).await?;
    tokio::time::sleep(Duration::from_secs(18)).await;
    let status = stage.sh(RUNNER, &format!("lab in-host vmm-status --vm {}", leases.id)).await?;
    let status: serde_json::Value = serde_json::from_str(&status).context("the vmm's status is JSON")?;
    let deadline_ns = status["deadline_ns"].as_u64().context("a lease guest has a deadline")?;
    ensure!(status["state"] == "paused", "the lease ended and the guest runs: {status}");
    // What is in flight on a disk that hangs cannot be called back: paused, and not yet quiesced.
    ensure!(status["quiesced"] == (blow != Blow::DiskHangs), "{}: {status}", blow.name());
    if blow == Blow::DiskHangs {
        stage.hang_disk(RUNNER, OTHER_DISK, false).await?;
    }
    // The load has ended by now; and both clocks run by the same crystal.
    let clocks = compare_clocks(stage).await?;
    let last_write_s = last_write(stage, epoch, begun_ns, &clocks, deadline_ns)?;
    stage.link(RUNNER, LinkChange::Heal).await?;
    let healed_ns = stage.now_ns();
    stage.sh(RUNNER, mend).await?;
    let boot_before = boot_of(stage, leases, begun_ns, cut_ns)?;
    let resumed = stage
        .until("the guest goes on", Duration::from_secs(90), async || {
            Ok(stage.counters(RUNNER, &leases.id, healed_ns)?.first().cloned())
        })
        .await?;
    ensure!(resumed.boot == boot_before, "the guest booted anew: {} -> {}", boot_before, resumed.boot);
    leases.reaches(stage, ASKER, "Up", Duration::from_secs(60)).await?;
    ensure!(leases.epoch(stage, ASKER).await? == epoch, "another epoch: the permit was not kept");
    let counters = stage.counters(RUNNER, &plain.id, begun_ns)?;
    let widest = super::stage::largest_gap(&counters).context("the operator guest fell silent")?;
    ensure!(widest.0 < 5.0, "the operator guest stood still for {:.1} s", widest.0);
    Ok(CutOff { last_write_s, uncertainty_s: clocks.uncertainty_s, resumed_s: (resumed.t_ns - healed_ns) as f64 / 1e9 })
}

/// Seconds from the send time of the last grant to the guest's last write that reached the storage.
fn last_write(stage: &Stage, epoch: u64, since_ns: u64, clocks: &Clocks, deadline_ns: u64) -> Result<f64> {
    let writes = stage.writes(DISK)?;
    let mut mine = writes.iter().filter(|it| it.t_ns >= since_ns && it.host == RUNNER.0);
    let last = mine.rfind(|it| it.stamp().is_some_and(|(by, ..)| by == epoch));
    let last = last.context("the guest never wrote in this run")?;
    let deadline_lab_s = deadline_ns as f64 / 1e9 + clocks.host_to_lab_s;
    Ok(last.t_ns as f64 / 1e9 - (deadline_lab_s - LEASE_S))
}

fn boot_of(stage: &Stage, guest: &Guest, since_ns: u64, until_ns: u64) -> Result<String> {
    let counters = stage.counters(RUNNER, &guest.id, 0)?;
    let last = counters.iter().rfind(|counter| counter.t_ns < until_ns);
    match last {
        Some(counter) => Ok(counter.boot.clone()),
        None => bail!("the guest did not count before {since_ns}"),
    }
}

/// Lab's clock minus the host's `CLOCK_BOOTTIME`.
struct Clocks {
    host_to_lab_s: f64,
    uncertainty_s: f64,
}

/// Reads the host's clock between two readings of ours; the tightest of twenty counts.
async fn compare_clocks(stage: &Stage) -> Result<Clocks> {
    let mut best: Option<Clocks> = None;
    for _ in 0..20 {
        let before_ns = stage.now_ns();
        let said = stage.sh(RUNNER, "lab in-host clock").await?;
        let after_ns = stage.now_ns();
        let host_ns: u64 = said.trim().parse().context("the host's clock is a number")?;
        let middle_s = (before_ns + after_ns) as f64 / 2e9;
        let uncertainty_s = (after_ns - before_ns) as f64 / 2e9;
        if best.as_ref().is_none_or(|best| uncertainty_s < best.uncertainty_s) {
            best = Some(Clocks { host_to_lab_s: middle_s - host_ns as f64 / 1e9, uncertainty_s });
        }
    }
    best.context("the clocks were never compared")
}
