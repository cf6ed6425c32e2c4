//! The directory of rooms: what the records of rooms say, and when somebody last spoke there.
//!
//! The collection `rooms`:
//!
//! ```text
//! {_id: "<room>", ns, kind, ref?, archived?: true, open?: true, members: ["<user>", …], banned?: ["<user>", …], active,
//!  title?, record, version}
//! ```
//! - `record`: the record as JSON text, merged of all that was ever written here; `version` names its state. The fields
//!   before it are copies of what questions ask for.
//! - `open`: the room has not ended. Only these are in the indexes, and found.
//! - `members`: those who are in it, and the empty text if it has no list of members ([`ANYBODY`]).
//! - `active`: the time of the newest message that somebody has sent, or of the making of the room, in ms since 1970. It
//!   never goes back.
//!
//! # Invariants
//! - A document is replaced only if it still has the version that was read and merged, so that of several services none
//!   takes back what another one has written.
//! - `active` is written with `$max`, by whoever and as often as it may be.

use std::collections::{BTreeSet, HashMap};

use futures_util::TryStreamExt as _;
use mongodb::{
    bson::{Bson, DateTime, Document as Fields, RawDocumentBuf, doc},
    options::{FindOptions, Hint},
};
use serde::{Deserialize, Serialize};

use super::{
    MESSAGES, Store, StoreError, document,
    document::number,
    schema::{META, ROOM_PLACE},
    within,
    write::MAX_COMMAND,
};
use crate::{
    model::{RoomId, RoomScope},
    subject::FROM_NATTER,
};

/// The collection of rooms.
const ROOMS: &str = "rooms";

/// Stands in `members` of a room that has no list of members. No user has this name.
const ANYBODY: &str = "";

/// Statements in one command at most.
const AT_ONCE: usize = 1000;

/// What the directory says of a room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRoom {
    /// The room.
    pub room: RoomId,
    /// `dm`, `group` or `open`.
    pub kind: &'static str,
    /// What it is about in the application.
    pub about: Option<String>,
    /// What people call it.
    pub title: Option<String>,
    /// Whether it is put aside.
    pub archived: bool,
    /// Whether it has ended.
    pub closed: bool,
    /// Whether it has no list of members.
    pub anybody: bool,
    /// Those who are in it.
    pub members: Vec<String>,
    /// Those who are banned.
    pub banned: Vec<String>,
    /// When it was made, in ms since 1970.
    pub created: u64,
    /// The text of the record.
    pub record: String,
    /// Names the state of the record.
    pub version: String,
}

/// What is known of a room's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownRecord {
    /// The text of the record; empty if a person has changed the document so that there is none.
    pub record: String,
    /// Names its state.
    pub version: Option<String>,
}

/// Which rooms a question is about. All given conditions must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WhichRooms {
    /// Only of this namespace.
    pub namespace: Option<String>,
    /// Only about this.
    #[serde(rename = "ref")]
    pub about: Option<String>,
    /// Only those that this user is in.
    pub member: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only those that are put aside, or only the others.
    pub archived: Option<bool>,
    /// Who asks, and may see what.
    pub sees: Sees,
    /// Only after this one in the list.
    pub after: Option<RoomPlace>,
    /// At most this many.
    pub limit: usize,
}

/// The rooms that somebody may see: the union of the three.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sees {
    /// The user.
    pub user: String,
    /// All of these.
    pub all: RoomScope,
    /// Those of these from which the user is not banned.
    pub unless_banned: RoomScope,
    /// Those of these that the user is in, or that have no list of members.
    pub as_member: RoomScope,
}

/// Where a room stands in the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomPlace {
    /// When it was last active, in ms since 1970.
    pub active_at: u64,
    /// The room.
    pub room: RoomId,
}

