//! What a connection is waiting for, and since when.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::yield_now,
    time::Instant,
};

use super::{LAST_STEP, Limits};

/// The step of a connection. Only its own task changes it.
#[derive(Debug)]
pub(super) struct Timing {
    step: Step,
    /// When this step began.
    since: Instant,
    /// Since when the client has read nothing of the data that waits for it.
    stalled: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing of a request has arrived.
    Idle,
    /// Part of a header has arrived.
    Header,
    /// The whole header has arrived, and the answer is not yet handed over completely.
    AtWork,
}

impl Timing {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            step: Step::Idle,
            since: now,
            stalled: None,
        }
    }

    fn enter(&mut self, step: Step) {
        self.step = step;
        self.since = Instant::now();
    }

    /// When the connection must end if nothing changes until then. `stopped`: when the process was told to stop.
    pub(super) fn deadline(&self, limits: &Limits, stopped: Option<Instant>) -> Option<Instant> {
        let waits = match self.step {
            // The client still reads an answer that was handed over: only a standstill counts.
            Step::Idle if self.stalled.is_some() => None,
            Step::Idle => Some((self.since, limits.keep_alive)),
            Step::Header => Some((self.since, limits.header)),
            // The handler has its own deadlines, also for the body.
            Step::AtWork => None,
        };
        let stall = self.stalled.map(|since| (since, limits.stall));
        let at = |(since, most): (Instant, std::time::Duration)| {
            let last = stopped.map(|stopped| since.max(stopped) + LAST_STEP);
            let most = since + most;
            last.map_or(most, |last| last.min(most))
        };
        waits.into_iter().chain(stall).map(at).min()
    }
}

/// The bytes of a connection; notes when they move.
#[derive(Debug)]
pub(super) struct Timed<IO> {
    io: Shared<IO>,
    timing: Arc<Mutex<Timing>>,
}

/// The socket of a connection, which a handler may take over. `None`: it was taken.
type Shared<IO> = Arc<Mutex<Option<IO>>>;

/// Takes over the connection of a request: what is written to it is then not HTTP/1.1 as hyper does it.
#[derive(Debug)]
pub struct Takeover<IO> {
    io: Shared<IO>,
    timing: Arc<Mutex<Timing>>,
}

impl<IO> Clone for Takeover<IO> {
    fn clone(&self) -> Self {
        Self {
            io: Arc::clone(&self.io),
            timing: Arc::clone(&self.timing),
        }
    }
}

impl<IO> Takeover<IO> {
    /// The socket. The handler of the request is dropped when it waits next, so it must have handed the socket over by
    /// then, or do so in a task. `None` if the client has not read the answers to earlier requests.
    pub async fn take(&self) -> Option<IO> {
        // Until the connection has tried to write what it has buffered of an earlier answer.
        yield_now().await;
        if self.timing.lock().stalled.is_some() {
            return None;
        }
        self.io.lock().take()
    }

    /// Resolves when the client has ended its side, or the connection is broken. hyper does not notice that while a request
    /// is answered. Only for the handler of a request whose body was read. Cancel-safe.
    pub async fn peer_ended(&self)
    where
        IO: Peek,
    {
        poll_fn(|cx| match self.io.lock().as_mut() {
            Some(io) => io.poll_ended(cx),
            None => Poll::Ready(()),
        })
        .await;
    }

    pub(super) fn is_taken(&self) -> bool {
        self.io.lock().is_none()
    }
}

/// What can be looked at without taking anything from it.
pub trait Peek {
    /// Ready at the peer's end, and if the connection is broken.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()>;
}

impl Peek for TcpStream {
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [0];
        match self.poll_peek(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Ready(Ok(0) | Err(_)) => Poll::Ready(()),
            // Something of the next request is there: what comes after it can't be seen.
            Poll::Ready(Ok(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl<IO> Timed<IO> {
    pub(super) fn new(io: IO, timing: Arc<Mutex<Timing>>) -> Self {
        let io = Arc::new(Mutex::new(Some(io)));
        Self { io, timing }
    }

    pub(super) fn takeover(&self) -> Takeover<IO> {
        Takeover {
            io: Arc::clone(&self.io),
            timing: Arc::clone(&self.timing),
        }
    }

    pub(super) fn into_inner(self) -> Option<IO> {
        self.io.lock().take()
    }

    fn written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let mut timing = self.timing.lock();
        match written {
            Poll::Pending => {
                timing.stalled.get_or_insert_with(Instant::now);
            }
            Poll::Ready(_) => {
                timing.stalled = None;
                // The connection is idle when the last of the answer is written, not when it was handed over.
                if timing.step == Step::Idle {
                    timing.since = Instant::now();
                }
            }
        }
        written
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Timed<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = match self.io.lock().as_mut() {
            Some(io) => Pin::new(io).poll_read(cx, buffer),
            None => return Poll::Ready(Err(gone())),
        };
        if buffer.filled().len() > before {
            let mut timing = self.timing.lock();
            // During a request these bytes are its body, or the beginning of the next request. That beginning is not
            // noticed when the next request's turn comes: its header has the time of an idle connection until more of
            // it arrives.
            if timing.step == Step::Idle {
                timing.enter(Step::Header);
            }
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Timed<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = match self.io.lock().as_mut() {
            Some(io) => Pin::new(io).poll_write(cx, bytes),
            None => return Poll::Ready(Err(gone())),
        };
        self.written(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = match self.io.lock().as_mut() {
            Some(io) => Pin::new(io).poll_write_vectored(cx, slices),
            None => return Poll::Ready(Err(gone())),
        };
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io
            .lock()
            .as_ref()
            .is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.io.lock().as_mut() {
            Some(io) => Pin::new(io).poll_flush(cx),
            None => Poll::Ready(Err(gone())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.io.lock().as_mut() {
            Some(io) => Pin::new(io).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

/// A request in progress, until its answer is handed over or it is abandoned.
#[derive(Debug)]
pub(super) struct Answering(Arc<Mutex<Timing>>);

impl Answering {
    pub(super) fn begin(timing: &Arc<Mutex<Timing>>) -> Self {
        timing.lock().enter(Step::AtWork);
        Self(Arc::clone(timing))
    }

    /// The answer's body; the request is in progress until it is dropped.
    pub(super) fn until_end_of<B>(self, body: B) -> Answer<B> {
        Answer {
            body,
            _answering: self,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.lock().enter(Step::Idle);
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Answer<B> {
    body: B,
    _answering: Answering,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
