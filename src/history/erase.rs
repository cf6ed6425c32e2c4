//! Erases rooms and users: from the streams, from MongoDB, from memory.
//!
//! An erasure is written down first, then carried out by the instance that was asked; if that dies, by the next one that looks.
//! First it is remembered what is erased ([`Remembered`](crate::bus::Remembered)): none of it is stored again, whoever repeats it.
//! Then from the streams, so that nothing is taken from there to MongoDB any more; then from MongoDB; then it is announced in
//! the rooms concerned, durably, so that members drop what they have, now or when they come back. What a worker had in hand
//! meanwhile is deleted again by that worker ([`Store::enforce_erasures`](crate::store::Store::enforce_erasures)), or by a
//! second look some time later if it died first.
//!
//! A mirror does not repeat what its origin removes. So there is a record for each region, and each region's service erases
//! from the streams and the mirrors that it has: at once, or when it is back. A mirror that was cut off from its origin may bring
//! what is erased there later. So when a region has carried an erasure out, each other one is told to erase from its mirror of that
//! region once more, when that has come to what was said there afterwards: the announcement of the erasure.

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

/// For how long an erasure is held without a sign of life.
const LEASE: Duration = Duration::from_secs(15);

/// Pause between two looks for erasures whose holder died.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// After how long a mirror is looked at again that may bring what its origin has erased.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How long who asks for an erasure waits for its end.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// What is to be erased.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EraseRequest {
    /// What.
    pub what: EraseWhat,
    /// Who wants it.
    pub by: String,
}

/// A room, or what a user said.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EraseWhat {
    /// Everything in a room.
    Room(RoomId),
    /// Everything that a user said.
    User {
        /// Who.
        user: String,
        /// In these rooms.
        scope: RoomScope,
    },
}

/// How far an erasure is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EraseAnswer {
    /// Its name.
    pub id: String,
    /// Whether it is carried out; else it goes on, whatever happens to who asked or answered.
    pub done: bool,
    /// Messages erased: the larger of how many MongoDB and the streams had.
    pub erased: u64,
    /// Other regions whose services have not carried it out yet; they do it when they can be reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<String>,
}

/// An erasure can't be carried out now.
#[derive(Debug, thiserror::Error)]
enum ErasureError {
    /// The streams.
    #[error(transparent)]
    Stream(#[from] EraseError),
    /// MongoDB.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is erased can't be remembered.
    #[error("what is erased can't be remembered")]
    Remember(#[from] KvError),
}

/// What erases.
#[derive(Debug, Clone)]
pub(super) struct Erasing {
    parts: Parts,
    /// Of the own region's streams.
    eraser: Eraser,
    /// This instance, as holder of erasures.
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

    /// Writes an erasure down and begins with it.
    ///
    /// # Errors
    /// `unavailable`: nothing was erased, or it is written down and will be carried out all the same; asking again is
    /// harmless.
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
        // Also those whose mirrors are not there yet.
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
        // What is recorded for one region is enforced on what all write; the others' records are what they have to do.
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
                // Who asked may have gone.
                let _gone = done.send(erased);
            }
        });
        let deadline = Instant::now() + ANSWER_WITHIN;
        let erased = match timeout_at(deadline, erased).await {
            Ok(Ok(erased)) => Some(erased),
            // It takes longer, or is tried again.
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

    /// The other regions of the mesh, as the streams name them now.
    async fn others(&self) -> Result<Vec<Region>, EraseError> {
        let streams = &self.parts.streams;
        streams.fetch(0).await?;
        let mut regions = streams.regions();
        regions.retain(|region| region != streams.origin());
        Ok(regions)
    }

    /// Waits until other regions have carried out what was recorded for them; which have not by the deadline.
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

    /// Takes over what others left, for ever.
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

    /// Carries an erasure out while renewing the lease; how many messages. `None`: it failed, and is due again when the lease
    /// ends.
    async fn carry_out(&self, claimed: &Claimed) -> Option<u64> {
        let id = &claimed.erasure.id;
        let result = tokio::select! {
            result = self.erase(claimed) => result,
            () = self.hold(id) => return None,
            () = self.parts.tasks.stopping() => return None,
        };
        match result {
            // Said when the mirror has come that far.
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

    /// Renews the lease; ends when another has it.
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
        // What is said in the same millisecond as `before` is stored by now.
        sleep(Duration::from_millis(2)).await;
        // Once, and then what the second look finds: each time adds to what edges look in for a long while.
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
        // A worker that has taken messages before confirms or repeats them within that time.
        let config = &self.parts.config;
        let settled = 2 * (config.history.ack_wait + config.mongodb.write_timeout);
        let second_look = (!claimed.settling).then_some(settled);
        store
            .finish_erasure(&erasure.id, erased, second_look)
            .await?;
        Ok(erased)
    }

    /// Has the other regions erase from their mirrors of this one, when these are complete up to there.
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

    /// Erases once more from a mirror; later, if it is not there, or has not come that far.
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
            // Or it has left the mesh, and its mirror with it.
            None => self.others().await?.contains(origin),
        };
        let later = later.then_some(AGAIN_AFTER);
        let store = &self.parts.store;
        store.finish_erasure(&erasure.id, 0, later).await?;
        Ok(())
    }

    /// Remembers which messages are about to be erased. Each region does so for what was said there, and the one that was asked
    /// for what only MongoDB has.
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
        // The others' records are named after the region.
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

    /// The ways through what the own region's streams hold of what an erasure is about.
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

    /// Has taken out what was erased and was stored here again before this region heard of it.
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

    /// Erases from the streams of an origin; how many messages, none from a mirror: they are counted where they come from.
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
            scans.push(eraser.scan_dead());
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
                erased += messages.count() as u64;
            }
        }
        Ok(if is_own { erased } else { 0 })
    }

    /// Tells the members of the rooms concerned; up to where the streams of these have gone with that.
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

/// Whether an erasure means a message of a stream.
fn is_doomed(erasure: &Erasure, candidate: &Candidate) -> bool {
    let Candidate { room, ts, from, .. } = candidate;
    let target = candidate.target();
    let author = target.as_ref().and_then(|target| target.user.as_deref());
    // Announcements of earlier erasures have nothing in them that is to be erased.
    let announced = candidate.kind == Kind::Erase;
    !announced && erasure.dooms(room, *ts, from, author)
}
