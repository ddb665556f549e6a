//! `lab show minority`: two of three hosts are cut off for a minute. Nothing is fenced, nothing starts twice.

use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::restart::one_boot_an_epoch;
use super::stage::Stage;
use super::stage::largest_gap;
use super::table::Table;
use crate::control::LinkChange;
use crate::state::HostId;

const CUT_FOR: Duration = Duration::from_secs(60);

pub async fn tell(stage: &mut Stage) -> Result<()> {
    stage.form_cluster().await?;
    let asker = HostId(1);
    let leader = stage.leader(asker).await?;
    let others: Vec<HostId> = stage.hosts().filter(|host| *host != leader).collect();
    let cut = [leader, others[0]];
    let lease = Guest::define(
        stage,
        asker,
        "lease1",
        &Shape { vcpus: 1, disks: &["shared1"], address: None, agent: false, lease: true },
    )
    .await?;
    let plain = Guest::define(
        stage,
        asker,
        "operator1",
        &Shape { vcpus: 1, disks: &["shared2"], address: None, agent: false, lease: false },
    )
    .await?;
    lease.start(stage, asker, cut[1]).await?;
    plain.start(stage, asker, cut[1]).await?;
    let (lease_epoch, plain_epoch) = (lease.epoch(stage, asker).await?, plain.epoch(stage, asker).await?);

    stage.say(&format!("{} and {} are cut off for a minute", cut[0], cut[1]));
    let begun_ns = stage.now_ns();
    for host in cut {
        stage.link(host, LinkChange::Cut).await?;
    }
    tokio::time::sleep(CUT_FOR).await;
    for host in cut {
        stage.link(host, LinkChange::Heal).await?;
    }
    let healed_ns = stage.now_ns();
    stage.say("the network is whole again");
    for guest in [&lease, &plain] {
        let what = format!("{} counts", guest.name);
        stage
            .until(&what, Duration::from_secs(120), async || {
                Ok(stage.counters(cut[1], &guest.id, healed_ns)?.first().cloned())
            })
            .await?;
        guest.reaches(stage, asker, "Up", Duration::from_secs(120)).await?;
    }
    ensure!(lease.epoch(stage, asker).await? == lease_epoch, "the lease guest has another permit");
    ensure!(plain.epoch(stage, asker).await? == plain_epoch, "the operator guest has another permit");

    let (lease_gap, ..) = largest_gap(&stage.counters(cut[1], &lease.id, begun_ns)?).context("silence")?;
    let (plain_gap, ..) = largest_gap(&stage.counters(cut[1], &plain.id, begun_ns)?).context("silence")?;
    ensure!(lease_gap > 30.0, "the lease guest did not pause: largest gap {lease_gap:.1} s");
    ensure!(plain_gap < 5.0, "the operator guest stood still for {plain_gap:.1} s");
    let events = stage.quorate(asker, &["events", "--from", "oldest"]).await?;
    ensure!(!events.contains("HostFenced"), "a host was fenced");
    let grants = events.lines().filter(|line| line.contains("VmPermitGranted")).count();
    ensure!(grants == 2, "{grants} permits were granted for two starts");
    one_boot_an_epoch(stage)?;

    let mut table = Table::default();
    table.seconds("lease guest: stood still for", lease_gap, "pauses, then goes on in the same boot");
    table.seconds("operator guest: largest gap", plain_gap, "runs on");
    table.row("permits granted in all", grants.to_string(), "2, one a start");
    table.print();
    Ok(())
}
