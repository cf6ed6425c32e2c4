//! Publishing: durable messages with the stream's acknowledgement, ephemeral ones without.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::yield_now,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    HeaderWriter, KvError, Line, LineError, Reader, Remembered, Signal, Streams, Suspect,
    jetstream::{ApiError, Problem, PubAck},
    record::message_key,
};
use crate::{
    config,
    model::{Cursor, Fingerprint, Kind, Position, RoomId, header_escape, partition_of},
    protocol::{ErrorCode, Publication, Refused},
    runtime::unix_ms,
    subject::{KIND_READ, KIND_TYPING, Subjects, header, rooms_stream},
    telemetry::{
        self,
        metrics::{Counter, Histogram, PublishFault, count, record},
    },
};

/// Reads of the time of an acknowledged message before it is given up: the message was trimmed or erased, or can't be
/// read.
const TIME_READS: usize = 10;

/// Pause between two of these reads. A replica that lags behind usually has the message after one pause.
const TIME_PAUSE: Duration = Duration::from_millis(50);

/// Publishes over one line; cheap to clone.
#[derive(Debug, Clone)]
pub struct Publisher {
    line: Line,
    reader: Reader,
    streams: Arc<Streams>,
    subjects: Subjects,
    remembered: Arc<Remembered>,
    edge: Arc<str>,
    timeout: Duration,
}

/// A publication with its sender and its id.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// What the client sent.
    pub publication: &'a Publication,
    /// The sender.
    pub user: &'a str,
    /// The client's id, or one made by the edge.
    pub id: &'a str,
    /// The sender's position at other origins of the room.
    pub after: Option<Cursor>,
    /// When an imported message was sent, in ms since 1970.
    pub original_ts: Option<u64>,
}

/// The stream has stored the message.
#[derive(Debug, Clone)]
pub struct Acked {
    /// The message's position, as a cursor of one component.
    pub cursor: Cursor,
    /// Its sequence.
    pub seq: u64,
    /// When the stream stored it, in ms since 1970. 0 if that is unknown: the message was trimmed or erased meanwhile,
    /// or its time could not be read within the timeout.
    pub ts: u64,
    /// Whether the message had been stored before. The cursor is then that of the first copy.
    pub duplicate: bool,
}

/// A message was not published, or the outcome is unknown.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// NATS can't be reached, or nobody serves the stream. Nothing was stored.
    #[error("NATS is not reachable; nothing was stored")]
    Unavailable,
    /// No acknowledgement in time.
    #[error("the stream did not acknowledge within {0:?}; repeat it with the same id")]
    UnknownOutcome(Duration),
    /// The connection broke before the acknowledgement.
    #[error("the connection to NATS broke before the acknowledgement; repeat it with the same id")]
    Lost,
    /// The stream is still storing an earlier copy of the same message.
    #[error("the stream is about to store the message; repeat it with the same id")]
    InProcess,
    /// The stream has reached a limit, or the disk is full.
    #[error("the stream refuses the message: {0}")]
    StreamFull(String),
    /// The message exceeds a limit of the stream or the server.
    #[error("the message is larger than is taken: {0}")]
    TooLarge(String),
    /// The message, or the message it refers to, was erased.
    #[error("this message was erased, or what it is about; it is not stored again: drop it")]
    Erased,
    /// It can't be checked now whether the message was erased. Nothing was stored.
    #[error("whether this message was erased can't be told now; nothing was stored")]
    Doubtful(#[source] KvError),
    /// The stream answered with another error. Nothing was stored.
    #[error("the stream refuses the message: {0}")]
    Refused(String),
}

impl PublishError {
    fn fault(&self) -> PublishFault {
        match self {
            Self::Unavailable | Self::Doubtful(_) => PublishFault::Unavailable,
            Self::UnknownOutcome(_) | Self::Lost | Self::InProcess => PublishFault::UnknownOutcome,
            Self::StreamFull(_) => PublishFault::StreamFull,
            Self::TooLarge(_) | Self::Erased | Self::Refused(_) => PublishFault::Refused,
        }
    }

