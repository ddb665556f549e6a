//! `lab show poweroff`: all hosts lose their power at once while commands are written, again and again. Whatever was
//! acknowledged is there afterwards, and all hosts believe the same. With `--ignore-flush` the disks lie, and the story must
//! break off: else it would prove nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use futures::future::try_join_all;
use rand::Rng;
use serde_json::Value;

use super::probe::Access;
use super::probe::Commit;
use super::stage::Stage;
use super::table::Table;
use super::table::spread;
use crate::control::PowerAction;
use crate::state::HostId;

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let access = Access::make(stage).await?;
    stage.echo = false;
    let (mut acknowledged, mut seconds, mut cursor) = (0, Vec::new(), None);
    for run in 1..=runs {
        let probe = access.probe(stage)?;
        let begun_ns = stage.now_ns();
        stage.until("commits", Duration::from_secs(60), async || Ok(probe.first_after(begun_ns))).await?;
        let more_ms = rand::rng().random_range(300..3_000);
        tokio::time::sleep(Duration::from_millis(more_ms)).await;
        try_join_all(stage.hosts().map(|host| stage.power(host, PowerAction::Off))).await?;
        let told = probe.end();
        let on_ns = stage.now_ns();
        try_join_all(stage.hosts().map(|host| stage.power(host, PowerAction::On))).await?;
        for host in stage.hosts() {
            still_a_member(stage, host).await?;
        }
        let seq = one_digest(stage).await?;
        let took = (stage.now_ns() - on_ns) as f64 / 1e9;
        let asked = HostId(1 + (run % u32::from(stage.host_count() as u8)) as u8);
        cursor = all_are_there(stage, asked, &told, cursor).await?;
        println!(
            "  run {run:2}: {} acknowledged, all there; one digest at {seq} {took:.1} s after power on",
            told.len()
        );
        acknowledged += told.len();
        seconds.push(took);
    }
    let mut table = Table::default();
    table.row("power cuts of all hosts at once", runs.to_string(), "");
    table.row("commands acknowledged before them", acknowledged.to_string(), "");
    table.row("of these lost", "0", "0");
    table.row("power on -> one digest on every host", spread(&mut seconds), "");
    table.print();
    Ok(())
}

/// hostd answers while it starts, and where it lost what it had flushed, as one that belongs to no site.
async fn still_a_member(stage: &Stage, host: HostId) -> Result<()> {
    stage
        .until(&format!("{host} is a member as before"), Duration::from_secs(60), async || {
            let status = stage.query(host, &["status"]).await?;
            Ok((!status["member"].is_null()).then_some(()))
        })
        .await
}

/// Waits until all hosts tell their digests at one seq, which must be one digest.
async fn one_digest(stage: &Stage) -> Result<u64> {
    // A write that is acknowledged first: equal seqs may else be those from before the last entries were applied again.
    stage
        .until("a write is acknowledged", Duration::from_secs(90), async || {
            stage.query(HostId(1), &["token", "create", "--ttl", "1m"]).await.map(Some)
        })
        .await?;
    let told = stage
        .until("all hosts are at one seq", Duration::from_secs(90), async || {
            let told = stage.query(HostId(1), &["state", "digest"]).await?;
            let hosts = told["hosts"].as_array().context("no hosts in the digests")?;
            let mut seqs = hosts.iter().map(|host| host["digest"]["seq"].as_u64());
            let first = seqs.next().flatten();
            Ok((hosts.len() == stage.host_count() && first.is_some() && seqs.all(|seq| seq == first)).then_some(told))
        })
        .await?;
    let hosts = told["hosts"].as_array().context("no hosts in the digests")?;
    let first = &hosts[0]["digest"];
    ensure!(hosts.iter().all(|host| host["digest"] == *first), "hosts believe different things at one seq: {told}");
    first["seq"].as_u64().context("no seq in a digest")
}

/// Every commit is in the stream of this host at its seq. Returns the cursor behind what was read.
async fn all_are_there(stage: &Stage, host: HostId, told: &[Commit], cursor: Option<String>) -> Result<Option<String>> {
    let begin: &[&str] = match &cursor {
        Some(cursor) => &["--after", cursor],
        None => &["--from", "oldest"],
    };
    let asked = [&["-o", "json", "events", "--kind", "VmSpecChanged"], begin].concat();
    let said = stage.quorate(host, &asked).await?;
    let events = said.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>();
    let events = events.context("`quorate events` printed what is no JSON")?;
    let written = |event: &Value| Some((event["seq"].as_u64()?, event["data"]["spec"]["cmdline"].as_str()?.to_owned()));
    let there: BTreeMap<u64, String> = events.iter().filter_map(written).collect();
    for commit in told {
        let found = there.get(&commit.seq);
        ensure!(
            found == Some(&commit.wrote),
            "LOST: {:?} was acknowledged as batch {}, where {host} has {found:?}",
            commit.wrote,
            commit.seq
        );
    }
    Ok(events.last().and_then(|event| event["cursor"].as_str()).map(str::to_owned).or(cursor))
}
