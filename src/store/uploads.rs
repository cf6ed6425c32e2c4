//! The registry of uploads: what was granted to whom, which message named it, and which files are still to be removed.
//!
//! The collection `uploads`:
//!
//! ```text
//! {_id: "<upload>", room, user, name, type, size, at, moment, open?: true, unused_in?: ["<region>"], message?: "<key>",
//!  due?, gone?: true, state?: "pending" | "clean" | "infected"}
//! ```
//! - `open`: no message has named it yet. `message`: the key of the message that has.
//! - `moment`: the time of that message, in ms since 1970; until then the time at which it was granted. An erasure covers
//!   what is not later than it.
//! - `unused_in`: the regions in whose streams no message names it. In all: it is removed.
//! - `state`: the verdict of the worker `uploads.scan`. Absent where nobody checks files, and in uploads that were granted
//!   before: they count as clean.
//! - `due`: its file is to be removed, at that time. The field stays until the file is gone, so no removal is forgotten.
//! - `gone`: the file was removed. It is removed once more when the record is deleted, because a URL to upload was still
//!   valid after the first time. Until then its name stays taken where files are checked.
//!
//! # Invariants
//! - Of several messages that name an upload, the first one to arrive here counts. What was claimed or is to be removed
//!   is not `open` any more, and each of these steps needs `open` or a claim, so they exclude each other.
//! - Verdicts commute: whatever their order, and however often they come, one `infected` makes an upload infected for good.
//!   They need neither a claim nor a message.
//! - A record stays for [`QUOTA`] at least, also when its file is gone: it counts against the limit of its user.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use mongodb::{
    bson::{Bson, DateTime, Document as Fields, doc},
    options::ReturnDocument,
};
use serde::{Deserialize, Serialize};

use super::{
    Erased, Erasure, MESSAGES, Store, StoreError, document::number, erase::millis, within,
};
use crate::model::{Region, RoomId};

/// The collection of uploads.
const UPLOADS: &str = "uploads";

/// The time over which the uploads of a user are added up.
pub const QUOTA: Duration = Duration::from_secs(24 * 3600);

/// What an upload counts against the limit of its user at least, in bytes. So the number of records has a limit too.
const LEAST: u64 = 4096;

/// Values of `state`.
const PENDING: &str = "pending";
const CLEAN: &str = "clean";
const INFECTED: &str = "infected";

/// Claims that are sent at once.
const AT_ONCE: usize = 1000;

/// An upload that is granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// Its id.
    pub id: String,
    /// The room in which a message may name it.
    pub room: RoomId,
    /// The user whose message that is.
    pub user: String,
    /// The name of the file.
    pub name: String,
    /// The media type of the file.
    #[serde(rename = "type")]
    pub media_type: String,
    /// The bytes of the file.
    pub size: u64,
}

/// What the registry knows of a file that somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UploadState {
    /// It was not checked yet.
    Pending,
    /// It may be given out.
    Clean,
    /// It is never given out.
    Infected,
    /// It was removed, or is about to be.
    Gone,
}

/// What the worker that checks files says of one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// The id of the upload.
    pub upload: String,
    /// The room of the message that the worker has seen.
    pub room: &'a RoomId,
    /// Whether it is infected; otherwise clean.
    pub is_infected: bool,
}

/// A message that names uploads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim<'a> {
    /// The ids of the uploads.
    pub uploads: Vec<String>,
    /// The room of the message.
    pub room: &'a RoomId,
    /// Its author.
    pub user: String,
    /// Its key.
    pub message: &'a str,
    /// Its time, in ms since 1970.
    pub ts: u64,
}

/// A file to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRemoval {
    /// The id of the upload.
    pub id: String,
    /// When it was granted, in ms since 1970.
    at: i64,
    /// Whether the file was removed before.
    pub again: bool,
}

impl FileRemoval {
    /// When the file must be removed once more, in ms since 1970, since its URL to upload lives for `valid`; `None`: this
    /// is the last time, and the record goes with it.
    #[must_use]
    pub fn again_at(&self, valid: Duration) -> Option<i64> {
        let until = self.at + millis(QUOTA + valid);
        (until > DateTime::now().timestamp_millis()).then_some(until)
    }
}

