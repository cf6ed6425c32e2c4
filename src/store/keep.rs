//! The removal of messages that a namespace does not keep any longer.
//!
//! # Invariants
//! - Every step may be repeated, interrupted, and made by several processes at once: only documents that are too old
//!   are deleted, whoever reads them.
//! - The streams do not have messages of that age any more, so nothing that is removed is written again.

use std::{collections::BTreeMap, time::Duration};

use mongodb::{
    Collection,
    bson::{Bson, Document as Fields, RawDocumentBuf, doc},
    options::{CollectionOptions, FindOptions, Hint, WriteConcern},
};

use super::{MESSAGES, Store, StoreError, document, query, schema::ROOM_PLACE, within};

/// Documents deleted in one step.
const STEP: usize = 500;

/// Timeout for reading the stubs of a namespace. There are few, but the index entries of all rooms are visited.
const STUBS_TIMEOUT: Duration = Duration::from_secs(300);

impl Store {
    /// Deletes some messages of a namespace that were stored before `ts` (ms since 1970). Returns how many, and whether
    /// there may be more.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been deleted.
    pub async fn remove_before(&self, namespace: &str, ts: u64) -> Result<(u64, bool), StoreError> {
        // Less than every place from then on.
        let bound = format!("{ts:011x}");
        let query = query::before(namespace, &bound, STEP);
        let (found, cut) = self.find(query, self.read_timeout).await?;
        let mut by_room: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for one in &found {
            let text = |name| one.get_str(name).unwrap_or_default();
            by_room.entry(text("room")).or_default().push(text("_id"));
        }
        let mut removed = 0;
        for (room, keys) in by_room {
            let old = doc! { "$gte": "", "$lt": &bound };
            removed += self.delete_keys(room, keys, old.into()).await?;
        }
        Ok((removed, cut || found.len() == STEP))
    }

    /// Deletes what is known of messages of a namespace that never came, or are gone, and were last changed before
    /// `ts`.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been deleted.
    pub async fn remove_stubs_before(&self, namespace: &str, ts: u64) -> Result<(), StoreError> {
        let options = FindOptions::builder()
            .projection(doc! { "body": 0, "body_json": 0, "terms": 0 })
            .hint(Hint::Name(ROOM_PLACE.to_owned()))
            .max_time(STUBS_TIMEOUT)
            .build();
        let filter = doc! { "room": query::rooms_of(namespace), "place": Bson::Null };
        let messages = self.kept_messages();
        let find = messages.find(filter).with_options(options);
        let mut found = within(STUBS_TIMEOUT, find.into_future()).await?;
        while within(STUBS_TIMEOUT, found.advance()).await? {
            let document = document::read(found.current())?;
            let last = document.folded.last_change();
            if last.is_none_or(|last| last < ts) {
                let room = document.room.as_str();
                self.delete_keys(room, vec![&document.key], Bson::Null)
                    .await?;
            }
        }
        Ok(())
    }

    async fn delete_keys(
        &self,
        room: &str,
        keys: Vec<&str>,
        place: Bson,
    ) -> Result<u64, StoreError> {
        // Before the messages: afterwards nobody would know that their files are to go.
        self.doom_uploads_of(&keys).await?;
        let which: Fields = doc! { "room": room, "_id": { "$in": keys }, "place": place };
        let messages = self.kept_messages();
        let delete = messages.delete_many(which).into_future();
        Ok(within(self.write_timeout, delete).await?.deleted_count)
    }

    fn kept_messages(&self) -> Collection<RawDocumentBuf> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(MESSAGES, options)
    }
}
