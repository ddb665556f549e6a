//! What goes wrong in a run, as a list made from the seed: so that a failing run can be told again with fewer faults.

use std::fmt;

use super::hardware::OwnEnd;
use super::random::Dice;

/// One thing that goes wrong, with its end. Hosts are numbered by their age in the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    PowerCut {
        host: usize,
        for_ms: u64,
        seed: u64,
    },
    AllPowerCut {
        for_ms: u64,
        seed: u64,
    },
    KillHostd {
        host: usize,
        for_ms: u64,
    },
    /// Guests end by themselves, and hostd dies a moment later, with or without having said so.
    GuestsEnd {
        host: usize,
        how: OwnEnd,
        number: u64,
        kill_after_ms: u64,
        for_ms: u64,
    },
    /// Everything on the machine stops, its clocks do not.
    Stop {
        host: usize,
        for_ms: u64,
    },
    /// Both ways between one host and all others.
    Isolate {
        host: usize,
        for_ms: u64,
    },
    /// A host is heard and hears nobody, while guests end on it: its reports arrive, and it learns nothing of what becomes of them.
    EndsUnheard {
        host: usize,
        how: OwnEnd,
        number: u64,
        for_ms: u64,
    },
    /// One way between two hosts.
    OneWay {
        from: usize,
        to: usize,
        for_ms: u64,
    },
    /// Each host hears and is heard by its two neighbours alone.
    Ring {
        for_ms: u64,
    },
    /// Two sides that do not hear each other.
    Split {
        at: usize,
        for_ms: u64,
    },
    Slow {
        host: usize,
        extra_ms: u64,
        for_ms: u64,
    },
    Loss {
        one_in: u64,
        for_ms: u64,
    },
    WallJump {
        host: usize,
        by_ms: i64,
    },
    TransferLead {
        to: usize,
    },
    Join,
    Remove {
        host: usize,
    },
    /// The disk fails after so many more changes; hostd must end, and its machine gets power and a whole disk again.
    DiskFails {
        host: usize,
        after_changes: u64,
    },
    /// Nothing that is asked of the disk ends, until it goes on.
    DiskHangs {
        host: usize,
        for_ms: u64,
    },
    /// The lead is wherever it is: its machine loses power and returns at once.
    RestartLeader {
        for_ms: u64,
    },
    /// All that the leader sends is lost: it leads on in its own eyes.
    MuteLeader {
        for_ms: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub at_ms: u64,
    pub fault: Fault,
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3} {:?}", self.at_ms as f64 / 1000.0, self.fault)
    }
}

/// The faults of a run of `hosts` hosts, between `from_ms` and `until_ms`.
pub fn plan(dice: &mut Dice, hosts: usize, from_ms: u64, until_ms: u64) -> Vec<Planned> {
    let mut planned = Vec::new();
    let mut at_ms = from_ms;
    // Quiet seeds and wild ones.
    let pace_ms = dice.range(800..6_000);
    while at_ms < until_ms {
        planned.push(Planned { at_ms, fault: one(dice, hosts) });
        at_ms += dice.range(pace_ms / 4..2 * pace_ms);
    }
    // Kinds that came later have dice of their own, so that older seeds keep their faults.
    let mut later = Dice::new(pace_ms << 32 ^ from_ms);
    let mut at_ms = from_ms + later.below(3 * pace_ms);
    while at_ms < until_ms {
        planned.push(Planned { at_ms, fault: one_of_disks_and_guests(&mut later, hosts) });
        at_ms += later.range(pace_ms..5 * pace_ms);
    }
    planned.sort_by_key(|planned| planned.at_ms);
    planned
}

fn one(dice: &mut Dice, hosts: usize) -> Fault {
    let host = dice.below(hosts as u64) as usize;
    let other = (host + 1 + dice.below(hosts as u64 - 1) as usize) % hosts;
    let short_ms = dice.range(50..3_000);
    // Around the lease of 12 s, its bound, and the time to be declared lost.
    let long_ms = dice.range(3_000..20_000);
    let for_ms = if dice.one_in(2) { short_ms } else { long_ms };
    let seed = dice.below(u64::MAX);
    match dice.below(24) {
        0..2 => Fault::PowerCut { host, for_ms, seed },
        2 => Fault::AllPowerCut { for_ms: short_ms, seed },
        3..6 => Fault::KillHostd { host, for_ms },
        6..8 => Fault::Stop { host, for_ms },
        8..10 => Fault::Isolate { host, for_ms },
        10 => Fault::OneWay { from: host, to: other, for_ms },
        11 => Fault::Ring { for_ms },
        12 => Fault::Split { at: 1 + dice.below(hosts as u64 - 1) as usize, for_ms },
        13..15 => Fault::Slow { host, extra_ms: dice.range(20..900), for_ms },
        15 => Fault::Loss { one_in: dice.range(3..30), for_ms },
        16 => Fault::WallJump { host, by_ms: dice.range(0..7_200_000) as i64 - 3_600_000 },
        17 => Fault::TransferLead { to: host },
        18 => Fault::Join,
        19 => Fault::Remove { host },
        20..22 => Fault::RestartLeader { for_ms: dice.range(10..400) },
        _ => Fault::MuteLeader { for_ms: dice.range(200..6_000) },
    }
}

fn one_of_disks_and_guests(dice: &mut Dice, hosts: usize) -> Fault {
    let host = dice.below(hosts as u64) as usize;
    let how = [OwnEnd::PowersOff, OwnEnd::Killed, OwnEnd::Traceless][dice.below(3) as usize];
    let number = dice.below(2);
    match dice.below(8) {
        0 => Fault::DiskFails { host, after_changes: dice.below(40) },
        // Around what makes a leader gray: two seconds, and two more.
        1..3 => Fault::DiskHangs { host, for_ms: dice.range(50..8_000) },
        3..5 => Fault::EndsUnheard { host, how, number, for_ms: dice.range(500..9_000) },
        _ => {
            // From before hostd has seen it until its report is in the log.
            let kill_after_ms = if dice.one_in(3) { 0 } else { dice.below(400) };
            Fault::GuestsEnd { host, how, number, kill_after_ms, for_ms: dice.range(20..1_500) }
        }
    }
}
