//! From a bare machine to a host of a site: `init`, `join`, `leave`.

use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::SiteId;
use statemachine::command::HostCandidate;
use utoipa::ToSchema;

use crate::secret::SecretText;

/// `POST /v1/init`, Unix socket only: this host becomes the first of a new site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InitRequest {
    /// Name of the site.
    pub name: String,
}

/// `POST /v1/join`, Unix socket only: this host asks to belong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// Text of a join token.
    #[schema(value_type = String)]
    pub token: SecretText,
}

/// Answer to `init` and `join`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Membership {
    #[schema(value_type = String, format = Uuid)]
    pub site: SiteId,
    pub site_name: String,
    #[schema(value_type = u64)]
    pub host: HostId,
    pub host_name: String,
}

/// `POST /v1/hosts/join`, from the joining hostd to a host of the site, over TLS pinned by the token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostJoinRequest {
    /// The whole text of the join token; the site that receives it compares its own id before it looks at the secret.
    #[schema(value_type = String)]
    pub token: SecretText,
    /// PKCS#10, PEM.
    pub csr: String,
    #[schema(value_type = Object)]
    pub candidate: HostCandidate,
}

/// Given again, unchanged but for the peers, when the same key pair asks again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostJoinAnswer {
    #[schema(value_type = String, format = Uuid)]
    pub site: SiteId,
    pub site_name: String,
    #[schema(value_type = u64)]
    pub host: HostId,
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub ca_certificate: String,
    pub peers: Vec<Peer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Peer {
    #[schema(value_type = u64)]
    pub host: HostId,
    pub name: String,
    /// `ip:port`, QUIC on udp and HTTPS on tcp.
    pub address: String,
}

/// `PATCH /v1/site`: what is named changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SitePatch {
    /// 3 or 5: how many hosts vote, where there are as many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub voters: Option<u8>,
}

/// `POST /v1/leave`, Unix socket only: this host removes itself. It must be in maintenance, and without guests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaveRequest {}
