//! Key-value buckets: writes with their acknowledgement, reads by direct get, changes by the bucket's RePublish. No watcher.
//!
//! Formats: a bucket is the stream `KV_<bucket>_<origin>` with a subject a key (NATS ADR-8); per-key TTL and the markers that
//! the server leaves are ADR-43 and ADR-48.

use std::time::Duration;

use async_nats::{HeaderMap, Message, Request, RequestErrorKind};
use bytes::Bytes;
use tokio::time::timeout;

use super::{
    Connection, LiveFeed, MAX_HEADS, ReadError, Reader,
    jetstream::{self, Problem, PubAck, Purged, StreamInfo},
    record::{BadRecord, last, rfc3339_ms, stored_time},
};
use crate::{
    config::Config,
    model::Region,
    subject::{Subjects, api, bucket_key, bucket_stream, header},
};

/// JetStream's error code for an expected last sequence that is not the last one.
const WRONG_LAST_SEQUENCE: u32 = 10071;

/// What the mark of a key says that its TTL has removed.
const EXPIRED: &str = "MaxAge";

/// How long a removed key says that it was removed; then nothing is left of it.
const REMOVED_FOR: Duration = Duration::from_secs(60);

/// One bucket of one origin.
#[derive(Debug, Clone)]
pub struct Bucket {
    connection: Connection,
    reader: Reader,
    subjects: Subjects,
    bucket: &'static str,
    region: Region,
    origin: Region,
    stream: String,
    timeout: Duration,
}

/// What a key holds, or that it was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value; `None`: it was removed, by hand or by its TTL.
    pub value: Option<Bytes>,
    /// Whether its TTL has removed it.
    pub expired: bool,
    /// Sequence in the bucket's stream: what comes later has a higher one.
    pub revision: u64,
    /// When that was, in ms since 1970.
    pub at: u64,
}

/// A key could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The key has changed since it was read.
    #[error("the key has changed meanwhile")]
    Conflict,
    /// NATS can't be reached, or the bucket has no leader: nothing was written.
    #[error("the bucket is not reachable")]
    Unavailable,
    /// No answer in time: it may have been written.
    #[error("the bucket did not answer within {0:?}")]
    UnknownOutcome(Duration),
    /// The bucket answered with another error.
    #[error("the bucket refuses it: {0}")]
    Refused(String),
    /// A read failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// How a mirror stands to its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// How long ago it last heard from it; an origin says something every second.
    pub ago: Duration,
    /// Whether there was more to come then.
    pub behind: bool,
}

impl From<Problem> for KvError {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem.into())
    }
}

/// How a key is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Put {
    /// How long it lives unless it is written again; whole seconds.
    pub ttl: Option<Duration>,
    /// Only if this is its revision; 0: only if it does not exist.
    pub expected: Option<u64>,
}

impl Bucket {
    /// The bucket of the region itself, written over `connection` and read by `reader`.
    #[must_use]
    pub fn new(
        connection: Connection,
        reader: Reader,
        config: &Config,
        bucket: &'static str,
    ) -> Self {
        let origin = config.region();
        Self {
            connection,
            reader,
            subjects: Subjects::new(&config.nats.prefix),
            bucket,
            stream: bucket_stream(bucket, &origin),
            region: origin.clone(),
            origin,
            timeout: config.nats.publish_timeout,
        }
    }

    /// The bucket of another origin, as this region has it: a mirror. Written only in its own region; what is purged there
    /// stays here until it is purged here too.
    #[must_use]
    pub fn of(&self, origin: &Region) -> Self {
        Self {
            stream: bucket_stream(self.bucket, origin),
            origin: origin.clone(),
            ..self.clone()
        }
    }

    /// The same with another time that a write may take.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The name of its stream.
    #[must_use]
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// The region whose bucket it is.
    #[must_use]
    pub fn origin(&self) -> &Region {
        &self.origin
    }

