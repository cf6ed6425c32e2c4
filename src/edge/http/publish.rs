//! Publishing over HTTP: one message, or many.

use axum::{
    Json,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
};
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::Instrument as _;
use utoipa::{IntoParams, ToSchema};

use crate::{
    auth::{Identity, Right, user_flaw},
    bus::Outgoing,
    codec::native,
    edge::{
        Ready,
        request::{
            Api, ENVELOPE_BYTES, ErrorBody, HttpError, MANY_BYTES, authorize, command_span,
            json_of, read_body, room_of, within_pace,
        },
    },
    model::RoomId,
    protocol::{ErrorCode, Publication, PublishReply, Refused},
    session::{answers, records},
    telemetry::metrics::{Counter, Published, count},
};

/// Most messages of one request.
const MAX_MESSAGES: usize = 100;

/// The content of a publish: the fields of a `send`.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "documents what `codec::native::decode_publication` reads"
)]
pub(super) struct PublishRequest {
    /// `[A-Za-z0-9._~-]{1,64}`, chosen by the client. A retry with the same id is stored only once.
    id: Option<String>,
    /// Any JSON.
    body: serde_json::Value,
    /// `message` (default), `edit`, `delete`, `reaction`, `annotation`, `pin` or `unpin`.
    kind: Option<String>,
    /// The message to which any other kind than a message refers: `<user>/<id>`, or `<id>` for an own message.
    target: Option<String>,
    /// The message that this one answers.
    reply_to: Option<String>,
    /// The users that the message mentions, at most 100.
    mentions: Option<Vec<String>>,
}

/// In whose name to publish.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct As {
    /// The user who is shown as the sender; by default the one of the token. Needs `admin` in the room.
    r#as: Option<String>,
}

/// Publish a message to a room.
#[utoipa::path(
    post,
    path = "/v1/rooms/{room}/messages",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"), As),
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
pub(super) async fn publish(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<As>, QueryRejection>,
    request: Request,
) -> Result<Json<PublishReply>, HttpError> {
    let span = command_span("send", request.headers());
    let publish = async {
        let (parts, body) = request.into_parts();
        let identity = authorize(&api, &parts.headers)?;
        let config = &api.shared.config;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let room = room_of(room)?;
        let query =
            query.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
        let most = config.limits.body.as_u64() + ENVELOPE_BYTES;
        let body = read_body(&api.shared, body, most).await?;
        let publication = native::decode_publication(room, &body)?;
        let published = match &query.0.r#as {
            None => store(ready, &identity, &publication).await?,
            Some(user) => {
                let identity = acting_as(&identity, user, &publication.room)?;
                store(ready, &identity, &publication).await?
            }
        };
        Ok(Json(published))
    };
    publish.instrument(span).await
}

/// The user `user`, with the permissions of somebody who may act as others in the room.
fn acting_as(identity: &Identity, user: &str, room: &RoomId) -> Result<Identity, Refused> {
    if let Some(rule) = user_flaw(user) {
        let text = format!("as {rule}");
        return Err(Refused::new(ErrorCode::BadRequest, text));
    }
    answers::granted(identity, Right::Admin, room)?;
    Ok(identity.acting_as(user))
}

/// Checks a publication, and publishes it.
pub(super) async fn store(
    ready: &Ready,
    identity: &Identity,
    publication: &Publication,
) -> Result<PublishReply, Refused> {
    let durable = answers::accept_publication(&ready.people, identity, publication).await?;
    store_accepted(ready, identity, publication, durable).await
}

/// Publishes what was checked.
async fn store_accepted(
    ready: &Ready,
    identity: &Identity,
    publication: &Publication,
    durable: bool,
) -> Result<PublishReply, Refused> {
    let id = match &publication.id {
        Some(id) => id.to_string(),
        None => ulid::Ulid::new().to_string(),
    };
    let (people, publisher) = (&ready.people, &ready.publisher);
    let way = if durable {
        Published::HttpDurable
    } else {
        Published::HttpEphemeral
    };
    if let Some(pinning) = records::Pinning::of(identity, publication) {
        let pinned = Box::pin(pinning.carry_out(people, publisher, identity)).await?;
        count(Counter::MessagePublished(way), 1);
        return Ok(pinned);
    }
    let outgoing = Outgoing {
        after: None,
        original_ts: None,
        publication,
        user: &identity.user,
        id: &id,
    };
    // What begins with `$` is no user, and has read nothing.
    let markers = (!identity.user.starts_with('$')).then_some(&*ready.markers);
    let published = answers::publish(people, publisher, markers, &outgoing, durable, |_seq| None);
    let published = published.await.map_err(Refused::from)?;
    count(Counter::MessagePublished(way), 1);
    Ok(published)
}