    /// The error code for the client.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unavailable | Self::Doubtful(_) => ErrorCode::Unavailable,
            Self::UnknownOutcome(_) | Self::Lost | Self::InProcess => ErrorCode::UnknownOutcome,
            Self::StreamFull(_) => ErrorCode::StreamFull,
            Self::TooLarge(_) => ErrorCode::TooLarge,
            Self::Erased => ErrorCode::Erased,
            Self::Refused(_) => ErrorCode::Internal,
        }
    }
}

impl From<PublishError> for Refused {
    fn from(error: PublishError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// JetStream error codes (nats-server `errors.json`) with a meaning of their own for a publisher.
mod err_code {
    /// Insufficient resources: the account's or server's limit.
    pub(super) const INSUFFICIENT_RESOURCES: u32 = 10023;
    /// Insufficient storage resources available.
    pub(super) const STORAGE_EXCEEDED: u32 = 10047;
    /// Message size exceeds maximum allowed.
    pub(super) const MESSAGE_TOO_LARGE: u32 = 10054;
    /// The stream's store failed: the maximum of messages, bytes or messages per subject is exceeded, or the disk
    /// failed.
    pub(super) const STORE_FAILED: u32 = 10077;
    /// Duplicate message id is in process: in a replicated stream, the first publish has no quorum yet.
    pub(super) const DUPLICATE_IN_PROCESS: u32 = 10158;
    /// Resource limits exceeded for account.
    pub(super) const ACCOUNT_LIMITS: u32 = 10002;
}

impl Publisher {
    /// A publisher over `line`. `reader` reads the times of messages. Messages that `remembered` lists as erased are
    /// refused.
    #[must_use]
    pub fn new(
        line: Line,
        reader: Reader,
        streams: Arc<Streams>,
        remembered: Arc<Remembered>,
        config: &config::Nats,
        edge: &str,
    ) -> Self {
        Self {
            line,
            reader,
            streams,
            subjects: Subjects::new(&config.prefix),
            remembered,
            edge: edge.into(),
            timeout: config.publish_timeout,
        }
    }

    /// The line it publishes over.
    #[must_use]
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// Publishes to the room's stream. `known_time` returns the time of a message that is in memory; otherwise the time
    /// is read from the stream. The whole call takes at most `nats.publish_timeout`: once the stream has acknowledged,
    /// a time that can't be read by then is left out.
    ///
    /// # Errors
    /// [`PublishError`]. After `UnknownOutcome`, `Lost` and `InProcess` the message may have been stored.
    pub async fn durable(
        &self,
        outgoing: &Outgoing<'_>,
        known_time: impl Fn(u64) -> Option<u64>,
    ) -> Result<Acked, PublishError> {
        let result = self.published(outgoing, known_time).await;
        match &result {
            Ok(acked) if acked.duplicate => count(Counter::PublishDuplicate, 1),
            Ok(_) => {}
            Err(error) => count(Counter::PublishFailed(error.fault()), 1),
        }
        result
    }

    async fn published(
        &self,
        outgoing: &Outgoing<'_>,
        known_time: impl Fn(u64) -> Option<u64>,
    ) -> Result<Acked, PublishError> {
        let deadline = Instant::now() + self.timeout;
        // Boxed: rare, and a large future.
        if self.remembered.is_any() && Box::pin(self.was_erased(outgoing, deadline)).await? {
            return Err(PublishError::Erased);
        }
        let mut acked = self.publish(outgoing, deadline).await?;
        // The stream republishes before it acknowledges: if the room is in memory, it has the message now, or after one
        // turn of the shard's tasks.
        let mut ts = known_time(acked.seq);
        if ts.is_none() {
            yield_now().await;
            ts = known_time(acked.seq);
        }
        acked.ts = match ts {
            Some(ts) => ts,
            // Boxed: rare, and a large future that most publishes do not need.
            None => {
                let stored_at = Box::pin(self.stored_at(&outgoing.publication.room, &acked));
                let ts = timeout_at(deadline, stored_at).await;
                ts.unwrap_or_default()
            }
        };
        Ok(acked)
    }

    /// Whether the message, or the message it refers to, was erased.
    async fn was_erased(
        &self,
        outgoing: &Outgoing<'_>,
        deadline: Instant,
    ) -> Result<bool, PublishError> {
        let suspect = Suspect {
            room: &outgoing.publication.room,
            from: outgoing.user,
            id: outgoing.id,
            target: outgoing.publication.target.as_ref().map(|(_, to)| to),
        };
        let told = timeout_at(deadline, self.remembered.has(suspect)).await;
        let told = told.unwrap_or(Err(KvError::Unavailable));
        told.map_err(PublishError::Doubtful)
    }

    async fn publish(
        &self,
        outgoing: &Outgoing<'_>,
        deadline: Instant,
    ) -> Result<Acked, PublishError> {
        let Outgoing {
            publication,
            user,
            id,
            ..
        } = outgoing;
        let room = &publication.room;
        let part = partition_of(room, self.streams.partitions());
        let subject =
            self.subjects
                .publish(self.streams.origin(), part, room, publication.kind.class());
        let key = message_key(room.as_str(), user, id);
        let fingerprint = Fingerprint::of(key.as_bytes());
        let headers = |headers: &mut HeaderWriter<'_>| {
            headers.add(header::MSG_ID, &key);
            write_headers(outgoing, &self.edge, headers);
        };
        let body = publication.body.get().as_bytes();
        let (newest, asked) = (self.streams.newest(part), Instant::now());
        let answer = self
            .line
            .request(&subject, headers, body, deadline - Instant::now())
            .await?;
        let PubAck { seq, duplicate } = PubAck::read(&answer.payload()).map_err(refusal)?;
        record(Histogram::PublishDuration, asked.elapsed());
        self.streams.note(part, seq);
        // A new message with a sequence that was already seen means that the stream may have been re-created. The
        // sequence is compared with the newest one *before* the request: the message itself usually arrives live before
        // its acknowledgement.
        if !duplicate && seq <= newest {
            // Boxed: rare, and a large future.
            let verify = Box::pin(self.streams.verify(part, Instant::now()));
            if !matches!(timeout_at(deadline, verify).await, Ok(Ok(_))) {
                // The message is stored in any case. At worst its cursor has the epoch of the previous incarnation, and
                // a client that resumes with it gets a `reset`.
                tracing::debug!(part, seq, "a stream could not be looked at");
            }
        }
        let state = self.streams.known(part);
        let position = Position {
            origin: self.streams.origin().clone(),
            epoch: state.epoch,
            seq,
            fingerprint,
        };
        Ok(Acked {
            cursor: Cursor::single(position),
            seq,
            ts: 0,
            duplicate,
        })
    }

    /// When the stream stored a message; 0 if that can't be read. Any replica may answer, also one that has not yet
    /// applied what the leader acknowledged: then the read is retried.
    async fn stored_at(&self, room: &RoomId, acked: &Acked) -> u64 {
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(self.streams.origin(), part);
        for read in 0..TIME_READS {
            if read > 0 {
                sleep(TIME_PAUSE).await;
            }
            let known = self.streams.known(part);
            match self.reader.message(&stream, known.epoch, acked.seq).await {
                Ok(Some(stored)) => return stored.record.shown_ts(),
                Ok(None) if acked.seq < known.first_seq => break,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, seq = acked.seq, "the time of a message can't be read");
                }
            }
        }
        0
    }

    /// Publishes a message of an ephemeral room and returns its time in ms since 1970. It is not acknowledged: only
    /// members who are connected get it.
    ///
    /// # Errors
    /// [`PublishError`].
    pub fn ephemeral(&self, outgoing: &Outgoing<'_>) -> Result<u64, PublishError> {
        let ts = unix_ms();
        let headers = |headers: &mut HeaderWriter<'_>| {
            write_headers(outgoing, &self.edge, headers);
            headers.add(header::TS, itoa::Buffer::new().format(ts));
        };
        let publication = outgoing.publication;
        let body = publication.body.get().as_bytes();
        let subject = self.subjects.ephemeral(&publication.room);
        self.line.publish(&subject, headers, body)?;
        Ok(ts)
    }

    /// Tells the members of a room that `user` is typing.
    ///
    /// # Errors
    /// [`PublishError`].
    pub fn typing(&self, room: &RoomId, user: &str) -> Result<(), PublishError> {
        self.notice(room, user, KIND_TYPING, &[])
    }

    /// Tells the members of a room how far `user` has read. When it returns, the server has the receipt: a crash of
    /// this process can't lose it any more.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn receipt(
        &self,
        room: &RoomId,
        user: &str,
        marker: &Cursor,
    ) -> Result<(), PublishError> {
        self.notice(room, user, KIND_READ, marker.to_string().as_bytes())?;
        timeout(self.timeout, self.line.round_trip())
            .await
            .unwrap_or(Err(LineError::Timeout(self.timeout)))?;
        Ok(())
    }

    /// Signals something to the sessions of users that watch. A lost signal is made up for, so a failure is no more than
    /// that.
    pub fn signal(&self, users: &[&str], signal: &Signal) {
        let payload = signal.to_json();
        for user in users {
            let subject = self.subjects.signals(user);
            match self.line.publish_later(&subject, &payload) {
                Ok(()) => count(Counter::SignalPublished, 1),
                Err(error) => tracing::debug!(%error, "a signal can't be published"),
            }
        }
    }

    fn notice(
        &self,
        room: &RoomId,
        user: &str,
        kind: &str,
        payload: &[u8],
    ) -> Result<(), PublishError> {
        let headers = |headers: &mut HeaderWriter<'_>| {
            headers
                .add(header::FROM, &header_escape(user))
                .add(header::KIND, kind);
        };
        let subject = self.subjects.ephemeral(room);
        Ok(self.line.publish(&subject, headers, payload)?)
    }
}

