//! Read markers over HTTP: who has read up to where, and the numbers of unread messages.

use axum::{
    Json,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::HeaderMap,
};
use tracing::Instrument as _;
use utoipa::ToSchema;

use super::presence::ListQuery;
use crate::{
    codec::native,
    edge::request::{
        Api, ENVELOPE_BYTES, ErrorBody, HttpError, authorize, command_span, read_body, room_of,
    },
    protocol::{ReadReply, ReadersReply, UnreadReply},
    session::answers,
};

/// Maximum size of one room in the list of a request for unread counts, in bytes.
const ROOM_BYTES: u64 = 256;

/// Who has read up to where in a room.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/readers",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ListQuery,
    ),
    responses(
        (status = 200, body = ReadersReply),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request (also: the room keeps no log)"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn readers(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<ListQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Json<ReadersReply>, HttpError> {
    let span = command_span("readers", &headers);
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let page = ListQuery::page(query)?;
        let (people, markers) = (&ready.people, &ready.markers);
        let readers = answers::readers(people, markers, &identity, room, &page).await?;
        Ok(Json(readers))
    };
    ask.instrument(span).await
}

/// Up to where the user has read.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `codec::native::decode_read` reads"
)]
pub(super) struct ReadRequest {
    /// A cursor of the room. A cursor beyond the newest message counts as that message.
    cursor: String,
}

/// Move the user's read marker in a room.
#[utoipa::path(
    put,
    path = "/v1/rooms/{room}/read",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    request_body = ReadRequest,
    responses(
        (status = 200, body = ReadReply),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request (also: the room keeps no log), bad_room, bad_cursor"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn read(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Json<ReadReply>, HttpError> {
    let span = command_span("read", request.headers());
    let ask = async {
        let (parts, body) = request.into_parts();
        let identity = authorize(&api, &parts.headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let body = read_body(&api.shared, body, ENVELOPE_BYTES).await?;
        let cursor = native::decode_read(&body)?;
        let (people, markers) = (&ready.people, &ready.markers);
        let read = answers::read(people, markers, &identity, &room, &cursor, None).await?;
        Ok(Json(read))
    };
    ask.instrument(span).await
}

/// The rooms whose unread messages are to be counted.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `codec::native::decode_unread` reads"
)]
pub(super) struct UnreadRequest {
    /// At most `limits.unread_rooms`.
    #[schema(example = json!(["chat:lobby", "chat:help"]))]
    rooms: Vec<String>,
}

/// Count the user's unread messages in rooms.
#[utoipa::path(
    post,
    path = "/v1/unread",
    request_body = UnreadRequest,
    responses(
        (status = 200, body = UnreadReply),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden: the message names the room"),
        (status = 404, body = ErrorBody, description = "unknown_namespace: the message names the room"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 429, body = ErrorBody, description = "limit: too many rooms; rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn unread(
    State(api): State<Api>,
    request: Request,
) -> Result<Json<UnreadReply>, HttpError> {
    let span = command_span("unread", request.headers());
    let ask = async {
        let (parts, body) = request.into_parts();
        let identity = authorize(&api, &parts.headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let config = &api.shared.config;
        let rooms = u64::try_from(config.limits.unread_rooms).unwrap_or(u64::MAX);
        let most = rooms.saturating_mul(ROOM_BYTES) + ENVELOPE_BYTES;
        let rooms = native::decode_unread(&read_body(&api.shared, body, most).await?)?;
        let unread = answers::unread(&ready.people, &ready.markers, &identity, &rooms).await?;
        Ok(Json(unread))
    };
    ask.instrument(span).await
}
