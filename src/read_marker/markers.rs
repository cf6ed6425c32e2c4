//! The markers an edge works with: loading, moving, asking.

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
    index::{Index, STEP},
    keeper::Queues,
    marker::{Marker, Phase},
    unread::Counting,
};
use crate::{
    bus::{Bucket, Entry, KvError, Origins, Publisher, ReadError, Reader, Streams},
    config::Config,
    model::{Class, Cursor, Epoch, Fingerprint, Position, Region, RoomId, partition_of},
    protocol::{ErrorCode, native::PageOf},
    runtime::unix_ms,
    subject::{Subjects, bucket, marker_key, marker_keys, parse_marker_key, rooms_stream},
    telemetry::metrics::{Counter, count},
};

/// How long the reply to a `read` waits for the write it caused; the write goes on without it.
const WAIT_FOR_WRITE: Duration = Duration::from_secs(1);

/// How long a join waits for its user's marker; then it goes on without.
const WAIT_FOR_JOIN: Duration = Duration::from_secs(1);

/// How long joins don't wait at all after the bucket failed to answer: a client with many rooms joins them one by one.
const DISTRUST: Duration = Duration::from_secs(10);

/// Markers in memory above which what other edges tell is not remembered, and so not repaired if they die.
const MAX_HEARD: usize = 65_536;

/// The read markers of an edge; its shards and HTTP share them.
#[derive(Debug)]
pub struct Markers {
    pub(super) bucket: Bucket,
    pub(super) reader: Reader,
    publisher: Publisher,
    pub(super) origins: Arc<Origins>,
    pub(super) subjects: Subjects,
    pub(super) unread_cap: u64,
    pub(super) counting: Counting,
    /// How long a `read`, or the keys it needs, may take.
    timeout: Duration,
    pub(super) state: Mutex<State>,
    /// There is something to load.
    pub(super) load: Notify,
    /// There is something to write.
    pub(super) write: Notify,
    /// Nothing is left to write.
    pub(super) written: Notify,
}

/// A marker's key in the bucket: it names room and user.
pub(super) type Key = Arc<str>;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) markers: Index,
    pub(super) queues: Queues,
    pub(super) loads: Vec<Load>,
    /// When the bucket last failed to answer.
    failed: Option<Instant>,
}

/// Somebody who waits for keys to be read.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) keys: Vec<Key>,
    pub(super) done: oneshot::Sender<Result<(), MarkerError>>,
}

/// What is asked of each region's bucket.
#[derive(Debug, Clone, Copy)]
enum Wanted<'k> {
    Keys(&'k [String]),
    Matching(&'k str),
}

/// A user's marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// Who.
    pub user: String,
    /// Up to where.
    pub cursor: Cursor,
    /// When they came to be there, in ms since 1970.
    pub at: u64,
}

/// A marker can't be moved or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MarkerError {
    /// NATS can't be reached, or does not answer.
    #[error("read markers are not reachable now")]
    Unavailable,
    /// Too many ask for unread counts at once.
    #[error("too many unread counts are asked for at once")]
    Busy,
    /// The cursor is not one of the room.
    #[error("the cursor {0} is not of this room's log")]
    BadCursor(Cursor),
    /// The bucket answers with an error.
    #[error("read markers can't be read: {0}")]
    Refused(String),
}

impl MarkerError {
    /// What the client is told.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unavailable | Self::Busy => ErrorCode::Unavailable,
            Self::BadCursor(_) => ErrorCode::BadCursor,
            Self::Refused(_) => ErrorCode::Internal,
        }
    }
}

impl From<ReadError> for MarkerError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Timeout { .. } | ReadError::NoStream { .. } | ReadError::Closed => {
                Self::Unavailable
            }
            ReadError::Refused { .. } | ReadError::Malformed { .. } => {
                Self::Refused(error.to_string())
            }
        }
    }
}

impl From<KvError> for MarkerError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Conflict | KvError::Unavailable | KvError::UnknownOutcome(_) => {
                Self::Unavailable
            }
            KvError::Refused(text) => Self::Refused(text),
            KvError::Read(error) => error.into(),
        }
    }
}

impl Markers {
    /// The markers of an edge, which are read by `reader` and written over its connection, never the ones of messages; `publisher` tells of them.
    /// Unread messages are counted by `counts`, over a connection on which nobody waits for anything else.
    /// Nothing is read or written before [`Self::keep`] runs.
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

