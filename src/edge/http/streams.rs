//! Messages without a WebSocket: `text/event-stream` and long polling.
//!
//! A response that goes on is not written by hyper: after the head, the socket is handed to a shard, as that of a
//! WebSocket is.

use std::{
    future::pending,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json,
    body::Bytes,
    extract::{ConnectInfo, Path, Query, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::oneshot, time::timeout};
use tracing::Instrument as _;
use utoipa::{IntoParams, ToSchema};

use crate::{
    auth::{Identity, Right},
    codec::Codec,
    edge::{
        Ready, Shared,
        request::{Api, ErrorBody, HttpError, admit, authorize, bearer, command_span, room_of},
        shard::{Arrival, ToShard, hand_over, hand_over_connection},
        streams,
    },
    http1::Takeover,
    model::RoomId,
    protocol::{ErrorCode, PollReply, Refused, Wants},
    runtime::Phase,
    session::{
        Carried, Poll, Stream, UserSlot,
        answers::{admitted, cursor_of, may_see_presence, namespace},
    },
    telemetry::metrics::{self, Counter, count},
    wire::Positions,
};

/// Rooms of one stream of events. The id of each event has a cursor for each of them, and browsers send it in a header.
const MAX_ROOMS: usize = 32;

/// How long a poll waits by default, and at most.
const WAIT: Duration = Duration::from_secs(25);
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The header of the cursor in an answer without messages.
const CURSOR: &str = "cursor";

/// How long a client may take to take the head of a response. It is far smaller than any buffer.
const HEAD_WITHIN: Duration = Duration::from_secs(1);

/// After this time without an acknowledgement of the peer's kernel, the connection of a stream is broken. Such a peer
/// sends nothing that would be missed.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// The head of a response that goes on until the connection ends, without the type of its content.
const HEAD: &str = "HTTP/1.1 200 OK\r\nCache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\nConnection: close\r\n";

/// How long a browser waits before it opens a stream again.
const RETRY: &str = "retry: 1000\n\n";

/// What a stream of events or a poll is asked for. A `room` may be given several times.
#[derive(Debug, Default, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct StreamQuery {
    /// In `/v1/events`: a room, e.g. chat:lobby; given once or several times, at most 32 rooms.
    #[param(required = false)]
    room: Vec<String>,
    /// Where the client stands: the id of the last event, or the cursor of the last poll.
    since: Option<String>,
    /// A ticket in place of the token: see `POST /v1/tickets`.
    ticket: Option<String>,
    /// `true`: also tell who joins and leaves. Not for a poll.
    presence: bool,
    /// `true`: also tell who has read how far. Not for a poll.
    read: bool,
    /// Of a poll: how long to wait if there is no message, e.g. 25s; at most 60s.
    wait: Option<String>,
}

pub(super) fn bad(text: impl Into<String>) -> HttpError {
    HttpError::new(ErrorCode::BadRequest, text)
}

impl StreamQuery {
    fn parse(uri: &Uri) -> Result<Self, HttpError> {
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(uri);
        let Query(pairs) = pairs.map_err(|error| bad(error.body_text()))?;
        let mut query = Self::default();
        for (name, value) in pairs {
            let yes = || match &*value {
                "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                _ => Err(bad(format!("{name} is {value:?}: true or false"))),
            };
            match &*name {
                "presence" => query.presence = yes()?,
                "read" => query.read = yes()?,
                "room" => query.room.push(value),
                "since" => query.since = Some(value),
                "ticket" => query.ticket = Some(value),
                "wait" => query.wait = Some(value),
                _ => {}
            }
        }
        Ok(query)
    }

    /// How long a poll waits.
    fn wait(&self) -> Result<Duration, HttpError> {
        let Some(wait) = &self.wait else {
            return Ok(WAIT);
        };
        let parsed = humantime::parse_duration(wait)
            .map_err(|error| bad(format!("wait is {wait:?}: {error}")))?;
        Ok(parsed.min(MAX_WAIT))
    }

    fn wants(&self) -> Wants {
        Wants {
            typing: true,
            presence: self.presence,
            read: self.read,
        }
    }
}

