//! Messages that are to be taken out of the streams, one by one: copies of what is there already, and what was erased and came
//! again. Each region takes them out of its own stream or its mirror, since mirrors do not repeat what their origin removes.
//!
//! The collection `removals`:
//!
//! ```text
//! {_id: "<place>", room, key: <hash of the message's key>, first?: "<place>", at, done: ["<region>"]}
//! ```
//!
//! `first`: where the message was said first. A copy is taken out only where that is still stored, or was trimmed: what a stream
//! has lost and got again is no copy.
//!
//! A message that is said again is found by its `_id` in `messages`. An edit or a reaction has no document of its own; that it was
//! said, and where, stands in the collection `changes` for a while:
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

use super::{Store, StoreError, within, write::DUPLICATE_KEY};
use crate::model::{Place, Region, RoomId};

/// The collection of removals.
const REMOVALS: &str = "removals";

/// The collection of what was said about messages.
const CHANGES: &str = "changes";

/// How long a removal waits for a region that can't be reached, and how long after the first a change that is repeated is known
/// to be the same.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A message that is to be taken out of a stream and its mirrors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Where it is.
    pub place: Place,
    /// Its room.
    pub room: RoomId,
    /// Where it was said first, if it is a copy.
    pub first: Option<Place>,
    /// The hash of its key: another message that came to that place is left alone.
    key: Vec<u8>,
    /// The regions that have removed it.
    done: Vec<String>,
}

impl Removal {
    /// Of the message with this key, `<room>/<user>/<id>`.
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

    /// The same, of a copy of what stands at `first`.
    #[must_use]
    pub fn copy_of(self, first: Place) -> Self {
        Self {
            first: Some(first),
            ..self
        }
    }

    /// Whether the message with this key is meant.
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

/// Not the key itself, which names a user.
fn hash(key: &str) -> Vec<u8> {
    let digest = Sha256::digest(key);
    digest.iter().take(16).copied().collect()
}

impl Store {
    /// Creates the index of removals.
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

    fn confirmed(&self, collection: &str) -> Collection<Fields> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(collection, options)
    }

    /// Which of these changes (by their index) were said before at another place, and where, as far as that is remembered. What
    /// is new is noted. Of several of a kind one is not said before, whoever asks, and however often.
    ///
    /// # Errors
    /// [`StoreError`]: it has to be asked again.
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

    /// Inserts documents; whether some were there already.
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

    /// Writes down what is to be taken out of the streams. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`StoreError`]; some may be written down.
    pub async fn record_removals(&self, removals: &[Removal]) -> Result<(), StoreError> {
        if removals.is_empty() {
            return Ok(());
        }
        let documents = removals.iter().map(Removal::fields).collect();
        self.insert_missing(REMOVALS, documents)
            .await
            .map(|_met| ())
    }

    /// Notes that the message that was taken for the first of its copies, at `before`, is itself one of what stands at `first`.
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

    /// What `region` has still to take out, at most `limit`.
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
        // By place, so by time: what has to wait longest comes last.
        let find = find.sort(doc! { "_id": 1 }).limit(limit);
        let found = async { find.await?.try_collect().await };
        let found: Vec<Fields> = within(self.read_timeout, found).await?;
        Ok(found.iter().filter_map(Removal::read).collect())
    }

    /// Notes that `region` has taken a message out; when all of `regions` have, nothing is left to note.
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

/// Whether nothing is wrong with an insert but that some of it was there.
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
