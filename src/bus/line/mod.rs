//! A lean NATS connection for the path of a message: subscriptions, publishes and requests of one shard.
//!
//! async-nats serves everything else. It is made for many tasks that share one client, while a shard is one thread.
//! That generality is most of the cost of a small room: 6 KB of buffer per subscription, a hash map of headers per
//! message, a task woken for each message, timers and two allocations per request (figures in `benches/RESULTS.md`). A
//! line parses in the task that reads, passes messages to a [`Listener`] in their order without a queue in between, and
//! writes everything that was queued since its last turn at once.
//!
//! ```text
//!  DIALLING ──► UP ──► (error, two pings unanswered) ──► DIALLING, after a pause that grows to a second
//!     └───────────┴──── close, or the driver is dropped ──► ENDED
//! ```
//!
//! # Invariants
//! - Apart from the subscription for answers, a line keeps no subscriptions. [`Listener::up`] makes them again on each
//!   connection, before other tasks on the driver's thread can use the connection.
//! - Messages that the server sent before the answer to a request are passed to the listener before the request's
//!   future wakes.
//! - While a line is not up, it accepts nothing: requests and publishes fail at once. Requests in flight when the
//!   connection breaks fail with [`LineError::Lost`]. A caller that retries one must know that it may already have been
//!   executed.

mod dial;
mod driver;
pub(crate) mod protocol;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Waker,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use super::connection::{CLOSE_WITHIN, ConnectError, new_inbox};
use crate::{config, runtime::unix_ms};
pub(crate) use dial::{DialError, Dialed, introduce_leaf_node};
pub use driver::{Driver, Listener};
pub use protocol::{Arrival, HeaderWriter};

/// Bytes waiting to be written, now or later, above which nothing more is accepted: the server does not read.
const MAX_OUT: usize = 16 << 20;

/// Length of a round, in ms: what does not hurry leaves at its end, written at once. The rounds of all lines end together, so that
/// they wake the server, and those who receive, once.
const ROUND_MS: u64 = 50;

/// Limit for the headers of one message, in bytes. A stream of nats-server stores at most 64 KiB of headers; the
/// server's own headers, or those of a dead letter, are added to the message's.
const MAX_HEADERS: usize = 60 * 1024;

/// The number of the subscription for answers; [`Line::new_sid`] returns higher numbers.
const ANSWERS: u64 = 1;

/// A NATS connection that reconnects by itself, without limit, while its [`Driver`] runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Line(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    up: AtomicBool,
    /// Number of connections made so far.
    generation: AtomicU64,
    ended: AtomicBool,
    /// `up`, `ended` or the state's `closing` has changed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Bytes for the driver to write.
    out: Vec<u8>,
    /// Bytes for the driver to write when this round ends, and when that is.
    later: Vec<u8>,
    later_at: Instant,
    /// Buffer for the headers of one message.
    scratch: Vec<u8>,
    /// Prefix of the subjects for answers; the number of the request follows.
    inbox: String,
    max_payload: usize,
    /// Requests in flight. The number of the first one is `first`; an answered one is `None`.
    waiting: VecDeque<Option<Waiting>>,
    first: u64,
    /// For each ping that was sent, the callers that wait for its answer.
    pings: VecDeque<Vec<oneshot::Sender<()>>>,
    /// Length of `out` right after its last ping. While `out` has this length, another round trip can share that ping.
    pinged_at: Option<usize>,
    sids: u64,
    /// Wakes the driver; `None` if it has already been woken.
    waker: Option<Waker>,
    closing: bool,
}

#[derive(Debug)]
struct Waiting {
    asked: Instant,
    within: Duration,
    answer: Answer,
}

/// What is the answer to a request, and who waits for it.
#[derive(Debug)]
enum Answer {
    /// One message.
    One(oneshot::Sender<Result<Arrival, LineError>>),
    /// All messages up to the end of the batch; those that have come.
    All(
        Vec<Arrival>,
        oneshot::Sender<Result<Vec<Arrival>, LineError>>,
    ),
}

