//! Plain HTTP: publishing, history, presence, read markers, erasing, health, metrics, the OpenAPI document, the page.

mod erase;
mod history;
mod presence;
mod read;
mod streams;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{StatusCode, header},
    response::IntoResponse,
    routing::{delete, get, post, put},
};
use tracing::Instrument as _;
use utoipa::{OpenApi, ToSchema};

use super::{
    Shared,
    request::{
        Api, ENVELOPE_BYTES, ErrorBody, HttpError, authorize, command_span, read_body, room_of,
    },
    upgrade,
};
use crate::{
    bus::Outgoing,
    codec::native,
    protocol::{ErrorCode, MessageBody, PresenceReply, PublishReply, Refused},
    session::answers,
    telemetry::{
        self,
        metrics::{Counter, Published, count},
    },
    web,
};

/// The HTTP interface of an edge.
#[derive(OpenApi)]
#[openapi(
    info(title = "natter edge", description = "Rooms over plain HTTP. WebSocket clients connect to /ws."),
    paths(
        upgrade::websocket, upgrade::centrifugal, upgrade::stomp, publish, history::messages, history::search_room, history::search,
        streams::events_of_room, streams::events, streams::poll, streams::ticket, streams::http_stream, streams::sse,
        streams::emulation, erase::room, erase::user, presence::presence, read::readers, read::read, read::unread,
        healthz, readyz, metrics, openapi,
    ),
    components(schemas(PublishRequest, PublishReply, PresenceReply, MessageBody, ErrorBody)),
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
        .route("/connection/http_stream", post(streams::http_stream))
        .route("/connection/sse", get(streams::sse))
        .route("/emulation", post(streams::emulation))
        .route("/stomp", get(upgrade::stomp))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/openapi.json", get(openapi))
        .route(
            "/v1/rooms/{room}/messages",
            get(history::messages).post(publish),
        )
        .route("/v1/rooms/{room}", delete(erase::room))
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
    let router = if page { web::routes(router) } else { router };
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(Api {
            shared,
            paces: Arc::default(),
        })
}

/// The content of a publish: the fields of a `send`.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `codec::native::decode_publication` reads"
)]
struct PublishRequest {
    /// `[A-Za-z0-9._~-]{1,64}`, chosen by the client. A retry with the same id is stored only once.
    id: Option<String>,
    /// Any JSON.
    body: serde_json::Value,
    /// `message` (default), `edit`, `delete`, `reaction` or `annotation`.
    kind: Option<String>,
    /// The message to which an edit, delete, reaction or annotation refers: `<user>/<id>`, or `<id>` for an own
    /// message.
    target: Option<String>,
    /// The message that this one answers.
    reply_to: Option<String>,
    /// The users that the message mentions, at most 100.
    mentions: Option<Vec<String>>,
}

/// Publish a message to a room.
#[utoipa::path(
    post,
    path = "/v1/rooms/{room}/messages",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    request_body = PublishRequest,
    responses(
        (status = 200, body = PublishReply, description = "Stored (in an ephemeral room: sent)"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room, bad_id"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 408, body = ErrorBody, description = "timeout: the body did not arrive in time"),
        (status = 410, body = ErrorBody, description = "erased"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable, unknown_outcome, stream_full"),
    ),
    security(("token" = []))
)]
async fn publish(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Json<PublishReply>, HttpError> {
    let span = command_span("send", request.headers());
    publish_to(api, room, request).instrument(span).await
}

async fn publish_to(
    api: Api,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Json<PublishReply>, HttpError> {
    let (parts, body) = request.into_parts();
    let identity = authorize(&api, &parts.headers)?;
    let config = &api.shared.config;
    let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
    let room = room_of(room)?;
    let body = read_body(
        &api.shared,
        body,
        config.limits.body.as_u64() + ENVELOPE_BYTES,
    )
    .await?;
    let publication = native::decode_publication(room, &body)?;
    let durable = answers::check_publication(config, &identity, &publication)?;
    let id = match &publication.id {
        Some(id) => id.to_string(),
        None => ulid::Ulid::new().to_string(),
    };
    let outgoing = Outgoing {
        after: None,
        publication: &publication,
        user: &identity.user,
        id: &id,
    };
    let (publisher, markers) = (&ready.publisher, &ready.markers);
    let published = answers::publish(publisher, Some(&**markers), &outgoing, durable, |_seq| None);
    let published = published.await.map_err(Refused::from)?;
    let way = if durable {
        Published::HttpDurable
    } else {
        Published::HttpEphemeral
    };
    count(Counter::MessagePublished(way), 1);
    Ok(Json(published))
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
