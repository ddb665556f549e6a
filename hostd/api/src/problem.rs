//! How the API says no: RFC 9457 problems, in words for the person who asked and with a code for programs.

use serde::Deserialize;
use serde::Serialize;
use statemachine::Rejection;
use statemachine::rejection::RejectionClass;
use utoipa::ToSchema;

use crate::cursor::Cursor;

/// Body of every answer that is not a success, as `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:quorate:problem:<code>`; the last part is stable, programs match on it.
    #[serde(rename = "type")]
    #[schema(example = "urn:quorate:problem:name-taken")]
    pub kind: String,
    /// A few words, the same for every problem of its kind.
    pub title: String,
    pub status: u16,
    /// What happened and why, and what to do where the sentence can say so.
    pub detail: String,
    /// The next thing to do, where `detail` does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// For problems of the stream: where a reader can go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub cursor: Option<Cursor>,
}

/// Problems that are not a [`Rejection`] of the log's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// This host belongs to no site yet.
    Uninitialised,
    /// No token, or one that is refused.
    Unauthenticated,
    /// The bearer may look only.
    Forbidden,
    /// No such resource, host or VM.
    NotFound,
    /// The body, a parameter or a header is not acceptable.
    BadRequest,
    UnknownParameter,
    BodyTooLarge,
    /// The voters have no leader now.
    NoLeader,
    /// Not decided, or nobody knows: ask again with the same idempotency key.
    Retry,
    /// The leader's queue is full.
    Busy,
    /// `min_seq` or a read barrier was not reached in time.
    NotCaughtUp,
    /// The host that should answer does not.
    HostUnreachable,
    /// The VM runs nowhere, so it has no console.
    NotRunning,
    /// The agent in the guest did not do it, and said why, or nothing.
    GuestRefused,
    CursorTrimmed,
    CursorFuture,
    CursorForeign,
    /// The reader was slower than its buffer; `cursor` goes on without a gap.
    Overflow,
    /// The daemon stops.
    ShuttingDown,
    /// A defect or a broken disk; the log of the host has more.
    Internal,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        self.table().0
    }

    fn table(self) -> (&'static str, u16, &'static str) {
        match self {
            Code::Uninitialised => ("uninitialised", 409, "This host belongs to no site"),
            Code::Unauthenticated => ("unauthenticated", 401, "Who asks is not known"),
            Code::Forbidden => ("forbidden", 403, "Not allowed"),
            Code::NotFound => ("not-found", 404, "Not found"),
            Code::BadRequest => ("bad-request", 400, "The request is not acceptable"),
            Code::UnknownParameter => ("unknown-parameter", 400, "Unknown parameter"),
            Code::BodyTooLarge => ("body-too-large", 413, "The body is too large"),
            Code::NoLeader => ("no-leader", 503, "The cluster has no leader"),
            Code::Retry => ("retry", 503, "Ask again"),
            Code::Busy => ("busy", 503, "The cluster is busy"),
            Code::NotCaughtUp => ("not-caught-up", 504, "This host is behind"),
            Code::HostUnreachable => ("host-unreachable", 502, "A host does not answer"),
            Code::NotRunning => ("not-running", 409, "The VM does not run"),
            Code::GuestRefused => ("guest-refused", 502, "The guest did not do it"),
            Code::CursorTrimmed => ("cursor-trimmed", 410, "The events are trimmed"),
            Code::CursorFuture => ("cursor-future", 409, "The cursor is ahead of this host"),
            Code::CursorForeign => ("cursor-foreign", 409, "The cursor is of another site"),
            Code::Overflow => ("overflow", 503, "The reader was too slow"),
            Code::ShuttingDown => ("shutting-down", 503, "The daemon stops"),
            Code::Internal => ("internal", 500, "The host failed"),
        }
    }
}

const URN: &str = "urn:quorate:problem:";

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Problem {
        let (name, status, title) = code.table();
        Problem {
            kind: format!("{URN}{name}"),
            title: title.to_owned(),
            status,
            detail: detail.into(),
            action: None,
            cursor: None,
        }
    }

    pub fn action(mut self, action: impl Into<String>) -> Problem {
        self.action = Some(action.into());
        self
    }

    pub fn at(mut self, cursor: Cursor) -> Problem {
        self.cursor = Some(cursor);
        self
    }

    /// The stable name, for programs.
    pub fn code(&self) -> &str {
        self.kind.strip_prefix(URN).unwrap_or(&self.kind)
    }

    pub fn is(&self, code: Code) -> bool {
        self.code() == code.as_str()
    }

    /// May the same request, with the same idempotency key, succeed a moment later?
    pub fn is_transient(&self) -> bool {
        [Code::NoLeader, Code::Retry, Code::Busy, Code::ShuttingDown, Code::NotCaughtUp]
            .iter()
            .any(|code| self.is(*code))
    }

    /// What a person reads: the detail, then what to do.
    pub fn sentence(&self) -> String {
        match &self.action {
            Some(action) => format!("{}; {action}", self.detail.trim_end_matches('.')),
            None => self.detail.clone(),
        }
    }
}

impl From<&Rejection> for Problem {
    fn from(rejection: &Rejection) -> Self {
        let (status, title) = match rejection.class() {
            RejectionClass::NotFound => (404, "Not found"),
            RejectionClass::Invalid => (422, "The request is not acceptable"),
            RejectionClass::Forbidden => (403, "Not allowed"),
            RejectionClass::Conflict => (409, "Contradicts the state of the cluster"),
            RejectionClass::Capacity => (409, "No host can run it"),
            RejectionClass::Stale => (409, "Older than what is known"),
        };
        Problem {
            kind: format!("{URN}{}", rejection.code()),
            title: title.to_owned(),
            status,
            detail: rejection.to_string(),
            action: None,
            cursor: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_keeps_its_sentence_and_its_code() {
        let problem = Problem::from(&Rejection::AlreadyInitialised);
        assert_eq!((problem.status, problem.code()), (409, "already-initialised"));
        assert_eq!(problem.sentence(), Rejection::AlreadyInitialised.to_string());
    }

    #[test]
    fn a_problem_is_the_json_of_rfc_9457() {
        let problem = Problem::new(Code::NoLeader, "no leader is known").action("try again in a second");
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "urn:quorate:problem:no-leader");
        assert_eq!(json["status"], 503);
        assert!(json.get("cursor").is_none());
        assert_eq!(problem.sentence(), "no leader is known; try again in a second");
        assert!(problem.is_transient());
    }
}
