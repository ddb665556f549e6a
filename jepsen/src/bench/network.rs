//! A loopback that is slow: a network namespace of this process's own, shaped by `tc`. Only root may, and before any thread is started.

use std::process::Command;

use anyhow::Context;
use anyhow::bail;
use nix::sched::CloneFlags;

/// All links are fast but those of one address, which carry so much each way.
pub fn narrow(address: &str, kbit: u32) -> anyhow::Result<()> {
    leave()?;
    for step in [
        "tc qdisc add dev lo root handle 1: htb default 10",
        "tc class add dev lo parent 1: classid 1:10 htb rate 10gbit",
        &format!("tc class add dev lo parent 1: classid 1:20 htb rate {kbit}kbit"),
        &format!("tc class add dev lo parent 1: classid 1:30 htb rate {kbit}kbit"),
        &format!("tc filter add dev lo parent 1: protocol ip prio 1 u32 match ip src {address}/32 flowid 1:20"),
        &format!("tc filter add dev lo parent 1: protocol ip prio 1 u32 match ip dst {address}/32 flowid 1:30"),
    ] {
        take(step)?;
    }
    Ok(())
}

/// Every packet takes so long, one way.
pub fn delay(delay_ms: u32) -> anyhow::Result<()> {
    leave()?;
    take(&format!("tc qdisc add dev lo root netem delay {delay_ms}ms limit 100000"))
}

fn leave() -> anyhow::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: it needs root")?;
    // As between machines: loopback's own packets would be of 64 KiB.
    take("ip link set lo mtu 1500 up")
}

fn take(step: &str) -> anyhow::Result<()> {
    let mut words = step.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).output().with_context(|| format!("{step}: is iproute2 installed?"))?;
    if !done.status.success() {
        bail!("{step}: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}
