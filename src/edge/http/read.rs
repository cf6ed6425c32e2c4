//! Read markers over HTTP: who has read what, and how much is new.

use axum::{
    Json,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::HeaderMap,
};
use serde::Serialize;
use tracing::Instrument as _;
use utoipa::ToSchema;

use super::{
    Api, ENVELOPE_BYTES, ErrorBody, HttpError, authorize, command_span, presence::ListQuery,
    read_body, room_of,
};
use crate::{
    model::RoomId,
    protocol::native,
    session::{check_read, check_readers, check_unread, marker_refusal},
};

/// Bytes that one room may take in the list of a request for unread counts.
const ROOM_BYTES: u64 = 256;

/// Who has read what.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReadersReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    room: RoomId,
    /// Ordered by the bytes of the users' names.
    readers: Vec<ReaderBody>,
    /// The last user of this page, if there are more.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// A user's read marker.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReaderBody {
    /// Who.
    user: String,
    /// Up to where.
    cursor: String,
    /// Since when, in ms since 1970.
    at: u64,
}

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
        check_readers(&api.shared.config, &identity, &room)?;
        let (readings, more) = ready
            .markers
            .readers(&room, &page)
            .await
            .map_err(|error| marker_refusal(&error))?;
        let last = readings.last().map(|reading| reading.user.clone());
        let readers = readings.into_iter().map(|reading| ReaderBody {
            user: reading.user,
            cursor: reading.cursor.to_string(),
            at: reading.at,
        });
        Ok(Json(ReadersReply {
            room,
            readers: readers.collect(),
            next: last.filter(|_| more),
        }))
    };
    ask.instrument(span).await
}

/// Where the user has read up to.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `protocol::native::decode_read` reads"
)]
pub(super) struct ReadRequest {
    /// A cursor of the room; one beyond its newest message means that message.
    cursor: String,
}

/// The user's marker now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReadReply {
    /// At least as far as was asked for: markers only grow.
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
        let cursor = check_read(&api.shared.config, &identity, &room, &cursor)?;
        let marker = ready
            .markers
            .read(&room, &identity.user, &cursor, None)
            .await
            .map_err(|error| marker_refusal(&error))?;
        Ok(Json(ReadReply {
            cursor: marker.to_string(),
        }))
    };
    ask.instrument(span).await
}

/// Rooms to be counted.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `protocol::native::decode_unread` reads"
)]
pub(super) struct UnreadRequest {
    /// At most `limits.unread_rooms`.
    #[schema(example = json!(["chat:lobby", "chat:help"]))]
    rooms: Vec<String>,
}

/// How much is new.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UnreadReply {
    /// In the order of the request.
    rooms: Vec<UnreadBody>,
}

/// How much is new in a room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UnreadBody {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    room: RoomId,
    /// Messages after the user's read marker, as far as the stream still holds them; at most `limits.unread_cap`.
    count: u64,
    /// There are more than `count`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    capped: bool,
}

/// Count what the user has not read in rooms.
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
        let durable = check_unread(config, &identity, &rooms)?;
        let counts = ready
            .markers
            .unread(&identity.user, durable)
            .await
            .map_err(|error| marker_refusal(&error))?;
        let rooms = rooms.iter().map(|room| {
            let unread = counts.get(room).copied().unwrap_or_default();
            UnreadBody {
                room: room.clone(),
                count: unread.count,
                capped: unread.capped,
            }
        });
        Ok(Json(UnreadReply {
            rooms: rooms.collect(),
        }))
    };
    ask.instrument(span).await
}
