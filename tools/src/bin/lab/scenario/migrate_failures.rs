//! `lab show migrate-failures`: a guest sets out for another host, and on the way its source, its target or the leader loses its power.
//! A witness outside sees one writer at a time, and the guest go on, or come back, within a minute.

use std::fmt;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde_json::Value;

use super::guest::Guest;
use super::guest::Shape;
use super::guest::field;
use super::stage::DiskWrite;
use super::stage::Stage;
use super::stage::first_line;
use super::table::Table;
use super::table::spread;
use crate::control::PowerAction;
use crate::state::HostId;

const DISK: &str = "shared1";
/// The promise.
const BACK_WITHIN: Duration = Duration::from_secs(60);
const SETTLES_WITHIN: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Source,
    Target,
    Leader,
}

/// When it loses its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// Right after the log took the migration.
    Begun,
    /// While memory is copied.
    Copying,
    /// As soon as the source has sent everything.
    Sent,
    /// As soon as the log gives the guest to its target.
    Committed,
}

const VICTIMS: [Victim; 3] = [Victim::Source, Victim::Target, Victim::Leader];
const MOMENTS: [Moment; 4] = [Moment::Begun, Moment::Copying, Moment::Sent, Moment::Committed];

/// How one ended.
struct Outcome {
    /// From the loss to the next write of the guest.
    silent_s: f64,
    moved: bool,
    restarted: bool,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.moved { "at its target" } else { "at its source, or elsewhere" };
        let how = if self.restarted { "started from its disk" } else { "without a restart" };
        write!(f, "next write after {:.1} s, {place}, {how}", self.silent_s)
    }
}

pub async fn tell(stage: &mut Stage, runs: u32) -> Result<()> {
    stage.form_cluster().await?;
    let shape = Shape { vcpus: 1, disks: &[DISK], address: None, agent: false, lease: true };
    let first = HostId(1);
    let guest = Guest::define(stage, first, "web1", &shape).await?;
    // Slow enough for there to be a moment in which it is copied.
    stage.quorate(first, &["vm", "change", &guest.name, "--migrate-bandwidth", "12"]).await?;
    guest.start(stage, first, HostId(2)).await?;
    stage.echo = false;
    let since_ns = stage.now_ns();
    let (mut silent, mut restarts, mut stops, mut done) = (Vec::new(), 0, 0, 0);
    while done < runs {
        let victim = VICTIMS[done as usize % VICTIMS.len()];
        let moment = MOMENTS[done as usize / VICTIMS.len() % MOMENTS.len()];
        match strike(stage, &guest, victim, moment).await {
            Ok(outcome) => {
                done += 1;
                println!("  run {done:3}: {victim:?} lost when {moment:?}: {outcome}");
                silent.push(outcome.silent_s);
                restarts += u32::from(outcome.restarted);
            }
            // Known of the emulator, see docs/operations/lab.md. Hosts that all answer have broken a promise instead.
            Err(error) if stops < runs / 5 + 1 && stage.revive(None).await? => {
                stops += 1;
                println!("  this run does not count: {}", first_line(&error));
            }
            Err(error) => return Err(error),
        }
        settle(stage, &guest).await?;
    }
    let changes = one_writer(&stage.writes(DISK)?, since_ns)?;
    let mut table = Table::default();
    table.row("migrations on which a host was lost", done.to_string(), "");
    table.row("loss -> next write of the guest", spread(&mut silent), "max <= 60 s");
    table.row("guests that started again from their disk", restarts.to_string(), "");
    table.row("times that the disk's writer changed, never back to an older epoch", changes.to_string(), "");
    table.row("runs that the emulator stopped, not counted", stops.to_string(), "");
    table.print();
    let asker = alive(stage, None).await?;
    let said = guest.console(stage, asker, &["disk-check"]).await?;
    ensure!(said.contains("disk-check ok"), "the disk is not as it was written: {said}");
    Ok(())
}

/// A host other than the one that is lost.
async fn alive(stage: &Stage, lost: Option<HostId>) -> Result<HostId> {
    stage.hosts().find(|host| Some(*host) != lost).context("a lab has hosts")
}

async fn strike(stage: &Stage, guest: &Guest, victim: Victim, moment: Moment) -> Result<Outcome> {
    let source = guest.home(stage, HostId(1)).await?;
    let leader = stage.leader(HostId(1)).await?;
    // Away from the leader where that is what is lost, so that source and target both live.
    let target = stage.hosts().find(|host| *host != source && (victim != Victim::Leader || *host != leader));
    let target = target.context("a lab has three hosts")?;
    let lost = match victim {
        Victim::Source => source,
        Victim::Target => target,
        Victim::Leader => leader,
    };
    let asker = alive(stage, Some(lost)).await?;
    let boot = last_boot(stage, guest).await?;
    stage.quorate(asker, &["vm", "migrate", &guest.name, "--to", &target.to_string()]).await?;
    wait_for(stage, guest, asker, moment, source, target).await;
    stage.power(lost, PowerAction::Off).await?;
    // It writes nothing more, so what comes now is somebody else's.
    let lost_ns = stage.now_ns();
    // Its new incarnation is the evidence by which its guests are released; nothing fences a host that stays away yet.
    stage.power(lost, PowerAction::On).await?;
    let writes = async || {
        let writes = stage.writes(DISK)?;
        Ok(writes.into_iter().find(|write| write.t_ns > lost_ns))
    };
    let next = stage.until("the guest writes again", BACK_WITHIN, writes).await?;
    stage.hostd_answers(lost).await?;
    let restarted = next.stamp().is_some_and(|(_, now, _)| Some(now) != boot.as_deref());
    Ok(Outcome { silent_s: (next.t_ns - lost_ns) as f64 / 1e9, moved: next.host == target.0, restarted })
}

