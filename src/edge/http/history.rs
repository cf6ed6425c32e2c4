//! History over HTTP: pages of rooms, and searches.

use std::{
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::Arc,
};

use axum::{
    Json,
    extract::{
        FromRequestParts, Path, Query,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tracing::Instrument as _;
use utoipa::IntoParams;

use crate::{
    auth::Identity,
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span, room_of},
    history::{self, Heads, PageRequest},
    model::RoomId,
    people::People,
    protocol::{ErrorCode, HistoryOf, HistoryReply, SearchFor, SearchReply},
    session::answers,
};

/// The authorized caller of a request, and what is needed to answer it.
pub(super) struct Asker {
    identity: Arc<Identity>,
    people: Arc<People>,
    history: Arc<history::Client>,
    headers: HeaderMap,
}

impl FromRequestParts<Api> for Asker {
    type Rejection = HttpError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, HttpError> {
        let identity = authorize(api, &parts.headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        Ok(Self {
            identity,
            people: Arc::clone(&ready.people),
            history: Arc::clone(&ready.history),
            headers: parts.headers.clone(),
        })
    }
}

impl Asker {
    async fn search(
        &self,
        room: Option<RoomId>,
        query: SearchQuery,
    ) -> Result<Json<SearchReply>, HttpError> {
        let query = SearchFor {
            text: query.q.unwrap_or_default(),
            from: query.from,
            mentions: query.mentions,
            reply_to: query.reply_to,
            before: query.before,
            limit: query.limit,
        };
        let (people, history) = (&self.people, &self.history);
        let found = answers::search(people, history, &self.identity, room, query).await?;
        Ok(Json(found))
    }
}

fn bad(text: impl Into<String>) -> HttpError {
    HttpError::new(ErrorCode::BadRequest, text)
}

fn query_of<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, HttpError> {
    let query = query.map_err(|error| bad(error.body_text()))?;
    Ok(query.0)
}

/// Which part of a room's history to read. At most one of `before`, `after` and `around` may be given: a cursor, or a
/// message as `<user>/<id>`, or `<id>` for an own one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// The messages before this one, without it.
    before: Option<String>,
    /// The messages after this one, without it. If empty, from the first message on.
    after: Option<String>,
    /// The messages around this one, with it.
    around: Option<String>,
    /// Only answers to this message, `<user>/<id>`, or `<id>` for an own one.
    thread: Option<String>,
    /// At most this many messages, 1 to 200; by default 50. Large messages may reduce the number.
    limit: Option<u64>,
    /// `asc` (default): the oldest of the page first; `desc`: the newest. The page is the same.
    order: Option<String>,
}

/// Read a page of a room's history.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/messages",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        PageQuery,
        ("if-none-match" = Option<String>, Header, description = "The ETag of an earlier answer to the same request"),
    ),
    responses(
        (status = 200, body = HistoryReply, description = "With an ETag, unless it is partial"),
        (status = 304, description = "No message was sent or changed in the room since then"),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request (also: the room keeps no history), bad_cursor, bad_id (also: there is no such message)"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn messages(
    asker: Asker,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Response, HttpError> {
    let span = command_span("history", &asker.headers);
    page(asker, room, query).instrument(span).await
}

async fn page(
    asker: Asker,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Response, HttpError> {
    let room = room_of(room)?;
    let query = query_of(query)?;
    let newest_first = match query.order.as_deref() {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(_) => return Err(bad("order must be asc or desc")),
    };
    answers::may_read_history(&asker.people, &asker.identity, &room).await?;
    let page = HistoryOf::new(
        query.before,
        query.after,
        query.around,
        query.limit,
        query.thread,
    )?;
    let request = PageRequest::new(room, &asker.identity.user, page)?;
    // The heads are read before the page, so a message that is stored in between leads to another tag next time.
    let heads = asker.history.heads(&request.room).await;
    let tag = heads.map(|heads| tag(&heads, &request, newest_first));
    if let Some(tag) = &tag
        && is_known(&asker.headers, tag)
    {
        return Ok((StatusCode::NOT_MODIFIED, caching(Some(tag))).into_response());
    }
    let mut reply = answers::history(&asker.history, &request).await?;
    if newest_first {
        reply.messages.reverse();
    }
    let tag = tag.filter(|_| !reply.partial);
    Ok((caching(tag.as_deref()), Json(reply)).into_response())
}

/// The `ETag` of an answer. It is weak: it identifies the content, not the bytes.
fn tag(heads: &[Heads], request: &PageRequest, newest_first: bool) -> String {
    let mut question = DefaultHasher::new();
    (request, newest_first).hash(&mut question);
    let heads = heads.iter().map(|heads| {
        let Heads {
            epoch,
            message,
            change,
        } = heads;
        format!("{epoch}.{message}.{change}.")
    });
    format!("W/\"{}{:x}\"", heads.collect::<String>(), question.finish())
}

/// An answer may be stored only for its user, and must be revalidated before each use.
fn caching(tag: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let private = HeaderValue::from_static("private, no-cache");
    headers.insert(header::CACHE_CONTROL, private);
    headers.insert(header::VARY, HeaderValue::from_static("authorization"));
    if let Some(tag) = tag.and_then(|tag| HeaderValue::from_str(tag).ok()) {
        headers.insert(header::ETAG, tag);
    }
    headers
}

/// Whether `If-None-Match` names the tag: weak comparison, lists, `*`. The tags of natter contain no comma.
fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    let lines = headers.get_all(header::IF_NONE_MATCH).iter();
    let mut given = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','));
    given.any(|given| given.trim() == "*" || opaque(given) == opaque(tag))
}

