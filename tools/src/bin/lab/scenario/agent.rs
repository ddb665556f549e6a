//! `lab show agent`: QEMU's own guest agent in a guest says who it is, runs programs, freezes and thaws, and is heard again after
//! hostd was killed and after the guest restarted.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde_json::Value;

use super::guest::BOOT_LIMIT;
use super::guest::Guest;
use super::guest::Shape;
use super::guest::field;
use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

const ADDRESS: &str = "10.77.0.102";
/// The observer reports at most each half minute.
const FACTS_WITHIN: Duration = Duration::from_secs(60);

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let (asker, runner) = (HostId(1), HostId(2));
    let shape = Shape { vcpus: 1, disks: &[], address: Some(ADDRESS), agent: true, lease: false };
    let guest = Guest::define(stage, asker, "web1", &shape).await?;
    guest.start(stage, asker, runner).await?;
    let up = Instant::now();

    stage.say("what the guest says of itself is known on every host");
    facts(stage, &guest, ADDRESS).await?;
    table.seconds("userland -> facts in the log", up.elapsed().as_secs_f64(), "");
    print!("{}", stage.quorate(HostId(3), &["vm", "list"]).await?);
    let events = stage.sh(HostId(3), "quorate events --entity vm/web1 --from oldest | grep VmObservedGuest").await?;
    println!("  {}", events.trim());
    table.row("events that it took", events.lines().count().to_string(), "1");

    stage.say("asked from a host that does not run it");
    let shown = stage.query(asker, &["guest", "show", &guest.name]).await?;
    ensure!(field(&shown, "health").and_then(Value::as_str) == Some("up"), "the agent is not up: {shown}");
    let said = stage.quorate(asker, &["guest", "exec", &guest.name, "--", "/bin/uname", "-r"]).await?;
    ensure!(said.contains("cloud-amd64"), "the guest's kernel is another: {said}");
    let failed = stage.try_quorate(asker, &["guest", "exec", &guest.name, "--", "/bin/false"]).await?;
    ensure!(failed.code == 1, "a program that fails is a failure: {}", failed.code);
    stage.quorate(asker, &["guest", "set-time", &guest.name]).await?;
    table.row("programs run in the guest", "2", "");

    stage.say("hostd dies; the next one hears the agent again, and the log needs no new event");
    stage.sh(runner, "kill -9 $(cat /run/service/hostd/pid)").await?;
    let begun = Instant::now();
    agent_is(stage, asker, &guest, "up").await?;
    table.seconds("hostd killed -> agent answers", begun.elapsed().as_secs_f64(), "");

    stage.say("the guest restarts itself");
    let since_ns = stage.now_ns();
    stage.quorate(asker, &["guest", "reboot", &guest.name]).await?;
    guest.boots(stage, runner, since_ns).await?;
    agent_is(stage, asker, &guest, "up").await?;

    stage.say("a guest that is down says nothing");
    guest.stop(stage, asker).await?;
    let refused = stage.try_quorate(asker, &["guest", "show", &guest.name]).await?;
    ensure!(refused.code != 0, "a guest that is down was asked");
    let shown = guest.show(stage, asker).await?;
    ensure!(field(&shown, "guest").is_none_or(Value::is_null), "something is known of it: {shown}");
    table.print();
    Ok(())
}

/// Waits until the log knows name, system and address.
pub async fn facts(stage: &Stage, guest: &Guest, address: &str) -> Result<()> {
    let known = stage
        .until("the guest's facts", FACTS_WITHIN, async || {
            let shown = guest.show(stage, HostId(3)).await?;
            Ok(field(&shown, "guest").filter(|facts| !facts.is_null()).cloned())
        })
        .await?;
    let text = known.to_string();
    ensure!(known["hostname"] == guest.name.as_str(), "another name: {text}");
    ensure!(known["os"]["id"] == "debian", "another system: {text}");
    let interfaces = known["interfaces"].as_array().context("no interfaces")?;
    let card = interfaces.iter().find(|interface| interface["name"] == "eth0").context("no card")?;
    let addresses = card["addresses"].as_array().context("no addresses")?;
    ensure!(addresses.contains(&Value::from(format!("{address}/24"))), "another address: {text}");
    Ok(())
}

async fn agent_is(stage: &Stage, asker: HostId, guest: &Guest, health: &str) -> Result<()> {
    let what = format!("the agent of {} is {health}", guest.name);
    stage
        .until(&what, BOOT_LIMIT, async || {
            let asked = stage.try_quorate_quietly(asker, &["guest", "show", &guest.name, "-o", "json"]).await?;
            Ok((asked.code == 0 && asked.stdout.contains(&format!("\"health\": \"{health}\""))).then_some(()))
        })
        .await
}