impl Store {
    /// Creates the indexes of the directory. `active` is only in those that need it: it changes often, and a list of
    /// members has an entry of the index for each.
    pub(super) async fn prepare_rooms(&self) -> Result<(), StoreError> {
        let index = |name: &str, key: Fields| doc! { "name": name, "key": key, "partialFilterExpression": { "open": true } };
        let create = doc! {
            "createIndexes": ROOMS,
            "indexes": [
                index("active", doc! { "active": -1, "_id": -1 }),
                index("namespace", doc! { "ns": 1, "active": -1, "_id": -1 }),
                index("ref", doc! { "ref": 1 }),
                index("members", doc! { "members": 1 }),
            ],
            "writeConcern": { "w": "majority" },
        };
        self.run(create, self.write_timeout).await.map(|_ok| ())
    }

    /// What the directory has of these rooms.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn known_records(
        &self,
        rooms: &[RoomId],
    ) -> Result<HashMap<RoomId, KnownRecord>, StoreError> {
        let rooms: Vec<&str> = rooms.iter().map(RoomId::as_str).collect();
        let filter = doc! { "_id": { "$in": rooms } };
        let options = FindOptions::builder()
            .projection(doc! { "record": 1, "version": 1 })
            .build();
        let found = self.find_rooms(filter, options).await?;
        let known = found.iter().map(|found| {
            let text = |name| found.get_str(name).ok().map(str::to_owned);
            let known = KnownRecord {
                record: text("record").unwrap_or_default(),
                version: text("version"),
            };
            Ok((room_of(found)?, known))
        });
        known.collect()
    }

    /// Writes rooms into the directory, each only if it still has the version that is given with it (`None`: only if it
    /// is not there). Which were written is not said: who needs to know asks for them again.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been written.
    pub async fn list_rooms(
        &self,
        rooms: &[(ListedRoom, Option<String>)],
    ) -> Result<(), StoreError> {
        let statements = rooms.iter().map(|(room, version)| {
            let (set, unset) = room.fields();
            let active = number(room.created);
            let update = doc! { "$set": set, "$unset": unset, "$max": { "active": active } };
            let is_new = version.is_none();
            let version = match version {
                Some(version) => doc! { "$eq": version },
                None => doc! { "$exists": false },
            };
            let which = doc! { "_id": room.room.as_str(), "version": version };
            doc! { "q": which, "u": update, "upsert": is_new }
        });
        self.update_rooms(statements.collect()).await
    }

    /// Notes when somebody last spoke in rooms, in ms since 1970. Rooms that are not in the directory are left out.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been written.
    pub async fn note_activity(&self, rooms: &[(RoomId, u64)]) -> Result<(), StoreError> {
        let statements = rooms.iter().map(|(room, at)| {
            let at = number(*at);
            let which = doc! { "_id": room.as_str(), "active": { "$lt": at } };
            doc! { "q": which, "u": { "$max": { "active": at } } }
        });
        self.update_rooms(statements.collect()).await
    }

    /// Looks up the newest message of each of these rooms, and notes its time.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been written.
    pub async fn look_up_activity(&self, rooms: &BTreeSet<RoomId>) -> Result<(), StoreError> {
        let mut spoken = Vec::new();
        for room in rooms {
            if let Some(at) = self.newest_message(room).await? {
                spoken.push((room.clone(), at));
            }
        }
        self.note_activity(&spoken).await
    }

    async fn newest_message(&self, room: &RoomId) -> Result<Option<u64>, StoreError> {
        let messages = self.database.collection::<RawDocumentBuf>(MESSAGES);
        let find = messages
            .find_one(doc! {
                "room": room.as_str(), "place": { "$gte": "" }, "from": { "$ne": FROM_NATTER },
            })
            .sort(doc! { "place": -1 })
            .projection(doc! { "_id": 0, "place": 1 })
            .hint(Hint::Name(ROOM_PLACE.to_owned()))
            .max_time(self.read_timeout);
        let found = within(self.read_timeout, find.into_future()).await?;
        let place = found
            .map(|found| document::read_place(&found))
            .transpose()?;
        Ok(place.map(|place| place.ts))
    }

    async fn find_rooms(
        &self,
        filter: Fields,
        options: FindOptions,
    ) -> Result<Vec<Fields>, StoreError> {
        let listed = self.database.collection::<Fields>(ROOMS);
        let find = listed.find(filter).with_options(options);
        let find = find.max_time(self.read_timeout);
        let found = async { find.await?.try_collect().await };
        within(self.read_timeout, found).await
    }

    async fn update_rooms(&self, statements: Vec<Fields>) -> Result<(), StoreError> {
        let mut statements = statements.into_iter().peekable();
        while statements.peek().is_some() {
            let (mut part, mut bytes) = (Vec::new(), 0);
            while let Some(next) =
                statements.next_if(|_| part.len() < AT_ONCE && bytes < MAX_COMMAND)
            {
                let raw = RawDocumentBuf::try_from(&next).map_err(|error| {
                    StoreError::Unavailable(format!("a room can't be listed: {error}"))
                })?;
                bytes += raw.as_bytes().len();
                part.push(Bson::Document(next));
            }
            let update = doc! {
                "update": ROOMS, "updates": part, "ordered": false,
                "writeConcern": { "w": "majority" },
            };
            let answer = self.run(update, self.write_timeout).await?;
            super::write::unless_duplicate(&answer)?;
        }
        Ok(())
    }

    /// Whether the directory was filled: all rooms were written to it once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_directory_filled(&self) -> Result<bool, StoreError> {
        let meta = self.database.collection::<Fields>(META);
        let find = meta.find_one(doc! { "_id": ROOMS });
        let found = within(self.read_timeout, find.into_future()).await?;
        Ok(found.is_some())
    }

    /// Notes that the directory was filled.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_directory_filled(&self) -> Result<(), StoreError> {
        let meta = self.confirmed(META);
        let note = doc! { "$setOnInsert": { "filled_at": DateTime::now() } };
        let update = meta.update_one(doc! { "_id": ROOMS }, note).upsert(true);
        within(self.write_timeout, update.into_future())
            .await
            .map(|_updated| ())
    }

    /// The rooms of a question, newest activity first, and whether there may be more.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rooms_where(
        &self,
        which: &WhichRooms,
    ) -> Result<(Vec<RoomPlace>, bool), StoreError> {
        let Some(filter) = which.filter() else {
            return Ok((Vec::new(), false));
        };
        let limit = i64::try_from(which.limit + 1).unwrap_or(i64::MAX);
        let options = FindOptions::builder()
            .sort(doc! { "active": -1, "_id": -1 })
            .limit(limit)
            .projection(doc! { "active": 1 })
            .build();
        let found = self.find_rooms(filter, options).await?;
        let more = found.len() > which.limit;
        let places = found.iter().take(which.limit).map(|found| {
            let active_at = found.get_i64("active").ok();
            Ok(RoomPlace {
                active_at: active_at
                    .and_then(|at| u64::try_from(at).ok())
                    .ok_or_else(|| unreadable(found, "it has no time"))?,
                room: room_of(found)?,
            })
        });
        Ok((places.collect::<Result<_, StoreError>>()?, more))
    }
}

