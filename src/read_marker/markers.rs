//! The markers an edge works with: loading, moving and reading them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::future::try_join_all;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, timeout},
};

use super::{
    counting::Counting,
    error::MarkerError,
    index::{Key, STEP},
    marker::Phase,
    queue::{Load, State},
};
use crate::{
    bus::{Bucket, Entry, KvError, News, Origins, Publisher, ReadError, Reader, Signal, Streams},
    config::Config,
    model::{Class, Cursor, Epoch, Fingerprint, Position, Region, RoomId, partition_of},
    protocol::PageOf,
    runtime::unix_ms,
    subject::{Subjects, bucket, marker_key, marker_keys, parse_marker_key, rooms_stream},
    telemetry::metrics::{Counter, count},
};

/// How long the reply to a `read` waits for the write that it caused. The write goes on after that.
const WAIT_FOR_WRITE: Duration = Duration::from_secs(1);

/// How long a join waits for its user's marker. After that it goes on without the marker.
const WAIT_FOR_JOIN: Duration = Duration::from_secs(1);

/// How long joins don't wait at all after the bucket has failed to answer: a client with many rooms joins them one by
/// one.
const DISTRUST: Duration = Duration::from_secs(10);

/// Number of markers in memory above which markers announced by other edges are not remembered, and so not repaired if
/// those edges die.
const MAX_HEARD: usize = 65_536;

/// The read markers of an edge, shared by its shards and by HTTP.
#[derive(Debug)]
pub struct Markers {
    pub(super) bucket: Bucket,
    pub(super) reader: Reader,
    /// Publishes receipts. Keys are written over its line.
    pub(super) publisher: Publisher,
    pub(super) origins: Arc<Origins>,
    pub(super) subjects: Subjects,
    pub(super) unread_cap: u64,
    pub(super) counting: Counting,
    /// Timeout of a `read`, and of loading keys.
    pub(super) timeout: Duration,
    pub(super) state: Mutex<State>,
    /// Notified when there is something to load.
    pub(super) load: Notify,
    /// Notified when there is something to write.
    pub(super) write: Notify,
    /// Notified when nothing is left to write.
    pub(super) written: Notify,
}

/// What is read from each region's bucket.
#[derive(Debug, Clone, Copy)]
enum Wanted<'k> {
    Keys(&'k [String]),
    Matching(&'k str),
}

/// A user's marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The user.
    pub user: String,
    /// The cursor up to which the user has read.
    pub cursor: Cursor,
    /// When the marker reached it, in ms since 1970.
    pub at: u64,
}

impl Markers {
    /// The markers of an edge. They are read by `reader`. Receipts are published by `publisher`, and the keys are written
    /// over its line, which is never the one of live messages. Unread messages are counted by `counts`, over a connection that
    /// nothing else waits for. Nothing is read or written before [`Self::keep`] runs.
    #[must_use]
    pub fn new(
        reader: &Reader,
        counts: Reader,
        origins: &Arc<Origins>,
        config: &Config,
        publisher: Publisher,
    ) -> Arc<Self> {
        let (connection, reader) = (reader.connection().clone(), reader.clone());
        Arc::new(Self {
            publisher,
            bucket: Bucket::new(connection, reader.clone(), config, bucket::LASTREAD),
            reader,
            origins: Arc::clone(origins),
            subjects: Subjects::new(&config.nats.prefix),
            unread_cap: config.limits.unread_cap,
            counting: Counting::new(counts, &config.nats),
            timeout: config.nats.publish_timeout,
            state: Mutex::default(),
            load: Notify::new(),
            write: Notify::new(),
            written: Notify::new(),
        })
    }

