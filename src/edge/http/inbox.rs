//! The rooms of a user, over HTTP.

use axum::{
    Json,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use tracing::Instrument as _;
use utoipa::IntoParams;

use super::rooms::fields_of;
use crate::{
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span, room_of},
    people::InboxOf,
    protocol::{Arrangement, ErrorCode, InboxReply},
    session::records,
};

/// Which of the user's rooms.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct InboxQuery {
    /// The `next` of the page before.
    after: Option<String>,
    /// At most this many rooms, 1 to 200; by default 50.
    limit: Option<u64>,
    /// `true`: those that the user has put aside, instead of the others.
    #[serde(default)]
    archived: bool,
}

/// The rooms that the user is in: pinned ones first, then by their newest message. Works without MongoDB.
#[utoipa::path(
    get,
    path = "/v1/inbox",
    params(InboxQuery),
    responses(
        (status = 200, body = InboxReply),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn inbox(
    State(api): State<Api>,
    query: Result<Query<InboxQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Json<InboxReply>, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let Query(query) =
            query.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        let page = InboxOf::new(query.after.as_deref(), query.limit, query.archived)?;
        let inbox = ready.people.inbox(&ready.markers, &identity, &page).await?;
        Ok(Json(inbox))
    };
    ask.instrument(command_span("inbox", &headers)).await
}

/// Mute, pin or archive a room for oneself.
#[utoipa::path(
    patch,
    path = "/v1/inbox/{room}",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    request_body = Arrangement,
    responses(
        (status = 204, description = "Done"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request, bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 404, body = ErrorBody, description = "unknown_room: the user is not in it"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn arrange(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<StatusCode, HttpError> {
    let span = command_span("inbox", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let how: Arrangement = fields_of(&api, request).await?;
        let (people, publisher) = (&ready.people, &ready.publisher);
        records::arrange(people, publisher, &identity, room, &how).await?;
        Ok(StatusCode::NO_CONTENT)
    };
    ask.instrument(span).await
}