impl ListedRoom {
    /// The fields of the document, and those that it must not have.
    fn fields(&self) -> (Fields, Fields) {
        let mut members: Vec<&str> = self.members.iter().map(String::as_str).collect();
        if self.anybody {
            members.push(ANYBODY);
        }
        let banned = (!self.banned.is_empty()).then_some(&self.banned);
        let mut set = doc! {
            "ns": self.room.namespace(), "kind": self.kind, "members": members,
            "record": &self.record, "version": &self.version,
        };
        let mut unset = Fields::new();
        for (name, value) in [
            ("ref", self.about.as_ref().map(Bson::from)),
            ("title", self.title.as_ref().map(Bson::from)),
            ("archived", self.archived.then_some(true.into())),
            ("open", (!self.closed).then_some(true.into())),
            ("banned", banned.map(Bson::from)),
        ] {
            match value {
                Some(value) => drop(set.insert(name, value)),
                None => drop(unset.insert(name, "")),
            }
        }
        (set, unset)
    }
}

impl WhichRooms {
    /// The filter of the question; `None` if nothing can match.
    fn filter(&self) -> Option<Fields> {
        let mut all = vec![doc! { "open": true }];
        if let Some(namespace) = &self.namespace {
            all.push(doc! { "ns": namespace });
        }
        if let Some(about) = &self.about {
            all.push(doc! { "ref": about });
        }
        if let Some(member) = &self.member {
            all.push(doc! { "members": member });
        }
        if let Some(kind) = &self.kind {
            all.push(doc! { "kind": kind });
        }
        match self.archived {
            Some(true) => all.push(doc! { "archived": true }),
            Some(false) => all.push(doc! { "archived": { "$ne": true } }),
            None => {}
        }
        all.extend(self.sees.filter()?);
        if let Some(RoomPlace { active_at, room }) = &self.after {
            let at = number(*active_at);
            let same = doc! { "active": at, "_id": { "$lt": room.as_str() } };
            // The first condition bounds the walk through an index.
            all.push(doc! { "active": { "$lte": at } });
            all.push(doc! { "$or": [{ "active": { "$lt": at } }, same] });
        }
        Some(doc! { "$and": all })
    }
}

