//! A host's identity: its certificate, its key, its authority's certificate; as files, and as TLS settings.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;
use statemachine::HostId;
use statemachine::SiteId;

use super::PeerName;
use super::PkiError;

/// File names inside the identity directory.
pub const CA_FILE: &str = "ca.pem";
pub const CERTIFICATE_FILE: &str = "host.pem";
/// The authority's key: on voters.
pub const CA_KEY_FILE: &str = "ca.key";
pub const KEY_FILE: &str = "host.key";

/// Whether a server asks its clients for a certificate of this site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Peers: no certificate, no service.
    Required,
    /// The API: hosts show one, people show a token, joiners have neither yet.
    Optional,
}

/// Everything that proves who this host is. Cloning is cheap.
#[derive(Clone)]
pub struct Identity {
    name: PeerName,
    ca_pem: Arc<str>,
    certificate_pem: Arc<str>,
    key_pem: Arc<str>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", super::server_name(self.name.site, self.name.host))
    }
}

impl Identity {
    pub fn new(ca_pem: &str, certificate_pem: &str, key_pem: &str) -> Result<Identity, PkiError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
        Ok(Identity {
            name: PeerName::of_certificate(&certificate)?,
            ca_pem: ca_pem.into(),
            certificate_pem: certificate_pem.into(),
            key_pem: key_pem.into(),
        })
    }

    pub fn host(&self) -> HostId {
        self.name.host
    }

    pub fn site(&self) -> SiteId {
        self.name.site
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Milliseconds since 1970 after which the certificate is refused; renewal is due at two thirds of its life.
    pub fn not_after_ms(&self) -> Result<u64, PkiError> {
        let certificate = self.certificate()?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
        Ok(parsed.validity().not_after.timestamp().max(0) as u64 * 1000)
    }

    /// Reads the three files of `directory`.
    pub fn load(directory: &Path) -> Result<Identity, PkiError> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|source| PkiError::File { operation: "read", path, source })
        };
        Identity::new(&read(CA_FILE)?, &read(CERTIFICATE_FILE)?, &read(KEY_FILE)?)
    }

    /// Writes the three files, the key for this user only. Each is whole or absent, whatever happens meanwhile; the
    /// certificate goes last, so its presence says that the identity is complete.
    pub fn save(&self, directory: &Path) -> Result<(), PkiError> {
        write_private(&directory.join(KEY_FILE), self.key_pem.as_bytes())?;
        write_private(&directory.join(CA_FILE), self.ca_pem.as_bytes())?;
        write_private(&directory.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes())
    }

    /// TLS 1.3 for servers, without early data. The chain ends with the authority itself: a joining host has only the
    /// fingerprint of its key, and must see the certificate.
    pub fn server_config(&self, clients: Clients, alpn: &[&[u8]]) -> Result<ServerConfig, PkiError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider());
        let verifier = match clients {
            Clients::Required => verifier,
            Clients::Optional => verifier.allow_unauthenticated(),
        };
        let verifier = verifier.build().map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate()?, self.authority()?], self.key()?)
            .map_err(PkiError::Tls)?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// TLS 1.3 for clients that show this host's certificate.
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, PkiError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.certificate()?], self.key()?)
            .map_err(PkiError::Tls)?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.enable_early_data = false;
        Ok(config)
    }

    fn roots(&self) -> Result<RootCertStore, PkiError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority()?).map_err(PkiError::Tls)?;
        Ok(roots)
    }

    fn authority(&self) -> Result<CertificateDer<'static>, PkiError> {
        CertificateDer::from_pem_slice(self.ca_pem.as_bytes())
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })
    }

    fn certificate(&self) -> Result<CertificateDer<'static>, PkiError> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, PkiError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })
    }
}

/// Writes a file that only this user may read: temporary file, fsync, rename, fsync of the directory.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    let failed = |operation| {
        let path = path.to_owned();
        move |source| PkiError::File { operation, path, source }
    };
    let directory = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed("create"))?;
    file.write_all(bytes).map_err(failed("write"))?;
    file.sync_all().map_err(failed("sync"))?;
    std::fs::rename(&temporary, path).map_err(failed("rename"))?;
    let directory = std::fs::File::open(directory).map_err(failed("open directory of"))?;
    directory.sync_all().map_err(failed("sync directory of"))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::pki::ClusterCa;
    use crate::pki::HostKey;

    #[test]
    fn an_identity_survives_its_files_and_its_key_is_private() {
        let site = SiteId(uuid::Uuid::from_u128(3));
        let ca = ClusterCa::create(site, 1_763_000_000_000).unwrap();
        let key = HostKey::generate().unwrap();
        let issued = ca.sign_request(&key.signing_request().unwrap(), HostId(5), &[], 1_763_000_000_000).unwrap();
        let identity = Identity::new(ca.certificate_pem(), &issued.certificate_pem, &key.to_pem()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        identity.save(directory.path()).unwrap();

        let loaded = Identity::load(directory.path()).unwrap();
        assert_eq!((loaded.host(), loaded.site()), (HostId(5), site));
        assert_eq!(loaded.not_after_ms().unwrap() / 1000, issued.not_after_ms / 1000);
        loaded.server_config(Clients::Required, &[b"quorate-raft/1"]).unwrap();
        loaded.client_config(&[b"quorate-raft/1"]).unwrap();
        let mode = std::fs::metadata(directory.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
