//! The authority's key: a file on voters only (DESIGN §4, hazard H27).
//!
//! A new voter asks the leader, then other voters, over mutual TLS, and keeps the file; a host that stops being a voter
//! deletes it. Nobody hands it to a host that is not a voter.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use consensus::node::Node;
use consensus::node::PeerHandler;
use consensus::pki::ClusterCa;
use consensus::pki::Identity;
use consensus::pki::PkiError;
use consensus::pki::identity::CA_KEY_FILE;
use consensus::pki::identity::write_private;
use consensus::transport::PeerKind;
use consensus::transport::Refusal;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::HostId;
use tokio_util::sync::CancellationToken;

use crate::peer::kind;

const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Access to the key on this host, if it has it.
#[derive(Clone)]
pub struct Authority {
    directory: PathBuf,
    identity: Identity,
    node: Node,
}

pub fn save_key(directory: &Path, key_pem: &str) -> Result<(), PkiError> {
    std::fs::create_dir_all(directory).map_err(|source| PkiError::File {
        operation: "create",
        path: directory.to_owned(),
        source,
    })?;
    write_private(&directory.join(CA_KEY_FILE), key_pem.as_bytes())
}

impl Authority {
    pub fn new(directory: PathBuf, identity: Identity, node: Node) -> Authority {
        Authority { directory, identity, node }
    }

    /// The authority with its key; `None` where this host does not have it.
    pub fn load(&self) -> Result<Option<ClusterCa>, PkiError> {
        let Some(key) = self.key_pem()? else { return Ok(None) };
        ClusterCa::from_pem(self.identity.site(), self.identity.ca_pem().to_owned(), key).map(Some)
    }

    fn key_pem(&self) -> Result<Option<String>, PkiError> {
        let path = self.key_path();
        match std::fs::read_to_string(&path) {
            Ok(pem) => Ok(Some(pem)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PkiError::File { operation: "read", path, source }),
        }
    }

    fn key_path(&self) -> PathBuf {
        self.directory.join(CA_KEY_FILE)
    }

    pub fn has_key(&self) -> bool {
        self.key_path().exists()
    }

    /// Asks whoever may have it, the leader first.
    pub async fn fetch(&self) -> Result<Option<ClusterCa>, PkiError> {
        let status = self.node.status();
        let mut voters: Vec<HostId> = status.voters.into_iter().filter(|host| *host != status.host).collect();
        voters.sort_by_key(|host| status.leader != Some(*host));
        for voter in voters {
            match self.node.peer_call(voter, kind::CA_KEY, Bytes::new(), ANSWER_WITHIN).await {
                Ok(key) => match self.accept(&key) {
                    Some(ca) => {
                        save_key(&self.directory, ca.key_pem())?;
                        tracing::info!(from = %voter, "this voter has the authority's key");
                        return Ok(Some(ca));
                    }
                    None => tracing::warn!(from = %voter, "what came is not the authority's key"),
                },
                Err(error) => tracing::debug!(%error, "the authority's key was not handed over"),
            }
        }
        Ok(None)
    }

    /// The key that fits the authority that the log names, and no other.
    fn accept(&self, key: &[u8]) -> Option<ClusterCa> {
        let key = String::from_utf8(key.to_vec()).ok()?;
        let ca = ClusterCa::from_pem(self.identity.site(), self.identity.ca_pem().to_owned(), key).ok()?;
        let fold = self.node.fold();
        let named = fold.state.site.as_ref()?.ca;
        (ca.fingerprint() == named).then_some(ca)
    }

    /// Keeps file and vote together until cancelled.
    pub async fn keep(self, cancel: CancellationToken) {
        loop {
            if let Err(error) = self.reconcile().await {
                tracing::error!(%error, "the authority's key file cannot be kept");
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(ASK_EVERY) => {}
            }
        }
    }

    async fn reconcile(&self) -> Result<(), PkiError> {
        let status = self.node.status();
        match (status.voters.contains(&status.host), self.has_key()) {
            (true, false) => self.fetch().await.map(|_| ()),
            // A learner by a membership that names it, not a host that knows nothing yet.
            (false, true) if status.learners.contains(&status.host) => {
                tracing::info!("this host is no voter any more: the authority's key is deleted");
                let path = self.key_path();
                std::fs::remove_file(&path).map_err(|source| PkiError::File { operation: "remove", path, source })
            }
            _ => Ok(()),
        }
    }
}

/// Hands the key to voters.
pub struct KeyHandler(pub Authority);

impl PeerHandler for KeyHandler {
    fn call(&self, from: HostId, _: PeerKind, _: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let authority = self.0.clone();
        async move {
            if !authority.node.status().voters.contains(&from) {
                tracing::warn!(%from, "a host that is not a voter asked for the authority's key");
                return Err(Refusal::new(format!("host {from} is not a voter, and only voters have this key")));
            }
            let key = authority.key_pem().map_err(Refusal::new)?;
            key.map(Bytes::from).ok_or_else(|| Refusal::new("this host does not have the key"))
        }
        .boxed()
    }
}
