//! Rewrites documents: those of an earlier version of the schema, one after the other in the background, and those that
//! hold more than is kept.
//!
//! The collection `meta` has a document `{_id: "migration", to, after, holder, due, renewed, done}`. Everything up to
//! the key `after` has been processed. `holder` continues with the rest until `due`, then another process may take
//! over.
//!
//! # Invariants
//! - A document is replaced only if it is still identical to what was read, so that concurrent writes are kept. All of
//!   this may be repeated, interrupted, and done by several processes at once.
//! - Old documents are read and updated like new ones, so nothing waits for the migration. Until it is done, people who
//!   query MongoDB find old fields, and searches use the terms of the earlier version.

use std::time::Duration;

use mongodb::{
    Collection,
    bson::{
        Bson, Document as Fields, RawArrayBuf, RawDocument, RawDocumentBuf, doc, raw::cstr, rawdoc,
    },
    options::{CollectionOptions, ReturnDocument, WriteConcern},
};

use super::{
    MESSAGES, Store, StoreError, document, query,
    schema::{META, VERSION},
    update::MAX_SLACK,
    within,
};
use crate::telemetry::metrics::{Counter, count};

/// Documents processed in one step.
const STEP: usize = 500;

/// Attempts at a step while others change its documents.
const ATTEMPTS: u32 = 5;

/// How long the holder of a step keeps others away.
const LEASE: Duration = Duration::from_secs(30);

/// Bytes of one command, which contains a document twice. A document that is too large for that is not rewritten.
const MAX_COMMAND: usize = 15 << 20;

/// The outcome of a step of the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrated {
    /// Nothing is left to migrate.
    All,
    /// This many documents were rewritten; there are more.
    Some(u64),
    /// Another process holds the migration.
    Elsewhere,
}

impl Store {
    /// Makes the next step of the migration to this version of the schema, if there is one.
    ///
    /// # Errors
    /// [`StoreError`]; the step must be repeated.
    pub async fn migrate(&self, holder: &str) -> Result<Migrated, StoreError> {
        let Some(after) = self.claim_migration(holder).await? else {
            let left = doc! { "_id": "migration", "done": false };
            let meta = self.meta();
            let left = within(self.read_timeout, meta.find_one(left).into_future()).await?;
            return Ok(left.map_or(Migrated::All, |_left| Migrated::Elsewhere));
        };
        let mut renewed = 0;
        let mut attempts = 0;
        let (last, done) = loop {
            attempts += 1;
            let (found, cut) = self
                .find(query::after(&after, STEP), self.read_timeout)
                .await?;
            let last = found.last().map(|found| found.get_str("_id"));
            let last = last.and_then(Result::ok).map(str::to_owned);
            let done = found.len() < STEP && !cut;
            let old = found.into_iter().filter(|found| document::is_old(found));
            let old: Vec<RawDocumentBuf> = old.collect();
            let count = old.len() as u64;
            let now = self.renew(old).await?;
            renewed += now;
            // The rest were changed meanwhile, or can't be rewritten.
            if now == count || attempts == ATTEMPTS {
                break (last, done);
            }
        };
        let mut set = doc! { "done": done };
        if let Some(last) = last {
            set.insert("after", last);
        }
        // A process that took over meanwhile continues from its own position.
        let own = doc! { "_id": "migration", "holder": holder, "after": after };
        let meta = self.meta();
        let change =
            doc! { "$set": set, "$inc": { "renewed": i64::try_from(renewed).unwrap_or(i64::MAX) } };
        let update = meta.update_one(own, change);
        within(self.write_timeout, update.into_future()).await?;
        Ok(if done {
            Migrated::All
        } else {
            Migrated::Some(renewed)
        })
    }

    /// Claims the migration for `holder`. Returns the key after which it continues.
    async fn claim_migration(&self, holder: &str) -> Result<Option<String>, StoreError> {
        let free = doc! {
            "_id": "migration", "to": VERSION, "done": false,
            "$or": [{ "holder": holder }, { "$expr": { "$lte": ["$due", "$$NOW"] } }],
        };
        let lease = i64::try_from(LEASE.as_millis()).unwrap_or(i64::MAX);
        let hold = vec![doc! { "$set": {
            "holder": { "$literal": holder }, "due": { "$add": ["$$NOW", lease] },
        } }];
        let meta = self.meta();
        let claim = meta
            .find_one_and_update(free, hold)
            .return_document(ReturnDocument::After);
        let claimed = within(self.write_timeout, claim.into_future()).await?;
        Ok(claimed.map(|fields| fields.get_str("after").unwrap_or_default().to_owned()))
    }

