//! The site and its tokens.

use super::Context;
use super::Decided;
use super::form;
use super::host;
use crate::command::HostCandidate;
use crate::event::ClusterCreated;
use crate::event::DataCenterCreated;
use crate::event::EventsTrimmed;
use crate::event::FeatureLevelActivated;
use crate::event::HostJoined;
use crate::event::SiteInitialised;
use crate::event::TokenCreated;
use crate::event::TokenRevoked;
use crate::event::VoterCountChanged;
use crate::ids::ClusterId;
use crate::ids::DataCenterId;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::SiteId;
use crate::ids::TokenId;
use crate::rejection::Noun;
use crate::rejection::Rejection;
use crate::state::Created;
use crate::state::Fingerprint;
use crate::state::Liveness;
use crate::state::SchedulingPolicy;
use crate::state::Site;
use crate::state::TokenPurpose;
use crate::state::TokenStatus;

/// The feature level that a new site starts at: everything this build writes.
///
/// - 2: voter count, failure domains, recovery.
pub const FEATURE_LEVEL: u32 = 3;
/// Tokens that are remembered at once; old ones that cannot be used any more make room.
const TOKENS_MAX: usize = 1000;
const TTL_MAX_MS: u64 = 10 * 365 * 24 * 60 * 60 * 1000;

pub(super) fn init(
    context: &Context<'_>,
    site: SiteId,
    name: &str,
    ca: Fingerprint,
    first_host: &HostCandidate,
) -> Result<Decided, Rejection> {
    form::name("site name", name)?;
    host::check_candidate(first_host)?;
    let data_center = DataCenterId(context.seq.0);
    let cluster = ClusterId(context.seq.0);
    let host = HostId(context.seq.0);
    let events = vec![
        SiteInitialised { site, name: name.to_owned(), ca, feature_level: FEATURE_LEVEL }.into(),
        DataCenterCreated { data_center, name: "Default".to_owned() }.into(),
        ClusterCreated { cluster, data_center, name: "Default".to_owned(), scheduling: SchedulingPolicy::default() }
            .into(),
        HostJoined { host, cluster, candidate: first_host.clone() }.into(),
    ];
    Ok(Decided::many(events).creating(Created::Host(host)))
}

/// One level may be skipped: each allows what those below it do.
pub(super) fn feature_level_activate(context: &Context<'_>, level: u32) -> Result<Decided, Rejection> {
    let present = context.state.site.as_ref().map_or(0, |site| site.feature_level);
    if level <= present {
        return Ok(Decided::nothing());
    }
    if level > FEATURE_LEVEL {
        return Err(form::invalid("feature level", format!("the leader knows levels up to {FEATURE_LEVEL}")));
    }
    let lacks = |host: &&crate::state::Host| host.liveness != Liveness::Unreachable && host.facts.feature_level < level;
    match context.state.hosts.values().find(lacks) {
        Some(host) => {
            let why = format!("it supports feature level {}; install a newer quorate on it", host.facts.feature_level);
            Err(Rejection::HostState { name: host.name.clone(), why })
        }
        None => Ok(Decided::one(FeatureLevelActivated { level })),
    }
}

pub(super) fn voter_count(context: &Context<'_>, voters: u8) -> Result<Decided, Rejection> {
    if ![Site::VOTERS, Site::VOTERS_MAX].contains(&voters) {
        return Err(form::invalid("voters", "3 or 5 hosts vote"));
    }
    match context.state.site.as_ref().is_some_and(|site| site.voters != voters) {
        true => Ok(Decided::one(VoterCountChanged { voters })),
        false => Ok(Decided::nothing()),
    }
}

/// Trims rise, and end before the batch that decides them: a cursor at the head stays good.
pub(super) fn events_trim(context: &Context<'_>, upto: Seq) -> Result<Decided, Rejection> {
    if upto.next() >= context.seq {
        let why = format!("events up to {upto} cannot be trimmed by batch {}", context.seq);
        return Err(form::invalid("upto", &why));
    }
    match context.state.site.as_ref().is_some_and(|site| upto > site.trimmed_upto) {
        true => Ok(Decided::one(EventsTrimmed { upto })),
        false => Ok(Decided::nothing()),
    }
}

pub(super) fn token_create(
    context: &Context<'_>,
    purpose: TokenPurpose,
    secret_hash: &[u8; 32],
    ttl_ms: u64,
    note: &str,
) -> Result<Decided, Rejection> {
    form::text("note", note, form::NOTE_MAX)?;
    if ttl_ms == 0 || ttl_ms > TTL_MAX_MS {
        return Err(form::invalid("ttl", "a token lives from one millisecond to ten years"));
    }
    if context.state.token_by_hash(secret_hash).is_some() {
        return Err(form::invalid("secret", "this secret is in use; ask again"));
    }
    let live =
        |token: &&crate::state::Token| token.status == TokenStatus::Valid && token.expires_ms > context.stamp.at_ms;
    if context.state.tokens.values().filter(live).count() >= TOKENS_MAX {
        let why = format!("{TOKENS_MAX} are valid already; revoke some with `quorate token revoke`");
        return Err(form::invalid("token", why));
    }
    let token = TokenId(context.seq.0);
    let created = TokenCreated {
        token,
        purpose,
        secret_hash: *secret_hash,
        expires_ms: context.stamp.at_ms + ttl_ms,
        note: note.to_owned(),
    };
    Ok(Decided::one(created).creating(Created::Token(token)))
}

pub(super) fn token_revoke(context: &Context<'_>, token: TokenId) -> Result<Decided, Rejection> {
    let Some(known) = context.state.tokens.get(&token) else {
        return Err(Rejection::NotFound { noun: Noun::Token, name: token.to_string() });
    };
    match known.status {
        TokenStatus::Valid => Ok(Decided::one(TokenRevoked { token })),
        TokenStatus::UsedBy(_) | TokenStatus::Revoked => Ok(Decided::nothing()),
    }
}
