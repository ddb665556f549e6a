//! `/v1/vms/{vm}/agent`: what is asked of the agent inside a guest. Any host is asked, and the one that runs the guest answers.

use std::time::Duration;

use axum::Json;
use axum::extract::Path;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hostd_api::Problem;
use hostd_api::find;
use hostd_api::guest::AgentHealth;
use hostd_api::guest::AgentView;
use hostd_api::guest::DEFAULT_EXEC_WAIT_S;
use hostd_api::guest::Exec;
use hostd_api::guest::ExecAnswer;
use hostd_api::guest::FilesystemView;
use hostd_api::guest::Freeze;
use hostd_api::guest::Frozen;
use hostd_api::guest::MAX_EXEC_WAIT_S;
use hostd_api::guest::Obeyed;
use hostd_api::problem::Code;
use hostd_api::vm::NoBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::extract::Asked;
use super::extract::Body;
use super::failure::Failure;
use crate::auth::Caller;
use crate::auth::Right;
use crate::guest_agent::AgentError;
use crate::guest_agent::agents::Agent;
use crate::guest_agent::commands::ShutdownMode;
use crate::guest_agent::exec::ExecRequest;
use crate::guest_agent::exec::ExecStatus;
use crate::guest_agent::freeze::MAX_FROZEN;
use crate::guest_agent::task::Health;

/// A program's end is asked for so often.
const EXEC_LOOK_EVERY: Duration = Duration::from_millis(200);
const DEFAULT_FROZEN_S: u32 = 10;
/// An answer of another host comes this long after the guest's at the latest.
const HOP: Duration = Duration::from_secs(10);
/// What a guest may take over everything but a program: freezing is the longest.
const OBEYS_WITHIN: Duration = Duration::from_secs(70);

/// Health of the agent, and how full the guest's file systems are.
#[utoipa::path(get, path = "/v1/vms/{vm}/agent", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    responses((status = 200, body = AgentView), (status = "default", body = Problem)))]
pub async fn show(asked: Asked, Path(name): Path<String>) -> Result<Json<AgentView>, Failure> {
    asked.caller.require(Right::Look)?;
    match place(&asked, &name)? {
        Place::Here(agent) => Ok(Json(view(&agent))),
        Place::There { host, path } => {
            Ok(Json(asked.member.peers().get_json(&asked.member.fold(), host, &path).await?))
        }
    }
}

/// Runs a program in the guest and waits for its end.
#[utoipa::path(post, path = "/v1/vms/{vm}/agent/exec", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = Exec, responses((status = 200, body = ExecAnswer), (status = "default", body = Problem)))]
pub async fn exec(asked: Asked, Path(name): Path<String>, body: Body<Exec>) -> Result<Json<ExecAnswer>, Failure> {
    let request = body.value;
    let wait_s = request.wait_s.unwrap_or(DEFAULT_EXEC_WAIT_S).min(MAX_EXEC_WAIT_S);
    let wait = Duration::from_secs(wait_s.into());
    tracing::info!(vm = name, caller = ?asked.caller, program = request.path, "a program is run in a guest");
    at_guest(&asked, &name, "exec", &request, wait, async |agent| run(&agent, &request, wait).await).await
}

/// Makes the guest's file systems consistent on its disks and stops them, until `thaw` or the limit.
#[utoipa::path(post, path = "/v1/vms/{vm}/agent/freeze", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = Freeze, responses((status = 200, body = Frozen), (status = "default", body = Problem)))]
pub async fn freeze(asked: Asked, Path(name): Path<String>, body: Body<Freeze>) -> Result<Json<Frozen>, Failure> {
    let seconds = body.value.seconds.unwrap_or(DEFAULT_FROZEN_S);
    if seconds == 0 || u64::from(seconds) > MAX_FROZEN.as_secs() {
        let words = format!("a guest is frozen for 1 to {} seconds, not {seconds}", MAX_FROZEN.as_secs());
        return Err(Failure::new(Code::BadRequest, words));
    }
    let limit = Duration::from_secs(seconds.into());
    at_guest(&asked, &name, "freeze", &body.value, OBEYS_WITHIN, async |agent| {
        Ok(Frozen { filesystems: agent.freeze(limit).await? })
    })
    .await
}

/// Lets frozen file systems go on. An error says that they did so before, or cannot yet.
#[utoipa::path(post, path = "/v1/vms/{vm}/agent/thaw", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = Obeyed), (status = "default", body = Problem)))]
pub async fn thaw(asked: Asked, Path(name): Path<String>, body: Body<NoBody>) -> Result<Json<Obeyed>, Failure> {
    at_guest(&asked, &name, "thaw", &body.value, OBEYS_WITHIN, async |agent| {
        agent.thaw().await?;
        Ok(Obeyed {})
    })
    .await
}

/// Sets the guest's clock to its host's.
#[utoipa::path(post, path = "/v1/vms/{vm}/agent/set-time", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = Obeyed), (status = "default", body = Problem)))]
pub async fn set_time(asked: Asked, Path(name): Path<String>, body: Body<NoBody>) -> Result<Json<Obeyed>, Failure> {
    at_guest(&asked, &name, "set-time", &body.value, OBEYS_WITHIN, async |agent| {
        agent.orders.set_time().await?;
        Ok(Obeyed {})
    })
    .await
}