/// What to search for. A message must match everything that is given, and at least one thing must be given.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SearchQuery {
    /// Words, or in scripts without spaces (and Korean) parts of words; at most 256 characters.
    q: Option<String>,
    /// Sent by this user.
    from: Option<String>,
    /// Mentions this user.
    mentions: Option<String>,
    /// Answers this message, `<user>/<id>`; only when one room is searched.
    reply_to: Option<String>,
    /// `next` of the page before.
    before: Option<String>,
    /// At most this many messages, 1 to 100; by default 20.
    limit: Option<u64>,
}

/// Search the messages of a room.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/search",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        SearchQuery,
    ),
    responses(
        (status = 200, body = SearchReply),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request (also: nothing to search for; the room keeps no history), bad_cursor, bad_id"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: only the history service can search"),
    ),
    security(("token" = []))
)]
pub(super) async fn search_room(
    asker: Asker,
    room: Result<Path<String>, PathRejection>,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<SearchReply>, HttpError> {
    let span = command_span("search", &asker.headers);
    let search = async {
        let room = room_of(room)?;
        asker.search(Some(room), query_of(query)?).await
    };
    search.instrument(span).await
}

/// Search the messages of all rooms whose history the token may read.
#[utoipa::path(
    get,
    path = "/v1/search",
    params(SearchQuery),
    responses(
        (status = 200, body = SearchReply),
        (status = 400, body = ErrorBody, description = "bad_request (also: nothing to search for), bad_cursor"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden: the token grants history nowhere"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: only the history service can search"),
    ),
    security(("token" = []))
)]
pub(super) async fn search(
    asker: Asker,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<SearchReply>, HttpError> {
    let span = command_span("search", &asker.headers);
    let search = async { asker.search(None, query_of(query)?).await };
    search.instrument(span).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_known_in_lists_weakly_and_by_a_star() {
        let known = |lines: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::IF_NONE_MATCH, HeaderValue::from_static(line));
            }
            is_known(&headers, "W/\"k3.7.0.ab\"")
        };
        assert!(known(&["W/\"k3.7.0.ab\""]));
        assert!(known(&["\"k3.7.0.ab\""]));
        assert!(known(&["\"x\", W/\"k3.7.0.ab\""]));
        assert!(known(&["\"x\"", "\"y\",\"k3.7.0.ab\""]));
        assert!(known(&["*"]));
        assert!(!known(&[]));
        assert!(!known(&[""]));
        assert!(!known(&["k3.7.0.ab"]));
        assert!(!known(&["W/\"k3.7.1.ab\""]));
    }
}
