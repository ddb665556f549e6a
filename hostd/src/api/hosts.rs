//! `/v1/hosts` and `/v1/spm`.

use axum::Json;
use axum::extract::Path;
use hostd_api::Problem;
use hostd_api::find;
use hostd_api::host::HostPatch;
use hostd_api::host::HostView;
use hostd_api::host::SpmView;
use hostd_api::problem::Code;
use hostd_api::read::Item;
use hostd_api::read::List;
use hostd_api::read::ReadQuery;
use hostd_api::site::HostJoinAnswer;
use hostd_api::site::HostJoinRequest;
use hostd_api::vm::NoBody;
use hostd_api::write::WriteAnswer;
use statemachine::HostId;
use statemachine::command::Command;
use statemachine::command::HostChange;

use super::extract::Administrator;
use super::extract::Asked;
use super::extract::Body;
use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;
use crate::bootstrap::admit;

/// All hosts of the site.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", params(ReadQuery),
    responses((status = 200, body = List<HostView>), (status = "default", body = Problem)))]
pub async fn list(looker: Looker, Params(query): Params<ReadQuery>) -> Result<Json<List<HostView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let items = fold.state.hosts.iter().map(|(id, host)| HostView::of(&fold.state, *id, host)).collect();
    Ok(Json(List { applied_seq: fold.head.seq, items }))
}

/// One host, by name or id.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Name or id"), ReadQuery),
    responses((status = 200, body = Item<HostView>), (status = "default", body = Problem)))]
pub async fn show(
    looker: Looker,
    Path(name): Path<String>,
    Params(query): Params<ReadQuery>,
) -> Result<Json<Item<HostView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let id = find::host(&fold.state, &name).map_err(|rejection| Problem::from(&rejection))?;
    let host = fold.state.hosts.get(&id).ok_or_else(|| Problem::new(Code::NotFound, "the host is gone"))?;
    Ok(Json(Item { applied_seq: fold.head.seq, item: HostView::of(&fold.state, id, host) }))
}

/// Changes what the body names.
#[utoipa::path(patch, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    request_body = HostPatch, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn change(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<HostPatch>,
) -> Result<Json<WriteAnswer>, Failure> {
    let host = known(&administrator, &name).await?;
    let change = HostChange { spm_priority: body.value.spm_priority, failure_domain: body.value.failure_domain };
    Ok(Json(administrator.write(body.hash, Command::HostChange { host, change }).await?.into()))
}

/// No new guests on this host; it is in maintenance when the last one is gone.
#[utoipa::path(post, path = "/v1/hosts/{host}/maintenance", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn maintenance(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let host = known(&administrator, &name).await?;
    let answer = administrator.write(body.hash, Command::HostMaintenance { host }).await?;
    Ok(Json(answer.into()))
}

/// The host takes guests again.
#[utoipa::path(post, path = "/v1/hosts/{host}/activate", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn activate(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let host = known(&administrator, &name).await?;
    let answer = administrator.write(body.hash, Command::HostActivate { host }).await?;
    Ok(Json(answer.into()))
}

/// The host is out, and its certificate refused. It must be in maintenance and hold no guest.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn remove(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let host = known(&administrator, &name).await?;
    let answer = administrator.write(body.hash, Command::HostRemove { host }).await?;
    Ok(Json(answer.into()))
}

/// A machine shows a join token, its signing request and its facts, and becomes a host. Needs no other credentials.
#[utoipa::path(post, path = "/v1/hosts/join", tag = "hosts", request_body = HostJoinRequest,
    responses((status = 200, body = HostJoinAnswer), (status = "default", body = Problem)))]
pub async fn join(asked: Asked, body: Body<HostJoinRequest>) -> Result<Json<HostJoinAnswer>, Failure> {
    Ok(Json(admit::ask_leader(&asked.member, body.value).await?))
}

/// Who has the storage duty.
#[utoipa::path(get, path = "/v1/spm", tag = "hosts", params(ReadQuery),
    responses((status = 200, body = List<SpmView>), (status = "default", body = Problem)))]
pub async fn spm(looker: Looker, Params(query): Params<ReadQuery>) -> Result<Json<List<SpmView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    Ok(Json(List { applied_seq: fold.head.seq, items: SpmView::all(&fold.state) }))
}

/// The host of a command. A name that this host does not know yet may have joined a moment ago.
async fn known(administrator: &Administrator, name: &str) -> Result<HostId, Failure> {
    if let Ok(host) = find::host(&administrator.member.fold().state, name) {
        return Ok(host);
    }
    let fold = administrator.member.read_linearizable().await?;
    Ok(find::host(&fold.state, name).map_err(|rejection| Problem::from(&rejection))?)
}
