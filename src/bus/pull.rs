//! The history service's durable pull consumer of a stream: messages that are given out until they are confirmed.
//!
//! For `history` alone: nothing on the path of a live message or of a replay uses a consumer.
//!
//! A fetch is always under way: while one batch is taken out of the client's buffer, the next is on its way into it. What
//! is not taken is not asked for, so the buffer holds two batches at most.
//!
//! Format: NATS ADR-13 (pull), ADR-15 and ADR-37 (the subject to answer to, and its fields).

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
    subject::{HISTORY_CONSUMER, Subjects, api, header},
};

/// How long a request for messages stays open when there are none.
const EXPIRES: Duration = Duration::from_secs(30);

/// How often the server says that it still knows such a request.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Without any sign for this long the consumer is looked for again.
const SILENCE: Duration = Duration::from_secs(12);

/// How often a reconnect is looked for while nothing comes.
const LOOK: Duration = Duration::from_millis(500);

/// Unconfirmed messages that the server gives out, in batches: what killed workers held must not stop the others.
const MAX_PENDING_BATCHES: usize = 64;

/// Besides the body, what one message may have: headers, subjects.
const MESSAGE_OVERHEAD: u64 = 128 * 1024;

/// How long the answers to one batch may take to be handed to the client, which waits for ever while it is disconnected.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A shared durable consumer, and the messages that it gives to this process.
#[derive(Debug)]
pub struct Pull {
    connection: Connection,
    stream: String,
    batch: usize,
    bytes: u64,
    ack_wait: Duration,
    timeout: Duration,
    inbox: String,
    incoming: Subscriber,
    /// Messages that were asked for and have not been taken.
    asked: usize,
    /// Under which connection that was.
    generation: u64,
    /// When the server last gave a sign.
    heard: Instant,
    /// The consumer's own count of what it gave out, as last seen.
    given: u64,
    /// The first message of a consumer that began anew.
    set_aside: Option<Delivery>,
}

/// A message that a consumer gave out.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Subject, headers and payload as they were published.
    pub message: Message,
    /// Where it is answered.
    answer_to: Subject,
    /// Its sequence in the stream.
    pub seq: u64,
    /// When the stream stored it, in ms since 1970.
    pub ts: u64,
    /// The consumer's count.
    given: u64,
}

/// What the consumer is told about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is done with.
    Done,
    /// Give it out again after this time.
    Again(Duration),
    /// It is being worked on: the time to confirm it begins anew.
    Busy,
}

/// How far a consumer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerState {
    /// Messages that it has not given out yet.
    pub pending: u64,
    /// Messages that were given out and are not confirmed.
    pub ack_pending: u64,
    /// Everything of the stream up to this sequence is confirmed.
    pub floor: u64,
}

