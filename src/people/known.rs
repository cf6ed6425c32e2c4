//! The records that an edge knows, and how it hears of changes.
//!
//! A record is read when a room is first asked for, and followed from then on by the RePublish of the buckets: one
//! subscription for the records of all rooms, because they change seldom. Merging makes the order in which a read and
//! the changes arrive irrelevant. The revisions of a bucket have no gaps, so a lost change shows in the next one, or when
//! the newest revision is asked for.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{Fuse, FusedFuture as _, join_all, try_join_all},
};
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Mutex as Turn, broadcast, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{
    access::Standing,
    record::{Field, Merge as _, Record, RoomKind, merged},
};
use crate::{
    auth::{Identity, Right},
    bus::{Bucket, Entry, KvError, LiveFeed, Origins, Reader},
    config::{Access, Config},
    model::{Region, RoomId},
    protocol::{ErrorCode, Refused},
    runtime::unix_ms,
    subject::{
        BLOCK_KEYS, RECORD_KEYS, block_key, bucket, parse_block_key, parse_record_key, record_key,
    },
};

/// Rooms whose records an edge keeps at most, besides those that somebody is in.
const MAX_KNOWN: usize = 65_536;

/// Records that are read in one request. When as many are asked for, whoever asks for another one waits.
const BATCH: usize = 500;

/// How often it is checked whether a read is due.
const TICK: Duration = Duration::from_secs(1);

/// How often the newest revisions are compared, since the last change may have been lost.
const RESYNC: Duration = Duration::from_secs(30);

/// How long rooms whose access does not depend on a record don't wait for one after the bucket has failed to answer.
const DISTRUST: Duration = Duration::from_secs(10);

/// How much a replica of a bucket may lag behind.
const REPLICAS_LAG: Duration = Duration::from_secs(3);

/// Pause between two looks for the direct rooms that a block concerns: each goes through all rooms that are known.
const BLOCKS_PAUSE: Duration = Duration::from_millis(50);

/// Changes that a shard may leave unread. After that it looks at all its sessions.
const CHANGES: usize = 1024;

/// What is known of the record of one room.
#[derive(Debug, Default)]
pub struct Known {
    record: RwLock<Option<Arc<Record>>>,
    /// Whether the buckets were read.
    is_read: AtomicBool,
    /// Whether one of the two users of a direct room has blocked the other.
    blocked: AtomicBool,
    /// Whether it was asked for since the last sweep.
    used: AtomicBool,
    /// When members last wrote, in ms since 1970, while the room is in slow mode.
    turns: Mutex<HashMap<Box<str>, u64>>,
}

/// The room records of all regions, as an edge sees them. Shared by its shards and by HTTP.
#[derive(Debug)]
pub struct People {
    pub(super) config: Arc<Config>,
    pub(super) records: Bucket,
    pub(super) index: Bucket,
    pub(super) devices: Bucket,
    pub(super) origins: Arc<Origins>,
    known: RwLock<HashMap<RoomId, Arc<Known>>>,
    loads: mpsc::Sender<Load>,
    changes: broadcast::Sender<RecordChange>,
    /// When the bucket last failed to answer.
    failed: RwLock<Option<Instant>>,
    /// Whether what another region has could not be read, and is to be read again.
    is_incomplete: AtomicBool,
    /// Changes of blocks that were applied.
    blocks: AtomicU64,
    /// When the next block that this edge has written may be applied, for whose turn it is.
    blocks_turn: Turn<Instant>,
    /// Rooms that are read once more, because a replica that lags behind may have answered.
    again: Mutex<Vec<(Instant, RoomId, Arc<Known>)>>,
}

/// The record of a room is another one than was known.
#[derive(Debug, Clone)]
pub struct RecordChange {
    /// The room.
    pub room: RoomId,
    /// What the record is now; `None` if it was only read for the first time.
    pub record: Option<Arc<Record>>,
}

