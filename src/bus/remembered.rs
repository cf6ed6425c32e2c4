//! The record of erased messages, which keeps an erased message from being stored again.
//!
//! A client that never received the acknowledgement may retry a message from its outbox long after the message was
//! erased. The stream no longer deduplicates it by then. So before an erasure deletes anything, it writes the hashes of
//! the messages into the bucket `control`:
//!
//! ```text
//! erased.set.<set>          {"room" | "user" and "scope", "salt", "chunks", "count", "until"}    describes the set
//! erased.ids.<set>.<chunk>  8 bytes a message, sorted                                            written first
//! ```
//!
//! Edges and history services know all sets and the room or user of each. Chunks are read when a message is published
//! in that room or by that user, and cached within [`MAX_CACHED`] bytes. If no set concerns the room or the user, a
//! publish costs one or two look-ups in a map; if there are no sets at all, one atomic load.
//!
//! A hash is made of the set's salt and the message's key. Eight bytes of SHA-256 are enough: with n messages in a set,
//! one in 2^64 / n other messages is refused by mistake, and the salt can't be known before the set is written.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::{Bucket, Entry, KvError, LiveFeed, Origins, Put, Stored, record::message_key};
use crate::{
    model::{Reference, Region, RoomId, RoomScope},
    runtime::unix_s,
    subject::{ERASED_SETS, erased_ids_key, erased_set_key, parse_erased_set_key},
};

/// Average number of messages per chunk.
const CHUNK: usize = 2048;

/// Number of messages at which an erasure writes a set and begins another one. It bounds the hashes in memory.
const MAX_SET: usize = 1 << 20;

/// Bytes of cached chunks in a process. Above it, the whole cache is dropped.
const MAX_CACHED: usize = 16 << 20;

/// Pause before a failed read is retried, and interval at which it is checked whether a read is due.
const TICK: Duration = Duration::from_secs(1);

/// How often all sets are read again, since a republished change can be lost.
const RESYNC: Duration = Duration::from_secs(30);

/// The description of a set, as it is stored in the bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    #[serde(flatten)]
    what: What,
    /// Hexadecimal, unique to the set.
    salt: String,
    chunks: usize,
    count: usize,
    /// When the set ends, in Unix seconds. Stored here because a mirror may not be told that a key has expired.
    until: u64,
}

/// Whose messages were erased.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum What {
    /// All messages of a room.
    Room { room: RoomId },
    /// The messages of a user in these rooms. The user is stored as a hash, since the name of an erased user must not
    /// remain.
    User { user: String, scope: RoomScope },
}

/// One set, as this process knows it.
#[derive(Debug)]
struct Set {
    about: About,
    /// The bucket with its chunks.
    bucket: Bucket,
    id: String,
    /// The cached chunks. The lock is held while a chunk is read, so that publishes are answered in their order.
    chunks: tokio::sync::Mutex<HashMap<usize, Bytes>>,
}

/// All sets that this process knows. Shared by all shards.
#[derive(Debug, Default)]
pub struct Remembered {
    sets: RwLock<Sets>,
    /// Whether there may be a set. If not, nothing is looked up.
    any: AtomicBool,
    /// Bytes of chunks read since the cache was last dropped.
    cached: AtomicUsize,
}

#[derive(Debug, Default)]
struct Sets {
    known: BTreeSet<String>,
    rooms: HashMap<RoomId, Vec<Arc<Set>>>,
    users: HashMap<String, Vec<Arc<Set>>>,
}

/// A message that may have been erased, or that refers to an erased one.
#[derive(Debug, Clone, Copy)]
pub struct Suspect<'a> {
    /// Its room.
    pub room: &'a RoomId,
    /// Its sender.
    pub from: &'a str,
    /// The sender's id of the message.
    pub id: &'a str,
    /// The message it refers to, if any, which may have been erased too.
    pub target: Option<&'a Reference>,
}