    /// Moves a user's marker to `cursor`, at most to the room's newest message, and tells the room if it moved. The marker
    /// after it. `head`: where the caller knows the room to stand.
    ///
    /// # Errors
    /// [`MarkerError`]; nothing has moved then, or (if it could not be told) the same again tells it.
    pub async fn read(
        &self,
        room: &RoomId,
        user: &str,
        cursor: &Cursor,
        head: Option<&Cursor>,
    ) -> Result<Cursor, MarkerError> {
        // Clients are promised an answer within some seconds, whichever part of it takes long.
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
            // Told before it is noted: if it can't be told, the same command tells it again.
            self.publisher
                .receipt(room, user, &cursor)
                .await
                .map_err(|_any| MarkerError::Unavailable)?;
            count(Counter::ReceiptPublished, 1);
        }
        let first = {
            let mut state = self.state.lock();
            if grows {
                let marker = state.marker(&key);
                marker.raise(&cursor, unix_ms(), true, self.is_current(part));
            }
            // Where nothing was written a moment ago, the answer waits for the write: then it knows what other edges wrote.
            state.queue(&key)
        };
        if let Some(first) = first {
            self.write.notify_one();
            // Late or failed, the write goes on or is repeated.
            let _in_time = timeout(WAIT_FOR_WRITE, first).await;
        }
        let mut state = self.state.lock();
        Ok(state.marker(&key).cursor().cloned().unwrap_or(cursor))
    }

    /// A user has sent the message at `cursor`: that is as far as they have read. Nobody is told, the message tells it, and
    /// nobody waits: it is written with those of others within [`WRITE_PAUSE`](super::keeper::WRITE_PAUSE), or a write for each would
    /// cost more than the message.
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

    /// An edge has told the room that a user has read up to `cursor`. It writes that; if it dies before it could, we do.
    /// What is heard while too many markers are in memory is not remembered.
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

    /// A user's marker, if it has one of this incarnation of the room. For a join: it waits a moment and no longer, and not
    /// at all while the bucket is known not to answer.
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

    /// The users that have read something of the room, in the order of the bytes of their names, and whether more follow.
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

    /// All markers of a room, ordered by user: what the bucket holds and what is on its way there.
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
            // A key that changes meanwhile is there twice, the newer one later.
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

    /// The markers of a room that are in memory. The lock is held for a part of them at a time; none is forgotten in between that
    /// the bucket did not hold for a while.
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

    /// What is known of a marker after it was loaded, if it means anything.
    pub(super) fn known(&self, room: &RoomId, key: &str) -> Option<Cursor> {
        let part = self.part(room);
        let state = self.state.lock();
        let cursor = state.markers.get(key)?.cursor()?;
        self.means_something(part, cursor).then(|| cursor.clone())
    }

    /// A marker of an epoch that is over says nothing about the messages there are now.
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

    /// What every region's bucket tells, the own one's first.
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

    /// Reads keys, together with those that others wait for.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub(super) async fn load(&self, keys: Vec<Key>) -> Result<(), MarkerError> {
        let (done, loaded) = oneshot::channel();
        self.state.lock().loads.push(Load { keys, done });
        self.load.notify_one();
        // Without an answer the edge is stopping, or the read before ours does not end.
        match timeout(self.timeout, loaded).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(_)) | Err(_) => Err(MarkerError::Unavailable),
        }
    }

    /// Takes in what a read of `keys` found.
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
                // What was put there by hand and is no cursor is overwritten.
                let mut held: Option<Cursor> = None;
                let (mut at, mut revision) = (0, 0);
                for (number, bucket) in buckets.iter_mut().enumerate() {
                    let Some(entry) = bucket.remove(key.as_str()) else {
                        continue;
                    };
                    // Written over is only the own one's; what another region's holds need not be written here as well.
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

    /// What a cursor says of the room's log as it is now: the own origin's component at most at the head; those of other
    /// origins as they are, since the user may have seen there what is not here yet; and nothing of origins or epochs that
    /// nobody knows here.
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
                // A region alone has not lost sight of anybody: the cursor is of another mesh.
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

    /// Whether a position is of the stream as it is now.
    async fn is_of(
        &self,
        streams: &Streams,
        part: u16,
        position: &Position,
    ) -> Result<bool, MarkerError> {
        if position.epoch == streams.known(part).epoch {
            return Ok(true);
        }
        // Is it we who have not noticed that the stream began anew?
        let now = streams.verify(part, Instant::now()).await;
        let now = now.map_err(|_any| MarkerError::Unavailable)?;
        Ok(position.epoch == now.epoch)
    }

    /// The position, or the room's head where that lies before it.
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
            // A room of which the stream has nothing stands where the stream was last seen.
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

impl State {
    pub(super) fn marker(&mut self, key: &Key) -> &mut Marker {
        self.markers.marker(key)
    }
}

fn parse(value: &[u8]) -> Option<Cursor> {
    std::str::from_utf8(value).ok()?.parse().ok()
}
