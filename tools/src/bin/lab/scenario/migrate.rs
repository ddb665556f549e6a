//! `lab show migrate`: a guest that writes to its shared disk and answers pings moves between two hosts, back and forth, while it writes to
//! its memory faster than that may be copied. Witnesses outside see one writer at a time, no stamp that is lost, and how long nobody
//! answered.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use jiff::Timestamp;
use serde_json::Value;

use super::guest::Guest;
use super::guest::Shape;
use super::guest::field;
use super::stage::Counter;
use super::stage::Stage;
use super::table::Table;
use super::table::spread;
use crate::state::HostId;

const DISK: &str = "shared1";
const ADDRESS: &str = "10.77.0.104";
const PING_EVERY_MS: u32 = 100;
/// MiB a second that a migration may take.
const CAP: &str = "4";
/// Writes 8 MiB round and round, 1 MiB at a time, faster than that where the processors allow it. Not zeros: those cost nothing.
const WRITER: &str = "dd if=/dev/urandom of=/run/pattern bs=256k count=4 2>/dev/null; \
    (i=0; while :; do dd if=/run/pattern of=/run/dirt bs=256k count=4 seek=$((i * 4)) conv=notrunc 2>/dev/null; \
    i=$(((i + 1) % 8)); usleep 20000; done) </dev/null >/dev/null 2>&1 & echo writes";
/// Asked, and pinging, from the host that never runs the guest.
const ASKER: HostId = HostId(1);
const HOMES: [HostId; 2] = [HostId(2), HostId(3)];
const WITHIN: Duration = Duration::from_secs(120);

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let shape = Shape { vcpus: 2, disks: &[DISK], address: Some(ADDRESS), agent: false, lease: true };
    let guest = Guest::define(stage, ASKER, "web1", &shape).await?;
    stage.quorate(ASKER, &["vm", "change", &guest.name, "--migrate-bandwidth", CAP]).await?;
    let up = guest.start(stage, ASKER, HOMES[0]).await?;
    println!("  {} | {}", HOMES[0], up.line);
    until_pings(stage).await?;
    guest.console(stage, ASKER, &[&format!("sh {WRITER}")], "sh exit").await?;
    let interval = f64::from(PING_EVERY_MS) / 1000.0;
    let ping = format!("rm -f /tmp/pings; (ping -i {interval} {ADDRESS} >/tmp/pings 2>&1 </dev/null &)");
    stage.sh(ASKER, &ping).await?;

    let (mut took, mut legs) = (Vec::new(), Vec::new());
    let since_ns = stage.now_ns();
    for run in 0..runs {
        let to = HOMES[(run as usize + 1) % HOMES.len()];
        stage.say(&format!("migration {} of {runs}, to {to}", run + 1));
        let begun = Instant::now();
        let said = stage.quorate(ASKER, &["vm", "migrate", &guest.name, "--to", &to.to_string(), "--wait"]).await?;
        took.push(begun.elapsed().as_secs_f64());
        writes_from(stage, to).await?;
        let from = HOMES[run as usize % HOMES.len()];
        let leg = Leg::of(stage, &guest, from, to, seq_of(&said)?).await?;
        println!("  {leg}");
        ensure!(leg.rounds >= 3 && leg.throttle_percent > 0, "it was not written to faster than it was copied");
        legs.push(leg);
    }
    let answered = pings(stage).await?;
    table.row("migrations", runs.to_string(), "");
    table.row("vm migrate --wait", spread(&mut took), "");
    let mut column = |name: &str, of: fn(&Leg) -> f64| {
        table.row(name, spread(&mut legs.iter().map(of).collect::<Vec<_>>()), "");
    };
    column("  it stood: last memory and states", |leg| leg.stood_s);
    column("  then until the commit", |leg| leg.to_commit_s);
    column("  then until it ran", |leg| leg.to_run_s);
    let rounds = || legs.iter().map(|leg| leg.rounds);
    let throttles = || legs.iter().map(|leg| leg.throttle_percent);
    let span = |least: Option<u64>, most: Option<u64>| format!("{} to {}", least.unwrap_or(0), most.unwrap_or(0));
    table.row("rounds", span(rounds().min(), rounds().max()), "at least 3");
    table.row("held back at the end, %", span(throttles().min(), throttles().max()), "more than 0");
    one_writer(stage, since_ns, runs, &mut table)?;
    counted_on(stage, &guest, since_ns, &mut table)?;
    table.row("longest time without an answer to a ping", format!("{:.1} s", answered * interval), "");

    stage.say("the disk holds what it should, and the guest shuts down in order");
    let home = HOMES[runs as usize % HOMES.len()];
    let said = guest.console(stage, ASKER, &["disk-check"], "disk-check ").await?;
    ensure!(said.contains("disk-check ok"), "the disk is not as it was written: {said}");
    let shown = guest.show(stage, ASKER).await?;
    let host = field(&shown, "host_name").and_then(Value::as_str).unwrap_or_default();
    ensure!(host == home.to_string(), "it runs on {host} instead of {home}");
    guest.stop(stage, ASKER).await?;
    table.print();
    Ok(())
}

