//! Reading streams by direct get: heads, pages, single messages. No consumer is involved.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::{Message, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout_at,
};

use super::{
    Connection, Delivery, Line, LineError, Record,
    record::{BadRecord, last, pairs},
};
use crate::{
    config,
    model::{Epoch, RoomId},
    subject::{Subjects, direct_get, header},
    telemetry::metrics::{Counter, Histogram, count, record},
};

/// Most subjects that one `multi_last` request may name, as of nats-server 2.15.
pub const MAX_HEADS: usize = 1024;

/// Bytes requested per page, since there is no flow control within a page.
const PAGE_BYTES: usize = 1 << 20;

/// Messages requested per page.
const PAGE_MESSAGES: usize = 1000;

/// Reads streams over its own connection. The server answers a connection's direct gets one after the other inside its
/// read loop, so a replay on the live connection would delay live messages.
#[derive(Debug, Clone)]
pub struct Reader {
    connection: Connection,
    subjects: Subjects,
    timeout: Duration,
    /// Bounds the requests in flight.
    turns: Arc<Semaphore>,
}

/// A stored message with the room it belongs to.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its room.
    pub room: RoomId,
    /// The message.
    pub record: Record,
}

/// One page of a room's log.
#[derive(Debug, Default)]
pub struct Page {
    /// Messages in stream order.
    pub records: Vec<Record>,
    /// Matching messages after the last one, when the page was read.
    pub pending: u64,
}

/// A read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No answer in time, or NATS can't be reached.
    #[error("stream {stream} did not answer a read within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// Nobody serves the stream: it does not exist, or it has no leader.
    #[error("stream {stream} is not there or has no leader")]
    NoStream { stream: String },
    /// The server answered with an error.
    #[error("stream {stream} refused a read: {status} {description}")]
    Refused {
        stream: String,
        status: u16,
        description: String,
    },
    /// The answer can't be read.
    #[error("stream {stream} answered what can't be read")]
    Malformed {
        stream: String,
        #[source]
        source: BadRecord,
    },
    /// There is no connection, or it ended before the answer.
    #[error("the NATS connection is closed")]
    Closed,
}

impl Reader {
    /// A reader over `connection`.
    #[must_use]
    pub fn new(connection: Connection, config: &config::Nats) -> Self {
        Self {
            connection,
            subjects: Subjects::new(&config.prefix),
            timeout: config.read_timeout,
            turns: Arc::new(Semaphore::new(config.replay_concurrency)),
        }
    }