impl Answer {
    /// There is no answer, or no more of it. The caller may have been cancelled.
    fn fail(self, error: LineError) {
        let _gone = match self {
            Self::One(done) => done.send(Err(error)).is_err(),
            Self::All(_, done) => done.send(Err(error)).is_err(),
        };
    }

    /// The batch has ended.
    fn end(self) {
        let _gone = match self {
            Self::One(done) => done.send(Err(LineError::NoResponders)).is_err(),
            Self::All(answers, done) => done.send(Ok(answers)).is_err(),
        };
    }
}

/// A request or a publish over the line failed.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// There is no connection now, or more than [`MAX_OUT`] bytes are waiting to be written. Nothing was sent.
    #[error("NATS is not reachable")]
    Down,
    /// The connection broke before the answer.
    #[error("the connection to NATS broke before the answer")]
    Lost,
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// Nobody is subscribed to the subject.
    #[error("nobody answers")]
    NoResponders,
    /// The message exceeds the server's limit, or its headers exceed [`MAX_HEADERS`].
    #[error("{what} of {size} bytes, and the limit is {most}")]
    TooLarge {
        what: &'static str,
        size: usize,
        most: usize,
    },
    /// The answer is an error status.
    #[error("{0} {1}")]
    Status(u16, String),
}

impl Line {
    /// A line and its driver, which keeps dialling while no server answers. `name` is shown by `nats server report
    /// connections`.
    ///
    /// # Errors
    /// [`ConnectError`] if a retry can't help.
    pub fn new(config: &config::Nats, name: &str) -> Result<(Self, Driver), ConnectError> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                out: Vec::new(),
                later: Vec::new(),
                later_at: Instant::now(),
                scratch: Vec::new(),
                inbox: new_inbox(config) + ".",
                max_payload: usize::MAX,
                waiting: VecDeque::new(),
                first: 0,
                pings: VecDeque::new(),
                pinged_at: None,
                sids: ANSWERS,
                waker: None,
                closing: false,
            }),
            up: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            changed: Notify::new(),
        });
        let driver = Driver::new(Arc::clone(&shared), config, name)?;
        Ok((Self(shared), driver))
    }

    /// Whether the line is connected, as far as is known: it takes some seconds to notice that a peer has vanished.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }

    /// The number of connections made so far. It changes before the first message of a new connection is passed on.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Waits for a connection. Returns `false` if the line has ended, so that there will be none.
    pub async fn ready(&self) -> bool {
        let up = |shared: &Shared| shared.up.load(Ordering::Acquire);
        let ended = |shared: &Shared| shared.ended.load(Ordering::Acquire);
        self.0.when(|shared| up(shared) || ended(shared)).await;
        !ended(&self.0)
    }

    /// A new subscription number.
    #[must_use]
    pub fn new_sid(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.sids += 1;
        state.sids
    }

    /// Subscribes if the line is up; otherwise [`Listener::up`] does it. The subscription is active once the server has
    /// answered a later request.
    pub fn subscribe(&self, subject: &str, sid: u64) {
        self.leave(|state| protocol::subscribe(&mut state.out, subject, sid));
    }

    /// Ends a subscription. Messages that are already on their way may still arrive.
    pub fn unsubscribe(&self, sid: u64) {
        self.leave(|state| protocol::unsubscribe(&mut state.out, sid));
    }

    /// Lets `write` queue something for the driver; `None` if the line is not up.
    fn leave<T>(&self, write: impl FnOnce(&mut State) -> T) -> Option<T> {
        self.leave_quietly(|state| {
            let left = write(state);
            state.wake();
            left
        })
    }

    /// As [`Self::leave`], without waking the driver.
    fn leave_quietly<T>(&self, write: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut state = self.0.state.lock();
        // Checked under the lock, since the driver also takes the line down under it.
        self.is_up().then(|| write(&mut state))
    }

    /// Queues a message for the driver. It is not acknowledged.
    ///
    /// # Errors
    /// [`LineError::Down`], [`LineError::TooLarge`].
    pub fn publish(
        &self,
        subject: &str,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
    ) -> Result<(), LineError> {
        self.leave(|state| state.publish(subject, None, headers, payload))
            .unwrap_or(Err(LineError::Down))
    }

    /// Queues a message without headers that the driver writes at the end of this round of [`ROUND_MS`], together with
    /// others. It is not acknowledged.
    ///
    /// # Errors
    /// [`LineError::Down`], [`LineError::TooLarge`].
    pub fn publish_later(&self, subject: &str, payload: &[u8]) -> Result<(), LineError> {
        let left = self.leave_quietly(|state| {
            let begins = state.later.is_empty();
            state.check(0, payload.len())?;
            protocol::publish(&mut state.later, subject, None, &[], payload);
            if begins {
                let into = Duration::from_millis(unix_ms() % ROUND_MS);
                state.later_at = Instant::now() + Duration::from_millis(ROUND_MS) - into;
                state.wake();
            }
            Ok(())
        });
        left.unwrap_or(Err(LineError::Down))
    }

    /// Sends a request and waits for its single answer. The request is queued when the future is first polled.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn request(
        &self,
        subject: &str,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
        within: Duration,
    ) -> Result<Arrival, LineError> {
        let (done, answer) = oneshot::channel();
        self.ask(subject, headers, payload, within, Answer::One(done))?;
        answer.await.unwrap_or(Err(LineError::Lost))
    }

    /// Sends a direct get and waits for all its messages, up to the end of the batch.
    ///
    /// # Errors
    /// [`LineError`]. If nothing is found, the result is empty.
    pub async fn gather(
        &self,
        subject: &str,
        payload: &[u8],
        within: Duration,
    ) -> Result<Vec<Arrival>, LineError> {
        let (done, answers) = oneshot::channel();
        let answer = Answer::All(Vec::new(), done);
        self.ask(subject, |_| {}, payload, within, answer)?;
        answers.await.unwrap_or(Err(LineError::Lost))
    }

    fn ask(
        &self,
        subject: &str,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
        within: Duration,
        answer: Answer,
    ) -> Result<(), LineError> {
        let left = self.leave(|state| {
            let token = state.first + state.waiting.len() as u64;
            state.publish(subject, Some(token), headers, payload)?;
            state.waiting.push_back(Some(Waiting {
                asked: Instant::now(),
                within,
                answer,
            }));
            Ok(())
        });
        left.unwrap_or(Err(LineError::Down))
    }

    /// Returns when the server has processed everything that was queued before.
    ///
    /// # Errors
    /// [`LineError::Down`], [`LineError::Lost`].
    pub async fn round_trip(&self) -> Result<(), LineError> {
        let (done, answered) = oneshot::channel();
        self.leave(|state| match (state.pinged_at, state.pings.back_mut()) {
            (Some(at), Some(last)) if at == state.out.len() => last.push(done),
            _ => state.ping(vec![done]),
        })
        .ok_or(LineError::Down)?;
        answered.await.map_err(|_dropped| LineError::Lost)
    }

    /// Closes the connection after everything queued is written, or after a timeout.
    pub async fn close(&self) {
        {
            let mut state = self.0.state.lock();
            state.closing = true;
            state.wake();
        }
        self.0.changed.notify_waiters();
        let ended = self.0.when(|shared| shared.ended.load(Ordering::Acquire));
        let clean = timeout(CLOSE_WITHIN, ended).await.is_ok();
        tracing::debug!(clean, "NATS connection closed");
    }
}

