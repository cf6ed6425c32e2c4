//! Erasures: recorded first, then carried out by their holder, and enforced on entries that were in flight meanwhile.
//!
//! The collection `erasures`:
//!
//! ```text
//! {_id, room? | user, scope, before: [<ms per partition>], by, at, state: "running" | "settling" | "done", due, holder, erased,
//!  rooms: [], remembered?: true, again?: {region, upto: {<partition>: <sequence>}}}
//! ```
//! - `before`: later messages stay, by the clock of the streams; one time per partition.
//! - `due`: when another instance may take it over: the end of the holder's lease while running, the time of the second
//!   look when settling.
//! - `rooms`: the rooms in which it must be announced.
//! - `again`: an additional record that is settling from the beginning ([`Again`]).
//!
//! # Invariants
//! - An erasure is acknowledged by the majority before anything is deleted, and a writer looks for erasures after its
//!   write is acknowledged. So at least one of the two sees the other, and erased messages do not come back. Only a
//!   writer that dies between its write and the look leaves a message behind; the second look removes it.
//! - Every step may be repeated.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongodb::{
    Collection, Cursor,
    bson::{Bson, DateTime, Document as Fields, RawDocumentBuf, doc},
    options::{CollectionOptions, FindOptions, ReturnDocument, WriteConcern},
};

use super::{
    Document, Entry, MESSAGES, Store, StoreError, What,
    document::{self, annotator, field_name, number},
    within,
};
use crate::model::{
    Place, Region, RoomId, RoomScope, header_escape, header_unescape, partition_of,
};

/// The collection of erasures.
const ERASURES: &str = "erasures";

/// How long erasures are enforced on writes. No worker holds a message for longer.
const ENFORCED: Duration = Duration::from_secs(24 * 3600);

/// Documents deleted at once.
const DELETED_AT_ONCE: usize = 1000;

/// Timeout for removing a user's reactions and annotations in one room, which reads the whole room.
const TRACES_TIMEOUT: Duration = Duration::from_secs(300);

/// An erasure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    /// Its id, a ULID; in further records of the same erasure followed by region names.
    pub id: String,
    /// What is erased.
    pub what: Erased,
    /// The latest time that is erased, one per partition: in ms since 1970, by the clock of the partition's stream.
    pub before: Vec<u64>,
    /// The user who requested it.
    pub by: String,
    /// The region whose service carries it out, in its streams and mirrors. Each region has its own record. `None`:
    /// recorded by an earlier version, in a mesh of one region.
    pub region: Option<Region>,
}

/// The scope of an erasure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Erased {
    /// All messages of a room.
    Room(RoomId),
    /// All messages of a user.
    User {
        user: String,
        /// Only in these rooms.
        scope: RoomScope,
    },
}

/// A mirror from which a region erases once more: the mirror's origin has carried out the erasure, but the mirror does
/// not repeat the deletions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Again {
    /// The origin of the mirror.
    pub origin: Region,
    /// The mirror must have reached these sequences first: one for each partition concerned, stored after the erasure.
    pub upto: BTreeMap<u16, u64>,
}

impl Again {
    fn fields(&self) -> Fields {
        let upto = self.upto.iter();
        let upto = upto.map(|(part, seq)| (part.to_string(), number(*seq).into()));
        doc! { "region": self.origin.as_str(), "upto": upto.collect::<Fields>() }
    }

    fn read(fields: &Fields) -> Option<Self> {
        let upto = fields.get_document("upto").ok()?.iter();
        let upto = upto.map(|(part, seq)| {
            let seq = u64::try_from(seq.as_i64()?).ok()?;
            Some((part.parse().ok()?, seq))
        });
        Some(Self {
            origin: Region::parse(fields.get_str("region").ok()?)?,
            upto: upto.collect::<Option<_>>()?,
        })
    }
}

/// An erasure held by an instance.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// The erasure.
    pub erasure: Erasure,
    /// It was carried out before, and this is the second look.
    pub settling: bool,
    /// If set, only this is to be done.
    pub again: Option<Again>,
    /// Whether its messages have already been remembered.
    pub remembered: bool,
}

