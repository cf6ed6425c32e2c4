//! Removes messages from the region's streams for good: all of a room or single ones. Announces the removal in the
//! room.

use std::{sync::Arc, time::Duration};

use async_nats::{HeaderMap, Message, Request};
use bytes::Bytes;
use futures_util::future::try_join_all;
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::time::{sleep, timeout};

use super::{
    BadRecord, Connection, ReadError, Reader, Record, StreamError, Streams,
    jetstream::{self, Problem, PubAck, Purged, StreamInfo},
    record::{last, message_key, pairs, rfc3339_ms},
};
use crate::{
    config,
    model::{Kind, Reference, RoomId, partition_of},
    runtime::unix_ms,
    subject::{FROM_NATTER, Subjects, api, dead_stream, header, rooms_stream, undelivered_stream},
};

/// Timeout of a purge. JetStream reads every block of the stream for it.
const PURGE_DEADLINE: Duration = Duration::from_secs(60);

/// Reads of a replicated stream after which a message is believed to be gone, and the pause between them.
const READS: u32 = 5;
const BETWEEN_READS: Duration = Duration::from_millis(100);

/// Deletes in flight at once.
const DELETES_IN_FLIGHT: usize = 16;

/// Removes messages from the streams of the region; cheap to clone.
#[derive(Debug, Clone)]
pub struct Eraser {
    connection: Connection,
    reader: Reader,
    streams: Arc<Streams>,
    subjects: Subjects,
    timeout: Duration,
}

/// A message that may have to be erased, with the fields needed to decide.
#[derive(Debug)]
pub struct Candidate {
    /// Its sequence in the stream that was read.
    pub seq: u64,
    /// Its room.
    pub room: RoomId,
    /// When the room's stream stored it, in ms since 1970.
    pub ts: u64,
    /// The sender.
    pub from: String,
    /// The sender's id of the message.
    pub id: String,
    /// The message it refers to, if it is an edit, a delete, a reaction or an annotation.
    pub target: Option<String>,
    pub kind: Kind,
}

impl Candidate {
    /// Its key: `<room>/<user>/<id>`.
    #[must_use]
    pub fn key(&self) -> String {
        message_key(self.room.as_str(), &self.from, &self.id)
    }

    /// The message it refers to, with that message's author.
    #[must_use]
    pub fn target(&self) -> Option<Reference> {
        let target = Reference::parse(self.target.as_deref()?).ok()?;
        Some(Reference {
            user: Some(target.user.unwrap_or_else(|| self.from.clone())),
            ..target
        })
    }
}

/// A read of a stream, from its beginning to the end it had when the read began (dead letters: to the current end).
#[derive(Debug)]
pub struct Scan {
    stream: String,
    filter: String,
    next: u64,
    end: u64,
    /// Whether its messages are copies of others.
    pub has_copies: bool,
}

