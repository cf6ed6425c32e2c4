//! Centrifugo's API for back ends: `POST /api/<method>`, authorised by a key.

use axum::{
    Json,
    body::Bytes,
    extract::{Path, Request, State},
    http::{HeaderMap, StatusCode, header},
};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use serde_json::value::RawValue;
use tracing::Instrument as _;

use super::publish::store;
use crate::{
    auth::Identity,
    codec::{
        Names,
        centrifugal::server::{self, Answer, Call, Post},
    },
    config::Config,
    edge::{
        Ready, Shared,
        request::{Api, ErrorBody, HttpError, MANY_BYTES, command_span, read_body},
    },
    history::PageRequest,
    model::RoomId,
    protocol::{ErrorCode, HistoryOf, HistoryReply, PageOf, PresenceReply, Refused},
    session::answers,
    subject::FROM_API,
};

/// Rooms of a broadcast that are published to at once.
const AT_ONCE: usize = 64;

/// The header of the key.
const KEY: &str = "x-api-key";

/// The result of a call.
type Outcome = Result<Box<RawValue>, Refused>;

/// Centrifugo's API for back ends, if `centrifugal.api_key` is set.
///
/// `method` is `publish`, `broadcast`, `history`, `presence`, `presence_stats`, `disconnect`, `unsubscribe`,
/// `subscribe`, `refresh` or `batch`. The key is given as `X-API-Key: <key>` or as `Authorization: apikey <key>`.
#[utoipa::path(
    post,
    path = "/api/{method}",
    params(("method" = String, Path, description = "The method")),
    request_body(content = Object, description = "The fields that Centrifugo documents for the method"),
    responses(
        (status = 200, body = Object, description = "{\"result\": …} or {\"error\": {code, message}} with the codes of Centrifugo; a batch: {\"replies\": […]}"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request: the body is not the JSON of the method"),
        (status = 401, body = ErrorBody, description = "unauthorized: no key, or a wrong one"),
        (status = 404, body = ErrorBody, description = "There is no such method, or no API"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 503, body = ErrorBody, description = "unavailable: this edge is not ready"),
    )
)]
pub(super) async fn call(
    State(api): State<Api>,
    Path(method): Path<String>,
    request: Request,
) -> Result<Json<Answer>, HttpError> {
    let (parts, body) = request.into_parts();
    let shared = &api.shared;
    if !has_key(&shared.config, &parts.headers) {
        let text = "the key of the API is missing or wrong: X-API-Key: <key>";
        return Err(HttpError::new(ErrorCode::Unauthorized, text));
    }
    let Some(method) = server::method(&method) else {
        let text = "there is no such method";
        let code = ErrorCode::BadRequest;
        return Err(HttpError::with_status(StatusCode::NOT_FOUND, code, text));
    };
    let ready = shared.ready.get().ok_or_else(HttpError::not_ready)?;
    let body = read_body(shared, body, MANY_BYTES).await?;
    let back_end = BackEnd { shared, ready };
    back_end.name_rooms();
    let call = decode(method, &body)?;
    let span = command_span(method, &parts.headers);
    let answer = Box::pin(back_end.answer(call)).instrument(span).await;
    Ok(Json(answer))
}

fn decode(method: &'static str, body: &Bytes) -> Result<Result<Call, Refused>, HttpError> {
    server::decode(method, body).map_err(|error| {
        let code = match error.is_json() {
            true => ErrorCode::BadRequest,
            false => ErrorCode::BadJson,
        };
        HttpError::new(code, error.to_string())
    })
}

/// Whether a request has the key of the API.
fn has_key(config: &Config, headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name)?.to_str().ok();
    let of_authorization = || {
        let (scheme, key) = text(header::AUTHORIZATION.as_str())?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("apikey").then(|| key.trim())
    };
    let key = text(KEY).or_else(of_authorization);
    key.is_some_and(|key| config.centrifugal.api_key.is(key))
}

/// Who calls, and what is needed to answer.
#[derive(Clone, Copy)]
struct BackEnd<'a> {
    shared: &'a Shared,
    ready: &'a Ready,
}

