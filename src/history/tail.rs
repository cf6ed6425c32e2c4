//! What the streams say of a room: all that MongoDB may not have yet, or as much of it as a page needs.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Mutex, time::Instant};

use super::{entry::entry, merge::Tail};
use crate::{
    bus::{
        Connection, Newer, ReadError, Reader, Record, Stored, StreamState, Streams, consumer_state,
    },
    config::Config,
    model::{Class, Place, RoomId, partition_of},
    store::Entry,
    subject::{Subjects, rooms_stream},
};

/// How long a floor is used: an old one is as right as a new one, it only makes the tail longer.
const FLOOR_KEPT: Duration = Duration::from_millis(250);

/// Messages and bytes above the floor that are read as a whole; of more, only what a page needs.
const MAX_TAIL: u64 = 5000;
const MAX_TAIL_BYTES: usize = 8 << 20;

/// Changes that are folded into a page that is made of a part of a tail.
const MAX_CHANGES: usize = 5000;

/// Messages among which one is looked for by its id when MongoDB can't be asked.
const MAX_SEARCHED: u64 = 5000;

/// The streams of the region, as history reads them.
#[derive(Debug)]
pub(super) struct Log {
    reader: Reader,
    streams: Arc<Streams>,
    subjects: Subjects,
    wait: Duration,
    floors: Vec<Mutex<Option<Floor>>>,
}

/// Up to where everything of a stream is in MongoDB.
#[derive(Debug, Clone, Copy)]
struct Floor {
    at: Instant,
    state: StreamState,
    /// `None`: nobody writes it there.
    seq: Option<u64>,
}

/// The log of one room in one stream.
#[derive(Debug)]
pub(super) struct RoomLog<'l> {
    log: &'l Log,
    room: &'l RoomId,
    stream: String,
    filter: String,
    messages: String,
    changes: String,
    /// The stream, as last seen.
    pub(super) state: StreamState,
}

/// Which part of a tail a page needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// The sequence at which the page is split; `None`: the end of the log.
    pub(super) split: Option<u64>,
    /// Messages wanted before it.
    pub(super) left: usize,
    /// Messages wanted from it on.
    pub(super) right: usize,
}

impl Log {
    pub(super) fn new(reader: Reader, streams: Arc<Streams>, config: &Config) -> Self {
        let floors = (0..streams.partitions()).map(|_| Mutex::default());
        Self {
            floors: floors.collect(),
            reader,
            streams,
            subjects: Subjects::new(&config.nats.prefix),
            wait: config.nats.read_timeout,
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        self.reader.connection()
    }

    pub(super) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// The log of a room.
    pub(super) fn room<'l>(&'l self, room: &'l RoomId) -> RoomLog<'l> {
        let part = partition_of(room, self.streams.partitions());
        let origin = self.streams.origin();
        let of_class = |class| self.subjects.publish(origin, part, room, class);
        RoomLog {
            log: self,
            room,
            stream: rooms_stream(origin, part),
            filter: self.subjects.stored_all(origin, part, room),
            messages: of_class(Class::Msg),
            changes: of_class(Class::Ev),
            state: self.streams.known(part),
        }
    }

    /// Looks at the stream now, and up to where MongoDB has all of it.
    async fn floor(&self, part: u16) -> Option<Floor> {
        let mut kept = self.floors.get(usize::from(part))?.lock().await;
        let now = Instant::now();
        if let Some(floor) = *kept
            && now.duration_since(floor.at) < FLOOR_KEPT
        {
            return Some(floor);
        }
        *kept = None;
        let stream = rooms_stream(self.streams.origin(), part);
        let connection = self.reader.connection();
        let consumer = consumer_state(connection, &stream, self.wait).await;
        let consumer = consumer
            .inspect_err(|error| tracing::debug!(stream, %error, "no floor"))
            .ok()?;
        let state = self.streams.fetch(part).await;
        let state = state
            .inspect_err(|error| tracing::debug!(stream, %error, "no floor"))
            .ok()?;
        // A floor beyond the end is one of a stream that was there before.
        let seq = consumer.map(|consumer| consumer.floor);
        let seq = seq.map(|seq| if seq > state.last_seq { 0 } else { seq });
        let floor = Floor {
            at: now,
            state,
            seq,
        };
        *kept = Some(floor);
        Some(floor)
    }
}

impl RoomLog<'_> {
    /// The sequence up to which MongoDB has everything. `None`: nobody writes it there, or nobody can tell.
    pub(super) async fn floor(&mut self) -> Option<u64> {
        let part = partition_of(self.room, self.log.streams.partitions());
        let floor = self.log.floor(part).await?;
        self.state = floor.state;
        floor.seq
    }