/// Messages to publish.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `Many` and `native` read")]
pub(super) struct PublishMany {
    /// At most 100. In each the fields of a publish, `room`, and `as`.
    messages: Vec<PublishOne>,
}

/// One of many messages.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `One` and `native` read")]
pub(super) struct PublishOne {
    /// The room.
    room: String,
    /// The user who is shown as the sender; by default the one of the token. Needs `admin` in the room.
    r#as: Option<String>,
    #[schema(inline)]
    #[serde(flatten)]
    message: PublishRequest,
}

#[derive(Deserialize)]
struct Many<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct One {
    room: Option<String>,
    r#as: Option<String>,
}

/// What became of each message, in their order.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PublishedMany {
    results: Vec<PublishedOne>,
}

/// What became of one message.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum PublishedOne {
    /// It was published.
    Published(PublishReply),
    /// It was refused.
    Refused {
        /// Why.
        error: ErrorBody,
    },
}

/// Publish many messages, to one or many rooms.
///
/// Each is accepted or refused by itself, and counts as a command. Those of one room are published in their order.
#[utoipa::path(
    post,
    path = "/v1/messages",
    request_body = PublishMany,
    responses(
        (status = 200, body = PublishedMany, description = "What became of each, in their order"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request: nothing was published"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 408, body = ErrorBody, description = "timeout: the body did not arrive in time"),
        (status = 413, body = ErrorBody, description = "too_large: the whole request"),
        (status = 429, body = ErrorBody, description = "limit: more than 100 messages; rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn publish_many(
    State(api): State<Api>,
    request: Request,
) -> Result<Json<PublishedMany>, HttpError> {
    let span = command_span("send", request.headers());
    let publish = async {
        let (parts, body) = request.into_parts();
        let identity = authorize(&api, &parts.headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let body = read_body(&api.shared, body, MANY_BYTES).await?;
        let Many { messages } = json_of(&body)?;
        if messages.len() > MAX_MESSAGES {
            let text = format!(
                "messages: {} of them, the limit is {MAX_MESSAGES}",
                messages.len()
            );
            return Err(HttpError::new(ErrorCode::Limit, text));
        }
        let accept = async |number: usize, message: &RawValue| {
            // The request itself has counted for the first.
            if number > 0 {
                within_pace(&api, &identity.user)?;
            }
            let One { room, r#as } = serde_json::from_str(message.get())
                .map_err(|error| Refused::new(ErrorCode::BadRequest, error.to_string()))?;
            let room =
                room.ok_or_else(|| Refused::new(ErrorCode::BadRequest, "room is missing"))?;
            let room = RoomId::parse(&room)
                .map_err(|error| Refused::new(ErrorCode::BadRoom, error.to_string()))?;
            let publication = native::decode_publication(room, message.get().as_bytes())?;
            let other = r#as.map(|user| acting_as(&identity, &user, &publication.room));
            let other = other.transpose()?;
            let sender = other.as_ref().unwrap_or(&identity);
            let durable = answers::accept_publication(&ready.people, sender, &publication).await?;
            Ok::<_, Refused>((other, publication, durable))
        };
        // One after the other: one that waits for the record of its room must not be overtaken.
        let mut accepted = Vec::with_capacity(messages.len());
        for (number, message) in messages.iter().enumerate() {
            accepted.push(Box::pin(accept(number, message)).await);
        }
        let is_pin = |publication: &Publication| publication.kind.pins().is_some();
        let pins = accepted.iter().flatten().any(|(_, it, _)| is_pin(it));
        let publishes = accepted.into_iter().map(async |accepted| {
            let (other, publication, durable) = accepted?;
            let sender = other.as_ref().unwrap_or(&identity);
            store_accepted(ready, sender, &publication, durable).await
        });
        // The publishes reach NATS in the order in which they are begun. Pinning reads and writes the record, too.
        let at_once = if pins { 1 } else { MAX_MESSAGES };
        let publishes: Vec<_> = publishes.map(Box::pin).collect();
        let results: Vec<_> = stream::iter(publishes).buffered(at_once).collect().await;
        let results = results.into_iter().map(|result| match result {
            Ok(published) => PublishedOne::Published(published),
            Err(refused) => PublishedOne::Refused {
                error: HttpError::from(refused).into_body(),
            },
        });
        Ok(Json(PublishedMany {
            results: results.collect(),
        }))
    };
    publish.instrument(span).await
}
