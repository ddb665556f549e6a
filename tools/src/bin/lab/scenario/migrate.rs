//! `lab show migrate`: a guest that writes to its shared disk and answers pings moves between two hosts, back and forth, while it writes to
//! its memory faster than that may be copied. Witnesses outside see one writer at a time, no stamp that is lost, and how long nobody
//! answered.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use jiff::Timestamp;
use serde_json::Value;

use super::guest::Guest;
use super::guest::Shape;
use super::stage::Counter;
use super::stage::DiskWrite;
use super::stage::Stage;
use super::stage::first_line;
use super::table::Table;
use super::table::spread;
use crate::state::HostId;

const DISK: &str = "shared1";
const ADDRESS: &str = "10.77.0.104";
const PING_EVERY_MS: u32 = 100;
/// MiB a second that a migration may take.
const CAP: &str = "6";
/// Writes 8 MiB round and round, 4 MiB at a time, faster than that also where others need the processors. Not zeros: those cost nothing.
const WRITER: &str = "dd if=/dev/urandom of=/run/pattern bs=1M count=4 2>/dev/null; \
    (i=0; while :; do dd if=/run/pattern of=/run/dirt bs=1M count=4 seek=$((i * 4)) conv=notrunc 2>/dev/null; \
    i=$(((i + 1) % 2)); usleep 20000; done) </dev/null >/dev/null 2>&1 & echo writes";
/// Asked, and pinging, from the host that never runs the guest.
const ASKER: HostId = HostId(1);
const HOMES: [HostId; 2] = [HostId(2), HostId(3)];
const WITHIN: Duration = Duration::from_secs(120);

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let shape = Shape { vcpus: stage.cpus.min(2), disks: &[DISK], address: Some(ADDRESS), agent: false, lease: true };
    let guest = Guest::define(stage, ASKER, "web1", &shape).await?;
    stage.quorate(ASKER, &["vm", "change", &guest.name, "--migrate-bandwidth", CAP]).await?;
    let up = guest.start(stage, ASKER, HOMES[0]).await?;
    println!("  {} | {}", HOMES[0], up.line);

    let (mut legs, mut seen, mut stops) = (Vec::new(), Seen::default(), 0);
    while legs.len() < runs as usize {
        busy(stage, &guest).await?;
        let (since_ns, before) = (stage.now_ns(), legs.len());
        let end = back_and_forth(stage, &guest, runs as usize, &mut legs).await;
        if let Some(last) = legs[before..].last() {
            seen = seen.and(Seen::look(stage, &guest, since_ns..last.at_ns, legs.len() - before).await?);
        }
        match end {
            Ok(()) => {}
            // Known of the emulator, see docs/operations/lab.md. Hosts that all answer have broken a promise instead.
            Err(error) if stops < runs / 5 + 1 && stage.revive(None).await? => {
                stops += 1;
                println!("  this migration does not count: {}", first_line(&error));
                settle(stage, &guest).await?;
            }
            Err(error) => return Err(error),
        }
    }

    stage.say("the disk holds what it should, and the guest shuts down in order");
    let said = guest.console(stage, ASKER, &["disk-check"]).await?;
    ensure!(said.contains("disk-check ok"), "the disk is not as it was written: {said}");
    guest.stop(stage, ASKER).await?;
    let pressed = legs.iter().filter(|leg| leg.rounds >= 3 && leg.throttle_percent > 0).count();
    table(&legs, pressed, &seen, stops).print();
    ensure!(pressed == legs.len(), "in some migrations the guest was not written to faster than it was copied");
    Ok(())
}

fn table(legs: &[Leg], pressed: usize, seen: &Seen, stops: u32) -> Table {
    let mut table = Table::default();
    table.row("migrations", legs.len().to_string(), "");
    let mut column = |name: &str, of: fn(&Leg) -> f64| {
        table.row(name, spread(&mut legs.iter().map(of).collect::<Vec<_>>()), "");
    };
    column("vm migrate --wait", |leg| leg.took_s);
    column("  to stand: vCPUs, disks, states", |leg| leg.settled_s);
    column("  then its last memory", |leg| leg.copied_s);
    column("  then until the commit", |leg| leg.to_commit_s);
    column("  then until it ran", |leg| leg.to_run_s);
    let span = |of: fn(&Leg) -> u64| {
        let all = || legs.iter().map(of);
        format!("{} to {}", all().min().unwrap_or_default(), all().max().unwrap_or_default())
    };
    table.row("rounds", span(|leg| leg.rounds), "at least 3");
    table.row("held back at the end, %", span(|leg| leg.throttle_percent), "more than 0");
    table.row("written to faster than it was copied", pressed.to_string(), &legs.len().to_string());
    table.row("times that the disk's writer changed", seen.hands.to_string(), &legs.len().to_string());
    table.row("stamps that are missing in a row, at most", seen.stamps_missing.to_string(), "");
    table.seconds("longest time between two writes (one a second)", seen.silent_s, "");
    table.row("numbers that it counted meanwhile, none twice", seen.counted.to_string(), "");
    table.row("  of which a line was cut in two by a move", seen.cut.to_string(), "");
    table.row("longest time without an answer to a ping", format!("{:.1} s", seen.unanswered_s), "");
    table.row("migrations that the emulator stopped, not counted", stops.to_string(), "");
    table
}

