//! Publishing: durable with the stream's acknowledgement, ephemeral without.

use std::{sync::Arc, time::Duration};

use async_nats::{HeaderMap, Request, RequestErrorKind};
use bytes::Bytes;
use tokio::{
    task::yield_now,
    time::{Instant, timeout},
};

use super::{
    Connection, ReadError, Reader, StreamError, StreamState, Streams,
    ack::{AckError, PubAck},
    record::message_key,
};
use crate::{
    config,
    model::{Cursor, Fingerprint, Kind, Position, RoomId, header_escape, partition_of},
    protocol::{ErrorCode, native::Publication},
    runtime::unix_ms,
    subject::{KIND_READ, KIND_TYPING, Subjects, header, rooms_stream},
    telemetry::{
        self,
        metrics::{Counter, Histogram, PublishFault, count, record},
    },
};

/// Publishes over one connection; cheap to clone.
#[derive(Debug, Clone)]
pub struct Publisher {
    connection: Connection,
    reader: Reader,
    streams: Arc<Streams>,
    subjects: Subjects,
    edge: Arc<str>,
    timeout: Duration,
}

/// A publication with its sender and its id.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// What the client sent.
    pub publication: &'a Publication,
    /// Who.
    pub user: &'a str,
    /// The client's id, or the one the edge made.
    pub id: &'a str,
}

/// The stream has the message.
#[derive(Debug, Clone)]
pub struct Acked {
    /// The room's cursor after the message.
    pub cursor: Cursor,
    /// Its sequence.
    pub seq: u64,
    /// When the stream stored it, in ms since 1970; 0 if it was trimmed or erased meanwhile.
    pub ts: u64,
    /// Whether the stream had it before: then the cursor is that of the first time.
    pub duplicate: bool,
}

/// A message was not published, or nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// NATS can't be reached, or nobody answers for the stream: nothing was stored.
    #[error("NATS is not reachable; nothing was stored")]
    Unavailable,
    /// No acknowledgement in time.
    #[error("the stream did not acknowledge within {0:?}; repeat it with the same id")]
    UnknownOutcome(Duration),
    /// The stream has reached a limit or the disk is full.
    #[error("the stream refuses the message: {0}")]
    StreamFull(String),
    /// Larger than the stream or the server takes.
    #[error("the message is larger than the stream takes: {0}")]
    TooLarge(String),
    /// The stream answered with another error: it was not stored.
    #[error("the stream refuses the message: {0}")]
    Refused(String),
    /// Stored, but what is needed for the answer can't be read.
    #[error("the message is stored, but its cursor can't be told; repeat it with the same id")]
    Cursor(#[source] StreamError),
    /// Stored, but its time can't be read.
    #[error("the message is stored, but its time can't be told; repeat it with the same id")]
    Time(#[source] ReadError),
}

impl PublishError {
    fn fault(&self) -> PublishFault {
        match self {
            Self::Unavailable => PublishFault::Unavailable,
            Self::UnknownOutcome(_) | Self::Cursor(_) | Self::Time(_) => {
                PublishFault::UnknownOutcome
            }
            Self::StreamFull(_) => PublishFault::StreamFull,
            Self::TooLarge(_) | Self::Refused(_) => PublishFault::Refused,
        }
    }

    /// What the client is told.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unavailable => ErrorCode::Unavailable,
            Self::UnknownOutcome(_) | Self::Cursor(_) | Self::Time(_) => ErrorCode::UnknownOutcome,
            Self::StreamFull(_) => ErrorCode::StreamFull,
            Self::TooLarge(_) => ErrorCode::TooLarge,
            Self::Refused(_) => ErrorCode::Internal,
        }
    }
}

/// JetStream error codes (nats-server `errors.json`) that a publisher can meet and that mean "no room".
mod err_code {
    /// Insufficient resources: the account's or server's limit.
    pub(super) const INSUFFICIENT_RESOURCES: u32 = 10023;
    /// Insufficient storage resources available.
    pub(super) const STORAGE_EXCEEDED: u32 = 10047;
    /// Message size exceeds maximum allowed.
    pub(super) const MESSAGE_TOO_LARGE: u32 = 10054;
    /// The stream's store failed: maximum messages, bytes, or messages per subject exceeded, or the disk.
    pub(super) const STORE_FAILED: u32 = 10077;
    /// Resource limits exceeded for account.
    pub(super) const ACCOUNT_LIMITS: u32 = 10002;
}

