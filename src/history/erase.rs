//! Erases rooms and users: from the streams, from MongoDB, and by an announcement from the memory of edges and clients.
//!
//! An erasure is recorded first. Then the instance that was asked carries it out; if that instance dies, another one
//! takes over. The steps are:
//!
//! 1. The erased messages are remembered ([`Remembered`](crate::bus::Remembered)), so that none of them is stored again.
//! 2. They are erased from the streams, so that no worker takes them to MongoDB any more.
//! 3. They are erased from MongoDB.
//! 4. The erasure is announced in the rooms concerned as a durable message, so that members drop their copies, now or
//!    when they come back.
//!
//! A worker that had erased messages in hand meanwhile deletes them again
//! ([`Store::enforce_erasures`](crate::store::Store::enforce_erasures)). If the worker died before that, a second look
//! some time later deletes them.
//!
//! A mirror does not repeat the deletions of its origin. So there is a record for each region, and each region's
//! service erases from its own streams and mirrors, at once or when it is back. A mirror that was cut off may later
//! receive messages that its origin has erased meanwhile. So when a region has carried out an erasure, each other
//! region is told to erase once more from its mirror of that region, as soon as the mirror has reached the announcement
//! of the erasure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout_at},
};

use super::Parts;
use crate::{
    bus::{Candidate, EraseError, Eraser, KvError, Leaving, Scan, Streams, Suspect},
    model::{Kind, Place, Region, RoomId, RoomScope, partition_of},
    protocol::{ErrorCode, Refused},
    runtime::Phase,
    store::{Again, Claimed, Erased, Erasure, Removal, StoreError},
    telemetry::metrics::{Counter, count},
};

/// Lease of an erasure: without a renewal in this time another instance may take it over.
const LEASE: Duration = Duration::from_secs(15);

/// Pause between two checks for erasures whose holder died.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Delay before a mirror is checked again that may receive messages its origin has erased.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How long a request for an erasure waits for its end.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// A request for an erasure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EraseRequest {
    pub what: EraseWhat,
    /// The user who requests it.
    pub by: String,
}

/// A room, or the messages of a user.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EraseWhat {
    /// All messages of a room.
    Room(RoomId),
    /// All messages of a user.
    User {
        user: String,
        /// Only in these rooms.
        scope: RoomScope,
    },
}

/// The progress of an erasure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EraseAnswer {
    /// Its id.
    pub id: String,
    /// Whether it is complete. Otherwise it continues, even if the client or the answering instance goes away.
    pub done: bool,
    /// Messages erased: the larger of the numbers in MongoDB and in the streams.
    pub erased: u64,
    /// Other regions whose services have not carried it out yet. They do so when they can be reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<String>,
}

/// An erasure can't be carried out now.
#[derive(Debug, thiserror::Error)]
enum ErasureError {
    /// A stream failed.
    #[error(transparent)]
    Stream(#[from] EraseError),
    /// MongoDB failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record of erased messages can't be written.
    #[error("what is erased can't be remembered")]
    Remember(#[from] KvError),
}

/// Carries out erasures.
#[derive(Debug, Clone)]
pub(super) struct Erasing {
    parts: Parts,
    /// For the own region's streams.
    eraser: Eraser,
    /// This instance, as the holder of leases.
    holder: String,
}

impl Erasing {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            config,
            connection,
            reader,
            streams,
            ..
        } = parts.clone();
        Self {
            eraser: Eraser::new(connection, reader, streams, &config.nats),
            holder: ulid::Ulid::new().to_string(),
            parts,
        }
    }

    /// Records an erasure and starts it.
    ///
    /// # Errors
    /// `unavailable`: nothing was erased, or the erasure is recorded and will be carried out. It is safe to retry.
    pub(super) async fn ask(&self, request: EraseRequest) -> Result<EraseAnswer, Refused> {
        let answer = self.begin(request).await;
        answer.map_err(|error| {
            tracing::warn!(%error, "an erasure could not be begun");
            Refused::new(ErrorCode::Unavailable, error.to_string())
        })
    }

