//! A durable pull consumer of a stream: messages are redelivered until they are acknowledged.
//!
//! The history service, workers and hooks use it: nothing on the path of a live message or of a replay uses a consumer.
//!
//! For history, a fetch is always in progress: while one batch is read from the client's buffer, the next one is
//! arriving. Further messages are requested only as buffered ones are taken, so the buffer holds at most two batches.
//! Others ([`Consumer::ahead`] is false) request only what they can take, so that no message waits in a buffer until it
//! is redelivered.
//!
//! Format: NATS ADR-13 (pull), ADR-15 and ADR-37 (the subject for acknowledgements, and its fields).

use std::time::Duration;

use async_nats::{Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::{
    Connection, ReadError, Reader, Record, Stored,
    jetstream::{self, ApiError, ConsumerInfo, Problem},
    record::{last, stored_time},
};
use crate::{
    config::Config,
    model::{Epoch, Region},
    subject::{
        HISTORY_CONSUMER, PUSH_CONSUMER, Subjects, api, header, hook_consumer, worker_consumer,
    },
};

/// How long a request for messages stays open while there are none.
const EXPIRES: Duration = Duration::from_secs(30);

/// Interval of the server's heartbeats for such a request.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// After this time without any message from the server, the consumer is opened again.
const SILENCE: Duration = Duration::from_secs(12);

/// How often the connection is checked for a reconnect while nothing arrives.
const LOOK: Duration = Duration::from_millis(500);

/// Unacknowledged messages that the server allows, in batches. It is large, so that messages held by killed workers do
/// not stop the others.
const MAX_PENDING_BATCHES: usize = 64;

/// Time after which a message that is not acknowledged is redelivered to a worker. It is extended while one works on it.
const WORKER_ACK_WAIT: Duration = Duration::from_secs(5);

/// The same for a hook. Its events wait in the process that sends them, which extends the time.
const HOOK_ACK_WAIT: Duration = Duration::from_secs(10);

/// Bytes of one request of a worker.
const WORKER_BYTES: u64 = 4 << 20;

/// Least number of unacknowledged messages that the server allows a worker: those that wait for another attempt count too.
const WORKER_PENDING: usize = 1024;

/// Unacknowledged messages that the server allows notifiers: all that are said in twice `push.after` wait for being read.
const PUSH_PENDING: usize = 200_000;

/// Upper bound for a message's headers and subject, in bytes.
const MESSAGE_OVERHEAD: u64 = 128 * 1024;

/// Timeout for handing the answers of one batch to the client, which waits without limit while it is disconnected.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A durable consumer as it must be.
#[derive(Debug, Clone)]
pub struct Consumer {
    name: String,
    description: String,
    /// Only messages on these subjects; empty: all.
    filters: Vec<String>,
    /// Where a new consumer begins, as JetStream names it.
    from: &'static str,
    ack_wait: Duration,
    max_pending: usize,
    /// Most messages and bytes of one request.
    batch: usize,
    bytes: u64,
    /// Whether messages are requested before somebody waits for them.
    ahead: bool,
}

impl Consumer {
    /// The consumer of the history service.
    #[must_use]
    pub fn of_history(connection: &Connection, config: &Config) -> Self {
        let history = &config.history;
        let batch = history
            .batch_messages
            .min(connection.subscription_capacity() / 4);
        Self {
            name: String::from(HISTORY_CONSUMER),
            description: "Takes messages to MongoDB: natter history".to_owned(),
            filters: Vec::new(),
            from: "all",
            ack_wait: history.ack_wait,
            max_pending: batch.saturating_mul(MAX_PENDING_BATCHES),
            batch,
            bytes: history.batch_bytes.as_u64().max(largest(config)),
            ahead: true,
        }
    }

    /// The consumer of a worker, for messages on the subjects `filters` that are stored after its creation, of which
    /// `at_once` are worked on at the same time. `ordered`: a message is delivered only when the one before it is done.
    #[must_use]
    pub fn of_worker(
        config: &Config,
        worker: &str,
        filters: Vec<String>,
        at_once: usize,
        ordered: bool,
    ) -> Self {
        Self {
            name: worker_consumer(worker),
            description: format!("Takes messages to the worker {worker}: natter worker"),
            filters,
            from: "new",
            ack_wait: WORKER_ACK_WAIT,
            max_pending: match ordered {
                true => 1,
                false => WORKER_PENDING.max(8 * at_once),
            },
            batch: at_once,
            bytes: WORKER_BYTES.max(largest(config)),
            ahead: false,
        }
    }

    /// The consumer of a hook, for messages on the subjects `filters` that are stored after its creation, of which one
    /// process has at most `in_hand`. While it has as many, none is delivered.
    #[must_use]
    pub fn of_hook(config: &Config, hook: &str, filters: Vec<String>, in_hand: usize) -> Self {
        Self {
            name: hook_consumer(hook),
            description: format!("Takes events to the hook {hook}: natter hooks"),
            filters,
            from: "new",
            ack_wait: HOOK_ACK_WAIT,
            max_pending: in_hand,
            batch: in_hand,
            bytes: WORKER_BYTES.max(largest(config)),
            ahead: false,
        }
    }

    /// The consumer of notifiers, for messages on the subjects `filters` that are stored after its creation. A message that
    /// waits until its readers are away counts as unacknowledged.
    #[must_use]
    pub fn of_push(config: &Config, filters: Vec<String>, at_once: usize) -> Self {
        Self {
            name: String::from(PUSH_CONSUMER),
            description: "Takes messages to those who are away: natter notifier".to_owned(),
            filters,
            from: "new",
            ack_wait: WORKER_ACK_WAIT,
            max_pending: PUSH_PENDING,
            batch: at_once,
            bytes: WORKER_BYTES.max(largest(config)),
            ahead: false,
        }
    }

    /// How often a message in hand must be answered with [`Answer::Busy`].
    #[must_use]
    pub fn busy_interval(&self) -> Duration {
        self.ack_wait / 3
    }
}

/// Bytes of the largest message. One that is larger than a request allows would end every request.
fn largest(config: &Config) -> u64 {
    config.limits.body.as_u64() + MESSAGE_OVERHEAD
}

/// A shared durable consumer, and the messages that it delivers to this process.
#[derive(Debug)]
pub struct Pull {
    connection: Connection,
    stream: String,
    consumer: Consumer,
    timeout: Duration,
    inbox: String,
    incoming: Subscriber,
    /// Messages that were requested and not yet taken.
    asked: usize,
    /// The connection's generation when the consumer was opened.
    generation: u64,
    /// When the server last sent something, or was last asked.
    heard: Instant,
    /// The consumer's delivery count in the last message.
    given: u64,
    /// The first message of a consumer that was re-created.
    set_aside: Option<Delivery>,
}

/// A message delivered by a consumer.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Subject, headers and payload as they were published.
    pub message: Message,
    /// The subject for its acknowledgement.
    answer_to: Subject,
    /// Its sequence in the stream.
    pub seq: u64,
    /// When the stream stored it, in ms since 1970.
    pub ts: u64,
    /// How often it was delivered, including this time.
    pub deliveries: u32,
    /// The consumer's delivery count.
    given: u64,
}