/// Messages were not removed, or the outcome is unknown.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    /// No answer in time, or NATS can't be reached.
    #[error("stream {stream} did not answer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// The server answered with an error.
    #[error("stream {stream} refused: {problem}")]
    Refused { stream: String, problem: String },
    /// The messages to remove can't be read.
    #[error("what is to be erased can't be read")]
    Read(#[from] ReadError),
    /// The state of the stream is not known.
    #[error("what is to be erased can't be found")]
    Stream(#[from] StreamError),
}

impl Eraser {
    /// An eraser for `streams`. It sends requests over `connection`; reads use the reader's own connection.
    #[must_use]
    pub fn new(
        connection: Connection,
        reader: Reader,
        streams: Arc<Streams>,
        config: &config::Nats,
    ) -> Self {
        Self {
            connection,
            reader,
            streams,
            subjects: Subjects::new(&config.prefix),
            timeout: config.publish_timeout,
        }
    }

    /// The same for the streams of another origin, as they are mirrored in this region.
    #[must_use]
    pub fn of(&self, streams: Arc<Streams>) -> Self {
        Self {
            streams,
            ..self.clone()
        }
    }

    /// The number of partitions.
    #[must_use]
    pub fn partitions(&self) -> u16 {
        self.streams.partitions()
    }

    /// The clock of the stream of `part`, in ms since 1970. Everything it has stored has at most this time; everything
    /// it stores from the next millisecond on has a later one.
    ///
    /// # Errors
    /// [`EraseError`].
    pub async fn clock(&self, part: u16) -> Result<u64, EraseError> {
        let stream = rooms_stream(self.streams.origin(), part);
        let subject = api::stream_info(&stream);
        let info: StreamInfo = self
            .ask(&stream, subject, Bytes::new(), self.timeout)
            .await?;
        let ts = info.ts.and_then(|text| rfc3339_ms(&text).ok());
        Ok(ts.unwrap_or_else(unix_ms))
    }

    /// Removes the messages of `room` that its stream stored up to the time `before`. Returns how many.
    ///
    /// # Errors
    /// [`EraseError`]. It is safe to retry.
    pub async fn purge_room(&self, room: &RoomId, before: u64) -> Result<u64, EraseError> {
        let origin = self.streams.origin();
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(origin, part);
        let filter = self.subjects.stored_all(origin, part, room);
        // First the end of the stream, then the first message to keep: a message stored in between is either found or
        // lies after that end.
        let end = self.streams.fetch(part).await?.last_seq;
        let stays = self
            .reader
            .first_since(&stream, &filter, before + 1)
            .await?;
        let upto = stays.unwrap_or(end + 1).min(end + 1);
        let request = serde_json::json!({ "filter": filter, "seq": upto });
        let subject = api::stream_purge(&stream);
        let Purged { purged } = self
            .ask(&stream, subject, request.to_string().into(), PURGE_DEADLINE)
            .await?;
        Ok(purged)
    }

    /// Begins to read the current content of the stream of `part`.
    ///
    /// # Errors
    /// [`EraseError`].
    pub async fn scan(&self, part: u16) -> Result<Scan, EraseError> {
        let origin = self.streams.origin();
        Ok(Scan {
            stream: rooms_stream(origin, part),
            filter: self.subjects.stored_any(origin, part),
            next: 1,
            end: self.streams.fetch(part).await?.last_seq,
            has_copies: false,
        })
    }

    /// Begins to read the current messages of a room in its stream.
    ///
    /// # Errors
    /// [`EraseError`].
    pub async fn scan_room(&self, room: &RoomId) -> Result<Scan, EraseError> {
        let part = partition_of(room, self.streams.partitions());
        let filter = self.subjects.stored_all(self.streams.origin(), part, room);
        Ok(Scan {
            filter,
            ..self.scan(part).await?
        })
    }

    /// The message at `seq` of the stream of `room`, if it exists. A lagging replica does not find it, so where the stream has
    /// replicas, a message is believed to be gone only after [`READS`] reads.
    ///
    /// # Errors
    /// [`EraseError`].
    pub async fn at(&self, room: &RoomId, seq: u64) -> Result<Option<Candidate>, EraseError> {
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(self.streams.origin(), part);
        let request = serde_json::json!({ "seq": seq });
        let mut reads = 0;
        loop {
            let (found, _) = self.reader.get(&stream, &request).await?;
            let found = found.first().and_then(|message| self.candidate(message));
            let found = found.filter(|found| found.seq == seq);
            reads += 1;
            if found.is_some() || reads >= READS || !self.streams.known(part).replicated {
                return Ok(found);
            }
            sleep(BETWEEN_READS).await;
        }
    }

    /// Removes the message at `seq` of the stream of `room` if `is_meant` accepts it. Returns whether it did.
    ///
    /// # Errors
    /// [`EraseError`]. It is safe to retry.
    pub async fn remove_one(
        &self,
        room: &RoomId,
        seq: u64,
        is_meant: impl Fn(&Candidate) -> bool,
    ) -> Result<bool, EraseError> {
        let found = self.at(room, seq).await?;
        if !found.as_ref().is_some_and(is_meant) {
            return Ok(false);
        }
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(self.streams.origin(), part);
        self.delete(&stream, seq).await?;
        Ok(true)
    }

    /// Begins to read the dead letters: those of history, and those of receivers.
    #[must_use]
    pub fn scan_dead(&self) -> [Scan; 2] {
        let origin = self.streams.origin();
        let scan = |stream, filter, has_copies| Scan {
            stream,
            filter,
            next: 1,
            end: u64::MAX,
            has_copies,
        };
        [
            scan(dead_stream(origin), self.subjects.dead_all(origin), false),
            scan(
                undelivered_stream(origin),
                self.subjects.undelivered_all(origin),
                true,
            ),
        ]
    }

    /// The next page of a scan, without messages that are not a room's; `None` at the end.
    ///
    /// # Errors
    /// [`EraseError`]. The scan can be continued.
    pub async fn candidates(&self, scan: &mut Scan) -> Result<Option<Vec<Candidate>>, EraseError> {
        if scan.next > scan.end {
            return Ok(None);
        }
        let (messages, pending) = self
            .reader
            .raw_page(&scan.stream, &scan.filter, scan.next)
            .await?;
        let Some(newest) = messages.last().and_then(seq_of) else {
            return Ok(None);
        };
        scan.next = match pending {
            Some(1..) => newest + 1,
            Some(0) | None => u64::MAX,
        };
        let candidates = messages
            .iter()
            .filter_map(|message| self.candidate(message))
            .filter(|candidate| candidate.seq <= scan.end);
        Ok(Some(candidates.collect()))
    }

    /// Removes messages of a scan and overwrites their data.
    ///
    /// # Errors
    /// [`EraseError`]. Some messages may have been removed; it is safe to retry.
    pub async fn remove(&self, scan: &Scan, doomed: &[Candidate]) -> Result<(), EraseError> {
        for some in doomed.chunks(DELETES_IN_FLIGHT) {
            let deletes = some.iter().map(|one| self.delete(&scan.stream, one.seq));
            try_join_all(deletes).await?;
        }
        Ok(())
    }

    /// Reads a message of a room's stream, or a dead letter.
    fn candidate(&self, message: &Message) -> Option<Candidate> {
        let headers = message.headers.as_ref()?;
        let subject = last(headers, header::SUBJECT)?;
        // A dead letter keeps its old subject behind another prefix.
        let undelivered = || self.subjects.undelivered_stored(subject);
        let dead = self.subjects.dead_stored(subject);
        let dead = dead.or_else(|| undelivered().map(|(_, stored)| stored));
        let subject = self
            .subjects
            .parse_stored(dead.as_deref().unwrap_or(subject))?;
        // Epoch and body are not used here.
        let epoch = self.streams.known(0).epoch;
        let record = Record::stored(pairs(headers), Bytes::new(), subject.class, epoch).ok()?;
        let said = last(headers, header::PLACE).filter(|_| dead.is_some());
        let said = said.and_then(|place| place.split(' ').nth(2)?.parse().ok());
        Some(Candidate {
            seq: record.seq,
            room: subject.room,
            ts: said.unwrap_or(record.ts),
            from: record.from,
            id: record.id,
            target: record.target,
            kind: record.kind.and_then(Kind::parse).unwrap_or_default(),
        })
    }

    /// Removes one message and overwrites its data. It is not an error if the message is already gone.
    async fn delete(&self, stream: &str, seq: u64) -> Result<(), EraseError> {
        let request = serde_json::json!({ "seq": seq, "no_erase": false });
        let asked = self
            .ask(
                stream,
                api::message_delete(stream),
                request.to_string().into(),
                self.timeout,
            )
            .await;
        match asked {
            Err(refused @ EraseError::Refused { .. }) => {
                if self.reader.has(stream, seq).await? {
                    return Err(refused);
                }
                Ok(())
            }
            asked => asked.map(|IgnoredAny| ()),
        }
    }

    /// Announces in a room that messages were erased; `body` says which. A retry with the same `id` is deduplicated.
    /// Returns the sequence of the announcement.
    ///
    /// # Errors
    /// [`EraseError`]. The announcement may have been stored.
    pub async fn announce(&self, room: &RoomId, id: &str, body: String) -> Result<u64, EraseError> {
        let origin = self.streams.origin();
        let part = partition_of(room, self.streams.partitions());
        let stream = rooms_stream(origin, part);
        let subject = self
            .subjects
            .publish(origin, part, room, Kind::Erase.class());
        let mut headers = HeaderMap::new();
        headers.insert(header::MSG_ID, message_key(room.as_str(), FROM_NATTER, id));
        headers.insert(header::FROM, FROM_NATTER);
        headers.insert(header::ID, id);
        headers.insert(header::KIND, Kind::Erase.as_str());
        let request = Request::new().payload(body.into()).headers(headers);
        let said = async {
            let answer = self.connection.client().send_request(subject, request);
            PubAck::read(&answer.await?.payload)
        };
        let PubAck { seq, .. } = in_time(&stream, self.timeout, said).await?;
        Ok(seq)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        stream: &str,
        subject: String,
        body: Bytes,
        within: Duration,
    ) -> Result<T, EraseError> {
        let asked = jetstream::ask(&self.connection, subject, body);
        in_time(stream, within, asked).await
    }
}

async fn in_time<T>(
    stream: &str,
    within: Duration,
    asked: impl Future<Output = Result<T, Problem>>,
) -> Result<T, EraseError> {
    match timeout(within, asked).await {
        Err(_elapsed) => Err(EraseError::Timeout {
            stream: stream.to_owned(),
            waited: within,
        }),
        Ok(answer) => answer.map_err(|problem| EraseError::Refused {
            stream: stream.to_owned(),
            problem: problem.into(),
        }),
    }
}

impl Reader {
    /// The first sequence that matches a filter and was stored at `ts` (ms since 1970) or later.
    async fn first_since(
        &self,
        stream: &str,
        filter: &str,
        ts: u64,
    ) -> Result<Option<u64>, ReadError> {
        let time = std::time::UNIX_EPOCH + Duration::from_millis(ts);
        let request = serde_json::json!({
            "start_time": humantime::format_rfc3339_millis(time).to_string(),
            "next_by_subj": filter,
            "batch": 1,
        });
        let (messages, _) = self.get(stream, &request).await?;
        let Some(message) = messages.first() else {
            return Ok(None);
        };
        seq_of(message)
            .map(Some)
            .ok_or_else(|| ReadError::Malformed {
                stream: stream.to_owned(),
                source: BadRecord::Sequence,
            })
    }

    /// Whether the stream has a message at `seq`.
    async fn has(&self, stream: &str, seq: u64) -> Result<bool, ReadError> {
        let (messages, _) = self.get(stream, &serde_json::json!({ "seq": seq })).await?;
        Ok(!messages.is_empty())
    }
}

fn seq_of(message: &Message) -> Option<u64> {
    last(message.headers.as_ref()?, header::SEQUENCE)?
        .parse()
        .ok()
}