    /// Records that there are documents of an earlier version. Repeating it changes nothing.
    pub(super) async fn note_migration(&self) -> Result<(), StoreError> {
        let new = doc! {
            "to": VERSION, "after": "", "holder": "", "renewed": 0_i64, "done": false,
            "due": mongodb::bson::DateTime::from_millis(0),
        };
        let meta = self.meta();
        let note = meta
            .update_one(doc! { "_id": "migration" }, doc! { "$setOnInsert": new })
            .upsert(true);
        within(self.write_timeout, note.into_future())
            .await
            .map(|_noted| ())
    }

    fn meta(&self) -> Collection<Fields> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(META, options)
    }

    /// Rewrites those of these documents that are full. Documents that can't be rewritten stay full.
    pub(super) async fn make_room(&self, keys: &[String]) -> Result<(), StoreError> {
        let mut query = query::keys(keys);
        query.filter = doc! { "$and": [query.filter, { "slack": { "$gte": MAX_SLACK } }] };
        // Ordered by key, so that each is processed once, including those that can't be rewritten.
        query.sort = doc! { "_id": 1 };
        loop {
            let (full, cut) = self.find(query.clone(), self.read_timeout).await?;
            let last = full.last().map(|last| last.get_str("_id"));
            let last = last.and_then(Result::ok).map(str::to_owned);
            self.renew(full).await?;
            match last {
                Some(last) if cut => query.filter.insert("_id", doc! { "$gt": last }),
                _ => return Ok(()),
            };
        }
    }

    /// Rewrites documents. Returns how many of them had not changed since they were read.
    async fn renew(&self, documents: Vec<RawDocumentBuf>) -> Result<u64, StoreError> {
        let mut renewed = 0;
        let (mut statements, mut bytes) = (RawArrayBuf::new(), 0);
        for old in documents {
            let new = match anew(&old) {
                Ok(new) => new,
                // Pages report that it can't be read; the others are not affected.
                Err(error) => {
                    tracing::warn!(%error, "a document is not rewritten");
                    continue;
                }
            };
            let size = old.as_bytes().len() + new.as_bytes().len();
            if size > MAX_COMMAND {
                tracing::warn!(
                    key = old.get_str("_id").ok(),
                    "a large document is not rewritten"
                );
                continue;
            }
            if bytes + size > MAX_COMMAND {
                renewed += self.replace(std::mem::take(&mut statements)).await?;
                bytes = 0;
            }
            bytes += size;
            if new.get_bool("truncated").is_ok() && old.get_bool("truncated").is_err() {
                count(Counter::HistoryTruncated, 1);
            }
            statements.push(statement(&old, new));
        }
        if bytes > 0 {
            renewed += self.replace(statements).await?;
        }
        Ok(renewed)
    }

    async fn replace(&self, statements: RawArrayBuf) -> Result<u64, StoreError> {
        let limit = i64::try_from(self.write_timeout.as_millis()).unwrap_or(i64::MAX);
        let mut command = rawdoc! { "update": MESSAGES, "ordered": false };
        command.append(
            cstr!("writeConcern"),
            rawdoc! { "w": "majority", "wtimeout": limit },
        );
        command.append(cstr!("maxTimeMS"), limit);
        command.append(cstr!("updates"), statements);
        let answer = self.run_raw(command, self.write_timeout).await?;
        let refused = |name: &str| answer.get(name).map(Bson::to_string);
        if let Some(problem) = refused("writeConcernError") {
            return Err(StoreError::Unavailable(problem));
        }
        // Documents that MongoDB refuses, and documents changed by others, stay as they are.
        if let Some(problem) = refused("writeErrors") {
            tracing::warn!(problem, "documents are not rewritten");
        }
        let written = answer.get_i32("nModified").unwrap_or_default();
        Ok(u64::try_from(written).unwrap_or_default())
    }
}

/// The document in its current form, including fields that people have added.
fn anew(old: &RawDocument) -> Result<RawDocumentBuf, StoreError> {
    let super::Document { key, room, folded } = document::read(old)?;
    let mut new = document::new(&key, &room, &folded);
    for (name, value) in old.iter().flatten() {
        if !document::is_own(name.as_str()) {
            new.append(name, value);
        }
    }
    Ok(new)
}

/// A statement that replaces a document if it has not changed.
fn statement(old: &RawDocument, new: RawDocumentBuf) -> RawDocumentBuf {
    let mut which = RawDocumentBuf::new();
    for name in [cstr!("_id"), cstr!("room")] {
        if let Ok(Some(value)) = old.get(name.as_str()) {
            which.append(name, value);
        }
    }
    let mut same = RawArrayBuf::new();
    same.push("$$ROOT");
    same.push(rawdoc! { "$literal": old.to_owned() });
    which.append(cstr!("$expr"), rawdoc! { "$eq": same });
    rawdoc! { "q": which, "u": new }
}