impl Publisher {
    /// A publisher over `connection`; `reader` looks up the times of messages.
    #[must_use]
    pub fn new(
        connection: Connection,
        reader: Reader,
        streams: Arc<Streams>,
        config: &config::Nats,
        edge: &str,
    ) -> Self {
        Self {
            connection,
            reader,
            streams,
            subjects: Subjects::new(&config.prefix),
            edge: edge.into(),
            timeout: config.publish_timeout,
        }
    }

    /// Publishes to the room's stream; the answer comes within `nats.publish_timeout`. `known_time` tells the time of a
    /// message that is at hand; for others the stream is asked.
    ///
    /// # Errors
    /// [`PublishError`]; with `UnknownOutcome` the message may be stored all the same.
    pub async fn durable(
        &self,
        outgoing: &Outgoing<'_>,
        known_time: impl Fn(u64) -> Option<u64>,
    ) -> Result<Acked, PublishError> {
        let publish = async {
            let mut acked = self.publish(outgoing).await?;
            // The stream republishes before it acknowledges: who is in the room has the message now, or after one turn of
            // the shard's tasks.
            let mut ts = known_time(acked.seq);
            if ts.is_none() {
                yield_now().await;
                ts = known_time(acked.seq);
            }
            acked.ts = match ts {
                Some(ts) => ts,
                // Rare, and large: not part of what each publish needs.
                None => Box::pin(self.stored_at(&outgoing.publication.room, &acked)).await?,
            };
            Ok(acked)
        };
        let result = timeout(self.timeout, publish)
            .await
            .unwrap_or(Err(PublishError::UnknownOutcome(self.timeout)));
        match &result {
            Ok(acked) if acked.duplicate => count(Counter::PublishDuplicate, 1),
            Ok(_) => {}
            Err(error) => count(Counter::PublishFailed(error.fault()), 1),
        }
        result
    }

