//! HTTP/1.1 connections: accepting them, their time limits, and their end in a drain.
//!
//! ```text
//!           first byte                header complete              answer handed over
//!  IDLE ───────────────► HEADER ───────────────────────► AT WORK ─────────────────────► IDLE
//!   └─ keep_alive: closed └─ header_timeout: closed        └─ the handler has deadlines of its own
//!  in all of them: an answer of which the client takes nothing for `stall`: closed
//! ```
//!
//! hyper reads and writes. It has only one of these limits, which starts when a connection is idle: a short one would
//! end idle connections of proxies that keep them, and a long one would also apply to headers. So the limits are here:
//! one timer per connection, set anew when a step of the connection changes what it waits for.
//!
//! A client may shut down its side after it has sent everything (`nc -N` does): it still gets its answer. A client that
//! is gone looks the same until something is written. Until then it costs one request, whose handler ends by itself.

mod timed;

use std::{
    convert::Infallible, error::Error, future::poll_fn, net::SocketAddr, sync::Arc, task::Poll,
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Incoming},
    server::conn::http1,
    service::{Service, service_fn},
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, sleep_until},
};

use crate::{config::Config, runtime::Tasks};
pub use timed::Takeover;
use timed::{Answering, Timed, Timing};

/// Time limit of one step of a connection after the process was told to stop: the rest of a header or a body, or an
/// answer that the client does not read.
pub const LAST_STEP: Duration = Duration::from_secs(1);

/// Bytes that a connection may buffer of what it has read. A header must fit into it (431).
const BUFFER_BYTES: usize = 64 * 1024;

/// Pause after a failed `accept`, usually for lack of file descriptors: some may be free after it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Time limits of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a connection may be idle.
    pub keep_alive: Duration,
    /// How long the header of a request may take, from its first byte.
    pub header: Duration,
    /// How long a client may read nothing of an answer.
    pub stall: Duration,
}

impl Limits {
    /// The limits in `[http]`. A client that does not read gets as much time as a session that does not.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            keep_alive: config.http.keep_alive,
            header: config.http.header_timeout,
            stall: config.limits.outbox_stall,
        }
    }
}

/// Accepts connections until `tasks` stops; `service` makes the handler of a peer's requests. Connections then finish
/// their current request, and wait for the client at most [`LAST_STEP`].
pub async fn serve<S, B>(
    listener: TcpListener,
    limits: Limits,
    tasks: Tasks,
    service: impl Fn(SocketAddr) -> S,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + Unpin + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = tasks.stopping() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY could not be set");
                }
                let connection = connection(stream, service(peer), limits, tasks.clone());
                tasks.spawn_contained("http connection", connection);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The socket of an upgraded connection, and what was read from it after the handshake. `None`: the connection is not
/// one of [`serve`].
#[must_use]
pub fn into_stream(upgraded: Upgraded) -> Option<(TcpStream, Bytes)> {
    let parts = upgraded.downcast::<TokioIo<Timed<TcpStream>>>().ok()?;
    Some((parts.io.into_inner().into_inner()?, parts.read_buf))
}

/// Serves one connection until it ends, exceeds a limit, or is taken over: each request has a [`Takeover`] among its
/// extensions.
async fn connection<IO, S, B>(io: IO, service: S, limits: Limits, tasks: Tasks)
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S::Future: Send + 'static,
    B: Body<Error: Into<Box<dyn Error + Send + Sync>>> + Unpin + 'static,
{
    let timing = Arc::new(Mutex::new(Timing::new(Instant::now())));
    let io = Timed::new(io, Arc::clone(&timing));
    let takeover = io.takeover();
    let io = TokioIo::new(io);
    let at_work = Arc::clone(&timing);
    let offered = takeover.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(offered.clone());
        let answering = Answering::begin(&at_work);
        let answer = service.call(request);
        async move { Ok::<_, Infallible>(answer.await?.map(|body| answering.until_end_of(body))) }
    });
    let mut builder = http1::Builder::new();
    builder
        .half_close(true)
        .header_read_timeout(None)
        .max_buf_size(BUFFER_BYTES);
    let mut served = std::pin::pin!(builder.serve_connection(io, service).with_upgrades());
    let mut stopping = std::pin::pin!(tasks.stopping());
    let mut stopped = None;
    let mut alarm = std::pin::pin!(sleep_until(Instant::now()));
    let ended = poll_fn(|cx| {
        if stopped.is_none() && stopping.as_mut().poll(cx).is_ready() {
            stopped = Some(Instant::now());
            served.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(served) = served.as_mut().poll(cx) {
            return Poll::Ready(Some(served));
        }
        if takeover.is_taken() {
            return Poll::Ready(Some(Ok(())));
        }
        // Everything that changes the deadline has happened in the poll above.
        let Some(deadline) = timing.lock().deadline(&limits, stopped) else {
            return Poll::Pending;
        };
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        alarm.as_mut().poll(cx).map(|()| None)
    });
    match ended.await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::debug!(%error, "an HTTP connection broke"),
        None => tracing::debug!("an HTTP connection exceeded a time limit"),
    }
}

#[cfg(test)]
mod tests;