/// Who asks: by a token in the header, or by a ticket.
async fn identify(
    api: &Api,
    ready: &Ready,
    headers: &HeaderMap,
    query: &StreamQuery,
) -> Result<Arc<Identity>, HttpError> {
    match (&query.ticket, bearer(headers)) {
        (Some(ticket), None) => {
            let token = streams::token_of(&api.shared, ready, ticket).await?;
            let token = token.ok_or_else(|| {
                let text = "the ticket is not known: it has expired, or its edge is gone";
                HttpError::new(ErrorCode::Unauthorized, text)
            })?;
            admit(api, &token)
        }
        _ => authorize(api, headers),
    }
}

/// The places of a user and of an address.
pub(super) type Places = (Option<UserSlot>, UserSlot);

/// Takes a place for a user and an address, as a session does.
pub(super) fn places(
    shared: &Shared,
    user: Option<&Identity>,
    peer: SocketAddr,
) -> Result<Places, HttpError> {
    let limited = |what| HttpError::new(ErrorCode::Limit, format!("{what} has too many sessions"));
    let address = shared.admission.address(peer.ip());
    let address = address.ok_or_else(|| limited("this address"))?;
    let user = user.map(|identity| shared.admission.user(&identity.user));
    let user = match user {
        Some(None) => return Err(limited("this user")),
        Some(Some(slot)) => Some(Box::new(slot) as UserSlot),
        None => None,
    };
    Ok((user, Box::new(address)))
}

/// Writes the head of a response, and hands the connection to a shard. Returns only if that can't be done: otherwise the
/// request ends with its connection.
pub(super) async fn begin(
    parts: &Parts,
    shard: ToShard,
    (content_type, first): (&str, &str),
    (carried, commands): (Carried, Bytes),
) -> Result<Response, HttpError> {
    let takeover = parts.extensions.get::<Takeover<TcpStream>>();
    let stream = match takeover {
        Some(takeover) => takeover.take().await,
        None => None,
    };
    let Some(mut stream) = stream else {
        count(Counter::SessionRefused(metrics::Admission::BadHandshake), 1);
        let text = "the answers to earlier requests of this connection were not read";
        return Err(HttpError::new(ErrorCode::Unavailable, text));
    };
    let date = httpdate::fmt_http_date(SystemTime::now());
    let head = format!("{HEAD}Content-Type: {content_type}\r\nDate: {date}\r\n\r\n{first}");
    tokio::spawn(async move {
        let written = timeout(HEAD_WITHIN, stream.write_all(head.as_bytes())).await;
        if !matches!(written, Ok(Ok(()))) {
            return tracing::debug!("a connection was lost");
        }
        let unacknowledged = u32::try_from(UNACKNOWLEDGED.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(&stream, unacknowledged) {
            tracing::debug!(%error, "a vanished client will be noticed late");
        }
        hand_over_connection(shard, stream, (commands, None, carried)).await;
    });
    pending().await
}

/// The edge, if it accepts sessions, and the method is the one that a stream is asked for with.
pub(super) fn ready_for<'a>(
    shared: &'a Shared,
    parts: &Parts,
    method: &Method,
) -> Result<&'a Ready, HttpError> {
    // Axum routes HEAD as GET.
    if parts.method != method {
        let text = "this is not for that method";
        let status = StatusCode::METHOD_NOT_ALLOWED;
        return Err(HttpError::with_status(status, ErrorCode::BadRequest, text));
    }
    shared.accepting()
}

/// Follow a room as `text/event-stream`.
///
/// The name of an event is the `op` of a push of `natter.v1`, its data is the push, and its id is the cursor. The first
/// event is `joined`. If the room can't be joined, the event is `refused`; the last event of a stream that the server ends
/// is `close`. `Last-Event-ID` goes before `since`.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/events",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("last-event-id" = Option<String>, Header, description = "The id of the last event; a browser sends it"),
        StreamQuery,
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = String),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request, bad_cursor"),
        (status = 401, body = ErrorBody, description = "unauthorized: also if the ticket is not known any more"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, or limit: too many sessions"),
        (status = 503, body = ErrorBody, description = "unavailable: not ready, or draining"),
    ),
    security(("token" = []))
)]
pub(super) async fn events_of_room(
    State(api): State<Api>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    room: Result<Path<String>, PathRejection>,
    parts: Parts,
) -> Result<Response, HttpError> {
    let room = room_of(room)?;
    let query = StreamQuery::parse(&parts.uri)?;
    let since = last_event_id(&parts.headers)?.or_else(|| query.since.clone());
    follow(api, peer, &parts, query, vec![(room, since)]).await
}

