//! `lab show plug`: a disk and a network card come to a guest that runs, move with it to another host, and leave it.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

const ASKER: HostId = HostId(1);
const HOMES: [HostId; 2] = [HostId(2), HostId(3)];
const ADDRESS: &str = "10.77.0.105";
const DATA: &str = "id=shared2,path=/dev/disk/by-id/virtio-shared2";
const CARD: &str = "id=wan,bridge=br0";
const WITHIN: Duration = Duration::from_secs(60);
/// The place of the card's address in what the guest is told: it has one on its command line only for a card of its first day.
const SET_UP: &str = "sh ip addr add 10.77.0.105/24 dev eth0; ip link set eth0 up; \
    echo on-the-new-disk | dd of=/dev/vdb bs=512 conv=sync,fsync; echo set up";

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let shape = Shape { vcpus: stage.cpus.min(2), disks: &["shared1"], address: None, agent: false, lease: true };
    let guest = Guest::define(stage, ASKER, "web1", &shape).await?;
    guest.start(stage, ASKER, HOMES[0]).await?;
    guest.reaches(stage, ASKER, "Up", WITHIN).await?;
    has(stage, &guest, &["shared1"], &["lo"]).await?;

    stage.say("a disk and a network card come while it runs");
    let begun = Instant::now();
    stage.quorate(ASKER, &["vm", "plug", &guest.name, "--disk", DATA, "--nic", CARD, "--wait"]).await?;
    table.seconds("vm plug --wait, a disk and a card", begun.elapsed().as_secs_f64(), "");
    has(stage, &guest, &["shared1", "shared2"], &["eth0", "lo"]).await?;
    guest.console(stage, ASKER, &[SET_UP]).await?;
    answers(stage).await?;
    table.row("seen by the guest: the disk by its serial, the card by a ping", "yes", "yes");

    stage.say("nobody else gets the disk now");
    let other = Shape { vcpus: 1, disks: &["shared2"], address: None, agent: false, lease: false };
    let other = Guest::define(stage, ASKER, "db1", &other).await?;
    let refused = stage.run(ASKER, &["quorate", "vm", "start", &other.name]).await?;
    ensure!(refused.code != 0, "a disk that another guest has was given away");
    print!("  {}", refused.stderr);

    stage.say("both move with it");
    stage.quorate(ASKER, &["vm", "migrate", &guest.name, "--to", &HOMES[1].to_string(), "--wait"]).await?;
    has(stage, &guest, &["shared1", "shared2"], &["eth0", "lo"]).await?;
    let said = guest.console(stage, ASKER, &["sh head -c 15 /dev/vdb; echo"]).await?;
    ensure!(said.contains("on-the-new-disk"), "the disk does not hold what was written: {said}");
    answers(stage).await?;
    table.row("the same after a migration", "yes", "yes");

    stage.say("and leave it there");
    let begun = Instant::now();
    stage.quorate(ASKER, &["vm", "unplug", &guest.name, "shared2", "wan", "--wait"]).await?;
    table.seconds("vm unplug --wait", begun.elapsed().as_secs_f64(), "");
    has(stage, &guest, &["shared1"], &["lo"]).await?;
    other.start(stage, ASKER, HOMES[0]).await?;
    table.row("the disk is another guest's afterwards", "yes", "yes");
    other.stop(stage, ASKER).await?;

    stage.say("a disk that is not there is said not to be, and tried again");
    let missing = "id=late,path=/var/lib/quorate-late.raw";
    stage.quorate(ASKER, &["vm", "plug", &guest.name, "--disk", missing]).await?;
    let shown = async || stage.quorate(ASKER, &["vm", "show", &guest.name]).await;
    let said = async || Ok(shown().await?.lines().find(|line| line.contains("not plugged")).map(str::to_owned));
    let line = stage.until("`vm show` says why the disk is not there", WITHIN, said).await?;
    println!("  {}", line.trim());
    stage.quorate(ASKER, &["vm", "unplug", &guest.name, "late", "--wait"]).await?;

    stage.say("it comes again, and goes back with the guest");
    stage.quorate(ASKER, &["vm", "plug", &guest.name, "--disk", DATA, "--wait"]).await?;
    stage.quorate(ASKER, &["vm", "migrate", &guest.name, "--to", &HOMES[0].to_string(), "--wait"]).await?;
    has(stage, &guest, &["shared1", "shared2"], &["lo"]).await?;
    stage.quorate(ASKER, &["vm", "unplug", &guest.name, "shared2", "--wait"]).await?;
    has(stage, &guest, &["shared1"], &["lo"]).await?;
    let said = guest.console(stage, ASKER, &["disk-check"]).await?;
    ensure!(said.contains("disk-check ok"), "its first disk is not as it was written: {said}");
    guest.stop(stage, ASKER).await?;
    table.print();
    Ok(())
}

/// The serials of its disks and the names of its cards, as the guest sees them. Its kernel takes a moment over what comes and goes.
async fn has(stage: &Stage, guest: &Guest, disks: &[&str], cards: &[&str]) -> Result<()> {
    let ask = "sh echo has $(for d in /sys/block/vd*; do cat $d/serial; echo; done) and $(ls /sys/class/net) in-all";
    let expected = format!("has {} and {} in-all", disks.join(" "), cards.join(" "));
    let sees = async || {
        let said = guest.console(stage, ASKER, &[ask]).await?;
        let line =
            said.lines().rev().find(|line| line.starts_with("has ")).with_context(|| format!("no answer: {said}"))?;
        println!("  {}", line.trim());
        Ok((line.trim() == expected).then_some(()))
    };
    stage.until(&format!("the guest {expected}"), WITHIN, sees).await
}

async fn answers(stage: &Stage) -> Result<()> {
    let ping = async || {
        let done = stage.run(ASKER, &["ping", "-c", "1", "-W", "2", ADDRESS]).await?;
        Ok((done.code == 0).then_some(()))
    };
    stage.until("the guest answers pings", WITHIN, ping).await
}