/// Writes the headers of a message that `edge` publishes.
pub(super) fn write_headers(outgoing: &Outgoing<'_>, edge: &str, headers: &mut HeaderWriter<'_>) {
    let Outgoing {
        publication,
        user,
        id,
        after,
        original_ts,
    } = outgoing;
    headers
        .add(header::FROM, &header_escape(user))
        .add(header::ID, id)
        .add(header::CLIENT, edge);
    if publication.kind != Kind::Message {
        headers.add(header::KIND, publication.kind.as_str());
    }
    if let Some((target, reference)) = &publication.target {
        headers.add(header::TARGET, &header_escape(target));
        // The caller has already checked the right to do so.
        if matches!(publication.kind, Kind::Edit | Kind::Delete) && !reference.is_by(user) {
            headers.add(header::MODERATED, "1");
        }
    }
    if let Some(reply_to) = &publication.reply_to {
        headers.add(header::REPLY_TO, &header_escape(reply_to));
    }
    if let Some(after) = after {
        headers.add(header::AFTER, &after.to_string());
    }
    if let Some(ts) = original_ts {
        headers.add(header::ORIGINAL_TIME, itoa::Buffer::new().format(*ts));
    }
    if let Some(mentions) = publication.mentions.json() {
        headers.add(header::MENTIONS, mentions);
    }
    if let Some(traceparent) = telemetry::current_traceparent() {
        headers.add(header::TRACEPARENT, &traceparent);
    }
}

