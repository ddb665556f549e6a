//! `GET /v1/state/digest`: do the hosts believe the same (invariant E2)?

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use futures::future;
use hostd_api::Problem;
use hostd_api::digest::DigestAt;
use hostd_api::digest::DigestQuery;
use hostd_api::digest::HostDigest;
use hostd_api::digest::StateDigest;
use statemachine::HostId;

use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;
use crate::member::Member;

/// A host that does not answer within this is shown as unreachable.
const PATIENCE: Duration = Duration::from_secs(3);

/// Digest and seq of every host that answers.
#[utoipa::path(get, path = "/v1/state/digest", tag = "state", params(DigestQuery),
    responses((status = 200, body = StateDigest), (status = "default", body = Problem)))]
pub async fn show(looker: Looker, Params(query): Params<DigestQuery>) -> Result<Json<StateDigest>, Failure> {
    let member = &looker.member;
    let fold = member.fold();
    let asked = fold.state.hosts.iter().filter(|(id, _)| !query.local || **id == member.own());
    let hosts = future::join_all(asked.map(|(id, host)| of_host(member.clone(), *id, host.name.clone()))).await;
    Ok(Json(StateDigest { hosts }))
}

async fn of_host(member: Arc<Member>, host: HostId, name: String) -> HostDigest {
    if host == member.own() {
        return HostDigest { host, name, digest: Some(DigestAt::of(&member.fold())), unreachable: None };
    }
    let fold = member.fold();
    let asked = member.peers().get_json::<StateDigest>(&fold, host, "/v1/state/digest?local=true");
    let answered = tokio::time::timeout(PATIENCE, asked).await;
    let (digest, unreachable) = match answered {
        Ok(Ok(digests)) => (digests.hosts.into_iter().find(|it| it.host == host).and_then(|it| it.digest), None),
        Ok(Err(problem)) => (None, Some(problem.sentence())),
        Err(_) => (None, Some(format!("it did not answer within {} s", PATIENCE.as_secs()))),
    };
    HostDigest { host, name, digest, unreachable }
}
