//! What to ask a guest's agent when, and which of its answers are worth an event. Pure: times come in, decisions go out.
//!
//! | asked | every | oVirt's VDSM | why |
//! |---|---|---|---|
//! | ping | 10 s, when nothing else was answered | - | an agent that is silent is seen before somebody waits for it |
//! | interfaces | 30 s | 120 s | people wait for the address of a new guest |
//! | commands, name, OS, file systems | 300 s | 300, 120, 120, 300 s | they change with a person's work in the guest |
//!
//! All of them are asked when the agent connects; that is at each start of the guest, and when its name or system may be new. An agent
//! that does not answer is asked for a sign of life only, at growing intervals.
//!
//! Facts are reported when the first round is over and they differ from the last report, at most once in 30 s: a guest that changes its
//! name a thousand times a second costs two events a minute. Used bytes are samples and not in the facts (DESIGN §3).

use std::collections::BTreeSet;
use std::time::Duration;

use statemachine::state::GuestFacts;
use statemachine::state::GuestFilesystem;
use statemachine::state::GuestInterface;
use statemachine::state::GuestOs;

use super::commands::Command;

pub const PING_EVERY: Duration = Duration::from_secs(10);
pub const INTERFACES_EVERY: Duration = Duration::from_secs(30);
pub const REST_EVERY: Duration = Duration::from_secs(300);
pub const REPORT_EVERY: Duration = Duration::from_secs(30);
/// A question that found no answer is asked again when the agent lives, but not at once: it may be what hangs it.
pub const RETRY_EVERY: Duration = Duration::from_secs(60);
/// Between two signs of life that an agent does not give, at most.
pub const SILENCE_MAX: Duration = Duration::from_secs(300);

/// A time on the caller's monotonic clock.
pub type At = Duration;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    /// First: it tells what may be asked.
    Info,
    Interfaces,
    HostName,
    Os,
    Filesystems,
    Ping,
}

impl Ask {
    const ALL: [Ask; 6] = [Ask::Info, Ask::Interfaces, Ask::HostName, Ask::Os, Ask::Filesystems, Ask::Ping];
    /// What has to be answered or refused before facts are whole.
    const FACTS: [Ask; 4] = [Ask::Interfaces, Ask::HostName, Ask::Os, Ask::Filesystems];

    pub fn command(self) -> Command {
        match self {
            Ask::Info => Command::Info,
            Ask::Interfaces => Command::Interfaces,
            Ask::HostName => Command::HostName,
            Ask::Os => Command::OsInfo,
            Ask::Filesystems => Command::Filesystems,
            Ask::Ping => Command::Ping,
        }
    }

    fn every(self) -> Duration {
        match self {
            Ask::Ping => PING_EVERY,
            Ask::Interfaces => INTERFACES_EVERY,
            Ask::Info | Ask::HostName | Ask::Os | Ask::Filesystems => REST_EVERY,
        }
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Info(BTreeSet<Command>),
    Interfaces(BTreeSet<GuestInterface>),
    HostName(Option<String>),
    Os(GuestOs),
    Filesystems(BTreeSet<GuestFilesystem>),
    Pong,
}

impl Answer {
    fn to(&self) -> Ask {
        match self {
            Answer::Info(_) => Ask::Info,
            Answer::Interfaces(_) => Ask::Interfaces,
            Answer::HostName(_) => Ask::HostName,
            Answer::Os(_) => Ask::Os,
            Answer::Filesystems(_) => Ask::Filesystems,
            Answer::Pong => Ask::Ping,
        }
    }
}

/// Why a question has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoAnswer {
    /// The agent said no, or nonsense: it lives.
    Refused,
    Silent,
}

#[derive(Debug)]
pub struct Observer {
    /// By [`Ask::ALL`]. `None` when nobody is connected.
    due: Option<[At; Ask::ALL.len()]>,
    supported: BTreeSet<Command>,
    /// Of [`Ask::FACTS`]: not answered since the agent connected.
    missing: BTreeSet<Ask>,
    facts: GuestFacts,
    reported: Option<GuestFacts>,
    reported_at: Option<At>,
    /// Questions in a row without an answer.
    silent: u32,
}

