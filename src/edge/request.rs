//! What every HTTP request of a client needs: who asks, for which room, with what body; and refusals.

use std::{collections::HashMap, error::Error, sync::Arc, time::Instant};

use axum::{
    Json,
    body::{Body, Bytes, to_bytes},
    extract::{Path, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::LengthLimitError;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use utoipa::ToSchema;

use super::{Ready, Shared};
use crate::{
    auth::Identity,
    http1::LAST_STEP,
    model::RoomId,
    protocol::{ErrorCode, Refused},
    runtime::{Pace, Phase, unix_s},
    subject,
    telemetry::{
        self,
        metrics::{Admission, Counter, count},
    },
};

/// Maximum size of an HTTP publish besides its body, for ids and mentions; also of other small request bodies.
pub(super) const ENVELOPE_BYTES: u64 = 64 * 1024;

/// Maximum size of a request with many messages.
pub(super) const MANY_BYTES: u64 = 4 * 1024 * 1024;

/// Number of users with a remembered request rate, at which the idle ones are forgotten.
const MAX_PACES: usize = 10_000;

/// State of the routes.
#[derive(Debug, Clone)]
pub(super) struct Api {
    pub(super) shared: Arc<Shared>,
    pub(super) paces: Arc<Mutex<HashMap<Arc<str>, Pace>>>,
}

impl axum::extract::FromRef<Api> for Arc<Shared> {
    fn from_ref(api: &Api) -> Self {
        Arc::clone(&api.shared)
    }
}

impl Shared {
    /// The parts of the edge, if it accepts new sessions. Counts the refusal if not.
    pub(super) fn accepting(&self) -> Result<&Ready, HttpError> {
        let ready = self.ready.get().filter(|_| self.lifecycle.is_ready());
        ready.ok_or_else(|| {
            count(Counter::SessionRefused(Admission::Draining), 1);
            HttpError::not_ready()
        })
    }
}

/// A refusal over HTTP.
#[derive(Debug)]
pub(super) struct HttpError {
    status: StatusCode,
    code: ErrorCode,
    message: String,
    retry_after_ms: Option<u64>,
}

/// Body of a refusal.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// One of the error codes of the protocol.
    #[schema(example = "forbidden")]
    code: &'static str,
    /// What was wrong, for people.
    message: String,
    /// Whether the same request may succeed later.
    retry: bool,
    /// After how many ms, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

impl HttpError {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let status =
            StatusCode::from_u16(code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::with_status(status, code, message)
    }

    pub(super) fn with_status(
        status: StatusCode,
        code: ErrorCode,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after_ms: None,
        }
    }

    /// The body of the answer. The refusal is counted.
    pub(super) fn into_body(self) -> ErrorBody {
        count(Counter::CommandRefused(self.code), 1);
        ErrorBody {
            code: self.code.as_str(),
            message: self.message,
            retry: self.code.retry(),
            retry_after_ms: self.retry_after_ms,
        }
    }

    pub(super) fn not_ready() -> Self {
        Self::new(ErrorCode::Unavailable, "this edge is not ready")
    }
}

impl From<Refused> for HttpError {
    fn from(refused: Refused) -> Self {
        Self {
            retry_after_ms: refused.retry_after_ms,
            ..Self::new(refused.code, refused.message)
        }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let (status, code) = (self.status, self.code);
        let seconds = self.retry_after_ms.map_or(1, |ms| ms.div_ceil(1000));
        let mut response = (status, Json(self.into_body())).into_response();
        let headers = response.headers_mut();
        if code.retry() {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from(seconds));
        }
        if code == ErrorCode::Timeout {
            // The rest of the request may still arrive, so the connection can't be used again.
            headers.insert(
                header::CONNECTION,
                header::HeaderValue::from_static("close"),
            );
        }
        response
    }
}

/// The token of an `Authorization: Bearer` header. Empty if the header contains no token; this is refused later.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Checks the token in the header of a request.
pub(super) fn authorize(api: &Api, headers: &HeaderMap) -> Result<Arc<Identity>, HttpError> {
    let token = bearer(headers).ok_or_else(|| {
        unauthorized("the header Authorization: Bearer <token> is missing".into())
    })?;
    admit(api, token)
}