/// A request for a record.
#[derive(Debug)]
struct Load {
    room: RoomId,
    known: Arc<Known>,
    done: oneshot::Sender<bool>,
}

/// Requests for records. [`People::follow`] answers them.
#[derive(Debug)]
pub struct Loads(mpsc::Receiver<Load>);

/// What follows the buckets.
#[derive(Debug)]
pub struct Feeds {
    records: LiveFeed,
    blocks: LiveFeed,
}

impl Known {
    /// The record, if the room has one.
    #[must_use]
    pub fn record(&self) -> Option<Arc<Record>> {
        self.record.read().clone()
    }

    /// Whether the buckets were read. Otherwise the room may have a record although none is known.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.is_read.load(Ordering::Acquire)
    }

    /// What it means for one user whether the room has a record, and which.
    pub fn standing<T>(
        &self,
        config: &Config,
        room: &RoomId,
        ask: impl FnOnce(Standing<'_>) -> T,
    ) -> T {
        let record = self.record.read();
        let blocked = self.blocked.load(Ordering::Relaxed);
        ask(Standing::new(config, room, record.as_deref(), blocked))
    }

    /// Merges a record into it. Returns whether that has changed it.
    fn learn(&self, other: &Record) -> bool {
        let mut record = self.record.write();
        match &mut *record {
            None => {
                *record = Some(Arc::new(other.clone()));
                true
            }
            Some(known) => {
                let mut merged = Record::clone(known);
                merged.merge_from(other);
                let changed = merged != **known;
                if changed {
                    *known = Arc::new(merged);
                }
                changed
            }
        }
    }
}

/// The two users of a direct room that only they are in.
pub(super) fn pair(record: &Record) -> Option<(&str, &str)> {
    let mut users = record.members.keys();
    let both = (users.next()?, users.next()?);
    let is_pair = record.kind == RoomKind::Dm && users.next().is_none();
    is_pair.then_some((both.0.as_str(), both.1.as_str()))
}

/// The record in an entry of a bucket.
fn record_of(entry: &Entry) -> Option<Record> {
    let value = entry.value.as_ref()?;
    serde_json::from_slice(value)
        .inspect_err(|error| {
            tracing::warn!(key = entry.key, %error, "a room record is not understood");
        })
        .ok()
}

impl People {
    /// The records of all regions, read by `reader`. Nothing is read before [`Self::follow`] runs.
    #[must_use]
    pub fn new(
        config: &Arc<Config>,
        reader: &Reader,
        origins: &Arc<Origins>,
    ) -> (Arc<Self>, Loads) {
        let connection = reader.connection().clone();
        let bucket = |name| Bucket::new(connection.clone(), reader.clone(), config, name);
        let (loads, requests) = mpsc::channel(BATCH);
        let people = Arc::new(Self {
            config: Arc::clone(config),
            records: bucket(bucket::ROOMS),
            index: bucket(bucket::INBOX),
            devices: bucket(bucket::DEVICES),
            origins: Arc::clone(origins),
            known: RwLock::default(),
            loads,
            changes: broadcast::Sender::new(CHANGES),
            failed: RwLock::default(),
            is_incomplete: AtomicBool::new(false),
            blocks: AtomicU64::new(0),
            blocks_turn: Turn::new(Instant::now()),
            again: Mutex::default(),
        });
        (people, Loads(requests))
    }

