//! The target's side: lets the host that a guest leaves reach the process that waits for it.

use axum::extract::Path as UrlPath;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hyper_util::rt::TokioIo;
use statemachine::Fold;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use tokio::io::BufReader;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::UnixStream;
use vmm_control::Call;

use super::MIGRATION_PROTOCOL;
use crate::agent::vmm_client::raw_stream;
use crate::api::Asked;
use crate::api::Failure;
use crate::auth::Caller;

const IN_BYTES: usize = 1 << 20;
const BACK_BYTES: usize = 16 << 10;

/// `GET /v1/vms/{vm}/migrations/{migration}`, upgraded: the guest's stream, from the host that the log names.
pub async fn take_in(
    asked: Asked,
    UrlPath((vm, migration)): UrlPath<(VmId, MigrationId)>,
    mut request: Request,
) -> Result<Response, Failure> {
    let Asked { member, caller } = asked;
    may_send(&member.fold(), caller, member.own(), vm, migration)?;
    let not_yet = |why: &str| Problem::new(Code::Retry, format!("vm {vm} cannot be taken in yet: {why}"));
    let socket = member.work().and_then(|work| work.agent.incoming_socket(vm, migration));
    let socket = socket.ok_or_else(|| not_yet("no process waits for it"))?;
    let upgrade = hyper::upgrade::on(&mut request);
    let guest = raw_stream(&socket, Call::RestoreAttach).await.map_err(|error| not_yet(&error.to_string()))?;
    let cancel = member.cancel().clone();
    tokio::spawn(async move {
        let joined = cancel.run_until_cancelled(join(upgrade, guest));
        if let Some(Err(error)) = joined.await {
            tracing::warn!(%vm, %migration, "the stream of a guest that comes here broke: {error}");
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, MIGRATION_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Only the host that the guest is leaving, for the migration that is under way.
fn may_send(fold: &Fold, caller: Caller, own: HostId, vm: VmId, migration: MigrationId) -> Result<(), Problem> {
    let Caller::Host(from) = caller else {
        let words = "guests come from other hosts, and from nobody else";
        return Err(Problem::new(Code::Forbidden, words).action(format!("`quorate vm migrate {vm}`")));
    };
    let moving = fold.state.moving(vm);
    match moving.filter(|moving| moving.id == migration && moving.to == own) {
        Some(moving) if moving.from == from => Ok(()),
        Some(_) => Err(Problem::new(Code::Forbidden, format!("vm {vm} does not come from host {from}"))),
        None if fold.head.seq < migration.into() => {
            Err(Problem::new(Code::Retry, format!("migration {migration} is not known here yet")))
        }
        None => Err(Problem::new(Code::NotRunning, format!("migration {migration} of vm {vm} is over"))),
    }
}

async fn join(upgrade: hyper::upgrade::OnUpgrade, mut guest: BufReader<UnixStream>) -> std::io::Result<()> {
    let upgraded = upgrade.await.map_err(std::io::Error::other)?;
    let mut source = TokioIo::new(upgraded);
    copy_bidirectional_with_sizes(&mut source, &mut guest, IN_BYTES, BACK_BYTES).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use statemachine::command::Command;
    use statemachine::state::GuestStatus;
    use statemachine::state::ReleaseClass;

    use super::*;
    use crate::test_site::Site;
    use crate::test_site::spec;

    #[test]
    fn only_the_host_that_a_guest_leaves_may_send_it_and_only_while_it_leaves() {
        let site = Site::with_hosts(3);
        let [from, to, third] = site.hosts[..] else { panic!("three hosts") };
        let vm = site.define("web", spec(ReleaseClass::Operator));
        site.start(vm, from);
        site.status(vm, from, GuestStatus::Up);
        let before = site.now();
        let migration: MigrationId = site.root(Command::VmMigrate { vm, host: Some(to) }).seq.into();
        let code = |fold: &Fold, caller, own| {
            may_send(fold, caller, own, vm, migration).map_err(|problem| problem.code().to_owned())
        };
        let now = site.now();
        assert_eq!(code(&now, Caller::Host(from), to), Ok(()));
        assert_eq!(code(&now, Caller::Host(third), to), Err(Code::Forbidden.as_str().to_owned()));
        assert_eq!(code(&now, Caller::Root, to), Err(Code::Forbidden.as_str().to_owned()));
        assert_eq!(code(&now, Caller::Host(from), third), Err(Code::NotRunning.as_str().to_owned()));
        assert_eq!(code(&before, Caller::Host(from), to), Err(Code::Retry.as_str().to_owned()), "it will hear of it");
        site.root(Command::VmCancelMigration { vm });
        assert_eq!(code(&site.now(), Caller::Host(from), to), Err(Code::NotRunning.as_str().to_owned()));
    }
}
