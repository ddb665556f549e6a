//! `lab show join`: one command and no password; who is refused, in which words; and no secret anywhere but in its place
//! (issue: *Join*).

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;

use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

const FIRST: HostId = HostId(1);
const SECOND: HostId = HostId(2);
/// Stays outside until the end: it shows tokens that are refused.
const OUTSIDER: HostId = HostId(3);
/// Begins as another cluster.
const ELSEWHERE: HostId = HostId(4);
/// Entries between two snapshots in this story, so that there is one to search.
const SNAPSHOT_EVERY: u32 = 20;

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    let mut tokens = Vec::new();
    for host in stage.hosts() {
        let settings = format!("[raft]\nsnapshot_every_entries = {SNAPSHOT_EVERY}\nkeep_behind_snapshot_entries = 5\n");
        stage.sh(host, &format!("(cat /etc/quorate/hostd.toml; printf '{settings}') >/var/lib/quorate/hostd.toml; cp /var/lib/quorate/hostd.toml /etc/quorate/; service hostd restart")).await?;
        stage.hostd_answers(host).await?;
    }

    stage.say("one cluster, and another one");
    stage.quorate(FIRST, &["init"]).await?;
    stage.quorate(ELSEWHERE, &["init", "--name", "elsewhere"]).await?;
    let foreign = stage.new_token(ELSEWHERE).await?;

    stage.say("one token, one command, no password");
    let used = stage.new_token(FIRST).await?;
    table.seconds("join", join(stage, SECOND, &used).await?, "<= 5 s");

    stage.say("tokens that admit nobody");
    let altered = altered(&stage.new_token(FIRST).await?);
    let said = stage.quorate(FIRST, &["token", "create", "--ttl", "1s"]).await?;
    let expired = token_in(&said)?;
    let revoked = stage.new_token(FIRST).await?;
    let listed = stage.query(FIRST, &["token", "list"]).await?;
    let newest = newest_token(&listed)?;
    stage.quorate(FIRST, &["token", "revoke", &newest]).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (token, words) in [
        (&used, "used"),
        (&expired, "expired"),
        (&revoked, "revoked"),
        (&altered, "damaged"),
        (&"hello".to_owned(), "not a token"),
    ] {
        refused(stage, OUTSIDER, &["join", token], words).await?;
    }

    stage.say("a host of another cluster");
    let good = stage.new_token(FIRST).await?;
    refused(stage, ELSEWHERE, &["join", &good], "belongs to site elsewhere already").await?;
    let knocked = knock(stage, ELSEWHERE, FIRST).await?;
    ensure!(knocked.contains("no connection"), "a host of another cluster was let in: {knocked}");
    let logged = stage.sh(FIRST, "grep 'another cluster' /var/log/hostd.log").await?;
    println!("host1's log | {}", logged.trim());
    ensure!(logged.contains("quorate join TOKEN"), "host1 said nothing of it");

    stage.say("its token, after its machine became a host of this cluster");
    stage
        .sh(ELSEWHERE, "service hostd stop; cd /var/lib/quorate && rm -rf identity raft marks; service hostd start")
        .await?;
    stage.hostd_answers(ELSEWHERE).await?;
    table.seconds("join", join(stage, ELSEWHERE, &good).await?, "<= 5 s");
    refused(stage, OUTSIDER, &["join", &foreign], "not of the site that the token names").await?;

    stage.say("a removed host with a valid certificate");
    stage.quorate(FIRST, &["host", "maintenance", "host2"]).await?;
    stage.quorate(FIRST, &["host", "remove", "host2"]).await?;
    let knocked = knock(stage, SECOND, FIRST).await?;
    ensure!(knocked.contains("403") && knocked.contains("was removed from this site at seq"), "{knocked}");
    let status = stage
        .until("host2 knows that it was removed", Duration::from_secs(30), async || {
            let status = stage.try_quorate_quietly(SECOND, &["status"]).await?;
            let text = format!("{}{}", status.stdout, status.stderr);
            Ok(text.contains("removed").then_some(text))
        })
        .await?;
    println!("host2# quorate status");
    status.lines().for_each(|line| println!("  {line}"));
    refused(stage, SECOND, &["token", "create"], "removed").await?;

    stage.say("and the outsider is let in with a good one");
    let last = stage.new_token(FIRST).await?;
    table.seconds("join", join(stage, OUTSIDER, &last).await?, "<= 5 s");

    stage.say("no secret in log, stream, snapshot or logs");
    let admin = stage.query(FIRST, &["token", "create", "--purpose", "admin", "--ttl", "1h"]).await?;
    tokens.extend([
        used,
        expired,
        revoked,
        good,
        foreign,
        last,
        admin["token"].as_str().unwrap_or_default().to_owned(),
    ]);
    let hosts: Vec<HostId> = stage.hosts().collect();
    for host in hosts {
        let found = search_secrets(stage, host, &tokens).await?;
        println!("{host} | {}", found.trim());
    }
    table.row("secrets found outside their files", "0", "0");
    table.print();
    Ok(())
}