/// Messages that are about to be erased and are being written to sets.
#[derive(Debug)]
pub struct Leaving {
    bucket: Bucket,
    what: What,
    until: u64,
    kept: Duration,
    salt: String,
    hashes: Vec<u64>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn first_8(digest: &[u8]) -> u64 {
    let first = digest.first_chunk().copied();
    u64::from_be_bytes(first.unwrap_or_default())
}

fn hash(salt: &str, key: &str) -> u64 {
    let digest = Sha256::new().chain_update(salt).chain_update(key);
    first_8(&digest.finalize())
}

/// The form in which sets store a user's name.
fn user_hash(user: &str) -> String {
    let digest = Sha256::new()
        .chain_update("natter user ")
        .chain_update(user);
    hex(digest.finalize().get(..16).unwrap_or_default())
}

/// The chunk that contains a hash. Chunks are ordered by hash.
fn chunk_of(hash: u64, chunks: usize) -> usize {
    let chunk = (u128::from(hash) * chunks as u128) >> 64;
    usize::try_from(chunk).unwrap_or_default()
}

/// Whether a chunk contains a hash.
fn has(chunk: &[u8], hash: u64) -> bool {
    let (chunk, _rest) = chunk.as_chunks::<8>();
    chunk
        .binary_search_by(|bytes| u64::from_be_bytes(*bytes).cmp(&hash))
        .is_ok()
}

impl Leaving {
    /// For messages of a room. The sets are kept for `kept`, in the own region's `bucket`.
    #[must_use]
    pub fn room(bucket: Bucket, room: &RoomId, kept: Duration) -> Self {
        Self::new(bucket, What::Room { room: room.clone() }, kept)
    }

    /// For messages of a user.
    #[must_use]
    pub fn user(bucket: Bucket, user: &str, scope: &RoomScope, kept: Duration) -> Self {
        let what = What::User {
            user: user_hash(user),
            scope: scope.clone(),
        };
        Self::new(bucket, what, kept)
    }

    fn new(bucket: Bucket, what: What, kept: Duration) -> Self {
        // Buckets count TTLs in whole seconds.
        let kept = Duration::from_secs(kept.as_secs().max(1));
        Self {
            bucket,
            what,
            until: unix_s() + kept.as_secs(),
            kept,
            salt: hex(&rand::random::<[u8; 16]>()),
            hashes: Vec::new(),
        }
    }

    /// Adds the keys of messages ([`message_key`]).
    ///
    /// # Errors
    /// [`KvError`]. Some of the hashes were not written.
    pub async fn take(&mut self, keys: &[String]) -> Result<(), KvError> {
        let salt = &self.salt;
        self.hashes.extend(keys.iter().map(|key| hash(salt, key)));
        if self.hashes.len() >= MAX_SET {
            self.write().await?;
        }
        Ok(())
    }

    /// Writes the rest. When it returns, the edges are being notified.
    ///
    /// # Errors
    /// [`KvError`]. Some of the hashes were not written.
    pub async fn finish(mut self) -> Result<(), KvError> {
        self.write().await
    }

    async fn write(&mut self) -> Result<(), KvError> {
        let mut hashes = std::mem::take(&mut self.hashes);
        if hashes.is_empty() {
            return Ok(());
        }
        hashes.sort_unstable();
        hashes.dedup();
        // Always a new set: a repeated erasure only finds the messages that were left.
        let set = ulid::Ulid::new().to_string();
        let about = About {
            what: self.what.clone(),
            salt: self.salt.clone(),
            chunks: hashes.len().div_ceil(CHUNK),
            count: hashes.len(),
            until: self.until,
        };
        let how = Put {
            ttl: Some(self.kept),
            expected: None,
        };
        let mut rest = hashes.as_slice();
        for chunk in 0..about.chunks {
            let end = rest.partition_point(|hash| chunk_of(*hash, about.chunks) == chunk);
            let (these, others) = rest.split_at(end);
            rest = others;
            let value: Vec<u8> = these.iter().flat_map(|hash| hash.to_be_bytes()).collect();
            let key = erased_ids_key(&set, chunk);
            self.bucket.put(&key, value.into(), how).await?;
        }
        let value = serde_json::to_vec(&about).map_err(|e| KvError::Refused(e.to_string()))?;
        let key = erased_set_key(&set);
        self.bucket.put(&key, value.into(), how).await?;
        Ok(())
    }
}

impl Remembered {
    /// Reads the sets of all regions, and retries until those of the own region can be read. Pass the returned feed to
    /// [`Self::follow`]. `None` if the NATS client was closed.
    pub async fn open(&self, bucket: &Bucket, origins: &Origins) -> Option<LiveFeed> {
        // Subscribe before reading, so that changes in between are seen.
        let feed = bucket.changes(ERASED_SETS).await.ok()?;
        let mut told = false;
        while !self.read(bucket, origins).await {
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("waiting for the list of what was erased");
            }
            sleep(TICK).await;
        }
        Some(feed)
    }