/// Follow several rooms as `text/event-stream`. The ids of events are opaque: each says where the client stands in all of
/// the rooms.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(
        ("last-event-id" = Option<String>, Header, description = "The id of the last event; a browser sends it"),
        StreamQuery,
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = String),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request, bad_cursor"),
        (status = 401, body = ErrorBody, description = "unauthorized: also if the ticket is not known any more"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, or limit: too many sessions"),
        (status = 503, body = ErrorBody, description = "unavailable: not ready, or draining"),
    ),
    security(("token" = []))
)]
pub(super) async fn events(
    State(api): State<Api>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    parts: Parts,
) -> Result<Response, HttpError> {
    let query = StreamQuery::parse(&parts.uri)?;
    let since = last_event_id(&parts.headers)?.or_else(|| query.since.clone());
    let mut rooms: Vec<RoomId> = Vec::new();
    for name in &query.room {
        let room = RoomId::parse(name);
        let room = room.map_err(|error| HttpError::new(ErrorCode::BadRoom, error.to_string()))?;
        if !rooms.contains(&room) {
            rooms.push(room);
        }
    }
    match rooms.len() {
        0 => return Err(bad("room is missing")),
        1..=MAX_ROOMS => {}
        _ => {
            let text = format!("a stream may have {MAX_ROOMS} rooms");
            return Err(HttpError::new(ErrorCode::Limit, text));
        }
    }
    let positions = match &since {
        None => Vec::new(),
        Some(id) if rooms.len() == 1 && !id.contains('~') => vec![(rooms[0].as_str(), &**id)],
        Some(id) => Positions::parse(id).ok_or_else(|| {
            let text = "since is not the id of an event of several rooms";
            HttpError::new(ErrorCode::BadCursor, text)
        })?,
    };
    let place = |room: &RoomId| {
        let place = positions.iter().find(|(name, _)| *name == room.as_str());
        place.map(|(_, at)| (*at).to_owned())
    };
    let rooms = rooms.iter().map(|room| (room.clone(), place(room)));
    let rooms = rooms.collect();
    follow(api, peer, &parts, query, rooms).await
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<String>, HttpError> {
    let id = headers.get("last-event-id").map(HeaderValue::to_str);
    let id = id.transpose().map_err(|_not_ascii| {
        HttpError::new(
            ErrorCode::BadCursor,
            "Last-Event-ID is not an id of an event",
        )
    })?;
    Ok(id.filter(|id| !id.is_empty()).map(str::to_owned))
}

async fn follow(
    api: Api,
    peer: SocketAddr,
    parts: &Parts,
    query: StreamQuery,
    rooms: Vec<(RoomId, Option<String>)>,
) -> Result<Response, HttpError> {
    let (shared, config) = (&api.shared, &api.shared.config);
    let ready = ready_for(shared, parts, &Method::GET)?;
    let identity = identify(&api, ready, &parts.headers, &query).await?;
    for (room, since) in &rooms {
        check(ready, &identity, room).await?;
        if query.presence {
            may_see_presence(&ready.people, &identity, room).await?;
        }
        since.as_deref().map(cursor_of).transpose()?;
    }
    let limit = config.limits.rooms_per_session;
    if rooms.len() > limit {
        let text = format!("a session may be in {limit} rooms");
        return Err(HttpError::new(ErrorCode::Limit, text));
    }
    let (user, address) = places(shared, Some(&identity), peer)?;
    let shard = match rooms.first() {
        Some((room, _)) => ready.shards.of_room(room),
        None => ready.shards.next(),
    };
    let stream = Stream {
        address: None,
        commands: None,
        rooms,
        known: None,
    };
    let carried = Carried::new(config, Codec::Events, Some(identity), user, Some(address));
    let carried = carried.streaming(stream, query.wants());
    let begun = (carried, Bytes::new());
    begin(parts, shard, ("text/event-stream", RETRY), begun).await
}

/// Checks that a user may receive the messages of a room. Returns whether it has a log.
async fn check(ready: &Ready, identity: &Identity, room: &RoomId) -> Result<bool, Refused> {
    let durable = namespace(ready.people.config(), room)?.durable;
    admitted(&ready.people, identity, Right::Read, room).await?;
    Ok(durable)
}

/// Wait for the messages after a cursor.
///
/// Without `since`, the answer is the cursor of the room, at once. Polls lose nothing between them, on any edge.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/poll",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        StreamQuery,
    ),
    responses(
        (status = 200, body = PollReply),
        (status = 204, description = "There was no message. The header cursor has the cursor for the next poll"),
        (status = 400, body = ErrorBody, description = "bad_room, bad_cursor, bad_request; also for a room that is not durable"),
        (status = 401, body = ErrorBody, description = "unauthorized: also if the ticket is not known any more"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, or limit: too many sessions"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn poll(
    State(api): State<Api>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    room: Result<Path<String>, PathRejection>,
    parts: Parts,
) -> Result<Response, HttpError> {
    let span = command_span("poll", &parts.headers);
    wait_for(api, peer, room, parts).instrument(span).await
}

async fn wait_for(
    api: Api,
    peer: SocketAddr,
    room: Result<Path<String>, PathRejection>,
    parts: Parts,
) -> Result<Response, HttpError> {
    let (shared, config) = (&api.shared, &api.shared.config);
    let ready = ready_for(shared, &parts, &Method::GET)?;
    let room = room_of(room)?;
    let query = StreamQuery::parse(&parts.uri)?;
    let identity = identify(&api, ready, &parts.headers, &query).await?;
    if !check(ready, &identity, &room).await? {
        let text = format!("{room} is not durable: what is sent between two polls would be lost");
        return Err(bad(text));
    }
    let since = query.since.as_deref().map(cursor_of).transpose()?;
    let wait = query.wait()?;
    let _places = places(shared, Some(&identity), peer)?;
    let outbox = usize::try_from(config.limits.outbox.as_u64()).unwrap_or(usize::MAX);
    let poll = Poll {
        identity,
        room,
        since,
        wait,
        most: outbox / 2,
    };
    let shard = ready.shards.of_room(&poll.room);
    let (answer, answered) = oneshot::channel();
    let lost = || HttpError::not_ready();
    if !hand_over(shard, Arrival::Poll(Box::new(poll), answer)).await {
        return Err(lost());
    }
    let takeover = parts.extensions.get::<Takeover<TcpStream>>();
    let gone = async {
        match takeover {
            Some(takeover) => takeover.peer_ended().await,
            None => pending().await,
        }
    };
    tokio::select! {
        answered = answered => Ok(answer_of(answered.map_err(|_ended| lost())??)),
        // It takes no answer, or it has sent all and still reads.
        () = gone => Ok(without_messages(query.since.as_deref().unwrap_or_default())),
        // The client polls again, elsewhere.
        _ = shared.lifecycle.reached(Phase::Draining) => match query.since {
            Some(cursor) => Ok(without_messages(&cursor)),
            None => Err(lost()),
        },
    }
}

fn answer_of(reply: PollReply) -> Response {
    match &reply.cursor {
        Some(cursor) if reply.messages.is_empty() && !reply.reset => without_messages(cursor),
        _ => Json(reply).into_response(),
    }
}

fn without_messages(cursor: &str) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    // A cursor has no characters that a header can't have.
    if let Ok(cursor) = HeaderValue::from_str(cursor) {
        response.headers_mut().insert(CURSOR, cursor);
    }
    response
}

/// A ticket.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TicketReply {
    /// Stands for the token in the query of a stream of events or a poll.
    ticket: String,
    /// For how many seconds it can be used, as often as needed.
    expires_in: u64,
}

/// Get a ticket, which stands for the token in a URL.
///
/// Browsers can't send a header with an `EventSource`, and URLs end up in logs.
#[utoipa::path(
    post,
    path = "/v1/tickets",
    responses(
        (status = 200, body = TicketReply),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 429, body = ErrorBody, description = "rate_limited, or limit: too many tickets at once"),
    ),
    security(("token" = []))
)]
pub(super) async fn ticket(
    State(api): State<Api>,
    headers: HeaderMap,
) -> Result<Json<TicketReply>, HttpError> {
    authorize(&api, &headers)?;
    let (shared, ttl) = (&api.shared, api.shared.config.auth.ticket_ttl);
    let token = bearer(&headers).unwrap_or_default();
    let ticket = shared.streams.ticket(&shared.id, token, ttl);
    let (ticket, left) = ticket.ok_or_else(|| {
        HttpError::new(ErrorCode::Limit, "this edge has given out too many tickets")
    })?;
    Ok(Json(TicketReply {
        ticket,
        expires_in: left.as_secs(),
    }))
}
