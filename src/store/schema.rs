//! Collections, indexes, and the version of the schema.
//!
//! The collection `meta` has one document `{_id: "schema", version}`. A natter that finds a newer version than its own
//! does not touch the database.
//!
//! # From a version to the next
//! An addition that does not change the meaning of documents (an optional field, an index) is made here and needs no
//! new version. Otherwise, [`VERSION`] is increased and [`Store::prepare`] gets a step from the version before. The
//! step runs before the new version is recorded, and must be repeatable (it may be interrupted, and several processes
//! may run it at once). Documents are rewritten in the background ([`Store::migrate`]), and are read and updated in
//! either form until then.
//!
//! A natter of an earlier version that still runs can't read documents of the new one. Documents that it writes are
//! readable. The migration rewrites them if it has not reached them yet; otherwise the next start does, after
//! `db.meta.deleteOne({_id: "migration"})` and `db.meta.updateOne({_id: "schema"}, {$set: {version: 1}})`.
//!
//! # Sharding
//! `sh.shardCollection("<database>.messages", {room: "hashed"})`. Every write names the room, and a room is on one
//! shard.

use mongodb::{
    bson::{Bson, Document as Fields, RawDocumentBuf, doc},
    error::{Error, ErrorKind},
};
use tokio::time::Duration;

use super::{MESSAGES, Store, StoreError, unavailable};

/// `DuplicateKey` of MongoDB: the document already exists.
pub(super) const DUPLICATE_KEY: i32 = 11000;

/// The version of the schema that this natter reads and writes.
///
/// Version 2: bodies are values and times are dates; reactions are named by their normal form, annotations by name and
/// user; terms are folded by Unicode.
pub(super) const VERSION: i64 = 2;

pub(super) const META: &str = "meta";

/// Names of indexes that queries use as hints.
pub(super) const ROOM_PLACE: &str = "room_place";
pub(super) const TERMS: &str = "terms";
pub(super) const FROM: &str = "from";
pub(super) const MENTIONS: &str = "mentions";
pub(super) const THREAD: &str = "thread";

/// Replaced by [`THREAD`].
const OLD_THREAD: &str = "answers";

/// `IndexNotFound` of MongoDB.
const NO_INDEX: i32 = 27;

/// Timeout for building indexes, which takes long in a large collection. The server continues after the timeout.
const BUILD_TIMEOUT: Duration = Duration::from_secs(600);

/// The indexes of `messages`. Each one costs every write, so there is none without a query that uses it.
fn indexes() -> Vec<Fields> {
    let there = |field: &str| doc! { field: { "$exists": true } };
    vec![
        // Pages; searches without conditions.
        doc! { "name": ROOM_PLACE, "key": { "room": 1, "place": -1 } },
        // From a position of a stream to a place.
        doc! { "name": "position", "key": { "room": 1, "origin": 1, "epoch": 1, "seq": 1 } },
        // Searches for text. Not by room: see `Store::is_small`.
        doc! { "name": TERMS, "key": { "terms": 1, "place": -1, "room": 1 } },
        // Searches by sender, and the erasure of a user.
        doc! { "name": FROM, "key": { "from": 1, "room": 1, "place": -1 } },
        // Partial, since most messages mention nobody and answer nothing.
        doc! {
            "name": MENTIONS,
            "key": { "mentions": 1, "room": 1, "place": -1 },
            "partialFilterExpression": there("mentions"),
        },
        // Pages of threads; searches for answers. Answers are counted without reading their documents, hence the last
        // two fields.
        doc! {
            "name": THREAD,
            "key": { "reply_key": 1, "room": 1, "place": -1, "deleted": 1, "_id": 1 },
            "partialFilterExpression": there("reply_key"),
        },
    ]
}

impl Store {
    /// Creates missing collections and indexes, and records the version of the schema. Idempotent.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn prepare(&self) -> Result<(), StoreError> {
        let known = self.version().await?;
        if let Some(found) = known.filter(|found| *found > VERSION) {
            return Err(StoreError::Schema {
                found,
                known: VERSION,
            });
        }
        let create = doc! {
            "createIndexes": MESSAGES,
            "indexes": indexes(),
            "writeConcern": { "w": "majority" },
        };
        self.run(create, BUILD_TIMEOUT).await?;
        self.drop_index(OLD_THREAD).await?;
        self.prepare_erasures().await?;
        self.prepare_removals().await?;
        self.prepare_uploads().await?;
        self.prepare_rooms().await?;
        match known {
            None => self.record_version().await?,
            Some(found) if found < VERSION => {
                self.note_migration().await?;
                self.raise_version().await?;
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Drops an index of `messages`, if it is there.
    async fn drop_index(&self, name: &str) -> Result<(), StoreError> {
        let messages = self.database.collection::<RawDocumentBuf>(MESSAGES);
        match messages.drop_index(name).await {
            Err(error) if !is_command_error(&error, NO_INDEX) => Err(unavailable(&error)),
            _ => Ok(()),
        }
    }

    async fn version(&self) -> Result<Option<i64>, StoreError> {
        let find = doc! { "find": META, "filter": { "_id": "schema" }, "limit": 1 };
        let answer = self.run(find, self.write_timeout).await?;
        let found = answer
            .get_document("cursor")
            .and_then(|cursor| cursor.get_array("firstBatch"));
        let Some(document) = found.ok().and_then(|found| found.first()?.as_document()) else {
            return Ok(None);
        };
        // A person may have written it with a shell, which stores numbers as doubles.
        let version = match document.get("version") {
            Some(Bson::Int32(version)) => Some(i64::from(*version)),
            Some(Bson::Int64(version)) => Some(*version),
            #[expect(
                clippy::cast_possible_truncation,
                reason = "versions are small whole numbers"
            )]
            Some(Bson::Double(version)) => Some(*version as i64),
            _ => None,
        };
        version.map(Some).ok_or_else(|| StoreError::Document {
            key: "schema".to_owned(),
            problem: "it has no version".to_owned(),
        })
    }

    async fn raise_version(&self) -> Result<(), StoreError> {
        let update = doc! {
            "update": META,
            "updates": [{ "q": { "_id": "schema" }, "u": { "$max": { "version": VERSION } } }],
            "writeConcern": { "w": "majority" },
        };
        self.run(update, self.write_timeout).await.map(|_ok| ())
    }

    async fn record_version(&self) -> Result<(), StoreError> {
        let insert = doc! {
            "insert": META,
            "documents": [{ "_id": "schema", "version": VERSION }],
            "writeConcern": { "w": "majority" },
        };
        let answer = self.run(insert, self.write_timeout).await?;
        let errors = answer
            .get_array("writeErrors")
            .map(Vec::as_slice)
            .unwrap_or_default();
        for error in errors.iter().filter_map(Bson::as_document) {
            // Another worker was first.
            if !error
                .get_i32("code")
                .is_ok_and(|code| code == DUPLICATE_KEY)
            {
                return Err(StoreError::Unavailable(format!("{error}")));
            }
        }
        Ok(())
    }
}

fn is_command_error(error: &Error, code: i32) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(error) if error.code == code)
}
