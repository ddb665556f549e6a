//! `lab show suspend`: a guest becomes a file of its host, its host loses its power meanwhile, and the guest goes on where it was.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Counter;
use super::stage::Stage;
use super::table::Table;
use crate::control::PowerAction;
use crate::state::HostId;

const DISK: &str = "shared1";
/// Asked from another host than the guest's.
const ASKER: HostId = HostId(1);
const HOME: HostId = HostId(2);
const ELSEWHERE: HostId = HostId(3);
const WITHIN: Duration = Duration::from_secs(120);
const FILES: &str = "ls /var/lib/quorate/asleep";

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let shape = Shape { vcpus: stage.cpus.min(2), disks: &[DISK], address: None, agent: false, lease: true };
    let guest = Guest::define(stage, ASKER, "web1", &shape).await?;
    guest.start(stage, ASKER, HOME).await?;
    guest.reaches(stage, ASKER, "Up", WITHIN).await?;
    let before = counts(stage, &guest, 0).await?;

    stage.say("it falls asleep");
    let begun = Instant::now();
    stage.quorate(ASKER, &["vm", "suspend", &guest.name, "--wait"]).await?;
    table.seconds("vm suspend --wait", begun.elapsed().as_secs_f64(), "");
    nothing_runs(stage).await?;
    table.row("its process is gone, a file of its host is there", "yes", "yes");
    let slept_ns = stage.now_ns();

    stage.say("its disk is its own, it wakes up nowhere else, and nobody hears its power button");
    let other = Shape { vcpus: 1, disks: &[DISK], address: None, agent: false, lease: false };
    Guest::define(stage, ASKER, "thief", &other).await?;
    refused(stage, &["vm", "start", "thief"], "web1").await?;
    refused(stage, &["vm", "start", &guest.name, "--host", &ELSEWHERE.to_string()], "there alone").await?;
    refused(stage, &["vm", "stop", &guest.name], "--power-off").await?;

    stage.say("its host loses its power and comes back");
    stage.power(HOME, PowerAction::Off).await?;
    stage.power(HOME, PowerAction::On).await?;
    stage.hostd_answers(HOME).await?;
    stage.voters_reach(stage.host_count()).await?;
    stage.hosts_are_up().await?;
    ensure!(guest.status(stage, ASKER).await? == "Suspended", "it does not sleep on");
    nothing_runs(stage).await?;

    stage.say("it wakes up");
    let begun = Instant::now();
    stage.quorate(ASKER, &["vm", "start", &guest.name, "--wait"]).await?;
    table.seconds("vm start --wait of a guest that sleeps", begun.elapsed().as_secs_f64(), "");
    let after = counts(stage, &guest, slept_ns).await?;
    ensure!(after.boot == before.boot, "it has booted: {} is not {}", after.boot, before.boot);
    table.row("it counts on in the same boot, through a loss of power of its host", "yes", "yes");
    let cleared = async || Ok(stage.sh(HOME, FILES).await?.trim().is_empty().then_some(()));
    stage.until("its file is gone", WITHIN, cleared).await?;
    let said = guest.console(stage, ASKER, &["disk-check"]).await?;
    ensure!(said.contains("disk-check ok"), "the disk is not as it was written: {said}");

    stage.say("a pulled plug throws its memory away");
    stage.quorate(ASKER, &["vm", "suspend", &guest.name, "--wait"]).await?;
    stage.quorate(ASKER, &["vm", "stop", &guest.name, "--power-off"]).await?;
    guest.reaches(stage, ASKER, "Down", WITHIN).await?;
    stage.until("its file is gone", WITHIN, cleared).await?;
    let since_ns = stage.now_ns();
    guest.start(stage, ASKER, HOME).await?;
    let cold = counts(stage, &guest, since_ns).await?;
    ensure!(cold.boot != after.boot, "it has not booted anew");
    guest.stop(stage, ASKER).await?;
    table.row("after a pulled plug it boots from its disk", "yes", "yes");
    table.print();
    Ok(())
}

/// A number of the guest since then.
async fn counts(stage: &Stage, guest: &Guest, since_ns: u64) -> Result<Counter> {
    let number = async || Ok(stage.counters(HOME, &guest.id, since_ns)?.into_iter().next_back());
    stage.until("the guest counts", WITHIN, number).await
}

/// No process, and one file.
async fn nothing_runs(stage: &Stage) -> Result<()> {
    let gone = async || Ok(stage.sh(HOME, "pidof vmm; true").await?.trim().is_empty().then_some(()));
    stage.until("its process is gone", WITHIN, gone).await?;
    let files = stage.sh(HOME, FILES).await?;
    ensure!(files.lines().count() == 1, "there are {files:?}, and one guest sleeps");
    Ok(())
}

/// `quorate` says no, and why.
async fn refused(stage: &Stage, arguments: &[&str], words: &str) -> Result<()> {
    let done = stage.try_quorate(ASKER, arguments).await?;
    ensure!(done.code != 0, "{arguments:?} was done");
    let said = done.stderr.lines().next().context("it says nothing")?;
    ensure!(done.stderr.contains(words), "{arguments:?}: {said:?} does not say {words:?}");
    Ok(())
}