    async fn begin(&self, request: EraseRequest) -> Result<EraseAnswer, ErasureError> {
        let mut before = Vec::new();
        for part in 0..self.eraser.partitions() {
            before.push(self.eraser.clock(part).await?);
        }
        let own = self.parts.streams.origin();
        // Includes regions whose mirrors do not exist yet.
        let others = self.others().await?;
        let erasure = Erasure {
            id: ulid::Ulid::new().to_string(),
            what: match request.what {
                EraseWhat::Room(room) => Erased::Room(room),
                EraseWhat::User { user, scope } => Erased::User { user, scope },
            },
            before,
            by: request.by,
            region: Some(own.clone()),
        };
        let id = erasure.id.clone();
        let store = &self.parts.store;
        store.record_erasure(&erasure, &self.holder, LEASE).await?;
        // The record of one region is enforced on the writes of all regions. The other regions' records are the work
        // they have to do.
        let mut elsewhere = BTreeMap::new();
        for region in others {
            let erasure = Erasure {
                id: format!("{id}.{region}"),
                region: Some(region.clone()),
                ..erasure.clone()
            };
            store.record_erasure(&erasure, "", Duration::ZERO).await?;
            elsewhere.insert(erasure.id, region);
        }
        let (done, erased) = oneshot::channel();
        let erasing = self.clone();
        let claimed = Claimed {
            erasure,
            settling: false,
            again: None,
            remembered: false,
        };
        self.parts.tasks.spawn("erase", async move {
            if let Some(erased) = erasing.carry_out(&claimed).await {
                // The requester may have gone.
                let _gone = done.send(erased);
            }
        });
        let deadline = Instant::now() + ANSWER_WITHIN;
        let erased = match timeout_at(deadline, erased).await {
            Ok(Ok(erased)) => Some(erased),
            // It takes longer, or failed and will be retried.
            Ok(Err(_)) | Err(_) => None,
        };
        let waiting = self.left(elsewhere, deadline).await?;
        Ok(EraseAnswer {
            id,
            done: erased.is_some() && waiting.is_empty(),
            erased: erased.unwrap_or_default(),
            waiting,
        })
    }

    /// The other regions of the mesh, as the first stream names them now.
    async fn others(&self) -> Result<Vec<Region>, EraseError> {
        let streams = &self.parts.streams;
        streams.fetch(0).await?;
        let mut regions = streams.regions();
        regions.retain(|region| region != streams.origin());
        Ok(regions)
    }

    /// Waits until other regions have carried out their records. Returns those that have not by the deadline.
    async fn left(
        &self,
        mut elsewhere: BTreeMap<String, Region>,
        deadline: Instant,
    ) -> Result<Vec<String>, StoreError> {
        while !elsewhere.is_empty() {
            let ids: Vec<String> = elsewhere.keys().cloned().collect();
            let left = self.parts.store.erasures_left(&ids).await?;
            elsewhere.retain(|id, _| left.contains(id));
            if Instant::now() >= deadline {
                break;
            }
            if !elsewhere.is_empty() {
                sleep(LOOK_EVERY / 8).await;
            }
        }
        let left = elsewhere.into_values();
        Ok(left.map(|region| region.to_string()).collect())
    }

