//! Why the API could not be used, in words for the person at the terminal.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use hostd_api::Problem;
use hostd_api::problem::Code;
use hostd_api::token_text::TokenTextError;
use thiserror::Error;

use super::connect::Endpoint;

#[derive(Debug, Error)]
pub enum ClientError {
    /// The cluster answered: no.
    #[error("{}", .0.sentence())]
    Problem(Box<Problem>),
    #[error("cannot reach hostd at {whom}: {why}; {next}")]
    Unreachable { whom: String, why: String, next: &'static str },
    /// It was reached, and then the connection ended or fell silent. Nobody knows whether the request was done.
    #[error("{whom} was reached and gave no whole answer: {why}; look at the state before you ask again")]
    Broken { whom: String, why: String },
    #[error("{whom} answered with HTTP status {status} and without a reason; is it hostd?")]
    NotOurs { whom: String, status: u16 },
    #[error("the answer of {whom} is not understood; is one side of another version? ({source})")]
    NotUnderstood { whom: String, source: serde_json::Error },
    #[error("the answer of {whom} is larger than {limit} bytes; ask for less")]
    TooLarge { whom: String, limit: usize },
    #[error("the events that this reader stands before are not understood: {why}")]
    Stream { why: String },
    #[error("the stream of {whom} broke off before the state was complete; begin again with `--from state`")]
    StateBrokenOff { whom: String },
    #[error("cannot read {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} holds no certificate in PEM form; use the site's CA, /var/lib/quorate/identity/ca.pem on any host")]
    NotACertificate { path: PathBuf },
    #[error("the token in {path} is refused: {source}")]
    Token { path: PathBuf, source: TokenTextError },
    #[error("{url:?} is not a server; write https://ADDRESS:7443")]
    NotAServer { url: String },
    #[error("no server is named; use --server https://ADDRESS:7443")]
    NoServer,
    #[error("the connection cannot be prepared: {0}")]
    Setup(reqwest::Error),
}

impl ClientError {
    pub(super) fn of_transport(endpoint: &Endpoint, error: reqwest::Error) -> ClientError {
        let whom = endpoint.to_string();
        if !error.is_connect() {
            let why = match error.is_timeout() {
                true => "no answer in time".to_owned(),
                false => innermost(&error),
            };
            return ClientError::Broken { whom, why };
        }
        let why = innermost(&error);
        let next = match (endpoint.is_socket(), io_kind(&error)) {
            (true, Some(io::ErrorKind::PermissionDenied)) => {
                "run it as root, or use --server with --ca and --token-file"
            }
            (true, _) => "start it with `systemctl start hostd`, or name another host with --server",
            (false, _) if why.contains("not valid for name") => {
                "name the host by the address in its hostd.toml: its certificate is for that"
            }
            (false, _) if why.contains("certificate") => {
                "its certificate is not of the site whose CA --ca names; check both"
            }
            (false, _) => "check the address and the network, or name another host: any host of the site answers",
        };
        ClientError::Unreachable { whom, why, next }
    }

    /// No connection came about, so nothing was asked.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, ClientError::Unreachable { .. })
    }

    /// The same request may succeed a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            ClientError::Problem(problem) => problem.is_transient(),
            ClientError::Broken { .. } => true,
            _ => false,
        }
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, ClientError::Problem(problem) if problem.is(Code::NotFound))
    }
}

fn innermost(error: &reqwest::Error) -> String {
    let mut inner: &dyn Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

fn io_kind(error: &reqwest::Error) -> Option<io::ErrorKind> {
    let mut next: Option<&dyn Error> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}