    /// Moves a user's marker to `cursor`, at most to the room's head, and tells the room if the marker has moved.
    /// Returns the marker after that. `head` is the room's head as the caller knows it.
    ///
    /// # Errors
    /// [`MarkerError`]. The marker has not moved, unless the timeout ended the wait for its write. A retry is safe in
    /// any case.
    pub async fn read(
        &self,
        room: &RoomId,
        user: &str,
        cursor: &Cursor,
        head: Option<&Cursor>,
    ) -> Result<Cursor, MarkerError> {
        // Clients are promised an answer within some seconds, whichever step is slow.
        timeout(self.timeout, self.move_to(room, user, cursor, head))
            .await
            .unwrap_or(Err(MarkerError::Unavailable))
    }

    async fn move_to(
        &self,
        room: &RoomId,
        user: &str,
        cursor: &Cursor,
        head: Option<&Cursor>,
    ) -> Result<Cursor, MarkerError> {
        if !self.bucket.connection().is_up() {
            return Err(MarkerError::Unavailable);
        }
        let part = self.part(room);
        let cursor = self.within_the_log(room, part, cursor, head).await?;
        let key: Key = marker_key(room, user).into();
        self.load(vec![Arc::clone(&key)]).await?;
        let grows = {
            let mut state = self.state.lock();
            let marker = state.marker(&key);
            marker.would_grow(&cursor, self.is_current(part))
        };
        if grows {
            // Tell the room before the marker is raised: if that fails, a retry of the command tells it.
            self.publisher
                .receipt(room, user, &cursor)
                .await
                .map_err(|_any| MarkerError::Unavailable)?;
            count(Counter::ReceiptPublished, 1);
            // For the user's other sessions.
            let signal = Signal {
                room: room.clone(),
                what: News::Read(cursor.clone()),
            };
            self.publisher.signal(&[user], &signal);
        }
        let first = {
            let mut state = self.state.lock();
            if grows {
                let marker = state.marker(&key);
                marker.raise(&cursor, unix_ms(), true, self.is_current(part));
            }
            // If the marker was not just written, the answer waits for the write, and so includes what other edges have
            // written.
            state.queue(&key)
        };
        if let Some(first) = first {
            self.write.notify_one();
            // On a timeout or failure, the write goes on or is retried.
            let _in_time = timeout(WAIT_FOR_WRITE, first).await;
        }
        let mut state = self.state.lock();
        Ok(state.marker(&key).cursor().cloned().unwrap_or(cursor))
    }

    /// A user has sent the message at `cursor`, so the user has read up to it. No receipt is published: the message
    /// itself tells the members. Nothing waits for the write, which is done together with others within
    /// [`SENT_PAUSE`](super::queue::SENT_PAUSE). A separate write for each message would cost more than the message.
    pub fn sent(&self, room: &RoomId, user: &str, cursor: &Cursor) {
        let part = self.part(room);
        let key: Key = marker_key(room, user).into();
        let mut state = self.state.lock();
        let marker = state.marker(&key);
        marker.raise(cursor, unix_ms(), true, self.is_current(part));
        if state.gather(&key, Instant::now()) {
            self.write.notify_one();
        }
    }

    /// Another edge has told the room that a user has read up to `cursor`. That edge writes the marker; if it dies
    /// before, this edge does. Not remembered if there are too many markers in memory.
    pub fn heard(&self, room: &RoomId, user: &str, cursor: &Cursor) {
        let part = self.part(room);
        let key: Key = marker_key(room, user).into();
        let mut state = self.state.lock();
        if state.markers.len() >= MAX_HEARD && !state.markers.contains(&key) {
            return;
        }
        let marker = state.marker(&key);
        if marker.raise(cursor, unix_ms(), false, self.is_current(part))
            && marker.phase() == Phase::Resting
        {
            marker.set_phase(Phase::Checking);
            state.queues.check_later(key, Instant::now());
        }
    }

