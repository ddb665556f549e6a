//! The texts of tokens: what a person copies from one terminal to another.
//!
//! `qrt1.` is a join token: everything that a new host needs to find the site, to know that it is the right one
//! (the pinned key of its certificate authority) and to be let in. `qra1.` is a bearer token of the API. Both carry the site's id,
//! so a token of another site is told apart from an unknown one, and a checksum, so a typing error is told apart from a refusal.
//!
//! After the prefix comes base64url without padding of: fields in the order of the structs, then 8 bytes of blake3 over
//! prefix and fields. The checksum guards against accidents; what guards the site is the secret.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use statemachine::SiteId;
use statemachine::state::Fingerprint;
use thiserror::Error;
use uuid::Uuid;

use crate::secret::Secret;
use crate::secret::SecretText;

const JOIN_PREFIX: &str = "qrt1.";
const API_PREFIX: &str = "qra1.";
const CHECKSUM_LEN: usize = 8;
/// Longest text that is looked at.
const TEXT_MAX: usize = 1024;
const ADDRESS_MAX: usize = 64;

/// Why a token's text is refused before anybody is asked. No variant holds any of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TokenTextError {
    #[error(
        "this is not a token: a {expected} begins with `{prefix}`; copy the whole line that `quorate token create` printed"
    )]
    NotAToken { expected: &'static str, prefix: &'static str },
    #[error("this is an API token, and joining needs a join token; ask for one with `quorate token create`")]
    ApiTokenForJoin,
    #[error(
        "this is a join token, and the API needs an API token; ask for one with `quorate token create --purpose admin`"
    )]
    JoinTokenForApi,
    #[error(
        "the token is of a newer kind than this version knows; upgrade this host, or ask an older host for a token"
    )]
    NewerKind,
    #[error(
        "the token is damaged: its checksum does not fit, so a part is missing or altered; copy the whole line again"
    )]
    Damaged,
    #[error("the token is of site {theirs}, and this is site {ours}; ask for a token on a host of this site")]
    Foreign { theirs: SiteId, ours: SiteId },
}

/// One host may join with it, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub site: SiteId,
    /// blake3 of the CA's public key: the joining host trusts nothing else.
    pub ca: Fingerprint,
    pub secret: Secret,
    /// `ip:port` of hosts that were up when it was created, 1 to 3.
    pub addresses: Vec<String>,
}

impl JoinToken {
    pub const ADDRESSES_MAX: usize = 3;

    /// Addresses beyond the third, and any too long to be one, are left out.
    pub fn to_text(&self) -> SecretText {
        let fitting = self.addresses.iter().filter(|address| address.len() <= ADDRESS_MAX);
        let addresses: Vec<&String> = fitting.take(Self::ADDRESSES_MAX).collect();
        let mut fields = Vec::with_capacity(256);
        fields.extend_from_slice(self.site.0.as_bytes());
        fields.extend_from_slice(&self.ca.0);
        fields.extend_from_slice(self.secret.expose());
        fields.push(addresses.len() as u8);
        for address in addresses {
            fields.push(address.len() as u8);
            fields.extend_from_slice(address.as_bytes());
        }
        armour(JOIN_PREFIX, fields)
    }

    pub fn from_text(text: &str) -> Result<JoinToken, TokenTextError> {
        let text = text.trim();
        if text.starts_with(API_PREFIX) {
            return Err(TokenTextError::ApiTokenForJoin);
        }
        let fields = unarmour("join token", JOIN_PREFIX, "qrt", text)?;
        Self::from_fields(&fields).ok_or(TokenTextError::Damaged)
    }

    fn from_fields(mut fields: &[u8]) -> Option<JoinToken> {
        let site = SiteId(Uuid::from_bytes(*take(&mut fields)?));
        let ca = Fingerprint(*take(&mut fields)?);
        let secret = Secret::from_bytes(*take(&mut fields)?);
        let [count] = *take::<1>(&mut fields)?;
        if count == 0 || usize::from(count) > Self::ADDRESSES_MAX {
            return None;
        }
        let mut addresses = Vec::new();
        for _ in 0..count {
            let [len] = *take::<1>(&mut fields)?;
            let (address, rest) =
                fields.split_at_checked(usize::from(len)).filter(|_| usize::from(len) <= ADDRESS_MAX)?;
            addresses.push(std::str::from_utf8(address).ok()?.to_owned());
            fields = rest;
        }
        fields.is_empty().then_some(JoinToken { site, ca, secret, addresses })
    }
}

/// Bearer of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken {
    pub site: SiteId,
    pub secret: Secret,
}

impl ApiToken {
    pub fn to_text(&self) -> SecretText {
        let mut fields = Vec::with_capacity(64);
        fields.extend_from_slice(self.site.0.as_bytes());
        fields.extend_from_slice(self.secret.expose());
        armour(API_PREFIX, fields)
    }

    pub fn from_text(text: &str) -> Result<ApiToken, TokenTextError> {
        let text = text.trim();
        if text.starts_with(JOIN_PREFIX) {
            return Err(TokenTextError::JoinTokenForApi);
        }
        let fields = unarmour("API token", API_PREFIX, "qra", text)?;
        Self::from_fields(&fields).ok_or(TokenTextError::Damaged)
    }

    /// The same, refused unless it is of `ours`.
    pub fn of_site(text: &str, ours: SiteId) -> Result<ApiToken, TokenTextError> {
        let token = Self::from_text(text)?;
        match token.site == ours {
            true => Ok(token),
            false => Err(TokenTextError::Foreign { theirs: token.site, ours }),
        }
    }

    fn from_fields(mut fields: &[u8]) -> Option<ApiToken> {
        let site = SiteId(Uuid::from_bytes(*take(&mut fields)?));
        let secret = Secret::from_bytes(*take(&mut fields)?);
        fields.is_empty().then_some(ApiToken { site, secret })
    }
}

fn checksum(prefix: &str, fields: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(prefix.as_bytes());
    hasher.update(fields);
    let mut sum = [0; CHECKSUM_LEN];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_LEN]);
    sum
}

fn armour(prefix: &str, mut fields: Vec<u8>) -> SecretText {
    let sum = checksum(prefix, &fields);
    fields.extend_from_slice(&sum);
    SecretText::new(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(fields)))
}

fn unarmour(expected: &'static str, prefix: &'static str, family: &str, text: &str) -> Result<Vec<u8>, TokenTextError> {
    let Some(body) = text.strip_prefix(prefix) else {
        let newer = text.strip_prefix(family).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        return Err(if newer { TokenTextError::NewerKind } else { TokenTextError::NotAToken { expected, prefix } });
    };
    if text.len() > TEXT_MAX {
        return Err(TokenTextError::Damaged);
    }
    let mut bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenTextError::Damaged)?;
    let fields_len = bytes.len().checked_sub(CHECKSUM_LEN).ok_or(TokenTextError::Damaged)?;
    let sum = bytes.split_off(fields_len);
    match sum == checksum(prefix, &bytes) {
        true => Ok(bytes),
        false => Err(TokenTextError::Damaged),
    }
}

fn take<'a, const N: usize>(fields: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (head, rest) = fields.split_first_chunk::<N>()?;
    *fields = rest;
    Some(head)
}

#[cfg(test)]
#[path = "token_text_tests.rs"]
mod tests;