/// What the two hosts say of one migration.
struct Leg {
    rounds: u64,
    throttle_percent: u64,
    sent_mib: u64,
    /// From the stop of the guest to the end of its stream.
    stood_s: f64,
    to_commit_s: f64,
    to_run_s: f64,
}

impl Leg {
    async fn of(stage: &Stage, guest: &Guest, from: HostId, to: HostId, migration: u64) -> Result<Leg> {
        let sent = log_line(stage, from, "all of the guest was sent", migration).await?;
        let runs = log_line(stage, to, "a guest from another host runs here", migration).await?;
        let events =
            stage.sh(ASKER, &format!("quorate -o json events --entity vm/{} --from oldest", guest.name)).await?;
        let events = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut commits = events.filter(|event| {
            event["kind"] == "MigrationCommitted" && event["data"]["migration"].as_u64() == Some(migration)
        });
        let commit = commits.next().context("no event says that it was committed")?;
        let committed: Timestamp = commit["at"].as_str().context("the commit has no time")?.parse()?;
        let number = |name: &str| value_of(&sent, name).and_then(|value| value.parse::<u64>().ok());
        let number = |name: &str| number(name).with_context(|| format!("{sent:?} says no {name}"));
        let seconds = |from: Timestamp, to: Timestamp| to.duration_since(from).as_secs_f64();
        Ok(Leg {
            rounds: number("rounds")?,
            throttle_percent: number("throttle_percent")?,
            sent_mib: number("sent_mib")?,
            stood_s: number("stood_us")? as f64 / 1e6,
            to_commit_s: seconds(time_of(&sent)?, committed),
            to_run_s: seconds(committed, time_of(&runs)?),
        })
    }
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Leg { rounds, throttle_percent, sent_mib, stood_s, to_commit_s, to_run_s } = self;
        write!(
            f,
            "{rounds} rounds, {sent_mib} MiB, held back {throttle_percent} % at the end; \
             stood {stood_s:.3} s, commit {to_commit_s:.3} s, runs {to_run_s:.3} s"
        )
    }
}

/// The line of a host's log about this migration.
async fn log_line(stage: &Stage, host: HostId, words: &str, migration: u64) -> Result<String> {
    let find = format!("grep '{words}' /var/log/hostd.log | grep -w 'migration={migration}' | tail -n 1");
    let line = stage.sh(host, &find).await?;
    ensure!(!line.trim().is_empty(), "{host} does not log {words:?} of migration {migration}");
    Ok(line.trim().to_owned())
}

fn time_of(line: &str) -> Result<Timestamp> {
    let first = line.split_whitespace().next().context("an empty line of a log")?;
    first.parse().with_context(|| format!("{first:?} is not a time"))
}

/// `name=value` in a line of a log.
fn value_of<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// `... (seq 17)`.
fn seq_of(said: &str) -> Result<u64> {
    let seq = said.rsplit_once("(seq ").and_then(|(_, end)| end.split(')').next());
    seq.and_then(|seq| seq.parse().ok()).with_context(|| format!("{said:?} names no seq"))
}

async fn until_pings(stage: &Stage) -> Result<()> {
    let answers = async || {
        let done = stage.run(ASKER, &["ping", "-c", "1", "-W", "2", ADDRESS]).await?;
        Ok((done.code == 0).then_some(()))
    };
    stage.until("the guest answers pings", WITHIN, answers).await
}

