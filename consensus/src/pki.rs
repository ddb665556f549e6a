//! The cluster's own certificate authority, and who a certificate says its bearer is.
//!
//! A host is proven by a certificate of this site's authority whose name is `host-<id>.<site>.quorate`
//! ([`server_name`]): dialling checks that name, accepting reads it ([`PeerName::of_certificate`]), so a connection
//! can reach neither another host nor another site by accident. The authority's key is a file on voters only; the log
//! holds fingerprints and serials, never a secret (hazard H27). Files and TLS settings are in [`identity`].
//!
//! Start at [`ClusterCa::create`], then [`ClusterCa::sign_request`].

pub mod identity;

use std::net::IpAddr;
use std::time::Duration;

use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::CertificateSigningRequestParams;
use rcgen::DistinguishedName;
use rcgen::DnType;
use rcgen::ExtendedKeyUsagePurpose;
use rcgen::IsCa;
use rcgen::Issuer;
use rcgen::KeyPair;
use rcgen::KeyUsagePurpose;
use rcgen::PublicKeyData;
use rcgen::SanType;
use rcgen::SerialNumber;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::state::Fingerprint;
use thiserror::Error;
use x509_parser::extensions::GeneralName;

pub use identity::Clients;
pub use identity::Identity;

/// Twenty years: the authority outlives its hardware; it is replaced by a new site generation, not renewed.
pub const CA_LIFETIME_MS: u64 = 20 * 365 * DAY_MS;
/// One year, renewed at two thirds (DESIGN §4).
pub const HOST_LIFETIME_MS: u64 = 365 * DAY_MS;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// A certificate is valid from an hour before it was made: clocks of joining hosts may be behind.
const BACKDATE_MS: u64 = 60 * 60 * 1000;

#[derive(Debug, Error)]
pub enum PkiError {
    #[error("cannot make a certificate or key")]
    Make(#[source] rcgen::Error),
    #[error("the signing request is refused: it does not parse, or its signature is not by its own key")]
    BadRequest(#[source] rcgen::Error),
    #[error("the signing request asks for an unknown name {name}")]
    BadName { name: String },
    #[error("the certificate does not parse: {why}")]
    BadCertificate { why: String },
    #[error("the certificate names no host of a Quorate site; expected `host-<id>.<site>.quorate`")]
    NotAHost,
    #[error("the certificate is of site {found}, this host belongs to site {expected}")]
    OtherSite { expected: SiteId, found: SiteId },
    #[error("{operation} {path}")]
    File { operation: &'static str, path: std::path::PathBuf, source: std::io::Error },
    #[error("{path} holds no {what} in PEM form; restore it from a backup, or wipe this host's state and join again")]
    BadPem { path: std::path::PathBuf, what: &'static str },
    #[error("certificate and key do not make a TLS configuration")]
    Tls(#[source] rustls::Error),
}

/// The DNS name that a host's certificate carries and that its peers ask for.
pub fn server_name(site: SiteId, host: HostId) -> String {
    format!("host-{host}.{site}.quorate")
}

/// Whom a certificate proves, once TLS has verified its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerName {
    pub site: SiteId,
    pub host: HostId,
}

impl PeerName {
    /// Reads the host's name out of a certificate. The chain is TLS's business; this trusts it.
    pub fn of_certificate(der: &[u8]) -> Result<PeerName, PkiError> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der)
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| PkiError::BadCertificate { why: error.to_string() })?
            .ok_or(PkiError::NotAHost)?;
        names
            .value
            .general_names
            .iter()
            .find_map(|name| match name {
                GeneralName::DNSName(name) => PeerName::parse(name),
                _ => None,
            })
            .ok_or(PkiError::NotAHost)
    }

    fn parse(name: &str) -> Option<PeerName> {
        let (host, rest) = name.strip_prefix("host-")?.split_once('.')?;
        let site = rest.strip_suffix(".quorate")?;
        Some(PeerName { site: site.parse().ok()?, host: host.parse().ok()? })
    }
}

/// Fingerprint of a certificate: blake3 over its DER.
pub fn certificate_fingerprint(der: &[u8]) -> Fingerprint {
    Fingerprint::of(der)
}

/// A host's key pair, before and after it has a certificate.
pub struct HostKey {
    pair: KeyPair,
}

impl HostKey {
    /// A new P-256 key from the system's randomness.
    pub fn generate() -> Result<HostKey, PkiError> {
        Ok(HostKey { pair: KeyPair::generate().map_err(PkiError::Make)? })
    }

