//! `GET /v1/openapi.json`: generated from the handlers, so it cannot drift from them.

use axum::Json;
use hostd_api::event::EventView;
use hostd_api::event::Mark;
use hostd_api::event::StateItem;
use utoipa::OpenApi;

use super::clusters;
use super::digest;
use super::events;
use super::guests;
use super::hosts;
use super::observe;
use super::site;
use super::tokens;
use super::vms;
use crate::console;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Quorate",
        description = "Every host answers every request; writes are forwarded to the leader. \
            Send `Authorization: Bearer TOKEN` over TLS, nothing over the Unix socket. \
            Writes take an `Idempotency-Key` and answer with their seq; pass it as `min_seq` to read your own write."
    ),
    paths(
        site::status,
        site::change,
        site::init,
        site::join,
        site::leave,
        tokens::list,
        tokens::create,
        tokens::revoke,
        hosts::list,
        hosts::show,
        hosts::change,
        hosts::maintenance,
        hosts::activate,
        hosts::remove,
        hosts::join,
        hosts::spm,
        vms::list,
        vms::create,
        vms::show,
        vms::change,
        vms::delete,
        vms::start,
        vms::stop,
        vms::reset,
        vms::migrate,
        vms::cancel_migration,
        vms::suspend,
        vms::pause,
        vms::resume,
        vms::memory,
        clusters::list,
        clusters::change,
        vms::why,
        console::open,
        guests::show,
        guests::exec,
        guests::freeze,
        guests::thaw,
        guests::set_time,
        guests::reboot,
        events::stream,
        digest::show,
        show,
        observe::metrics,
        observe::vm_metrics,
        observe::health,
    ),
    components(schemas(EventView, StateItem, Mark))
)]
pub struct Description;

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "observe", responses((status = 200, body = Object)))]
pub async fn show() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}