/// Has the guest write to its memory, and somebody ping it.
async fn busy(stage: &Stage, guest: &Guest) -> Result<()> {
    until_pings(stage).await?;
    guest.console(stage, ASKER, &[&format!("sh {WRITER}")]).await?;
    let interval = f64::from(PING_EVERY_MS) / 1000.0;
    let ping = format!("rm -f /tmp/pings; (ping -i {interval} {ADDRESS} >/tmp/pings 2>&1 </dev/null &)");
    stage.sh(ASKER, &ping).await.map(drop)
}

/// Until there were so many in all, or one does not come about.
async fn back_and_forth(stage: &mut Stage, guest: &Guest, runs: usize, legs: &mut Vec<Leg>) -> Result<()> {
    while legs.len() < runs {
        let from = guest.home(stage, ASKER).await?;
        let to = if from == HOMES[0] { HOMES[1] } else { HOMES[0] };
        stage.say(&format!("migration {} of {runs}, to {to}", legs.len() + 1));
        let begun = Instant::now();
        let said = stage.quorate(ASKER, &["vm", "migrate", &guest.name, "--to", &to.to_string(), "--wait"]).await?;
        let took_s = begun.elapsed().as_secs_f64();
        writes_from(stage, to).await?;
        let leg = Leg::of(stage, guest, from, to, seq_of(&said)?).await?;
        println!("  {leg}");
        legs.push(Leg { took_s, ..leg });
    }
    Ok(())
}

/// The cluster has started the guest again, or not lost it; the story goes on from one of its two homes.
async fn settle(stage: &Stage, guest: &Guest) -> Result<()> {
    stage.voters_reach(stage.host_count()).await?;
    stage.hosts_are_up().await?;
    stage.sh(ASKER, "kill -INT $(pidof ping); true").await?;
    guest.reaches(stage, ASKER, "Up", WITHIN).await?;
    if !HOMES.contains(&guest.home(stage, ASKER).await?) {
        let to = HOMES[0].to_string();
        stage.quorate(ASKER, &["vm", "migrate", &guest.name, "--to", &to, "--wait"]).await?;
    }
    Ok(())
}

/// What the two hosts say of one migration.
struct Leg {
    rounds: u64,
    throttle_percent: u64,
    sent_mib: u64,
    /// Of the whole command.
    took_s: f64,
    /// From the order to stop until its states were read, and from there to the end of its stream.
    settled_s: f64,
    copied_s: f64,
    to_commit_s: f64,
    to_run_s: f64,
    /// When it was over.
    at_ns: u64,
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
            took_s: 0.0,
            settled_s: number("settled_us")? as f64 / 1e6,
            copied_s: number("stood_us")?.saturating_sub(number("settled_us")?) as f64 / 1e6,
            to_commit_s: seconds(time_of(&sent)?, committed),
            to_run_s: seconds(committed, time_of(&runs)?),
            at_ns: stage.now_ns(),
        })
    }
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Leg { rounds, throttle_percent, sent_mib, settled_s, copied_s, to_commit_s, to_run_s, .. } = self;
        write!(
            f,
            "{rounds} rounds, {sent_mib} MiB, held back {throttle_percent} % at the end; \
             states {settled_s:.3} s, memory {copied_s:.3} s, commit {to_commit_s:.3} s, runs {to_run_s:.3} s"
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

/// `64 bytes from 10.77.0.104: seq=12 ttl=64 time=1.2 ms`.
fn seq(line: &str) -> Option<u32> {
    line.split_whitespace().find_map(|word| word.strip_prefix("seq="))?.parse().ok()
}

/// What witnesses saw from outside, of migrations that followed each other.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    /// How often the disk's writer changed.
    hands: usize,
    stamps_missing: u64,
    /// Longest time between two writes.
    silent_s: f64,
    counted: usize,
    /// Lines of its console that have their ends on two hosts.
    cut: usize,
    /// Longest time without an answer to a ping.
    unanswered_s: f64,
}

impl Seen {
    fn and(self, other: Seen) -> Seen {
        Seen {
            hands: self.hands + other.hands,
            stamps_missing: self.stamps_missing.max(other.stamps_missing),
            silent_s: self.silent_s.max(other.silent_s),
            counted: self.counted + other.counted,
            cut: self.cut + other.cut,
            unanswered_s: self.unanswered_s.max(other.unanswered_s),
        }
    }