    /// Applies later changes, until the feed ends.
    pub async fn follow(self: Arc<Self>, bucket: Bucket, origins: Arc<Origins>, feed: LiveFeed) {
        let mut feed = feed;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        let (mut due, mut members) = (Instant::now() + RESYNC, origins.members_version());
        loop {
            batch.clear();
            tokio::select! {
                more = feed.next_batch(&mut batch, 64) => if !more { return },
                _ = tick.tick() => {}
            }
            for message in &batch {
                if let Some((origin, entry)) = bucket.change(message) {
                    self.learn(&bucket, &origin, &entry);
                }
            }
            let now = origins.members_version();
            if feed.is_suspect() || members != now || due <= Instant::now() {
                feed.settle();
                members = now;
                let pause = match self.read(&bucket, &origins).await {
                    true => RESYNC,
                    false => TICK,
                };
                due = Instant::now() + pause;
                self.forget(unix_s());
            }
        }
    }

    /// Reads the sets of all regions. Returns whether those of the own region could be read.
    async fn read(&self, bucket: &Bucket, origins: &Origins) -> bool {
        let mut own = false;
        for streams in origins.all() {
            let origin = streams.origin();
            match self.read_of(bucket, origin).await {
                Ok(()) => own |= origin == bucket.origin(),
                Err(error) => tracing::debug!(%origin, %error, "what was erased can't be read"),
            }
        }
        own
    }