/// The answer to a delivered message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Acknowledged.
    Done,
    /// Redeliver it after this time.
    Again(Duration),
    /// Still being processed: the acknowledgement timeout starts again.
    Busy,
}

/// Progress of a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerState {
    /// Messages not yet delivered.
    pub pending: u64,
    /// Messages delivered and not acknowledged.
    pub ack_pending: u64,
    /// Every message up to this sequence is acknowledged.
    pub floor: u64,
    /// The newest message that was delivered.
    pub delivered: u64,
}

/// The consumer can't be used now.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// No answer in time, or NATS can't be reached.
    #[error("stream {stream}: no answer about its consumer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// It may have been deleted or re-created. It must be opened again.
    #[error("stream {stream}: its consumer is lost: {why}")]
    Lost { stream: String, why: String },
    /// The connection was lost in between, and the requests with it. It must be opened again.
    #[error("stream {stream}: the connection was lost meanwhile")]
    Reconnected { stream: String },
    /// The server answered with an error, or not with JSON.
    #[error("stream {stream}: its consumer: {problem}")]
    Refused { stream: String, problem: String },
    /// The client was closed.
    #[error("the NATS connection is closed")]
    Closed,
}

impl Pull {
    /// A consumer of `stream`, which is created by [`Self::open`].
    ///
    /// # Errors
    /// [`PullError::Closed`].
    pub async fn new(
        connection: Connection,
        stream: String,
        consumer: Consumer,
        timeout: Duration,
    ) -> Result<Self, PullError> {
        let inbox = connection.client().new_inbox();
        let closed = |_error| PullError::Closed;
        let incoming = connection.client().subscribe(inbox.clone()).await;
        Ok(Self {
            incoming: incoming.map_err(closed)?,
            generation: connection.generation(),
            consumer,
            timeout,
            connection,
            stream,
            inbox,
            asked: 0,
            heard: Instant::now(),
            given: 0,
            set_aside: None,
        })
    }

