//! Plain HTTP: publishing, history, the directory of rooms, presence, read markers, erasing, events and polls, uploads, sessions of others, the API
//! for back ends, health, metrics, the OpenAPI document, the page.

mod devices;
mod directory;
mod erase;
mod history;
mod inbox;
mod presence;
mod publish;
mod read;
mod rooms;
mod server_api;
mod sessions;
mod streams;
mod transports;
mod uploads;

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::{delete, get, patch, post, put},
};
use utoipa::OpenApi;

use super::{
    Shared,
    request::{Api, ErrorBody, HttpError},
    upgrade,
};
use crate::{
    protocol::{ErrorCode, MessageBody, PresenceReply, PublishReply},
    telemetry,
    uploads::Storage,
    web,
};

/// The HTTP interface of an edge.
#[derive(OpenApi)]
#[openapi(
    info(title = "natter edge", description = "Rooms over plain HTTP. WebSocket clients connect to /ws."),
    paths(
        upgrade::websocket, upgrade::centrifugal, upgrade::stomp, publish::publish, publish::publish_many,
        history::messages, history::search_room, history::search,
        streams::events_of_room, streams::events, streams::poll, streams::ticket, transports::http_stream, transports::sse,
        transports::emulation, erase::close, erase::room, erase::user, directory::rooms, rooms::create, rooms::record, rooms::settings, rooms::put_member,
        rooms::remove_member, rooms::pin, rooms::unpin, rooms::block, rooms::unblock, inbox::inbox, inbox::arrange, devices::devices, devices::quiet, devices::put, devices::remove, sessions::end, sessions::remove, server_api::call,
        presence::presence, read::readers, read::read, read::unread,
        uploads::grant, uploads::download, uploads::receive, uploads::send,
        healthz, readyz, metrics, openapi,
    ),
    components(schemas(publish::PublishRequest, publish::PublishMany, PublishReply, PresenceReply, MessageBody, ErrorBody)),
    modifiers(&BearerToken)
)]
struct ApiDoc;

struct BearerToken;

impl utoipa::Modify for BearerToken {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("JWT")
            .build();
        openapi
            .components
            .get_or_insert_default()
            .add_security_scheme("token", SecurityScheme::Http(bearer));
    }
}

/// The OpenAPI document as JSON text.
#[must_use]
pub fn openapi_json() -> String {
    ApiDoc::openapi()
        .to_pretty_json()
        .expect("the document is plain data")
}

pub(super) fn router(shared: Arc<Shared>) -> Router {
    let page = shared.config.edge.web_page;
    let router = Router::new()
        .route("/ws", get(upgrade::websocket))
        .route("/connection/websocket", get(upgrade::centrifugal))
        .route("/connection/http_stream", post(transports::http_stream))
        .route("/connection/sse", get(transports::sse))
        .route("/emulation", post(transports::emulation))
        .route("/stomp", get(upgrade::stomp))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/openapi.json", get(openapi))
        .route(
            "/v1/rooms/{room}/messages",
            get(history::messages).post(publish::publish),
        )
        .route("/v1/messages", post(publish::publish_many))
        .route("/v1/users/{user}/sessions", delete(sessions::end))
        .route("/v1/rooms/{room}/sessions/{user}", delete(sessions::remove))
        .route("/v1/devices", get(devices::devices).patch(devices::quiet))
        .route(
            "/v1/devices/{device}",
            put(devices::put).delete(devices::remove),
        )
        .route("/v1/inbox", get(inbox::inbox))
        .route("/v1/inbox/{room}", patch(inbox::arrange))
        .route("/v1/rooms", get(directory::rooms).post(rooms::create))
        .route(
            "/v1/rooms/{room}",
            get(rooms::record)
                .patch(rooms::settings)
                .delete(erase::close),
        )
        .route("/v1/rooms/{room}/messages", delete(erase::room))
        .route(
            "/v1/rooms/{room}/members/{user}",
            put(rooms::put_member).delete(rooms::remove_member),
        )
        .route(
            "/v1/rooms/{room}/pins/{message}",
            put(rooms::pin).delete(rooms::unpin),
        )
        .route(
            "/v1/users/{user}/blocks/{other}",
            put(rooms::block).delete(rooms::unblock),
        )
        .route("/v1/users/{user}/messages", delete(erase::user))
        .route("/v1/rooms/{room}/search", get(history::search_room))
        .route("/v1/search", get(history::search))
        .route("/v1/rooms/{room}/presence", get(presence::presence))
        .route("/v1/rooms/{room}/readers", get(read::readers))
        .route("/v1/rooms/{room}/read", put(read::read))
        .route("/v1/unread", post(read::unread))
        .route("/v1/rooms/{room}/events", get(streams::events_of_room))
        .route("/v1/rooms/{room}/poll", get(streams::poll))
        .route("/v1/events", get(streams::events))
        .route("/v1/tickets", post(streams::ticket));
    let storage = shared.uploads.as_ref().map(|uploads| &uploads.storage);
    let router = match storage {
        None => router,
        Some(storage) => {
            let router = router
                .route("/v1/rooms/{room}/uploads", post(uploads::grant))
                .route("/v1/rooms/{room}/uploads/{upload}", get(uploads::download));
            match storage {
                Storage::S3(_) => router,
                Storage::Local(_) => router.route(
                    "/v1/uploads/{upload}",
                    get(uploads::send).put(uploads::receive),
                ),
            }
        }
    };
    let router = match shared.config.centrifugal.api_key.expose() {
        "" => router,
        _ => router.route("/api/{method}", post(server_api::call)),
    };
    let router = match page {
        true => web::routes(router, storage.and_then(Storage::origin).as_deref()),
        false => router,
    };
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(Api {
            shared,
            paces: Arc::default(),
        })
}

/// Whether the process is alive.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether the edge accepts connections and publishes: streams found, NATS up, all shards running, not draining.
#[utoipa::path(get, path = "/readyz", responses((status = 200, body = String), (status = 503, body = String)))]
async fn readyz(State(shared): State<Arc<Shared>>) -> (StatusCode, String) {
    let phase = shared.lifecycle.phase();
    let why = match shared.ready.get() {
        Some(_) | None if !shared.lifecycle.is_ready() => phase.as_str().to_owned(),
        Some(ready) if ready.connection.is_up() && ready.line.is_up() => {
            match ready.shards.trouble() {
                None => return (StatusCode::OK, "ready\n".to_owned()),
                Some(trouble) => trouble,
            }
        }
        Some(_) | None => "NATS is away".to_owned(),
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n"))
}

/// Metrics in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
async fn metrics() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        telemetry::prometheus_text(),
    )
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, body = String)))]
async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json())
}

async fn not_found() -> HttpError {
    HttpError::with_status(
        StatusCode::NOT_FOUND,
        ErrorCode::BadRequest,
        "there is nothing here",
    )
}

async fn method_not_allowed() -> HttpError {
    HttpError::with_status(
        StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::BadRequest,
        "this is not for that method",
    )
}
