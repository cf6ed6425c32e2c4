//! Key-value buckets: acknowledged writes, reads by direct get, changes from the bucket's RePublish. There is no
//! watcher.
//!
//! Formats: a bucket is the stream `KV_<bucket>_<origin>` with one subject per key (NATS ADR-8). Per-key TTLs and the
//! server's markers are ADR-43 and ADR-48.

use std::{collections::BTreeSet, time::Duration};

use async_nats::{HeaderMap, Message, Request, RequestErrorKind};
use bytes::Bytes;
use tokio::time::timeout;

use super::{
    Connection, HeaderWriter, Line, LineError, LiveFeed, MAX_HEADS, ReadError, Reader, StreamError,
    jetstream::{self, Problem, PubAck, Purged, StreamInfo},
    record::{BadRecord, last, rfc3339_ms, stored_time},
    rooms::{self, rooms_of},
};
use crate::{
    config::Config,
    model::{Region, RoomId},
    subject::{Subjects, api, bucket_key, bucket_stream, header},
};

/// JetStream's error code for a wrong expected last sequence.
const WRONG_LAST_SEQUENCE: u32 = 10071;

/// The reason given in the marker of a key that its TTL has removed.
const EXPIRED: &str = "MaxAge";

/// How long the marker of a removed key is kept.
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

/// The value of a key, or its removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value; `None` if it was removed, explicitly or by its TTL.
    pub value: Option<Bytes>,
    /// Whether it was removed by its TTL.
    pub expired: bool,
    /// Sequence in the bucket's stream. It grows with every change.
    pub revision: u64,
    /// When the key changed, in ms since 1970.
    pub at: u64,
}

/// A key could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The key has changed since it was read.
    #[error("the key has changed meanwhile")]
    Conflict,
    /// NATS can't be reached, or the bucket has no leader. Nothing was written.
    #[error("the bucket is not reachable")]
    Unavailable,
    /// No answer in time. The key may have been written.
    #[error("the bucket did not answer within {0:?}")]
    UnknownOutcome(Duration),
    /// The bucket answered with another error.
    #[error("the bucket refuses it: {0}")]
    Refused(String),
    /// A read failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// State of a mirror relative to its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// Time since the mirror last heard from its origin. An origin sends a sign of life every second.
    pub ago: Duration,
    /// Whether the mirror had messages still to fetch.
    pub behind: bool,
}

impl From<Problem> for KvError {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem.into())
    }
}

/// Options of a write.
#[derive(Debug, Clone, Copy, Default)]
pub struct Put {
    /// The key expires after this time unless it is written again; whole seconds.
    pub ttl: Option<Duration>,
    /// Write only if this is the key's revision; 0: only if the key does not exist.
    pub expected: Option<u64>,
}

/// The revision that a write has made.
fn written(answer: &[u8]) -> Result<u64, KvError> {
    match PubAck::read(answer) {
        Ok(PubAck { seq, .. }) => Ok(seq),
        Err(Problem::Refused(error)) if error.err_code == WRONG_LAST_SEQUENCE => {
            Err(KvError::Conflict)
        }
        // 429: the stream's queue is full for now. 503: it has no leader for now.
        Err(Problem::Refused(error)) if error.code == 429 || error.code == 503 => {
            Err(KvError::Unavailable)
        }
        Err(problem) => Err(problem.into()),
    }
}

impl Bucket {
    /// The bucket of the own region, written over `connection` and read through `reader`.
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

    /// The bucket of another origin, as it is mirrored in this region. A mirror is written only by its own region. A
    /// purge there does not reach the mirror, which must be purged too.
    #[must_use]
    pub fn of(&self, origin: &Region) -> Self {
        Self {
            stream: bucket_stream(self.bucket, origin),
            origin: origin.clone(),
            ..self.clone()
        }
    }

    /// The same bucket with another timeout for writes.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The name of the bucket's stream.
    #[must_use]
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// The region that writes the bucket.
    #[must_use]
    pub fn origin(&self) -> &Region {
        &self.origin
    }