    /// The configuration of the edge.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The records that change, from now on: also those of rooms that nobody has asked for.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<RecordChange> {
        self.changes.subscribe()
    }

    /// What is known of a room's record. It is read first, if nobody has asked for it yet.
    ///
    /// # Errors
    /// `unavailable` if it can't be read and the room is for members only.
    pub async fn of(&self, room: &RoomId) -> Result<Arc<Known>, Refused> {
        let known = {
            let known = self.known.read().get(room).cloned();
            known.unwrap_or_else(|| Arc::clone(self.known.write().entry(room.clone()).or_default()))
        };
        if !known.used.load(Ordering::Relaxed) {
            known.used.store(true, Ordering::Relaxed);
        }
        if known.is_read() {
            return Ok(known);
        }
        let needed = self.config.namespaces.get(room.namespace());
        let needed = needed.is_some_and(|its| its.access == Access::Members);
        let distrusted = || self.failed.read().is_some_and(|at| at.elapsed() < DISTRUST);
        if !needed && distrusted() {
            return Ok(known);
        }
        let (done, loaded) = oneshot::channel();
        let load = Load {
            room: room.clone(),
            known: Arc::clone(&known),
            done,
        };
        // The other end is gone only when the edge is.
        let asked = self.loads.send(load).await.is_ok();
        if !(asked && loaded.await.unwrap_or(false)) && needed {
            let text = format!("who may be in {room} can't be read now");
            return Err(Refused::new(ErrorCode::Unavailable, text));
        }
        Ok(known)
    }

    /// What is known of a room's record, without a read.
    #[must_use]
    pub fn known(&self, room: &RoomId) -> Option<Arc<Known>> {
        self.known.read().get(room).cloned()
    }

    /// Checks that a token grants a right in a room, and that the room's record does not say otherwise. Returns what is
    /// known of the record.
    ///
    /// # Errors
    /// `forbidden`, or `unavailable` if the record can't be read.
    pub async fn check(
        &self,
        identity: &Identity,
        right: Right,
        room: &RoomId,
    ) -> Result<Arc<Known>, Refused> {
        let known = self.of(room).await?;
        known.standing(&self.config, room, |standing| {
            standing.check(identity, right, room, unix_ms())
        })?;
        Ok(known)
    }

    /// Whether a user moderates a room with this record.
    #[must_use]
    pub fn moderates(&self, record: &Record, identity: &Identity, room: &RoomId) -> bool {
        Standing::new(&self.config, room, Some(record), false).leads(identity, room)
    }

    /// Lets a member write who has waited long enough, if the room is in slow mode. Each edge counts by itself.
    ///
    /// # Errors
    /// `rate_limited`, with the time to wait.
    pub fn take_turn(
        &self,
        known: &Known,
        identity: &Identity,
        room: &RoomId,
    ) -> Result<(), Refused> {
        let wait = known.standing(&self.config, room, |standing| {
            standing.slow_mode(identity, room)
        });
        let Some(wait) = wait else { return Ok(()) };
        let (now, mut turns) = (unix_ms(), known.turns.lock());
        turns.retain(|_, last| now < *last + wait);
        match turns.get(&*identity.user) {
            Some(last) => {
                let rest = *last + wait - now;
                let text = format!("{room} is in slow mode: write again in {rest} ms");
                Err(Refused::new(ErrorCode::RateLimited, text).after(rest))
            }
            None => {
                turns.insert((*identity.user).into(), now);
                Ok(())
            }
        }
    }

    /// Subscribes to the changes. `None` if NATS was closed.
    pub async fn open(&self) -> Option<Feeds> {
        let records = self.records.changes(RECORD_KEYS).await.ok()?;
        let blocks = self.index.changes(BLOCK_KEYS).await.ok()?;
        Some(Feeds { records, blocks })
    }

    /// Reads records that are asked for, and applies changes, forever.
    pub async fn follow(self: Arc<Self>, mut requests: Loads, mut feeds: Feeds) {
        let loading = async {
            let mut batch = Vec::new();
            while requests.0.recv_many(&mut batch, BATCH).await > 0 {
                self.load(std::mem::take(&mut batch)).await;
                self.sweep();
            }
        };
        let following = async {
            let mut tick = interval(TICK);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut seen: HashMap<(bool, Region), u64> = HashMap::new();
            let mut due = Instant::now() + RESYNC;
            let mut suspect = false;
            let mut again_at: Option<Instant> = None;
            let mut regions = self.origins.members_version();
            let (mut of_records, mut of_blocks) = (Vec::new(), Vec::new());
            let (mut blocks, mut blocks_at) = (HashSet::new(), Instant::now());
            // Changes are applied while records are read again, which may take long.
            let mut reading = pin!(Fuse::terminated());
            loop {
                of_records.clear();
                of_blocks.clear();
                tokio::select! {
                    more = feeds.records.next_batch(&mut of_records, 64) => if !more { return },
                    more = feeds.blocks.next_batch(&mut of_blocks, 64) => if !more { return },
                    read = &mut reading, if !reading.is_terminated() => {
                        let all: bool = read;
                        suspect |= !all;
                    }
                    () = sleep_until(blocks_at), if !blocks.is_empty() => {}
                    _ = tick.tick() => self.read_once_more().await,
                }
                for message in &of_records {
                    let Some((origin, entry)) = self.records.change(message) else {
                        continue;
                    };
                    let before = entry.revision.saturating_sub(1);
                    let newest = seen.entry((true, origin)).or_insert(before);
                    // What is republished a second time, by a new mirror, is older.
                    let is_new = entry.revision > *newest;
                    suspect |= entry.revision > *newest + 1;
                    *newest = entry.revision.max(*newest);
                    self.apply(&entry, is_new);
                }
                for message in &of_blocks {
                    let change = self.index.change(message);
                    blocks.extend(change.and_then(|(_, entry)| parse_block_key(&entry.key)));
                }
                if !blocks.is_empty() && blocks_at <= Instant::now() {
                    self.apply_blocks(&std::mem::take(&mut blocks)).await;
                    blocks_at = Instant::now() + BLOCKS_PAUSE;
                }
                let (now, now_regions) = (Instant::now(), self.origins.members_version());
                suspect |= feeds.records.is_suspect()
                    || feeds.blocks.is_suspect()
                    || std::mem::replace(&mut regions, now_regions) != now_regions;
                if self.is_incomplete.swap(false, Ordering::Relaxed) && again_at.is_none() {
                    again_at = Some(now + DISTRUST);
                }
                suspect |= again_at.take_if(|at| *at <= now).is_some();
                if due <= now {
                    due = now + RESYNC;
                    suspect |= self.is_behind(&mut seen).await;
                }
                if suspect && reading.is_terminated() {
                    feeds.records.settle();
                    feeds.blocks.settle();
                    suspect = false;
                    reading.set(self.read_again().fuse());
                }
            }
        };
        tokio::join!(loading, following);
    }

    /// Reads once more what was read some seconds ago.
    async fn read_once_more(&self) {
        let now = Instant::now();
        let rooms: Vec<_> = {
            let mut again = self.again.lock();
            let due = again.extract_if(.., |(at, _, _)| *at <= now);
            due.map(|(_, room, known)| (room, known)).collect()
        };
        for rooms in rooms.chunks(BATCH) {
            if let Err(error) = self.read(rooms).await {
                tracing::debug!(%error, "room records can't be read once more");
                self.is_incomplete.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether a bucket has changes that have not arrived.
    async fn is_behind(&self, seen: &mut HashMap<(bool, Region), u64>) -> bool {
        let mut behind = false;
        for streams in self.origins.all() {
            let origin = streams.origin();
            let pairs = [
                (true, &self.records, RECORD_KEYS),
                (false, &self.index, BLOCK_KEYS),
            ];
            for (of_records, bucket, keys) in pairs {
                match bucket.of(origin).newest(keys).await {
                    Ok(newest) => {
                        let known = seen.entry((of_records, origin.clone())).or_insert(0);
                        behind |= newest > *known;
                        *known = newest.max(*known);
                    }
                    Err(error) => {
                        tracing::debug!(%origin, %error, "room records can't be compared");
                    }
                }
            }
        }
        behind
    }

    /// Reads all known records again. Returns whether that was possible.
    async fn read_again(&self) -> bool {
        let all: Vec<_> = {
            let known = self.known.read();
            known
                .iter()
                .map(|(room, known)| (room.clone(), Arc::clone(known)))
                .collect()
        };
        for rooms in all.chunks(BATCH) {
            if let Err(error) = self.read(rooms).await {
                tracing::debug!(%error, "room records can't be read");
                return false;
            }
        }
        true
    }

    async fn load(&self, loads: Vec<Load>) {
        let rooms: Vec<_> = loads
            .iter()
            .filter(|load| !load.known.is_read())
            .map(|load| (load.room.clone(), Arc::clone(&load.known)))
            .collect();
        let read = self.read(&rooms).await;
        if let Err(error) = &read {
            *self.failed.write() = Some(Instant::now());
            tracing::warn!(%error, "room records can't be read; is the bucket there? (natter provision)");
        }
        if read.is_ok() && self.config.streams.replicas > 1 {
            let at = Instant::now() + REPLICAS_LAG;
            let rooms = rooms.into_iter().map(|(room, known)| (at, room, known));
            self.again.lock().extend(rooms);
        }
        for load in loads {
            // The one who asked may have gone.
            let _gone = load.done.send(read.is_ok());
        }
    }

    /// Reads the records of rooms in the buckets of all regions. Of a region that can't be read, what is known stays;
    /// only the own one must be readable.
    async fn read(&self, rooms: &[(RoomId, Arc<Known>)]) -> Result<(), KvError> {
        let keys: Vec<String> = rooms.iter().map(|(room, _)| record_key(room)).collect();
        let entries = self.get(&self.records, &keys).await?;
        let by_room: HashMap<&RoomId, &Arc<Known>> =
            rooms.iter().map(|(room, known)| (room, known)).collect();
        let mut changed = Vec::new();
        for (_own, entry) in &entries {
            if let Some(room) = parse_record_key(&entry.key)
                && let Some(known) = by_room.get(&room)
                && let Some(record) = record_of(entry)
            {
                let is_first = known.record.read().is_none();
                if known.learn(&record) {
                    changed.push((room, is_first));
                }
            }
        }
        let blocks = self.blocks.load(Ordering::Relaxed);
        let direct = rooms.iter().filter_map(|(_, known)| {
            let record = known.record()?;
            pair(&record).is_some().then(|| (Arc::clone(known), record))
        });
        let direct: Vec<_> = direct.collect();
        let blocked = direct.iter().map(|(_, record)| self.is_blocked(record));
        for ((known, _), blocked) in direct.iter().zip(try_join_all(blocked).await?) {
            known.blocked.store(blocked, Ordering::Relaxed);
        }
        if self.blocks.load(Ordering::Relaxed) != blocks {
            // Somebody was blocked, or no longer, while it was read.
            self.is_incomplete.store(true, Ordering::Relaxed);
        }
        for (_, known) in rooms {
            known.is_read.store(true, Ordering::Release);
        }
        for (room, is_first) in changed {
            let known = by_room.get(&room).filter(|_| !is_first);
            let record = known.and_then(|known| known.record());
            self.announce(room, record);
        }
        Ok(())
    }

    /// The entries of these keys in the buckets of all regions, and whether each is of the own one. Only the own bucket
    /// must be readable.
    pub(super) async fn get(
        &self,
        bucket: &Bucket,
        keys: &[String],
    ) -> Result<Vec<(bool, Entry)>, KvError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let all = self.origins.all();
        let reads = all.iter().map(async |streams| {
            let read = bucket.of(streams.origin()).get(keys).await;
            (streams.origin() == bucket.origin(), read)
        });
        let mut entries = Vec::new();
        for (own, read) in join_all(reads).await {
            match read {
                Ok(read) => entries.extend(read.into_iter().map(|entry| (own, entry))),
                Err(error) if own => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "the records of another region can't be read");
                    self.is_incomplete.store(true, Ordering::Relaxed);
                }
            }
        }
        Ok(entries)
    }

    /// Whether one of the two users of a direct room has blocked the other.
    async fn is_blocked(&self, record: &Record) -> Result<bool, KvError> {
        match pair(record) {
            Some((one, other)) => self.is_blocked_between(one, other).await,
            None => Ok(false),
        }
    }

    /// Whether one of two users has blocked the other.
    pub(super) async fn is_blocked_between(&self, one: &str, other: &str) -> Result<bool, KvError> {
        let keys = [block_key(one, other), block_key(other, one)];
        let entries = self.get(&self.index, &keys).await?;
        let blocks: BTreeMap<&str, Field<bool>> = merged(entries.iter().map(|(_, entry)| entry));
        Ok(blocks.values().any(|block| block.value))
    }

    /// Applies a change of a record. `is_new`: whether it has not arrived before.
    fn apply(&self, entry: &Entry, is_new: bool) {
        // A record that was removed by hand is kept: other regions may not hear of it.
        let Some(room) = parse_record_key(&entry.key) else {
            return;
        };
        match self.known(&room) {
            Some(known) => {
                if let Some(record) = record_of(entry) {
                    self.learn_of(&room, &known, &record);
                }
            }
            // Those who watch may want to know of it.
            None if is_new => {
                if let Some(record) = record_of(entry) {
                    self.announce(room, Some(Arc::new(record)));
                }
            }
            None => {}
        }
    }

    /// Tells those who listen that a record has changed.
    fn announce(&self, room: RoomId, record: Option<Arc<Record>>) {
        // Nobody may be listening yet.
        let _nobody = self.changes.send(RecordChange { room, record });
    }

    fn learn_of(&self, room: &RoomId, known: &Known, record: &Record) {
        let is_new = known.record.read().is_none();
        if known.learn(record) {
            if is_new && pair(record).is_some() {
                // Whether one of the two has blocked the other is read with it.
                known.is_read.store(false, Ordering::Release);
            }
            self.announce(room.clone(), known.record());
        }
    }

    /// Applies what this edge has written, before it is republished.
    pub(super) fn wrote(&self, room: &RoomId, record: &Record) {
        let known = Arc::clone(self.known.write().entry(room.clone()).or_default());
        self.learn_of(room, &known, record);
    }

    /// Applies a block that this edge has written, when it is its turn.
    pub(super) async fn apply_own_block(&self, user: &str, other: &str) {
        let mut turn = self.blocks_turn.lock().await;
        sleep_until(*turn).await;
        self.apply_blocks(&HashSet::from([(user.to_owned(), other.to_owned())]))
            .await;
        *turn = Instant::now() + BLOCKS_PAUSE;
    }

    /// Users have blocked others, or no longer do.
    async fn apply_blocks(&self, changed: &HashSet<(String, String)>) {
        self.blocks.fetch_add(1, Ordering::Relaxed);
        let of_both = |known: &&Arc<Known>| {
            let record = known.record.read();
            record.as_deref().and_then(pair).is_some_and(|(one, two)| {
                let is_changed = |user: &str, other: &str| {
                    let mut changed = changed.iter();
                    changed.any(|(its, of)| its == user && of == other)
                };
                is_changed(one, two) || is_changed(two, one)
            })
        };
        let concerned: Vec<Arc<Known>> = {
            let known = self.known.read();
            known.values().filter(of_both).cloned().collect()
        };
        for known in concerned {
            let Some(record) = known.record() else {
                continue;
            };
            match self.is_blocked(&record).await {
                Ok(blocked) => known.blocked.store(blocked, Ordering::Relaxed),
                Err(error) => {
                    tracing::warn!(%error, "who has blocked whom can't be read");
                    known.is_read.store(false, Ordering::Release);
                }
            }
        }
    }

    /// Forgets records that nobody uses, if there are too many.
    fn sweep(&self) {
        if self.known.read().len() <= MAX_KNOWN {
            return;
        }
        self.known.write().retain(|_, known| {
            // A room that somebody is in is held by the session too.
            Arc::strong_count(known) > 1 || known.used.swap(false, Ordering::Relaxed)
        });
    }
}