    /// Looks at the stream now.
    pub(super) async fn look(&mut self) {
        let part = partition_of(self.room, self.log.streams.partitions());
        if let Ok(state) = self.log.streams.verify(part, Instant::now()).await {
            self.state = state;
        }
    }

    /// Whether this is the stream's own incarnation.
    pub(super) fn is_of(&self, position: &crate::model::Position) -> bool {
        (&position.origin, position.epoch) == (self.log.streams.origin(), self.state.epoch)
    }

    /// Where a sequence of this stream stands in history, given when it was stored.
    pub(super) fn place(&self, seq: u64, ts: u64) -> Place {
        Place {
            ts,
            origin: self.log.streams.origin().clone(),
            epoch: self.state.epoch,
            seq,
        }
    }

    /// The sequence of this stream that a place comes before, or at.
    pub(super) fn seq_at(&self, place: &Place) -> u64 {
        let here = (&place.origin, place.epoch) == (self.log.streams.origin(), self.state.epoch);
        // Elsewhere: of an earlier incarnation, so before all that is in this one.
        if here { place.seq } else { 0 }
    }

    /// Nothing: the stream can't be read.
    pub(super) fn nothing(&self) -> Tail {
        self.made_of(u64::MAX, Vec::new())
    }

    /// The first of the room's messages or changes from `seq` on.
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

    /// All that the stream has above `floor`; `None`: too much.
    pub(super) async fn tail(&self, floor: u64) -> Result<Option<Tail>, ReadError> {
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

    /// What a page needs of what the stream has above `floor`.
    pub(super) async fn part(&self, floor: u64, part: Part) -> Result<Tail, ReadError> {
        let Part { split, left, right } = part;
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
            // From the end nothing is behind it, so all is read.
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
        // Of what is before the split: both are counted at the same moment, since more may come behind it.
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
        // There are enough from `low` on, and not from `high` on.
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

    /// The place of a message among the room's newest, by its key.
    pub(super) async fn find(&self, key: &str) -> Result<Option<Place>, ReadError> {
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
        let origin = self.log.streams.origin().clone();
        let newest = floor.max(self.state.last_seq);
        Tail::new(origin, self.state.epoch, newest, entries)
    }

    async fn page(&self, filter: &str, from: u64) -> Result<Entries, ReadError> {
        let (reader, epoch) = (&self.log.reader, self.state.epoch);
        let page = reader.page(&self.stream, epoch, filter, from).await?;
        let bytes = page.records.iter().map(|record| record.body.len()).sum();
        let next = page.records.last().map_or(from, |record| record.seq + 1);
        let origin = self.log.streams.origin();
        let entries = page.records.into_iter().map(|record| {
            let room = self.room.clone();
            entry(Stored { room, record }, origin, epoch)
        });
        let entries: Vec<Entry> = entries.collect();
        // Without progress there is no end.
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
    /// The sequence after it.
    next: u64,
    /// How many match after it.
    pending: u64,
}

fn is_message(entry: &Entry) -> bool {
    matches!(entry.what, crate::store::What::Message { .. })
}
