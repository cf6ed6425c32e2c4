//! The directory of rooms, over HTTP.

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::HeaderMap,
};
use tracing::Instrument as _;

use crate::{
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span},
    protocol::{ErrorCode, RoomsReply},
    session::directory::{self, RoomsFor},
};

/// List rooms, newest activity first.
///
/// With `manage` on what is asked for, all of them; otherwise those that the caller may read. Needs MongoDB.
#[utoipa::path(
    get,
    path = "/v1/rooms",
    params(RoomsFor),
    responses(
        (status = 200, body = RoomsReply),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden: the token grants neither read nor manage on what is asked for"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: only the history service can list rooms"),
    ),
    security(("token" = []))
)]
pub(super) async fn rooms(
    State(api): State<Api>,
    query: Result<Query<RoomsFor>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Json<RoomsReply>, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let Query(query) =
            query.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        let found = directory::rooms(&ready.people, &ready.history, &identity, query).await?;
        Ok(Json(found))
    };
    ask.instrument(command_span("rooms", &headers)).await
}
