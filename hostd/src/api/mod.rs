//! REST and events under `/v1`, `/metrics`, `/healthz`: one router for the Unix socket and for TLS.
//!
//! Each resource has a file; [`extract`] says who may call it, [`failure`] how it says no, [`openapi`] describes all
//! of it. Writes go to the leader through [`crate::member::Member::propose`] and answer with their seq; reads are
//! of the local fold unless the caller asks for more. Start at [`router`].

mod clusters;
mod digest;
pub mod events;
mod extract;
mod failure;
mod guests;
mod hosts;
mod observe;
pub mod openapi;
mod site;
mod tokens;
mod vms;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::MatchedPath;
use axum::extract::Request;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::delete;
use axum::routing::get;
use axum::routing::patch;
use axum::routing::post;
use hostd_api::APPLIED_SEQ_HEADER;
use hostd_api::MAX_BODY_BYTES;
use hostd_api::Problem;
use hostd_api::problem::Code;

use crate::console;
use crate::daemon::Daemon;
use crate::member::Member;
pub use extract::Asked;
pub use extract::Params;
pub use failure::Failure;

/// What handlers share.
#[derive(Clone)]
pub struct Api {
    daemon: Arc<Daemon>,
}

impl Api {
    pub fn new(daemon: Arc<Daemon>) -> Api {
        Api { daemon }
    }

    pub fn daemon(&self) -> &Arc<Daemon> {
        &self.daemon
    }

    /// The host as a member of a site, or words for somebody who asks too early.
    pub fn member(&self) -> Result<Arc<Member>, Failure> {
        self.daemon.member().ok_or_else(|| {
            let problem = Problem::new(Code::Uninitialised, "this host belongs to no site");
            problem.action("run `quorate init` on the first host, `quorate join TOKEN` on the others").into()
        })
    }

    fn own_uid(&self) -> u32 {
        self.daemon.own_uid()
    }
}

pub fn router(api: Api) -> Router {
    let v1 = Router::new()
        .route("/status", get(site::status))
        .route("/site", patch(site::change))
        .route("/init", post(site::init))
        .route("/join", post(site::join))
        .route("/leave", post(site::leave))
        .route("/tokens", get(tokens::list).post(tokens::create))
        .route("/tokens/{id}", delete(tokens::revoke))
        .route("/hosts", get(hosts::list))
        .route("/hosts/join", post(hosts::join))
        .route("/hosts/{host}", get(hosts::show).patch(hosts::change).delete(hosts::remove))
        .route("/hosts/{host}/maintenance", post(hosts::maintenance))
        .route("/hosts/{host}/activate", post(hosts::activate))
        .route("/clusters", get(clusters::list))
        .route("/clusters/{cluster}", patch(clusters::change))
        .route("/vms", get(vms::list).post(vms::create))
        .route("/vms/{vm}", get(vms::show).patch(vms::change).delete(vms::delete))
        .route("/vms/{vm}/start", post(vms::start))
        .route("/vms/{vm}/stop", post(vms::stop))
        .route("/vms/{vm}/reset", post(vms::reset))
        .route("/vms/{vm}/pause", post(vms::pause))
        .route("/vms/{vm}/resume", post(vms::resume))
        .route("/vms/{vm}/memory", post(vms::memory))
        .route("/vms/{vm}/migrate", post(vms::migrate))
        .route("/vms/{vm}/cancel-migration", post(vms::cancel_migration))
        .route("/vms/{vm}/suspend", post(vms::suspend))
        .route("/vms/{vm}/why", get(vms::why))
        .route("/vms/{vm}/console", get(console::open))
        .route("/vms/{vm}/migrations/{migration}", get(crate::migration::door::take_in))
        .route("/vms/{vm}/agent", get(guests::show))
        .route("/vms/{vm}/agent/exec", post(guests::exec))
        .route("/vms/{vm}/agent/freeze", post(guests::freeze))
        .route("/vms/{vm}/agent/thaw", post(guests::thaw))
        .route("/vms/{vm}/agent/set-time", post(guests::set_time))
        .route("/vms/{vm}/agent/reboot", post(guests::reboot))
        .route("/events", get(events::stream))
        .route("/spm", get(hosts::spm))
        .route("/state/digest", get(digest::show))
        .route("/openapi.json", get(openapi::show));
    Router::new()
        .nest("/v1", v1)
        .route("/metrics", get(observe::metrics))
        .route("/metrics/vms", get(observe::vm_metrics))
        .route("/healthz", get(observe::health))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(axum::middleware::from_fn_with_state(api.clone(), account))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(api)
}

async fn unknown_path() -> Failure {
    Problem::new(Code::NotFound, "the API has no such path").action("`GET /v1/openapi.json` lists them all").into()
}

async fn unknown_method() -> Failure {
    let problem = Problem { status: 405, ..Problem::new(Code::BadRequest, "this path has no such method") };
    problem.action("`GET /v1/openapi.json` lists them all").into()
}

/// Says in each answer how far this host is, and counts it.
async fn account(State(api): State<Api>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().as_str().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let mut response = next.run(request).await;
    let Some(member) = api.daemon.member() else { return response };
    response.headers_mut().insert(APPLIED_SEQ_HEADER, HeaderValue::from(member.fold().head.seq.0));
    let status = response.status().as_u16().to_string();
    member.metrics.http_requests.with_label_values(&[&method, &route, &status]).inc();
    member.metrics.http_seconds.with_label_values(&[&method, &route]).inc_by(started.elapsed().as_secs_f64());
    response
}
