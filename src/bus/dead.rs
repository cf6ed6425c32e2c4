//! Dead letters: messages that the history service can't write, or that a worker or hook does not accept, kept in streams of their
//! own with the reason.

use std::time::Duration;

use async_nats::{HeaderMap, Message, Request};
use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::time::timeout;

use super::{
    Connection, Delivery, ReadError, Reader, Record, Stored,
    jetstream::{self, Problem, PubAck},
    pull::count_after,
    record::{BadRecord, last, stored_time},
};
use crate::{
    config::Config,
    model::{Epoch, Fingerprint, Region},
    subject::{Subjects, api, dead_stream, header, undelivered_stream},
};

/// The role of workers in the subjects of dead letters.
pub const WORKER_ROLE: &str = "worker";

/// The role of hooks in the subjects of dead letters.
pub const HOOK_ROLE: &str = "hook";

/// Whose dead letters.
#[derive(Debug, Clone)]
enum Whose {
    History,
    /// Of receivers of this role.
    Receivers(&'static str),
}

/// The dead letters of a region: of the history service, or of receivers.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    whose: Whose,
    connection: Connection,
    reader: Reader,
    subjects: Subjects,
    stream: String,
    origin: Region,
    timeout: Duration,
}

/// A message that could not be written to history, or was not accepted.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Its sequence in the stream of dead letters.
    pub number: u64,
    /// When it became a dead letter, in ms since 1970.
    pub at: u64,
    /// The receiver that did not accept it; none in the history service.
    pub receiver: Option<String>,
    /// Why it can't be written, or was not accepted.
    pub reason: String,
    /// Its subject in its own stream.
    pub subject: String,
    /// The epoch of its own stream.
    pub epoch: Epoch,
    /// Its sequence in its own stream.
    pub seq: u64,
    /// When its own stream stored it, in ms since 1970.
    pub ts: u64,
    /// The message as it was published.
    pub payload: Bytes,
    /// The same as a room's message, if it is one.
    pub stored: Option<Stored>,
}

/// A dead letter could not be written or removed.
#[derive(Debug, thiserror::Error)]
pub enum LetterError {
    /// No answer in time, or NATS can't be reached.
    #[error("stream {stream} did not answer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// The server or the stream answered with an error, or nobody serves the stream.
    #[error("stream {stream}: {problem}")]
    Refused { stream: String, problem: String },
}

impl DeadLetters {
    /// The dead letters of the configured region's history service.
    #[must_use]
    pub fn of_history(connection: Connection, reader: Reader, config: &Config) -> Self {
        let stream = dead_stream(&config.region());
        Self::new(Whose::History, stream, connection, reader, config)
    }

    /// What receivers of a role in the configured region did not accept: [`WORKER_ROLE`] or [`HOOK_ROLE`].
    #[must_use]
    pub fn of_receivers(
        role: &'static str,
        connection: Connection,
        reader: Reader,
        config: &Config,
    ) -> Self {
        let stream = undelivered_stream(&config.region());
        Self::new(Whose::Receivers(role), stream, connection, reader, config)
    }

    fn new(
        whose: Whose,
        stream: String,
        connection: Connection,
        reader: Reader,
        config: &Config,
    ) -> Self {
        let origin = config.region();
        Self {
            whose,
            connection,
            reader,
            subjects: Subjects::new(&config.nats.prefix),
            stream,
            origin,
            timeout: config.nats.publish_timeout,
        }
    }

    /// Keeps a message of `stream` with the reason why it can't be written, or why `receiver` did not accept it (empty for
    /// history). Retries are deduplicated.
    ///
    /// # Errors
    /// [`LetterError`]. The message may have been kept.
    pub async fn keep(
        &self,
        delivery: &Delivery,
        receiver: &str,
        stream: &str,
        epoch: Epoch,
        reason: &str,
    ) -> Result<(), LetterError> {
        let Delivery {
            message, seq, ts, ..
        } = delivery;
        let subject = match self.whose {
            Whose::History => self.subjects.dead(&message.subject),
            Whose::Receivers(role) => self.subjects.undelivered(role, receiver, &message.subject),
        };
        let subject =
            subject.ok_or_else(|| self.refused(format!("no place for {}", message.subject)))?;
        let fingerprint = delivery
            .stored(&self.subjects, epoch)
            .map(|stored| stored.record.fingerprint)
            .unwrap_or_default();
        let mut headers = HeaderMap::new();
        for (name, values) in message.headers.iter().flat_map(HeaderMap::iter) {
            // These headers were instructions for the message's own stream.
            let for_stream = AsRef::<str>::as_ref(name).starts_with("Nats-");
            for value in values.iter().filter(|_| !for_stream) {
                headers.append(name.clone(), value.clone());
            }
        }
        let mut key = format!("{stream}-{epoch}-{seq}");
        if let Whose::Receivers(role) = self.whose {
            key.insert_str(0, &format!("{role}.{receiver}-"));
        }
        headers.insert(header::MSG_ID, key);
        headers.insert(header::REASON, one_line(reason));
        let place = format!("{epoch} {seq} {ts} {:x}", fingerprint.0);
        headers.insert(header::PLACE, place);
        let request = Request::new()
            .payload(message.payload.clone())
            .headers(headers);
        let kept = async {
            let answer = self.connection.client().send_request(subject, request);
            PubAck::read(&answer.await?.payload)
        };
        self.in_time(kept).await.map(|_ack| ())
    }

