//! `/v1/status`, and how a machine becomes a host and stops being one: `init`, `join`, `leave`.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::extract::State;
use axum::http::request::Parts;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hostd_api::site::InitRequest;
use hostd_api::site::JoinRequest;
use hostd_api::site::LeaveRequest;
use hostd_api::site::Membership;
use hostd_api::site::SitePatch;
use hostd_api::status::Counts;
use hostd_api::status::MemberStatus;
use hostd_api::status::Status;
use hostd_api::write::WriteAnswer;

use super::Api;
use super::extract::Administrator;
use super::extract::Body;
use super::extract::LocalRoot;
use super::extract::Looker;
use super::failure::Failure;
use crate::facts;
use crate::member::Member;
use statemachine::command::Command;

/// Whoever may look at a member, and root where there is no site yet.
pub struct StatusReader(Option<Looker>);

impl FromRequestParts<Api> for StatusReader {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<StatusReader, Failure> {
        match api.member() {
            Ok(_) => Ok(StatusReader(Some(Looker::from_request_parts(parts, api).await?))),
            Err(_) => LocalRoot::from_request_parts(parts, api).await.map(|_| StatusReader(None)),
        }
    }
}

/// One look at this host, and at the cluster as it sees it.
#[utoipa::path(get, path = "/v1/status", tag = "site",
    responses((status = 200, body = Status), (status = "default", body = Problem)))]
pub async fn status(State(api): State<Api>, reader: StatusReader) -> Result<Json<Status>, Failure> {
    let config = api.daemon().config();
    let boot = facts::boot_id()?;
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host_name: config.name.clone(),
        address: config.address.to_string(),
        boot,
        member: reader.0.map(|looker| member_status(&looker.member)),
    }))
}

fn member_status(member: &Member) -> MemberStatus {
    let fold = member.fold();
    let raft = member.raft();
    let site = fold.state.site.as_ref();
    MemberStatus {
        site: member.site(),
        site_name: site.map(|site| site.name.clone()).unwrap_or_default(),
        host: member.own(),
        role: raft.role,
        leader: raft.leader,
        leader_name: raft.leader.and_then(|leader| fold.state.hosts.get(&leader)).map(|host| host.name.clone()),
        voters: raft.voters.clone(),
        learners: raft.learners.clone(),
        applied_seq: fold.head.seq,
        feature_level: site.map_or(0, |site| site.feature_level),
        counts: Counts::of(&fold.state),
        alarms: member.alarms(),
    }
}

/// Changes what the body names.
#[utoipa::path(patch, path = "/v1/site", tag = "site", request_body = SitePatch,
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn change(administrator: Administrator, body: Body<SitePatch>) -> Result<Json<WriteAnswer>, Failure> {
    let Some(voters) = body.value.voters else {
        return Err(Problem::new(Code::BadRequest, "the body names nothing to change").into());
    };
    Ok(Json(administrator.write(body.hash, Command::VoterCount { voters }).await?.into()))
}

/// This host becomes the first of a new site.
#[utoipa::path(post, path = "/v1/init", tag = "site", request_body = InitRequest,
    responses((status = 200, body = Membership), (status = "default", body = Problem)))]
pub async fn init(_: LocalRoot, State(api): State<Api>, body: Body<InitRequest>) -> Result<Json<Membership>, Failure> {
    let member = api.daemon().init(&body.value.name).await?;
    Ok(Json(membership(&member)))
}

/// This host asks to belong, with a token that was made on a host of the site.
#[utoipa::path(post, path = "/v1/join", tag = "site", request_body = JoinRequest,
    responses((status = 200, body = Membership), (status = "default", body = Problem)))]
pub async fn join(_: LocalRoot, State(api): State<Api>, body: Body<JoinRequest>) -> Result<Json<Membership>, Failure> {
    let member = api.daemon().join(&body.value.token).await?;
    Ok(Json(membership(&member)))
}

/// This host removes itself and sets its state aside. It must be in maintenance and hold no guest.
#[utoipa::path(post, path = "/v1/leave", tag = "site", request_body = LeaveRequest,
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn leave(
    _: LocalRoot,
    State(api): State<Api>,
    _body: Body<LeaveRequest>,
) -> Result<Json<WriteAnswer>, Failure> {
    Ok(Json(api.daemon().leave().await?.into()))
}

fn membership(member: &Member) -> Membership {
    let fold = member.fold();
    let host = fold.state.hosts.get(&member.own());
    Membership {
        site: member.site(),
        site_name: fold.state.site.as_ref().map(|site| site.name.clone()).unwrap_or_default(),
        host: member.own(),
        host_name: host.map(|host| host.name.clone()).unwrap_or_default(),
    }
}
