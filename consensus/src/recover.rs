//! A site that lost the majority of its voters for good goes on with one host: `quorate recover` (DESIGN §4).
//!
//! Raft can decide nothing here, so a person does, and gives their word that every other host is off or wiped. What is made:
//!
//! 1. `identity.next/`: a new certificate authority, this host's certificate by it, and which generation begins;
//! 2. `raft/`: this host is the only member ([`crate::store::alone`]);
//! 3. `identity.next/` takes the place of `identity/`, which is kept as `identity.generation-N/`.
//!
//! A power cut leaves the old site, or a directory that hostd refuses until the command is repeated. `identity.next/` must not be
//! deleted from then on: behind the second step the store names this host alone, under the old authority.
//! The first word of the host when it leads is `SiteRecover`: the others leave the log, with all that they held. Their certificates
//! are of the old authority, so no host of the old site is heard, whatever it believes.

use std::path::Path;
use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::state::Fingerprint;
use thiserror::Error;

use crate::pki::ClusterCa;
use crate::pki::HostKey;
use crate::pki::Identity;
use crate::pki::PkiError;
use crate::pki::identity::CA_KEY_FILE;
use crate::pki::identity::CERTIFICATE_FILE;
use crate::pki::identity::KEY_FILE;
use crate::pki::identity::write_private;
use crate::platform::Platform;
use crate::store::Store;
use crate::store::StoreError;
use crate::store::alone::LastEntry;
use crate::store::alone::Whole;

/// Of hostd's data directory.
const IDENTITY: &str = "identity";
const RAFT: &str = "raft";
/// A recovery that was begun and not carried through.
pub const IDENTITY_NEXT: &str = "identity.next";
/// In the identity, until the log knows.
const RECOVERY_FILE: &str = "recovery";

#[derive(Debug, Error)]
pub enum RecoverError {
    #[error("the identity of this host cannot be read or made")]
    Identity(#[from] PkiError),
    #[error("the store of this host cannot be recovered")]
    Store(#[from] StoreError),
    #[error("this host's log names no site; recover a host that was a member")]
    NoSite,
    #[error(
        "host {host} is not in the log of this host: it was removed, or had not heard of its own join; recover another one"
    )]
    NotAHost { host: HostId },
    #[error("{path} cannot be moved", path = path.display())]
    Move { path: PathBuf, source: std::io::Error },
    #[error("{path} does not say which generation begins: {source}", path = path.display())]
    Damaged { path: PathBuf, source: CodecError },
}

/// What a site goes on with, for a person to judge before they agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Prospect {
    pub site: String,
    pub host: String,
    /// The generation that begins.
    pub generation: u32,
    /// How hosts are compared. `None`: it pulled, so all that it has was committed.
    pub last_entry: Option<LastEntry>,
    /// The last batch that this host has, and when it was decided.
    pub head: Seq,
    pub at_ms: u64,
    /// Who leaves, with how many VMs that held a permit there.
    pub leave: Vec<(String, u32)>,
}

/// What the log must be told first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    pub generation: u32,
    pub ca: Fingerprint,
}

/// Looks at what this host has, and changes nothing but a torn end of its log. hostd must be stopped.
pub async fn look(data_dir: &Path) -> Result<Prospect, RecoverError> {
    let identity = Identity::load(&data_dir.join(IDENTITY))?;
    let store = Store::open(Platform::real(), &data_dir.join(RAFT)).await?;
    let whole = store.whole().await;
    store.close().await;
    prospect(&whole?, identity.host())
}

fn prospect(whole: &Whole, own: HostId) -> Result<Prospect, RecoverError> {
    let fold = &whole.fold;
    let site = fold.state.site.as_ref().ok_or(RecoverError::NoSite)?;
    let host = fold.state.hosts.get(&own).ok_or(RecoverError::NotAHost { host: own })?;
    let others = fold.state.hosts.iter().filter(|(id, _)| **id != own);
    Ok(Prospect {
        site: site.name.clone(),
        host: host.name.clone(),
        generation: site.generation + 1,
        last_entry: whole.last,
        head: fold.head.seq,
        at_ms: fold.stamp.at_ms,
        leave: others.map(|(_, host)| (host.name.clone(), host.usage.vms)).collect(),
    })
}