    /// A page of dead letters from `from` on, oldest first, and the number of letters after it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn list(&self, from: u64) -> Result<(Vec<DeadLetter>, u64), ReadError> {
        let filter = self.filter("*");
        let (messages, after) = self.reader.raw_page(&self.stream, &filter, from).await?;
        let letters: Result<Vec<DeadLetter>, BadRecord> = messages
            .iter()
            .map(|message| self.letter(message))
            .collect();
        let letters = letters.map_err(|source| ReadError::Malformed {
            stream: self.stream.clone(),
            source,
        })?;
        Ok((letters, after.unwrap_or_default()))
    }

    /// The subjects of the letters; of one receiver, if `name` is not `*`.
    fn filter(&self, name: &str) -> String {
        match self.whose {
            Whose::History => self.subjects.dead_all(&self.origin),
            Whose::Receivers(role) => self.subjects.undelivered_to(&self.origin, role, name),
        }
    }

    /// The number of dead letters; of one receiver, if `receiver` is not `*`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn count(&self, receiver: &str) -> Result<u64, ReadError> {
        let filter = self.filter(receiver);
        count_after(&self.reader, &self.stream, &filter, 0).await
    }

    /// Removes one.
    ///
    /// # Errors
    /// [`LetterError`].
    pub async fn remove(&self, number: u64) -> Result<(), LetterError> {
        let request = Bytes::from(json!({ "seq": number }).to_string());
        let subject = api::message_delete(&self.stream);
        let removed = jetstream::ask(&self.connection, subject, request);
        let IgnoredAny = self.in_time(removed).await?;
        Ok(())
    }

    async fn in_time<T>(
        &self,
        asked: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, LetterError> {
        match timeout(self.timeout, asked).await {
            Err(_elapsed) => Err(LetterError::Timeout {
                stream: self.stream.clone(),
                waited: self.timeout,
            }),
            Ok(answer) => answer.map_err(|problem| self.refused(problem.into())),
        }
    }

    fn refused(&self, problem: String) -> LetterError {
        LetterError::Refused {
            stream: self.stream.clone(),
            problem,
        }
    }

    fn letter(&self, message: &Message) -> Result<DeadLetter, BadRecord> {
        let headers = message.headers.as_ref().ok_or(BadRecord::Sequence)?;
        let text = |name| last(headers, name).unwrap_or_default();
        let number = text(header::SEQUENCE)
            .parse()
            .map_err(|_not_a_number: std::num::ParseIntError| BadRecord::Sequence)?;
        let stored_at = StoredAt::parse(text(header::PLACE));
        let kept = text(header::SUBJECT);
        let (receiver, subject) = match self.whose {
            Whose::History => (None, self.subjects.dead_stored(kept)),
            Whose::Receivers(_) => match self.subjects.undelivered_stored(kept) {
                Some((name, subject)) => (Some(name.to_owned()), Some(subject)),
                None => (None, None),
            },
        };
        let subject = subject.unwrap_or_default();
        let StoredAt {
            epoch,
            seq,
            ts,
            fingerprint,
        } = stored_at.ok_or(BadRecord::Time)?;
        let stored = self.subjects.parse_stored(&subject).map(|parsed| {
            let payload = message.payload.clone();
            let mut record = Record::at(Some(headers), payload, parsed.class, epoch, (seq, ts));
            record.fingerprint = fingerprint;
            Stored {
                room: parsed.room,
                record,
            }
        });
        Ok(DeadLetter {
            number,
            at: stored_time(headers)?,
            receiver,
            reason: text(header::REASON).to_owned(),
            subject,
            epoch,
            seq,
            ts,
            payload: message.payload.clone(),
            stored,
        })
    }
}

/// The value of [`header::PLACE`]: position and time of the message in its own stream.
struct StoredAt {
    epoch: Epoch,
    seq: u64,
    ts: u64,
    fingerprint: Fingerprint,
}

impl StoredAt {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        Some(Self {
            epoch: Epoch::parse(words.next()?)?,
            seq: words.next()?.parse().ok()?,
            ts: words.next()?.parse().ok()?,
            fingerprint: Fingerprint(u16::from_str_radix(words.next()?, 16).ok()?),
        })
    }
}

/// Makes a text fit for a header: one line, of bounded length.
fn one_line(text: &str) -> String {
    const MOST: usize = 500;
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MOST).map(plain).collect()
}