impl Sees {
    /// What narrows a question to these rooms, if anything does; `None` if nothing can match.
    fn filter(&self) -> Option<Option<Fields>> {
        if self.all.all {
            return Some(None);
        }
        let user = &self.user;
        let not_banned = || doc! { "banned": { "$ne": user } };
        let member = || doc! { "members": { "$in": [user, ANYBODY] }, "banned": { "$ne": user } };
        let parts = [
            in_scope(&self.all),
            in_scope(&self.unless_banned).map(|rooms| doc! { "$and": [rooms, not_banned()] }),
            in_scope(&self.as_member).map(|rooms| doc! { "$and": [rooms, member()] }),
        ];
        let mut parts: Vec<Fields> = parts.into_iter().flatten().collect();
        match parts.len() {
            0 => None,
            // So that MongoDB sees which index helps.
            1 => Some(parts.pop()),
            _ => Some(Some(doc! { "$or": parts })),
        }
    }
}

/// The filter for the rooms of a scope; `None` if it has none.
fn in_scope(scope: &RoomScope) -> Option<Fields> {
    if scope.all {
        return Some(Fields::new());
    }
    let rooms: Vec<&str> = scope.rooms.iter().map(RoomId::as_str).collect();
    match (&scope.namespaces[..], &rooms[..]) {
        ([], []) => None,
        (namespaces, []) => Some(doc! { "ns": { "$in": namespaces } }),
        ([], rooms) => Some(doc! { "_id": { "$in": rooms } }),
        (namespaces, rooms) => {
            Some(doc! { "$or": [{ "ns": { "$in": namespaces } }, { "_id": { "$in": rooms } }] })
        }
    }
}

fn unreadable(found: &Fields, problem: &str) -> StoreError {
    StoreError::Document {
        key: found.get_str("_id").unwrap_or_default().to_owned(),
        problem: problem.to_owned(),
    }
}

fn room_of(found: &Fields) -> Result<RoomId, StoreError> {
    let room = RoomId::parse(found.get_str("_id").unwrap_or_default());
    room.map_err(|error| unreadable(found, &error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_see_nothing_finds_nothing_and_who_may_see_all_is_not_narrowed() {
        let mut which = WhichRooms::default();
        assert_eq!(which.filter(), None);
        which.sees.all.all = true;
        assert_eq!(which.filter(), Some(doc! { "$and": [{ "open": true }] }));
        which.sees = Sees {
            user: "kim".to_owned(),
            as_member: RoomScope {
                namespaces: vec!["crew".to_owned()],
                ..RoomScope::default()
            },
            ..Sees::default()
        };
        let text = which.filter().unwrap().to_string();
        for part in ["\"crew\"", "\"kim\"", "\"members\"", "\"banned\""] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