impl Observer {
    /// `known` is what was reported of this guest before, by whichever process.
    pub fn new(known: Option<GuestFacts>) -> Observer {
        Observer {
            due: None,
            supported: BTreeSet::new(),
            missing: BTreeSet::new(),
            facts: GuestFacts::default(),
            reported: known,
            reported_at: None,
            silent: 0,
        }
    }

    /// An agent is there, and it may be another one in another system.
    pub fn connected(&mut self, now: At) {
        self.due = Some([now; Ask::ALL.len()]);
        self.supported = BTreeSet::from([Command::Info]);
        self.missing = BTreeSet::from(Ask::FACTS);
        self.facts = GuestFacts::default();
        self.silent = 0;
    }

    pub fn disconnected(&mut self) {
        self.due = None;
        self.silent = 0;
    }

    /// What to ask now.
    pub fn ask(&self, now: At) -> Option<Ask> {
        self.askable().find(|(_, due)| *due <= now).map(|(ask, _)| ask)
    }

    /// When [`ask`](Self::ask) or [`report`](Self::report) has something to say.
    pub fn next(&self) -> Option<At> {
        let report = self.news().then(|| self.reported_at.map_or(Duration::ZERO, |at| at + REPORT_EVERY));
        self.askable().map(|(_, due)| due).chain(report).min()
    }

    /// The agent has not answered for long enough to say so.
    pub fn is_silent(&self) -> bool {
        self.silent > 1
    }

    pub fn answered(&mut self, answer: Answer, now: At) {
        let ask = answer.to();
        match answer {
            Answer::Info(supported) => {
                self.supported = supported;
                let supported = &self.supported;
                // What it does not offer will not be answered.
                self.missing.retain(|ask| supported.contains(&ask.command()));
            }
            Answer::Interfaces(interfaces) => self.facts.interfaces = interfaces,
            Answer::HostName(hostname) => self.facts.hostname = hostname,
            Answer::Os(os) => self.facts.os = Some(os),
            Answer::Filesystems(filesystems) => self.facts.filesystems = filesystems,
            Answer::Pong => {}
        }
        self.done(ask, now);
        self.alive(now);
    }

    pub fn failed(&mut self, ask: Ask, why: NoAnswer, now: At) {
        self.done(ask, now);
        match why {
            NoAnswer::Refused => self.alive(now),
            NoAnswer::Silent => {
                // Without the list of commands nothing else can be asked.
                let again = if ask == Ask::Info { PING_EVERY } else { RETRY_EVERY.min(ask.every()) };
                self.put_off(ask, now + again);
                self.silent = self.silent.saturating_add(1);
                let wait = PING_EVERY * 2u32.saturating_pow(self.silent.min(16) - 1);
                self.put_off(Ask::Ping, now + wait.min(SILENCE_MAX));
            }
        }
    }

    /// The facts that are to be reported now. They count as reported.
    pub fn report(&mut self, now: At) -> Option<GuestFacts> {
        let too_soon = self.reported_at.is_some_and(|at| now < at + REPORT_EVERY);
        if too_soon || !self.news() {
            return None;
        }
        self.reported_at = Some(now);
        self.reported = Some(self.facts.clone());
        self.reported.clone()
    }

    pub fn facts(&self) -> &GuestFacts {
        &self.facts
    }

    /// Whole facts that differ from what was reported.
    fn news(&self) -> bool {
        self.due.is_some() && self.missing.is_empty() && self.reported.as_ref() != Some(&self.facts)
    }

    /// What may be asked, and when.
    fn askable(&self) -> impl Iterator<Item = (Ask, At)> {
        let due = Ask::ALL.into_iter().zip(self.due.into_iter().flatten());
        due.filter(|(ask, _)| match self.silent {
            0 => self.supported.contains(&ask.command()),
            // Every agent takes a ping, and a hung one must not be given more to do.
            _ => *ask == Ask::Ping,
        })
    }

    fn done(&mut self, ask: Ask, now: At) {
        self.missing.remove(&ask);
        self.put_off(ask, now + ask.every());
    }

    fn alive(&mut self, now: At) {
        self.silent = 0;
        self.put_off(Ask::Ping, now + PING_EVERY);
    }

    fn put_off(&mut self, ask: Ask, until: At) {
        if let Some(due) = &mut self.due {
            due[ask as usize] = until;
        }
    }
}
