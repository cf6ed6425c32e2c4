//! Who is in a room, over HTTP.

use axum::{
    Json,
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::HeaderMap,
};
use serde::Deserialize;
use tracing::Instrument as _;
use utoipa::IntoParams;

use crate::{
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span, room_of},
    protocol::{ErrorCode, PageOf, PresenceReply},
    session::answers,
};

/// Which part of a list of users to return.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// The list continues after this user: `next` of the page before.
    after: Option<String>,
    /// At most this many users, 1 to 1000; by default 100.
    limit: Option<u64>,
}

impl ListQuery {
    /// The requested page.
    pub(super) fn page(query: Result<Query<Self>, QueryRejection>) -> Result<PageOf, HttpError> {
        let Query(Self { after, limit }) =
            query.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        Ok(PageOf::new(after, limit)?)
    }
}

/// Who is in a room.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/presence",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"), ListQuery),
    responses(
        (status = 200, body = PresenceReply),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request; also if presence is off"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn presence(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<ListQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Json<PresenceReply>, HttpError> {
    let span = command_span("presence", &headers);
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let page = ListQuery::page(query)?;
        let (people, presence) = (&ready.people, &ready.presence);
        let page = answers::presence(people, presence, &identity, room, &page).await?;
        Ok(Json(page))
    };
    ask.instrument(span).await
}
