//! `lab show first-boot`: a Debian root disk takes name, user with key, address and a script from the seed of its guest, once. Its
//! user logs in with the key, its agent reports the address, and a later boot on another host finds what the first one left.

use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use tempfile::TempDir;
use tokio::process::Command;

use super::agent;
use super::guest::BOOT_LIMIT;
use super::guest::Guest;
use super::guest::KERNEL;
use super::guest::ROOT_INITRD;
use super::stage::ConsoleLine;
use super::stage::Stage;
use super::table::Table;
use crate::image::root_disk;
use crate::nbd::ROOT_DISK;
use crate::net;
use crate::state::HostId;
use crate::state::LabState;

const NAME: &str = "web1";
const USER: &str = "alice";
const ADDRESS: &str = "10.77.0.105";
const ASKER: HostId = HostId(1);
const LOGIN_LIMIT: Duration = Duration::from_secs(60);

/// Says who runs it, and leaves a mark that a second run would lengthen.
const USER_DATA: &str = "#!/bin/bash\necho \"$(hostname) is set up by bash\"\necho ran >>/var/lib/ran\n";
const USER_DATA_ON_HOST: &str = "/tmp/user-data";

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    let keys = tempfile::tempdir().context("a directory for keys")?;
    let key = Key::make(stage, &keys, "own").await?;
    let guest = define(stage, &keys, &key).await?;

    stage.say("a Debian root disk boots and takes what the seed says");
    let (first_host, second_host) = (HostId(2), HostId(3));
    let asked_ns = stage.now_ns();
    guest.start(stage, ASKER, first_host).await?;
    let first = says(stage, &guest, first_host, "quorate-guest first boot", asked_ns).await?;
    println!("  {first_host} | {}", first.line);
    let expected = format!("host={NAME} key={} address={ADDRESS}/24", key.fingerprint);
    ensure!(first.line.contains(&expected), "the seed said {expected}, and the guest says {}", first.line);
    says(stage, &guest, first_host, &format!("user-data: {NAME} is set up by bash"), asked_ns).await?;
    table.seconds("vm start -> first boot done", (first.t_ns - asked_ns) as f64 / 1e9, "");

    stage.say("its user logs in with the key, and with no other");
    let begun = Instant::now();
    let said = login(stage, &key).await?;
    ensure!(said == format!("{USER}@{NAME} ran"), "the login says {said}");
    table.seconds("login with the key", begun.elapsed().as_secs_f64(), "");
    let other = Key::make(stage, &keys, "other").await?;
    ensure!(ssh(stage, &other, "true").await?.is_none(), "another key opened the guest");

    stage.say("its agent reports the address");
    agent::facts(stage, &guest, ADDRESS).await?;
    print!("{}", stage.quorate(HostId(3), &["vm", "list"]).await?);

    stage.say("on another host the disk is as it was left, and the seed is not applied again");
    guest.stop(stage, ASKER).await?;
    let again_ns = stage.now_ns();
    guest.start(stage, ASKER, second_host).await?;
    let later = says(stage, &guest, second_host, "quorate-guest later boot", again_ns).await?;
    println!("  {second_host} | {}", later.line);
    ensure!(later.line.contains(&expected), "a later boot says {}", later.line);
    let said = login(stage, &key).await?;
    ensure!(said == format!("{USER}@{NAME} ran"), "the script ran again, or the disk is another: {said}");
    table.row("first boots of two boots", "1", "1");
    guest.stop(stage, ASKER).await?;
    table.print();
    Ok(())
}

async fn define(stage: &Stage, keys: &TempDir, key: &Key) -> Result<Guest> {
    let user_data = keys.path().join("user-data");
    std::fs::write(&user_data, USER_DATA).context("write the user data")?;
    stage.push(ASKER, &user_data, USER_DATA_ON_HOST).await?;
    let disk = format!("id=root,path=/dev/disk/by-id/virtio-{ROOT_DISK}");
    let address = format!("lan={ADDRESS}/24");
    let mut words = vec!["vm", "create", NAME, "--vcpus", "1", "--memory", "256MiB", "--disk", &disk];
    words.extend(["--kernel", KERNEL, "--initrd", ROOT_INITRD, "--cmdline", "console=ttyS0 quiet root=/dev/vda"]);
    words.extend(["--nic", "id=lan,bridge=br0", "--address", &address, "--host-name", NAME]);
    words.extend(["--user", USER, "--ssh-key", &key.public, "--user-data", USER_DATA_ON_HOST]);
    stage.quorate(ASKER, &words).await?;
    Guest::defined(stage, ASKER, NAME).await
}

/// Waits for a line of the guest's console, at or after `since_ns`.
async fn says(stage: &Stage, guest: &Guest, host: HostId, text: &str, since_ns: u64) -> Result<ConsoleLine> {
    let what = format!("{} says {text:?}", guest.name);
    let is_it = |line: &ConsoleLine| line.vm == guest.id && line.t_ns >= since_ns && line.line.contains(text);
    stage.until(&what, BOOT_LIMIT, async || Ok(stage.console(host)?.into_iter().find(is_it))).await
}

/// A key pair of the lab's operator.
struct Key {
    private: String,
    public: String,
    fingerprint: String,
}

impl Key {
    async fn make(stage: &Stage, directory: &TempDir, name: &str) -> Result<Key> {
        let private = directory.path().join(name).display().to_string();
        let said = outside(stage, "usr/bin/dropbearkey", &["-t", "ed25519", "-f", &private]).await?;
        let said = said.context("dropbearkey made no key")?;
        let line = |start: &str| said.lines().find_map(|line| line.strip_prefix(start).map(str::to_owned));
        let public = line("ssh-ed25519 ").context("dropbearkey names no public key")?;
        let fingerprint = line("Fingerprint: ").context("dropbearkey names no fingerprint")?;
        Ok(Key { private, public: format!("ssh-ed25519 {public}"), fingerprint })
    }
}

/// Logs in as soon as somebody listens: who one is there, where, and how often the script ran.
async fn login(stage: &Stage, key: &Key) -> Result<String> {
    let command = "echo \"$(id -un)@$(hostname) $(cat /var/lib/ran)\"";
    let said = stage.until("the key opens the guest", LOGIN_LIMIT, async || ssh(stage, key, command).await).await?;
    Ok(said.trim().to_owned())
}

/// Runs a command in the guest, from outside the hosts. Without an answer the login was refused, or nobody listens.
async fn ssh(stage: &Stage, key: &Key, command: &str) -> Result<Option<String>> {
    let there = format!("{USER}@{ADDRESS}");
    // Twice `-y`: the guest's own key is made at its first boot, and nobody has seen it before.
    outside(stage, "usr/bin/dbclient", &["-y", "-y", "-i", &key.private, &there, command]).await
}

/// Runs a program of the root disk in the lab's network; what it printed if it ended well.
async fn outside(stage: &Stage, program: &str, arguments: &[&str]) -> Result<Option<String>> {
    let Some(state) = LabState::load(&stage.dir)? else { bail!("the lab is gone") };
    let tool = root_disk::tool(&stage.dir, program)?;
    let (loader, before) = tool.split_first().context("no program to run")?;
    let mut command = Command::from(net::inside(&state.config.netns, loader));
    command.args(before).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let done = tokio::time::timeout(LOGIN_LIMIT, command.output()).await;
    let done = done.with_context(|| format!("{program} does not end"))?.with_context(|| format!("run {program}"))?;
    Ok(done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned()))
}