/// Until the migration is so far, or over: how far it gets before the blow is the run's luck, and said by what becomes of it.
async fn wait_for(stage: &Stage, guest: &Guest, asker: HostId, moment: Moment, source: HostId, target: HostId) {
    let begun = Instant::now();
    let sent = "grep -c 'all of the guest was sent' /var/log/hostd.log; true";
    let before = stage.sh(source, sent).await.unwrap_or_default();
    while begun.elapsed() < Duration::from_secs(40) {
        let Ok(shown) = guest.show(stage, asker).await else { continue };
        let migration = field(&shown, "migration").filter(|migration| !migration.is_null());
        let there = field(&shown, "host_name").and_then(Value::as_str) == Some(&target.to_string());
        let reached = match moment {
            Moment::Begun => true,
            Moment::Copying => migration.is_some_and(|migration| !migration["progress"].is_null()),
            Moment::Sent => stage.sh(source, sent).await.is_ok_and(|now| now != before),
            Moment::Committed => there,
        };
        if reached || there || migration.is_none() && begun.elapsed() > Duration::from_secs(2) {
            return;
        }
    }
}

async fn last_boot(stage: &Stage, guest: &Guest) -> Result<Option<String>> {
    let writes = stage.writes(DISK)?;
    let stamp = writes.iter().rev().find_map(|write| write.stamp().map(|(_, boot, _)| boot.to_owned()));
    ensure!(stamp.is_some(), "{} has never written to its disk", guest.name);
    Ok(stamp)
}

/// All hosts vote and are up, the guest is up, and nothing is on its way.
async fn settle(stage: &Stage, guest: &Guest) -> Result<()> {
    stage.voters_reach(stage.host_count()).await?;
    stage.hosts_are_up().await?;
    stage
        .until("the guest is up and stays where it is", SETTLES_WITHIN, async || {
            let shown = guest.show(stage, HostId(1)).await?;
            let up = field(&shown, "status").and_then(Value::as_str) == Some("Up");
            let still = field(&shown, "migration").is_none_or(Value::is_null);
            Ok((up && still).then_some(()))
        })
        .await?;
    let since_ns = stage.now_ns();
    stage
        .until("the guest writes", SETTLES_WITHIN, async || {
            Ok(stage.writes(DISK)?.iter().any(|write| write.t_ns > since_ns).then_some(()))
        })
        .await
}

/// One writer at a time: within a boot of the guest its numbers only grow, whoever wrote; and no boot writes once a later one has.
fn one_writer(writes: &[DiskWrite], since_ns: u64) -> Result<usize> {
    let mut writes: Vec<&DiskWrite> = writes.iter().filter(|write| write.t_ns >= since_ns).collect();
    writes.sort_by_key(|write| write.t_ns);
    let (mut boots, mut last): (Vec<&str>, u64) = (Vec::new(), 0);
    for (_, boot, n) in writes.iter().filter_map(|write| write.stamp()) {
        match boots.last() {
            Some(now) if *now == boot => ensure!(n >= last, "stamp {n} of boot {boot} came after {last}"),
            _ => {
                ensure!(!boots.contains(&boot), "boot {boot} wrote again after another had begun");
                boots.push(boot);
            }
        }
        last = n;
    }
    Ok(writes.windows(2).filter(|pair| pair[0].host != pair[1].host).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(t_ns: u64, host: u8, boot: &str, n: u64) -> DiskWrite {
        DiskWrite { t_ns, host, head: format!("epoch=1 boot={boot} n={n}") }
    }

    #[test]
    fn an_older_writer_after_a_newer_one_is_found() {
        let good = [write(1, 2, "a", 1), write(2, 2, "a", 2), write(3, 3, "a", 3), write(4, 1, "b", 0)];
        assert_eq!(one_writer(&good, 0).unwrap(), 2);
        let older_stamp = [write(1, 2, "a", 1), write(2, 3, "a", 2), write(3, 2, "a", 1)];
        assert!(one_writer(&older_stamp, 0).is_err());
        let older_boot = [write(1, 2, "a", 1), write(2, 3, "b", 0), write(3, 2, "a", 2)];
        assert!(one_writer(&older_boot, 0).is_err());
        assert!(one_writer(&older_boot, 2).is_ok(), "what was before does not count");
    }
}