    /// Reads the sets of one region.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn read_of(&self, bucket: &Bucket, origin: &Region) -> Result<(), KvError> {
        let entries = bucket.of(origin).scan(ERASED_SETS).await?;
        entries
            .iter()
            .for_each(|entry| self.learn(bucket, origin, entry));
        Ok(())
    }

    fn learn(&self, bucket: &Bucket, origin: &Region, entry: &Entry) {
        // A set stays valid until its end even if its key was removed, since other regions may not learn of the
        // removal.
        let (Some(id), Some(value)) = (parse_erased_set_key(&entry.key), &entry.value) else {
            return;
        };
        if self.sets.read().known.contains(id) {
            return;
        }
        let about: About = match serde_json::from_slice(value) {
            Ok(about) => about,
            Err(error) => {
                tracing::warn!(%error, "a key of the control bucket is not understood");
                return;
            }
        };
        let set = Arc::new(Set {
            bucket: bucket.of(origin),
            id: id.to_owned(),
            chunks: tokio::sync::Mutex::default(),
            about,
        });
        let mut sets = self.sets.write();
        if sets.known.insert(set.id.clone()) {
            let of = match &set.about.what {
                What::Room { room } => sets.rooms.entry(room.clone()).or_default(),
                What::User { user, .. } => sets.users.entry(user.clone()).or_default(),
            };
            of.push(set);
            self.any.store(true, Ordering::Release);
        }
    }

    /// Removes the sets that have ended.
    fn forget(&self, now_s: u64) {
        if !self.is_any() {
            return;
        }
        let mut sets = self.sets.write();
        let Sets {
            known,
            rooms,
            users,
        } = &mut *sets;
        let mut ended = |of: &mut Vec<Arc<Set>>| {
            of.retain(|set| {
                let holds = now_s < set.about.until;
                if !holds {
                    known.remove(&set.id);
                }
                holds
            });
            !of.is_empty()
        };
        rooms.retain(|_, of| ended(of));
        users.retain(|_, of| ended(of));
    }

    /// Whether there may be anything to look up.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Whether a message, or the message it refers to, was erased.
    ///
    /// # Errors
    /// [`KvError`] if that can't be checked now.
    pub async fn has(&self, suspect: Suspect<'_>) -> Result<bool, KvError> {
        for (set, key) in self.concerned(suspect) {
            if self.is_in(&set, &key).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The same of a message of a stream.
    ///
    /// # Errors
    /// [`KvError`] if that can't be checked now.
    pub async fn has_stored(&self, stored: &Stored) -> Result<bool, KvError> {
        let Stored { room, record } = stored;
        let target = record.target.as_deref();
        let target = target.and_then(|target| Reference::parse(target).ok());
        let suspect = Suspect {
            room,
            from: &record.from,
            id: &record.id,
            target: target.as_ref(),
        };
        self.has(suspect).await
    }

    /// The sets that may contain the message or its target, each with the key to look up.
    fn concerned(&self, suspect: Suspect<'_>) -> Vec<(Arc<Set>, String)> {
        let Suspect {
            room,
            from,
            id,
            target,
        } = suspect;
        let target = target.map(|target| {
            let author = target.user.as_deref().unwrap_or(from);
            (author, target.id.as_str())
        });
        let sets = self.sets.read();
        let of_room = sets.rooms.get(room);
        if of_room.is_none() && sets.users.is_empty() {
            return Vec::new();
        }
        let mut concerned = Vec::new();
        for (user, id) in std::iter::once((from, id)).chain(target) {
            let of_user = match sets.users.is_empty() {
                true => None,
                false => sets.users.get(&user_hash(user)),
            };
            let of_user = of_user.into_iter().flatten().filter(
                |set| matches!(&set.about.what, What::User { scope, .. } if scope.contains(room)),
            );
            let key = message_key(room.as_str(), user, id);
            let of_room = of_room.into_iter().flatten();
            concerned.extend(
                of_room
                    .chain(of_user)
                    .map(|set| (Arc::clone(set), key.clone())),
            );
        }
        concerned
    }

    async fn is_in(&self, set: &Set, key: &str) -> Result<bool, KvError> {
        let hash = hash(&set.about.salt, key);
        let number = chunk_of(hash, set.about.chunks);
        let mut chunks = set.chunks.lock().await;
        if let Some(chunk) = chunks.get(&number) {
            return Ok(has(chunk, hash));
        }
        let found = set.bucket.get(&[erased_ids_key(&set.id, number)]).await?;
        let chunk = found.into_iter().next().and_then(|entry| entry.value);
        let Some(chunk) = chunk else {
            // The set has ended, or the chunk was removed by hand.
            return Ok(false);
        };
        let found = has(&chunk, hash);
        let cached = self.cached.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len();
        chunks.insert(number, chunk);
        drop(chunks);
        if cached > MAX_CACHED {
            self.drop_cached().await;
        }
        Ok(found)
    }

    async fn drop_cached(&self) {
        let all: Vec<Arc<Set>> = {
            let sets = self.sets.read();
            let all = sets.rooms.values().chain(sets.users.values());
            all.flatten().map(Arc::clone).collect()
        };
        for set in all {
            set.chunks.lock().await.clear();
        }
        self.cached.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_is_found_in_its_chunk_and_no_other_is() {
        for count in [1, 2, CHUNK, CHUNK + 1, 5 * CHUNK] {
            let mut hashes: Vec<u64> = (0..count)
                .map(|n| hash("salt", &format!("chat:a/kim/{n}")))
                .collect();
            hashes.sort_unstable();
            let chunks = count.div_ceil(CHUNK);
            let chunk = |number: usize| -> Vec<u8> {
                let these = hashes.iter().filter(|h| chunk_of(**h, chunks) == number);
                these.flat_map(|hash| hash.to_be_bytes()).collect()
            };
            let all: Vec<Vec<u8>> = (0..chunks).map(chunk).collect();
            assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 8 * count);
            for n in 0..count {
                let sought = hash("salt", &format!("chat:a/kim/{n}"));
                assert!(
                    has(&all[chunk_of(sought, chunks)], sought),
                    "{n} of {count}"
                );
                for other in [
                    hash("salt", &format!("chat:a/lee/{n}")),
                    hash("salt", &format!("chat:b/kim/{n}")),
                    hash("pepper", &format!("chat:a/kim/{n}")),
                ] {
                    assert!(!has(&all[chunk_of(other, chunks)], other), "{n} of {count}");
                }
            }
        }
        assert_eq!(chunk_of(u64::MAX, 7), 6);
        assert!(!has(&[], 0));
    }

    #[test]
    fn what_a_set_is_about_reads_as_it_was_written_and_names_no_user() {
        let scope = RoomScope::one(RoomId::parse("chat:a").unwrap());
        let room = RoomId::parse("chat:a").unwrap();
        for what in [
            What::Room { room },
            What::User {
                user: user_hash("kim"),
                scope,
            },
        ] {
            let about = About {
                what,
                salt: "00".to_owned(),
                chunks: 3,
                count: 5000,
                until: 7,
            };
            let text = serde_json::to_string(&about).unwrap();
            assert!(!text.contains("kim"), "{text}");
            let read: About = serde_json::from_str(&text).unwrap();
            assert_eq!(read, about);
        }
        assert_ne!(user_hash("kim"), user_hash("lee"));
    }
}
