//! Room records over HTTP: making rooms, members, settings, blocks.

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;
use tracing::Instrument as _;

use crate::{
    auth::{Identity, Right},
    edge::{
        Ready,
        request::{
            Api, ENVELOPE_BYTES, ErrorBody, HttpError, authorize, command_span, json_of, read_body,
            room_and_name, room_of,
        },
    },
    model::RoomId,
    people::Change,
    protocol::{ErrorCode, NewRoom, PutMember, RecordReply, Refused, Settings},
    session::records,
};

/// Largest request: a list of members.
const MAX_BYTES: u64 = 1024 * 1024;

/// The fields of a request.
pub(super) async fn fields_of<T: DeserializeOwned>(
    api: &Api,
    request: Request,
) -> Result<T, HttpError> {
    json_of(&read_body(&api.shared, request.into_body(), MAX_BYTES).await?)
}

/// Makes a change, tells the room, and answers with the record after it.
async fn change(
    ready: &Ready,
    identity: &Identity,
    room: &RoomId,
    change: &Change,
    version: Option<&str>,
) -> Result<Response, Refused> {
    let (people, publisher) = (&ready.people, &ready.publisher);
    let record = records::changed(people, publisher, identity, room, (change, version)).await?;
    Ok(answer(StatusCode::OK, record))
}