fn unauthorized(message: String) -> HttpError {
    HttpError::new(ErrorCode::Unauthorized, message)
}

/// Checks a token, and that its user does not send more requests than allowed.
pub(super) fn admit(api: &Api, token: &str) -> Result<Arc<Identity>, HttpError> {
    let identity = api
        .shared
        .verifier
        .verify(token, unix_s())
        .map_err(|error| unauthorized(error.to_string()))?;
    within_pace(api, &identity.user)?;
    Ok(identity)
}

/// Counts one more command of a user.
pub(super) fn within_pace(api: &Api, user: &Arc<str>) -> Result<(), Refused> {
    let limits = &api.shared.config.limits;
    let now = Instant::now();
    let mut paces = api.paces.lock();
    if paces.len() >= MAX_PACES {
        paces.retain(|_, pace| !pace.is_idle(now));
    }
    let pace = paces
        .entry(Arc::clone(user))
        .or_insert_with(|| Pace::new(now));
    if !pace.take(now, limits.commands_per_second, limits.commands_burst) {
        let limit = limits.commands_per_second;
        let text = format!("more than {limit} requests per second");
        return Err(Refused::new(ErrorCode::RateLimited, text));
    }
    Ok(())
}

/// The span of one request. It continues the client's trace.
pub(super) fn command_span(op: &'static str, headers: &HeaderMap) -> tracing::Span {
    let span = tracing::debug_span!("command", op);
    let parent = headers.get(subject::header::TRACEPARENT);
    if let Some(parent) = parent.and_then(|value| value.to_str().ok()) {
        telemetry::set_remote_parent(&span, parent);
    }
    span
}

/// The room that a path names.
pub(super) fn room_of(path: Result<Path<String>, PathRejection>) -> Result<RoomId, HttpError> {
    let bad = |text: String| HttpError::new(ErrorCode::BadRoom, text);
    // This fails only if the decoded path is not UTF-8.
    let Path(room) = path.map_err(|error| bad(error.body_text()))?;
    RoomId::parse(&room).map_err(|error| bad(error.to_string()))
}

/// The room that a path names, and what stands after it.
pub(super) fn room_and_name(
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<(RoomId, String), HttpError> {
    let Path((room, name)) =
        path.map_err(|error| HttpError::new(ErrorCode::BadRequest, error.body_text()))?;
    let room = RoomId::parse(&room)
        .map_err(|error| HttpError::new(ErrorCode::BadRoom, error.to_string()))?;
    Ok((room, name))
}

/// The fields of a JSON body.
pub(super) fn json_of<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, HttpError> {
    serde_json::from_slice(body).map_err(|error| {
        let code = match error.is_data() {
            true => ErrorCode::BadRequest,
            false => ErrorCode::BadJson,
        };
        HttpError::new(code, error.to_string())
    })
}

/// Reads the body of a request: at most `most` bytes, within `http.body_timeout`, and at most [`LAST_STEP`] after the
/// edge began to drain.
pub(super) async fn read_body(shared: &Shared, body: Body, most: u64) -> Result<Bytes, HttpError> {
    let within = shared.config.http.body_timeout;
    let drained = async {
        shared.lifecycle.reached(Phase::Draining).await;
        sleep(LAST_STEP).await;
    };
    let refused = |code, text: String| Err(HttpError::new(code, text));
    tokio::select! {
        read = to_bytes(body, usize::try_from(most).unwrap_or(usize::MAX)) => match read {
            Ok(body) => Ok(body),
            Err(error) if error.source().is_some_and(|error| error.is::<LengthLimitError>()) => {
                refused(ErrorCode::TooLarge, format!("the request has more than {most} bytes"))
            }
            Err(error) => {
                refused(ErrorCode::BadRequest, format!("the body of the request is broken: {error}"))
            }
        },
        () = sleep(within) => {
            refused(ErrorCode::Timeout, format!("the body did not arrive within {within:?}"))
        }
        () = drained => {
            refused(ErrorCode::Timeout, "this edge is draining, and the body has not arrived".to_owned())
        }
    }
}