impl BackEnd<'_> {
    async fn answer(self, call: Result<Call, Refused>) -> Answer {
        match call {
            Ok(Call::Batch { calls, parallel }) => {
                let begin = |(method, call)| self.one_of_many(method, call).boxed();
                // Boxed and collected, since the compiler can't see otherwise that they may move between threads.
                let calls: Vec<BoxFuture<'_, _>> = calls.into_iter().map(begin).collect();
                let at_once = if parallel { AT_ONCE } else { 1 };
                Answer::of_all(stream::iter(calls).buffered(at_once).collect().await)
            }
            Ok(call) => Answer::of(self.carry_out(call).await),
            Err(refused) => Answer::of(Err(refused)),
        }
    }

    async fn one_of_many(
        self,
        method: &'static str,
        call: Result<Call, Refused>,
    ) -> (&'static str, Outcome) {
        let outcome = match call {
            Ok(call) => self.carry_out(call).await,
            Err(refused) => Err(refused),
        };
        (method, outcome)
    }

    async fn carry_out(self, call: Call) -> Outcome {
        match call {
            Call::Publish { channel, post } => self.publish(&channel, &post).await,
            Call::Broadcast { channels, post } => {
                let publishes = channels
                    .iter()
                    .map(|channel| self.publish(channel, &post).map(Answer::of).boxed());
                let publishes: Vec<BoxFuture<'_, _>> = publishes.collect();
                let responses = stream::iter(publishes).buffered(AT_ONCE).collect();
                Ok(server::broadcast(responses.await))
            }
            Call::History {
                room,
                page,
                reverse,
            } => self.history(room, page, reverse).await,
            Call::Presence(room) => {
                let presence = self.presence(room, PageOf::MAX).await?;
                Ok(server::presence(&presence))
            }
            Call::PresenceStats(room) => {
                let presence = self.presence(room, 1).await?;
                Ok(server::presence_stats(&presence))
            }
            Call::Order(order) => {
                if let Some(room) = order.room() {
                    answers::namespace(&self.shared.config, room)?;
                }
                let edges = self.ready.presence.edges();
                self.ready.orders.give(order, edges).await?;
                Ok(server::done())
            }
            Call::Batch { .. } => {
                let text = "a batch can't be in a batch";
                Err(Refused::new(ErrorCode::BadRequest, text))
            }
        }
    }

    /// Sets how rooms are named on this thread, of which there are several: to be called right before a name is read.
    fn name_rooms(self) {
        Names::Centrifugal.set_default(&self.shared.config.centrifugal.default_namespace);
    }

    async fn publish(self, channel: &str, post: &Post) -> Outcome {
        self.name_rooms();
        let publication = post.to(channel)?;
        let config = &self.shared.config;
        let room = &publication.room;
        if post.skip_history && answers::namespace(config, room)?.durable {
            let text = format!("skip_history: {room} keeps every message");
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        let user = post.user.as_deref().unwrap_or(FROM_API);
        let identity = Identity::of_back_end(user);
        let published = store(self.ready, &identity, &publication).await?;
        Ok(server::published(&published, &config.region()))
    }

    async fn history(self, room: RoomId, page: HistoryOf, reverse: bool) -> Outcome {
        let config = &self.shared.config;
        let identity = Identity::of_back_end(FROM_API);
        answers::may_read_history(&self.ready.people, &identity, &room).await?;
        let head = self.ready.shards.head(&room).await.ok_or_else(|| {
            let text = "the room's stream can't be read now";
            Refused::new(ErrorCode::Unavailable, text)
        })?;
        answers::check_epochs(&page.anchor, &head)?;
        let found = match page.limit {
            0 => HistoryReply::empty(room),
            _ => {
                let request = PageRequest::new(room, &identity.user, page)?;
                answers::history(&self.ready.history, &request).await?
            }
        };
        let found = HistoryReply {
            head: Some(head),
            own: Some(config.region()),
            ..found
        };
        Ok(server::page(&found, reverse))
    }

    async fn presence(self, room: RoomId, limit: usize) -> Result<PresenceReply, Refused> {
        let page = PageOf { after: None, limit };
        let identity = Identity::of_back_end(FROM_API);
        let (people, presence) = (&self.ready.people, &self.ready.presence);
        answers::presence(people, presence, &identity, room, &page).await
    }
}
