//! How a command ended, as an exit code that means something.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | refused or failed; stderr says why and what to do |
//! | 2 | the command line is not understood |
//! | 3 | the host, VM or token that was named does not exist |
//! | 4 | no hostd could be reached |
//! | 5 | `--wait` gave up; what was asked for goes on |

use std::io;
use std::process::ExitCode;

use thiserror::Error;
use tools::client::ClientError;

#[derive(Debug, Error)]
pub enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A sentence about something at this end: a file, a terminal, a value.
    #[error("{0}")]
    Local(String),
    /// Asked for and accepted, and then it came differently.
    #[error("{0}")]
    CameDifferently(String),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    WaitedTooLong(String),
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

impl Failure {
    pub fn code(&self) -> u8 {
        match self {
            Failure::Client(error) if error.is_not_found() => 3,
            Failure::Client(ClientError::Unreachable { .. } | ClientError::Broken { .. }) => 4,
            Failure::Client(ClientError::NotAServer { .. } | ClientError::NoServer) => 2,
            Failure::Client(_) | Failure::Local(_) | Failure::CameDifferently(_) | Failure::Output(_) => 1,
            Failure::Usage(_) => 2,
            Failure::WaitedTooLong(_) => 5,
        }
    }

    /// Says why on stderr. A reader that went away (`quorate vm list | head -1`) is not a failure.
    pub fn report(&self) -> ExitCode {
        if matches!(self, Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("quorate: {self}");
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use hostd_api::Problem;
    use hostd_api::problem::Code;
    use statemachine::Rejection;
    use statemachine::rejection::Noun;

    use super::*;

    fn refused(problem: Problem) -> Failure {
        Failure::Client(ClientError::Problem(Box::new(problem)))
    }

    #[test]
    fn exit_codes_tell_refused_not_found_unreachable_and_late_apart() {
        let no_vm = Rejection::NotFound { noun: Noun::Vm, name: "web1".into() };
        assert_eq!(refused(Problem::from(&no_vm)).code(), 3);
        assert_eq!(refused(Problem::from(&Rejection::AlreadyInitialised)).code(), 1);
        assert_eq!(refused(Problem::new(Code::NotFound, "no such token")).code(), 3);
        let unreachable = ClientError::Unreachable { whom: "x".into(), why: "refused".into(), next: "start it" };
        assert_eq!(Failure::Client(unreachable).code(), 4);
        assert_eq!(Failure::WaitedTooLong(String::new()).code(), 5);
        assert_eq!(Failure::Usage(String::new()).code(), 2);
    }

    #[test]
    fn a_refusal_is_the_sentence_of_the_cluster_and_nothing_else() {
        let failure = refused(Problem::new(Code::NoLeader, "no leader is known").action("try again in a second"));
        assert_eq!(failure.to_string(), "no leader is known; try again in a second");
    }
}
