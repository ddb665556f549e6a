//! How a machine becomes a host: the first one by `init`, all others by a token.
//!
//! - [`init`]: authority, identity and first command of a new site.
//! - [`pin`], [`join`]: the joining side. The token names the authority's key; nothing else is trusted.
//! - [`admit`]: the leader's side: the token is spent, the key certified.
//! - [`authority`]: the authority's key, a file on voters only (hazard H27).
//!
//! Both ways end in an [`consensus::pki::Identity`] on disk, which is what makes a machine a host at its next start. A
//! machine that loses power half-way asks again with the same key pair and gets the same answer.

pub mod admit;
pub mod authority;
pub mod init;
pub mod join;
mod pin;

#[cfg(test)]
mod tests;

use consensus::node::NodeError;
use consensus::pki::PkiError;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hostd_api::token_text::TokenTextError;
use thiserror::Error;

use crate::facts::FactsError;
use crate::peer::chain;
use crate::serve::ServeError;
use crate::work::WorkError;

#[derive(Debug, Error)]
pub enum BootstrapError {
    #[error(
        "this host belongs to site {site} already; to use it elsewhere, remove it there with `quorate leave`, or stop hostd and wipe {data_dir}"
    )]
    AlreadyMember { site: String, data_dir: String },
    #[error(transparent)]
    Token(#[from] TokenTextError),
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The site, or a rule of the log, said no.
    #[error("{}", .0.sentence())]
    Refused(Box<Problem>),
    #[error(
        "no host of the site answers ({tried}); check that one of them runs and that this host reaches it, or ask for a new token there"
    )]
    NobodyAnswers { tried: String },
    #[error(
        "the answer of the site is not acceptable: {why}; nothing was kept, ask for a new token on a host that you trust"
    )]
    BadAnswer { why: &'static str },
    #[error("{path} is there: a recovery of this host was begun and not carried through; run `quorate recover` again", path = path.display())]
    HalfRecovered { path: std::path::PathBuf },
    #[error(transparent)]
    Recover(#[from] consensus::recover::RecoverError),
    #[error(
        "this host joined as host {host}, but heard nothing of the site within {after_s} s; it goes on trying: check that udp port {port} is open between the hosts"
    )]
    NotHeard { host: u64, after_s: u64, port: u16 },
}

impl From<Problem> for BootstrapError {
    fn from(problem: Problem) -> BootstrapError {
        BootstrapError::Refused(Box::new(problem))
    }
}

impl From<BootstrapError> for Problem {
    fn from(error: BootstrapError) -> Problem {
        let code = match error {
            BootstrapError::Refused(problem) => return *problem,
            BootstrapError::AlreadyMember { .. } => {
                return Problem { status: 409, ..Problem::new(Code::Forbidden, error.to_string()) };
            }
            BootstrapError::Token(_) => Code::BadRequest,
            BootstrapError::NobodyAnswers { .. } | BootstrapError::NotHeard { .. } => Code::HostUnreachable,
            BootstrapError::BadAnswer { .. } => Code::Forbidden,
            BootstrapError::HalfRecovered { .. }
            | BootstrapError::Recover(_)
            | BootstrapError::Facts(_)
            | BootstrapError::Pki(_)
            | BootstrapError::Node(_)
            | BootstrapError::Serve(_)
            | BootstrapError::Work(_) => Code::Internal,
        };
        Problem::new(code, chain(&error))
    }
}

impl From<FactsError> for Problem {
    fn from(error: FactsError) -> Problem {
        Problem::new(Code::Internal, chain(&error))
    }
}
