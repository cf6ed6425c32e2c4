//! Reads a room's tail from the streams: everything that MongoDB may not have yet, or as much of it as a page needs.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::{join_all, try_join_all};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{entry::entry, merge::Tail};
use crate::{
    bus::{
        Connection, Newer, Origins, ReadError, Reader, Record, Stored, StreamState, Streams,
        consumer_elsewhere, consumer_state, epoch_elsewhere,
    },
    config::Config,
    model::{Class, Place, Position, Region, RoomId, partition_of},
    store::Entry,
    subject::{HISTORY_CONSUMER, Subjects, rooms_stream},
};

/// How long a floor is reused. An old floor is as correct as a new one, but makes the tail longer.
const FLOOR_KEPT: Duration = Duration::from_millis(250);

/// The same for the floor of another region, which must be asked, and the timeout for that.
const FAR_FLOOR_KEPT: Duration = Duration::from_secs(5);
const FAR_WAIT: Duration = Duration::from_secs(1);

/// A tail of at most this many messages and bytes is read as a whole. Of a longer one, only the part that a page needs
/// is read.
const MAX_TAIL: u64 = 5000;
const MAX_TAIL_BYTES: usize = 8 << 20;

/// Changes that are folded into a page made from a part of a tail.
const MAX_CHANGES: usize = 5000;

/// Messages searched for an id while MongoDB can't be asked.
const MAX_SEARCHED: u64 = 5000;

/// The streams of all origins, as history reads them.
#[derive(Debug)]
pub(super) struct Log {
    reader: Reader,
    origins: Arc<Origins>,
    subjects: Subjects,
    wait: Duration,
    floors: Mutex<HashMap<(Region, u16), Arc<Floors>>>,
}

/// The known floor of one stream.
#[derive(Debug, Default)]
struct Floors {
    last: Mutex<Option<Floor>>,
    /// Held while the floor is being read.
    asking: tokio::sync::Mutex<()>,
}

/// The sequence up to which everything of a stream is in MongoDB.
#[derive(Debug, Clone, Copy)]
struct Floor {
    at: Instant,
    state: StreamState,
    /// `None`: the stream is not written to MongoDB, or its floor is not known.
    seq: Option<u64>,
}

/// The log of one room, in the streams of all origins.
#[derive(Debug)]
pub(super) struct RoomLog<'l> {
    log: &'l Log,
    /// The own region's first.
    of: Vec<OriginLog<'l>>,
}

/// The log of one room in one stream.
#[derive(Debug)]
pub(super) struct OriginLog<'l> {
    log: &'l Log,
    room: &'l RoomId,
    streams: Arc<Streams>,
    part: u16,
    stream: String,
    filter: String,
    messages: String,
    changes: String,
    /// The last seen state of the stream.
    state: StreamState,
    /// The sequence up to which MongoDB has everything. `None`: the stream is not written to MongoDB, or its floor is
    /// not known.
    floor: Option<u64>,
}

/// The part of a tail that a page needs.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Where the page is split; `None`: an end of the log.
    pub(super) split: Option<Place>,
    /// Number of messages needed before it.
    pub(super) left: usize,
    /// Number of messages needed from it on.
    pub(super) right: usize,
}

/// The tails of the streams.
#[derive(Debug)]
pub(super) enum Tails {
    /// Everything above their floors.
    All(Tail),
    /// There is too much above a floor.
    TooLong,
}

