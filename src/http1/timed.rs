//! What a connection is waiting for, and since when.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
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
    io: IO,
    timing: Arc<Mutex<Timing>>,
}

impl<IO> Timed<IO> {
    pub(super) fn new(io: IO, timing: Arc<Mutex<Timing>>) -> Self {
        Self { io, timing }
    }

    pub(super) fn into_inner(self) -> IO {
        self.io
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
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buffer);
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
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
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