impl Erasure {
    /// The latest time that is erased in a room, in ms since 1970; `None` if the room is not concerned.
    #[must_use]
    pub fn before(&self, room: &RoomId) -> Option<u64> {
        let concerned = match &self.what {
            Erased::Room(erased) => erased == room,
            Erased::User { scope, .. } => scope.contains(room),
        };
        let partitions = u16::try_from(self.before.len()).ok().filter(|n| *n > 0)?;
        let part = usize::from(partition_of(room, partitions));
        self.before.get(part).copied().filter(|_| concerned)
    }

    /// Whether a message that `from` published in `room` at the time `ts` is to be erased. `author` is the author of
    /// its target, if it is a change.
    #[must_use]
    pub fn dooms(&self, room: &RoomId, ts: u64, from: &str, author: Option<&str>) -> bool {
        let of_whom = match &self.what {
            Erased::Room(_) => true,
            Erased::User { user, .. } => user == from || author == Some(user.as_str()),
        };
        of_whom && self.before(room).is_some_and(|before| ts <= before)
    }

    fn dooms_document(&self, document: &Document) -> bool {
        let Document { key, room, folded } = document;
        if let Some(base) = &folded.base {
            return self.dooms(room, base.place.ts, &base.from, None);
        }
        // A change before that time refers to a message before that time.
        let edited = folded.edit.iter().map(|edit| edit.place.ts);
        let reacted = folded.reactions.iter().map(|(.., said)| said.first.ts);
        let annotated = folded.annotations.iter().map(|(.., said)| said.at.ts);
        let said = edited
            .chain(folded.deleted.iter().map(|deleted| deleted.place.ts))
            .chain(reacted)
            .chain(annotated);
        let author = author(room, key);
        said.min()
            .is_some_and(|first| self.dooms(room, first, &author, None))
    }

    fn fields(&self) -> Fields {
        let before: Vec<i64> = self.before.iter().map(|before| number(*before)).collect();
        let region = self.region.as_ref().map(Region::as_str);
        let mut fields =
            doc! { "_id": &self.id, "by": &self.by, "before": before, "region": region };
        match &self.what {
            Erased::Room(room) => {
                fields.insert("room", room.as_str());
            }
            Erased::User { user, scope } => {
                fields.insert("user", user);
                let rooms: Vec<&str> = scope.rooms.iter().map(RoomId::as_str).collect();
                let (all, namespaces) = (scope.all, &scope.namespaces);
                fields.insert(
                    "scope",
                    doc! { "all": all, "namespaces": namespaces, "rooms": rooms },
                );
            }
        }
        fields
    }

    fn read(fields: &Fields) -> Result<Self, StoreError> {
        let id = fields.get_str("_id").unwrap_or_default().to_owned();
        let read = || -> Option<Self> {
            let what = match fields.get_str("room") {
                Ok(room) => Erased::Room(RoomId::parse(room).ok()?),
                Err(_no_room) => {
                    let scope = fields.get_document("scope").ok()?;
                    let rooms = texts(scope, "rooms");
                    Erased::User {
                        user: fields.get_str("user").ok()?.to_owned(),
                        scope: RoomScope {
                            all: scope.get_bool("all").ok()?,
                            namespaces: texts(scope, "namespaces"),
                            rooms: rooms.iter().flat_map(|room| RoomId::parse(room)).collect(),
                        },
                    }
                }
            };
            let before = fields.get_array("before").ok()?.iter();
            let before = before.map(|ms| u64::try_from(ms.as_i64()?).ok());
            Some(Self {
                id: id.clone(),
                what,
                before: before.collect::<Option<_>>()?,
                by: fields.get_str("by").ok()?.to_owned(),
                region: fields.get_str("region").ok().and_then(Region::parse),
            })
        };
        read().ok_or_else(|| StoreError::Document {
            key: id.clone(),
            problem: "it is not an erasure".to_owned(),
        })
    }
}

