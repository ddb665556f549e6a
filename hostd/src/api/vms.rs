//! `/v1/vms`: definitions, desires, and why a VM is where it is. The console is in [`crate::console`].

use axum::Json;
use axum::extract::Path;
use hostd_api::Problem;
use hostd_api::find;
use hostd_api::problem::Code;
use hostd_api::read::Item;
use hostd_api::read::List;
use hostd_api::read::ReadQuery;
use hostd_api::vm::NoBody;
use hostd_api::vm::VmCreate;
use hostd_api::vm::VmMemory;
use hostd_api::vm::VmMigrate;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmStart;
use hostd_api::vm::VmStop;
use hostd_api::vm::VmView;
use hostd_api::vm::WhyView;
use hostd_api::write::WriteAnswer;
use statemachine::State;
use statemachine::VmId;
use statemachine::command::Command;
use statemachine::state::Vm;

use super::extract::Administrator;
use super::extract::Body;
use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;

/// All VMs of the site.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(ReadQuery),
    responses((status = 200, body = List<VmView>), (status = "default", body = Problem)))]
pub async fn list(looker: Looker, Params(query): Params<ReadQuery>) -> Result<Json<List<VmView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let items = fold.state.vms.iter().map(|(id, vm)| VmView::of(&fold.state, *id, vm)).collect();
    Ok(Json(List { applied_seq: fold.head.seq, items }))
}

/// Defines a VM. `Always` VMs start as soon as a host has room.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = VmCreate,
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn create(administrator: Administrator, body: Body<VmCreate>) -> Result<Json<WriteAnswer>, Failure> {
    let VmCreate { name, cluster, run_strategy, spec } = body.value;
    let command = Command::VmDefine { name, cluster, spec: spec.into_spec(), run_strategy };
    Ok(Json(administrator.write(body.hash, command).await?.into()))
}

/// One VM, by name or id.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Name or id"), ReadQuery),
    responses((status = 200, body = Item<VmView>), (status = "default", body = Problem)))]
pub async fn show(
    looker: Looker,
    Path(name): Path<String>,
    Params(query): Params<ReadQuery>,
) -> Result<Json<Item<VmView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let (id, vm) = find_vm(&fold.state, &name)?;
    Ok(Json(Item { applied_seq: fold.head.seq, item: VmView::of(&fold.state, id, vm) }))
}

/// Changes what the body names. A changed spec takes effect at the next start; disks and network cards come and leave at once.
#[utoipa::path(patch, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = VmPatch, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn change(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<VmPatch>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    let change = body.value.into_change();
    Ok(Json(administrator.write(body.hash, Command::VmChange { vm, change }).await?.into()))
}

/// Forgets a VM that does not run.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn delete(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmDelete { vm }).await?.into()))
}

/// Places and starts a VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = VmStart, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn start(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<VmStart>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    let state = &administrator.member.fold().state;
    let host = body.value.host.map(|host| find::host(state, &host)).transpose();
    let host = host.map_err(|rejection| Problem::from(&rejection))?;
    Ok(Json(administrator.write(body.hash, Command::VmStart { vm, host }).await?.into()))
}

/// Stops a VM: by its power button, or as pulling the plug.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = VmStop, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn stop(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<VmStop>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmStop { vm, mode: body.value.mode }).await?.into()))
}

/// Resets a running VM where it is.
#[utoipa::path(post, path = "/v1/vms/{vm}/reset", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn reset(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmReset { vm }).await?.into()))
}

/// Moves a running VM to another host while it runs.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = VmMigrate, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn migrate(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<VmMigrate>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    let state = &administrator.member.fold().state;
    let host = body.value.host.map(|host| find::host(state, &host)).transpose();
    let host = host.map_err(|rejection| Problem::from(&rejection))?;
    Ok(Json(administrator.write(body.hash, Command::VmMigrate { vm, host }).await?.into()))
}

/// Ends a migration that is not committed: the VM stays where it is.
#[utoipa::path(post, path = "/v1/vms/{vm}/cancel-migration", tag = "vms",
    params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn cancel_migration(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmCancelMigration { vm }).await?.into()))
}

/// Has a running VM fall asleep: what it is goes into a file of its host, where `start` wakes it up.
#[utoipa::path(post, path = "/v1/vms/{vm}/suspend", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn suspend(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmSuspend { vm }).await?.into()))
}

/// Has a running VM make do with so much of its memory: its balloon takes what it can get, and gives it back.
#[utoipa::path(post, path = "/v1/vms/{vm}/memory", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = VmMemory, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn memory(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<VmMemory>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmMemory { vm, mib: body.value.mib }).await?.into()))
}

/// Stops a running VM's processors; its memory stays, and its disks are as they are.
#[utoipa::path(post, path = "/v1/vms/{vm}/pause", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn pause(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmPause { vm, paused: true }).await?.into()))
}

/// Lets a paused VM go on. One that an error of a disk holds tries again at once.
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn resume(
    administrator: Administrator,
    Path(name): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let vm = known(&administrator, &name).await?;
    Ok(Json(administrator.write(body.hash, Command::VmPause { vm, paused: false }).await?.into()))
}

/// Why the VM is where it is: the scheduler's reasons, as they were stored with the placement.
#[utoipa::path(get, path = "/v1/vms/{vm}/why", tag = "vms", params(("vm" = String, Path, description = "Name or id"), ReadQuery),
    responses((status = 200, body = Item<WhyView>), (status = "default", body = Problem)))]
pub async fn why(
    looker: Looker,
    Path(name): Path<String>,
    Params(query): Params<ReadQuery>,
) -> Result<Json<Item<WhyView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let (id, vm) = find_vm(&fold.state, &name)?;
    Ok(Json(Item { applied_seq: fold.head.seq, item: WhyView::of(&fold.state, fold.head.seq, id, vm) }))
}

pub fn find_vm<'a>(state: &'a State, name: &str) -> Result<(VmId, &'a Vm), Failure> {
    let id = find::vm(state, name).map_err(|rejection| Problem::from(&rejection))?;
    let vm = state.vms.get(&id).ok_or_else(|| Problem::new(Code::NotFound, "the VM is gone"))?;
    Ok((id, vm))
}

/// The VM of a command. A name that this host does not know yet may have been given a moment ago elsewhere.
async fn known(administrator: &Administrator, name: &str) -> Result<VmId, Failure> {
    if let Ok(vm) = find::vm(&administrator.member.fold().state, name) {
        return Ok(vm);
    }
    let fold = administrator.member.read_linearizable().await?;
    Ok(find::vm(&fold.state, name).map_err(|rejection| Problem::from(&rejection))?)
}
