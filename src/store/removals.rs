//! Single messages to be removed from the streams: duplicates, and erased messages that were stored again. Each region
//! removes them from its own stream or its mirror, since mirrors do not repeat the deletions of their origin.
//!
//! The collection `removals`:
//!
//! ```text
//! {_id: "<place>", room, key: <hash of the message's key>, first?: "<place>", at, done: ["<region>"]}
//! ```
//!
//! `first` is the place of the first copy. A duplicate is removed only if the first copy is still stored, or was
//! trimmed. If the stream lost the first copy and received the message again, the second one is not a duplicate.
//!
//! A repeated message is found by its `_id` in `messages`. An edit or a reaction has no document of its own. The
//! collection `changes` records for a while that it was stored, and where:
//!
//! ```text
//! {_id: <hash of its key>, place, at}
//! ```

use std::{collections::HashMap, time::Duration};

use futures_util::TryStreamExt as _;
use mongodb::{
    Collection,
    bson::{Binary, Bson, DateTime, Document as Fields, doc, spec::BinarySubtype},
    error::{ErrorKind, WriteFailure},
    options::{CollectionOptions, WriteConcern},
};
use sha2::{Digest as _, Sha256};

use super::{Store, StoreError, schema::DUPLICATE_KEY, within};
use crate::model::{Place, Region, RoomId};

/// The collection of removals.
const REMOVALS: &str = "removals";

/// The collection of recent changes.
const CHANGES: &str = "changes";

/// How long a removal waits for a region that can't be reached, and how long a repeated change is recognised after the
/// first copy.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A message to be removed from a stream and its mirrors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Its place.
    pub place: Place,
    /// Its room.
    pub room: RoomId,
    /// The place of the first copy, if this is a duplicate.
    pub first: Option<Place>,
    /// The hash of its key. Another message at the same place is left alone.
    key: Vec<u8>,
    /// The regions that have removed it.
    done: Vec<String>,
}

impl Removal {
    /// A removal of the message with this key, `<room>/<user>/<id>`.
    #[must_use]
    pub fn new(place: Place, room: RoomId, key: &str) -> Self {
        Self {
            place,
            room,
            first: None,
            key: hash(key),
            done: Vec::new(),
        }
    }

    /// The same, for a duplicate of the message at `first`.
    #[must_use]
    pub fn copy_of(self, first: Place) -> Self {
        Self {
            first: Some(first),
            ..self
        }
    }

    /// Whether this is a removal of the message with this key.
    #[must_use]
    pub fn means(&self, key: &str) -> bool {
        self.key == hash(key)
    }

    fn fields(&self) -> Fields {
        doc! {
            "_id": self.place.to_string(), "room": self.room.as_str(), "key": binary(&self.key),
            "first": self.first.as_ref().map(Place::to_string), "at": DateTime::now(), "done": [],
        }
    }

    fn read(fields: &Fields) -> Option<Self> {
        let done = fields.get_array("done").ok()?.iter();
        let first = fields.get_str("first").ok().map(str::parse);
        Some(Self {
            first: first.transpose().ok()?,
            place: fields.get_str("_id").ok()?.parse().ok()?,
            room: RoomId::parse(fields.get_str("room").ok()?).ok()?,
            key: fields.get_binary_generic("key").ok()?.clone(),
            done: done.filter_map(Bson::as_str).map(str::to_owned).collect(),
        })
    }
}

fn binary(bytes: &[u8]) -> Binary {
    Binary {
        subtype: BinarySubtype::Generic,
        bytes: bytes.to_vec(),
    }
}

/// The key itself is not stored, since it contains a user's name.
fn hash(key: &str) -> Vec<u8> {
    let digest = Sha256::digest(key);
    digest.iter().take(16).copied().collect()
}

impl Store {
    /// Creates the expiry indexes of removals and changes.
    pub(super) async fn prepare_removals(&self) -> Result<(), StoreError> {
        let kept = i64::try_from(KEPT.as_secs()).unwrap_or(i64::MAX);
        for collection in [REMOVALS, CHANGES] {
            let create = doc! {
                "createIndexes": collection,
                "indexes": [{ "name": "at", "key": { "at": 1 }, "expireAfterSeconds": kept }],
                "writeConcern": { "w": "majority" },
            };
            self.run(create, self.write_timeout).await?;
        }
        Ok(())
    }