    /// Takes over erasures that others left unfinished, forever.
    pub(super) async fn keep(self) {
        if self.parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
            return;
        }
        loop {
            match self.claim().await {
                Ok(Some(claimed)) if claimed.again.is_some() => {
                    self.carry_out(&claimed).await;
                }
                Ok(Some(claimed)) => {
                    tracing::info!(
                        erasure = claimed.erasure.id,
                        second_look = claimed.settling,
                        "an erasure is taken over",
                    );
                    self.carry_out(&claimed).await;
                }
                Ok(None) => sleep(LOOK_EVERY.mul_f64(rand::random_range(0.5..1.0))).await,
                Err(error) => {
                    tracing::debug!(%error, "erasures can't be looked for");
                    sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    async fn claim(&self) -> Result<Option<Claimed>, StoreError> {
        let region = self.parts.streams.origin();
        let store = &self.parts.store;
        store.claim_erasure(region, &self.holder, LEASE).await
    }

    /// Carries out an erasure while renewing its lease. Returns the number of messages. `None` if it did not finish: it
    /// is due again when the lease ends.
    async fn carry_out(&self, claimed: &Claimed) -> Option<u64> {
        let id = &claimed.erasure.id;
        let result = tokio::select! {
            result = self.erase(claimed) => result,
            () = self.hold(id) => return None,
            () = self.parts.tasks.stopping() => return None,
        };
        match result {
            // Logged when the mirror was erased from.
            Ok(erased) if claimed.again.is_some() => Some(erased),
            Ok(erased) => {
                count(Counter::HistoryErased, erased);
                tracing::info!(
                    erasure = id,
                    erased,
                    by = claimed.erasure.by,
                    "messages were erased"
                );
                Some(erased)
            }
            Err(error) => {
                tracing::warn!(erasure = id, %error, "an erasure is not finished; it will be tried again");
                None
            }
        }
    }

    /// Renews the lease; returns when another instance holds it.
    async fn hold(&self, id: &str) {
        loop {
            sleep(LEASE / 3).await;
            match self
                .parts
                .store
                .renew_erasure(id, &self.holder, LEASE)
                .await
            {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::debug!(%error, "an erasure's lease can't be renewed"),
            }
        }
    }

    async fn erase(&self, claimed: &Claimed) -> Result<u64, ErasureError> {
        let erasure = &claimed.erasure;
        let store = &self.parts.store;
        if let Some(again) = &claimed.again {
            self.erase_again(erasure, again).await?;
            return Ok(0);
        }
        // Messages with the same millisecond as `before` are stored by now.
        sleep(Duration::from_millis(2)).await;
        // The first time, and for the messages that the second look finds. Not at every attempt, since each set is kept
        // for a long time and edges must search it.
        if claimed.settling || !claimed.remembered {
            self.remember(erasure).await?;
            store.note_remembered(&erasure.id).await?;
        }
        let in_streams = self.erase_from_streams(erasure).await?;
        let in_store = store.erase_documents(erasure).await?;
        let erased = in_streams.max(in_store);
        if !claimed.settling || erased > 0 {
            let upto = self.announce(erasure).await?;
            if !claimed.settling && !upto.is_empty() {
                self.have_erased_again(erasure, upto).await?;
            }
        }
        // A worker that took messages before acknowledges or retries them within this time.
        let config = &self.parts.config;
        let settled = 2 * (config.history.ack_wait + config.mongodb.write_timeout);
        let second_look = (!claimed.settling).then_some(settled);
        store
            .finish_erasure(&erasure.id, erased, second_look)
            .await?;
        Ok(erased)
    }

    /// Records that the other regions must erase again from their mirrors of this region, once the mirrors have reached
    /// `upto`.
    async fn have_erased_again(
        &self,
        erasure: &Erasure,
        upto: BTreeMap<u16, u64>,
    ) -> Result<(), ErasureError> {
        let origin = self.parts.streams.origin();
        let again = Again {
            origin: origin.clone(),
            upto,
        };
        let id = erasure.id.split('.').next().unwrap_or_default();
        for region in self.others().await? {
            let erasure = Erasure {
                id: format!("{id}.{region}.{origin}"),
                region: Some(region),
                ..erasure.clone()
            };
            let store = &self.parts.store;
            store.record_again(&erasure, &again, AGAIN_AFTER).await?;
        }
        Ok(())
    }

    /// Erases once more from a mirror. It is postponed if the mirror does not exist yet or has not come that far.
    async fn erase_again(&self, erasure: &Erasure, again: &Again) -> Result<(), ErasureError> {
        let origin = &again.origin;
        let later = match self.parts.origins.get(origin) {
            Some(mirror) => {
                let mut behind = false;
                for (part, seq) in &again.upto {
                    let state = mirror.fetch(*part).await.map_err(EraseError::from)?;
                    behind |= state.last_seq < *seq;
                }
                let control = self.parts.control.of(origin);
                behind |= control.heard().await?.is_none_or(|heard| heard.behind);
                if !behind {
                    self.erase_from(erasure, mirror).await?;
                    self.parts
                        .remembered
                        .read_of(&self.parts.control, origin)
                        .await?;
                    self.sweep(erasure).await?;
                    tracing::info!(erasure = erasure.id, %origin, "erased once more from a mirror");
                }
                behind
            }
            // If the origin has left the mesh, its mirror is gone too.
            None => self.others().await?.contains(origin),
        };
        let later = later.then_some(AGAIN_AFTER);
        let store = &self.parts.store;
        store.finish_erasure(&erasure.id, 0, later).await?;
        Ok(())
    }

    /// Remembers which messages are about to be erased. Each region does so for its own stream; the region that was
    /// asked does so for messages that only MongoDB has, too.
    async fn remember(&self, erasure: &Erasure) -> Result<(), ErasureError> {
        let (control, kept) = (
            self.parts.control.clone(),
            self.parts.config.history.remember_erased,
        );
        let mut leaving = match &erasure.what {
            Erased::Room(room) => Leaving::room(control, room, kept),
            Erased::User { user, scope } => Leaving::user(control, user, scope, kept),
        };
        for mut scan in self.own_scans(erasure).await? {
            while let Some(mut found) = self.eraser.candidates(&mut scan).await? {
                found.retain(|one| is_doomed(erasure, one));
                let keys: Vec<String> = found.iter().map(Candidate::key).collect();
                leaving.take(&keys).await?;
            }
        }
        // The ids of the other regions' records end in the region's name.
        if !erasure.id.contains('.') {
            let mut doomed = self.parts.store.doomed(erasure).await?;
            loop {
                let keys = doomed.keys().await?;
                if keys.is_empty() {
                    break;
                }
                leaving.take(&keys).await?;
            }
        }
        Ok(leaving.finish().await?)
    }

    /// Scans of the own region's streams that cover everything an erasure is about.
    async fn own_scans(&self, erasure: &Erasure) -> Result<Vec<Scan>, EraseError> {
        let eraser = &self.eraser;
        let mut scans = Vec::new();
        match &erasure.what {
            Erased::Room(room) => scans.push(eraser.scan_room(room).await?),
            Erased::User { .. } => {
                for part in 0..eraser.partitions() {
                    scans.push(eraser.scan(part).await?);
                }
            }
        }
        Ok(scans)
    }

    /// Removes erased messages that were stored here again before this region learned of the erasure.
    async fn sweep(&self, erasure: &Erasure) -> Result<(), ErasureError> {
        let store = &self.parts.store;
        let origin = self.parts.streams.origin();
        for mut scan in self.own_scans(erasure).await? {
            while let Some(found) = self.eraser.candidates(&mut scan).await? {
                let mut again = Vec::new();
                for one in found {
                    let later = erasure
                        .before(&one.room)
                        .is_some_and(|before| one.ts > before);
                    let target = one.target();
                    let suspect = Suspect {
                        room: &one.room,
                        from: &one.from,
                        id: &one.id,
                        target: target.as_ref(),
                    };
                    if !later
                        || one.kind == Kind::Erase
                        || !self.parts.remembered.has(suspect).await?
                    {
                        continue;
                    }
                    let part = partition_of(&one.room, self.eraser.partitions());
                    let place = Place {
                        ts: one.ts,
                        origin: origin.clone(),
                        epoch: self.parts.streams.known(part).epoch,
                        seq: one.seq,
                    };
                    let key = one.key();
                    store.erase_at(&one.room, &key, &place).await?;
                    again.push(Removal::new(place, one.room, &key));
                }
                store.record_removals(&again).await?;
            }
        }
        Ok(())
    }

    async fn erase_from_streams(&self, erasure: &Erasure) -> Result<u64, ErasureError> {
        let mut erased = 0;
        for streams in self.parts.origins.all() {
            erased += self.erase_from(erasure, streams).await?;
        }
        Ok(erased)
    }

    /// Erases from the streams of an origin. Returns the number of messages; 0 for a mirror, since they are counted at
    /// their origin.
    async fn erase_from(
        &self,
        erasure: &Erasure,
        streams: Arc<Streams>,
    ) -> Result<u64, ErasureError> {
        let store = &self.parts.store;
        let is_own = streams.origin() == self.parts.streams.origin();
        let eraser = self.eraser.of(streams);
        let mut erased = 0;
        let mut scans = Vec::new();
        if is_own {
            scans.extend(eraser.scan_dead());
        }
        match &erasure.what {
            Erased::Room(room) => {
                let before = erasure.before(room).unwrap_or_default();
                erased += eraser.purge_room(room, before).await?;
            }
            Erased::User { .. } => {
                for part in 0..eraser.partitions() {
                    scans.push(eraser.scan(part).await?);
                }
            }
        }
        for mut scan in scans {
            while let Some(mut found) = eraser.candidates(&mut scan).await? {
                found.retain(|one| is_doomed(erasure, one));
                let rooms: BTreeSet<RoomId> = found.iter().map(|one| one.room.clone()).collect();
                if !rooms.is_empty() {
                    store.note_erased_rooms(&erasure.id, rooms).await?;
                }
                eraser.remove(&scan, &found).await?;
                let messages = found.iter().filter(|one| one.kind == Kind::Message);
                erased += match scan.has_copies {
                    true => 0,
                    false => messages.count() as u64,
                };
            }
        }
        Ok(if is_own { erased } else { 0 })
    }

    /// Announces the erasure in the rooms concerned. Returns the sequence of the last announcement in each partition.
    async fn announce(&self, erasure: &Erasure) -> Result<BTreeMap<u16, u64>, ErasureError> {
        let mut rooms: BTreeSet<RoomId> = BTreeSet::new();
        match &erasure.what {
            Erased::Room(room) => {
                rooms.insert(room.clone());
            }
            Erased::User { .. } => {
                rooms.extend(self.parts.store.erased_rooms(&erasure.id).await?);
            }
        }
        let mut upto = BTreeMap::new();
        for room in rooms {
            let before = erasure.before(&room);
            let body = match &erasure.what {
                Erased::Room(_) => serde_json::json!({ "before": before }),
                Erased::User { user, .. } => serde_json::json!({ "user": user, "before": before }),
            };
            let said = self
                .eraser
                .announce(&room, &erasure.id, body.to_string())
                .await?;
            let part = partition_of(&room, self.eraser.partitions());
            let last = upto.entry(part).or_default();
            *last = said.max(*last);
        }
        Ok(upto)
    }
}

/// Whether an erasure covers a message of a stream.
fn is_doomed(erasure: &Erasure, candidate: &Candidate) -> bool {
    let Candidate { room, ts, from, .. } = candidate;
    let target = candidate.target();
    let author = target.as_ref().and_then(|target| target.user.as_deref());
    // Announcements of earlier erasures contain nothing to erase.
    let announced = candidate.kind == Kind::Erase;
    !announced && erasure.dooms(room, *ts, from, author)
}