impl Log {
    pub(super) fn new(reader: Reader, origins: Arc<Origins>, config: &Config) -> Self {
        Self {
            floors: Mutex::default(),
            reader,
            origins,
            subjects: Subjects::new(&config.nats.prefix),
            wait: config.nats.read_timeout,
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        self.reader.connection()
    }

    pub(super) fn origins(&self) -> &Origins {
        &self.origins
    }

    /// The log of a room.
    pub(super) fn room<'l>(&'l self, room: &'l RoomId) -> RoomLog<'l> {
        let all = self.origins.all().into_iter();
        let of = all.map(|streams| {
            let part = partition_of(room, streams.partitions());
            let origin = streams.origin();
            let of_class = |class| self.subjects.publish(origin, part, room, class);
            OriginLog {
                log: self,
                room,
                part,
                stream: rooms_stream(origin, part),
                filter: self.subjects.stored_all(origin, part, room),
                messages: of_class(Class::Msg),
                changes: of_class(Class::Ev),
                state: streams.known(part),
                floor: None,
                streams,
            }
        });
        RoomLog {
            log: self,
            of: of.collect(),
        }
    }

    /// Reads the state of a stream, and the floor: the sequence up to which MongoDB has all of it.
    async fn floor(&self, streams: &Streams, part: u16) -> Option<Floor> {
        let origin = streams.origin();
        let is_own = origin == self.origins.own().origin();
        let floors = {
            let mut floors = self.floors.lock();
            Arc::clone(floors.entry((origin.clone(), part)).or_default())
        };
        let kept = if is_own { FLOOR_KEPT } else { FAR_FLOOR_KEPT };
        let fresh = || {
            let last = *floors.last.lock();
            last.filter(|floor| floor.at.elapsed() < kept)
        };
        if is_own {
            let _turn = floors.asking.lock().await;
            if let Some(floor) = fresh() {
                return Some(floor);
            }
            let stream = rooms_stream(origin, part);
            let now = Instant::now();
            let floor = self.near_floor(streams, part, &stream, now).await;
            *floors.last.lock() = floor;
            return floor;
        }
        // Another region's floor is read by one caller at a time, and rarely. The others use the known one, which is as
        // correct.
        if fresh().is_none()
            && let Ok(_turn) = floors.asking.try_lock()
        {
            let now = Instant::now();
            let seq = self.far_floor(streams, part).await;
            let mut last = floors.last.lock();
            let state = streams.known(part);
            let before = last.filter(|floor| floor.state.epoch == state.epoch);
            *last = Some(Floor {
                at: now,
                state,
                seq: seq.or(before.and_then(|floor| floor.seq)),
            });
        }
        let state = streams.fetch(part).await;
        let state = state
            .inspect_err(|error| tracing::debug!(%origin, part, %error, "no floor"))
            .ok()?;
        let last = *floors.last.lock();
        let last = last.filter(|floor| floor.state.epoch == state.epoch);
        Some(Floor {
            at: Instant::now(),
            state,
            seq: last.and_then(|floor| floor.seq),
        })
    }

    async fn near_floor(
        &self,
        streams: &Streams,
        part: u16,
        stream: &str,
        now: Instant,
    ) -> Option<Floor> {
        let connection = self.reader.connection();
        let consumer = consumer_state(connection, stream, HISTORY_CONSUMER, self.wait).await;
        let consumer = consumer
            .inspect_err(|error| tracing::debug!(stream, %error, "no floor"))
            .ok()?;
        let state = streams.fetch(part).await;
        let state = state
            .inspect_err(|error| tracing::debug!(stream, %error, "no floor"))
            .ok()?;
        // A floor beyond the end belongs to an earlier incarnation of the stream.
        let seq = consumer.map(|consumer| consumer.floor);
        let seq = seq.map(|seq| if seq > state.last_seq { 0 } else { seq });
        Some(Floor {
            at: now,
            state,
            seq,
        })
    }

    /// The floor of a stream in its own region, if that can be reached. It may lie beyond the end of the mirror here.
    async fn far_floor(&self, streams: &Streams, part: u16) -> Option<u64> {
        let connection = self.reader.connection();
        let (origin, stream) = (streams.origin(), rooms_stream(streams.origin(), part));
        let wait = self.wait.min(FAR_WAIT);
        let asked = tokio::join!(
            consumer_elsewhere(connection, origin, &stream, wait),
            epoch_elsewhere(connection, origin, &stream, wait),
        );
        match asked {
            (Ok(consumer), Ok(epoch)) if epoch == streams.known(part).epoch => {
                consumer.map(|consumer| consumer.floor)
            }
            (Ok(_), Ok(_)) => None,
            (consumer, epoch) => {
                let (consumer, epoch) = (consumer.err(), epoch.err());
                tracing::debug!(
                    stream,
                    ?consumer,
                    ?epoch,
                    "the floor of another region is not known"
                );
                None
            }
        }
    }
}

impl<'l> RoomLog<'l> {
    /// Reads the floor of each origin.
    pub(super) async fn floors(&mut self) {
        let log = self.log;
        let floors = self.of.iter().map(|of| log.floor(&of.streams, of.part));
        let floors = join_all(floors).await;
        for (of, floor) in self.of.iter_mut().zip(floors) {
            if let Some(floor) = floor {
                of.state = floor.state;
                of.floor = floor.seq;
            }
        }
    }

    /// Reads the state of the streams.
    pub(super) async fn look(&mut self) {
        for of in &mut self.of {
            if let Ok(state) = of.streams.verify(of.part, Instant::now()).await {
                of.state = state;
            }
        }
    }

    /// The log in the stream of a position, if the position's epoch is the stream's.
    pub(super) fn of(&self, position: &Position) -> Option<&OriginLog<'l>> {
        self.of
            .iter()
            .find(|of| (&position.origin, position.epoch) == (of.streams.origin(), of.state.epoch))
    }