    /// The connection for writes and changes. Reads use the connection of the reader.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Writes a key and returns its new revision.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn put(&self, key: &str, value: Bytes, how: Put) -> Result<u64, KvError> {
        self.write(key, value, how, false).await
    }

    /// Removes a key and returns the revision of the removal.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn remove(&self, key: &str) -> Result<u64, KvError> {
        self.remove_for(key, REMOVED_FOR).await
    }

    /// Like [`Self::remove`], if the key still has this revision.
    ///
    /// # Errors
    /// [`KvError`]; [`KvError::Conflict`] if it has another one.
    pub async fn remove_at(&self, key: &str, revision: u64) -> Result<u64, KvError> {
        let how = Put {
            ttl: Some(REMOVED_FOR),
            expected: Some(revision),
        };
        self.write(key, Bytes::new(), how, true).await
    }

    /// Like [`Self::remove`], but the marker of the removal is kept for `time` (whole seconds).
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
        written(&answer)
    }

    /// Writes a key over a line, if `expected` is its revision (0: if it does not exist), and returns its new revision.
    /// Many such writes at once leave together, and their answers wake no task each.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn put_over(
        &self,
        line: &Line,
        key: &str,
        value: &str,
        expected: u64,
    ) -> Result<u64, KvError> {
        let headers = |headers: &mut HeaderWriter<'_>| {
            let mut digits = itoa::Buffer::new();
            headers.add(header::EXPECTED_LAST, digits.format(expected));
        };
        let subject = bucket_key(self.bucket, &self.origin, key);
        let answer = line
            .request(&subject, headers, value.as_bytes(), self.timeout)
            .await;
        match answer {
            Ok(answer) => written(&answer.payload()),
            Err(LineError::Down | LineError::NoResponders) => Err(KvError::Unavailable),
            Err(LineError::Lost | LineError::Timeout(_)) => {
                Err(KvError::UnknownOutcome(self.timeout))
            }
            Err(error @ (LineError::TooLarge { .. } | LineError::Status(..))) => {
                Err(KvError::Refused(error.to_string()))
            }
        }
    }

    /// Removes all matching keys and returns how many messages were removed. It leaves no markers, so nobody is
    /// notified.
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

    /// When a mirror last heard from its origin; `None` if it never has.
    ///
    /// # Errors
    /// [`KvError`], also if the bucket is not a mirror.
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

    /// The clock of the server that leads the bucket, in ms since 1970.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn server_time(&self) -> Result<u64, KvError> {
        let ts = self.info().await?.ts.unwrap_or_default();
        rfc3339_ms(&ts).map_err(|error| KvError::Refused(error.to_string()))
    }

    /// When the bucket was made, as the server writes it: one that was made again says something else.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn created(&self) -> Result<String, KvError> {
        Ok(self.info().await?.created.unwrap_or_default())
    }

    /// Configuration and state of the bucket's stream.
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

    /// The entries of `keys`, in no particular order. Keys that were never written are left out. One request is made
    /// per [`MAX_HEADS`] keys.
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

    /// All matching keys, ordered by the time of their last change. One request is made per page.
    ///
    /// A key that changes during the scan is returned in its old state, its new one, or both. A caller that subscribed
    /// to the changes before the scan gets everything, if it keeps the entry with the higher revision for each key.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn scan(&self, keys: &str) -> Result<Vec<Entry>, KvError> {
        let mut entries = Vec::new();
        let mut next = Some(1);
        while let Some(from) = next {
            let (page, after) = self.scan_from(keys, from).await?;
            entries.extend(page);
            next = after;
        }
        Ok(entries)
    }

    /// How many keys match. Removed keys count for a while.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn count(&self, keys: &str) -> Result<usize, StreamError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        rooms::count(
            self.reader.connection(),
            &self.stream,
            &filter,
            self.timeout,
        )
        .await
    }

    /// The rooms of the matching keys, about `most` of them; `room` finds the room of a key. Removed keys count for a while.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn rooms(
        &self,
        keys: &str,
        room: impl Fn(&str) -> Option<RoomId>,
        most: usize,
    ) -> Result<BTreeSet<RoomId>, StreamError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        let prefix = bucket_key(self.bucket, &self.origin, "");
        let of_subject = |subject: &str| room(subject.strip_prefix(&prefix)?);
        let connection = self.reader.connection();
        rooms_of(
            connection,
            &self.stream,
            &filter,
            of_subject,
            self.timeout,
            most,
        )
        .await
    }

    /// Some of the matching keys that have changed since the revision `from`, ordered by the time of their last change,
    /// and the revision to continue from if there are more.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn scan_from(
        &self,
        keys: &str,
        from: u64,
    ) -> Result<(Vec<Entry>, Option<u64>), KvError> {
        let filter = bucket_key(self.bucket, &self.origin, keys);
        let (messages, left) = self.reader.raw_page(&self.stream, &filter, from).await?;
        let entries = messages.iter().map(|message| self.stored(message));
        let entries: Vec<Entry> = entries.collect::<Result<_, _>>()?;
        let more = left.is_some_and(|left| left > 0);
        let next = entries.last().filter(|_| more);
        let next = next.map(|last| last.revision + 1);
        Ok((entries, next))
    }

    /// Revision of the newest change of the matching keys; 0 if there is none.
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

    /// Subscribes to the changes of the matching keys, in the buckets of all origins.
    ///
    /// # Errors
    /// [`KvError::Unavailable`] if the client was closed.
    pub async fn changes(&self, keys: &str) -> Result<LiveFeed, KvError> {
        let subject = self
            .subjects
            .bucket_changes(&self.region, self.bucket, keys);
        LiveFeed::open(&self.connection, subject)
            .await
            .map_err(|_closed| KvError::Unavailable)
    }

    /// Reads a message of [`Self::changes`]: the origin of the bucket, and the change. `None` if it is not a change of
    /// this bucket.
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