    async fn look(stage: &Stage, guest: &Guest, when: Range<u64>, migrations: usize) -> Result<Seen> {
        let mut writes = stage.writes(DISK)?;
        writes.retain(|write| when.contains(&write.t_ns));
        let mut counters: Vec<Counter> = Vec::new();
        for home in HOMES {
            counters.extend(stage.counters(home, &guest.id, when.start)?);
        }
        counters.retain(|counter| when.contains(&counter.t_ns));
        let unanswered_s = unanswered(stage, &when).await?;
        let (counted, cut) = counted_on(&counters, migrations)?;
        Ok(Seen { unanswered_s, counted, cut, ..one_writer(writes, migrations)? })
    }
}

/// The disk was written by one host at a time: it changed hands as often as the guest did.
fn one_writer(mut writes: Vec<DiskWrite>, migrations: usize) -> Result<Seen> {
    writes.sort_by_key(|write| write.t_ns);
    let hands = writes.windows(2).filter(|pair| pair[0].host != pair[1].host).count();
    ensure!(hands == migrations, "the disk changed hands {hands} times in {migrations} migrations");
    let stamps: Vec<u64> = writes.iter().filter_map(|write| write.stamp()).map(|(_, _, n)| n).collect();
    ensure!(stamps.windows(2).all(|pair| pair[0] <= pair[1]), "an older stamp came after a newer one");
    let stamps_missing = stamps.windows(2).map(|pair| pair[1].saturating_sub(pair[0] + 1)).max().unwrap_or_default();
    let gap_ns = writes.windows(2).map(|pair| pair[1].t_ns - pair[0].t_ns).max().unwrap_or_default();
    Ok(Seen { hands, stamps_missing, silent_s: gap_ns as f64 / 1e9, ..Seen::default() })
}

/// The guest counted on: one boot, no number twice, and none left out but for the line in whose middle it moved, which has its beginning in
/// one host's log and its end in another's. Numbers that were counted, and lines that were cut.
fn counted_on(counters: &[Counter], migrations: usize) -> Result<(usize, usize)> {
    let boots: BTreeSet<&str> = counters.iter().map(|counter| counter.boot.as_str()).collect();
    ensure!(boots.len() == 1, "the guest booted again: {boots:?}");
    let numbers: BTreeSet<u64> = counters.iter().map(|counter| counter.n).collect();
    ensure!(numbers.len() == counters.len(), "it counted a number twice");
    let span = numbers.last().zip(numbers.first()).map_or(0, |(last, first)| last - first + 1);
    let cut = usize::try_from(span)? - numbers.len();
    ensure!(cut <= migrations, "{cut} numbers are lost in {migrations} migrations");
    Ok((numbers.len(), cut))
}

/// The longest time without an answer to a ping, in seconds. A host that was lost has taken its record along.
async fn unanswered(stage: &Stage, when: &Range<u64>) -> Result<f64> {
    let said = stage.sh(ASKER, "kill -INT $(pidof ping); cat /tmp/pings; true").await.unwrap_or_default();
    let sent = (when.end - when.start) / 1_000_000 / u64::from(PING_EVERY_MS);
    let heard: BTreeSet<u32> = said.lines().filter_map(seq).filter(|seq| u64::from(*seq) <= sent).collect();
    let all: Vec<u32> = heard.into_iter().collect();
    let silence = all.windows(2).map(|pair| pair[1] - pair[0] - 1).max().unwrap_or_default();
    println!("  {} pings answered, at most {silence} in a row were not", all.len());
    Ok(f64::from(silence * PING_EVERY_MS) / 1000.0)
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
    fn a_second_writer_and_a_lost_number_are_found() {
        let write = |t_ns: u64, host: u8, n: u64| DiskWrite { t_ns, host, head: format!("epoch=1 boot=a n={n}") };
        let good = vec![write(1, 2, 1), write(2, 3, 2), write(3, 3, 4)];
        let seen = one_writer(good.clone(), 1).unwrap();
        assert_eq!((seen.hands, seen.stamps_missing), (1, 1));
        assert!(one_writer(good.clone(), 2).is_err());
        assert!(one_writer([good, vec![write(4, 2, 5)]].concat(), 1).is_err());
        assert!(one_writer(vec![write(1, 2, 5), write(2, 3, 4)], 1).is_err());
        let counter = |t_ns: u64, boot: &str, n: u64| Counter { t_ns, boot: boot.to_owned(), n };
        assert_eq!(counted_on(&[counter(2, "a", 8), counter(1, "a", 7)], 1).unwrap(), (2, 0));
        assert_eq!(counted_on(&[counter(1, "a", 7), counter(2, "a", 9)], 1).unwrap(), (2, 1));
        assert!(counted_on(&[counter(1, "a", 7), counter(2, "a", 10)], 1).is_err());
        assert!(counted_on(&[counter(1, "a", 7), counter(2, "a", 7)], 1).is_err());
        assert!(counted_on(&[counter(1, "a", 7), counter(2, "b", 8)], 1).is_err());
    }

    #[test]
    fn the_number_of_an_answered_ping() {
        assert_eq!(seq("64 bytes from 10.77.0.104: seq=12 ttl=64 time=1.234 ms"), Some(12));
        assert_eq!(seq("PING 10.77.0.104 (10.77.0.104): 56 data bytes"), None);
    }
}
