//! `lab show restart`: hostd dies and restarts under a running guest, and at random moments of a start.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use anyhow::Error;
use anyhow::Result;
use anyhow::ensure;
use rand::Rng;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Counter;
use super::stage::Stage;
use super::stage::first_line;
use super::stage::largest_gap;
use super::table::Table;
use crate::state::HostId;

/// The promise for a guest whose hostd restarts (DESIGN §14): it does not notice.
const GAP_MAX_S: f64 = 1.5;

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let (asker, runner) = (HostId(1), HostId(2));
    let guest = Guest::define(
        stage,
        asker,
        "web1",
        &Shape { vcpus: 1, disks: &["shared1"], address: None, agent: false, lease: true },
    )
    .await?;
    let mut emulator_stops = 0;

    for (name, blow) in [
        ("kill -9 of hostd", "kill -9 $(cat /run/service/hostd/pid)"),
        ("service hostd restart", "service hostd restart"),
    ] {
        stage.say(&format!("{name}, under a running guest"));
        let (gap, from, to) = loop {
            let boots = stage.boots().await.unwrap_or_default();
            match under_a_guest(stage, &guest, asker, runner, blow).await {
                Ok(gap) => break gap,
                Err(error) => emulator_stops += mend(stage, &guest, asker, error, &boots, emulator_stops, runs).await?,
            }
        };
        table.row(&format!("{name}: largest gap"), format!("{gap:.2} s ({from} -> {to})"), "<= 1.5 s");
        ensure!(gap <= GAP_MAX_S, "{name}: {gap:.2} s between the lines {from} and {to}");
    }

    stage.say(&format!("kill -9 of hostd at {runs} random moments of `vm start`"));
    stage.echo = false;
    let (mut up, mut lost, mut most) = (0, 0, 0);
    while up + lost < runs {
        let boots = stage.boots().await.unwrap_or_default();
        let told = kill_during_start(stage, &guest, asker, runner).await;
        match told {
            Ok(Killed { settled, vmms }) => {
                most = most.max(vmms);
                if settled == "Up" {
                    up += 1
                } else {
                    lost += 1
                }
                println!("  kill {:2}: {settled}, vmm processes seen at once: {vmms}", up + lost);
            }
            Err(error) => emulator_stops += mend(stage, &guest, asker, error, &boots, emulator_stops, runs).await?,
        }
    }
    table.row(&format!("{runs} kills during start: VM up afterwards"), up.to_string(), "");
    table.row("its epoch lost with the start, told as such", lost.to_string(), "");
    table.row("most vmm processes seen at once", most.to_string(), "1");
    table.row("starts that the emulator stopped, not counted", emulator_stops.to_string(), "");
    ensure!(most == 1, "two vmm of one VM were seen at once");
    one_boot_an_epoch(stage)?;
    table.row("boots that wrote the disk under one epoch", "1", "1");
    table.print();
    Ok(())
}

/// If the emulator stopped a host (known of it, see docs/operations/lab.md), gives that host its power again and the guest its
/// rest; then what was under way does not count. Hosts that all answer have broken a promise: that is the error.
async fn mend(
    stage: &Stage,
    guest: &Guest,
    asker: HostId,
    error: Error,
    boots: &BTreeMap<HostId, String>,
    stops: u32,
    runs: u32,
) -> Result<u32> {
    if stops > runs / 5 || !stage.revive(Some(boots)).await? {
        return Err(error);
    }
    println!("  this does not count: {}", first_line(&error));
    stage.quorate(asker, &["vm", "stop", &guest.name, "--power-off"]).await?;
    guest.reaches(stage, asker, "Down", Duration::from_secs(90)).await?;
    Ok(1)
}

