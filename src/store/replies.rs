//! Counts the answers to the messages of a page.
//!
//! Nothing is counted when messages are written: a counter would be wrong after a repeated batch, or a crash between two
//! writes. The number of answers is that of the documents, of which the index `thread` has all that is needed.

use std::collections::HashMap;

use futures_util::TryStreamExt;
use mongodb::{
    bson::{Document as Fields, RawDocument, RawDocumentBuf, doc, raw::RawBsonRef},
    options::{AggregateOptions, Hint},
};

use super::{Document, MESSAGES, Store, StoreError, document, query, schema::THREAD, within};
use crate::model::{Place, RoomId};

/// Entries of the index that are read for a page, before each of its remaining threads is counted by itself.
const ENTRIES: usize = 2 * Replies::MAX;

/// The number of documents looked up at once: few enough for one answer.
const OUTLINES: usize = 2000;

/// The answers to a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Replies {
    /// Their number, without those that were deleted; at most [`Self::MAX`].
    pub count: usize,
    /// Whether there are more than were counted.
    pub capped: bool,
    /// The newest one that was not deleted: its place and its key.
    pub last: Option<(Place, String)>,
    /// Documents that were looked at.
    looked: usize,
}

impl Replies {
    /// The most answers to one message that are counted. Of more answers, the newest are looked at.
    pub const MAX: usize = 1000;

    /// Adds an answer that is not deleted.
    pub fn add(&mut self, place: &Place, key: &str) {
        if self.count == Self::MAX {
            self.capped = true;
        } else {
            self.count += 1;
        }
        if self.last.as_ref().is_none_or(|(last, _)| last < place) {
            self.last = Some((place.clone(), key.to_owned()));
        }
    }

    /// Takes the next document, newest first.
    fn look(&mut self, found: &RawDocument) -> Result<(), StoreError> {
        self.looked += 1;
        if self.looked > Self::MAX {
            self.capped = true;
            return Ok(());
        }
        if is_null(found, "deleted") {
            let key = found.get_str("_id").unwrap_or_default();
            self.add(&document::read_place(found)?, key);
        }
        Ok(())
    }

    /// The result of [`query::count_answers`].
    fn read(found: &RawDocument) -> Result<Self, StoreError> {
        let number = |name: &str| {
            let number = found.get(name).ok().flatten();
            let number = number.and_then(RawBsonRef::as_i32).unwrap_or_default();
            usize::try_from(number).unwrap_or_default()
        };
        let last = found.get("last").ok().flatten();
        let last = last.and_then(RawBsonRef::as_document).map(|last| {
            let key = last.get_str("_id").unwrap_or_default();
            Ok::<_, StoreError>((document::read_place(last)?, key.to_owned()))
        });
        let looked = number("looked");
        Ok(Self {
            count: number("count").min(Self::MAX),
            capped: looked > Self::MAX,
            last: last.transpose()?,
            looked,
        })
    }
}

impl Store {
    /// The answers to each of these messages of a room. Messages without answers are left out, and so are answers with
    /// the keys `without`.
    ///
    /// One query; a second one if there are thousands of answers.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn replies(
        &self,
        room: &RoomId,
        to: &[String],
        without: &[String],
    ) -> Result<HashMap<String, Replies>, StoreError> {
        let mut replies: HashMap<String, Replies> = HashMap::new();
        if to.is_empty() {
            return Ok(replies);
        }
        let query = query::answers(room, to, without, ENTRIES);
        let (found, cut) = self.find(query, self.read_timeout).await?;
        let mut last = String::new();
        for found in &found {
            let first = found.get_str("reply_key").unwrap_or_default();
            if first != last {
                first.clone_into(&mut last);
            }
            replies.entry(first.to_owned()).or_default().look(found)?;
        }
        if cut || found.len() == ENTRIES {
            // Everything before the last one is known, and nothing of what is behind it.
            replies.remove(&last);
            let rest = to.iter().filter(|first| **first >= last);
            replies.extend(self.count_each(room, rest, without).await?);
        }
        Ok(replies)
    }

    /// Counts the answers to each of these messages, without reading on where there are many.
    async fn count_each(
        &self,
        room: &RoomId,
        to: impl Iterator<Item = &String>,
        without: &[String],
    ) -> Result<Vec<(String, Replies)>, StoreError> {
        let limit = i64::try_from(Replies::MAX + 1).unwrap_or(i64::MAX);
        let mut stages: Vec<Fields> = Vec::new();
        for first in to {
            let count = query::count_answers(room, first, without, limit);
            if stages.is_empty() {
                stages.extend(count);
            } else {
                let count = count.to_vec();
                stages.push(doc! { "$unionWith": { "coll": MESSAGES, "pipeline": count } });
            }
        }
        if stages.is_empty() {
            return Ok(Vec::new());
        }
        let mut options = AggregateOptions::default();
        options.max_time = Some(self.read_timeout);
        options.hint = Some(Hint::Name(THREAD.to_owned()));
        let messages = self.database.collection::<RawDocumentBuf>(MESSAGES);
        let count = messages.aggregate(stages).with_options(options);
        let count = count.with_type::<RawDocumentBuf>();
        let found: Vec<RawDocumentBuf> = within(self.read_timeout, async {
            count.await?.try_collect().await
        })
        .await?;
        let found = found.iter().map(|found| {
            let first = found.get_str("_id").unwrap_or_default();
            Ok((first.to_owned(), Replies::read(found)?))
        });
        found.collect()
    }

    /// The documents of these keys with what decides whether they are answers that count: place, what they answer, and
    /// deletion. Keys without a document are left out; stubs are included.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn outlines(&self, keys: &[String]) -> Result<Vec<Document>, StoreError> {
        let mut outlines = Vec::new();
        for keys in keys.chunks(OUTLINES) {
            let (found, _cut) = self
                .documents(query::outlines(keys), self.read_timeout)
                .await?;
            outlines.extend(found);
        }
        Ok(outlines)
    }
}

/// Whether a document has no such field. An index says null of a field that is not there.
fn is_null(document: &RawDocument, name: &str) -> bool {
    let value = document.get(name).ok().flatten();
    value.is_none_or(|value| value.as_null().is_some())
}