impl From<LineError> for PublishError {
    fn from(error: LineError) -> Self {
        match error {
            LineError::Down | LineError::NoResponders => Self::Unavailable,
            LineError::Lost => Self::Lost,
            LineError::Timeout(waited) => Self::UnknownOutcome(waited),
            LineError::TooLarge { .. } => Self::TooLarge(error.to_string()),
            LineError::Status(..) => Self::Refused(error.to_string()),
        }
    }
}

fn refusal(problem: Problem) -> PublishError {
    let error: ApiError = match problem {
        Problem::Refused(error) => error,
        Problem::Failed(problem) => return PublishError::Refused(problem),
    };
    match error.err_code {
        err_code::MESSAGE_TOO_LARGE => PublishError::TooLarge(error.description),
        err_code::INSUFFICIENT_RESOURCES
        | err_code::STORAGE_EXCEEDED
        | err_code::STORE_FAILED
        | err_code::ACCOUNT_LIMITS => PublishError::StreamFull(error.description),
        err_code::DUPLICATE_IN_PROCESS => PublishError::InProcess,
        // 429: the stream's queue is full for now. 503: it has no leader for now. In both cases nothing was stored.
        _ if error.code == 429 || error.code == 503 => PublishError::Unavailable,
        _ => PublishError::Refused(error.description),
    }
}