    /// The name of its consumer.
    #[must_use]
    pub fn consumer_name(&self) -> &str {
        &self.consumer.name
    }

    /// Creates the consumer if there is none, otherwise updates its settings. Call it again after [`PullError::Lost`]
    /// and [`PullError::Reconnected`]. Messages already taken or buffered are kept.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn open(&mut self) -> Result<(), PullError> {
        let generation = self.connection.generation();
        let consumer = &self.consumer;
        let mut config = json!({
            "name": consumer.name,
            "durable_name": consumer.name,
            "description": consumer.description,
            "deliver_policy": consumer.from,
            "ack_policy": "explicit",
            "ack_wait": nanos(consumer.ack_wait),
            "max_deliver": -1,
            "max_ack_pending": consumer.max_pending,
            "replay_policy": "instant",
        });
        if !consumer.filters.is_empty() {
            config["filter_subjects"] = json!(consumer.filters);
        }
        let request = json!({ "stream_name": self.stream, "config": config });
        let subject = api::consumer_create(&self.stream, &consumer.name);
        let created = ask(
            &self.connection,
            &self.stream,
            self.timeout,
            subject,
            &request,
        );
        created
            .await?
            .map_err(|problem| self.refused(problem.into()))?;
        self.asked = 0;
        self.given = 0;
        self.generation = generation;
        Ok(())
    }

    /// Waits for messages and puts at most `most` of them into `taken`. Cancel-safe.
    ///
    /// # Errors
    /// After [`PullError::Lost`] and [`PullError::Reconnected`] the consumer must be opened again. What arrives after
    /// that may belong to another incarnation of the stream.
    pub async fn next(&mut self, taken: &mut Vec<Delivery>, most: usize) -> Result<(), PullError> {
        let begun = taken.len();
        if let Some(delivery) = self.set_aside.take() {
            taken.push(delivery);
        }
        while taken.len() < begun + most {
            if let Some(next) = self.incoming.next().now_or_never() {
                match self.take(next.ok_or(PullError::Closed)?)? {
                    Some(delivery) => taken.push(delivery),
                    None => continue,
                }
                continue;
            }
            if taken.len() > begun {
                break;
            }
            if self.connection.generation() != self.generation {
                let stream = self.stream.clone();
                return Err(PullError::Reconnected { stream });
            }
            self.fetch(most).await?;
            match timeout(LOOK, self.incoming.next()).await {
                Ok(next) => {
                    if let Some(delivery) = self.take(next.ok_or(PullError::Closed)?)? {
                        taken.push(delivery);
                    }
                }
                Err(_elapsed) if self.heard.elapsed() > SILENCE => {
                    return Err(self.lost("it gives no sign"));
                }
                Err(_elapsed) => {}
            }
        }
        // Taking messages freed buffer space. After this, more than a batch is buffered or requested.
        if self.consumer.ahead {
            self.fetch_at_once();
        }
        Ok(())
    }

    /// Reads a message, or a status of a request.
    fn take(&mut self, message: Message) -> Result<Option<Delivery>, PullError> {
        self.heard = Instant::now();
        let Some(status) = message.status else {
            self.asked = self.asked.saturating_sub(1);
            let Some(delivery) = Delivery::of(message) else {
                return Err(self.refused("a message without a subject to answer to".to_owned()));
            };
            // The count of one consumer only grows: a lower one belongs to a new consumer.
            if delivery.given < self.given {
                self.given = 0;
                self.set_aside = Some(delivery);
                return Err(self.lost("it began anew"));
            }
            self.given = delivery.given;
            return Ok(Some(delivery));
        };
        let description = message.description.as_deref().unwrap_or_default();
        match status.as_u16() {
            100 => {}
            // A request has ended: it expired, or the next message is larger than the rest of its bytes.
            404 | 408 => self.ended(&message),
            409 if description.contains("MaxBytes") || description.contains("Completed") => {
                self.ended(&message);
            }
            _ if status == StatusCode::NO_RESPONDERS => {
                return Err(self.lost("there is none, or it has no leader"));
            }
            _ => return Err(self.lost(&format!("{status} {description}"))),
        }
        Ok(None)
    }

    /// A request has ended before all its messages were delivered.
    fn ended(&mut self, message: &Message) {
        let left = message
            .headers
            .as_ref()
            .and_then(|headers| last(headers, header::PENDING_MESSAGES)?.parse().ok());
        self.asked = self.asked.saturating_sub(left.unwrap_or(self.asked));
    }

    /// How many requests are needed so that more than a batch is requested.
    fn missing(&self) -> usize {
        match self.asked {
            0 => 2,
            asked if asked <= self.consumer.batch => 1,
            _ => 0,
        }
    }

    /// Requests messages for somebody who takes at most `most`.
    async fn fetch(&mut self, most: usize) -> Result<(), PullError> {
        let (requests, batch) = match self.consumer.ahead {
            true => (self.missing(), self.consumer.batch),
            // Together with those requested before, they are never more than can be taken.
            false => {
                let more = most.saturating_sub(self.asked);
                (usize::from(self.asked <= most / 2 && more > 0), more)
            }
        };
        for _ in 0..requests {
            let request = self.request(batch);
            request.await.map_err(|_closed| PullError::Closed)?;
            self.asked += batch;
            self.heard = Instant::now();
        }
        Ok(())
    }

    /// Like [`Self::fetch`], but only as far as it does not have to wait.
    fn fetch_at_once(&mut self) {
        let batch = self.consumer.batch;
        for _ in 0..self.missing() {
            if let Some(Ok(())) = self.request(batch).now_or_never() {
                self.asked += batch;
            }
        }
    }

    fn request(
        &self,
        batch: usize,
    ) -> impl Future<Output = Result<(), async_nats::PublishError>> + use<> {
        let request = json!({
            "batch": batch,
            "max_bytes": self.consumer.bytes,
            "expires": nanos(EXPIRES),
            "idle_heartbeat": nanos(HEARTBEAT),
        });
        let client = self.connection.client().clone();
        let subject = api::consumer_next(&self.stream, &self.consumer.name);
        let inbox = self.inbox.clone();
        async move {
            let body = Bytes::from(request.to_string());
            client.publish_with_reply(subject, inbox, body).await
        }
    }

    /// Unsubscribes and gives back the messages that were not taken, so that another worker gets them at once.
    pub async fn release(mut self) {
        let mut left: Vec<Delivery> = self.set_aside.take().into_iter().collect();
        // Includes messages still arriving: the subscription ends when the server has confirmed it.
        let rest = async {
            let ended = self.incoming.drain().await.is_ok();
            while ended && let Some(message) = self.incoming.next().await {
                left.extend(Delivery::of(message));
            }
        };
        let clean = timeout(ANSWER_WITHIN, rest).await.is_ok();
        tracing::debug!(
            stream = self.stream,
            clean,
            given_back = left.len(),
            "no more messages"
        );
        answer(
            &self.connection,
            left.iter().collect(),
            Answer::Again(Duration::ZERO),
        )
        .await;
    }

    fn lost(&self, why: &str) -> PullError {
        PullError::Lost {
            stream: self.stream.clone(),
            why: why.to_owned(),
        }
    }

    fn refused(&self, problem: String) -> PullError {
        PullError::Refused {
            stream: self.stream.clone(),
            problem,
        }
    }
}

