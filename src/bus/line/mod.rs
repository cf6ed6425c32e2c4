//! A lean NATS connection for the path of a message: subscriptions, publishes and requests of a shard.
//!
//! async-nats serves everything else. It is made for many tasks that share one client; a shard is one thread, and what async-nats
//! needs for the former is most of what a small room costs: 6 KB of buffer a subscription, a hash map of headers a message, a
//! task woken for each, timers and two allocations a request (figures in `benches/RESULTS.md`). A line parses where it
//! reads, hands messages to a [`Listener`] in the order in which they came, without a queue in between, and writes whatever its users
//! have left for it since its last turn at once.
//!
//! ```text
//!  DIALLING ──► UP ──► (error, two pings unanswered) ──► DIALLING, after a pause that grows to a second
//!     └───────────┴──── close, or the driver is dropped ──► ENDED
//! ```
//!
//! # Invariants
//! - A line keeps no subscriptions: [`Listener::up`] makes them, anew on each connection, before anything else is sent on it.
//! - What the server says before the answer to a request is handed over before the request's future wakes.
//! - While a line is not up nothing is taken: requests and publishes fail at once, and what was in flight when the connection
//!   broke fails with [`LineError::Lost`]. Whoever repeats must know that it may have been done.

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
use crate::config;
pub(crate) use dial::{DialError, Dialed, introduce_leaf_node};
pub use driver::{Driver, Listener};
pub use protocol::{Arrival, HeaderWriter};

/// Bytes left for the server above which nothing more is taken: it does not read.
const MAX_OUT: usize = 16 << 20;

/// Headers of one message, in bytes. A stream of nats-server stores at most 64 KiB; the server's own headers and those of a dead
/// letter are added to a message's.
const MAX_HEADERS: usize = 60 * 1024;

/// The subscription for answers; [`Line::subscribe`] gives higher numbers.
const ANSWERS: u64 = 1;

/// A NATS connection that reconnects by itself, for ever, as long as its [`Driver`] runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Line(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    up: AtomicBool,
    /// Connections made so far.
    generation: AtomicU64,
    ended: AtomicBool,
    /// `up`, `ended` or the state's `closing` has changed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// What the driver is to write.
    out: Vec<u8>,
    /// Headers in the making.
    scratch: Vec<u8>,
    /// Where answers go: this and a number.
    inbox: String,
    max_payload: usize,
    /// Requests that wait; the number of the first is `first`, and an answered one is `None`.
    waiting: VecDeque<Option<Waiting>>,
    first: u64,
    /// Who waits for the answer to each ping that was sent.
    pings: VecDeque<Vec<oneshot::Sender<()>>>,
    /// Length of `out` right behind its last ping: whoever comes before anything else does can share it.
    pinged_at: Option<usize>,
    sids: u64,
    /// The driver; `None` while it has been woken.
    waker: Option<Waker>,
    closing: bool,
}

#[derive(Debug)]
struct Waiting {
    asked: Instant,
    within: Duration,
    answers: Vec<Arrival>,
    /// Answered by one message; otherwise by all up to the one that says that there are no more.
    single: bool,
    done: oneshot::Sender<Result<Vec<Arrival>, LineError>>,
}

/// The line did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// There is no connection now (or the server takes nothing): nothing was sent.
    #[error("NATS is not reachable")]
    Down,
    /// The connection broke before the answer.
    #[error("the connection to NATS broke before the answer")]
    Lost,
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// Nobody listens to the subject.
    #[error("nobody answers")]
    NoResponders,
    /// The message is larger than the server takes, or its headers than a stream does.
    #[error("{what} of {size} bytes, and the limit is {most}")]
    TooLarge {
        what: &'static str,
        size: usize,
        most: usize,
    },
    /// The answer is an error.
    #[error("{0} {1}")]
    Status(u16, String),
}

impl Line {
    /// A line and what runs it; it goes on dialling when no server answers. `name` is what `nats server report connections` shows.
    ///
    /// # Errors
    /// [`ConnectError`] where repeating can't help.
    pub fn new(config: &config::Nats, name: &str) -> Result<(Self, Driver), ConnectError> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                out: Vec::new(),
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

    /// Whether there is a connection, as far as is known: a peer that vanished is noticed after some seconds.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }

    /// How often a connection was made. It changes before the first message of a new one is handed over.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Waits until there is a connection; `false`: none will come any more, the line has ended.
    pub async fn ready(&self) -> bool {
        let up = |shared: &Shared| shared.up.load(Ordering::Acquire);
        let ended = |shared: &Shared| shared.ended.load(Ordering::Acquire);
        self.0.when(|shared| up(shared) || ended(shared)).await;
        !ended(&self.0)
    }

    /// A number that no subscription has had before.
    #[must_use]
    pub fn new_sid(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.sids += 1;
        state.sids
    }

    /// Subscribes, if the line is up; otherwise [`Listener::up`] does it. The server has processed it once it answers a later request.
    pub fn subscribe(&self, subject: &str, sid: u64) {
        self.leave(|state| protocol::subscribe(&mut state.out, subject, sid));
    }

