//! `quorate init`: a site begins.

use std::path::Path;
use std::path::PathBuf;

use consensus::pki::ClusterCa;
use consensus::pki::HostKey;
use consensus::pki::Identity;
use consensus::pki::PkiError;
use consensus::pki::certificate_fingerprint;
use consensus::pki::identity::write_private;
use hostd_api::Problem;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::codec;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostCandidate;
use statemachine::command::Request;
use statemachine::fold::Decision;

use super::BootstrapError;
use super::authority;
use crate::config::Config;
use crate::facts;

/// The first batch of a log makes the first host.
pub const FIRST_HOST: HostId = HostId(1);
/// Present from the moment that the identity is decided until the site's first batch is committed.
const GENESIS_FILE: &str = "genesis";

/// A site that is about to begin.
pub struct NewSite {
    pub identity: Identity,
    pub genesis: Request,
}

/// Makes authority, identity and first command, and writes them down: a host that loses power from here on begins the
/// same site at its next start.
pub fn prepare(config: &Config, name: &str, now_ms: u64) -> Result<NewSite, BootstrapError> {
    let site = SiteId(uuid::Uuid::new_v4());
    let ca = ClusterCa::create(site, now_ms)?;
    let key = HostKey::generate()?;
    let address = config.address.ip().to_string();
    let issued = ca.sign_request(&key.signing_request()?, FIRST_HOST, &[address], now_ms)?;
    let identity = Identity::new(ca.certificate_pem(), &issued.certificate_pem, &key.to_pem())?;
    let first_host = HostCandidate {
        name: config.name.clone(),
        address: config.address.to_string(),
        public_key: key.fingerprint(),
        facts: facts::collect(config, None)?,
    };
    let command = Command::SiteInit { site, name: name.to_owned(), ca: ca.fingerprint(), first_host };
    let genesis = Request { actor: Actor::Root(FIRST_HOST), origin: FIRST_HOST, idempotency: None, command };
    // A name that the rules refuse must leave nothing behind.
    if let Decision::Rejected(rejection) = Fold::default().decide(&genesis, now_ms) {
        return Err(Problem::from(&rejection).into());
    }
    let directory = config.identity_dir();
    authority::save_key(&directory, ca.key_pem())?;
    write_private(&genesis_path(&directory), &codec::encode(&genesis))?;
    identity.save(&directory)?;
    Ok(NewSite { identity, genesis })
}

/// The first command of a site that was begun here and is not known to be committed.
pub fn unfinished(config: &Config) -> Result<Option<Request>, BootstrapError> {
    let path = genesis_path(&config.identity_dir());
    match std::fs::read(&path) {
        Ok(bytes) => {
            let unreadable = |_| PkiError::BadPem { path: path.clone(), what: "first command" };
            Ok(Some(codec::decode(&bytes).map_err(unreadable)?))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::File { operation: "read", path, source }.into()),
    }
}

/// What the log must know of the certificate that the first host made for itself.
pub fn first_certificate(identity: &Identity) -> Result<Command, BootstrapError> {
    let unreadable = |why: String| PkiError::BadCertificate { why };
    let (_, pem) = x509_parser::pem::parse_x509_pem(identity.certificate_pem().as_bytes())
        .map_err(|error| unreadable(error.to_string()))?;
    let certificate = pem.parse_x509().map_err(|error| unreadable(error.to_string()))?;
    Ok(Command::CertificateIssue {
        host: identity.host(),
        serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
        fingerprint: certificate_fingerprint(&pem.contents),
        not_after_ms: identity.not_after_ms()?,
    })
}

/// The site's first batch is committed.
pub fn finish(config: &Config) -> Result<(), BootstrapError> {
    let path = genesis_path(&config.identity_dir());
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(PkiError::File { operation: "remove", path, source }.into())
        }
        _ => Ok(()),
    }
}

fn genesis_path(directory: &Path) -> PathBuf {
    directory.join(GENESIS_FILE)
}