fn texts(fields: &Fields, name: &str) -> Vec<String> {
    let array = fields
        .get_array(name)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let texts = array.iter().filter_map(Bson::as_str);
    texts.map(str::to_owned).collect()
}

/// The sender of the message with this key.
#[must_use]
pub fn author(room: &RoomId, key: &str) -> String {
    let rest = key.get(room.as_str().len() + 1..).unwrap_or_default();
    let user = rest.rsplit_once('/').map_or(rest, |(user, _)| user);
    header_unescape(user).into_owned()
}

/// A text that is greater than all places up to the time `before`, and not greater than any other.
fn place_after(before: u64) -> String {
    format!("{:011x}", before + 1)
}

impl Store {
    /// Creates the indexes of erasures.
    pub(super) async fn prepare_erasures(&self) -> Result<(), StoreError> {
        let create = doc! {
            "createIndexes": ERASURES,
            "indexes": [
                { "name": "room", "key": { "room": 1 } },
                { "name": "user", "key": { "user": 1 } },
                { "name": "due", "key": { "state": 1, "due": 1 } },
            ],
            "writeConcern": { "w": "majority" },
        };
        self.run(create, self.write_timeout).await.map(|_ok| ())
    }

    fn erasures(&self) -> Collection<Fields> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(ERASURES, options)
    }

    fn majority_messages(&self) -> Collection<RawDocumentBuf> {
        let mut options = CollectionOptions::default();
        options.write_concern = Some(WriteConcern::majority());
        self.database.collection_with_options(MESSAGES, options)
    }

    /// Records an erasure, held by `holder` for `lease`. If `lease` is zero, any instance may take it over at once.
    ///
    /// # Errors
    /// [`StoreError`]. It may have been recorded.
    pub async fn record_erasure(
        &self,
        erasure: &Erasure,
        holder: &str,
        lease: Duration,
    ) -> Result<(), StoreError> {
        let mut fields = erasure.fields();
        let now = DateTime::now();
        fields.extend(doc! {
            "at": now, "state": "running", "holder": holder, "erased": 0_i64, "rooms": [],
            "due": DateTime::from_millis(now.timestamp_millis() + millis(lease)),
        });
        let erasures = self.erasures();
        let insert = erasures.insert_one(fields);
        within(self.write_timeout, insert.into_future())
            .await
            .map(|_inserted| ())
    }

    /// Records what the region of `erasure` has to do once more, due after `wait`. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`StoreError`]. It may have been recorded.
    pub async fn record_again(
        &self,
        erasure: &Erasure,
        again: &Again,
        wait: Duration,
    ) -> Result<(), StoreError> {
        let mut fields = erasure.fields();
        fields.remove("_id");
        let now = DateTime::now();
        fields.extend(doc! {
            "at": now, "state": "settling", "holder": "", "erased": 0_i64, "rooms": [],
            "due": DateTime::from_millis(now.timestamp_millis() + millis(wait)),
            "again": again.fields(),
        });
        let erasures = self.erasures();
        let record = erasures
            .update_one(doc! { "_id": &erasure.id }, doc! { "$setOnInsert": fields })
            .upsert(true);
        within(self.write_timeout, record.into_future())
            .await
            .map(|_recorded| ())
    }

    /// Takes over an erasure of `region` that is due, if there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_erasure(
        &self,
        region: &Region,
        holder: &str,
        lease: Duration,
    ) -> Result<Option<Claimed>, StoreError> {
        let due = doc! {
            // Null also matches a missing field.
            "region": { "$in": [region.as_str(), Bson::Null] },
            "state": { "$in": ["running", "settling"] },
            "$expr": { "$lte": ["$due", "$$NOW"] },
        };
        let erasures = self.erasures();
        let claim = erasures
            .find_one_and_update(due, vec![leased(holder, lease)])
            .sort(doc! { "due": 1 })
            .return_document(ReturnDocument::After);
        let found = within(self.write_timeout, claim.into_future()).await?;
        let claimed = found.map(|fields| -> Result<Claimed, StoreError> {
            Ok(Claimed {
                erasure: Erasure::read(&fields)?,
                settling: fields
                    .get_str("state")
                    .is_ok_and(|state| state == "settling"),
                again: fields.get_document("again").ok().and_then(Again::read),
                remembered: fields.get_bool("remembered").unwrap_or_default(),
            })
        });
        claimed.transpose()
    }

    /// Which of these erasures have not been carried out yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erasures_left(&self, ids: &[String]) -> Result<Vec<String>, StoreError> {
        let erasures = self.erasures();
        let left = erasures.distinct("_id", doc! { "_id": { "$in": ids }, "state": "running" });
        let left = within(self.read_timeout, left.into_future()).await?;
        let left = left.iter().filter_map(Bson::as_str);
        Ok(left.map(str::to_owned).collect())
    }

    /// Extends the holder's claim of an erasure by `lease`. Returns whether the holder still has it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn renew_erasure(
        &self,
        id: &str,
        holder: &str,
        lease: Duration,
    ) -> Result<bool, StoreError> {
        self.change_erasure(id, Some(holder), vec![leased(holder, lease)].into())
            .await
    }

    /// Notes that the messages of an erasure have been remembered, so that a repetition need not do it again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_remembered(&self, id: &str) -> Result<(), StoreError> {
        let set = doc! { "$set": { "remembered": true } };
        self.change_erasure(id, None, set.into())
            .await
            .map(|_held| ())
    }

    /// Notes rooms in which an erasure must be announced.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_erased_rooms(
        &self,
        id: &str,
        rooms: BTreeSet<RoomId>,
    ) -> Result<(), StoreError> {
        let rooms: Vec<&str> = rooms.iter().map(RoomId::as_str).collect();
        let add = doc! { "$addToSet": { "rooms": { "$each": rooms } } };
        self.change_erasure(id, None, add.into())
            .await
            .map(|_held| ())
    }

    /// The rooms noted for an erasure.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erased_rooms(&self, id: &str) -> Result<Vec<RoomId>, StoreError> {
        let erasures = self.erasures();
        let find = erasures.find_one(doc! { "_id": id });
        let found = within(self.read_timeout, find.into_future()).await?;
        let rooms = found.map(|fields| texts(&fields, "rooms"));
        let rooms = rooms.unwrap_or_default();
        Ok(rooms.iter().flat_map(|room| RoomId::parse(room)).collect())
    }

    /// Notes that an erasure was carried out, and the number of messages. `second_look`: the time until it is due
    /// again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_erasure(
        &self,
        id: &str,
        erased: u64,
        second_look: Option<Duration>,
    ) -> Result<(), StoreError> {
        let state = if second_look.is_some() {
            "settling"
        } else {
            "done"
        };
        let wait = millis(second_look.unwrap_or_default());
        let set = doc! { "$set": {
            "state": state,
            "due": { "$add": ["$$NOW", wait] },
            "erased": { "$add": ["$erased", number(erased)] },
        } };
        self.change_erasure(id, None, vec![set].into())
            .await
            .map(|_held| ())
    }

    async fn change_erasure(
        &self,
        id: &str,
        holder: Option<&str>,
        change: mongodb::options::UpdateModifications,
    ) -> Result<bool, StoreError> {
        let mut which = doc! { "_id": id };
        if let Some(holder) = holder {
            which.insert("holder", holder);
        }
        let erasures = self.erasures();
        let update = erasures.update_one(which, change);
        let updated = within(self.write_timeout, update.into_future()).await?;
        Ok(updated.matched_count > 0)
    }

    /// The number of erasures that have not been carried out yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erasures_running(&self) -> Result<u64, StoreError> {
        let erasures = self.erasures();
        let running = erasures.count_documents(doc! { "state": "running" });
        within(self.read_timeout, running.into_future()).await
    }

    /// Deletes the documents of an erasure, and dooms the uploads. Returns how many of the documents were messages. For
    /// the messages of a user, the rooms are noted first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erase_documents(&self, erasure: &Erasure) -> Result<u64, StoreError> {
        let filter = match &erasure.what {
            Erased::Room(room) => doc! { "room": room.as_str() },
            Erased::User { user, .. } => doc! { "from": user },
        };
        self.doom_erased_uploads(erasure).await?;
        let mut erased = self.delete_doomed(erasure, filter).await?;
        if let Erased::User { user, .. } = &erasure.what {
            for room in self.erased_rooms(&erasure.id).await? {
                // Stubs: changes of the user's messages. They have no sender yet.
                let first = format!("{room}/{}/", header_escape(user));
                let last = format!("{first}\u{7f}");
                let keys = doc! { "_id": { "$gte": first, "$lt": last }, "place": Bson::Null };
                erased += self.delete_doomed(erasure, keys).await?;
                self.erase_traces(erasure, user, &room, None).await?;
            }
        }
        Ok(erased)
    }

    /// Deletes the documents that match and are covered by the erasure.
    async fn delete_doomed(&self, erasure: &Erasure, filter: Fields) -> Result<u64, StoreError> {
        let options = FindOptions::builder()
            .projection(doc! { "body": 0, "body_json": 0, "terms": 0, "mentions": 0 })
            .batch_size(u32::try_from(DELETED_AT_ONCE).unwrap_or(u32::MAX))
            .build();
        let messages = self.majority_messages();
        let find = messages.find(filter).with_options(options);
        let mut found = within(self.read_timeout, find.into_future()).await?;
        let mut erased = 0;
        let mut doomed = Vec::new();
        loop {
            let more = within(self.read_timeout, found.advance()).await?;
            if more {
                let document = document::read(found.current())?;
                if erasure.dooms_document(&document) {
                    doomed.push(document);
                }
            }
            if doomed.len() >= DELETED_AT_ONCE || (!more && !doomed.is_empty()) {
                if let Erased::User { .. } = erasure.what {
                    let rooms = doomed.iter().map(|one| one.room.clone());
                    let rooms: BTreeSet<RoomId> = rooms.collect();
                    self.note_erased_rooms(&erasure.id, rooms).await?;
                }
                erased += self.delete(&doomed).await?;
                doomed.clear();
            }
            if !more {
                return Ok(erased);
            }
        }
    }

    /// Starts to read the keys of the documents that an erasure covers.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn doomed<'e>(&self, erasure: &'e Erasure) -> Result<Doomed<'e>, StoreError> {
        let filter = match &erasure.what {
            Erased::Room(room) => doc! { "room": room.as_str() },
            Erased::User { user, .. } => doc! { "from": user },
        };
        let messages = self.majority_messages();
        let find = messages
            .find(filter)
            .projection(doc! { "body": 0, "terms": 0, "mentions": 0 });
        Ok(Doomed {
            erasure,
            found: within(self.read_timeout, find.into_future()).await?,
            timeout: self.read_timeout,
        })
    }

    /// Deletes a message, if it is the one at `place`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erase_at(
        &self,
        room: &RoomId,
        key: &str,
        place: &Place,
    ) -> Result<(), StoreError> {
        self.doom_uploads_of(&[key]).await?;
        let messages = self.majority_messages();
        let which = doc! { "room": room.as_str(), "_id": key, "place": place.to_string() };
        let delete = messages.delete_one(which).into_future();
        within(self.write_timeout, delete).await.map(|_deleted| ())
    }

    /// Deletes documents. Returns how many of them were messages.
    async fn delete(&self, documents: &[Document]) -> Result<u64, StoreError> {
        let mut by_room: BTreeMap<&RoomId, Vec<&str>> = BTreeMap::new();
        for document in documents {
            let keys = by_room.entry(&document.room).or_default();
            keys.push(&document.key);
        }
        let messages = self.majority_messages();
        for (room, keys) in by_room {
            // Also those that an edit has named later than the erasure.
            self.doom_uploads_of(&keys).await?;
            let delete =
                messages.delete_many(doc! { "room": room.as_str(), "_id": { "$in": keys } });
            within(self.write_timeout, delete.into_future()).await?;
        }
        let messages = documents.iter().filter(|one| one.folded.base.is_some());
        Ok(messages.count() as u64)
    }

    /// Removes a user's reactions and annotations from documents of others, in a whole room or only in `keys`.
    async fn erase_traces(
        &self,
        erasure: &Erasure,
        user: &str,
        room: &RoomId,
        keys: Option<&[&str]>,
    ) -> Result<(), StoreError> {
        let Some(before) = erasure.before(room) else {
            return Ok(());
        };
        let end = place_after(before);
        // In annotations a user may have an escaped name; earlier versions used the plain one there too.
        let fields = [field_name(user).into_owned(), annotator(user).into_owned()].to_vec();
        let fields_of = |path: &str| doc! { "$objectToArray": { "$ifNull": [path, {}] } };
        let reaction =
            doc! { "$and": [ { "$in": ["$$said.k", fields] }, { "$lt": ["$$said.v.at", &end] } ] };
        // In version 1 an annotation contains its user.
        let annotation = doc! { "$and": [
            { "$eq": ["$$said.v.from", { "$literal": user }] }, { "$lt": ["$$said.v.at", &end] },
        ] };
        let among = |input: Fields, which: &Fields| {
            doc! { "$anyElementTrue": { "$map": { "input": input, "as": "said", "in": which.clone() } } }
        };
        let without = |input: Fields, which: &Fields| {
            doc! { "$arrayToObject": { "$filter": {
                "input": input, "as": "said", "cond": { "$not": which.clone() },
            } } }
        };
        let named = |path: &str| {
            doc! { "$anyElementTrue": { "$map": {
                "input": fields_of(path), "as": "name",
                "in": among(fields_of("$$name.v"), &reaction),
            } } }
        };
        let (reacted, annotated) = (named("$reactions"), named("$annotations"));
        let annotated = doc! { "$or": [annotated, among(fields_of("$annotations"), &annotation)] };
        let mut filter = doc! {
            "room": room.as_str(),
            "$or": [{ "reactions": { "$exists": true } }, { "annotations": { "$exists": true } }],
            "$expr": { "$or": [reacted, annotated] },
        };
        if let Some(keys) = keys {
            filter.insert("_id", doc! { "$in": keys });
        }
        // Names without users are removed too, since the user may have invented them.
        let remaining = |input: Fields| {
            let of_others = doc! { "$map": {
                "input": input, "as": "name",
                "in": { "k": "$$name.k", "v": without(fields_of("$$name.v"), &reaction) },
            } };
            doc! { "$arrayToObject": { "$filter": {
                "input": of_others, "as": "name", "cond": { "$ne": ["$$name.v", {}] },
            } } }
        };
        let annotations = without(fields_of("$annotations"), &annotation);
        let annotations = remaining(doc! { "$objectToArray": annotations });
        let kept = |name: &str, value: Fields| {
            let there = doc! { "$eq": [{ "$type": format!("${name}") }, "object"] };
            doc! { "$cond": [there, value, "$$REMOVE"] }
        };
        let set = doc! { "$set": {
            "reactions": kept("reactions", remaining(fields_of("$reactions"))),
            "annotations": kept("annotations", annotations),
        } };
        let messages = self.majority_messages();
        let update = messages.update_many(filter, vec![set]);
        within(TRACES_TIMEOUT, update.into_future())
            .await
            .map(|_updated| ())
    }

    /// Deletes again those of the just written entries that an erasure covers, for a writer that had read them from the
    /// stream before. Returns the number of documents.
    ///
    /// # Errors
    /// [`StoreError`]: it must be retried before the entries are acknowledged to the stream.
    pub async fn enforce_erasures(&self, entries: &[Entry]) -> Result<u64, StoreError> {
        let written: Vec<Written<'_>> = entries.iter().filter_map(Written::of).collect();
        let rooms: BTreeSet<&str> = written.iter().map(|one| one.room.as_str()).collect();
        let mut users: BTreeSet<&str> = written.iter().map(|one| one.from).collect();
        users.extend(written.iter().map(|one| one.author.as_str()));
        if rooms.is_empty() {
            return Ok(0);
        }
        let since = DateTime::now().timestamp_millis() - millis(ENFORCED);
        let concerned = doc! { "at": { "$gte": DateTime::from_millis(since) }, "again": Bson::Null, "$or": [
            { "room": { "$in": rooms.into_iter().collect::<Vec<_>>() } },
            { "user": { "$in": users.into_iter().collect::<Vec<_>>() } },
        ] };
        let erasures = self.erasures();
        let find = erasures
            .find(concerned)
            .projection(doc! { "room": 1, "user": 1, "scope": 1, "before": 1, "by": 1 });
        let found = async { find.await?.try_collect().await };
        let recorded: Vec<Fields> = within(self.read_timeout, found).await?;
        let mut erased = 0;
        for fields in recorded {
            erased += self.enforce(&Erasure::read(&fields)?, &written).await?;
        }
        Ok(erased)
    }

    async fn enforce(&self, erasure: &Erasure, written: &[Written<'_>]) -> Result<u64, StoreError> {
        let mut keys: Vec<String> = Vec::new();
        let mut traces: BTreeMap<&RoomId, Vec<&str>> = BTreeMap::new();
        for one in written {
            let Written { room, ts, from, .. } = one;
            if !erasure.dooms(room, *ts, from, Some(&one.author)) {
                continue;
            }
            match &erasure.what {
                Erased::User { user, .. } if *user != one.author => {
                    traces.entry(room).or_default().push(one.key);
                }
                Erased::Room(_) | Erased::User { .. } => keys.push(one.key.to_owned()),
            }
        }
        if let Erased::User { user, .. } = &erasure.what {
            for (room, keys) in traces {
                self.erase_traces(erasure, user, room, Some(&keys)).await?;
            }
        }
        if keys.is_empty() {
            return Ok(0);
        }
        let mut doomed = self.get(&keys).await?;
        doomed.retain(|document| erasure.dooms_document(document));
        let named: Vec<&str> = doomed.iter().map(|one| one.key.as_str()).collect();
        self.doom_uploads_of(&named).await?;
        self.delete(&doomed).await?;
        Ok(doomed.len() as u64)
    }
}

