//! From an HTTP request to a socket that a shard owns.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use fastwebsockets::upgrade::{is_upgrade_request, upgrade};

use super::{
    Shared,
    request::{HttpError, bearer},
    shard::hand_over_connection,
};
use crate::{
    auth::{AuthError, Identity},
    codec::{Codec, centrifugal::Form},
    http1,
    protocol::{Close, ErrorCode},
    runtime::unix_s,
    session::{Carried, UserSlot, answers::refusal_of},
    telemetry::metrics::{self, Counter, count},
};

/// Prefix of a token in the subprotocol list.
const BEARER: &str = "bearer.";

/// Connect a WebSocket, with the protocol `natter.v1`.
#[utoipa::path(
    get,
    path = "/ws",
    responses(
        (status = 101, description = "Upgraded. If a token in the subprotocol list is not valid, the close code 4001 follows"),
        (status = 400, description = "bad_request: the handshake is incomplete"),
        (status = 401, description = "unauthorized: the token in the header is not valid"),
        (status = 426, description = "bad_request: this is not a WebSocket handshake"),
        (status = 503, description = "unavailable: not ready, or draining"),
    ),
    security((), ("token" = []))
)]
pub(super) async fn websocket(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    connect(&shared, peer, request, Codec::Native)
}

/// Connect a WebSocket, with Centrifugo's client protocol.
///
/// JSON, or Protobuf with the subprotocol `centrifuge-protobuf`. The token is sent in the command `connect`.
#[utoipa::path(
    get,
    path = "/connection/websocket",
    responses(
        (status = 101, description = "Upgraded"),
        (status = 400, description = "bad_request: the handshake is incomplete"),
        (status = 426, description = "bad_request: this is no WebSocket handshake"),
        (status = 503, description = "unavailable: not ready, or draining"),
    ),
    security(())
)]
pub(super) async fn centrifugal(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    connect(&shared, peer, request, Codec::Centrifugal(Form::Json))
}

/// Connect a WebSocket, with STOMP 1.2, 1.1 or 1.0.
///
/// The token is sent as the passcode of the frame CONNECT, or in the header of the handshake.
#[utoipa::path(
    get,
    path = "/stomp",
    responses(
        (status = 101, description = "Upgraded"),
        (status = 400, description = "bad_request: the handshake is incomplete"),
        (status = 401, description = "unauthorized: the token in the header is not valid"),
        (status = 426, description = "bad_request: this is no WebSocket handshake"),
        (status = 503, description = "unavailable: not ready, or draining"),
    ),
    security((), ("token" = []))
)]
pub(super) async fn stomp(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    connect(&shared, peer, request, Codec::Stomp)
}

/// Upgrades a connection. Its protocol is `usual`, unless the client offers the subprotocol of another one that is served
/// at the same path.
fn connect(shared: &Arc<Shared>, peer: SocketAddr, mut request: Request, usual: Codec) -> Response {
    let refused = |reason| count(Counter::SessionRefused(reason), 1);
    if !is_upgrade_request(&request) {
        refused(metrics::Admission::BadHandshake);
        let text = match usual.subprotocols().first() {
            Some(name) => {
                &format!("this is a WebSocket endpoint: upgrade with the subprotocol {name}")
            }
            None => "this is a WebSocket endpoint",
        };
        return HttpError::with_status(StatusCode::UPGRADE_REQUIRED, ErrorCode::BadRequest, text)
            .into_response();
    }
    let ready = match shared.accepting() {
        Ok(ready) => ready,
        Err(error) => return error.into_response(),
    };
    let offered = Offered::read(request.headers(), usual);
    let mut close = None;
    let identity = match token(shared, request.headers(), &offered, usual) {
        Ok(identity) => identity,
        Err((Carrier::Header, error)) => {
            refused(metrics::Admission::BadToken);
            return HttpError::new(ErrorCode::Unauthorized, error.to_string()).into_response();
        }
        Err((Carrier::Subprotocol, error)) => {
            // A script in a browser can't see the status of a handshake, but it can see a close code.
            refused(metrics::Admission::BadToken);
            close = Some(refusal_of(&error));
            None
        }
    };
    let address = shared.admission.address(peer.ip());
    let user = identity
        .as_ref()
        .map(|identity| shared.admission.user(&identity.user));
    if address.is_none() || matches!(user, Some(None)) {
        close = close.or(Some(Close::TooMany));
    }
    let (mut response, upgraded) = match upgrade(&mut request) {
        Ok((response, upgraded)) => (response.map(Body::new), upgraded),
        Err(error) => {
            refused(metrics::Admission::BadHandshake);
            return HttpError::new(ErrorCode::BadRequest, error.to_string()).into_response();
        }
    };
    if let Some(name) = offered.name {
        response.headers_mut().insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static(name),
        );
    }
    let codec = offered.codec.unwrap_or(usual);
    let shard = ready.shards.next();
    let user = user.flatten().map(|slot| Box::new(slot) as UserSlot);
    let address = address.map(|slot| Box::new(slot) as UserSlot);
    let carried = Carried::new(&shared.config, codec, identity, user, address);
    tokio::spawn(async move {
        let upgraded = match upgraded.await {
            Ok(websocket) => websocket.into_inner().into_inner(),
            Err(error) => return tracing::debug!(%error, "a handshake was not finished"),
        };
        let Some((stream, first)) = http1::into_stream(upgraded) else {
            return tracing::error!("an upgraded connection is not a TCP stream");
        };
        hand_over_connection(shard, stream, (first, close, carried)).await;
    });
    response
}

/// How the token was sent.
enum Carrier {
    Header,
    Subprotocol,
}

/// The subprotocols that a client offers.
#[derive(Default)]
struct Offered {
    /// The first known protocol.
    codec: Option<Codec>,
    /// Its subprotocol.
    name: Option<&'static str>,
    token: Option<String>,
}

impl Offered {
    fn read(headers: &HeaderMap, usual: Codec) -> Self {
        let mut offered = Self::default();
        let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
        let words = lists
            .iter()
            .filter_map(|list| list.to_str().ok())
            .flat_map(|l| l.split(','));
        for word in words.map(str::trim) {
            if let Some(token) = word.strip_prefix(BEARER) {
                offered.token = Some(token.to_owned());
            } else {
                let known = usual.at_the_same_path().iter();
                let mut names = known.filter_map(|codec| {
                    let mut names = codec.subprotocols().iter();
                    Some((*codec, *names.find(|name| **name == word)?))
                });
                if let Some((codec, name)) = names.next()
                    && offered.codec.is_none_or(|it| it == codec)
                    && offered.name.is_none_or(|it| codec.prefers(name, it))
                {
                    (offered.codec, offered.name) = (Some(codec), Some(name));
                }
            }
        }
        offered
    }
}

/// The identity of the token that came with the handshake, if there was one.
fn token(
    shared: &Shared,
    headers: &HeaderMap,
    offered: &Offered,
    codec: Codec,
) -> Result<Option<Arc<Identity>>, (Carrier, AuthError)> {
    if codec.is_strict() {
        // The token comes with the first command.
        return Ok(None);
    }
    let verify = |token: &str| {
        let verified = match codec {
            Codec::Native => shared.verifier.verify(token, unix_s()),
            _ => shared.verifier.verify_centrifugal(token, unix_s()),
        };
        verified.map(Some)
    };
    if let Some(token) = bearer(headers) {
        return verify(token).map_err(|error| (Carrier::Header, error));
    }
    match &offered.token {
        Some(token) => verify(token).map_err(|error| (Carrier::Subprotocol, error)),
        None => Ok(None),
    }
}