/// Marks files to be removed, in an update.
fn doomed() -> Fields {
    doc! { "$set": { "due": DateTime::now() }, "$unset": { "open": "" } }
}

impl Store {
    /// Creates the indexes of uploads.
    pub(super) async fn prepare_uploads(&self) -> Result<(), StoreError> {
        let there = |field: &str| doc! { field: { "$exists": true } };
        let create = doc! {
            "createIndexes": UPLOADS,
            "indexes": [
                { "name": "user", "key": { "user": 1, "at": 1 } },
                { "name": "room", "key": { "room": 1 } },
                { "name": "open", "key": { "at": 1 }, "partialFilterExpression": there("open") },
                { "name": "due", "key": { "due": 1 }, "partialFilterExpression": there("due") },
                {
                    "name": "message",
                    "key": { "message": 1 },
                    "partialFilterExpression": there("message"),
                },
            ],
            "writeConcern": { "w": "majority" },
        };
        self.run(create, self.write_timeout).await.map(|_ok| ())
    }

    /// Records an upload (`is_checked`: which waits for a verdict), unless its user would then have been granted more than `most` bytes within [`QUOTA`]: then
    /// returns how many there are without it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn grant_upload(
        &self,
        upload: &Upload,
        most: u64,
        is_checked: bool,
    ) -> Result<Result<(), u64>, StoreError> {
        let uploads = self.confirmed(UPLOADS);
        let now = DateTime::now();
        let mut granted = doc! {
            "_id": &upload.id, "room": upload.room.as_str(), "user": &upload.user,
            "name": &upload.name, "type": &upload.media_type, "size": number(upload.size),
            "at": now, "moment": now.timestamp_millis(), "open": true,
        };
        if is_checked {
            granted.insert("state", PENDING);
        }
        let insert = uploads.insert_one(granted);
        within(self.write_timeout, insert.into_future()).await?;
        // After the insert: of two requests at the same time, at least one sees the other.
        let since = DateTime::from_millis(now.timestamp_millis() - millis(QUOTA));
        let sum = uploads.aggregate([
            doc! { "$match": { "user": &upload.user, "at": { "$gt": since } } },
            doc! { "$group": { "_id": null, "bytes": { "$sum": { "$max": ["$size", number(LEAST)] } } } },
        ]);
        let sum = async { sum.await?.try_next().await };
        let sum = within(self.read_timeout, sum).await?;
        let bytes = sum.and_then(|sum| match sum.get("bytes") {
            Some(Bson::Int64(bytes)) => u64::try_from(*bytes).ok(),
            Some(Bson::Int32(bytes)) => u64::try_from(*bytes).ok(),
            _ => None,
        });
        let bytes = bytes.unwrap_or(u64::MAX);
        if bytes <= most {
            return Ok(Ok(()));
        }
        let delete = uploads.delete_one(doc! { "_id": &upload.id });
        within(self.write_timeout, delete.into_future()).await?;
        Ok(Err(bytes.saturating_sub(upload.size.max(LEAST))))
    }

    /// Notes which messages have named which uploads. Repeating it changes nothing. It must come before the messages
    /// are written: then an erasure that finds a message finds its uploads.
    ///
    /// # Errors
    /// [`StoreError`]: it must be retried.
    pub async fn claim_uploads(&self, claims: &[Claim<'_>]) -> Result<(), StoreError> {
        for claims in claims.chunks(AT_ONCE) {
            let updates = claims.iter().map(|claim| {
                doc! {
                    "q": {
                        "_id": { "$in": &claim.uploads }, "room": claim.room.as_str(),
                        "user": &claim.user, "open": true,
                    },
                    "u": {
                        "$set": { "message": claim.message, "moment": number(claim.ts) },
                        "$unset": { "open": "" },
                    },
                    "multi": true,
                }
            });
            self.update_uploads(updates.collect()).await?;
        }
        Ok(())
    }

    async fn update_uploads(&self, updates: Vec<Fields>) -> Result<(), StoreError> {
        let update = doc! {
            "update": UPLOADS, "updates": updates, "ordered": false,
            "writeConcern": { "w": "majority" },
        };
        let answer = self.run(update, self.write_timeout).await?;
        for field in ["writeErrors", "writeConcernError"] {
            if let Some(error) = answer.get(field) {
                return Err(StoreError::Unavailable(error.to_string()));
            }
        }
        Ok(())
    }

    /// Notes verdicts. Repeating it changes nothing. The files of infected uploads are doomed.
    ///
    /// # Errors
    /// [`StoreError`]: it must be retried.
    pub async fn judge_uploads(&self, verdicts: &[Verdict<'_>]) -> Result<(), StoreError> {
        for verdicts in verdicts.chunks(AT_ONCE) {
            let updates = verdicts.iter().map(|verdict| {
                let (before, then) = match verdict.is_infected {
                    true => {
                        let mut doomed = doomed();
                        if let Ok(set) = doomed.get_document_mut("$set") {
                            set.insert("state", INFECTED);
                        }
                        // Also one that was granted before files were checked.
                        (Bson::from(doc! { "$ne": INFECTED }), doomed)
                    }
                    false => (Bson::from(PENDING), doc! { "$set": { "state": CLEAN } }),
                };
                doc! {
                    "q": { "_id": &verdict.upload, "room": verdict.room.as_str(), "state": before },
                    "u": then,
                }
            });
            self.update_uploads(updates.collect()).await?;
        }
        Ok(())
    }

    /// Whether the file of an upload may be given out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn upload_state(&self, upload: &str) -> Result<UploadState, StoreError> {
        let uploads = self.confirmed(UPLOADS);
        let find = uploads
            .find_one(doc! { "_id": upload })
            .projection(doc! { "state": 1, "due": 1 });
        let Some(found) = within(self.read_timeout, find.into_future()).await? else {
            return Ok(UploadState::Gone);
        };
        Ok(match found.get_str("state") {
            Ok(INFECTED) => UploadState::Infected,
            // Its URL to upload may still be valid, so another file could be there by now.
            _ if found.contains_key("due") => UploadState::Gone,
            Ok(CLEAN) | Err(_) => UploadState::Clean,
            Ok(_) => UploadState::Pending,
        })
    }

    /// Of these messages, dooms the uploads of those that are deleted. It must come after the messages and their
    /// deletions are written: then whoever comes second, with the message or with its deletion, sees the first.
    ///
    /// # Errors
    /// [`StoreError`]: it must be retried.
    pub async fn doom_uploads_of_deleted(&self, messages: &[&str]) -> Result<(), StoreError> {
        for keys in messages.chunks(AT_ONCE) {
            let documents = self.database.collection::<Fields>(MESSAGES);
            let deleted = documents
                .find(doc! { "_id": { "$in": keys }, "deleted": { "$exists": true } })
                .projection(doc! { "_id": 1 });
            let deleted = async { deleted.await?.try_collect().await };
            let deleted: Vec<Fields> = within(self.read_timeout, deleted).await?;
            let deleted = deleted.iter().filter_map(|found| found.get_str("_id").ok());
            self.doom_uploads_of(&deleted.collect::<Vec<_>>()).await?;
        }
        Ok(())
    }

    /// Dooms the uploads that these messages have named.
    pub(super) async fn doom_uploads_of(&self, messages: &[&str]) -> Result<(), StoreError> {
        match messages {
            [] => Ok(()),
            messages => self.doom(doc! { "message": { "$in": messages } }).await,
        }
    }

    /// Dooms the uploads that an erasure is about, also those that no message has named.
    pub(super) async fn doom_erased_uploads(&self, erasure: &Erasure) -> Result<(), StoreError> {
        let (rooms, user) = match &erasure.what {
            Erased::Room(room) => (vec![room.clone()], None),
            Erased::User { user, .. } => {
                let uploads = self.confirmed(UPLOADS);
                let rooms = uploads.distinct("room", doc! { "user": user });
                let rooms = within(self.read_timeout, rooms.into_future()).await?;
                let rooms = rooms.iter().filter_map(Bson::as_str);
                let rooms = rooms.filter_map(|room| RoomId::parse(room).ok());
                (rooms.collect(), Some(user))
            }
        };
        for room in rooms {
            let Some(before) = erasure.before(&room) else {
                continue;
            };
            let mut which = doc! { "room": room.as_str(), "moment": { "$lte": number(before) } };
            if let Some(user) = user {
                which.insert("user", user);
            }
            self.doom(which).await?;
        }
        Ok(())
    }

    async fn doom(&self, mut which: Fields) -> Result<(), StoreError> {
        which.insert("due", Bson::Null);
        let uploads = self.confirmed(UPLOADS);
        let update = uploads.update_many(which, doomed());
        within(self.write_timeout, update.into_future())
            .await
            .map(|_updated| ())
    }

    /// Notes that no message in the streams of `region` has named those uploads that were granted before `before` (in ms
    /// since 1970) and are still open. Dooms those of which all of `regions` say so. Returns how many.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unused_uploads(
        &self,
        region: &Region,
        regions: &[Region],
        before: u64,
    ) -> Result<u64, StoreError> {
        let uploads = self.confirmed(UPLOADS);
        let before = DateTime::from_millis(number(before));
        let open = doc! { "open": { "$exists": true }, "at": { "$lt": before } };
        let mut others = open.clone();
        others.insert("unused_in", doc! { "$ne": region.as_str() });
        let note = doc! { "$addToSet": { "unused_in": region.as_str() } };
        let note = uploads.update_many(others, note).into_future();
        within(self.write_timeout, note).await?;
        let regions: Vec<&str> = regions.iter().map(Region::as_str).collect();
        let mut unused = open;
        unused.insert("unused_in", doc! { "$all": regions });
        let update = uploads.update_many(unused, doomed()).into_future();
        let updated = within(self.write_timeout, update).await?;
        Ok(updated.modified_count)
    }

    /// A file that is to be removed now, if there is one. No other instance gets it within `lease`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_file_removal(
        &self,
        lease: Duration,
    ) -> Result<Option<FileRemoval>, StoreError> {
        let now = DateTime::now();
        let next = DateTime::from_millis(now.timestamp_millis() + millis(lease));
        let uploads = self.confirmed(UPLOADS);
        let claim = uploads
            .find_one_and_update(
                doc! { "due": { "$lte": now } },
                doc! { "$set": { "due": next } },
            )
            .sort(doc! { "due": 1 })
            .return_document(ReturnDocument::After);
        let found = within(self.write_timeout, claim.into_future()).await?;
        Ok(found.and_then(|found| {
            Some(FileRemoval {
                id: found.get_str("_id").ok()?.to_owned(),
                at: found.get_datetime("at").ok()?.timestamp_millis(),
                again: found.get_bool("gone").unwrap_or_default(),
            })
        }))
    }

    /// Notes that a file was removed. `again_at`: see [`FileRemoval::again_at`]. Until then the record stays.
    ///
    /// # Errors
    /// [`StoreError`]. The file is then removed again.
    pub async fn file_removed(
        &self,
        removal: &FileRemoval,
        again_at: Option<i64>,
    ) -> Result<(), StoreError> {
        let uploads = self.confirmed(UPLOADS);
        let which = doc! { "_id": &removal.id };
        let Some(until) = again_at else {
            let delete = uploads.delete_one(which).into_future();
            return within(self.write_timeout, delete).await.map(|_deleted| ());
        };
        let set = doc! {
            "$set": { "gone": true, "due": DateTime::from_millis(until) },
            "$unset": { "name": "", "type": "", "message": "" },
        };
        let update = uploads.update_one(which, set).into_future();
        within(self.write_timeout, update).await.map(|_updated| ())
    }
}
