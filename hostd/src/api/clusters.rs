//! `/v1/clusters`.

use axum::Json;
use axum::extract::Path;
use hostd_api::Problem;
use hostd_api::cluster::ClusterPatch;
use hostd_api::cluster::ClusterView;
use hostd_api::find;
use hostd_api::problem::Code;
use hostd_api::read::List;
use hostd_api::read::ReadQuery;
use hostd_api::write::WriteAnswer;
use statemachine::command::Command;
use statemachine::state::MigrationPolicy;

use super::extract::Administrator;
use super::extract::Body;
use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;

/// All clusters.
#[utoipa::path(get, path = "/v1/clusters", tag = "site", params(ReadQuery),
    responses((status = 200, body = List<ClusterView>), (status = "default", body = Problem)))]
pub async fn list(looker: Looker, Params(query): Params<ReadQuery>) -> Result<Json<List<ClusterView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let items = fold.state.clusters.iter().map(|(id, cluster)| ClusterView::of(&fold.state, *id, cluster)).collect();
    Ok(Json(List { applied_seq: fold.head.seq, items }))
}

/// Changes what the body names.
#[utoipa::path(patch, path = "/v1/clusters/{cluster}", tag = "site",
    params(("cluster" = String, Path, description = "Name or id")),
    request_body = ClusterPatch, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn change(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<ClusterPatch>,
) -> Result<Json<WriteAnswer>, Failure> {
    let Some(migration) = body.value.migration else {
        return Err(Problem::new(Code::BadRequest, "the body names nothing to change").into());
    };
    let fold = administrator.member.fold();
    let cluster = find::cluster(&fold.state, &name).map_err(|rejection| Problem::from(&rejection))?;
    let present = fold.state.migration_policies.get(&cluster).copied().unwrap_or_default();
    let policy = MigrationPolicy::from(migration).or(present);
    Ok(Json(administrator.write(body.hash, Command::ClusterMigrationPolicy { cluster, policy }).await?.into()))
}
