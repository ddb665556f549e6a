//! The envelope of every read: the seq that it saw, and how fresh the caller wants it.

use serde::Deserialize;
use serde::Serialize;
use statemachine::Seq;
use utoipa::IntoParams;
use utoipa::ToSchema;

/// One object, read at `applied_seq`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Item<T> {
    #[schema(value_type = u64)]
    pub applied_seq: Seq,
    pub item: T,
}

/// A list, read at one `applied_seq`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct List<T> {
    #[schema(value_type = u64)]
    pub applied_seq: Seq,
    pub items: Vec<T>,
}

/// How fresh a read must be; without it, the answer is what this host has applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ReadQuery {
    /// Wait until this seq is applied here: read your own writes.
    #[param(value_type = Option<u64>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_seq: Option<Seq>,
    /// `linearizable`: at least as new as every write that was answered before the read began (ReadIndex).
    #[param(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    Local,
    Linearizable,
}
