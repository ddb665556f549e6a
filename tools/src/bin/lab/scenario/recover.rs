//! `lab show recover`: two of three hosts are lost for good, and the third goes on by a person's word. What ran on the lost ones runs
//! again, nothing acknowledged is missing, and no host of the old site is heard (DESIGN §4).

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;

use super::guest::Guest;
use super::guest::Shape;
use super::guest::field;
use super::join::knock;
use super::stage::Stage;
use super::table::Table;
use crate::control::PowerAction;
use crate::state::HostId;

const SURVIVOR: HostId = HostId(1);
const LOST: [HostId; 2] = [HostId(2), HostId(3)];
const WORD: [&str; 2] = ["recover", "--all-other-hosts-are-off"];
const WITHIN: Duration = Duration::from_secs(120);

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let guest = Guest::define(
        stage,
        SURVIVOR,
        "web1",
        &Shape { vcpus: 1, disks: &["shared1"], address: None, agent: false, lease: true },
    )
    .await?;
    guest.start(stage, SURVIVOR, LOST[0]).await?;
    let epoch = guest.epoch(stage, SURVIVOR).await?;
    stage.quorate(LOST[1], &["host", "set", "host1", "--failure-domain", "rack1"]).await?;

    stage.say("two of three hosts lose their power for good");
    for host in LOST {
        stage.power(host, PowerAction::Off).await?;
    }
    let refused = stage.try_quorate(SURVIVOR, &["token", "create"]).await?;
    ensure!(refused.code != 0, "something was committed without a majority");

    stage.say("the host that is left, by a person's word");
    let begun = Instant::now();
    let running = stage.try_quorate(SURVIVOR, &WORD).await?;
    ensure!(running.code != 0 && running.stderr.contains("in use"), "hostd runs: {}", running.stderr);
    stage.sh(SURVIVOR, "service hostd stop").await?;
    let looked = stage.try_quorate(SURVIVOR, &["recover"]).await?;
    ensure!(looked.code != 0 && looked.stderr.contains("nothing was changed"), "a look is a look: {}", looked.stderr);
    ensure!(looked.stdout.contains("host2, 1 VM"), "it says who leaves: {}", looked.stdout);
    stage.quorate(SURVIVOR, &WORD).await?;
    stage.sh(SURVIVOR, "service hostd start").await?;
    stage.hostd_answers(SURVIVOR).await?;
    let since_ns = stage.now_ns();
    guest.reaches(stage, SURVIVOR, "Up", WITHIN).await?;
    stage.console_says(SURVIVOR, "counter", since_ns, WITHIN).await?;
    table.seconds("from the first command to the lost host's guest counting here", begun.elapsed().as_secs_f64(), "");
    ensure!(guest.epoch(stage, SURVIVOR).await? > epoch, "it runs by a new permit");
    let shown = stage.query(SURVIVOR, &["host", "show", "host1"]).await?;
    ensure!(
        field(&shown, "failure_domain").is_some_and(|domain| domain == "rack1"),
        "an acknowledged change is missing: {shown}"
    );
    let events = stage.quorate(SURVIVOR, &["events", "--from", "oldest"]).await?;
    for kind in ["SiteRecovered", "HostRemoved", "VmPermitReleased"] {
        ensure!(events.contains(kind), "the log has no {kind}");
    }

    stage.say("a lost host comes back with its state, and nobody hears it");
    let back_ns = stage.now_ns();
    stage.power(LOST[0], PowerAction::On).await?;
    stage.hostd_answers(LOST[0]).await?;
    let knocked = knock(stage, LOST[0], SURVIVOR).await?;
    ensure!(knocked.contains("no connection"), "a host of the old generation was let in: {knocked}");
    let logged = stage.sh(SURVIVOR, "grep -m1 'another cluster' /var/log/hostd.log").await?;
    println!("{SURVIVOR}'s log | {}", logged.trim());
    let status = stage.query(LOST[0], &["status"]).await?;
    ensure!(status["member"]["leader"].is_null(), "it knows a leader: {status}");
    ensure!(stage.counters(LOST[0], &guest.id, back_ns)?.is_empty(), "its guest runs a second time");

    stage.say("wiped, it joins as a new host, and so does the other");
    stage.power(LOST[1], PowerAction::On).await?;
    for host in LOST {
        stage.hostd_answers(host).await?;
        stage
            .sh(host, "service hostd stop; cd /var/lib/quorate && rm -rf identity raft marks; service hostd start")
            .await?;
        stage.hostd_answers(host).await?;
        let token = stage.new_token(SURVIVOR).await?;
        stage.quorate(host, &["join", &token]).await?;
    }
    stage.voters_reach(stage.host_count()).await?;
    ensure!(guest.epoch(stage, LOST[1]).await? > epoch, "the new hosts see what runs");
    table.row("voters afterwards", "3", "3");
    table.print();
    Ok(())
}