/// Strikes hostd under a running guest, which must go on in its boot and under its permit. The largest gap of its counter, and
/// between which lines.
async fn under_a_guest(
    stage: &Stage,
    guest: &Guest,
    asker: HostId,
    runner: HostId,
    blow: &str,
) -> Result<(f64, u64, u64)> {
    guest.start(stage, asker, runner).await?;
    let epoch = guest.epoch(stage, asker).await?;
    let since_ns = stage.now_ns();
    let before = hostd_pid(stage, runner).await?;
    stage.sh(runner, blow).await?;
    stage
        .until("a new hostd", Duration::from_secs(30), async || {
            Ok((hostd_pid(stage, runner).await? != before).then_some(()))
        })
        .await?;
    stage.hostd_answers(runner).await?;
    guest.reaches(stage, runner, "Up", Duration::from_secs(60)).await?;
    // Long enough for a lease that nobody renews to end.
    tokio::time::sleep(Duration::from_secs(16)).await;
    let counters = stage.counters(runner, &guest.id, since_ns)?;
    ensure!(same_boot(&counters), "the guest booted anew: {counters:?}");
    ensure!(guest.epoch(stage, asker).await? == epoch, "a new permit was granted");
    let gap = largest_gap(&counters).context("the guest fell silent")?;
    guest.stop(stage, asker).await?;
    Ok(gap)
}

struct Killed {
    /// `Up` or `Down`.
    settled: String,
    /// Most processes of the VM that were seen at one time.
    vmms: u32,
}

/// Starts the VM, kills hostd at a random moment of that, waits for the outcome, and stops the VM.
async fn kill_during_start(stage: &Stage, guest: &Guest, asker: HostId, runner: HostId) -> Result<Killed> {
    let watcher = "setsid lab in-host most-vmm --enough /tmp/enough >/tmp/most-vmm 2>&1 </dev/null &";
    stage.sh(runner, &format!("rm -f /tmp/enough; {watcher}")).await?;
    let delay_ms = rand::rng().random_range(0..1500);
    let since_ns = stage.now_ns();
    stage.quorate(asker, &["vm", "start", &guest.name, "--host", &runner.to_string()]).await?;
    let first = guest.epoch(stage, asker).await?;
    tokio::time::sleep(Duration::from_millis(delay_ms)).await;
    stage.sh(runner, "kill -9 $(cat /run/service/hostd/pid)").await?;
    let settled = stage
        .until("the VM is up, or down with its reason", Duration::from_secs(120), async || {
            let status = guest.status(stage, asker).await?;
            Ok(["Up", "Down"].contains(&status.as_str()).then_some(status))
        })
        .await?;
    if settled == "Up" {
        ensure!(guest.epoch(stage, asker).await? >= first, "epochs never fall");
        stage
            .until("its disk is written", Duration::from_secs(90), async || {
                let writes = stage.writes("shared1")?;
                Ok(writes.iter().any(|it| it.t_ns > since_ns && it.stamp().is_some()).then_some(()))
            })
            .await?;
    }
    stage.quorate(asker, &["vm", "stop", &guest.name, "--power-off"]).await?;
    guest.reaches(stage, asker, "Down", Duration::from_secs(90)).await?;
    let seen = stage.sh(runner, "touch /tmp/enough; sleep 1; cat /tmp/most-vmm").await?;
    let vmms = seen.trim().parse().with_context(|| format!("the watcher said {seen:?}"))?;
    Ok(Killed { settled, vmms })
}

async fn hostd_pid(stage: &Stage, host: HostId) -> Result<String> {
    stage.sh(host, "cat /run/service/hostd/pid").await
}

fn same_boot(counters: &[Counter]) -> bool {
    counters.windows(2).all(|pair| pair[0].boot == pair[1].boot)
}

/// R1 as the disk saw it: under one epoch, one boot of the guest wrote, and boots never interleave.
pub fn one_boot_an_epoch(stage: &Stage) -> Result<()> {
    let writes = stage.writes("shared1")?;
    let stamps: Vec<(u64, &str)> =
        writes.iter().filter_map(|it| it.stamp()).map(|(epoch, boot, _)| (epoch, boot)).collect();
    let mut finished: Vec<(u64, &str)> = Vec::new();
    for pair in stamps.windows(2).filter(|pair| pair[0] != pair[1]) {
        finished.push(pair[0]);
        ensure!(pair[1].0 > pair[0].0, "R2: {:?} wrote after {:?}", pair[1], pair[0]);
        ensure!(!finished.contains(&pair[1]), "R1: {:?} wrote again after another boot did", pair[1]);
    }
    Ok(())
}