/// The consumer can't be used now.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// No answer in time; also while NATS is away.
    #[error("stream {stream}: no answer about its consumer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// It may have gone, or begun anew: it has to be opened again.
    #[error("stream {stream}: its consumer is lost: {why}")]
    Lost { stream: String, why: String },
    /// NATS was away meanwhile: the requests are gone, and it has to be opened again.
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
        config: &Config,
    ) -> Result<Self, PullError> {
        let history = &config.history;
        let inbox = connection.client().new_inbox();
        let closed = |_error| PullError::Closed;
        let incoming = connection.client().subscribe(inbox.clone()).await;
        Ok(Self {
            incoming: incoming.map_err(closed)?,
            generation: connection.generation(),
            batch: history
                .batch_messages
                .min(connection.subscription_capacity() / 4),
            // A message that a request has no room for would end every request.
            bytes: history
                .batch_bytes
                .as_u64()
                .max(config.limits.body.as_u64() + MESSAGE_OVERHEAD),
            ack_wait: history.ack_wait,
            timeout: config.nats.read_timeout,
            connection,
            stream,
            inbox,
            asked: 0,
            heard: Instant::now(),
            given: 0,
            set_aside: None,
        })
    }

    /// Creates the consumer where there is none, or gives it the present settings. To be repeated after
    /// [`PullError::Lost`]; what is in hand and in the buffer is kept.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn open(&mut self) -> Result<(), PullError> {
        let generation = self.connection.generation();
        let pending = self.batch.saturating_mul(MAX_PENDING_BATCHES);
        let request = json!({
            "stream_name": self.stream,
            "config": {
                "name": HISTORY_CONSUMER,
                "durable_name": HISTORY_CONSUMER,
                "description": "Takes messages to MongoDB: natter history",
                "deliver_policy": "all",
                "ack_policy": "explicit",
                "ack_wait": nanos(self.ack_wait),
                "max_deliver": -1,
                "max_ack_pending": pending,
                "replay_policy": "instant",
            },
        });
        let subject = api::consumer_create(&self.stream, HISTORY_CONSUMER);
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

    /// Waits for messages and puts at most `most` into `taken`. Cancel-safe.
    ///
    /// # Errors
    /// [`PullError::Lost`] and [`PullError::Reconnected`]: the consumer has to be opened again, and what comes after that may be of another incarnation of
    /// the stream.
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
            self.fetch().await?;
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
        // What was taken makes room for more; in the buffer or on its way is at least a batch.
        self.fetch_at_once();
        Ok(())
    }

    /// A message, or what the server says about a request.
    fn take(&mut self, message: Message) -> Result<Option<Delivery>, PullError> {
        self.heard = Instant::now();
        let Some(status) = message.status else {
            self.asked = self.asked.saturating_sub(1);
            let Some(delivery) = Delivery::of(message) else {
                return Err(self.refused("a message without a subject to answer to".to_owned()));
            };
            // Its count only grows: less means that it is another one.
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
            // A request has ended: its time is up, or the next message is larger than what was left of it.
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

    /// A request has ended before all that it asked for was given.
    fn ended(&mut self, message: &Message) {
        let left = message
            .headers
            .as_ref()
            .and_then(|headers| last(headers, header::PENDING_MESSAGES)?.parse().ok());
        self.asked = self.asked.saturating_sub(left.unwrap_or(self.asked));
    }

    /// How many requests must be made so that more than a batch is asked for.
    fn missing(&self) -> usize {
        match self.asked {
            0 => 2,
            asked if asked <= self.batch => 1,
            _ => 0,
        }
    }

    async fn fetch(&mut self) -> Result<(), PullError> {
        for _ in 0..self.missing() {
            let request = self.request();
            request.await.map_err(|_closed| PullError::Closed)?;
            self.asked += self.batch;
            self.heard = Instant::now();
        }
        Ok(())
    }

    /// As [`Self::fetch`], unless it would have to wait.
    fn fetch_at_once(&mut self) {
        for _ in 0..self.missing() {
            if let Some(Ok(())) = self.request().now_or_never() {
                self.asked += self.batch;
            }
        }
    }

    fn request(&self) -> impl Future<Output = Result<(), async_nats::PublishError>> + use<> {
        let request = json!({
            "batch": self.batch,
            "max_bytes": self.bytes,
            "expires": nanos(EXPIRES),
            "idle_heartbeat": nanos(HEARTBEAT),
        });
        let client = self.connection.client().clone();
        let subject = api::consumer_next(&self.stream, HISTORY_CONSUMER);
        let inbox = self.inbox.clone();
        async move {
            let body = Bytes::from(request.to_string());
            client.publish_with_reply(subject, inbox, body).await
        }
    }

    /// Ends, and gives back what was not taken, so that another worker has it at once.
    pub async fn release(mut self) {
        let mut left: Vec<Delivery> = self.set_aside.take().into_iter().collect();
        // Also what is on its way: the client goes on until the server has confirmed the end.
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
        let Fields { seq, given, ns } = Fields::parse(&answer_to)?;
        Some(Self {
            message,
            answer_to,
            seq,
            ts: ns / 1_000_000,
            given,
        })
    }

    /// The message, if it is one of a room.
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

    /// About the bytes that it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.message.length
    }
}

/// What the subject to answer to tells.
#[derive(Debug, PartialEq, Eq)]
struct Fields {
    seq: u64,
    given: u64,
    ns: u64,
}

impl Fields {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<seq>.<given>.<ns>.<pending>`, or the same with domain and account before
    /// the stream, and perhaps more at the end.
    fn parse(subject: &str) -> Option<Self> {
        let rest = subject.strip_prefix(api::ACK)?;
        let skip = match rest.split('.').count() {
            7 => 2,
            9.. => 4,
            _ => return None,
        };
        let mut fields = rest.split('.').skip(skip).map(str::parse);
        let mut next = || fields.next()?.ok();
        let _delivered: u64 = next()?;
        Some(Self {
            seq: next()?,
            given: next()?,
            ns: next()?,
        })
    }
}

/// Answers messages. Nobody confirms it: an answer that is lost means that the message is given out again.
pub async fn answer(connection: &Connection, deliveries: Vec<&Delivery>, answer: Answer) {
    // Of another connection they would be late at best.
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

/// How far the consumer of `stream` has come; `None`: there is none.
///
/// # Errors
/// [`PullError`].
pub async fn consumer_state(
    connection: &Connection,
    stream: &str,
    wait: Duration,
) -> Result<Option<ConsumerState>, PullError> {
    let subject = api::consumer_info(stream, HISTORY_CONSUMER);
    state_of(connection, stream, wait, subject).await
}

/// As [`consumer_state`], of a stream in its own region, which is another one.
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
        }) => {
            return Ok(Some(ConsumerState {
                pending,
                ack_pending,
                floor: floor.stream_seq,
            }));
        }
        Ok(_) => "the answer has neither state nor error".to_owned(),
    };
    Err(PullError::Refused {
        stream: stream.to_owned(),
        problem,
    })
}

/// When the first message of `stream` after `seq` was stored, in ms since 1970; `None`: there is none.
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

/// How many messages of `stream` are after `seq`.
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
