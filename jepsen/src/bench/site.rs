//! Three processes that agree, of either kind.

use std::path::Path;

use tokio::sync::mpsc;

use super::Peer;
use super::etcd::Etcd;
use super::process::Process;
use super::process::resident_mib;
use super::quorate::Quorate;

/// How many processes a site has.
pub const MEMBERS: usize = 3;
/// Words that a watcher has not taken yet.
pub const WATCH_AHEAD: usize = 1024;
/// Commits change one of so many things.
pub const SUBJECTS: usize = 64;

pub enum Site {
    Quorate(Quorate),
    Etcd(Etcd),
}

/// What to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Quorate,
    Etcd,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Quorate => "quorate",
            Kind::Etcd => "etcd",
        }
    }

    /// Quorate first, then who is measured beside it.
    pub fn beside(peer: Option<Peer>) -> Vec<Kind> {
        let peer = peer.map(|Peer::Etcd| Kind::Etcd);
        std::iter::once(Kind::Quorate).chain(peer).collect()
    }
}

impl Site {
    /// Begins a new site in a directory that is emptied for it.
    pub async fn start(kind: Kind, dir: &Path) -> anyhow::Result<Site> {
        let dir = std::path::absolute(dir)?.join(kind.name());
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        Ok(match kind {
            Kind::Quorate => Site::Quorate(Quorate::start(&dir).await?),
            Kind::Etcd => Site::Etcd(Etcd::start(&dir).await?),
        })
    }

    /// One commit, acknowledged. Clients are spread over the members.
    pub async fn commit(&self, client: usize, words: &str) -> anyhow::Result<()> {
        match self {
            Site::Quorate(site) => site.commit(client, words).await,
            Site::Etcd(site) => site.commit(client, words).await,
        }
    }

    /// One linearizable read, through the member of this client.
    pub async fn read(&self, client: usize) -> anyhow::Result<()> {
        match self {
            Site::Quorate(site) => site.read(client).await,
            Site::Etcd(site) => site.read(client).await,
        }
    }

    /// A stream of what is committed from now on, from the member of this watcher.
    pub async fn watch(&self, watcher: usize) -> anyhow::Result<mpsc::Receiver<String>> {
        match self {
            Site::Quorate(site) => site.watch(watcher).await,
            Site::Etcd(site) => site.watch(watcher).await,
        }
    }

    /// Index of the member that leads.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        match self {
            Site::Quorate(site) => site.leader().await,
            Site::Etcd(site) => site.leader().await,
        }
    }

    pub fn kill(&mut self, member: usize) {
        match self {
            Site::Quorate(site) => site.members[member].kill(),
            Site::Etcd(site) => site.members[member].kill(),
        }
    }

    /// Starts a killed member again, and waits until it answers.
    pub async fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        match self {
            Site::Quorate(site) => site.restart(member).await,
            Site::Etcd(site) => site.restart(member).await,
        }
    }

    /// Process ids, by member.
    pub fn processes(&self) -> Vec<u32> {
        let members = match self {
            Site::Quorate(site) => &site.members,
            Site::Etcd(site) => &site.members,
        };
        members.iter().map(Process::id).collect()
    }

    /// Resident memory of each member, in MiB.
    pub fn resident_mib(&self) -> Vec<f64> {
        self.processes().into_iter().filter_map(resident_mib).collect()
    }
}
