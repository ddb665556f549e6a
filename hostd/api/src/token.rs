//! `/v1/tokens`: join tokens and API tokens. The text is shown once, in the answer that created it.

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::TokenId;
use statemachine::state::Token;
use statemachine::state::TokenPurpose;
use statemachine::state::TokenStatus;
use utoipa::ToSchema;

use crate::secret::SecretText;
use crate::time;

/// `POST /v1/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCreate {
    /// `join`: one host may join with it, once. `admin`, `viewer`: bearer of the API.
    #[schema(value_type = String, example = "join")]
    pub purpose: TokenPurpose,
    #[schema(example = 10_800_000)]
    pub ttl_ms: u64,
    #[serde(default)]
    pub note: String,
}

/// The only place where the text is ever seen. An answer to a repeated key has no text: it was not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    #[schema(value_type = u64)]
    pub seq: Seq,
    #[schema(value_type = u64)]
    pub id: TokenId,
    #[schema(value_type = String)]
    pub token: SecretText,
    #[schema(value_type = String, format = DateTime)]
    pub expires: Timestamp,
}

/// A token as everybody may see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    #[schema(value_type = u64)]
    pub id: TokenId,
    #[schema(value_type = String)]
    pub purpose: TokenPurpose,
    pub status: TokenState,
    /// The host that joined with it.
    #[schema(value_type = Option<u64>)]
    pub used_by: Option<HostId>,
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub expires: Timestamp,
    pub note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenState {
    Valid,
    Expired,
    Used,
    Revoked,
}

impl TokenView {
    /// `now_ms`: the clock of the host that answers. What decides is the leader's, when the token is shown.
    pub fn of(id: TokenId, token: &Token, now_ms: u64) -> TokenView {
        let (status, used_by) = match token.status {
            TokenStatus::UsedBy(host) => (TokenState::Used, Some(host)),
            TokenStatus::Revoked => (TokenState::Revoked, None),
            TokenStatus::Valid if token.expires_ms <= now_ms => (TokenState::Expired, None),
            TokenStatus::Valid => (TokenState::Valid, None),
        };
        TokenView {
            id,
            purpose: token.purpose,
            status,
            used_by,
            created: time::of_ms(token.created_ms),
            expires: time::of_ms(token.expires_ms),
            note: token.note.clone(),
        }
    }
}
