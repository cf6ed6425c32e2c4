//! MongoDB: the documents of messages, their indexes, and all reads and writes of them.
//!
//! The only module that uses MongoDB (besides `servers`, which checks whether a server that it started is ready). It
//! does not use NATS: a message of a stream is passed in as an [`Entry`].

mod document;
mod erase;
mod fold;
mod json;
mod keep;
mod query;
mod removals;
mod renew;
mod replies;
mod rooms;
mod schema;
mod slots;
mod text;
mod update;
mod uploads;
mod write;

use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::{
    Client, Database,
    bson::{Document as Fields, RawDocumentBuf, doc},
    error::{Error, ErrorKind},
    options::{ClientOptions, FindOptions, Hint},
};
use tokio::time::{Instant, timeout};

use crate::{
    config,
    model::{Place, Position, RoomId, RoomScope},
};

pub use erase::{Again, Claimed, Erased, Erasure, author};
pub use fold::{Base, Change, Deletion, Edit, Entry, Folded, Said, What};
pub use removals::Removal;
pub use renew::Migrated;
pub use replies::Replies;
pub use rooms::{ListedRoom, RoomPlace, Sees, WhichRooms};
pub use slots::{Annotation, Reaction, Slot};
pub use text::{MAX_QUERY, QueryError};
pub use uploads::{Claim, FileRemoval, Upload, UploadState, Verdict};

/// The collection of messages.
const MESSAGES: &str = "messages";

/// How long a command waits for a usable server. After that the caller continues without MongoDB, or backs off.
const SERVER_SELECTION_TIMEOUT: Duration = Duration::from_secs(3);

/// Bounds of the number of candidates that a search fetches at once.
const SEARCH_ROUND: std::ops::RangeInclusive<usize> = 50..=500;

/// A room with at most this many messages is searched by reading all of them. Measured with a small MongoDB cache:
/// reading a thousand documents that are not cached takes ten times as long as looking up a rare word.
const SMALL_ROOM: usize = 500;

/// Maximum bytes of documents read for one answer of this module, unless the first document is larger. The rest is left
/// for the next read. MongoDB itself sends at most 16 MiB at once.
const MAX_READ: usize = 4 << 20;

/// How many times candidates are fetched for one page of a search, if most do not match.
const SEARCH_ROUNDS: usize = 8;

/// The database of a mesh. Cheap to clone.
///
/// Writes are acknowledged by the majority. Reads go to the primary with read concern `local`, which includes
/// everything that the majority has acknowledged, also on a primary that was just elected. With `majority`, such a
/// primary may not know yet what its predecessor acknowledged, and a page would have a gap. If `local` returns a
/// document that an election then rolls back, its message was published nevertheless: the stream has it, and it is
/// written again. What remains is a primary that was cut off from the others and does not know it yet, for as long as
/// an election takes.
#[derive(Debug, Clone)]
pub struct Store {
    database: Database,
    read_timeout: Duration,
    write_timeout: Duration,
}

/// MongoDB can't be used, or not now.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The connection string can't be used.
    #[error("mongodb.url can't be used: {0}")]
    Url(String),
    /// It did not execute the command. A retry may help (not reachable, no primary, disk full, wrong credentials,
    /// timeout).
    #[error("MongoDB: {0}")]
    Unavailable(String),
    /// The database was created by a newer version of natter.
    #[error("the database has schema version {found}, this natter knows {known}: use a newer one")]
    Schema { found: i64, known: i64 },
    /// A document has an unexpected form.
    #[error("the document {key:?} can't be read: {problem}")]
    Document { key: String, problem: String },
    /// The text can't be searched for. A retry does not help.
    #[error(transparent)]
    Query(#[from] QueryError),
}

/// An entry that MongoDB refused for good, while it accepted others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedEntry {
    /// Its index in the written entries.
    pub index: usize,
    /// MongoDB's reason.
    pub reason: String,
}

/// A message in its current state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its `_id`: `<room>/<user>/<id>`, with the user escaped.
    pub key: String,
    /// Its room.
    pub room: RoomId,
    /// The message and its changes. `base` is set, unless the document was read by key.
    pub folded: Folded,
}

/// A range of a room's messages.
#[derive(Debug, Clone, Default)]
pub struct Span {
    /// Only messages before this place.
    pub before: Option<Place>,
    /// Only messages after this place.
    pub after: Option<Place>,
    /// Only answers to the message with this key.
    pub thread: Option<String>,
}

/// The end of a span from which messages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Oldest first.
    Oldest,
    /// Newest first.
    Newest,
}

/// A search. All given conditions must match.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// Only in these rooms.
    pub rooms: RoomScope,
    /// Words, or parts of words in scripts without spaces. Empty: any message.
    pub text: String,
    /// Only by this user.
    pub from: Option<String>,
    /// Only messages that mention this user.
    pub mentions: Option<String>,
    /// Only answers to the message with this key.
    pub reply_to: Option<String>,
    /// Only messages before this place.
    pub before: Option<Place>,
    /// Return at most this many, newest first.
    pub limit: usize,
}

