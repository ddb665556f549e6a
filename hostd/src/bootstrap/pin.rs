//! TLS towards a site that is known by the fingerprint of its authority alone.

use std::sync::Arc;

use consensus::pki::PeerName;
use consensus::pki::server_name;
use rustls::CertificateError;
use rustls::ClientConfig;
use rustls::DigitallySignedStruct;
use rustls::Error;
use rustls::RootCertStore;
use rustls::SignatureScheme;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::danger::ServerCertVerified;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::UnixTime;
use statemachine::SiteId;
use statemachine::state::Fingerprint;

/// Words of a failed pin, searched for in a connection's error to tell it from a broken network.
pub const OTHER_AUTHORITY: &str = "the server is not of the site that the token names";

/// A client that talks to hosts of `site` only, whatever address they have.
pub fn client_config(site: SiteId, authority: Fingerprint) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = PinnedAuthority { site, authority, provider: provider.clone() };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Accepts a chain that ends in the authority with this key, and a host's name of this site.
#[derive(Debug)]
struct PinnedAuthority {
    site: SiteId,
    authority: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl PinnedAuthority {
    fn is_pinned(&self, certificate: &CertificateDer<'_>) -> bool {
        x509_parser::parse_x509_certificate(certificate)
            .is_ok_and(|(_, certificate)| Fingerprint::of(certificate.public_key().raw) == self.authority)
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _dialled: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let other = || Error::General(OTHER_AUTHORITY.to_owned());
        let authority = intermediates.iter().find(|certificate| self.is_pinned(certificate)).ok_or_else(other)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        // An address may be any host's: the name in the certificate says which, and the authority vouches for it.
        let name = PeerName::of_certificate(end_entity).ok().filter(|name| name.site == self.site).ok_or_else(other)?;
        let expected = ServerName::try_from(server_name(name.site, name.host)).map_err(|_| other())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), self.provider.clone())
            .build()
            .map_err(|_| Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        verifier.verify_server_cert(end_entity, intermediates, &expected, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use consensus::pki::ClusterCa;
    use consensus::pki::HostKey;
    use rustls::pki_types::pem::PemObject;
    use statemachine::HostId;
    use uuid::Uuid;

    use super::*;

    const NOW_MS: u64 = 1_763_000_000_000;

    /// An authority, and the chain that its host 1 shows.
    fn site(number: u128) -> (SiteId, ClusterCa, Vec<CertificateDer<'static>>) {
        let site = SiteId(Uuid::from_u128(number));
        let ca = ClusterCa::create(site, NOW_MS).unwrap();
        let request = HostKey::generate().unwrap().signing_request().unwrap();
        let issued = ca.sign_request(&request, HostId(1), &[], NOW_MS).unwrap();
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let chain = vec![der(&issued.certificate_pem), der(ca.certificate_pem())];
        (site, ca, chain)
    }

    fn verify(pinned: (SiteId, Fingerprint), chain: &[CertificateDer<'static>]) -> Result<(), Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = PinnedAuthority { site: pinned.0, authority: pinned.1, provider };
        let dialled = ServerName::try_from("192.0.2.9").unwrap();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_millis(NOW_MS));
        verifier.verify_server_cert(&chain[0], &chain[1..], &dialled, &[], now).map(|_| ())
    }

    #[test]
    fn a_host_of_the_pinned_authority_is_trusted_and_no_other() {
        let (ours, ca, chain) = site(1);
        let (theirs, other_ca, other_chain) = site(2);
        verify((ours, ca.fingerprint()), &chain).unwrap();
        verify((ours, ca.fingerprint()), &other_chain).unwrap_err();
        verify((ours, other_ca.fingerprint()), &chain).unwrap_err();
        verify((theirs, ca.fingerprint()), &chain).unwrap_err();
        // The right authority, shown beside a certificate that it never signed.
        verify((ours, ca.fingerprint()), &[other_chain[0].clone(), chain[1].clone()]).unwrap_err();
        // Without the authority in the chain nothing can be checked.
        verify((ours, ca.fingerprint()), &chain[..1]).unwrap_err();
    }
}
