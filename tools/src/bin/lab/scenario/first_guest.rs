//! `lab show guest`: a stock Debian kernel in userland, its console from another host, two vCPUs, shutdown by ACPI,
//! a disk whose content survives (issue: *a real Linux guest runs on it*).

use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let (asker, runner) = (HostId(1), HostId(2));
    let guest = Guest::define(stage, asker, "web1", &Shape { vcpus: 2, disks: &["shared1"], lease: false }).await?;

    stage.say("a stock Debian kernel reaches userland");
    let asked_ns = stage.now_ns();
    let up = guest.start(stage, asker, runner).await?;
    println!("  {runner} | {}", up.line);
    ensure!(up.line.contains("cpus=2"), "two vCPUs were asked for: {}", up.line);
    table.seconds("vm start -> userland", (up.t_ns - asked_ns) as f64 / 1e9, "");

    stage.say("its console, from a host that does not run it");
    println!("host3# quorate vm console {}    # typed: cpus, disk-check", guest.name);
    let said = guest.console(stage, HostId(3), &["cpus", "disk-check"], "disk-check ").await?;
    said.lines().filter(|line| !line.starts_with("counter")).for_each(|line| println!("  {line}"));
    ensure!(said.contains("cpus 2"), "the guest did not answer on its console: {said}");
    let check =
        said.lines().find(|line| line.contains("disk-check ok")).context("the disk was not written and read")?;
    let written = word(check, "sha256").context("no checksum")?;

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
    table.print();
    Ok(())
}

/// The value of `name=value` in a line.
fn word<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}