/// Carries it through. May be repeated after a power cut. hostd must be stopped.
pub async fn carry_out(data_dir: &Path, now_ms: u64) -> Result<Prospect, RecoverError> {
    let present = data_dir.join(IDENTITY);
    let next = data_dir.join(IDENTITY_NEXT);
    if !present.exists() && next.join(CERTIFICATE_FILE).exists() {
        // Power was lost between the last two steps.
        rename(&next, &present)?;
        return look(data_dir).await;
    }
    let old = Identity::load(&present)?;
    let store = Store::open(Platform::real(), &data_dir.join(RAFT)).await?;
    let whole = store.whole().await?;
    let prospect = prospect(&whole, old.host())?;
    let address = whole.fold.state.hosts.get(&old.host()).map(|host| host.address.clone()).unwrap_or_default();
    // Its certificate is written last: an identity that is whole is used again.
    if !next.join(CERTIFICATE_FILE).exists() {
        make_identity(&present, &next, &old, &address, prospect.generation, now_ms)?;
    }
    store.go_on_alone(old.host(), address).await?;
    rename(&present, &aside(data_dir, prospect.generation - 1))?;
    rename(&next, &present)?;
    Ok(prospect)
}

/// Where the identity of a generation is kept: beside that of an earlier try, if there was one.
fn aside(data_dir: &Path, generation: u32) -> PathBuf {
    let name = format!("{IDENTITY}.generation-{generation}");
    let tries = (2_u32..).map(|again| format!("{name}.{again}"));
    let mut names = std::iter::once(name.clone()).chain(tries);
    names.find(|name| !data_dir.join(name).exists()).map_or_else(|| data_dir.join(&name), |name| data_dir.join(name))
}

fn make_identity(
    present: &Path,
    next: &Path,
    old: &Identity,
    address: &str,
    generation: u32,
    now_ms: u64,
) -> Result<(), RecoverError> {
    let file = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::File { operation, path, source }
    };
    std::fs::create_dir_all(next).map_err(file("create", next))?;
    let key_file = present.join(KEY_FILE);
    let key = HostKey::from_pem(&std::fs::read_to_string(&key_file).map_err(file("read", &key_file))?)?;
    let ca = ClusterCa::create(old.site(), now_ms)?;
    let addresses: Vec<String> =
        address.parse::<std::net::SocketAddr>().map(|address| address.ip().to_string()).into_iter().collect();
    let issued = ca.sign_request(&key.signing_request()?, old.host(), &addresses, now_ms)?;
    let begun = Begun { generation, ca: ca.fingerprint() };
    write_private(&next.join(RECOVERY_FILE), &codec::encode(&begun))?;
    write_private(&next.join(CA_KEY_FILE), ca.key_pem().as_bytes())?;
    Identity::new(ca.certificate_pem(), &issued.certificate_pem, &key.to_pem())?.save(next)?;
    // The store must never name this host alone while the new identity may still vanish.
    sync_parent(next).map_err(file("sync", next))?;
    Ok(())
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path.parent().unwrap_or(path))?.sync_all()
}

fn rename(from: &Path, to: &Path) -> Result<(), RecoverError> {
    let moved = |source| RecoverError::Move { path: from.to_owned(), source };
    std::fs::rename(from, to).map_err(moved)?;
    sync_parent(from).map_err(moved)
}

/// A recovery that was begun here and is not in the log yet.
pub fn begun(identity_dir: &Path) -> Result<Option<Begun>, RecoverError> {
    let path = identity_dir.join(RECOVERY_FILE);
    match std::fs::read(&path) {
        Ok(bytes) => codec::decode(&bytes).map(Some).map_err(|source| RecoverError::Damaged { path, source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::File { operation: "read", path, source }.into()),
    }
}

/// The log knows.
pub fn finished(identity_dir: &Path) -> Result<(), RecoverError> {
    let path = identity_dir.join(RECOVERY_FILE);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(PkiError::File { operation: "remove", path, source }.into())
        }
        _ => Ok(()),
    }
}
