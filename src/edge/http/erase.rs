//! Erasing for good, over HTTP: rooms, and everything that users have sent.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode},
};
use serde::Serialize;
use tracing::Instrument as _;
use utoipa::ToSchema;

use crate::{
    auth::Right,
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span, room_of},
    history::{EraseRequest, EraseWhat},
    model::MAX_USER,
    people::Change,
    protocol::ErrorCode,
    session::{answers, records},
};

/// The state of an erasure.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EraseReply {
    /// The id of the erasure, for investigation.
    id: String,
    /// `done` or `running`. If it is running, it goes on in any case, and a repeated request is harmless.
    #[schema(example = "done")]
    state: &'static str,
    /// The number of messages that were erased, when it is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    erased: Option<u64>,
    /// Other regions that have not carried it out yet. They do so as soon as they can be reached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waiting: Vec<String>,
}

type Erased = Result<(StatusCode, Json<EraseReply>), HttpError>;

/// End a room for good, and erase its messages. Needs `erase` there, and the role of an owner where members have roles.
///
/// Its members get `kicked` with `closed`. Of a room without a record, only the messages are erased.
#[utoipa::path(
    delete,
    path = "/v1/rooms/{room}",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    responses(
        (status = 200, body = EraseReply, description = "Ended, and erased"),
        (status = 202, body = EraseReply, description = "Ended; the erasure is recorded, and being carried out"),
        (status = 400, body = ErrorBody, description = "bad_room"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: the history service, MongoDB or NATS is away"),
    ),
    security(("token" = []))
)]
pub(super) async fn close(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Erased {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let durable = answers::namespace(&api.shared.config, &room)?.durable;
        let (people, publisher) = (&ready.people, &ready.publisher);
        answers::granted(&identity, Right::Erase, &room)?;
        // A room without a record has nothing that could end.
        if people
            .read_record(&room)
            .await?
            .is_some_and(|record| !record.is_closed())
        {
            records::change(people, publisher, &identity, &room, &Change::Close, None).await?;
        }
        if !durable {
            let nothing = EraseReply {
                id: String::new(),
                state: "done",
                erased: Some(0),
                waiting: Vec::new(),
            };
            return Ok((StatusCode::OK, Json(nothing)));
        }
        erase(&api, &identity.user, EraseWhat::Room(room)).await
    };
    ask.instrument(command_span("close", &headers)).await
}

/// Erase everything that was sent to a room until now. Needs `erase` there.
///
/// The messages are removed from MongoDB and from the streams of all regions. The members get a message of kind
/// `erase`.
#[utoipa::path(
    delete,
    path = "/v1/rooms/{room}/messages",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    responses(
        (status = 200, body = EraseReply, description = "Erased"),
        (status = 202, body = EraseReply, description = "Recorded, and being carried out"),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request (the room keeps no log)"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: the history service, MongoDB or NATS is away"),
    ),
    security(("token" = []))
)]
pub(super) async fn room(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Erased {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let room = room_of(room)?;
        let namespace = answers::namespace(&api.shared.config, &room)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        answers::admitted(&ready.people, &identity, Right::Erase, &room).await?;
        if !namespace.durable {
            let text = format!("the room {room} keeps no log");
            return Err(HttpError::new(ErrorCode::BadRequest, text));
        }
        erase(&api, &identity.user, EraseWhat::Room(room)).await
    };
    ask.instrument(command_span("erase", &headers)).await
}

/// Erase everything that a user has sent until now, in all rooms where the token has `erase`.
///
/// This includes the user's messages, edits, reactions and annotations, and the events of others that refer to the
/// user's messages. They are removed from MongoDB and from the streams of all regions. The rooms get a message
/// of kind `erase`. Messages of others stay, even if they quote or mention the user.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/messages",
    params(("user" = String, Path, description = "The user, percent-encoded")),
    responses(
        (status = 200, body = EraseReply, description = "Erased"),
        (status = 202, body = EraseReply, description = "Recorded, and being carried out"),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden: the token grants erase nowhere"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: the history service, MongoDB or NATS is away"),
    ),
    security(("token" = []))
)]
pub(super) async fn user(
    State(api): State<Api>,
    user: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Erased {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let bad = |text: String| HttpError::new(ErrorCode::BadRequest, text);
        let Path(user) = user.map_err(|error| bad(error.body_text()))?;
        if user.is_empty() || user.len() > MAX_USER {
            return Err(bad(format!("a user has 1 to {MAX_USER} bytes")));
        }
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let scope = answers::scope(&ready.people, &identity, Right::Erase).await?;
        if scope.is_empty() {
            let text = "the token does not grant erase anywhere";
            return Err(HttpError::new(ErrorCode::Forbidden, text));
        }
        erase(&api, &identity.user, EraseWhat::User { user, scope }).await
    };
    ask.instrument(command_span("erase", &headers)).await
}

async fn erase(api: &Api, by: &str, what: EraseWhat) -> Erased {
    let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
    let request = EraseRequest {
        what,
        by: by.to_owned(),
    };
    let answer = ready.history.erase(&request).await?;
    let (status, state) = if answer.done {
        (StatusCode::OK, "done")
    } else {
        (StatusCode::ACCEPTED, "running")
    };
    let reply = EraseReply {
        id: answer.id,
        state,
        erased: answer.done.then_some(answer.erased),
        waiting: answer.waiting,
    };
    Ok((status, Json(reply)))
}