impl Delivery {
    fn of(message: Message) -> Option<Self> {
        let answer_to = message.reply.clone()?;
        let Fields {
            deliveries,
            seq,
            given,
            ns,
        } = Fields::parse(&answer_to)?;
        Some(Self {
            message,
            answer_to,
            seq,
            ts: ns / 1_000_000,
            deliveries,
            given,
        })
    }

    /// What a direct get has read.
    pub(super) fn read(mut message: Message) -> Option<Self> {
        let headers = message.headers.as_ref()?;
        let subject = last(headers, header::SUBJECT)?.to_owned();
        let seq = last(headers, header::SEQUENCE)?.parse().ok()?;
        let ts = stored_time(headers).ok()?;
        message.subject = subject.into();
        Some(Self {
            message,
            answer_to: Subject::from_static(""),
            seq,
            ts,
            deliveries: 1,
            given: 0,
        })
    }

    /// The message, if it is a room's.
    #[must_use]
    pub fn stored(&self, subjects: &Subjects, epoch: Epoch) -> Option<Stored> {
        let subject = subjects.parse_stored(&self.message.subject)?;
        Some(Stored {
            room: subject.room,
            record: Record::at(
                self.message.headers.as_ref(),
                self.message.payload.clone(),
                subject.class,
                epoch,
                (self.seq, self.ts),
            ),
        })
    }

