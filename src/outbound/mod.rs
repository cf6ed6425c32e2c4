//! Requests to URLs that the operator configured: workers, hooks and push services.
//!
//! [`Client`] sends one request, and says what its answer means: [`Outcome`]. [`Receiver`] signs a body as Standard
//! Webhooks and posts it. Neither repeats a request: the caller decides whether and when, with [`pause`].
//!
//! # Invariants
//! - Nothing is sent to an address that is not public, unless `allow` contains it. The address is checked after DNS, and
//!   only the checked one is connected to.
//! - Redirects are not followed: an answer 3xx is a failure.
//! - A request ends within its timeout, which covers DNS, connecting, TLS and the whole answer.
//! - Texts of failures contain neither secrets nor more of the URL than its host.

mod address;
mod connect;
mod sign;

use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri, header};
use hyper_util::{
    client::legacy,
    rt::{TokioExecutor, TokioTimer},
};
use tokio::time::timeout;

use crate::{
    config::{Network, SigningSecrets},
    runtime::{tls, unix_s},
};
use connect::{Connector, RefusedAddress};
use sign::Keys;

/// How long an unused connection is kept.
const IDLE: Duration = Duration::from_secs(30);

/// Unused connections that are kept.
const MAX_IDLE: usize = 32;

/// Interval of the pings on an HTTP/2 connection with open requests, and the timeout of their answers.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Most bytes of an answer that an HTTP/2 server may send before they are read.
const WINDOW: u32 = 64 * 1024;

/// Most bytes of an answer's headers.
const HEADER_BYTES: u32 = 64 * 1024;

/// Most bytes of a body without interest that are read all the same, and for how long.
const DISCARD_BYTES: usize = 16 * 1024;
const DISCARD_WITHIN: Duration = Duration::from_millis(200);

/// Longest `Retry-After` that is obeyed; longer ones count as this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// How a client's requests are bounded.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Ranges of addresses that may be reached although they are not public.
    pub allow: Vec<Network>,
    /// From the start of a request to the end of its answer.
    pub timeout: Duration,
    /// Most bytes of an answer's body. 0: the body is of no interest.
    pub answer_bytes: usize,
}

/// Sends requests, with a pool of connections of its own. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: legacy::Client<Connector, Full<Bytes>>,
    timeout: Duration,
    answer_bytes: usize,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The receiver accepted it: 2xx.
    Done { status: StatusCode, body: Bytes },
    /// The receiver refuses it, and would again.
    GiveUp(Fault),
    /// It may succeed later; not before `after`, if the receiver said when.
    Retry {
        fault: Fault,
        after: Option<Duration>,
    },
}

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// When the receiver wants to be asked again, if it says so.
    pub after: Option<Duration>,
    /// Its body, as far as that is of interest.
    pub body: Bytes,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The answer is not 2xx.
    #[error("the answer is {0}")]
    Status(StatusCode),
    /// No whole answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The answer's body has more bytes than are taken.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The host has no address that may be reached.
    #[error("{0}")]
    Address(String),
    /// No connection: nothing was sent.
    #[error("{0}")]
    Unconnected(String),
    /// The connection broke.
    #[error("{0}")]
    Unreachable(String),
}

impl Client {
    /// A client that connects when it has something to send.
    ///
    /// # Errors
    /// The system's certificate authorities can't be read.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let tls = tls(&[b"h2", b"http/1.1"])?;
        let connector = Connector::new(tls, limits.allow.into(), limits.timeout);
        let inner = legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_max_buf_size(HEADER_BYTES as usize)
            .http2_max_header_list_size(HEADER_BYTES)
            .http2_initial_stream_window_size(WINDOW)
            .http2_initial_connection_window_size(16 * WINDOW)
            // All requests share one connection: if its other end is gone, they must not all wait for TCP to notice.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .build(connector);
        Ok(Self {
            inner,
            timeout: limits.timeout,
            answer_bytes: limits.answer_bytes,
        })
    }

    /// Sends a request, and classifies the answer. Cancel-safe in so far as the receiver may have got it.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Outcome {
        match timeout(self.timeout, self.exchange(request, false)).await {
            Ok(Ok((status, headers, body))) => of_answer(status, &headers, body),
            // Another attempt would get as much.
            Ok(Err(fault @ Fault::TooLarge(_))) => Outcome::GiveUp(fault),
            Ok(Err(fault)) => Outcome::Retry { fault, after: None },
            Err(_elapsed) => Outcome::Retry {
                fault: Fault::Timeout(self.timeout),
                after: None,
            },
        }
    }

    /// Sends a request, and returns the answer for a caller who knows what it means.
    ///
    /// # Errors
    /// There is none. Only after [`Fault::Unconnected`] and [`Fault::Address`] it is certain that nothing was sent.
    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Result<Answer, Fault> {
        let answer = timeout(self.timeout, self.exchange(request, true)).await;
        let (status, headers, body) = answer.map_err(|_elapsed| Fault::Timeout(self.timeout))??;
        Ok(Answer {
            status,
            after: retry_after(&headers),
            body,
        })
    }

    /// `all`: bodies of refusals are of interest too.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        all: bool,
    ) -> Result<(StatusCode, HeaderMap, Bytes), Fault> {
        let answer = self.inner.request(request).await;
        let unsent = |error: legacy::Error| match unreachable(&error) {
            Fault::Unreachable(text) if error.is_connect() => Fault::Unconnected(text),
            fault => fault,
        };
        let (head, body) = answer.map_err(unsent)?.into_parts();
        if self.answer_bytes == 0 || !all && !head.status.is_success() {
            // A connection is used again only after its whole answer was read. If this does not end, it is closed.
            let body = Limited::new(body, DISCARD_BYTES).collect();
            let whole = timeout(DISCARD_WITHIN, body).await;
            tracing::trace!(
                whole = matches!(whole, Ok(Ok(_))),
                "the body of an answer is ignored"
            );
            return Ok((head.status, head.headers, Bytes::new()));
        }
        match Limited::new(body, self.answer_bytes).collect().await {
            Ok(body) => Ok((head.status, head.headers, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err(Fault::TooLarge(self.answer_bytes)),
            Err(error) => Err(unreachable(&*error)),
        }
    }
}

/// Signs and posts to one URL. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Receiver {
    client: Client,
    url: Uri,
    keys: Arc<Keys>,
}

