//! Runs a line: connects, reads, writes, and handles timeouts.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _},
    time::{Interval, MissedTickBehavior, Sleep, interval, sleep},
};

use super::{
    ANSWERS, Shared,
    dial::{Dialed, Dialer, Transport},
    protocol::{self, Arrival, Info, Op, next_op},
};
use crate::{
    bus::connection::{ConnectError, PING_INTERVAL, reconnect_delay},
    config,
    telemetry::metrics::{Counter, Gauge, Held, SocketCall, count},
};

/// Unanswered pings after which the connection is given up.
const MAX_UNANSWERED: u32 = 2;

/// How often requests are checked for their timeout. A timeout is late by at most this.
const TICK: Duration = Duration::from_millis(200);

/// Buffer space for one read.
const READ_BYTES: usize = 64 << 10;

/// A write buffer that has grown beyond this is shrunk to it.
const KEEP: usize = 256 << 10;

/// Reads before other tasks get a turn.
const READS_A_TURN: usize = 8;

/// Receives what arrives over a line, in the driver's task.
pub trait Listener {
    /// A new connection is up. It has no subscriptions of the listener yet.
    fn up(&mut self);

    /// A message came.
    fn arrived(&mut self, arrival: Arrival);

    /// All messages of one read were passed to [`Self::arrived`].
    fn turn(&mut self);
}

/// For a line without subscriptions.
impl Listener for () {
    fn up(&mut self) {}
    fn arrived(&mut self, _arrival: Arrival) {}
    fn turn(&mut self) {}
}

/// Runs a line. The line ends when its driver ends or is dropped.
pub struct Driver {
    shared: Arc<Shared>,
    dialer: Dialer,
    name: String,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.down();
        self.shared.ended.store(true, Ordering::Release);
        self.shared.changed.notify_waiters();
    }
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        config: &config::Nats,
        name: &str,
    ) -> Result<Self, ConnectError> {
        Ok(Self {
            shared,
            dialer: Dialer::new(config, name)?,
            name: name.to_owned(),
        })
    }

    /// Runs until the line is closed.
    pub async fn run(mut self, mut listener: impl Listener) {
        let mut attempts: usize = 0;
        let mut said = false;
        while !self.shared.state.lock().closing {
            let dialed = tokio::select! {
                dialed = self.dialer.dial() => dialed,
                () = self.shared.closing() => break,
            };
            match dialed {
                Ok(dialed) => {
                    (attempts, said) = (0, false);
                    self.serve(dialed, &mut listener).await;
                }
                Err(error) => {
                    // Only the first failure is a warning.
                    if said {
                        tracing::debug!(connection = self.name, %error, "no connection to NATS");
                    } else {
                        tracing::warn!(connection = self.name, %error, "no connection to NATS, trying again");
                        said = true;
                    }
                }
            }
            attempts += 1;
            tokio::select! {
                () = sleep(reconnect_delay(attempts)) => {}
                () = self.shared.closing() => {}
            }
        }
    }

    /// Serves one connection until it breaks or the line is closed.
    async fn serve(&mut self, dialed: Dialed, listener: &mut impl Listener) {
        let Dialed {
            transport,
            info,
            buffer,
        } = dialed;
        {
            let mut state = self.shared.state.lock();
            state.max_payload = match info.max_payload {
                0 => usize::MAX,
                most => most,
            };
            let inbox = format!("{}*", state.inbox);
            protocol::subscribe(&mut state.out, &inbox, ANSWERS);
            self.shared.generation.fetch_add(1, Ordering::AcqRel);
            self.shared.up.store(true, Ordering::Release);
        }
        listener.up();
        self.shared.changed.notify_waiters();
        count(Counter::NatsConnects, 1);
        let connected = Held::new(Gauge::NatsConnected);
        tracing::info!(connection = self.name, "NATS connected");
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut serving = Serving {
            shared: &self.shared,
            dialer: &mut self.dialer,
            name: &self.name,
            transport,
            buffer,
            writing: Vec::new(),
            written: 0,
            unflushed: false,
            round: Box::pin(sleep(Duration::ZERO)),
            tick,
            unanswered: 0,
            pinged: Instant::now(),
        };
        // Bytes that were received during the handshake.
        let ended = match serving.take_in(listener) {
            Ok(()) => poll_fn(|cx| serving.poll(cx, listener)).await,
            Err(error) => Err(error),
        };
        if ended.is_ok() {
            let closed = serving.transport.shutdown().await.is_ok();
            tracing::debug!(connection = self.name, closed, "NATS connection ended");
        }
        drop(connected);
        self.down();
        if let Err(error) = ended {
            tracing::warn!(connection = self.name, %error, "NATS disconnected, reconnecting");
        }
    }

    fn down(&self) {
        let mut state = self.shared.state.lock();
        self.shared.up.store(false, Ordering::Release);
        state.lose();
        drop(state);
        self.shared.changed.notify_waiters();
    }
}

