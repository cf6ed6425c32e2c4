//! The transports of Centrifugo's clients besides the WebSocket: `http_stream` and `sse`. Their further commands come in
//! requests of their own.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, Query, Request, State},
    http::{HeaderMap, Method, StatusCode, header, request::Parts},
    response::Response,
};
use prost::Message as _;
use serde::Deserialize;
use utoipa::IntoParams;

use super::streams::{Places, bad, begin, places, ready_for};
use crate::{
    codec::{
        Codec,
        centrifugal::{EmulationRequest, Form},
    },
    edge::{
        Ready, Shared,
        request::{ENVELOPE_BYTES, ErrorBody, HttpError, read_body},
        streams::{self, Delivered},
    },
    protocol::{ErrorCode, Wants},
    session::{Carried, Stream},
};

/// Connect a client of Centrifugo's protocol whose transport is `http_stream`.
///
/// The body has the first commands: JSON, or Protobuf as `application/octet-stream`. Further commands: `/emulation`.
#[utoipa::path(
    post,
    path = "/connection/http_stream",
    request_body = String,
    responses(
        (status = 200, description = "Replies and pushes: JSON in lines, or Protobuf messages after their lengths"),
        (status = 429, body = ErrorBody, description = "limit: too many sessions"),
        (status = 503, body = ErrorBody, description = "unavailable: not ready, or draining"),
    ),
    security(())
)]
pub(super) async fn http_stream(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Result<Response, HttpError> {
    let (parts, body) = request.into_parts();
    let ready = ready_for(&shared, &parts, &Method::POST)?;
    // Before its body takes memory.
    let places = places(&shared, None, peer)?;
    let binary = is_binary(&parts.headers);
    let body = read_body(&shared, body, shared.config.limits.frame.as_u64()).await?;
    if !binary && std::str::from_utf8(&body).is_err() {
        return Err(bad("the commands are not UTF-8"));
    }
    let (form, content_type) = match binary {
        true => (Form::ProtobufStream, "application/octet-stream"),
        false => (Form::JsonStream, "application/json"),
    };
    connect((&shared, ready), places, &parts, (form, content_type), body).await
}

/// The query of a connection whose transport is `sse`.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SseQuery {
    /// The first commands, as JSON.
    cf_connect: String,
}

/// Connect a client of Centrifugo's protocol whose transport is `sse`. Further commands: `/emulation`.
#[utoipa::path(
    get,
    path = "/connection/sse",
    params(SseQuery),
    responses(
        (status = 200, content_type = "text/event-stream", body = String),
        (status = 400, body = ErrorBody, description = "bad_request: cf_connect is missing"),
        (status = 429, body = ErrorBody, description = "limit: too many sessions"),
        (status = 503, body = ErrorBody, description = "unavailable: not ready, or draining"),
    ),
    security(())
)]
pub(super) async fn sse(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    parts: Parts,
) -> Result<Response, HttpError> {
    let ready = ready_for(&shared, &parts, &Method::GET)?;
    let query = Query::<SseQuery>::try_from_uri(&parts.uri);
    let Query(SseQuery { cf_connect }) = query.map_err(|error| bad(error.body_text()))?;
    let form = (Form::Events, "text/event-stream");
    let places = places(&shared, None, peer)?;
    connect((&shared, ready), places, &parts, form, cf_connect.into()).await
}

fn is_binary(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/octet-stream"))
}

/// Opens a session of Centrifugo's protocol whose frames go into the response.
async fn connect(
    (shared, ready): (&Shared, &Ready),
    (user, address): Places,
    parts: &Parts,
    (form, content_type): (Form, &str),
    commands: Bytes,
) -> Result<Response, HttpError> {
    let (stream_address, further, known) = shared.streams.open(&shared.id);
    let stream = Stream {
        address: Some(stream_address),
        commands: Some(further),
        rooms: Vec::new(),
        known: Some(Box::new(known)),
    };
    let codec = Codec::Centrifugal(form);
    let carried = Carried::new(&shared.config, codec, None, user, Some(address));
    let carried = carried.streaming(stream, Wants::default());
    let head = (content_type, "");
    begin(parts, ready.shards.next(), head, (carried, commands)).await
}

/// Send further commands to a session of Centrifugo's protocol whose transport is `http_stream` or `sse`. They are
/// answered in its stream.
#[utoipa::path(
    post,
    path = "/emulation",
    request_body = String,
    responses(
        (status = 204, description = "Taken, or the session has ended: its stream ends then"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request"),
        (status = 404, body = ErrorBody, description = "bad_request: the edge of the session is not there"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 503, body = ErrorBody, description = "unavailable: the session or its edge does not take them now"),
    ),
    security(())
)]
pub(super) async fn emulation(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<StatusCode, HttpError> {
    let ready = shared.ready.get().ok_or_else(HttpError::not_ready)?;
    let (parts, body) = request.into_parts();
    // Commands are a string in JSON, so they are longer there.
    let most = 2 * shared.config.limits.frame.as_u64() + ENVELOPE_BYTES;
    let body = read_body(&shared, body, most).await?;
    let request = match is_binary(&parts.headers) {
        true => EmulationRequest::decode(body).map_err(|error| bad(error.to_string()))?,
        false => serde_json::from_slice::<EmulationRequest>(&body)
            .map_err(|error| HttpError::new(ErrorCode::BadJson, error.to_string()))?,
    };
    for (name, value) in [("node", &request.node), ("session", &request.session)] {
        if value.is_empty() {
            return Err(bad(format!("{name} is missing")));
        }
    }
    let limit = shared.config.limits.frame.as_u64();
    if request.data.len() as u64 > limit {
        let text = format!("the commands have more than {limit} bytes");
        return Err(HttpError::new(ErrorCode::TooLarge, text));
    }
    match streams::deliver(&shared, ready, request).await? {
        Some(Delivered::Taken | Delivered::Gone) => Ok(StatusCode::NO_CONTENT),
        Some(Delivered::Busy) => {
            let text = "the session is busy with earlier commands";
            Err(HttpError::new(ErrorCode::Unavailable, text))
        }
        None => {
            let text = "the edge of the session is not there";
            let status = StatusCode::NOT_FOUND;
            Err(HttpError::with_status(status, ErrorCode::BadRequest, text))
        }
    }
}