    pub fn from_pem(pem: &str) -> Result<HostKey, PkiError> {
        Ok(HostKey { pair: KeyPair::from_pem(pem).map_err(PkiError::Make)? })
    }

    pub fn to_pem(&self) -> String {
        self.pair.serialize_pem()
    }

    /// blake3 of the DER SubjectPublicKeyInfo: what `HostCandidate.public_key` holds.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.pair.subject_public_key_info())
    }

    /// A certificate signing request in PEM. Names are the signer's business, so it asks for none.
    pub fn signing_request(&self) -> Result<String, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name("quorate host".to_owned());
        let request = params.serialize_request(&self.pair).map_err(PkiError::Make)?;
        request.pem().map_err(PkiError::Make)
    }
}

/// blake3 of the public key that a signing request proves possession of.
pub fn request_fingerprint(request_pem: &str) -> Result<Fingerprint, PkiError> {
    let request = CertificateSigningRequestParams::from_pem(request_pem).map_err(PkiError::BadRequest)?;
    Ok(Fingerprint::of(&request.public_key.subject_public_key_info()))
}

/// A certificate that was issued, and the facts of it that enter the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    pub certificate_pem: String,
    /// Hexadecimal.
    pub serial: String,
    pub fingerprint: Fingerprint,
    pub not_after_ms: u64,
}

/// The authority of one site, with its key.
pub struct ClusterCa {
    site: SiteId,
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl ClusterCa {
    /// A new authority for a new site.
    pub fn create(site: SiteId, now_ms: u64) -> Result<ClusterCa, PkiError> {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(format!("Quorate site {site}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, now_ms, CA_LIFETIME_MS);
        let certificate = params.self_signed(&key).map_err(PkiError::Make)?;
        ClusterCa::from_pem(site, certificate.pem(), key.serialize_pem())
    }

    /// The authority from its two files.
    pub fn from_pem(site: SiteId, certificate_pem: String, key_pem: String) -> Result<ClusterCa, PkiError> {
        let key = KeyPair::from_pem(&key_pem).map_err(PkiError::Make)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(PkiError::Make)?;
        Ok(ClusterCa { site, certificate_pem, key_pem, issuer })
    }

    pub fn site(&self) -> SiteId {
        self.site
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The secret. It leaves this host only towards a voter, over mutual TLS.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// blake3 of the authority's public key: what `SiteInit.ca` and join tokens hold.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.issuer.key().subject_public_key_info())
    }

    /// Certifies that the key of this request is `host`, reachable under `addresses` (IP addresses or DNS names).
    pub fn sign_request(
        &self,
        request_pem: &str,
        host: HostId,
        addresses: &[String],
        now_ms: u64,
    ) -> Result<Issued, PkiError> {
        let mut request = CertificateSigningRequestParams::from_pem(request_pem).map_err(PkiError::BadRequest)?;
        let public_key = request.public_key.subject_public_key_info();
        // What the request asks for is ignored: only its key and its proof of possession count.
        request.params = self.host_params(host, addresses, now_ms)?;
        let serial = serial_of(&public_key, host, now_ms);
        request.params.serial_number = Some(SerialNumber::from_slice(&serial));
        let certificate = request.signed_by(&self.issuer).map_err(PkiError::Make)?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            serial: serial.iter().map(|byte| format!("{byte:02x}")).collect(),
            fingerprint: certificate_fingerprint(certificate.der()),
            not_after_ms: now_ms + HOST_LIFETIME_MS,
        })
    }

    fn host_params(&self, host: HostId, addresses: &[String], now_ms: u64) -> Result<CertificateParams, PkiError> {
        let name = server_name(self.site, host);
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name.clone());
        params.subject_alt_names = vec![dns_name(&name)?];
        for address in addresses {
            params.subject_alt_names.push(match address.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => dns_name(address)?,
            });
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now_ms, HOST_LIFETIME_MS);
        Ok(params)
    }
}

