//! Who is at the other end of a connection, and what they may do.
//!
//! A connection proves something by itself ([`Peer`]): root by the Unix socket's credentials, a host by its
//! certificate. A request may show a bearer token besides. [`identify`] makes a [`Caller`] of both; it is a function
//! of the state, so a token that is revoked or has expired ends with the batch that says so. The rules about commands
//! are in `statemachine::decide`, which judges the [`Actor`] again.

use std::net::SocketAddr;

use hostd_api::ApiToken;
use hostd_api::token_text::TokenTextError;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::State;
use statemachine::TokenId;
use statemachine::command::Actor;
use statemachine::state::TokenPurpose;
use statemachine::state::TokenStatus;
use thiserror::Error;

/// What a connection proves by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The Unix socket, with the user of the process that connected.
    Local { uid: u32 },
    /// TLS on tcp; a host when it showed a certificate of this site.
    Remote { address: SocketAddr, host: Option<HostId> },
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    Root,
    Token {
        id: TokenId,
        purpose: TokenPurpose,
    },
    Host(HostId),
    /// Over TLS without token or certificate: may join with a token in the body, and ask for health.
    Anonymous,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Read everything that holds no secret.
    Look,
    /// Change things, and use consoles.
    Administer,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("the user {uid} may not use this socket; run the command as root")]
    NotRoot { uid: u32 },
    #[error("nobody is named; send an API token as `Authorization: Bearer TOKEN`, made by `quorate token create`")]
    Unnamed,
    #[error("the Authorization header holds no bearer token; send `Authorization: Bearer TOKEN`")]
    NotBearer,
    #[error("the API token is refused: {why}; ask for a new one with `quorate token create`")]
    Token { why: &'static str },
    #[error(transparent)]
    TokenText(#[from] TokenTextError),
    #[error("the token {id} may only look; ask for one that may change things")]
    Viewer { id: TokenId },
    #[error(
        "host {host} was removed from this site at seq {at}; to use the machine again, wipe its state and join it with a new token"
    )]
    Removed { host: HostId, at: Seq },
    #[error("a host may not ask this; use the host's Unix socket, or an API token")]
    HostMayNot,
}

impl Refusal {
    /// Whether showing other credentials on the same connection would help (HTTP 401 rather than 403).
    pub fn is_about_credentials(&self) -> bool {
        matches!(self, Refusal::Unnamed | Refusal::NotBearer | Refusal::Token { .. } | Refusal::TokenText(_))
    }
}

/// Makes a caller of what the connection proves and the header shows.
pub fn identify(
    peer: Peer,
    authorization: Option<&str>,
    state: &State,
    now_ms: u64,
    own_uid: u32,
) -> Result<Caller, Refusal> {
    if let Peer::Local { uid } = peer {
        // The daemon's own user is as mighty as the daemon: it can read its keys.
        return match uid == 0 || uid == own_uid {
            true => Ok(Caller::Root),
            false => Err(Refusal::NotRoot { uid }),
        };
    }
    if let Some(header) = authorization {
        let text = bearer(header).ok_or(Refusal::NotBearer)?;
        let site = state.site.as_ref().map_or_else(SiteId::default, |site| site.id);
        let token = ApiToken::of_site(text, site)?;
        return check_token(&token.secret.hash(), state, now_ms);
    }
    match peer {
        Peer::Remote { host: Some(host), .. } => match state.removed_hosts.get(&host) {
            Some(at) => Err(Refusal::Removed { host, at: *at }),
            // Newer than this host knows is fine: the certificate is of this site's authority (hazard H22).
            None => Ok(Caller::Host(host)),
        },
        Peer::Remote { host: None, .. } | Peer::Local { .. } => Ok(Caller::Anonymous),
    }
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, text) = header.split_once(' ')?;
    let text = text.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !text.is_empty()).then_some(text)
}

fn check_token(hash: &[u8; 32], state: &State, now_ms: u64) -> Result<Caller, Refusal> {
    let Some((id, token)) = state.token_by_hash(hash) else {
        return Err(Refusal::Token { why: "this site never issued it, or it was altered" });
    };
    match (token.status, token.purpose) {
        (TokenStatus::Revoked, _) => Err(Refusal::Token { why: "it was revoked" }),
        (_, TokenPurpose::Join) => Err(Refusal::Token { why: "it admits a host and nothing else" }),
        (TokenStatus::UsedBy(_), _) => Err(Refusal::Token { why: "it was used" }),
        (TokenStatus::Valid, _) if token.expires_ms <= now_ms => Err(Refusal::Token { why: "it has expired" }),
        (TokenStatus::Valid, purpose) => Ok(Caller::Token { id, purpose }),
    }
}

impl Caller {
    pub fn require(self, right: Right) -> Result<(), Refusal> {
        match (self, right) {
            (Caller::Root, _) | (Caller::Host(_), Right::Look) => Ok(()),
            (Caller::Token { purpose: TokenPurpose::Admin, .. }, _) => Ok(()),
            (Caller::Token { purpose: TokenPurpose::Viewer, .. }, Right::Look) => Ok(()),
            (Caller::Token { id, .. }, _) => Err(Refusal::Viewer { id }),
            (Caller::Host(_), Right::Administer) => Err(Refusal::HostMayNot),
            (Caller::Anonymous, _) => Err(Refusal::Unnamed),
        }
    }

    /// The actor of a command that this caller sends through host `own`.
    pub fn actor(self, own: HostId) -> Actor {
        match self {
            Caller::Root => Actor::Root(own),
            Caller::Token { id, .. } => Actor::Token(id),
            Caller::Host(host) => Actor::Host(host),
            Caller::Anonymous => Actor::Joiner,
        }
    }
}