    /// Everything that the streams have above their floors, unless it is too much for one of them. Also returns whether
    /// the tails are complete: `false` if a mirror can't be read, or a floor is not known.
    ///
    /// # Errors
    /// [`ReadError`] of the own stream.
    pub(super) async fn tail(&self) -> Result<(Tails, bool), ReadError> {
        let tails = self.of.iter().map(OriginLog::tail);
        let mut joined: Option<Tail> = None;
        let mut complete = true;
        for (of, tail) in self.of.iter().zip(join_all(tails).await) {
            let tail = match tail {
                Ok(Some(tail)) => tail,
                Ok(None) => return Ok((Tails::TooLong, complete)),
                Err(error) if joined.is_none() => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "history is read without a mirror");
                    complete = false;
                    of.nothing()
                }
            };
            complete &= of.floor.is_some();
            joined = Some(match joined {
                Some(joined) => joined.join(tail),
                None => tail,
            });
        }
        let tail = joined.unwrap_or_else(|| self.nothing());
        Ok((Tails::All(tail), complete))
    }

    /// The part that a page needs of what the streams have above their floors.
    pub(super) async fn part(&self, part: &Part) -> Result<Tail, ReadError> {
        let parts = self.of.iter().map(|of| of.part(part));
        let parts = try_join_all(parts).await?.into_iter();
        Ok(parts.reduce(Tail::join).unwrap_or_else(|| self.nothing()))
    }

    /// An empty tail, for streams that can't be read.
    pub(super) fn nothing(&self) -> Tail {
        let nothing = self.of.iter().map(OriginLog::nothing);
        nothing.reduce(Tail::join).expect("there is the own stream")
    }

    /// Searches the newest messages of the room for a key.
    pub(super) async fn find(&self, key: &str) -> Result<Option<Place>, ReadError> {
        let found = self.of.iter().map(|of| of.find(key));
        let found = try_join_all(found).await?;
        Ok(found.into_iter().flatten().min())
    }
}