/// Fingerprint of the public key inside a certificate in PEM: how a joining host checks the authority that its token names.
pub fn certificate_key_fingerprint(certificate_pem: &str) -> Result<Fingerprint, PkiError> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes())
        .map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
    let certificate = pem.parse_x509().map_err(|error| PkiError::BadCertificate { why: error.to_string() })?;
    Ok(Fingerprint::of(certificate.public_key().raw))
}

fn common_name(name: String) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

fn dns_name(name: &str) -> Result<SanType, PkiError> {
    let text = name.try_into().map_err(|_| PkiError::BadName { name: name.to_owned() })?;
    Ok(SanType::DnsName(text))
}

fn set_validity(params: &mut CertificateParams, now_ms: u64, lifetime_ms: u64) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_millis(now_ms.saturating_sub(BACKDATE_MS));
    params.not_after = epoch + Duration::from_millis(now_ms + lifetime_ms);
}

/// Sixteen positive bytes, unique for a key, a host and a millisecond: no state, no randomness.
fn serial_of(public_key: &[u8], host: HostId, now_ms: u64) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"quorate serial\0").update(public_key);
    hasher.update(&host.0.to_be_bytes()).update(&now_ms.to_be_bytes());
    let mut serial = [0; 16];
    serial.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    // RFC 5280: positive, at most 20 octets. The first byte is 0x40..0x7f, so it is never zero either.
    serial[0] = serial[0] & 0x3f | 0x40;
    serial
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_763_000_000_000;

    fn site() -> SiteId {
        SiteId(uuid::Uuid::from_u128(7))
    }

    #[test]
    fn an_issued_certificate_names_its_host_and_the_joiner_can_check_the_authority() {
        let ca = ClusterCa::create(site(), NOW_MS).unwrap();
        let key = HostKey::generate().unwrap();
        let request = key.signing_request().unwrap();
        let addresses = ["192.0.2.7".to_owned(), "h7.example".to_owned()];
        let issued = ca.sign_request(&request, HostId(12), &addresses, NOW_MS).unwrap();

        let (_, pem) = x509_parser::pem::parse_x509_pem(issued.certificate_pem.as_bytes()).unwrap();
        assert_eq!(PeerName::of_certificate(&pem.contents).unwrap(), PeerName { site: site(), host: HostId(12) });
        assert_eq!(issued.fingerprint, certificate_fingerprint(&pem.contents));
        assert_eq!(certificate_key_fingerprint(&issued.certificate_pem).unwrap(), key.fingerprint());
        assert_eq!(request_fingerprint(&request).unwrap(), key.fingerprint());
        assert_eq!(certificate_key_fingerprint(ca.certificate_pem()).unwrap(), ca.fingerprint());
        assert_eq!(issued.serial.len(), 32);
    }

    #[test]
    fn the_authority_survives_its_files() {
        let ca = ClusterCa::create(site(), NOW_MS).unwrap();
        let again = ClusterCa::from_pem(site(), ca.certificate_pem().to_owned(), ca.key_pem().to_owned()).unwrap();
        assert_eq!(again.fingerprint(), ca.fingerprint());
    }

    #[test]
    fn a_certificate_without_a_host_name_is_nobody() {
        let ca = ClusterCa::create(site(), NOW_MS).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(ca.certificate_pem().as_bytes()).unwrap();
        assert!(matches!(PeerName::of_certificate(&pem.contents), Err(PkiError::NotAHost)));
        for name in ["host-x.00000000-0000-0000-0000-000000000007.quorate", "host-1.quorate", "web.example"] {
            assert_eq!(PeerName::parse(name), None, "{name}");
        }
    }
}