    /// The connection it is written and read over.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Writes a key; its new revision.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn put(&self, key: &str, value: Bytes, how: Put) -> Result<u64, KvError> {
        self.write(key, value, how, false).await
    }

    /// Removes a key; the revision of its removal.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn remove(&self, key: &str) -> Result<u64, KvError> {
        self.remove_for(key, REMOVED_FOR).await
    }

    /// As [`Self::remove`]; the key says for `time` (whole seconds) that it was removed.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn remove_for(&self, key: &str, time: Duration) -> Result<u64, KvError> {
        let how = Put {
            ttl: Some(time),
            expected: None,
        };
        self.write(key, Bytes::new(), how, true).await
    }

    async fn write(
        &self,
        key: &str,
        value: Bytes,
        how: Put,
        removed: bool,
    ) -> Result<u64, KvError> {
        let mut headers = HeaderMap::new();
        if let Some(ttl) = how.ttl {
            headers.insert(header::TTL, format!("{}s", ttl.as_secs()));
        }
        if let Some(expected) = how.expected {
            headers.insert(header::EXPECTED_LAST, expected.to_string());
        }
        if removed {
            headers.insert(header::KV_OPERATION, "DEL");
        }
        let request = Request::new().payload(value).headers(headers);
        let subject = bucket_key(self.bucket, &self.origin, key);
        let answer = self.request(subject, request).await?;
        match PubAck::read(&answer) {
            Ok(PubAck { seq, .. }) => Ok(seq),
            Err(Problem::Refused(error)) if error.err_code == WRONG_LAST_SEQUENCE => {
                Err(KvError::Conflict)
            }
            // The stream's queue is full for now, or it has no leader for now.
            Err(Problem::Refused(error)) if error.code == 429 || error.code == 503 => {
                Err(KvError::Unavailable)
            }
            Err(problem) => Err(problem.into()),
        }
    }

    /// Removes all keys that match, at once and without a trace: nobody is told.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn purge(&self, keys: &str) -> Result<u64, KvError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        let body = serde_json::json!({ "filter": filter }).to_string();
        let request = Request::new().payload(body.into());
        let answer = self
            .request(api::stream_purge(&self.stream), request)
            .await?;
        let Purged { purged } = jetstream::read(&answer)?;
        Ok(purged)
    }

    /// When a mirror last heard from its origin; `None`: it has not heard from it yet.
    ///
    /// # Errors
    /// [`KvError`]; also where it is no mirror.
    pub async fn heard(&self) -> Result<Option<Heard>, KvError> {
        let Some(mirror) = self.info().await?.mirror else {
            return Err(KvError::Refused(format!("{} is no mirror", self.stream)));
        };
        let active = u64::try_from(mirror.active).ok();
        Ok(active.map(|nanos| Heard {
            ago: Duration::from_nanos(nanos),
            behind: mirror.lag > 0,
        }))
    }

    /// What the clock of the server says that leads the bucket, in ms since 1970.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn server_time(&self) -> Result<u64, KvError> {
        let ts = self.info().await?.ts.unwrap_or_default();
        rfc3339_ms(&ts).map_err(|error| KvError::Refused(error.to_string()))
    }

    /// What the bucket's stream is, and how it stands.
    async fn info(&self) -> Result<StreamInfo, KvError> {
        let request = Request::new().payload(Bytes::new());
        let answer = self
            .request(api::stream_info(&self.stream), request)
            .await?;
        Ok(jetstream::read(&answer)?)
    }

    async fn request(&self, subject: String, request: Request) -> Result<Bytes, KvError> {
        if !self.connection.is_up() {
            return Err(KvError::Unavailable);
        }
        let request = self.connection.client().send_request(subject, request);
        match timeout(self.timeout, request).await {
            Err(_elapsed) => Err(KvError::UnknownOutcome(self.timeout)),
            Ok(Ok(answer)) => Ok(answer.payload),
            Ok(Err(error)) => Err(match error.kind() {
                RequestErrorKind::NoResponders => KvError::Unavailable,
                RequestErrorKind::TimedOut => KvError::UnknownOutcome(self.timeout),
                RequestErrorKind::InvalidSubject
                | RequestErrorKind::MaxPayloadExceeded
                | RequestErrorKind::Other => KvError::Refused(error.to_string()),
            }),
        }
    }

    /// What each of `keys` holds, in no particular order; keys that never were are left out. One request for up to 1,024.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn get(&self, keys: &[String]) -> Result<Vec<Entry>, KvError> {
        let mut entries = Vec::with_capacity(keys.len());
        for keys in keys.chunks(MAX_HEADS) {
            let subjects: Vec<String> = keys
                .iter()
                .map(|key| bucket_key(self.bucket, &self.origin, key))
                .collect();
            let request = serde_json::json!({ "multi_last": subjects, "batch": MAX_HEADS });
            let (messages, _) = self.reader.get(&self.stream, &request).await?;
            for message in &messages {
                entries.push(self.stored(message)?);
            }
        }
        Ok(entries)
    }

    /// All keys that match, by age of their last change. A request a thousand keys.
    ///
    /// What changes meanwhile is seen before or after its change. Whoever has subscribed to the changes before has the
    /// whole truth, when of two entries of one key the one with the higher revision counts.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn scan(&self, keys: &str) -> Result<Vec<Entry>, KvError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        let mut entries = Vec::new();
        let mut from = 1;
        loop {
            let (messages, end) = self.reader.raw_page(&self.stream, &filter, from).await?;
            for message in &messages {
                entries.push(self.stored(message)?);
            }
            match (entries.last(), end) {
                (Some(last), Some(1..)) if !messages.is_empty() => from = last.revision + 1,
                _ => return Ok(entries),
            }
        }
    }

    /// Revision of the newest change of the keys that match; 0: there is none.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn newest(&self, keys: &str) -> Result<u64, KvError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        let request = serde_json::json!({ "last_by_subj": filter });
        let (messages, _) = self.reader.get(&self.stream, &request).await?;
        match messages.first() {
            Some(message) => Ok(self.stored(message)?.revision),
            None => Ok(0),
        }
    }

    /// The changes of the keys that match, in the buckets of all origins.
    ///
    /// # Errors
    /// [`KvError::Unavailable`] when the client was closed.
    pub async fn changes(&self, keys: &str) -> Result<LiveFeed, KvError> {
        let subject = self
            .subjects
            .bucket_changes(&self.region, self.bucket, keys);
        LiveFeed::open(&self.connection, subject)
            .await
            .map_err(|_closed| KvError::Unavailable)
    }

    /// Reads a message of [`Self::changes`]: whose bucket, and what changed. `None`: it is not one of a bucket.
    #[must_use]
    pub fn change(&self, message: &Message) -> Option<(Region, Entry)> {
        let (origin, key) = self.subjects.parse_change(&message.subject, self.bucket)?;
        let entry = entry(key, message).ok()?;
        Some((origin, entry))
    }

    fn stored(&self, message: &Message) -> Result<Entry, ReadError> {
        let malformed = |source| ReadError::Malformed {
            stream: self.stream.clone(),
            source,
        };
        let prefix = bucket_key(self.bucket, &self.origin, "");
        let key = message
            .headers
            .as_ref()
            .and_then(|headers| last(headers, header::SUBJECT))
            .and_then(|subject| subject.strip_prefix(&prefix))
            .ok_or_else(|| malformed(BadRecord::Sequence))?;
        entry(key, message).map_err(malformed)
    }
}

fn entry(key: &str, message: &Message) -> Result<Entry, BadRecord> {
    let headers = message.headers.as_ref().ok_or(BadRecord::Sequence)?;
    let reason = headers.get(header::MARKER_REASON);
    let removed = headers.get(header::KV_OPERATION).is_some() || reason.is_some();
    Ok(Entry {
        key: key.to_owned(),
        value: (!removed).then(|| message.payload.clone()),
        expired: reason.is_some_and(|reason| reason.as_str() == EXPIRED),
        revision: last(headers, header::SEQUENCE)
            .and_then(|text| text.parse().ok())
            .ok_or(BadRecord::Sequence)?,
        at: stored_time(headers)?,
    })
}
