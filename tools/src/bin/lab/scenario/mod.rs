//! Whole stories told by a lab: `lab demo`, and `lab show NAME`, which measure what the product promises.
//!
//! A story drives hosts as an operator would (the `quorate` program, through the host's guest agent), disturbs
//! them as the world would (power, network, disks), and believes only witnesses outside the hosts: console lines
//! and disk writes stamped by the lab's clock. Each ends with a table of what was measured and `NAME: ok`, or with
//! the first promise that was broken.
//!
//! [`stage`] is what every story stands on; each other file is a story.

mod agent;
pub mod beside;
mod demo;
mod failover;
mod first_boot;
mod first_guest;
mod guest;
mod join;
mod lease;
mod memory;
mod migrate;
mod migrate_failures;
mod minority;
mod plug;
mod poweroff;
pub mod probe;
mod recover;
mod restart;
mod stage;
mod storage;
mod suspend;
mod table;

use anyhow::Result;

use crate::machine::AcceleratorChoice;
use crate::paths::LabDir;

/// What `lab show` can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Story {
    /// The main job: three hosts, a guest, the loss of the leader.
    Demo,
    /// How a host gets in, who is refused and in what words, and that no secret leaks.
    Join,
    /// A Linux guest: console, vCPUs, ACPI shutdown, disk.
    Guest,
    /// A Debian root disk takes name, key and address from a seed at its first boot.
    FirstBoot,
    /// A guest with QEMU's guest agent: its facts as events, programs, freezing.
    Agent,
    /// A guest on a qcow2 image over a base, and one whose storage is full.
    Storage,
    /// A guest moves between two hosts while it runs, back and forth.
    Migrate,
    /// Its source, its target or the leader loses its power on the way.
    MigrateFailures,
    /// A disk and a network card come to a guest that runs, move with it, and leave it.
    Plug,
    /// A guest becomes a file of its host, which loses its power, and goes on where it was.
    Suspend,
    /// hostd dies or restarts under a guest, and during starts.
    Restart,
    /// The leader loses its power.
    Failover,
    /// A host is cut off: its lease guests pause in time and go on later.
    Lease,
    /// Two of three hosts are cut off for a minute.
    Minority,
    /// All hosts lose their power at once while commands are written.
    Poweroff,
    /// Two of three hosts are lost for good, and the third goes on.
    Recover,
    /// The vmm and QEMU run the same guest in one host, by turns.
    Beside,
}

impl Story {
    fn hosts(self) -> u8 {
        match self {
            // The fourth is another cluster.
            Story::Join => 4,
            Story::Beside => 1,
            _ => 3,
        }
    }

    /// With two processors the emulator stops hosts that run guests in many runs, with one in hardly any.
    fn cpus(self) -> u32 {
        match self {
            Story::FirstBoot | Story::Agent | Story::Storage | Story::Suspend => 1,
            Story::Migrate | Story::MigrateFailures | Story::Plug => 1,
            // Two vCPUs, or times that were always measured so.
            _ => 2,
        }
    }
}

/// How a story is told.
#[derive(Debug, Clone, clap::Args)]
pub struct StoryOptions {
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: AcceleratorChoice,
    /// Processors of a host; left out, as the story needs them.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// How often a story with repetitions repeats itself.
    #[arg(long)]
    pub runs: Option<u32>,
    /// Slow links between all hosts, one way, in milliseconds (story `failover`).
    #[arg(long, default_value_t = 0)]
    pub delay_ms: u32,
    /// The leader's disk hangs, instead of losing power (story `failover`).
    #[arg(long)]
    pub hang: bool,
    /// Disks that lie: FLUSH is answered and nothing becomes durable by it. Stories of power must then break off.
    #[arg(long)]
    pub ignore_flush: bool,
    /// Leave the lab up afterwards, to look around.
    #[arg(long)]
    pub keep: bool,
}

/// Tells a story on a fresh lab, and takes the lab down after it.
pub async fn tell(dir: &LabDir, story: Story, options: &StoryOptions) -> Result<()> {
    let cpus = options.cpus.unwrap_or(story.cpus());
    let mut stage = stage::Stage::set(dir, story.hosts(), cpus, story == Story::Beside, options).await?;
    let told = match story {
        Story::Demo => demo::tell(&mut stage).await,
        Story::Join => join::tell(&mut stage).await,
        Story::Guest => first_guest::tell(&mut stage).await,
        Story::FirstBoot => first_boot::tell(&mut stage).await,
        Story::Agent => agent::tell(&mut stage).await,
        Story::Migrate => migrate::tell(&mut stage, options.runs.unwrap_or(10)).await,
        Story::MigrateFailures => migrate_failures::tell(&mut stage, options.runs.unwrap_or(12)).await,
        Story::Plug => plug::tell(&mut stage).await,
        Story::Suspend => suspend::tell(&mut stage).await,
        Story::Storage => storage::tell(&mut stage).await,
        Story::Restart => restart::tell(&mut stage, options.runs.unwrap_or(50)).await,
        Story::Failover => failover::tell(&mut stage, options.runs.unwrap_or(20), options).await,
        Story::Lease => lease::tell(&mut stage, options.runs.unwrap_or(20)).await,
        Story::Minority => minority::tell(&mut stage).await,
        Story::Recover => recover::tell(&mut stage).await,
        Story::Beside => beside::tell(&mut stage, options.runs.unwrap_or(5)).await,
        Story::Poweroff => poweroff::tell(&mut stage, options.runs.unwrap_or(20)).await,
    };
    let told = match told {
        Ok(()) if options.ignore_flush => Err(anyhow::anyhow!("the disks lied, and nothing was found missing")),
        told => told,
    };
    let told = told.and_then(|()| stage.vmms_were_light());
    if let (Ok(()), Some(name)) = (&told, clap::ValueEnum::to_possible_value(&story)) {
        println!("\n{}: ok", name.get_name());
    }
    stage.leave(told, options.keep).await
}
