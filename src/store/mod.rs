//! MongoDB: the documents of messages, their indexes, and every question that is asked about them.
//!
//! The only module that speaks to MongoDB (besides `servers`, which looks whether one it started is ready). It does not know
//! NATS: what comes from a stream comes as an [`Entry`].

mod document;
mod erase;
mod fold;
mod json;
mod query;
mod removals;
mod renew;
mod schema;
mod slots;
mod text;
mod update;
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

pub use erase::{Again, Claimed, Erased, Erasure};
pub use fold::{Base, Change, Edit, Entry, Folded, Said, What};
pub use removals::Removal;
pub use renew::Migrated;
pub use slots::{Annotation, Reaction, Slot};
pub use text::{MAX_QUERY, QueryError};

/// The collection of messages.
const MESSAGES: &str = "messages";

/// How long a command waits for a server that can take it: then who asked goes on with what there is, or backs off.
const SERVER_SELECTION_TIMEOUT: Duration = Duration::from_secs(3);

/// Most candidates of a search that are fetched at once, and at least as many.
const SEARCH_ROUND: std::ops::RangeInclusive<usize> = 50..=500;

/// Messages of a room that is searched by looking at all of it. Measured where MongoDB's cache is small: looking at a thousand
/// documents that are not in it takes ten times as long as looking a rare word up.
const SMALL_ROOM: usize = 500;

/// Most bytes of documents that are read for one answer of this module, unless the first has more: what comes after is left
/// for the next. MongoDB itself sends at most 16 MiB at once.
const MAX_READ: usize = 4 << 20;

/// How often candidates are fetched for one page of a search, where most do not fit.
const SEARCH_ROUNDS: usize = 8;

/// The database of a mesh; cheap to clone.
///
/// Writes are confirmed by the majority. Reads go to the primary with read concern `local`: everything that the majority
/// confirmed is there, at once, also on a primary that was just elected (with `majority` one that does not know yet what its
/// predecessor confirmed would answer without it, and a page would have a gap). What `local` shows and an election then takes
/// back was said all the same: the stream has it, and it is written again. What remains is a primary that was cut off from the
/// others and does not know yet, for as long as an election takes.
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
    /// It did not do what was asked; asking again may help (away, no primary, a full disk, wrong credentials, a time-out).
    #[error("MongoDB: {0}")]
    Unavailable(String),
    /// The database was made by a newer natter.
    #[error("the database has schema version {found}, this natter knows {known}: use a newer one")]
    Schema { found: i64, known: i64 },
    /// A document is not one of ours.
    #[error("the document {key:?} can't be read: {problem}")]
    Document { key: String, problem: String },
    /// The text can't be searched for; asking again does not help.
    #[error(transparent)]
    Query(#[from] QueryError),
}

/// An entry that MongoDB refused for good, while it took others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedEntry {
    /// Its index in what was to be written.
    pub index: usize,
    /// What MongoDB said.
    pub reason: String,
}

/// A message with what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its `_id`: `<room>/<user>/<id>`, the user escaped.
    pub key: String,
    /// Where it was said.
    pub room: RoomId,
    /// What it is now. Has a `base`, unless it was asked for by key.
    pub folded: Folded,
}

/// Which messages of a room are wanted.
#[derive(Debug, Clone, Default)]
pub struct Span {
    /// Only those before.
    pub before: Option<Place>,
    /// Only those after.
    pub after: Option<Place>,
}

/// From which end of a span messages are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The oldest first.
    Oldest,
    /// The newest first.
    Newest,
}

/// A search; all that it names must fit.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// In these rooms.
    pub rooms: RoomScope,
    /// Words, or parts of words of scripts without spaces; empty: whatever was said.
    pub text: String,
    /// By this user.
    pub from: Option<String>,
    /// Mentioning this user.
    pub mentions: Option<String>,
    /// Answering the message with this key.
    pub reply_to: Option<String>,
    /// Only messages before.
    pub before: Option<Place>,
    /// At most this many, the newest first.
    pub limit: usize,
}

impl Store {
    /// A store in the configured database. Does not wait for the server.
    ///
    /// # Errors
    /// [`StoreError::Url`].
    pub async fn open(config: &config::Mongodb) -> Result<Self, StoreError> {
        let bad = |error: Error| {
            let text = error.kind.to_string();
            // What it takes for an address may be a part of a password.
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

    /// At most `limit` messages of a room, from one end of a span, in the order of that end; and whether these are all.
    /// Large ones are fewer than `limit`, and one at least.
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

    /// The documents of the first of these keys, as far as they exist, also those of which only changes are known; and of how
    /// many keys: of fewer than all where they are large.
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
            // They come in no order: so fewer are asked for.
            if cut && part > 1 {
                part = part.div_ceil(4);
                continue;
            }
            looked += asked.len();
            found = documents;
        }
        Ok((found, looked))
    }

    /// The documents of these keys, as far as they exist; also those of which only changes are known.
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

    /// The place of the room's message nearest to a position of a stream: the first at it or after it (`End::Oldest`), or
    /// the last at it or before it (`End::Newest`).
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

    /// Messages that fit a search, the newest first; and the place from which to go on (`before`), if there may be more. A
    /// search that finds little in much gives what it found within a bounded time, which may be nothing, and where to go on.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Query`] before MongoDB is asked.
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
            after: None,
        };
        for round in 0..SEARCH_ROUNDS {
            let fetched = search
                .limit
                .clamp(*SEARCH_ROUND.start(), *SEARCH_ROUND.end());
            let candidates = query::search(search, &sought, &span, fetched, walk);
            let left = deadline.saturating_duration_since(Instant::now());
            let (candidates, cut) = match self.documents(candidates, left).await {
                // There is something to show, and the rest can be asked for.
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

    /// Whether a room is searched by looking at all of it. The index of words has those of all rooms together, by time: made
    /// room by room each message would change it in a dozen places more, at several times the cost of all else that is
    /// written.
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

    /// What a query finds, and whether that is only the first of it, because it is large.
    async fn find(
        &self,
        query: query::Query,
        limit: Duration,
    ) -> Result<(Vec<RawDocumentBuf>, bool), StoreError> {
        // For MongoDB no limit is no limit.
        if query.limit == 0 {
            return Ok((Vec::new(), false));
        }
        let mut options = FindOptions::default();
        options.sort = Some(query.sort);
        options.limit = Some(i64::try_from(query.limit).unwrap_or(i64::MAX));
        // All in one answer, as far as its 16 MiB go.
        options.batch_size = Some(u32::try_from(query.limit).unwrap_or(u32::MAX));
        // For it no time is no limit either.
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

/// Waits for MongoDB, but not for ever.
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

/// What an error of the driver says to a person.
fn unavailable(error: &Error) -> StoreError {
    StoreError::Unavailable(match error.kind.as_ref() {
        ErrorKind::Command(error) => format!("{} (code {})", error.message, error.code),
        kind => kind.to_string(),
    })
}