/// Waits until a write of `host` has reached the disk.
async fn writes_from(stage: &Stage, host: HostId) -> Result<()> {
    let since_ns = stage.now_ns();
    let what = format!("{host} writes for the guest");
    stage
        .until(&what, WITHIN, async || {
            let writes = stage.writes(DISK)?;
            Ok(writes.iter().any(|write| write.host == host.0 && write.t_ns >= since_ns).then_some(()))
        })
        .await
}

/// Pings that nobody answered, at most in a row.
async fn pings(stage: &Stage) -> Result<f64> {
    stage.sh(ASKER, "kill -INT $(pidof ping); true").await?;
    let said = stage.sh(ASKER, "cat /tmp/pings").await?;
    let heard: BTreeSet<u32> = said.lines().filter_map(seq).collect();
    let all: Vec<u32> = heard.into_iter().collect();
    let silence = all.windows(2).map(|pair| pair[1] - pair[0] - 1).max().context("no ping was answered")?;
    println!("  {} pings answered, at most {silence} in a row were not", all.len());
    Ok(f64::from(silence))
}

/// `64 bytes from 10.77.0.104: seq=12 ttl=64 time=1.2 ms`.
fn seq(line: &str) -> Option<u32> {
    line.split_whitespace().find_map(|word| word.strip_prefix("seq="))?.parse().ok()
}

/// The disk was written by one host at a time: it changed hands as often as the guest did.
fn one_writer(stage: &Stage, since_ns: u64, runs: u32, table: &mut Table) -> Result<()> {
    let mut writes = stage.writes(DISK)?;
    writes.retain(|write| write.t_ns >= since_ns);
    writes.sort_by_key(|write| write.t_ns);
    let hands = writes.windows(2).filter(|pair| pair[0].host != pair[1].host).count();
    ensure!(hands == runs as usize, "the disk changed hands {hands} times in {runs} migrations");
    table.row("times that the disk's writer changed", hands.to_string(), &runs.to_string());
    let stamps: Vec<u64> = writes.iter().filter_map(|write| write.stamp()).map(|(_, _, n)| n).collect();
    ensure!(stamps.windows(2).all(|pair| pair[0] <= pair[1]), "an older stamp came after a newer one");
    let skipped = stamps.windows(2).map(|pair| pair[1].saturating_sub(pair[0] + 1)).max().unwrap_or_default();
    table.row("stamps that are missing in a row, at most", skipped.to_string(), "");
    let gap = writes.windows(2).map(|pair| pair[1].t_ns - pair[0].t_ns).max().unwrap_or_default();
    table.seconds("longest time between two writes (one a second)", gap as f64 / 1e9, "");
    Ok(())
}

/// The guest counted on: one boot, no number twice or left out.
fn counted_on(stage: &Stage, guest: &Guest, since_ns: u64, table: &mut Table) -> Result<()> {
    let mut counters: Vec<Counter> = Vec::new();
    for home in HOMES {
        counters.extend(stage.counters(home, &guest.id, since_ns)?);
    }
    counters.sort_by_key(|counter| counter.t_ns);
    let boots: BTreeSet<&str> = counters.iter().map(|counter| counter.boot.as_str()).collect();
    ensure!(boots.len() == 1, "the guest booted again: {boots:?}");
    let broken = counters.windows(2).find(|pair| pair[1].n != pair[0].n + 1);
    ensure!(broken.is_none(), "its counter does not go on: {broken:?}");
    table.row("numbers that it counted meanwhile, none lost or twice", counters.len().to_string(), "");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_log_has_a_time_and_values() {
        let line = "2026-11-22T17:17:12.510427Z  INFO hostd: sent vm=7 migration=14 rounds=3 stood_us=12000";
        assert_eq!((value_of(line, "rounds"), value_of(line, "round")), (Some("3"), None));
        assert_eq!(time_of(line).unwrap().as_second(), 1_795_367_832);
        assert_eq!(seq_of("vm web1 is Up on host host3 (seq 17)\n").unwrap(), 17);
        assert!(seq_of("vm web1").is_err());
    }

    #[test]
    fn the_number_of_an_answered_ping() {
        assert_eq!(seq("64 bytes from 10.77.0.104: seq=12 ttl=64 time=1.234 ms"), Some(12));
        assert_eq!(seq("PING 10.77.0.104 (10.77.0.104): 56 data bytes"), None);
    }
}
