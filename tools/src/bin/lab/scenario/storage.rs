//! `lab show storage`: a guest on a qcow2 image over a base that others could share, and what an error of the storage does to a guest:
//! it stands still and goes on, or is told, as its disk's policy says.

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::guest::Guest;
use super::guest::Shape;
use super::guest::field;
use super::stage::Stage;
use super::table::Table;
use crate::state::HostId;

const IMAGES: &str = "/var/lib/quorate/images";
const RUNNER: HostId = HostId(2);
const ASKER: HostId = HostId(1);
const GUEST_SIZE: &str = "64M";
/// The longest distance between two tries of the host, and a little.
const TRIED_AGAIN_WITHIN: Duration = Duration::from_secs(75);

pub async fn tell(stage: &mut Stage) -> Result<()> {
    let mut table = Table::default();
    stage.form_cluster().await?;
    image(stage, &mut table).await?;
    full(stage, &mut table).await?;
    table.print();
    Ok(())
}

/// A qcow2 image over a raw one: what the guest writes is in the image, the base is as it was, and `qemu-img` agrees.
async fn image(stage: &Stage, table: &mut Table) -> Result<()> {
    stage.say("a guest on a qcow2 image over a base");
    let here = tempfile::tempdir().context("a directory for images")?;
    let top = here.path().join("top.qcow2");
    qemu_img(here.path(), &["create", "-q", "-f", "raw", "base.raw", GUEST_SIZE])?;
    qemu_img(here.path(), &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "top.qcow2"])?;
    stage.sh(RUNNER, &format!("mkdir -p {IMAGES} && truncate -s {GUEST_SIZE} {IMAGES}/base.raw")).await?;
    stage.push(RUNNER, &top, &format!("{IMAGES}/top.qcow2")).await?;

    let disk = format!("id=root,path={IMAGES}/top.qcow2,format=qcow2,backing={IMAGES}/base.raw:raw");
    let guest = define(stage, "chain", &disk).await?;
    guest.start(stage, ASKER, RUNNER).await?;
    let said = guest.console(stage, HostId(3), &["disk-check"]).await?;
    let check =
        said.lines().find(|line| line.contains("disk-check ok")).context("the disk was not written and read")?;
    println!("  {check}");
    guest.stop(stage, ASKER).await?;

    let written = stage.sh(RUNNER, &format!("base64 {IMAGES}/top.qcow2")).await?;
    let written: String = written.split_whitespace().collect();
    std::fs::write(&top, BASE64.decode(written).context("the image as base64")?)?;
    qemu_img(here.path(), &["check", "-q", "top.qcow2"])?;
    table.row("image that the guest wrote, by `qemu-img check`", "no errors", "no errors");
    qemu_img(here.path(), &["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "flat.raw"])?;
    let flat = std::fs::read(here.path().join("flat.raw"))?;
    let header = flat.get(16 * 4096..16 * 4096 + 18);
    ensure!(header == Some(b"quorate-pattern v1"), "the image does not hold what the guest wrote");
    let zeros = stage.sh(RUNNER, &format!("tr -d '\\000' <{IMAGES}/base.raw | wc -c")).await?;
    ensure!(zeros.trim() == "0", "the base was written: {zeros} bytes are not zero");
    table.row("bytes of the base that changed", "0", "0");
    Ok(())
}

/// A disk on a file system with too little space.
async fn full(stage: &Stage, table: &mut Table) -> Result<()> {
    let place = format!("{IMAGES}/small");
    stage.sh(RUNNER, &format!("mkdir -p {place} && mount -t tmpfs -o size=1m tmpfs {place}")).await?;
    stage.sh(RUNNER, &format!("truncate -s {GUEST_SIZE} {place}/disk.raw")).await?;
    let disk = format!("id=root,path={place}/disk.raw");
    let guest = define(stage, "thin", &disk).await?;
    guest.start(stage, ASKER, RUNNER).await?;

    stage.say("no space is left where its disk lies: it stands still, and says why");
    write(stage, &guest, 2, 16).await?;
    stands_still(stage, &guest).await?;
    print!("{}", stage.quorate(HostId(3), &["vm", "show", &guest.name]).await?);
    stage.say("with more space it goes on by itself");
    stage.sh(RUNNER, &format!("mount -o remount,size=4m {place}")).await?;
    let begun = Instant::now();
    guest.reaches(stage, ASKER, "Up", TRIED_AGAIN_WITHIN).await?;
    table.seconds("more space -> Up, by itself", begun.elapsed().as_secs_f64(), "at most 60");
    written(stage, &guest, 2, 16).await?;

    stage.say("and at once when somebody says so");
    write(stage, &guest, 3, 64).await?;
    stands_still(stage, &guest).await?;
    stage.sh(RUNNER, &format!("mount -o remount,size=12m {place}")).await?;
    let begun = Instant::now();
    stage.quorate(ASKER, &["vm", "resume", &guest.name]).await?;
    guest.reaches(stage, ASKER, "Up", TRIED_AGAIN_WITHIN).await?;
    table.seconds("vm resume -> Up", begun.elapsed().as_secs_f64(), "");
    written(stage, &guest, 3, 64).await?;
    table.row("what it wrote meanwhile, 2 and 3 MiB", "checksums equal", "equal");

    stage.say("its user lets it stand and go");
    stage.quorate(ASKER, &["vm", "pause", &guest.name]).await?;
    guest.reaches(stage, ASKER, "Paused", TRIED_AGAIN_WITHIN).await?;
    stage.quorate(ASKER, &["vm", "resume", &guest.name]).await?;
    guest.reaches(stage, ASKER, "Up", TRIED_AGAIN_WITHIN).await?;

    stage.say("the same disk under `report`: the guest is told");
    guest.stop(stage, ASKER).await?;
    stage.quorate(ASKER, &["vm", "change", &guest.name, "--disk", &format!("{disk},on-error=report")]).await?;
    guest.start(stage, ASKER, RUNNER).await?;
    let said = guest.console(stage, ASKER, &[&to_disk(16, 128)]).await?;
    let told = said.lines().find(|line| line.starts_with("wrote ")).context("the guest says nothing")?.trim();
    ensure!(told != "wrote 0", "16 MiB were written where 12 fit");
    let status = guest.status(stage, ASKER).await?;
    ensure!(status == "Up", "the guest is {status}");
    table.row("guest under `report`", "an error, and Up", "");
    guest.stop(stage, ASKER).await
}

async fn define(stage: &Stage, name: &str, disk: &str) -> Result<Guest> {
    let shape = Shape { vcpus: 1, disks: &[], address: None, agent: false, lease: false };
    let guest = Guest::define(stage, ASKER, name, &shape).await?;
    stage.quorate(ASKER, &["vm", "change", name, "--disk", disk]).await?;
    Ok(guest)
}

fn to_disk(mib: u32, at: u32) -> String {
    format!(
        "sh dd if=/dev/zero of=/dev/vda bs=64k count={} seek={at} oflag=direct conv=notrunc,fsync 2>/dev/null; echo wrote $?",
        mib * 16
    )
}

/// Has the guest write random bytes behind its back: to a file in its memory, and from there to the disk. It answers when it can.
async fn write(stage: &Stage, guest: &Guest, mib: u32, at: u32) -> Result<()> {
    let make = format!("sh dd if=/dev/urandom of=/run/blob.{at} bs=64k count={} 2>/dev/null; echo made", mib * 16);
    guest.console(stage, ASKER, &[&make]).await?;
    let write = format!(
        "sh (dd if=/run/blob.{at} of=/dev/vda bs=64k seek={at} oflag=direct conv=notrunc,fsync) >/dev/null 2>&1 &"
    );
    guest.console(stage, ASKER, &[&write]).await?;
    Ok(())
}

/// What [`write`] wrote is on the disk.
async fn written(stage: &Stage, guest: &Guest, mib: u32, at: u32) -> Result<()> {
    let count = mib * 16;
    let check = format!(
        "sh a=$(sha256sum </run/blob.{at}); b=$(dd if=/dev/vda bs=64k skip={at} count={count} iflag=direct 2>/dev/null | \
         sha256sum); [ \"$a\" = \"$b\" ] && echo same || echo other"
    );
    stage
        .until("what the guest wrote is on its disk", Duration::from_secs(120), async || {
            let said = guest.console(stage, ASKER, &[&check]).await?;
            Ok(said.lines().any(|line| line.trim() == "same").then_some(()))
        })
        .await
}

async fn stands_still(stage: &Stage, guest: &Guest) -> Result<()> {
    guest.reaches(stage, ASKER, "Paused", TRIED_AGAIN_WITHIN).await?;
    let fault = stage
        .until("the reason is known", TRIED_AGAIN_WITHIN, async || {
            let shown = guest.show(stage, HostId(3)).await?;
            Ok(field(&shown, "disk_fault").filter(|fault| !fault.is_null()).cloned())
        })
        .await?;
    ensure!(fault["no_space"] == Value::Bool(true) && fault["disk"] == "root", "another reason: {fault}");
    Ok(())
}

fn qemu_img(dir: &Path, arguments: &[&str]) -> Result<()> {
    let done = Command::new("qemu-img").current_dir(dir).args(arguments).output().context("run qemu-img")?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "`qemu-img {}` says: {}", arguments.join(" "), said.trim());
    Ok(())
}