    /// The connection over which it reads.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The timeout of one read.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Waits for one of the requests in flight to end.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>, ReadError> {
        // The semaphore is never closed.
        let turn = self.turns.acquire().await;
        turn.map_err(|_closed| ReadError::Closed)
    }

    /// The last message of each of `subjects`, in no particular order. Subjects without a message are left out.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn heads(
        &self,
        stream: &str,
        epoch: Epoch,
        subjects: &[String],
    ) -> Result<Vec<Stored>, ReadError> {
        let (messages, _) = self.get(stream, &multi_last(subjects)).await?;
        self.stored(&messages, stream, epoch)
    }

    /// Like [`Self::heads`], over a line. If this is the line of a live subscription that was made before, the server
    /// answers after it has processed that subscription: no message is lost between the heads and the first live
    /// message.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn heads_over(
        &self,
        line: &Line,
        stream: &str,
        epoch: Epoch,
        subjects: &[String],
    ) -> Result<Vec<Stored>, ReadError> {
        let request = multi_last(subjects).to_string();
        let answers = line
            .gather(&direct_get(stream), request.as_bytes(), self.timeout)
            .await
            .map_err(|error| unanswered(error, stream))?;
        let stored = answers.iter().map(|answer| {
            let headers = answer.headers();
            let subject = headers.last(header::SUBJECT);
            self.read(subject, headers.iter(), answer.payload(), stream, epoch)
        });
        stored.filter_map(Result::transpose).collect()
    }

    /// A page of a room's log, starting at sequence `from`.
    ///
    /// If the stream is trimmed meanwhile, the page contains what is left. A caller that must not miss a message checks
    /// afterwards that the stream still reaches back to where the read began.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn page(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        from: u64,
    ) -> Result<Page, ReadError> {
        let started = Instant::now();
        let answer = self.raw_page(stream, filter, from).await;
        if answer.is_err() {
            count(Counter::ReplayFailed, 1);
        }
        let (messages, end) = answer?;
        count(Counter::ReplayRequests, 1);
        record(Histogram::ReplayDuration, started.elapsed());
        let pending = end.unwrap_or_default();
        let records = self.stored(&messages, stream, epoch)?;
        Ok(Page {
            records: records.into_iter().map(|stored| stored.record).collect(),
            pending,
        })
    }

    /// The messages of a room's log that were stored in the last `within`, at most `most`. If there are more, the time
    /// is shortened until they fit; once it is below one second, the first `most` of that time are returned.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn recent(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        within: Duration,
        most: usize,
    ) -> Result<Vec<Record>, ReadError> {
        let mut within = within;
        loop {
            let from = SystemTime::now() - within;
            let request = serde_json::json!({
                "start_time": humantime::format_rfc3339_millis(from).to_string(),
                "next_by_subj": filter,
                "batch": most,
                "max_bytes": PAGE_BYTES,
            });
            let (messages, end) = self.get(stream, &request).await?;
            if end.unwrap_or_default() == 0 || within < Duration::from_secs(1) {
                let records = self.stored(&messages, stream, epoch)?;
                return Ok(records.into_iter().map(|stored| stored.record).collect());
            }
            within /= 4;
        }
    }

    /// A page of several rooms' logs, without messages that are not a room's, and the number of matches after it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn log(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        from: u64,
    ) -> Result<(Vec<Stored>, u64), ReadError> {
        let (messages, end) = self.raw_page(stream, filter, from).await?;
        let stored = self.stored(&messages, stream, epoch)?;
        Ok((stored, end.unwrap_or_default()))
    }

    /// At most `most` messages that match a filter, starting at sequence `from`, without messages that are not a room's.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn some(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        (from, most): (u64, usize),
    ) -> Result<Vec<Stored>, ReadError> {
        let (messages, _) = self.page_of(stream, filter, from, most).await?;
        self.stored(&messages, stream, epoch)
    }

    /// A page of messages that match a filter, starting at sequence `from`, and the number of matches after it.
    pub(super) async fn raw_page(
        &self,
        stream: &str,
        filter: &str,
        from: u64,
    ) -> Result<(Vec<Message>, Option<u64>), ReadError> {
        self.page_of(stream, filter, from, PAGE_MESSAGES).await
    }

    async fn page_of(
        &self,
        stream: &str,
        filter: &str,
        from: u64,
        most: usize,
    ) -> Result<(Vec<Message>, Option<u64>), ReadError> {
        let request = serde_json::json!({
            "seq": from.max(1),
            "next_by_subj": filter,
            "batch": most,
            "max_bytes": PAGE_BYTES,
        });
        self.get(stream, &request).await
    }

    /// The first message that matches a filter at sequence `from` or later.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn next(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        from: u64,
    ) -> Result<Option<Record>, ReadError> {
        let request = serde_json::json!({ "seq": from.max(1), "next_by_subj": filter, "batch": 1 });
        self.first(stream, epoch, &request).await
    }

    /// The first message that matches a filter and was stored at `ts` (ms since 1970) or later.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn next_since(
        &self,
        stream: &str,
        epoch: Epoch,
        filter: &str,
        ts: u64,
    ) -> Result<Option<Record>, ReadError> {
        let time = UNIX_EPOCH + Duration::from_millis(ts);
        let time = humantime::format_rfc3339_millis(time).to_string();
        let request = serde_json::json!({ "start_time": time, "next_by_subj": filter, "batch": 1 });
        self.first(stream, epoch, &request).await
    }

    /// The message that answers a request for one.
    async fn first(
        &self,
        stream: &str,
        epoch: Epoch,
        request: &serde_json::Value,
    ) -> Result<Option<Record>, ReadError> {
        let (messages, _) = self.get(stream, request).await?;
        let first = self.stored(&messages, stream, epoch)?.into_iter().next();
        Ok(first.map(|stored| stored.record))
    }

    /// The message at `seq`, in any room.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn message(
        &self,
        stream: &str,
        epoch: Epoch,
        seq: u64,
    ) -> Result<Option<Stored>, ReadError> {
        // 0 is the position before a stream's first message. The server treats a 0 as an absent field and refuses a
        // request without any field.
        if seq == 0 {
            return Ok(None);
        }
        let (messages, _) = self.get(stream, &serde_json::json!({ "seq": seq })).await?;
        Ok(self.stored(&messages, stream, epoch)?.pop())
    }

    /// The message at `seq` as a consumer would deliver it, for [`super::DeadLetters::keep`]. It can't be answered.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn delivery(&self, stream: &str, seq: u64) -> Result<Option<Delivery>, ReadError> {
        let request = serde_json::json!({ "seq": seq });
        let (mut messages, _) = self.get(stream, &request).await?;
        Ok(messages.pop().and_then(Delivery::read))
    }

    fn stored(
        &self,
        messages: &[Message],
        stream: &str,
        epoch: Epoch,
    ) -> Result<Vec<Stored>, ReadError> {
        let stored = messages.iter().map(|message| {
            let headers = message.headers.as_ref();
            let subject = headers.and_then(|headers| last(headers, header::SUBJECT));
            let headers = headers.into_iter().flat_map(pairs);
            self.read(subject, headers, message.payload.clone(), stream, epoch)
        });
        stored.filter_map(Result::transpose).collect()
    }

    /// Reads one stored message. `None` if its subject is not a room's, which happens only if it was published by hand.
    fn read<'a>(
        &self,
        subject: Option<&str>,
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        payload: Bytes,
        stream: &str,
        epoch: Epoch,
    ) -> Result<Option<Stored>, ReadError> {
        let Some(subject) = subject.and_then(|text| self.subjects.parse_stored(text)) else {
            return Ok(None);
        };
        let record = Record::stored(headers, payload, subject.class, epoch).map_err(|source| {
            ReadError::Malformed {
                stream: stream.to_owned(),
                source,
            }
        })?;
        Ok(Some(Stored {
            room: subject.room,
            record,
        }))
    }

    /// Sends a direct get and collects its answers: the messages, and the number of pending ones from the end of the
    /// batch.
    pub(super) async fn get(
        &self,
        stream: &str,
        request: &serde_json::Value,
    ) -> Result<(Vec<Message>, Option<u64>), ReadError> {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let timed_out = || ReadError::Timeout {
            stream: stream.to_owned(),
            waited: self.timeout,
        };
        let single = request.get("batch").is_none();
        let body = Bytes::from(request.to_string());
        let client = self.connection.client();
        let exchange = async {
            let _turn = self.turn().await?;
            let inbox = client.new_inbox();
            let closed = |_error| ReadError::Closed;
            let mut answers = client.subscribe(inbox.clone()).await.map_err(closed)?;
            client
                .publish_with_reply(direct_get(stream), inbox, body)
                .await
                .map_err(|_error| ReadError::Closed)?;
            let mut messages = Vec::new();
            while let Some(message) = answers.next().await {
                match message.status {
                    None => {
                        messages.push(message);
                        if single {
                            return Ok((messages, None));
                        }
                    }
                    Some(status) if status.as_u16() == 204 => {
                        return Ok((messages, pending_of(&message)));
                    }
                    Some(StatusCode::NOT_FOUND) => return Ok((messages, None)),
                    Some(StatusCode::NO_RESPONDERS) => {
                        return Err(ReadError::NoStream {
                            stream: stream.to_owned(),
                        });
                    }
                    Some(status) => {
                        return Err(ReadError::Refused {
                            stream: stream.to_owned(),
                            status: status.as_u16(),
                            description: message.description.unwrap_or_default(),
                        });
                    }
                }
            }
            Err(ReadError::Closed)
        };
        timeout_at(deadline, exchange)
            .await
            .map_err(|_elapsed| timed_out())?
    }
}

/// A request for the last message of each of `subjects`.
fn multi_last(subjects: &[String]) -> serde_json::Value {
    debug_assert!(subjects.len() <= MAX_HEADS, "the server refuses more");
    serde_json::json!({ "multi_last": subjects, "batch": MAX_HEADS })
}

/// Translates the error of a read over a line.
fn unanswered(error: LineError, stream: &str) -> ReadError {
    let stream = stream.to_owned();
    match error {
        LineError::Down | LineError::Lost => ReadError::Closed,
        LineError::Timeout(waited) => ReadError::Timeout { stream, waited },
        LineError::NoResponders => ReadError::NoStream { stream },
        LineError::Status(status, description) => ReadError::Refused {
            stream,
            status,
            description,
        },
        LineError::TooLarge { .. } => ReadError::Refused {
            stream,
            status: 0,
            description: error.to_string(),
        },
    }
}

/// The number of later matches, as a message or the end of a batch gives it.
pub(super) fn pending_of(message: &Message) -> Option<u64> {
    last(message.headers.as_ref()?, header::NUM_PENDING)?
        .parse()
        .ok()
}