impl OriginLog<'_> {
    /// The place in history of a sequence of this stream, given when it was stored.
    pub(super) fn place(&self, seq: u64, ts: u64) -> Place {
        Place {
            ts,
            origin: self.streams.origin().clone(),
            epoch: self.state.epoch,
            seq,
        }
    }

    /// The first sequence of this stream that is at `place` or after it.
    async fn seq_at(&self, place: &Place) -> Result<u64, ReadError> {
        let (origin, epoch) = (self.streams.origin(), self.state.epoch);
        if (&place.origin, place.epoch) != (origin, epoch) {
            // Of another region, of an earlier incarnation, or imported: only times can be compared.
            let reader = &self.log.reader;
            let next = reader.next_since(&self.stream, epoch, &self.filter, place.ts);
            let next = next.await?.map(|record| record.seq);
            return Ok(next.unwrap_or(self.state.last_seq + 1));
        }
        Ok(place.seq)
    }

    /// An empty tail, for a stream that can't be read.
    fn nothing(&self) -> Tail {
        self.made_of(u64::MAX, Vec::new())
    }

    /// The first of the room's messages or changes at `seq` or later.
    pub(super) async fn next(&self, seq: u64) -> Result<Option<Record>, ReadError> {
        let Self {
            stream,
            filter,
            state,
            ..
        } = self;
        let reader = &self.log.reader;
        reader.next(stream, state.epoch, filter, seq).await
    }

    /// Everything that the stream has above the floor; `None` if it is too much.
    async fn tail(&self) -> Result<Option<Tail>, ReadError> {
        let floor = self.floor.unwrap_or_default();
        let mut entries = Vec::new();
        let (mut from, mut bytes) = (floor + 1, 0);
        loop {
            let page = self.page(&self.filter, from).await?;
            bytes += page.bytes;
            entries.extend(page.entries);
            if page.pending == 0 {
                return Ok(Some(self.made_of(floor, entries)));
            }
            if entries.len() as u64 + page.pending > MAX_TAIL || bytes > MAX_TAIL_BYTES {
                return Ok(None);
            }
            from = page.next;
        }
    }

    /// The part that a page needs of what the stream has above the floor.
    async fn part(&self, part: &Part) -> Result<Tail, ReadError> {
        let (left, right) = (part.left, part.right);
        let split = match &part.split {
            Some(place) => Some(self.seq_at(place).await?),
            // The beginning of the log is the beginning of the stream.
            None => (left == 0).then_some(0),
        };
        let floor = self.floor.unwrap_or_default();
        let first = (floor + 1).max(self.state.first_seq);
        let from = match split {
            Some(split) if left == 0 || split <= first => split.max(first),
            _ => self.start(first, split, left).await?,
        };
        let mut entries = Vec::new();
        let mut found = 0;
        let mut next = from;
        let more = loop {
            let page = self.page(&self.messages, next).await?;
            let behind = |entry: &&Entry| split.is_some_and(|split| entry.place.seq >= split);
            found += page.entries.iter().filter(behind).count();
            entries.extend(page.entries);
            // Without a split nothing is behind it, so everything is read.
            let enough = split.is_some_and(|split| page.next > split) && found >= right;
            if page.pending == 0 || enough {
                break page.pending > 0;
            }
            next = page.next;
        };
        let (mut changes, mut next, mut bytes) = (0, from, 0);
        loop {
            let page = self.page(&self.changes, next).await?;
            changes += page.entries.len();
            bytes += page.bytes;
            entries.extend(page.entries);
            if page.pending == 0 || changes >= MAX_CHANGES || bytes >= MAX_TAIL_BYTES {
                break;
            }
            next = page.next;
        }
        let spoken_for = if more {
            let messages = entries.iter().filter(|entry| is_message(entry));
            messages.map(|entry| entry.place.seq).max()
        } else {
            None
        };
        let mut tail = self.made_of(floor, entries);
        if let Some(horizon) = spoken_for {
            tail.ends_at(horizon.max(floor));
        }
        Ok(if from > first { tail.cut_off() } else { tail })
    }

    /// The sequence from which there are `count` messages before `split`; `first` if there are fewer.
    async fn start(&self, first: u64, split: Option<u64>, count: usize) -> Result<u64, ReadError> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        let newer = |from: u64| Newer {
            stream: self.stream.clone(),
            subject: self.messages.clone(),
            after: from.saturating_sub(1),
        };
        // The number of messages before the split. Both are counted at the same moment, since more may arrive behind
        // it.
        let before = async |from: u64| {
            let mut wanted = vec![newer(from)];
            wanted.extend(split.map(newer));
            let counts = self.log.reader.count_newer(&wanted).await?;
            let behind = counts.get(1).copied().unwrap_or_default();
            let all = counts.first().copied().unwrap_or_default();
            Ok::<u64, ReadError>(all.saturating_sub(behind))
        };
        let (mut low, mut high) = (first, split.unwrap_or(self.state.last_seq + 1));
        if before(low).await? <= count {
            return Ok(low);
        }
        // Invariant: there are enough messages from `low` on, and not enough from `high` on.
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if before(middle).await? >= count {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Like [`RoomLog::find`], in this stream.
    async fn find(&self, key: &str) -> Result<Option<Place>, ReadError> {
        let most = usize::try_from(MAX_SEARCHED).unwrap_or(usize::MAX);
        let mut next = self.start(self.state.first_seq, None, most).await?;
        loop {
            let page = self.page(&self.messages, next).await?;
            let found = page.entries.into_iter().find(|entry| {
                matches!(&entry.what, crate::store::What::Message { key: own, .. } if own == key)
            });
            if let Some(entry) = found {
                return Ok(Some(entry.place));
            }
            if page.pending == 0 {
                return Ok(None);
            }
            next = page.next;
        }
    }

    fn made_of(&self, floor: u64, entries: Vec<Entry>) -> Tail {
        let origin = self.streams.origin().clone();
        let newest = floor.max(self.state.last_seq);
        Tail::new(origin, self.state.epoch, newest, entries)
    }

    async fn page(&self, filter: &str, from: u64) -> Result<Entries, ReadError> {
        let (reader, epoch) = (&self.log.reader, self.state.epoch);
        let page = reader.page(&self.stream, epoch, filter, from).await?;
        let bytes = page.records.iter().map(|record| record.body.len()).sum();
        let next = page.records.last().map_or(from, |record| record.seq + 1);
        let origin = self.streams.origin();
        let entries = page.records.into_iter().map(|record| {
            let room = self.room.clone();
            entry(Stored { room, record }, origin, epoch)
        });
        let entries: Vec<Entry> = entries.collect();
        // A page without messages makes no progress: end the loop.
        let pending = if entries.is_empty() { 0 } else { page.pending };
        Ok(Entries {
            entries,
            bytes,
            next,
            pending,
        })
    }
}

/// A page of a stream.
struct Entries {
    entries: Vec<Entry>,
    bytes: usize,
    /// The sequence after the page.
    next: u64,
    /// Number of matches after the page.
    pending: u64,
}

fn is_message(entry: &Entry) -> bool {
    matches!(entry.what, crate::store::What::Message { .. })
}