impl Store {
    /// A store in the configured database. It does not wait for the server.
    ///
    /// # Errors
    /// [`StoreError::Url`].
    pub async fn open(config: &config::Mongodb) -> Result<Self, StoreError> {
        let bad = |error: Error| {
            let text = error.kind.to_string();
            // The part that it takes for an address may belong to a password.
            let shown = match text.contains("server address") {
                true => {
                    "it has no address, or characters in its password that must be written as %XX"
                }
                false => text.as_str(),
            };
            StoreError::Url(shown.to_owned())
        };
        let mut options = ClientOptions::parse(config.url.expose())
            .await
            .map_err(bad)?;
        let wait = SERVER_SELECTION_TIMEOUT.min(config.read_timeout);
        options
            .app_name
            .get_or_insert_with(|| "natter history".to_owned());
        options.server_selection_timeout.get_or_insert(wait);
        options.connect_timeout.get_or_insert(wait);
        let client = Client::with_options(options).map_err(bad)?;
        Ok(Self {
            database: client.database(&config.database),
            read_timeout: config.read_timeout,
            write_timeout: config.write_timeout,
        })
    }

    /// At most `limit` messages of a room, from one end of a span, in the order of that end, and whether these are all.
    /// If documents are large, fewer are returned, but at least one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn page(
        &self,
        room: &RoomId,
        span: &Span,
        end: End,
        limit: usize,
    ) -> Result<(Vec<Document>, bool), StoreError> {
        let query = query::page(room, span, end, limit);
        let (page, cut) = self.documents(query, self.read_timeout).await?;
        let all = page.len() < limit && !cut;
        Ok((page, all))
    }

    /// The documents of the first of these keys, and the number of keys looked up, which is smaller than their number
    /// if documents are large. Keys without a document are left out; stubs are included.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get_first(&self, keys: &[String]) -> Result<(Vec<Document>, usize), StoreError> {
        let (mut found, mut looked) = (Vec::new(), 0);
        let mut part = keys.len();
        while looked < keys.len() && found.is_empty() {
            let asked = keys
                .get(looked..keys.len().min(looked + part))
                .unwrap_or_default();
            let (documents, cut) = self
                .documents(query::keys(asked), self.read_timeout)
                .await?;
            // Documents arrive in no particular order, so fewer are requested.
            if cut && part > 1 {
                part = part.div_ceil(4);
                continue;
            }
            looked += asked.len();
            found = documents;
        }
        Ok((found, looked))
    }

    /// The documents of these keys. Keys without a document are left out; stubs are included.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get(&self, keys: &[String]) -> Result<Vec<Document>, StoreError> {
        let (mut found, mut rest) = (Vec::new(), keys);
        while !rest.is_empty() {
            let (documents, looked) = self.get_first(rest).await?;
            found.extend(documents);
            rest = rest.get(looked..).unwrap_or_default();
        }
        Ok(found)
    }

    /// The rooms of a namespace that have messages.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rooms(&self, namespace: &str) -> Result<Vec<RoomId>, StoreError> {
        let mut rooms: Vec<RoomId> = Vec::new();
        loop {
            let query = query::room_after(namespace, rooms.last());
            let (found, _) = self.find(query, self.read_timeout).await?;
            let Some(found) = found.first() else {
                return Ok(rooms);
            };
            let room = RoomId::parse(found.get_str("room").unwrap_or_default());
            rooms.push(room.map_err(|error| StoreError::Document {
                key: String::new(),
                problem: error.to_string(),
            })?);
        }
    }

    /// The place of the room's message nearest to a position of a stream: the first at or after it (`End::Oldest`), or
    /// the last at or before it (`End::Newest`).
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn nearest(
        &self,
        room: &RoomId,
        position: &Position,
        end: End,
    ) -> Result<Option<Place>, StoreError> {
        let query = query::nearest(room, position, end);
        let (found, _) = self.find(query, self.read_timeout).await?;
        let first = found.first().map(|found| document::read_place(found));
        first.transpose()
    }

    /// The messages that match a search, newest first, and the place from which to continue (`before`) if there may be
    /// more. A search that finds few matches among many messages returns what it found within a bounded time, possibly
    /// nothing, and where to continue.
    ///
    /// # Errors
    /// [`StoreError`]. [`StoreError::Query`] is returned before MongoDB is asked.
    pub async fn search(
        &self,
        search: &Search,
    ) -> Result<(Vec<Document>, Option<Place>), StoreError> {
        let sought = text::Query::of(&search.text)?;
        if search.rooms.is_empty() || search.limit == 0 {
            return Ok((Vec::new(), None));
        }
        let deadline = Instant::now() + self.read_timeout;
        let walk = match (
            search.rooms.all,
            search.rooms.namespaces.as_slice(),
            search.rooms.rooms.as_slice(),
        ) {
            (false, [], [room]) => self.is_small(room).await?,
            _ => false,
        };
        let mut found = Vec::new();
        let mut span = Span {
            before: search.before.clone(),
            ..Span::default()
        };
        for round in 0..SEARCH_ROUNDS {
            let fetched = search
                .limit
                .clamp(*SEARCH_ROUND.start(), *SEARCH_ROUND.end());
            let candidates = query::search(search, &sought, &span, fetched, walk);
            let left = deadline.saturating_duration_since(Instant::now());
            let (candidates, cut) = match self.documents(candidates, left).await {
                // There is something to return, and the rest can be requested.
                Err(StoreError::Unavailable(_)) if round > 0 => return Ok((found, span.before)),
                candidates => candidates?,
            };
            let exhausted = candidates.len() < fetched && !cut;
            for candidate in candidates {
                if found.len() == search.limit {
                    return Ok((found, span.before));
                }
                let base = candidate.folded.base.as_ref();
                span.before = base.map(|base| base.place.clone());
                // A tombstone has no body.
                let body = candidate.folded.body();
                if body.is_some_and(|body| sought.is_empty() || sought.fits(body)) {
                    found.push(candidate);
                }
            }
            if exhausted {
                return Ok((found, None));
            }
        }
        Ok((found, span.before))
    }

    /// Whether a room is searched by reading all of it. The index of terms covers all rooms together, ordered by time:
    /// one ordered by room would make each message change a dozen more places, at several times the cost of all other
    /// writes.
    async fn is_small(&self, room: &RoomId) -> Result<bool, StoreError> {
        let query = query::size(room, SMALL_ROOM + 1);
        let messages = self.database.collection::<RawDocumentBuf>(MESSAGES);
        let mut count = messages
            .count_documents(query.filter)
            .limit((SMALL_ROOM + 1) as u64)
            .max_time(self.read_timeout);
        if let Some(name) = query.index {
            count = count.hint(Hint::Name(name.to_owned()));
        }
        let size = within(self.read_timeout, count.into_future()).await?;
        Ok(size <= SMALL_ROOM as u64)
    }

    async fn documents(
        &self,
        query: query::Query,
        limit: Duration,
    ) -> Result<(Vec<Document>, bool), StoreError> {
        let (found, cut) = self.find(query, limit).await?;
        let documents: Result<_, _> = found.iter().map(|found| document::read(found)).collect();
        Ok((documents?, cut))
    }

    /// The results of a query, and whether they were cut because they are large.
    async fn find(
        &self,
        query: query::Query,
        limit: Duration,
    ) -> Result<(Vec<RawDocumentBuf>, bool), StoreError> {
        // MongoDB treats 0 as no limit.
        if query.limit == 0 {
            return Ok((Vec::new(), false));
        }
        let mut options = FindOptions::default();
        options.sort = Some(query.sort);
        options.limit = Some(i64::try_from(query.limit).unwrap_or(i64::MAX));
        // Everything in one answer, as far as 16 MiB allow.
        options.batch_size = Some(u32::try_from(query.limit).unwrap_or(u32::MAX));
        // MongoDB treats 0 as no timeout.
        options.max_time = Some(limit.max(Duration::from_millis(1)));
        options.projection = query.only.map(|fields| {
            let mut only = doc! { "_id": 0 };
            only.extend(fields.iter().map(|field| ((*field).to_owned(), 1.into())));
            only
        });
        options.hint = query.index.map(|name| Hint::Name(name.to_owned()));
        let messages = self.database.collection::<RawDocumentBuf>(MESSAGES);
        let find = messages.find(query.filter).with_options(options);
        let found = async {
            let mut found = find.await?;
            let (mut documents, mut bytes) = (Vec::new(), 0);
            while let Some(document) = found.try_next().await? {
                bytes += document.as_bytes().len();
                if bytes > MAX_READ && !documents.is_empty() {
                    return Ok((documents, true));
                }
                documents.push(document);
            }
            Ok((documents, false))
        };
        within(limit, found).await
    }

    async fn run(&self, command: Fields, limit: Duration) -> Result<Fields, StoreError> {
        within(limit, self.database.run_command(command).into_future()).await
    }

    async fn run_raw(
        &self,
        command: RawDocumentBuf,
        limit: Duration,
    ) -> Result<Fields, StoreError> {
        within(limit, self.database.run_raw_command(command).into_future()).await
    }
}

/// Waits for MongoDB at most for `limit`.
async fn within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, StoreError> {
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|error| unavailable(&error)),
        Err(_elapsed) => Err(StoreError::Unavailable(format!(
            "no answer within {limit:?}"
        ))),
    }
}

/// The text of a driver's error, for people.
fn unavailable(error: &Error) -> StoreError {
    StoreError::Unavailable(match error.kind.as_ref() {
        ErrorKind::Command(error) => format!("{} (code {})", error.message, error.code),
        kind => kind.to_string(),
    })
}