impl Shared {
    async fn when(&self, is_so: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if is_so(self) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until the line is to be closed.
    async fn closing(&self) {
        self.when(|shared| shared.state.lock().closing).await;
    }
}

impl State {
    /// Wakes the driver.
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Moves what was put off to what is written, if its time has come. Returns when the rest is due.
    fn end_round(&mut self) -> Option<Instant> {
        if self.later.is_empty() {
            return None;
        }
        if !self.closing && Instant::now() < self.later_at {
            return Some(self.later_at);
        }
        self.out.append(&mut self.later);
        None
    }

    /// Whether a message of this size can be queued.
    fn check(&self, headers: usize, payload: usize) -> Result<(), LineError> {
        if self.out.len() + self.later.len() > MAX_OUT {
            return Err(LineError::Down);
        }
        for (what, size, most) in [
            ("headers", headers, MAX_HEADERS),
            ("a message", headers + payload, self.max_payload),
        ] {
            if size > most {
                return Err(LineError::TooLarge { what, size, most });
            }
        }
        Ok(())
    }

    fn publish(
        &mut self,
        subject: &str,
        token: Option<u64>,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
    ) -> Result<(), LineError> {
        self.scratch.clear();
        let mut writer = HeaderWriter::new(&mut self.scratch);
        headers(&mut writer);
        writer.end();
        // A message without headers has no header block at all.
        let headers = Some(&*self.scratch)
            .filter(|block| block.len() > b"NATS/1.0\r\n\r\n".len())
            .unwrap_or_default();
        self.check(headers.len(), payload.len())?;
        let reply = token.map(|token| (&*self.inbox, token));
        protocol::publish(&mut self.out, subject, reply, headers, payload);
        Ok(())
    }