    /// Its approximate size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.message.length
    }
}

/// The fields of the subject for acknowledgements.
#[derive(Debug, PartialEq, Eq)]
struct Fields {
    deliveries: u32,
    seq: u64,
    given: u64,
    ns: u64,
}

impl Fields {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<seq>.<given>.<ns>.<pending>`, or the same with domain and account
    /// before the stream, and possibly more tokens at the end.
    fn parse(subject: &str) -> Option<Self> {
        let rest = subject.strip_prefix(api::ACK)?;
        let skip = match rest.split('.').count() {
            7 => 2,
            9.. => 4,
            _ => return None,
        };
        let mut fields = rest.split('.').skip(skip).map(str::parse);
        let mut next = || -> Option<u64> { fields.next()?.ok() };
        Some(Self {
            deliveries: u32::try_from(next()?).unwrap_or(u32::MAX),
            seq: next()?,
            given: next()?,
            ns: next()?,
        })
    }
}

/// Answers messages. Answers are not confirmed: if one is lost, its message is redelivered.
pub async fn answer(connection: &Connection, deliveries: Vec<&Delivery>, answer: Answer) {
    // The client would buffer the answers and send them late.
    if !connection.is_up() {
        return;
    }
    let word = match answer {
        Answer::Done => Bytes::from_static(b"+ACK"),
        Answer::Busy => Bytes::from_static(b"+WPI"),
        Answer::Again(Duration::ZERO) => Bytes::from_static(b"-NAK"),
        Answer::Again(delay) => Bytes::from(format!("-NAK {}", json!({ "delay": nanos(delay) }))),
    };
    let client = connection.client();
    let all = async {
        for delivery in deliveries {
            client
                .publish(delivery.answer_to.clone(), word.clone())
                .await?;
        }
        Ok::<(), async_nats::PublishError>(())
    };
    match timeout(ANSWER_WITHIN, all).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "messages could not be answered"),
        Err(_elapsed) => tracing::debug!("messages could not be answered in time"),
    }
}

/// The progress of a consumer of `stream`; `None` if there is no such consumer.
///
/// # Errors
/// [`PullError`].
pub async fn consumer_state(
    connection: &Connection,
    stream: &str,
    consumer: &str,
    wait: Duration,
) -> Result<Option<ConsumerState>, PullError> {
    let subject = api::consumer_info(stream, consumer);
    state_of(connection, stream, wait, subject).await
}

/// Like [`consumer_state`], for the history service's consumer in another region's own domain.
///
/// # Errors
/// [`PullError`]; also when that region can't be reached.
pub async fn consumer_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<Option<ConsumerState>, PullError> {
    let subject = api::consumer_info(stream, HISTORY_CONSUMER);
    state_of(connection, stream, wait, api::in_domain(region, &subject)).await
}

async fn state_of(
    connection: &Connection,
    stream: &str,
    wait: Duration,
    subject: String,
) -> Result<Option<ConsumerState>, PullError> {
    let problem = match ask(connection, stream, wait, subject, &json!({})).await? {
        Err(Problem::Refused(ApiError { code: 404, .. })) => return Ok(None),
        Err(problem) => problem.into(),
        Ok(ConsumerInfo {
            num_pending: Some(pending),
            num_ack_pending: ack_pending,
            ack_floor: Some(floor),
            delivered,
        }) => {
            return Ok(Some(ConsumerState {
                pending,
                ack_pending,
                floor: floor.stream_seq,
                delivered: delivered.map_or(0, |delivered| delivered.stream_seq),
            }));
        }
        Ok(_) => "the answer has neither state nor error".to_owned(),
    };
    Err(PullError::Refused {
        stream: stream.to_owned(),
        problem,
    })
}

/// When the first message of `stream` after `seq` that matches `filter` was stored, in ms since 1970; `None` if there
/// is none.
///
/// # Errors
/// [`ReadError`].
pub async fn stored_after(
    reader: &Reader,
    stream: &str,
    filter: &str,
    seq: u64,
) -> Result<Option<u64>, ReadError> {
    let request = json!({ "seq": seq + 1, "next_by_subj": filter });
    let (messages, _) = reader.get(stream, &request).await?;
    let headers = messages.first().and_then(|first| first.headers.as_ref());
    let time = headers.map(stored_time).transpose();
    time.map_err(|source| ReadError::Malformed {
        stream: stream.to_owned(),
        source,
    })
}

/// How many messages of `stream` after `seq` match `filter`.
///
/// # Errors
/// [`ReadError`].
pub async fn count_after(
    reader: &Reader,
    stream: &str,
    filter: &str,
    seq: u64,
) -> Result<u64, ReadError> {
    let request = json!({ "seq": seq + 1, "next_by_subj": filter, "batch": 1 });
    let (messages, after) = reader.get(stream, &request).await?;
    Ok(messages.len() as u64 + after.unwrap_or_default())
}

async fn ask(
    connection: &Connection,
    stream: &str,
    wait: Duration,
    subject: String,
    request: &serde_json::Value,
) -> Result<Result<ConsumerInfo, Problem>, PullError> {
    let asked = jetstream::ask(connection, subject, Bytes::from(request.to_string()));
    timeout(wait, asked)
        .await
        .map_err(|_elapsed| PullError::Timeout {
            stream: stream.to_owned(),
            waited: wait,
        })
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_both_forms_are_read() {
        let fields = Some(Fields {
            deliveries: 3,
            seq: 100,
            given: 7,
            ns: 1_795_181_480_706_346_506,
        });
        let numbers = "3.100.7.1795181480706346506.42";
        for subject in [
            format!("$JS.ACK.ROOMS_a_0.history.{numbers}"),
            format!("$JS.ACK._.szMpdrwD.ROOMS_a_0.history.{numbers}"),
            format!("$JS.ACK.hub.szMpdrwD.ROOMS_a_0.history.{numbers}.random.more"),
        ] {
            assert_eq!(Fields::parse(&subject), fields, "{subject}");
        }
        for subject in [
            "natter.in.a.0.chat.lobby.msg",
            "$JS.ACK.ROOMS_a_0.history.3.100.7.5",
            "$JS.ACK.ROOMS_a_0.history.x.100.7.5.42",
        ] {
            assert_eq!(Fields::parse(subject), None, "{subject}");
        }
    }
}