    pub(super) fn confirmed(&self, collection: &str) -> Collection<Fields> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(collection, options)
    }

    /// Which of these changes (by index) are duplicates of a change stored at another place, and that place, as far as
    /// it is remembered. New changes are recorded. Of several copies exactly one counts as the first, whoever asks, and
    /// however often.
    ///
    /// # Errors
    /// [`StoreError`]: the call must be retried.
    pub async fn said_again(
        &self,
        changes: &[Removal],
    ) -> Result<HashMap<usize, Place>, StoreError> {
        let mut first: HashMap<&[u8], &Place> = HashMap::new();
        for one in changes {
            let place = first.entry(&one.key).or_insert(&one.place);
            *place = (*place).min(&one.place);
        }
        if first.is_empty() {
            return Ok(HashMap::new());
        }
        let new = first.iter().map(|(key, place)| {
            let place = place.to_string();
            doc! { "_id": binary(key), "place": place, "at": DateTime::now() }
        });
        let met = self.insert_missing(CHANGES, new.collect()).await?;
        let mut known: HashMap<Vec<u8>, Place> = HashMap::new();
        if met {
            let keys: Vec<Binary> = first.keys().map(|key| binary(key)).collect();
            let collection = self.confirmed(CHANGES);
            let find = collection.find(doc! { "_id": { "$in": keys } });
            let found = async { find.await?.try_collect().await };
            let found: Vec<Fields> = within(self.read_timeout, found).await?;
            known.extend(found.iter().filter_map(|one| {
                let place = one.get_str("place").ok()?.parse().ok()?;
                Some((one.get_binary_generic("_id").ok()?.clone(), place))
            }));
        }
        let again = changes.iter().enumerate().filter_map(|(at, one)| {
            let first = first.get(one.key.as_slice()).copied();
            let first = known.get(&one.key).or(first)?;
            (*first != one.place).then(|| (at, first.clone()))
        });
        Ok(again.collect())
    }

    /// Inserts documents. Returns whether some already existed.
    async fn insert_missing(
        &self,
        collection: &str,
        documents: Vec<Fields>,
    ) -> Result<bool, StoreError> {
        let collection = self.confirmed(collection);
        let insert = collection.insert_many(documents).ordered(false);
        let inserted = async {
            match insert.await {
                Err(error) if is_duplicate(&error) => Ok(true),
                inserted => inserted.map(|_inserted| false),
            }
        };
        within(self.write_timeout, inserted).await
    }

    /// Records removals. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`StoreError`]; some may have been recorded.
    pub async fn record_removals(&self, removals: &[Removal]) -> Result<(), StoreError> {
        if removals.is_empty() {
            return Ok(());
        }
        let documents = removals.iter().map(Removal::fields).collect();
        self.insert_missing(REMOVALS, documents)
            .await
            .map(|_met| ())
    }

    /// The message at `before`, until now the first of its copies, is a duplicate of the one at `first`: updates the
    /// removals that name it.
    pub(super) async fn displace_first(
        &self,
        before: &Place,
        first: &Place,
    ) -> Result<(), StoreError> {
        let collection = self.confirmed(REMOVALS);
        let set = doc! { "$set": { "first": first.to_string() } };
        let update = collection.update_many(doc! { "first": before.to_string() }, set);
        within(self.write_timeout, update.into_future())
            .await
            .map(|_updated| ())
    }

    /// The removals that `region` has still to make, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn removals_of(
        &self,
        region: &Region,
        limit: usize,
    ) -> Result<Vec<Removal>, StoreError> {
        let collection = self.confirmed(REMOVALS);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let find = collection.find(doc! { "done": { "$ne": region.as_str() } });
        // Ordered by place, thus by time: the removals that must wait longest come last.
        let find = find.sort(doc! { "_id": 1 }).limit(limit);
        let found = async { find.await?.try_collect().await };
        let found: Vec<Fields> = within(self.read_timeout, found).await?;
        Ok(found.iter().filter_map(Removal::read).collect())
    }

    /// Notes that `region` has removed a message. When all of `regions` have, the record is deleted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn removed(
        &self,
        removal: &Removal,
        region: &Region,
        regions: &[Region],
    ) -> Result<(), StoreError> {
        let collection = self.confirmed(REMOVALS);
        let which = doc! { "_id": removal.place.to_string() };
        let is_done =
            |one: &Region| one == region || removal.done.iter().any(|of| of == one.as_str());
        if regions.iter().all(is_done) {
            let delete = collection.delete_one(which).into_future();
            return within(self.write_timeout, delete).await.map(|_deleted| ());
        }
        let add = doc! { "$addToSet": { "done": region.as_str() } };
        let update = collection.update_one(which, add).into_future();
        within(self.write_timeout, update).await.map(|_updated| ())
    }
}

/// Whether an insert failed only because some documents already existed.
fn is_duplicate(error: &mongodb::error::Error) -> bool {
    match error.kind.as_ref() {
        ErrorKind::InsertMany(error) => {
            let errors = error.write_errors.iter().flatten();
            let mut codes = errors.map(|error| error.code);
            error.write_concern_error.is_none() && codes.all(|code| code == DUPLICATE_KEY)
        }
        ErrorKind::Write(WriteFailure::WriteError(error)) => error.code == DUPLICATE_KEY,
        _ => false,
    }
}
