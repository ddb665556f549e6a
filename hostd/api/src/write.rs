//! The answer to every write: it is in the log, and here is where.

use serde::Deserialize;
use serde::Serialize;
use statemachine::Seq;
use statemachine::fold::Answer;
use statemachine::state::Created;
use utoipa::ToSchema;

/// Given only when the batch at `seq` is applied on a majority's log and on the host that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WriteAnswer {
    /// Pass it as `min_seq` to read your own write from any host.
    #[schema(value_type = u64)]
    pub seq: Seq,
    /// Id of what the write created, if it created something.
    pub id: Option<String>,
}

impl From<Answer> for WriteAnswer {
    fn from(answer: Answer) -> Self {
        WriteAnswer { seq: answer.seq, id: answer.created.map(created_id) }
    }
}

fn created_id(created: Created) -> String {
    match created {
        Created::Host(id) => id.to_string(),
        Created::Vm(id) => id.to_string(),
        Created::Token(id) => id.to_string(),
        Created::Cluster(id) => id.to_string(),
    }
}