/// Seconds from the command to its end.
async fn join(stage: &Stage, host: HostId, token: &str) -> Result<f64> {
    let begun = Instant::now();
    stage.quorate(host, &["join", token]).await?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The command fails, and says why in one sentence that holds `words` and repeats no secret.
async fn refused(stage: &Stage, host: HostId, arguments: &[&str], words: &str) -> Result<()> {
    let done = stage.try_quorate(host, arguments).await?;
    let said = done.stderr.trim();
    ensure!(done.code != 0, "`quorate {}` was not refused", arguments.join(" "));
    ensure!(said.contains(words), "{words:?} is not in: {said}");
    let secret = arguments.last().filter(|word| word.starts_with("qrt1."));
    ensure!(secret.is_none_or(|token| !said.contains(*token)), "the refusal repeats the token");
    Ok(())
}

pub(super) async fn knock(stage: &Stage, from: HostId, at: HostId) -> Result<String> {
    let server = format!("{}:7443", at.address());
    let said = stage.sh(from, &format!("lab in-host knock --server {server}")).await?;
    println!("{from} | GET https://{server}/v1/vms, by its certificate: {}", said.trim());
    Ok(said)
}

fn token_in(said: &str) -> Result<String> {
    let token = said.split_whitespace().find(|word| word.starts_with("qrt1."));
    token.map(str::to_owned).ok_or_else(|| anyhow::anyhow!("no token was printed"))
}

fn altered(token: &str) -> String {
    let mut letters: Vec<char> = token.chars().collect();
    let middle = letters.len() / 2;
    letters[middle] = if letters[middle] == 'A' { 'B' } else { 'A' };
    letters.into_iter().collect()
}

fn newest_token(listed: &serde_json::Value) -> Result<String> {
    let items = listed["items"].as_array().or_else(|| listed.as_array());
    let newest = items.and_then(|items| items.iter().filter_map(|token| token["id"].as_u64()).max());
    newest.map(|id| id.to_string()).ok_or_else(|| anyhow::anyhow!("no token is listed: {listed}"))
}

/// Fails when the search finds anything, or when the same search is blind to what was planted for it.
async fn search_secrets(stage: &Stage, host: HostId, tokens: &[String]) -> Result<String> {
    let tokens = tokens.join("\n");
    stage.sh(host, &format!("umask 077; mkdir -p /tmp/secrets; printf '{tokens}\n' >/tmp/secrets/tokens")).await?;
    // What the API says, as a file among the others. A removed host has no stream.
    stage.sh(host, "quorate -o json events --from oldest >/var/log/stream.json 2>&1; quorate -o json token list >>/var/log/stream.json 2>&1; dmesg >/var/log/dmesg; true").await?;
    let keys = "for k in /var/lib/quorate/identity/*.key /var/lib/quorate/raft/transport.keys; do echo --key $k; done";
    let search = format!("lab in-host secrets $({keys}) --tokens /tmp/secrets/tokens");
    stage
        .sh(host, &format!("{search} --must-find /tmp/secrets /var/lib/quorate/identity /var/lib/quorate/raft"))
        .await?;
    let snapshots = stage.sh(host, "ls /var/lib/quorate/raft/snapshots | wc -l").await?;
    ensure!(snapshots.trim() != "0", "{host} has no snapshot to search");
    let excepted = "--except /var/lib/quorate/identity --except /var/lib/quorate/raft/transport.keys";
    stage.sh(host, &format!("{search} {excepted} /var/lib/quorate /var/log /run/quorate /etc/quorate")).await
}