#[cfg(test)]
mod tests {
    use hostd_api::JoinToken;
    use hostd_api::Secret;
    use statemachine::state::Fingerprint;
    use statemachine::state::Site;
    use statemachine::state::Token;

    use super::*;

    const NOW_MS: u64 = 1_000_000;
    const HERE: u32 = 4242;

    fn remote(host: Option<u64>) -> Peer {
        Peer::Remote { address: "192.0.2.1:5".parse().unwrap(), host: host.map(HostId) }
    }

    fn site(number: u128) -> SiteId {
        SiteId(uuid::Uuid::from_u128(number))
    }

    fn bearer_of(site: SiteId, secret: u8) -> String {
        let token = ApiToken { site, secret: Secret::from_bytes([secret; 32]) };
        format!("Bearer {}", token.to_text().expose())
    }

    fn state_with(tokens: &[(u8, TokenPurpose, TokenStatus, u64)]) -> State {
        let ca = Fingerprint([0; 32]);
        let site = Site {
            id: site(1),
            name: "lab".to_owned(),
            ca,
            feature_level: statemachine::decide::FEATURE_LEVEL,
            trimmed_upto: Seq::ZERO,
            voters: Site::VOTERS,
            generation: 0,
            recovered_at: Seq::ZERO,
        };
        let mut state = State { site: Some(site), ..State::default() };
        for (index, (secret, purpose, status, expires_ms)) in tokens.iter().enumerate() {
            let token = Token {
                purpose: *purpose,
                secret_hash: Secret::from_bytes([*secret; 32]).hash(),
                created_ms: 0,
                expires_ms: *expires_ms,
                note: String::new(),
                status: *status,
            };
            state.tokens.insert(TokenId(index as u64 + 1), token);
        }
        state
    }

    fn who(peer: Peer, header: Option<&str>, state: &State) -> Result<Caller, Refusal> {
        identify(peer, header, state, NOW_MS, HERE)
    }

    #[test]
    fn root_and_the_daemons_own_user_are_root_and_nobody_else() {
        let state = State::default();
        assert_eq!(who(Peer::Local { uid: 0 }, None, &state), Ok(Caller::Root));
        assert_eq!(who(Peer::Local { uid: HERE }, None, &state), Ok(Caller::Root));
        assert_eq!(who(Peer::Local { uid: 7 }, None, &state), Err(Refusal::NotRoot { uid: 7 }));
    }

    #[test]
    fn a_refused_token_says_why() {
        let state = state_with(&[
            (1, TokenPurpose::Admin, TokenStatus::Valid, NOW_MS + 1),
            (2, TokenPurpose::Admin, TokenStatus::Valid, NOW_MS),
            (3, TokenPurpose::Admin, TokenStatus::Revoked, NOW_MS + 1),
            (4, TokenPurpose::Join, TokenStatus::Valid, NOW_MS + 1),
        ]);
        let ask = |header: &str| who(remote(None), Some(header), &state);
        let admin = Caller::Token { id: TokenId(1), purpose: TokenPurpose::Admin };
        let good = bearer_of(site(1), 1);
        assert_eq!(ask(&good), Ok(admin));
        assert_eq!(ask(&good.replace("Bearer ", "bearer   ")), Ok(admin));

        let secret = Secret::from_bytes([4; 32]);
        let join = JoinToken { site: site(1), ca: Fingerprint([0; 32]), secret, addresses: vec!["a:1".to_owned()] };
        for (header, words) in [
            (bearer_of(site(1), 2), "expired"),
            (bearer_of(site(1), 3), "revoked"),
            (bearer_of(site(1), 4), "admits a host"),
            (bearer_of(site(1), 5), "never issued"),
            (bearer_of(site(2), 1), "is of site"),
            (good[..good.len() - 3].to_owned(), "damaged"),
            (format!("Bearer {}", join.to_text().expose()), "join token"),
            ("Basic cm9vdDo=".to_owned(), "Bearer TOKEN"),
            ("Bearer ".to_owned(), "Bearer TOKEN"),
        ] {
            let refusal = ask(&header).unwrap_err();
            assert!(refusal.is_about_credentials(), "{words}");
            assert!(refusal.to_string().contains(words), "{words}: {refusal}");
        }
    }

    #[test]
    fn a_removed_host_is_refused_by_name_and_an_unknown_newer_one_is_not() {
        let mut state = State::default();
        state.removed_hosts.insert(HostId(3), Seq(40));
        let refusal = who(remote(Some(3)), None, &state).unwrap_err();
        assert_eq!(refusal, Refusal::Removed { host: HostId(3), at: Seq(40) });
        assert!(refusal.to_string().contains("removed from this site at seq 40"));
        assert_eq!(who(remote(Some(99)), None, &state), Ok(Caller::Host(HostId(99))));
    }

    #[test]
    fn viewers_and_hosts_look_but_do_not_change() {
        let viewer = Caller::Token { id: TokenId(5), purpose: TokenPurpose::Viewer };
        assert_eq!(viewer.require(Right::Look), Ok(()));
        assert_eq!(viewer.require(Right::Administer), Err(Refusal::Viewer { id: TokenId(5) }));
        assert_eq!(Caller::Host(HostId(2)).require(Right::Look), Ok(()));
        assert_eq!(Caller::Host(HostId(2)).require(Right::Administer), Err(Refusal::HostMayNot));
        assert_eq!(Caller::Anonymous.require(Right::Look), Err(Refusal::Unnamed));
    }
}