fn answer(status: StatusCode, record: RecordReply) -> Response {
    let tag = format!("\"{}\"", record.version);
    let mut response = (status, Json(record)).into_response();
    // Hexadecimal digits in quotes can stand in a header.
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// The version that a request is for.
fn version_of(headers: &HeaderMap) -> Option<String> {
    let tag = headers.get(header::IF_MATCH)?.to_str().ok()?.trim();
    (tag != "*").then(|| tag.trim_start_matches("W/").trim_matches('"').to_owned())
}

/// Make a room, or find it.
///
/// The name is made from the namespace and `ref`, with the members of a `dm` or the `key` of a group: whoever makes it
/// again, in any region, gets the same room. Needs `manage` on the room; users may make a `dm` with themselves in it, where
/// the namespace has `create = "members"`.
#[utoipa::path(
    post,
    path = "/v1/rooms",
    request_body = NewRoom,
    responses(
        (status = 200, body = RecordReply, description = "It was there"),
        (status = 201, body = RecordReply, description = "It was made"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden; also if one of two users has blocked the other, or the room was closed"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After; limit: too many members"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn create(
    State(api): State<Api>,
    request: Request,
) -> Result<Response, HttpError> {
    let span = command_span("rooms", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let new: NewRoom = fields_of(&api, request).await?;
        let made = records::create(&ready.people, &ready.publisher, &identity, new).await?;
        let status = match made.made {
            Some(true) => StatusCode::CREATED,
            Some(false) | None => StatusCode::OK,
        };
        Ok(answer(status, made))
    };
    ask.instrument(span).await
}

/// Read a room's record. Needs `read`.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    responses(
        (status = 200, body = RecordReply, description = "With its version as ETag"),
        (status = 400, body = ErrorBody, description = "bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace; unknown_room: nobody has made the room"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn record(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let record = records::record(&ready.people, &identity, &room).await?;
        Ok(answer(StatusCode::OK, record))
    };
    ask.instrument(command_span("room", &headers)).await
}

/// Change a room's settings.
///
/// `archived`, `frozen`, `slow_mode_s` and `alert` are for moderators; `title`, `info` and `assignee` for owners. With `If-Match`
/// only if the record still has that version.
#[utoipa::path(
    patch,
    path = "/v1/rooms/{room}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("if-match" = Option<String>, Header, description = "The ETag of the record that was read"),
    ),
    request_body = Settings,
    responses(
        (status = 200, body = RecordReply),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 409, body = ErrorBody, description = "conflict: the record has another version"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn settings(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, HttpError> {
    let span = command_span("room", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let version = version_of(request.headers());
        let settings: Settings = fields_of(&api, request).await?;
        let set = Change::Set(Box::new(settings));
        Ok(change(ready, &identity, &room, &set, version.as_deref()).await?)
    };
    ask.instrument(span).await
}

/// Add a member, or change their role, mute or ban them.
#[utoipa::path(
    put,
    path = "/v1/rooms/{room}/members/{user}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("user" = String, Path, description = "The user, percent-encoded"),
    ),
    request_body = PutMember,
    responses(
        (status = 200, body = RecordReply),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After; limit: too many members"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn put_member(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    request: Request,
) -> Result<Response, HttpError> {
    let span = command_span("member", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let (room, user) = room_and_name(path)?;
        let body = read_body(&api.shared, request.into_body(), ENVELOPE_BYTES).await?;
        let what = match body.is_empty() {
            true => PutMember::default(),
            false => json_of(&body)?,
        };
        let put = Change::Put { user, what };
        Ok(change(ready, &identity, &room, &put, None).await?)
    };
    ask.instrument(span).await
}

/// Remove a member, or leave: a user may always remove oneself.
#[utoipa::path(
    delete,
    path = "/v1/rooms/{room}/members/{user}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("user" = String, Path, description = "The user, percent-encoded"),
    ),
    responses(
        (status = 200, body = RecordReply),
        (status = 400, body = ErrorBody, description = "bad_request (also: the user is not named there), bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn remove_member(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let (room, user) = room_and_name(path)?;
        let remove = Change::Remove { user };
        Ok(change(ready, &identity, &room, &remove, None).await?)
    };
    ask.instrument(command_span("member", &headers)).await
}

/// Pin a message: `PUT` pins, `DELETE` unpins. For moderators; in a `dm` for its members.
#[utoipa::path(
    put,
    path = "/v1/rooms/{room}/pins/{message}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("message" = String, Path, description = "The message, `<user>/<id>`, percent-encoded"),
    ),
    responses(
        (status = 200, body = RecordReply),
        (status = 400, body = ErrorBody, description = "bad_request, bad_room, bad_id"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After; limit: too many pinned messages"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn pin(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    pinned(&api, path, &headers, true).await
}

/// Unpin a message.
#[utoipa::path(
    delete,
    path = "/v1/rooms/{room}/pins/{message}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("message" = String, Path, description = "The message, `<user>/<id>`, percent-encoded"),
    ),
    responses(
        (status = 200, body = RecordReply),
        (status = 400, body = ErrorBody, description = "bad_request, bad_room, bad_id"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn unpin(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    pinned(&api, path, &headers, false).await
}

async fn pinned(
    api: &Api,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: &HeaderMap,
    on: bool,
) -> Result<Response, HttpError> {
    let ask = async {
        let identity = authorize(api, headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let (room, message) = room_and_name(path)?;
        let pin = Change::Pin {
            message,
            on,
            said: None,
        };
        Ok(change(ready, &identity, &room, &pin, None).await?)
    };
    ask.instrument(command_span("pin", headers)).await
}

/// Block a user: direct messages between the two are refused.
///
/// `{user}` is oneself, or the token grants `manage` on all rooms. Neither of the two is told.
#[utoipa::path(
    put,
    path = "/v1/users/{user}/blocks/{other}",
    params(
        ("user" = String, Path, description = "Who blocks, percent-encoded"),
        ("other" = String, Path, description = "Who is blocked, percent-encoded"),
    ),
    responses(
        (status = 204, description = "Blocked"),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn block(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<StatusCode, HttpError> {
    set_block(&api, path, &headers, true).await
}

/// No longer block a user.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/blocks/{other}",
    params(
        ("user" = String, Path, description = "Who blocks, percent-encoded"),
        ("other" = String, Path, description = "Who is blocked, percent-encoded"),
    ),
    responses(
        (status = 204, description = "Not blocked"),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn unblock(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<StatusCode, HttpError> {
    set_block(&api, path, &headers, false).await
}

async fn set_block(
    api: &Api,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: &HeaderMap,
    on: bool,
) -> Result<StatusCode, HttpError> {
    let ask = async {
        let identity = authorize(api, headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let Path((user, other)) =
            path.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        if *identity.user != *user && !identity.scope(Right::Manage).all {
            let text = "blocks of another user need manage on all rooms";
            return Err(HttpError::new(ErrorCode::Forbidden, text));
        }
        ready.people.block(&user, &other, on).await?;
        Ok(StatusCode::NO_CONTENT)
    };
    ask.instrument(command_span("block", headers)).await
}