    /// Ends a subscription. Messages that were on their way may still come.
    pub fn unsubscribe(&self, sid: u64) {
        self.leave(|state| protocol::unsubscribe(&mut state.out, sid));
    }

    /// Lets `write` leave something for the driver; `None`: the line is not up.
    fn leave<T>(&self, write: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut state = self.0.state.lock();
        // Under the lock: the driver takes the line down under it.
        if !self.is_up() {
            return None;
        }
        let left = write(&mut state);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        Some(left)
    }

    /// Leaves a publish for the driver.
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

    /// Asks and waits for the one answer. What is asked is left for the driver when the future is first polled.
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
        let answers = self.ask(subject, headers, payload, within, true)?;
        let mut answers = answers.await.unwrap_or(Err(LineError::Lost))?;
        answers.pop().ok_or(LineError::NoResponders)
    }

    /// Asks a stream for messages and waits for all of them, up to the one that ends a batch.
    ///
    /// # Errors
    /// [`LineError`]; a status that says that there are none is an empty answer.
    pub async fn gather(
        &self,
        subject: &str,
        payload: &[u8],
        within: Duration,
    ) -> Result<Vec<Arrival>, LineError> {
        let answers = self.ask(subject, |_| {}, payload, within, false)?;
        answers.await.unwrap_or(Err(LineError::Lost))
    }

    fn ask(
        &self,
        subject: &str,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
        within: Duration,
        single: bool,
    ) -> Result<oneshot::Receiver<Result<Vec<Arrival>, LineError>>, LineError> {
        let (done, answers) = oneshot::channel();
        let left = self.leave(|state| {
            let token = state.first + state.waiting.len() as u64;
            state.publish(subject, Some(token), headers, payload)?;
            state.waiting.push_back(Some(Waiting {
                asked: Instant::now(),
                within,
                answers: Vec::new(),
                single,
                done,
            }));
            Ok(())
        });
        left.unwrap_or(Err(LineError::Down))?;
        Ok(answers)
    }

    /// Returns when the server has processed everything that was left before.
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

    /// Ends the connection when what is left for the driver is written.
    pub async fn close(&self) {
        {
            let mut state = self.0.state.lock();
            state.closing = true;
            if let Some(waker) = state.waker.take() {
                waker.wake();
            }
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
    fn publish(
        &mut self,
        subject: &str,
        token: Option<u64>,
        headers: impl FnOnce(&mut HeaderWriter<'_>),
        payload: &[u8],
    ) -> Result<(), LineError> {
        if self.out.len() > MAX_OUT {
            return Err(LineError::Down);
        }
        self.scratch.clear();
        let mut writer = HeaderWriter::new(&mut self.scratch);
        headers(&mut writer);
        writer.end();
        // Without any header there is no block of them at all.
        let headers = Some(&*self.scratch)
            .filter(|block| block.len() > b"NATS/1.0\r\n\r\n".len())
            .unwrap_or_default();
        let all = headers.len() + payload.len();
        for (what, size, most) in [
            ("headers", headers.len(), MAX_HEADERS),
            ("a message", all, self.max_payload),
        ] {
            if size > most {
                return Err(LineError::TooLarge { what, size, most });
            }
        }
        let reply = token.map(|token| (&*self.inbox, token));
        protocol::publish(&mut self.out, subject, reply, headers, payload);
        Ok(())
    }

    fn ping(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        self.out.extend_from_slice(b"PING\r\n");
        self.pinged_at = Some(self.out.len());
        self.pings.push_back(waiting);
    }

    /// Takes an answer to a request. An answer to one that gave up is nobody's.
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
        let Some(waiting) = slot else { return };
        let status = arrival
            .headers()
            .status()
            .map(|(code, text)| (code, text.to_owned()));
        let end = match status {
            None => {
                waiting.answers.push(arrival);
                waiting.single.then_some(Ok(()))
            }
            // The end of a batch; and nothing found.
            Some((204 | 404, _)) => Some(Ok(())),
            Some((503, _)) => Some(Err(LineError::NoResponders)),
            Some((code, text)) => Some(Err(LineError::Status(code, text))),
        };
        if let Some(end) = end
            && let Some(waiting) = slot.take()
        {
            // Who asked may have given up.
            let _gone = waiting.done.send(end.map(|()| waiting.answers));
            self.forget_answered();
        }
    }

    fn forget_answered(&mut self) {
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
    }

    /// Ends the requests whose time is up.
    fn expire(&mut self, now: Instant) {
        for slot in &mut self.waiting {
            if let Some(waiting) =
                slot.take_if(|waiting| now.duration_since(waiting.asked) >= waiting.within)
            {
                let _gone = waiting.done.send(Err(LineError::Timeout(waiting.within)));
            }
        }
        self.forget_answered();
    }

    /// The connection is gone, and with it what was on its way.
    fn lose(&mut self) {
        self.out = Vec::new();
        self.pinged_at = None;
        // Whoever waits sees that nobody will answer.
        self.pings.clear();
        self.first += self.waiting.len() as u64;
        self.waiting.clear();
    }
}
