//! Ending the sessions of others, over HTTP.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::HeaderMap,
};
use serde::Serialize;
use tracing::Instrument as _;
use utoipa::ToSchema;

use crate::{
    auth::{Right, user_flaw},
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span, room_and_name},
    protocol::{ErrorCode, Order, OrderKind, Refused},
    session::answers,
};

/// What was done to the sessions of a user.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SessionsReply {
    /// The sessions that were ended, or removed from the room, as far as edges have answered.
    sessions: usize,
    /// The edges that have answered.
    edges: usize,
    /// Edges that are known to live and did not answer within 2 s. They may have carried it out all the same. Edges of
    /// regions that are cut off are not counted, and do not hear of it.
    missing: usize,
}

type Ended = Result<Json<SessionsReply>, HttpError>;

/// End all sessions of a user, on every edge of every region that can be reached. Needs `admin` on `*:*`.
///
/// They are closed with 4006. The user may connect again; `natter revoke` says who may not.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/sessions",
    params(("user" = String, Path, description = "The user, percent-encoded")),
    responses(
        (status = 200, body = SessionsReply),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden: the token does not grant admin on all rooms"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: nobody has heard it"),
    ),
    security(("token" = []))
)]
pub(super) async fn end(
    State(api): State<Api>,
    user: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Ended {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let Path(user) =
            user.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        if !identity.scope(Right::Admin).all {
            let text = "the token does not grant admin on all rooms";
            return Err(HttpError::new(ErrorCode::Forbidden, text));
        }
        give(&api, user, OrderKind::disconnect()).await
    };
    ask.instrument(command_span("sessions", &headers)).await
}

/// Remove the sessions of a user from a room, on every edge of every region that can be reached. Needs `admin` there.
///
/// They get `kicked` with `removed`. They may join again if their token allows it.
#[utoipa::path(
    delete,
    path = "/v1/rooms/{room}/sessions/{user}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("user" = String, Path, description = "The user, percent-encoded"),
    ),
    responses(
        (status = 200, body = SessionsReply),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: nobody has heard it"),
    ),
    security(("token" = []))
)]
pub(super) async fn remove(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Ended {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let (room, user) = room_and_name(path)?;
        answers::namespace(&api.shared.config, &room)?;
        answers::granted(&identity, Right::Admin, &room)?;
        give(&api, user, OrderKind::Leave { room }).await
    };
    ask.instrument(command_span("sessions", &headers)).await
}

async fn give(api: &Api, user: String, what: OrderKind) -> Ended {
    if let Some(rule) = user_flaw(&user) {
        let text = format!("the user {rule}");
        return Err(Refused::new(ErrorCode::BadRequest, text).into());
    }
    let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
    let order = Order {
        user: user.into(),
        what,
    };
    let given = ready.orders.give(order, ready.presence.edges()).await?;
    Ok(Json(SessionsReply {
        sessions: given.sessions,
        edges: given.edges,
        missing: given.missing,
    }))
}
