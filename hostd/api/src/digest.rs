//! `GET /v1/state/digest`: do the hosts believe the same? Equal seq must mean equal digest (invariant E2).

use serde::Deserialize;
use serde::Serialize;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use utoipa::IntoParams;
use utoipa::ToSchema;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DigestQuery {
    /// Only the host that answers; peers ask each other with it.
    #[serde(default)]
    pub local: bool,
}

/// Every host of the site, in order of their ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateDigest {
    pub hosts: Vec<HostDigest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostDigest {
    #[schema(value_type = u64)]
    pub host: HostId,
    pub name: String,
    /// `None` when it did not answer; `unreachable` says why.
    pub digest: Option<DigestAt>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DigestAt {
    #[schema(value_type = u64)]
    pub seq: Seq,
    /// Of the whole state, hexadecimal.
    pub digest: String,
    /// Of the chain of batches, hexadecimal.
    pub head_hash: String,
    pub feature_level: u32,
}

impl DigestAt {
    pub fn of(fold: &Fold) -> DigestAt {
        DigestAt {
            seq: fold.head.seq,
            digest: fold.state.digest().to_string(),
            head_hash: fold.head.hash.to_string(),
            feature_level: fold.state.site.as_ref().map_or(0, |site| site.feature_level),
        }
    }
}