    fn ping(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        self.out.extend_from_slice(b"PING\r\n");
        self.pinged_at = Some(self.out.len());
        self.pings.push_back(waiting);
    }

    /// Takes an answer to a request. An answer to a request that has timed out is dropped.
    fn answer(&mut self, arrival: Arrival) {
        let token = arrival
            .subject()
            .strip_prefix(&*self.inbox)
            .and_then(|text| text.parse::<u64>().ok());
        let Some(at) = token
            .and_then(|token| token.checked_sub(self.first))
            .and_then(|at| usize::try_from(at).ok())
        else {
            return;
        };
        let Some(slot) = self.waiting.get_mut(at) else {
            return;
        };
        let status = arrival
            .headers()
            .status()
            .map(|(code, text)| (code, text.to_owned()));
        if status.is_none()
            && let Some(Waiting {
                answer: Answer::All(answers, _),
                ..
            }) = slot
        {
            answers.push(arrival);
            return;
        }
        let Some(Waiting { answer, .. }) = slot.take() else {
            return;
        };
        match (status, answer) {
            (None, Answer::One(done)) => {
                // The caller may have been cancelled.
                let _gone = done.send(Ok(arrival));
            }
            // Handled above; 204: end of the batch; 404: nothing found.
            (None | Some((204 | 404, _)), answer) => answer.end(),
            (Some((503, _)), answer) => answer.fail(LineError::NoResponders),
            (Some((code, text)), answer) => answer.fail(LineError::Status(code, text)),
        }
        self.forget_answered();
    }

    fn forget_answered(&mut self) {
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
    }

    /// Ends the requests that have timed out.
    fn expire(&mut self, now: Instant) {
        for slot in &mut self.waiting {
            if let Some(waiting) =
                slot.take_if(|waiting| now.duration_since(waiting.asked) >= waiting.within)
            {
                waiting.answer.fail(LineError::Timeout(waiting.within));
            }
        }
        self.forget_answered();
    }

    /// Drops everything in flight, since the connection is lost.
    fn lose(&mut self) {
        self.out = Vec::new();
        self.later = Vec::new();
        self.pinged_at = None;
        // Dropping the senders tells the callers that there will be no answer.
        self.pings.clear();
        self.first += self.waiting.len() as u64;
        self.waiting.clear();
    }
}
