//! `/metrics`, `/metrics/vms`, `/healthz`: for machines that watch.

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use hostd_api::Problem;
use hostd_api::problem::Code;

use super::Api;
use super::extract::Looker;
use super::failure::Failure;
use crate::metrics;

/// Series of this host, in Prometheus' text form.
#[utoipa::path(get, path = "/metrics", tag = "observe",
    responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = Problem)))]
pub async fn metrics(looker: Looker) -> Result<impl IntoResponse, Failure> {
    text(looker.member.scrape())
}

/// Series of the guests that this host has permits for.
#[utoipa::path(get, path = "/metrics/vms", tag = "observe",
    responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = Problem)))]
pub async fn vm_metrics(looker: Looker) -> Result<impl IntoResponse, Failure> {
    let guests = looker.member.work().map(|work| work.agent.running());
    let guests = guests.as_ref().map_or(&[][..], |guests| guests.as_slice());
    text(metrics::vms::text(&looker.member.fold().state, looker.member.own(), guests))
}

fn text(scraped: Result<String, prometheus::Error>) -> Result<impl IntoResponse, Failure> {
    let text = scraped.map_err(|error| Problem::new(Code::Internal, format!("metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, metrics::MEDIA_TYPE)], text))
}

/// 200 while this host can serve writes: it belongs to a site and knows a leader. Needs no credentials and tells nothing else.
#[utoipa::path(get, path = "/healthz", tag = "observe",
    responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = Problem)))]
pub async fn health(State(api): State<Api>) -> Result<&'static str, Failure> {
    match api.member()?.raft().leader {
        Some(_) => Ok("ok\n"),
        None => Err(Failure::new(Code::NoLeader, "no leader is known to this host")),
    }
}
