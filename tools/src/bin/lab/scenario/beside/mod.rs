//! `lab show beside`: the vmm and Debian's QEMU run the same guest in the same emulated host, by turns.
//!
//! The story, outside the host, says whose turn it is; [`turn`], inside the host, starts the program, measures and prints
//! [`figures`]. Both programs get the same kernel, command line, memory, disk and tap ([`peer`]), and a host of their own for the
//! time of a turn. [`guest`] is what runs inside the guest, and [`moving`] a migration to a second process of the same kind.

mod console;
mod figures;
pub mod guest;
mod moving;
mod peer;
mod place;
pub mod turn;
mod wire;

use std::collections::BTreeMap;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::stage::Stage;
use super::stage::first_line;
use crate::control::PowerAction;
use crate::state::HostId;

use figures::Figures;
use figures::Measure;
use figures::Turn;
use peer::Peer;

const HOST: HostId = HostId(1);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const VCPUS: [u32; 2] = [1, 2];
/// A turn takes half a minute on a quiet machine, and several beside other work.
const TURN_LIMIT: Duration = Duration::from_secs(900);
/// Each look is a program in the host, which takes time from what is measured.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// The emulator stops a host now and then in the boot of a nested guest, or the guest itself (docs/operations/lab.md).
const TRIES: u32 = 4;

/// Turns that broke off, by program.
type Broken = BTreeMap<&'static str, u32>;

pub async fn tell(stage: &mut Stage, rounds: u32) -> Result<()> {
    let (mut turns, mut broken) = (Vec::new(), BTreeMap::new());
    let told = take_turns(stage, rounds, &mut turns, &mut broken).await;
    println!("\n{}", figures::table(&turns));
    for (peer, times) in broken {
        println!("turns of {peer} that broke off and were taken again: {times}");
    }
    told?;
    let most = turns.iter().filter(|turn| turn.peer == Peer::Vmm).filter_map(|turn| turn.figures.get(&Measure::PssMib));
    let most = most.copied().fold(0.0, f64::max);
    ensure!(most > 0.0, "no vmm was weighed");
    stage.weighed(most);
    Ok(())
}

/// Who begins changes from round to round: a machine that grows slower, or has other work for a while, then favours nobody.
async fn take_turns(stage: &Stage, rounds: u32, turns: &mut Vec<Turn>, broken: &mut Broken) -> Result<()> {
    for round in 0..rounds {
        for vcpus in VCPUS {
            let mut order = Peer::ALL;
            order.rotate_left(round as usize % Peer::ALL.len());
            for peer in order {
                stage.say(&format!("round {} of {rounds}: {} with {vcpus} vCPUs", round + 1, peer.name()));
                match take_turn(stage, peer, vcpus, broken).await? {
                    Some(figures) => {
                        println!("  {}", figures::line(&figures));
                        turns.push(Turn { round, peer, vcpus, figures });
                    }
                    None => ensure!(peer != Peer::Vmm, "each of {TRIES} tries of a turn of the vmm broke off"),
                }
            }
        }
    }
    Ok(())
}

/// Each turn has a host that has just booted: in one that has run guests before, a guest of any program takes a third longer to start. A
/// turn that breaks off is taken again, and counted: the table is of whole turns, and says how many were none. `None` after [`TRIES`].
async fn take_turn(stage: &Stage, peer: Peer, vcpus: u32, broken: &mut Broken) -> Result<Option<Figures>> {
    for _ in 0..TRIES {
        stage.power(HOST, PowerAction::Off).await?;
        stage.power(HOST, PowerAction::On).await?;
        let boot = boot_id(stage).await?;
        let error = match attempt(stage, peer, vcpus, boot.trim()).await {
            Ok(figures) => return Ok(Some(figures)),
            Err(error) => error,
        };
        // What the emulator did to the host is nobody's fault; anything else that a vmm does not end is the vmm's.
        if peer == Peer::Vmm && boot_id(stage).await.is_ok_and(|now| now == boot) {
            return Err(error);
        }
        *broken.entry(peer.name()).or_default() += 1;
        println!("  broke off ({}); the turn is taken again", first_line(&error));
    }
    println!("  no more tries of this turn");
    Ok(None)
}

async fn boot_id(stage: &Stage) -> Result<String> {
    stage.sh(HOST, &format!("cat {BOOT_ID}")).await
}

async fn attempt(stage: &Stage, peer: Peer, vcpus: u32, boot: &str) -> Result<Figures> {
    let (name, directory) = (peer.name(), turn::DIRECTORY);
    // Where the image has a hostd, it would be a third program beside two.
    let quiet = "[ -x /usr/bin/hostd ] && /sbin/service hostd stop; rm -rf";
    let run = format!(
        "/usr/bin/lab in-host beside --peer {name} --vcpus {vcpus} >{directory}.figures 2>{directory}.errors; echo $? >{directory}.code"
    );
    let start = format!(
        "{quiet} {directory} {directory}.code; mkdir -p {directory}; (setsid sh -c '{run}' </dev/null >/dev/null 2>&1 &)"
    );
    stage.sh(HOST, &start).await?;
    let deadline = Instant::now() + TURN_LIMIT;
    let code = loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // In one question: each look is a program in the host.
        let seen = stage.sh(HOST, &format!("cat {BOOT_ID}; cat {directory}.code 2>/dev/null; true")).await?;
        let (now, code) = seen.split_once('\n').unwrap_or((&seen, ""));
        ensure!(now == boot, "{HOST} has booted again");
        if !code.trim().is_empty() {
            break code.to_owned();
        }
        ensure!(Instant::now() < deadline, "the turn of {name} did not end in {} s", TURN_LIMIT.as_secs());
    };
    let said = stage.sh(HOST, &format!("cat {directory}.figures {directory}.errors")).await?;
    ensure!(code.trim() == "0", "the turn of {name} failed: {said}");
    serde_json::from_str(said.lines().next().unwrap_or_default()).with_context(|| format!("{name} printed {said:?}"))
}