    async fn publish(&self, outgoing: &Outgoing<'_>) -> Result<Acked, PublishError> {
        if !self.connection.is_up() {
            return Err(PublishError::Unavailable);
        }
        let started = Instant::now();
        let Outgoing {
            publication,
            user,
            id,
        } = outgoing;
        let room = &publication.room;
        let part = partition_of(room, self.streams.partitions());
        let subject =
            self.subjects
                .publish(self.streams.origin(), part, room, publication.kind.class());
        let key = message_key(room.as_str(), user, id);
        let fingerprint = Fingerprint::of(key.as_bytes());
        let mut headers = self.headers(outgoing);
        headers.insert(header::MSG_ID, key);
        let request = Request::new().payload(body(publication)).headers(headers);
        let answer = match self
            .connection
            .client()
            .send_request(subject, request)
            .await
        {
            Err(error) => {
                return Err(match error.kind() {
                    RequestErrorKind::NoResponders => PublishError::Unavailable,
                    RequestErrorKind::MaxPayloadExceeded => {
                        PublishError::TooLarge(error.to_string())
                    }
                    RequestErrorKind::TimedOut => PublishError::UnknownOutcome(self.timeout),
                    RequestErrorKind::InvalidSubject | RequestErrorKind::Other => {
                        PublishError::Refused(error.to_string())
                    }
                });
            }
            Ok(answer) => answer,
        };
        let ack: PubAck = serde_json::from_slice(&answer.payload)
            .map_err(|error| PublishError::Refused(error.to_string()))?;
        let seq = match ack {
            PubAck {
                error: Some(error), ..
            } => return Err(refusal(error)),
            PubAck { seq: Some(seq), .. } => seq,
            PubAck { .. } => return Err(PublishError::Refused("an empty answer".to_owned())),
        };
        record(Histogram::PublishDuration, started.elapsed());
        let state = self.state_for(part, seq, ack.duplicate).await?;
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
            duplicate: ack.duplicate,
        })
    }

    /// The state of the stream that gave `seq`. A new message's sequence that is not beyond the newest we have seen hints
    /// that the stream was re-created (or that acknowledgements overtook each other): then its epoch is looked up.
    async fn state_for(
        &self,
        part: u16,
        seq: u64,
        duplicate: bool,
    ) -> Result<StreamState, PublishError> {
        let now = Instant::now();
        let news = self.streams.note(part, seq);
        if duplicate || news {
            return Ok(self.streams.known(part));
        }
        Box::pin(self.streams.verify(part, now))
            .await
            .map_err(PublishError::Cursor)
    }

    /// When the stream stored a message.
    async fn stored_at(&self, room: &RoomId, acked: &Acked) -> Result<u64, PublishError> {
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(self.streams.origin(), part);
        let epoch = self.streams.known(part).epoch;
        let stored = self
            .reader
            .message(&stream, epoch, acked.seq)
            .await
            .map_err(PublishError::Time)?;
        Ok(stored.map_or(0, |stored| stored.record.ts))
    }

    /// Publishes a message of an ephemeral room; returns its time in ms since 1970. Nobody acknowledges it: whoever is there
    /// gets it.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn ephemeral(&self, outgoing: &Outgoing<'_>) -> Result<u64, PublishError> {
        let ts = unix_ms();
        let mut headers = self.headers(outgoing);
        headers.insert(header::TS, ts.to_string());
        self.signal(
            &outgoing.publication.room,
            headers,
            body(outgoing.publication),
        )
        .await?;
        Ok(ts)
    }

    /// Tells the members of a room that `user` is typing.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn typing(&self, room: &RoomId, user: &str) -> Result<(), PublishError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::FROM, header_escape(user).as_ref());
        headers.insert(header::KIND, KIND_TYPING);
        self.signal(room, headers, Bytes::new()).await
    }

    /// Tells the members of a room up to where `user` has read. When it returns, the news is on its way: it survives the
    /// end of this process.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn receipt(
        &self,
        room: &RoomId,
        user: &str,
        marker: &Cursor,
    ) -> Result<(), PublishError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::FROM, header_escape(user).as_ref());
        headers.insert(header::KIND, KIND_READ);
        self.signal(room, headers, marker.to_string().into())
            .await?;
        let flushed = timeout(self.timeout, self.connection.client().flush()).await;
        flushed
            .is_ok_and(|flushed| flushed.is_ok())
            .then_some(())
            .ok_or(PublishError::Unavailable)
    }

    async fn signal(
        &self,
        room: &RoomId,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<(), PublishError> {
        if !self.connection.is_up() {
            return Err(PublishError::Unavailable);
        }
        let subject = self.subjects.ephemeral(room);
        let published = self
            .connection
            .client()
            .publish_with_headers(subject, headers, payload);
        match timeout(self.timeout, published).await {
            Err(_elapsed) => Err(PublishError::Unavailable),
            Ok(Err(error)) => match error.kind() {
                async_nats::PublishErrorKind::MaxPayloadExceeded => {
                    Err(PublishError::TooLarge(error.to_string()))
                }
                async_nats::PublishErrorKind::InvalidSubject
                | async_nats::PublishErrorKind::Send => {
                    Err(PublishError::Refused(error.to_string()))
                }
            },
            Ok(Ok(())) => Ok(()),
        }
    }

    fn headers(&self, outgoing: &Outgoing<'_>) -> HeaderMap {
        let Outgoing {
            publication,
            user,
            id,
        } = outgoing;
        let mut headers = HeaderMap::new();
        headers.insert(header::FROM, header_escape(user).as_ref());
        headers.insert(header::ID, *id);
        headers.insert(header::CLIENT, &*self.edge);
        if publication.kind != Kind::Message {
            headers.insert(header::KIND, publication.kind.as_str());
        }
        if let Some((target, reference)) = &publication.target {
            headers.insert(header::TARGET, header_escape(target).as_ref());
            // Who publishes has checked it: without the right it would not have come here.
            if matches!(publication.kind, Kind::Edit | Kind::Delete) && !reference.is_by(user) {
                headers.insert(header::MODERATED, "1");
            }
        }
        if let Some(reply_to) = &publication.reply_to {
            headers.insert(header::REPLY_TO, header_escape(reply_to).as_ref());
        }
        if !publication.mentions.is_empty()
            && let Ok(json) = serde_json::to_string(&publication.mentions)
        {
            headers.insert(header::MENTIONS, json);
        }
        if let Some(traceparent) = telemetry::current_traceparent() {
            headers.insert(header::TRACEPARENT, traceparent);
        }
        headers
    }
}

fn body(publication: &Publication) -> Bytes {
    Bytes::copy_from_slice(publication.body.get().as_bytes())
}

fn refusal(error: AckError) -> PublishError {
    match error.err_code {
        err_code::MESSAGE_TOO_LARGE => PublishError::TooLarge(error.description),
        err_code::INSUFFICIENT_RESOURCES
        | err_code::STORAGE_EXCEEDED
        | err_code::STORE_FAILED
        | err_code::ACCOUNT_LIMITS => PublishError::StreamFull(error.description),
        // 429: the stream's queue is full for now. 503: no leader for now. Neither has stored it.
        _ if error.code == 429 || error.code == 503 => PublishError::Unavailable,
        _ => PublishError::Refused(error.description),
    }
}