/// One established connection.
struct Serving<'a> {
    shared: &'a Shared,
    dialer: &'a mut Dialer,
    name: &'a str,
    transport: Box<dyn Transport>,
    buffer: BytesMut,
    /// The bytes being written, and how many of them are written.
    writing: Vec<u8>,
    written: usize,
    unflushed: bool,
    /// The end of the round, if something was put off until then.
    round: Pin<Box<Sleep>>,
    tick: Interval,
    /// When the last ping was sent, and how many pings were sent since the server was last heard. The limit is a count,
    /// not a time, because this process itself may have been paused.
    pinged: Instant,
    unanswered: u32,
}

impl Serving<'_> {
    /// Ready with `Ok` when the line is to be closed and everything is written.
    fn poll(&mut self, cx: &mut Context<'_>, listener: &mut impl Listener) -> Poll<io::Result<()>> {
        let mut reads = 0;
        while self.poll_read(cx)?.is_ready() {
            self.take_in(listener)?;
            reads += 1;
            if reads == READS_A_TURN {
                cx.waker().wake_by_ref();
                break;
            }
        }
        // After the reads: data that arrived while this process was paused shows that the server is alive, and what the
        // reads caused is written together with the rest.
        while self.tick.poll_tick(cx).is_ready() {
            self.keep_time()?;
        }
        self.poll_write(cx)
    }

    fn keep_time(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        state.expire(now);
        if now.duration_since(self.pinged) >= PING_INTERVAL {
            if self.unanswered >= MAX_UNANSWERED {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the server gives no sign of life",
                ));
            }
            self.pinged = now;
            self.unanswered += 1;
            state.ping(Vec::new());
        }
        Ok(())
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
            self.buffer.reserve(READ_BYTES);
        }
        // Cancel-safe: if the future is dropped before it is ready, nothing was read.
        let read = pin!(self.transport.read_buf(&mut self.buffer)).poll(cx);
        match read {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Poll::Ready(Ok(_)) => {
                count(Counter::SocketCalls(SocketCall::NatsRead), 1);
                self.unanswered = 0;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(error)) => Err(error),
        }
    }

    fn take_in(&mut self, listener: &mut impl Listener) -> io::Result<()> {
        while let Some(op) = next_op(&mut self.buffer).map_err(io::Error::other)? {
            match op {
                Op::Message(arrival) if arrival.sid() == ANSWERS => {
                    self.shared.state.lock().answer(arrival);
                }
                Op::Message(arrival) => listener.arrived(arrival),
                Op::Ping => self.shared.state.lock().out.extend_from_slice(b"PONG\r\n"),
                Op::Pong => {
                    let waiting = self.shared.state.lock().pings.pop_front();
                    for waiter in waiting.into_iter().flatten() {
                        // The waiter may have been dropped.
                        let _gone = waiter.send(());
                    }
                }
                Op::Info(text) => self.on_info(&text),
                Op::Error(text) => {
                    // After a permission error the connection continues. After any other error the server closes it.
                    tracing::warn!(connection = self.name, error = text, "NATS server error");
                }
                Op::Ok => {}
            }
        }
        listener.turn();
        Ok(())
    }

    fn on_info(&mut self, text: &[u8]) {
        match serde_json::from_slice::<Info>(text) {
            Ok(info) => {
                if info.ldm {
                    tracing::info!(connection = self.name, "the NATS server is leaving");
                }
                self.dialer.learn(&info);
            }
            Err(error) => {
                tracing::debug!(connection = self.name, %error, "what a server says of itself can't be read");
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.written == self.writing.len() {
                self.written = 0;
                self.writing.clear();
                self.writing.shrink_to(KEEP);
                let mut state = self.shared.state.lock();
                let later = state.end_round();
                if state.out.is_empty() {
                    let closing = state.closing;
                    state.waker = Some(cx.waker().clone());
                    drop(state);
                    if let Some(at) = later {
                        if self.round.deadline() != at.into() {
                            self.round.as_mut().reset(at.into());
                        }
                        if self.round.as_mut().poll(cx).is_ready() {
                            continue;
                        }
                    }
                    let flushed = self.poll_flush(cx)?.is_ready();
                    return if closing && flushed {
                        Poll::Ready(Ok(()))
                    } else {
                        Poll::Pending
                    };
                }
                state.pinged_at = None;
                std::mem::swap(&mut state.out, &mut self.writing);
            }
            let rest = &self.writing[self.written..];
            match Pin::new(&mut self.transport).poll_write(cx, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    count(Counter::SocketCalls(SocketCall::NatsWrite), 1);
                    self.written += written;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Needed because TLS buffers written bytes.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        if self.unflushed {
            match Pin::new(&mut self.transport).poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(Poll::Pending),
            }
            self.unflushed = false;
        }
        Ok(Poll::Ready(()))
    }
}
