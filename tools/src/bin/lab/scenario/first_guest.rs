//! `lab show guest`: a stock Debian kernel in userland, its console from another host, two vCPUs, shutdown by ACPI,
//! a disk whose content survives, a network card that answers pings and carries bulk.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

/// Beyond the hosts' own.
const ADDRESS: &str = "10.77.0.101";

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let (asker, runner) = (HostId(1), HostId(2));
    let shape = Shape { vcpus: 2, disks: &["shared1"], address: Some(ADDRESS), agent: false, lease: false };
    let guest = Guest::define(stage, asker, "web1", &shape).await?;

    stage.say("a stock Debian kernel reaches userland");
    let asked_ns = stage.now_ns();
    let up = guest.start(stage, asker, runner).await?;
    println!("  {runner} | {}", up.line);
    ensure!(up.line.contains("cpus=2"), "two vCPUs were asked for: {}", up.line);
    table.seconds("vm start -> userland", (up.t_ns - asked_ns) as f64 / 1e9, "");

    stage.say("its console, from a host that does not run it");
    println!("host3# quorate vm console {}    # typed: cpus, disk-check", guest.name);
    let said = guest.console(stage, HostId(3), &["cpus", "disk-check"]).await?;
    said.lines().filter(|line| !line.starts_with("counter")).for_each(|line| println!("  {line}"));
    ensure!(said.contains("cpus 2"), "the guest did not answer on its console: {said}");
    let check =
        said.lines().find(|line| line.contains("disk-check ok")).context("the disk was not written and read")?;
    let written = word(check, "sha256").context("no checksum")?;

    stage.say("its network card, from a host that does not run it");
    network(stage, &guest, &mut table).await?;

    stage.say("shutdown by the ACPI power button");
    let begun = Instant::now();
    guest.stop(stage, asker).await?;
    table.seconds("vm stop -> Down", begun.elapsed().as_secs_f64(), "");
    let lines = stage.console(runner)?;
    ensure!(lines.iter().any(|line| line.line.contains("power button")), "the guest saw no power button");

    stage.say("started again on another host, the disk holds what was written");
    let again = guest.start(stage, asker, HostId(3)).await?;
    let pattern = stage.console_says(HostId(3), "disk-pattern", up.t_ns, super::guest::BOOT_LIMIT).await?;
    println!("  host3 | {}", pattern.line);
    ensure!(pattern.line.contains("disk-pattern ok"), "the pattern does not match: {}", pattern.line);
    ensure!(word(&pattern.line, "sha256") == Some(written), "another pattern than {written}: {}", pattern.line);
    ensure!(word(&again.line, "boot_id") != word(&up.line, "boot_id"), "a new start is a new boot");
    table.row("disk after restart on another host", "checksum equal", "equal");

    stage.say("as another processor: a named model, two sockets");
    guest.stop(stage, asker).await?;
    stage.quorate(asker, &["vm", "change", &guest.name, "--cpu", "x86-64-v2", "--topology", "2x1x1"]).await?;
    guest.start(stage, asker, HostId(3)).await?;
    let flags =
        "sh grep -m1 -wo sse4_2 /proc/cpuinfo; grep -m1 -wo avx2 /proc/cpuinfo; grep \"physical id\" /proc/cpuinfo";
    let said = guest.console(stage, asker, &[flags]).await?;
    let has = |word: &str| said.lines().any(|line| line.trim() == word);
    let sockets: BTreeSet<&str> =
        said.lines().filter_map(|line| line.trim().split_once("physical id")).map(|(_, id)| id).collect();
    ensure!(has("sse4_2") && !has("avx2") && sockets.len() == 2, "the guest is on another processor: {said}");
    table.row("x86-64-v2 in two sockets", "sse4_2, no avx2, 2", "as defined");
    table.print();
    Ok(())
}

/// Pings, and a file from the guest to another host: its segments leave the guest uncut, and are cut by the host's kernel.
async fn network(stage: &Stage, guest: &Guest, table: &mut Table) -> Result<()> {
    const MIB: u32 = 4;
    let from = HostId(3);
    let pings = stage.sh(from, &format!("ping -c 20 -i 0.2 -W 2 {ADDRESS}")).await?;
    let summary = |start: &str| pings.lines().find(|line| line.contains(start)).unwrap_or_default().to_owned();
    println!("  {}\n  {}", summary("packets transmitted"), summary("round-trip"));
    let lost = lost_pings(&pings).context("ping said nothing of losses")?;
    ensure!(lost == "0%", "pings were lost: {pings}");
    table.row("pings of 20 lost", lost, "0%");

    // With its own input at an end nc would hang up at once, and busybox's at the other end takes that for the end of all.
    stage.sh(from, "rm -f /tmp/got; (sleep 120 | nc -l -p 9000 >/tmp/got) >/dev/null 2>&1 </dev/null &").await?;
    let make = format!("sh dd if=/dev/urandom of=/tmp/blob bs=64k count={} 2>/dev/null; sha256sum /tmp/blob", MIB * 16);
    let send = "sh nc 10.77.0.3 9000 </tmp/blob; echo all-sent";
    let said = guest.console(stage, from, &[&make, send]).await?;
    let sum = said.lines().find_map(|line| line.strip_suffix("  /tmp/blob")).context("the guest made no file")?;
    let got = stage.sh(from, "sha256sum </tmp/got").await?;
    ensure!(got.starts_with(sum.trim()), "host3 got another file ({got}) than the guest sent ({sum})");
    table.row(&format!("{MIB} MiB from the guest to a host"), "checksum equal", "equal");
    Ok(())
}

/// `0%` of `20 packets transmitted, 20 packets received, 0% packet loss`.
fn lost_pings(said: &str) -> Option<String> {
    said.split(", ").find_map(|part| part.split_once(" packet loss")).map(|(share, _)| share.to_owned())
}

/// The value of `name=value` in a line.
fn word<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}
