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
    shard::{NewSession, hand_over},
};
use crate::{
    auth::{AuthError, Identity},
    codec::Codec,
    http1,
    protocol::{Close, ErrorCode},
    runtime::unix_s,
    session::{Carried, UserSlot},
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
    mut request: Request,
) -> Response {
    let refused = |reason| count(Counter::SessionRefused(reason), 1);
    if !is_upgrade_request(&request) {
        refused(metrics::Admission::BadHandshake);
        let text = "this is a WebSocket endpoint: upgrade with the subprotocol natter.v1";
        return HttpError::with_status(StatusCode::UPGRADE_REQUIRED, ErrorCode::BadRequest, text)
            .into_response();
    }
    let Some(ready) = shared.ready.get().filter(|_| shared.lifecycle.is_ready()) else {
        refused(metrics::Admission::Draining);
        return HttpError::not_ready().into_response();
    };
    let offered = Offered::read(request.headers());
    let mut close = None;
    let identity = match token(&shared, request.headers(), &offered) {
        Ok(identity) => identity,
        Err((Carrier::Header, error)) => {
            refused(metrics::Admission::BadToken);
            return HttpError::new(ErrorCode::Unauthorized, error.to_string()).into_response();
        }
        Err((Carrier::Subprotocol, error)) => {
            // A script in a browser can't see the status of a handshake, but it can see a close code.
            refused(metrics::Admission::BadToken);
            close = Some(refusal(&error));
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
    if let Some(codec) = offered.codec {
        response.headers_mut().insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static(codec.subprotocol()),
        );
    }
    // A client that offers no known protocol is taken to speak `natter.v1`.
    let codec = offered.codec.unwrap_or_default();
    let shard = ready.shards.next();
    let user = user.flatten().map(|place| Box::new(place) as UserSlot);
    let address = address.map(|place| Box::new(place) as UserSlot);
    let carried = Carried::new(&shared.config, codec, identity, user, address);
    tokio::spawn(async move {
        let upgraded = match upgraded.await {
            Ok(websocket) => websocket.into_inner().into_inner(),
            Err(error) => return tracing::debug!(%error, "a handshake was not finished"),
        };
        let Some((stream, first)) = http1::into_stream(upgraded) else {
            return tracing::error!("an upgraded connection is not a TCP stream");
        };
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => return tracing::debug!(%error, "a connection was lost"),
        };
        let session = NewSession {
            stream,
            first,
            close,
            carried,
        };
        if !hand_over(shard, session).await {
            count(Counter::SessionRefused(metrics::Admission::Draining), 1);
        }
    });
    response
}

/// The close reason for a connection whose token is refused.
fn refusal(error: &AuthError) -> Close {
    match error {
        AuthError::Revoked => Close::Revoked,
        _ => Close::BadToken,
    }
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
    token: Option<String>,
}

impl Offered {
    fn read(headers: &HeaderMap) -> Self {
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
                offered.codec = offered.codec.or_else(|| Codec::of(word));
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
) -> Result<Option<Arc<Identity>>, (Carrier, AuthError)> {
    let verify = |token: &str| shared.verifier.verify(token, unix_s()).map(Some);
    if let Some(token) = bearer(headers) {
        return verify(token).map_err(|error| (Carrier::Header, error));
    }
    match &offered.token {
        Some(token) => verify(token).map_err(|error| (Carrier::Subprotocol, error)),
        None => Ok(None),
    }
}