impl Receiver {
    /// The receiver at `url`. URL and secrets were validated with the configuration.
    ///
    /// # Errors
    /// The system's certificate authorities can't be read.
    pub fn new(url: &str, secrets: &SigningSecrets, limits: Limits) -> io::Result<Self> {
        let keys = secrets.keys().map_err(io::Error::other)?;
        Ok(Self {
            client: Client::new(limits)?,
            url: url.parse().map_err(io::Error::other)?,
            keys: Arc::new(Keys::new(keys)),
        })
    }

    /// Posts a JSON body. A receiver recognises a repeated request by `id`, which must be ASCII without spaces and
    /// control characters.
    pub async fn post(&self, id: &str, body: Bytes) -> Outcome {
        let now = unix_s();
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(
                header::USER_AGENT,
                concat!("natter/", env!("CARGO_PKG_VERSION")),
            )
            .header("webhook-id", id)
            .header("webhook-timestamp", now)
            .header("webhook-signature", self.keys.sign(id, now, &body))
            .body(Full::new(body));
        match request {
            Ok(request) => self.client.send(request).await,
            Err(error) => Outcome::GiveUp(Fault::Unreachable(error.to_string())),
        }
    }
}

/// The pause before attempt `attempt + 1`, after `attempt` (1 or more) failed: doubled from `shortest` up to `longest`, with
/// jitter, and never shorter than what the receiver asked for.
#[must_use]
pub fn pause(
    attempt: u32,
    (shortest, longest): (Duration, Duration),
    after: Option<Duration>,
) -> Duration {
    let doubled = 1_u32.checked_shl(attempt.saturating_sub(1));
    let whole = doubled.and_then(|times| shortest.checked_mul(times));
    let whole = whole.unwrap_or(longest).min(longest);
    let own = whole.mul_f64(rand::random_range(0.5..1.0));
    own.max(after.unwrap_or_default())
}

fn of_answer(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Outcome {
    let fault = Fault::Status(status);
    match status {
        _ if status.is_success() => Outcome::Done { status, body },
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Outcome::Retry {
            fault,
            after: retry_after(headers),
        },
        _ if status.is_client_error() => Outcome::GiveUp(fault),
        _ => Outcome::Retry {
            fault,
            after: retry_after(headers),
        },
    }
}

/// `Retry-After`, in seconds or as a date, at most [`MAX_RETRY_AFTER`].
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_not_a_number) => {
            let at = httpdate::parse_http_date(text).ok()?;
            at.duration_since(std::time::SystemTime::now())
                .unwrap_or_default()
        }
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// A failure of the connection, with the innermost cause, which says most.
fn unreachable(error: &(dyn Error + 'static)) -> Fault {
    let mut cause = error;
    loop {
        if let Some(refused) = refused_address(cause) {
            return Fault::Address(refused.to_string());
        }
        match cause.source() {
            Some(deeper) => cause = deeper,
            None => return Fault::Unreachable(cause.to_string()),
        }
    }
}

/// The refusal, if `error` is one. The cause of an [`io::Error`] is not its own cause, but the cause's.
fn refused_address<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a RefusedAddress> {
    let inner = error.downcast_ref::<io::Error>()?.get_ref()?;
    inner.downcast_ref()
}

#[cfg(test)]
mod tests;