/// Asks the guest's system to restart itself: in order, unlike `reset`.
#[utoipa::path(post, path = "/v1/vms/{vm}/agent/reboot", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    request_body = NoBody, responses((status = 200, body = Obeyed), (status = "default", body = Problem)))]
pub async fn reboot(asked: Asked, Path(name): Path<String>, body: Body<NoBody>) -> Result<Json<Obeyed>, Failure> {
    at_guest(&asked, &name, "reboot", &body.value, OBEYS_WITHIN, async |agent| {
        agent.orders.shutdown(ShutdownMode::Reboot).await?;
        Ok(Obeyed {})
    })
    .await
}

/// Where a guest's agent is asked.
enum Place {
    Here(Agent),
    There { host: statemachine::HostId, path: String },
}

/// An error of the agent, or of the way there.
impl From<AgentError> for Problem {
    fn from(error: AgentError) -> Problem {
        let code = match &error {
            AgentError::BadArgument { .. } | AgentError::NotBase64 => Code::BadRequest,
            AgentError::Absent | AgentError::Closed | AgentError::Io(_) => Code::NotRunning,
            _ => Code::GuestRefused,
        };
        Problem::new(code, error.to_string())
    }
}

/// Does `here` on the host that runs the guest, in the name of an administrator.
async fn at_guest<B: Serialize, T: Serialize + DeserializeOwned>(
    asked: &Asked,
    name: &str,
    verb: &str,
    body: &B,
    within: Duration,
    here: impl AsyncFnOnce(Agent) -> Result<T, AgentError>,
) -> Result<Json<T>, Failure> {
    // A host asks for somebody whom it has let in itself.
    let is_host = matches!(asked.caller, Caller::Host(_));
    asked.caller.require(if is_host { Right::Look } else { Right::Administer })?;
    match place(asked, name)? {
        Place::Here(agent) => Ok(Json(here(agent).await.map_err(Problem::from)?)),
        Place::There { host, path } => {
            let (fold, path) = (asked.member.fold(), format!("{path}/{verb}"));
            Ok(Json(asked.member.peers().post_json(&fold, host, &path, body, within + HOP).await?))
        }
    }
}

fn place(asked: &Asked, name: &str) -> Result<Place, Failure> {
    let fold = asked.member.fold();
    let vm = find::vm(&fold.state, name).map_err(|rejection| Problem::from(&rejection))?;
    let permit = fold.state.vms.get(&vm).and_then(|vm| vm.permit).ok_or_else(|| {
        Problem::new(Code::NotRunning, format!("vm {name} does not run")).action(format!("`quorate vm start {name}`"))
    })?;
    if permit.host == asked.member.own() {
        let agent = asked.member.work().and_then(|work| work.agent.guest_agent(vm));
        let gone = || Problem::new(Code::NotRunning, format!("the process of vm {name} is not there"));
        return Ok(Place::Here(
            agent.ok_or_else(|| gone().action("it may be starting or ending; ask again in a second"))?,
        ));
    }
    if matches!(asked.caller, Caller::Host(_)) {
        // Asked by a host that saw the VM here: it moved, and a second hop might circle.
        let words = format!("vm {name} does not run on this host any more");
        return Err(Problem::new(Code::NotRunning, words).action("ask again in a second").into());
    }
    Ok(Place::There { host: permit.host, path: format!("/v1/vms/{vm}/agent") })
}

fn view(agent: &Agent) -> AgentView {
    let seen = agent.view.borrow().clone();
    let filesystem = |filesystem: &crate::guest_agent::answers::FilesystemUse| FilesystemView {
        mountpoint: filesystem.mountpoint.clone(),
        used_bytes: Some(filesystem.used_bytes),
        total_bytes: Some(filesystem.total_bytes),
    };
    AgentView {
        health: match seen.health {
            Health::Absent => AgentHealth::Absent,
            Health::Up => AgentHealth::Up,
            Health::Silent => AgentHealth::Silent,
        },
        version: seen.version,
        frozen: seen.frozen,
        filesystems: seen.filesystems.iter().map(filesystem).collect(),
    }
}

async fn run(agent: &Agent, asked: &Exec, wait: Duration) -> Result<ExecAnswer, AgentError> {
    let input = STANDARD.decode(&asked.input).map_err(|_| AgentError::NotBase64)?;
    let request = ExecRequest {
        path: asked.path.clone(),
        arguments: asked.arguments.clone(),
        environment: asked.environment.clone(),
        input,
    };
    let until = Instant::now() + wait;
    let program = agent.orders.exec(request).await?;
    loop {
        match agent.orders.exec_status(program).await? {
            ExecStatus::Exited(outcome) => {
                return Ok(ExecAnswer {
                    ended: true,
                    code: outcome.code,
                    signal: outcome.signal,
                    cut: outcome.output.cut || outcome.errors.cut,
                    output: STANDARD.encode(&outcome.output.bytes),
                    errors: STANDARD.encode(&outcome.errors.bytes),
                });
            }
            ExecStatus::Running if Instant::now() >= until => {
                let none = String::new;
                let (output, errors) = (none(), none());
                return Ok(ExecAnswer { ended: false, code: None, signal: None, output, errors, cut: false });
            }
            ExecStatus::Running => tokio::time::sleep(EXEC_LOOK_EVERY).await,
        }
    }
}