/// A read of the documents that an erasure covers.
#[derive(Debug)]
pub struct Doomed<'e> {
    erasure: &'e Erasure,
    found: Cursor<RawDocumentBuf>,
    timeout: Duration,
}

impl Doomed<'_> {
    /// The next keys; empty at the end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keys(&mut self) -> Result<Vec<String>, StoreError> {
        let mut keys = Vec::new();
        while keys.len() < DELETED_AT_ONCE && within(self.timeout, self.found.advance()).await? {
            let document = document::read(self.found.current())?;
            if self.erasure.dooms_document(&document) {
                keys.push(document.key);
            }
        }
        Ok(keys)
    }
}

/// An entry that was written.
struct Written<'a> {
    room: &'a RoomId,
    ts: u64,
    from: &'a str,
    /// The key of its document.
    key: &'a str,
    /// The author of that document's message.
    author: String,
}

impl<'a> Written<'a> {
    fn of(entry: &'a Entry) -> Option<Self> {
        let key = match &entry.what {
            What::Message { key, .. } => key,
            What::Change { target, .. } => target,
            What::Nothing(_) => return None,
        };
        Some(Self {
            room: &entry.room,
            ts: entry.place.ts,
            from: &entry.from,
            key,
            author: author(&entry.room, key),
        })
    }
}

/// The stage of an update that sets the holder of an erasure and its lease.
fn leased(holder: &str, lease: Duration) -> Fields {
    doc! { "$set": {
        "holder": { "$literal": holder },
        "due": { "$add": ["$$NOW", millis(lease)] },
    } }
}

pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