    /// A user's marker, for a join, if it has a position in the current epoch of a stream. Waits at most
    /// `WAIT_FOR_JOIN`, and not at all while the bucket is known not to answer.
    pub async fn for_join(&self, room: &RoomId, user: &str) -> Option<Cursor> {
        let failed = self.state.lock().failed;
        if failed.is_some_and(|at| at.elapsed() < DISTRUST) || !self.bucket.connection().is_up() {
            return None;
        }
        let key: Key = marker_key(room, user).into();
        let load = self.load(vec![Arc::clone(&key)]);
        match timeout(WAIT_FOR_JOIN, load).await {
            Ok(Ok(())) => self.known(room, &key),
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "a join goes on without its read marker");
                None
            }
            Err(_elapsed) => {
                self.state.lock().failed = Some(Instant::now());
                tracing::warn!(
                    "joins go on without their read markers: the bucket does not answer"
                );
                None
            }
        }
    }

    /// The users with a marker in the room, in the order of the bytes of their names, and whether more follow.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn readers(
        &self,
        room: &RoomId,
        page: &PageOf,
    ) -> Result<(Vec<Reading>, bool), MarkerError> {
        let all = self.all(room).await?;
        let after = |user: &str| page.after.as_deref().is_none_or(|after| user > after);
        let mut later = all.into_iter().filter(|reading| after(&reading.user));
        let readers = later.by_ref().take(page.limit).collect();
        Ok((readers, later.next().is_some()))
    }

    /// All markers of a room, ordered by user: the ones in the bucket, and the ones that are not written yet.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn all(&self, room: &RoomId) -> Result<Vec<Reading>, MarkerError> {
        if !self.bucket.connection().is_up() {
            return Err(MarkerError::Unavailable);
        }
        let part = self.part(room);
        let mut readings: BTreeMap<String, (Cursor, u64)> = BTreeMap::new();
        let keys = marker_keys(room);
        for entries in self.of_all_buckets(Wanted::Matching(&keys)).await? {
            let mut in_bucket = BTreeMap::new();
            // A key that changes during the scan occurs twice, the newer value last.
            for entry in entries {
                let Some((_, user)) = parse_marker_key(&entry.key) else {
                    continue;
                };
                match entry.value.as_deref().and_then(parse) {
                    Some(cursor) => in_bucket.insert(user, (cursor, entry.at)),
                    None => in_bucket.remove(&user),
                };
            }
            if readings.is_empty() {
                readings = in_bucket;
                continue;
            }
            for (user, (cursor, at)) in in_bucket {
                match readings.get_mut(&user) {
                    Some(reading) => {
                        let merged = reading.0.merge(&cursor, self.is_current(part));
                        *reading = (merged, reading.1.max(at));
                    }
                    None => {
                        readings.insert(user, (cursor, at));
                    }
                }
            }
        }
        for (key, cursor, at) in self.in_memory(room) {
            let Some((_, user)) = parse_marker_key(&key) else {
                continue;
            };
            let reading = readings.entry(user).or_insert_with(|| (cursor.clone(), at));
            let merged = reading.0.merge(&cursor, self.is_current(part));
            if merged != reading.0 {
                *reading = (merged, at);
            }
        }
        let readings = readings.into_iter();
        Ok(readings
            .filter(|(_, (cursor, _))| self.means_something(part, cursor))
            .map(|(user, (cursor, at))| Reading { user, cursor, at })
            .collect())
    }

    /// The markers of a room that are in memory. The lock is held for one part of them at a time. A marker that is
    /// removed in between is safe: the bucket has held it for some time.
    fn in_memory(&self, room: &RoomId) -> Vec<(Key, Cursor, u64)> {
        let prefix = marker_key(room, "");
        let mut found = Vec::new();
        let mut last: Option<Key> = None;
        loop {
            let state = self.state.lock();
            let part = state.markers.after(&prefix, last.as_deref());
            let mut looked_at = 0;
            let mut end = None;
            for (key, marker) in part.take(STEP) {
                looked_at += 1;
                end = Some(Arc::clone(key));
                if let Some(cursor) = marker.cursor() {
                    found.push((Arc::clone(key), cursor.clone(), marker.at()));
                }
            }
            if looked_at < STEP {
                return found;
            }
            last = end;
        }
    }

    /// A marker as far as it is known after it was loaded, if it has a position in the current epoch of a stream.
    pub(super) fn known(&self, room: &RoomId, key: &str) -> Option<Cursor> {
        let part = self.part(room);
        let state = self.state.lock();
        let cursor = state.markers.get(key)?.cursor()?;
        self.means_something(part, cursor).then(|| cursor.clone())
    }

    /// Whether a cursor has a position in a current epoch. A marker of older epochs says nothing about the current
    /// messages.
    fn means_something(&self, part: u16, cursor: &Cursor) -> bool {
        let is_current = self.is_current(part);
        let mut positions = cursor.positions().iter();
        positions.any(|position| is_current(&position.origin, &position.epoch))
    }

    pub(super) fn is_current(&self, part: u16) -> impl Fn(&Region, &Epoch) -> bool + use<> {
        let origins = Arc::clone(&self.origins);
        move |origin, epoch| origins.is_current(origin, part, *epoch)
    }

    /// The partition of a room, which is the same in all regions.
    pub(super) fn part(&self, room: &RoomId) -> u16 {
        partition_of(room, self.origins.own().partitions())
    }

    /// Reads from every region's bucket, the own one's first.
    async fn of_all_buckets(&self, wanted: Wanted<'_>) -> Result<Vec<Vec<Entry>>, KvError> {
        let origins = self.origins.all();
        let buckets = origins
            .iter()
            .map(|streams| self.of_bucket(streams.origin(), wanted));
        try_join_all(buckets).await
    }

    async fn of_bucket(&self, origin: &Region, wanted: Wanted<'_>) -> Result<Vec<Entry>, KvError> {
        let bucket = self.bucket.of(origin);
        let answer = match wanted {
            Wanted::Keys(keys) => bucket.get(keys).await,
            Wanted::Matching(keys) => bucket.scan(keys).await,
        };
        match answer {
            Err(KvError::Read(ReadError::NoStream { stream }))
                if origin != self.bucket.origin() =>
            {
                tracing::debug!(stream, "the read markers of a region are not mirrored here");
                Ok(Vec::new())
            }
            answer => answer,
        }
    }

    /// Reads keys, together with those of other requests.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub(super) async fn load(&self, keys: Vec<Key>) -> Result<(), MarkerError> {
        let (done, loaded) = oneshot::channel();
        self.state.lock().loads.push(Load { keys, done });
        self.load.notify_one();
        // No answer: the edge is stopping, or the read before this one does not end.
        match timeout(self.timeout, loaded).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(_)) | Err(_) => Err(MarkerError::Unavailable),
        }
    }

    /// Reads `keys` and merges the values into the markers.
    pub(super) async fn fetch(&self, keys: &[String]) -> Result<(), MarkerError> {
        count(Counter::MarkerLoads, 1);
        let found = match self.of_all_buckets(Wanted::Keys(keys)).await {
            Ok(found) => found,
            Err(error) => {
                self.state.lock().failed = Some(Instant::now());
                return Err(error.into());
            }
        };
        let now = Instant::now();
        let mut buckets: Vec<HashMap<&str, &Entry>> = found
            .iter()
            .map(|entries| entries.iter().map(|e| (e.key.as_str(), e)).collect())
            .collect();
        self.state.lock().failed = None;
        for part in keys.chunks(STEP) {
            let mut state = self.state.lock();
            for key in part {
                let Some((room, _)) = parse_marker_key(key) else {
                    continue;
                };
                let is_current = self.is_current(self.part(&room));
                // A value that was written by hand and is not a cursor is overwritten.
                let mut held: Option<Cursor> = None;
                let (mut at, mut revision) = (0, 0);
                for (number, bucket) in buckets.iter_mut().enumerate() {
                    let Some(entry) = bucket.remove(key.as_str()) else {
                        continue;
                    };
                    // Only the own bucket is written. What another region's bucket holds need not be written here too.
                    if number == 0 {
                        revision = entry.revision;
                    }
                    at = at.max(entry.at);
                    if let Some(cursor) = entry.value.as_deref().and_then(parse) {
                        held = Some(match held {
                            Some(held) => held.merge(&cursor, &is_current),
                            None => cursor,
                        });
                    }
                }
                let marker = state.marker(&Key::from(key.as_str()));
                marker.read(held, at, revision, now, is_current);
            }
        }
        Ok(())
    }

    /// Reduces a cursor to what it says about the current log of the room. The own origin's component is limited to the
    /// head. Those of other origins are kept as they are, since the user may have seen messages there that have not
    /// arrived here. Components of unknown origins or epochs are dropped.
    async fn within_the_log(
        &self,
        room: &RoomId,
        part: u16,
        cursor: &Cursor,
        head: Option<&Cursor>,
    ) -> Result<Cursor, MarkerError> {
        let bad = || MarkerError::BadCursor(cursor.clone());
        let is_mesh = self.origins.all().len() > 1;
        let mut kept: Option<Cursor> = None;
        for position in cursor.positions() {
            let Some(streams) = self.origins.get(&position.origin) else {
                // A single region has no other regions to lose sight of: the cursor is of another mesh.
                if is_mesh {
                    continue;
                }
                return Err(bad());
            };
            if !self.is_of(&streams, part, position).await? {
                continue;
            }
            let mut position = position.clone();
            if position.origin == *self.origins.own().origin() {
                position = self.clamp(room, part, position, head).await?;
            }
            let position = Cursor::single(position);
            kept = Some(match kept {
                Some(kept) => kept.merge(&position, |_, _| true),
                None => position,
            });
        }
        kept.ok_or_else(bad)
    }

    /// Whether a position is of the stream's current epoch.
    async fn is_of(
        &self,
        streams: &Streams,
        part: u16,
        position: &Position,
    ) -> Result<bool, MarkerError> {
        if position.epoch == streams.known(part).epoch {
            return Ok(true);
        }
        // The stream may have a new incarnation that this edge has not noticed yet.
        let now = streams.verify(part, Instant::now()).await;
        let now = now.map_err(|_any| MarkerError::Unavailable)?;
        Ok(position.epoch == now.epoch)
    }

    /// The position, or the room's head if the position lies beyond it.
    async fn clamp(
        &self,
        room: &RoomId,
        part: u16,
        position: Position,
        head: Option<&Cursor>,
    ) -> Result<Position, MarkerError> {
        let same_log = |head: &&Position| head.epoch == position.epoch;
        let known = head.and_then(|head| head.get(&position.origin));
        let known = known.filter(same_log);
        if let Some(head) = known
            && position.seq <= head.seq
        {
            return Ok(if position.seq == head.seq {
                head.clone()
            } else {
                position
            });
        }
        let (origin, epoch) = (&position.origin, position.epoch);
        let subjects =
            [Class::Msg, Class::Ev].map(|class| self.subjects.publish(origin, part, room, class));
        let stream = rooms_stream(origin, part);
        let heads = self.reader.heads(&stream, epoch, &subjects).await?;
        let read = heads
            .into_iter()
            .map(|head| (head.record.seq, head.record.fingerprint))
            .max();
        let head = known
            .map(|head| (head.seq, head.fingerprint))
            .max(read)
            // If the stream has no message of the room, use the end of the stream as it was last seen.
            .unwrap_or_else(|| {
                (
                    self.origins.own().known(part).last_seq,
                    Fingerprint::default(),
                )
            });
        Ok(if position.seq < head.0 {
            position
        } else {
            Position {
                seq: head.0,
                fingerprint: head.1,
                ..position
            }
        })
    }
}

fn parse(value: &[u8]) -> Option<Cursor> {
    std::str::from_utf8(value).ok()?.parse().ok()
}
