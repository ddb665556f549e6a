//! `lab demo`: the main job from nothing to the loss of the leader.

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;

use super::guest::INITRD;
use super::guest::KERNEL;
use super::stage::Counter;
use super::stage::Stage;
use super::stage::largest_gap;
use super::table::Table;
use crate::control::PowerAction;
use crate::state::HostId;

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();

    stage.say("three hosts become one cluster");
    let joins = stage.form_cluster().await?;
    for (took, host) in joins.iter().zip(2..) {
        table.seconds(&format!("join of host{host}"), *took, "<= 5 s");
    }
    stage.quorate(HostId(2), &["status"]).await?;
    stage.quorate(HostId(3), &["host", "list"]).await?;

    stage.say("a VM is defined on one host and started from another");
    let leader = stage.leader(HostId(1)).await?;
    // Beside the leader, so that the leader's loss is not the guest's.
    let runner = stage.hosts().find(|host| *host != leader).unwrap_or(HostId(2));
    let asker = stage.hosts().find(|host| *host != leader && *host != runner).unwrap_or(HostId(3));
    let create = ["vm", "create", "web1", "--vcpus", "2", "--memory", "256MiB", "--kernel", KERNEL, "--initrd", INITRD];
    let create: Vec<&str> = create.into_iter().chain(["--cmdline", "console=ttyS0 quiet"]).collect();
    stage.quorate(asker, &create).await?;
    let asked_ns = stage.now_ns();
    stage.quorate(leader, &["vm", "start", "web1", "--host", &runner.to_string()]).await?;
    let up = stage.console_says(runner, "quorate-guest up", asked_ns, Duration::from_secs(120)).await?;
    table.seconds("vm start -> Linux guest in userland", (up.t_ns - asked_ns) as f64 / 1e9, "");
    stage.quorate(asker, &["vm", "list"]).await?;
    stage.quorate(asker, &["why", "web1"]).await?;

    stage.say("what the guest says, seen from outside");
    stage.console_says(runner, "counter ", up.t_ns, Duration::from_secs(30)).await?;
    for line in stage.console(runner)?.iter().filter(|line| line.t_ns >= asked_ns).take(6) {
        println!("  {runner} | {}", line.line);
    }

    stage.say("what happened, from any host");
    stage.quorate(asker, &["events", "--from", "oldest"]).await?;

    stage.say(&format!("{leader} leads and loses its power"));
    let lost = Instant::now();
    let lost_ns = stage.now_ns();
    stage.power(leader, PowerAction::Off).await?;
    // A write that is refused or answered late is asked again, as its key allows.
    stage.echo = false;
    stage
        .until("the next commit", Duration::from_secs(60), async || {
            let done = stage
                .try_quorate(asker, &["vm", "create", "web2", "--vcpus", "1", "--memory", "64MiB", "--kernel", KERNEL])
                .await?;
            Ok((done.code == 0 || done.stderr.contains("exists already")).then_some(()))
        })
        .await?;
    let commit = lost.elapsed().as_secs_f64();
    stage.echo = true;
    table.seconds("leader's power off -> next commit (by the command line)", commit, "");
    let next = stage.leader(asker).await?;
    ensure!(next != leader, "{leader} is without power and cannot lead");
    stage.quorate(asker, &["status"]).await?;
    table.row("new leader", next.to_string(), "another host");

    stage.say("the guest did not notice");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let lines = stage.console(runner)?;
    let counters: Vec<Counter> = lines.iter().filter(|line| line.t_ns >= up.t_ns).filter_map(Counter::parse).collect();
    let before = counters.iter().rfind(|counter| counter.t_ns < lost_ns);
    let after = counters.last();
    let (Some(before), Some(after)) = (before, after) else { anyhow::bail!("the guest's counter was never seen") };
    ensure!(
        after.n > before.n && after.boot == before.boot,
        "the counter stood still or began anew: {before:?}, {after:?}"
    );
    table.row("guest's counter when the leader was lost", before.n.to_string(), "");
    table.row("guest's counter now, same boot", after.n.to_string(), "goes on");
    if let Some((gap, from, to)) = largest_gap(&counters) {
        table.row("largest gap between two lines", format!("{gap:.2} s ({from} -> {to})"), "");
    }
    stage.quorate(asker, &["vm", "list"]).await?;

    table.print();
    Ok(())
}
