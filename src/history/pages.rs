//! Pages of rooms, made from MongoDB and the streams, or from the streams alone.

use std::{cmp::Ordering, collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::{
    ask::{Asked, Failed, read_side, replies},
    entry::key_of_base,
    merge::{Side, Tail},
    question::{At, PageAnchor, PageAnswer, PageRequest, SearchAnswer, SearchRequest},
    show,
    tail::{Log, Part, RoomLog, Tails},
};
use crate::{
    bus::{Connection, Origins, Reader},
    config::Config,
    model::{Cursor, Epoch, Place, Position, RoomId},
    protocol::{ErrorCode, Refused},
    runtime::unix_ms,
    store::{Document, End, Folded, Search, Store},
};

/// Largest list of messages in one answer, unless a single message is larger. NATS carries 1 MiB.
const MAX_BYTES: usize = 512 * 1024;

/// After a failure, MongoDB is not asked for this long. Meanwhile pages are made from the streams at once.
const SPARED: Duration = Duration::from_secs(1);

/// Messages of the streams that are looked through for a page of a thread, where not all of them can be.
const LOOKED_THROUGH: usize = 1000;

/// Later than every message.
const END_OF_TIME: u64 = (1 << 44) - 1;

/// Reads the history of the region's rooms.
#[derive(Debug)]
pub struct Pages {
    log: Log,
    store: Option<Store>,
    /// Timeout of one answer of MongoDB.
    patience: Duration,
    /// When MongoDB last failed.
    failed: Mutex<Option<Instant>>,
    /// Whether messages are shown as in an export.
    for_export: bool,
    /// `history_keep` of the namespaces that have one.
    keep: HashMap<String, Duration>,
}

/// The resolved position of a page.
#[derive(Debug)]
struct Split {
    /// `None`: an end of the log.
    place: Option<Place>,
    /// Messages wanted before it, and from it on.
    left: usize,
    right: usize,
    /// Whether a message is known to be before it, or from it on.
    is_left: bool,
    is_right: bool,
}

impl Pages {
    /// Reads over `reader`. Without a store, pages are made from the streams alone.
    #[must_use]
    pub fn new(
        reader: Reader,
        origins: Arc<Origins>,
        store: Option<Store>,
        config: &Config,
    ) -> Self {
        Self {
            log: Log::new(reader, origins, config),
            store,
            patience: config.mongodb.read_timeout,
            failed: Mutex::default(),
            for_export: false,
            keep: config
                .kept_for_a_time()
                .map(|(name, keep)| (name.to_owned(), keep))
                .collect(),
        }
    }

    /// The same pages with the lines of an export as their messages.
    #[must_use]
    pub(super) fn for_export(self) -> Self {
        Self {
            for_export: true,
            ..self
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        self.log.connection()
    }

    pub(super) fn origins(&self) -> &Origins {
        self.log.origins()
    }

    /// The store, unless it failed a moment ago.
    fn store(&self) -> Option<Asked<'_>> {
        let store = self.store.as_ref()?;
        let now = Instant::now();
        let failed = *self.failed.lock();
        let spared = failed.is_some_and(|failed| now.duration_since(failed) < SPARED);
        (!spared).then(|| Asked {
            store,
            deadline: now + self.patience,
        })
    }

    /// A place before everything of a room that is still shown; `None` if everything is. What is older may wait in
    /// MongoDB to be removed.
    fn kept_after(&self, room: &RoomId) -> Option<Place> {
        let keep = self.keep.get(room.namespace())?.as_millis();
        let keep = u64::try_from(keep).unwrap_or(u64::MAX);
        Some(Place {
            ts: unix_ms().saturating_sub(keep),
            origin: self.origins().own().origin().clone(),
            epoch: Epoch::parse("0").expect("a digit"),
            seq: 0,
        })
    }

    fn note_failure(&self, problem: &str) {
        *self.failed.lock() = Some(Instant::now());
        tracing::warn!(problem, "history is read from the streams alone");
    }

    /// Makes a page.
    ///
    /// # Errors
    /// `bad_id`: no such message, also that of `thread`. `bad_cursor`: a cursor of an unknown epoch. `unavailable`.
    pub async fn page(&self, request: &PageRequest) -> Result<PageAnswer, Refused> {
        if let Some(asked) = self.store() {
            match self.of_both(request, asked).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Refused(refusal)) => return Err(refusal),
                Err(Failed::Store(problem)) => self.note_failure(&problem),
                Err(Failed::Stream(error)) => {
                    return Err(Refused::new(ErrorCode::Unavailable, error.to_string()));
                }
            }
        }
        match self.of_stream(request).await {
            Ok(answer) => Ok(answer),
            Err(Failed::Refused(refusal)) => Err(refusal),
            Err(Failed::Store(problem)) => Err(Refused::new(ErrorCode::Unavailable, problem)),
            Err(Failed::Stream(error)) => {
                Err(Refused::new(ErrorCode::Unavailable, error.to_string()))
            }
        }
    }

    /// Makes a page from MongoDB and from the streams above their floors. The order matters: floors, streams, MongoDB.
    async fn of_both(&self, request: &PageRequest, asked: Asked<'_>) -> Result<PageAnswer, Failed> {
        let mut log = self.log.room(&request.room);
        log.floors().await;
        // If the own stream can't be read, the page is made from MongoDB alone and is partial.
        let (tail, complete) = match log.tail().await {
            Ok((Tails::All(tail), complete)) => (Some(tail), complete),
            Ok((Tails::TooLong, _)) => (None, false),
            Err(error) => {
                tracing::debug!(%error, "history is read from MongoDB alone");
                (Some(log.nothing()), false)
            }
        };
        let split = self
            .split(request, &mut log, tail.as_ref(), Some(asked))
            .await?;
        let tail = match tail {
            Some(tail) => tail,
            None => log.part(&part_for(&split, request)).await?,
        };
        self.fill(request, &tail, &split, Some(asked), !complete)
            .await
    }

    /// Makes a page from the streams alone.
    async fn of_stream(&self, request: &PageRequest) -> Result<PageAnswer, Failed> {
        let mut log = self.log.room(&request.room);
        log.look().await;
        let split = self.split(request, &mut log, None, None).await?;
        let tail = log.part(&part_for(&split, request)).await?;
        self.fill(request, &tail, &split, None, true).await
    }

    /// Resolves the position of the page.
    async fn split(
        &self,
        request: &PageRequest,
        log: &mut RoomLog<'_>,
        tail: Option<&Tail>,
        asked: Option<Asked<'_>>,
    ) -> Result<Split, Failed> {
        let limit = request.limit;
        let (at, left, right) = match &request.anchor {
            PageAnchor::Newest => (None, limit, 0),
            PageAnchor::Oldest => (None, 0, limit),
            PageAnchor::Before(at) => (Some(at), limit, 0),
            PageAnchor::After(at) => (Some(at), 0, limit),
            // If one side has less than its half, the other side fills the page.
            PageAnchor::Around(at) => (Some(at), limit, limit),
        };
        let Some(at) = at else {
            return Ok(Split {
                place: None,
                left,
                right,
                is_left: false,
                is_right: false,
            });
        };
        let is_after = matches!(request.anchor, PageAnchor::After(_));
        let (mut place, is_message) = match at {
            At::Key(key) => (
                self.place_of(key, &request.room, log, tail, asked).await?,
                true,
            ),
            At::Cursor(text) => {
                let cursor: Cursor = text.parse().map_err(|error: crate::model::BadCursor| {
                    Failed::Refused(Refused::new(ErrorCode::BadCursor, error.to_string()))
                })?;
                self.place_at(&cursor, &request.room, is_after, log, tail, asked)
                    .await?
            }
        };
        if is_after {
            place.seq = place.seq.saturating_add(1);
        }
        // What a page of a thread begins at need not be an answer.
        let is_shown = is_message && request.thread.is_none();
        Ok(Split {
            place: Some(place),
            left,
            right,
            is_left: is_shown && is_after,
            is_right: is_shown && !is_after,
        })
    }

    /// The place of a message.
    async fn place_of(
        &self,
        key: &str,
        room: &RoomId,
        log: &RoomLog<'_>,
        tail: Option<&Tail>,
        asked: Option<Asked<'_>>,
    ) -> Result<Place, Failed> {
        if let Some(place) = known(key, tail, asked).await?
            && Some(&place) > self.kept_after(room).as_ref()
        {
            return Ok(place);
        }
        if tail.is_none()
            && let Some(place) = log.find(key).await?
        {
            return Ok(place);
        }
        Err(if asked.is_some() {
            no_message(key, room)
        } else {
            let text = format!("the message {:?} can't be looked for now", name(key));
            Failed::Refused(Refused::new(ErrorCode::Unavailable, text))
        })
    }

    /// The place that a cursor means, and whether a message is there. Of the places at several origins, the first one
    /// (`first`) or the last.
    async fn place_at(
        &self,
        cursor: &Cursor,
        room: &RoomId,
        first: bool,
        log: &mut RoomLog<'_>,
        tail: Option<&Tail>,
        asked: Option<Asked<'_>>,
    ) -> Result<(Place, bool), Failed> {
        let mut found: Option<(Place, bool)> = None;
        for position in cursor.positions() {
            let place = self.place_of_position(position, room, log, tail, asked);
            let Some(place) = place.await? else { continue };
            let better = found.as_ref().is_none_or(|(known, _)| {
                let order = place.0.cmp(known);
                order
                    == if first {
                        Ordering::Less
                    } else {
                        Ordering::Greater
                    }
            });
            if better {
                found = Some(place);
            }
        }
        // All that its log had may have been removed, so nothing is left before it.
        if let (None, Some(position)) = (&found, cursor.positions().first())
            && asked.is_some()
            && self.keep.contains_key(room.namespace())
        {
            let place = Place {
                ts: 0,
                origin: position.origin.clone(),
                epoch: position.epoch,
                seq: position.seq,
            };
            return Ok((place, false));
        }
        found.ok_or_else(|| {
            Failed::Refused(if asked.is_some() {
                let text = format!("the cursor {cursor} is of no log that {room} has or had");
                Refused::new(ErrorCode::BadCursor, text)
            } else {
                let text = format!("where the cursor {cursor} stands can't be looked for now");
                Refused::new(ErrorCode::Unavailable, text)
            })
        })
    }

    /// The place of a position, and whether a message is there; `None` if its epoch is not known.
    async fn place_of_position(
        &self,
        position: &Position,
        room: &RoomId,
        log: &mut RoomLog<'_>,
        tail: Option<&Tail>,
        asked: Option<Asked<'_>>,
    ) -> Result<Option<(Place, bool)>, Failed> {
        let seq = position.seq;
        if log.of(position).is_none() && asked.is_none() {
            log.look().await;
        }
        let own = log.of(position);
        let is_own = own.is_some();
        if is_own
            && let Some(known) =
                tail.and_then(|tail| tail.at(&position.origin, position.epoch, seq))
        {
            return Ok(Some(known));
        }
        // The position may hold no message of this room. Then the time of the next one is used, which gives a place
        // with the same neighbours.
        let next = match own {
            Some(own) => own.next(seq).await,
            None => Ok(None),
        };
        let (next, is_read) = match (next, asked) {
            (Ok(next), _) => (next, true),
            (Err(_unreadable), Some(_)) => (None, false),
            (Err(error), None) => return Err(error.into()),
        };
        if let (Some(own), Some(record)) = (own, &next)
            && record.seq == seq
        {
            let is_message = record.class == crate::model::Class::Msg && record.kind.is_none();
            return Ok(Some((own.place(seq, record.ts), is_message)));
        }
        let mut times: Vec<u64> = next.iter().map(|record| record.ts).collect();
        let mut is_message = false;
        if let Some(asked) = asked {
            let store = asked.store;
            let later = asked.within(store.nearest(room, position, End::Oldest));
            if let Some(later) = later.await? {
                is_message = later.seq == seq;
                times.push(later.ts);
            } else if !is_own || !is_read {
                let earlier = asked.within(store.nearest(room, position, End::Newest));
                times.extend(earlier.await?.map(|earlier| earlier.ts));
            }
        }
        // Nothing in this log comes after the position.
        if is_own && times.is_empty() {
            times.push(END_OF_TIME);
        }
        Ok(times.into_iter().min().map(|ts| {
            let place = Place {
                ts,
                origin: position.origin.clone(),
                epoch: position.epoch,
                seq,
            };
            (place, is_message)
        }))
    }

    /// Fills the page from the tail and MongoDB.
    async fn fill(
        &self,
        request: &PageRequest,
        tail: &Tail,
        split: &Split,
        asked: Option<Asked<'_>>,
        partial: bool,
    ) -> Result<PageAnswer, Failed> {
        let room = &request.room;
        let (left, right) = wanted(split, request.limit);
        let at = || split.place.clone();
        let thread = request.thread.as_deref();
        let mut before = Side::new(tail, End::Newest, at(), left, thread);
        let mut behind = Side::new(tail, End::Oldest, at(), right, thread);
        let kept_after = self.kept_after(room);
        let kept_after = kept_after.as_ref();
        tokio::try_join!(
            read_side(&mut before, room, asked, kept_after),
            read_side(&mut behind, room, asked, kept_after)
        )?;
        let (short_left, short_right) = (before.is_short(), behind.is_short());
        let (before, behind) = (before.found(), behind.found());
        // A thread without answers may be that of a message that does not exist.
        if let (Some(first), Some(_), false) = (thread, asked, partial)
            && before.is_empty()
            && behind.is_empty()
            && known(first, Some(tail), asked).await?.is_none()
        {
            return Err(no_message(first, room));
        }
        let (most_left, most_right) = share(split, before.len(), behind.len(), request.limit);
        let shown = before.iter().take(most_left);
        let shown = shown.chain(behind.iter().take(most_right));
        let replies = replies(asked, room, tail, shown.copied()).await?;
        let mut messages: Vec<(bool, &Folded, Box<RawValue>)> = Vec::new();
        let (mut lefts, mut rights, mut bytes) = (0, 0, 0);
        // From the middle outwards: what does not fit is the part furthest away.
        while lefts < most_left || rights < most_right {
            let to_right = rights < most_right && (rights <= lefts || lefts >= most_left);
            let next = if to_right {
                behind.get(rights)
            } else {
                before.get(lefts)
            };
            let Some(folded) = next else { break };
            let Some(base) = &folded.base else { break };
            let replies = replies.get(&key_of_base(room, base));
            let json = match self.for_export {
                true => show::line(room, base, folded),
                false => show::message(None, base, folded, replies),
            };
            let json = json.map_err(|error| {
                Failed::Refused(Refused::new(ErrorCode::Internal, error.to_string()))
            })?;
            if bytes > 0 && bytes + json.get().len() > MAX_BYTES {
                break;
            }
            bytes += json.get().len() + 1;
            messages.push((to_right, folded, json));
            if to_right {
                rights += 1;
            } else {
                lefts += 1;
            }
        }
        // The messages on the left were collected newest first.
        messages.sort_by_key(|(to_right, ..)| *to_right);
        messages.get_mut(..lefts).unwrap_or_default().reverse();
        let cursor = |at: Option<&(bool, &Folded, Box<RawValue>)>| {
            let base = at?.1.base.as_ref()?;
            Some(show::cursor(base).to_string())
        };
        let is_cut = tail.is_cut_off() || asked.is_none();
        let more_left = before.len() > lefts || split.is_left || is_cut || short_left;
        let is_behind = split.is_right && right == 0 || short_right;
        let more_right = behind.len() > rights || is_behind || tail.more;
        let mut prev = cursor(messages.first()).filter(|_| more_left);
        let mut next = cursor(messages.last()).filter(|_| more_right);
        if thread.is_some() {
            // In the part of the streams that was read there may be no answer: a page goes on where that ends.
            let further = |end, is_further: fn(&Place, &Place) -> bool| {
                let (place, fingerprint) = tail.edge(end)?;
                let split = split.place.as_ref();
                let goes_on = split.is_none_or(|split| is_further(place, split));
                goes_on.then(|| Cursor::single(place.position(fingerprint)).to_string())
            };
            if is_cut && split.left > 0 && before.len() <= lefts {
                prev = further(End::Oldest, |place, split| place < split);
            }
            if tail.more && split.right > 0 && behind.len() <= rights {
                next = further(End::Newest, |place, split| place >= split);
            }
        }
        Ok(PageAnswer {
            prev,
            next,
            messages: messages.into_iter().map(|(.., json)| json).collect(),
            partial,
        })
    }

    /// Searches MongoDB.
    ///
    /// # Errors
    /// `bad_cursor` if `before` is not from a search; `bad_request` if the text can't be searched for; `unavailable`.
    pub async fn search(&self, request: SearchRequest) -> Result<SearchAnswer, Refused> {
        let unavailable = |problem: String| Refused::new(ErrorCode::Unavailable, problem);
        let away = || unavailable("MongoDB does not answer".to_owned());
        let asked = self.store().ok_or_else(away)?;
        let before = request.before.map(|text| text.parse::<Place>());
        let search = Search {
            rooms: request.rooms,
            text: request.text,
            from: request.from,
            mentions: request.mentions,
            reply_to: request.reply_to,
            before: before.transpose().map_err(|error| {
                Refused::new(ErrorCode::BadCursor, format!("before: {error} of a search"))
            })?,
            limit: request.limit,
        };
        let found = asked.within(asked.store.search(&search)).await;
        let (documents, mut next) = match found {
            Ok(found) => found,
            Err(Failed::Store(problem)) => {
                *self.failed.lock() = Some(Instant::now());
                tracing::warn!(problem, "a search failed");
                return Err(away());
            }
            Err(Failed::Refused(refusal)) => return Err(refusal),
            Err(Failed::Stream(error)) => return Err(unavailable(error.to_string())),
        };
        let mut messages = Vec::new();
        let mut bytes = 0;
        let mut last: Option<Place> = None;
        for Document { room, folded, .. } in &documents {
            let Some(base) = &folded.base else { continue };
            if Some(&base.place) <= self.kept_after(room).as_ref() {
                continue;
            }
            let json = show::message(Some(room), base, folded, None)
                .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?;
            if bytes > 0 && bytes + json.get().len() > MAX_BYTES {
                next = last;
                break;
            }
            bytes += json.get().len() + 1;
            messages.push(json);
            last = Some(base.place.clone());
        }
        Ok(SearchAnswer {
            messages,
            next: next.map(|place| place.to_string()),
        })
    }
}

/// The place of a message, as far as MongoDB and the tail know.
async fn known(
    key: &str,
    tail: Option<&Tail>,
    asked: Option<Asked<'_>>,
) -> Result<Option<Place>, Failed> {
    let mut folded = match asked {
        Some(asked) => asked.document(key).await?,
        None => Folded::default(),
    };
    if let Some(tail) = tail {
        tail.fold(key, &mut folded);
    }
    Ok(folded.base.map(|base| base.place))
}

fn no_message(key: &str, room: &RoomId) -> Failed {
    let text = format!("there is no message {:?} in {room}", name(key));
    Failed::Refused(Refused::new(ErrorCode::BadId, text))
}

/// A key without the room.
fn name(key: &str) -> &str {
    key.split_once('/').map_or(key, |(_room, name)| name)
}

/// How many messages must be known on each side: one more than can be shown; on a side that is not shown, one, to know
/// whether there is any.
fn wanted(split: &Split, limit: usize) -> (usize, usize) {
    let side = |wanted: usize, known: bool| match wanted {
        0 => usize::from(split.place.is_some() && !known),
        _ => limit + 1,
    };
    (
        side(split.left, split.is_left),
        side(split.right, split.is_right),
    )
}

/// How many of the messages found on each side are shown.
fn share(split: &Split, left: usize, right: usize, limit: usize) -> (usize, usize) {
    let (left, right) = (left.min(split.left), right.min(split.right));
    // The message at the split belongs to the right side.
    let half = limit - limit / 2;
    let rights = right.min(half.max(limit.saturating_sub(left)));
    (left.min(limit - rights), rights)
}

fn part_for(split: &Split, request: &PageRequest) -> Part {
    let (left, right) = wanted(split, request.limit);
    // Answers may be few among other messages.
    let most = |wanted: usize| match (&request.thread, wanted) {
        (None, _) | (_, 0) => wanted,
        (Some(_), wanted) => wanted.max(LOOKED_THROUGH),
    };
    let (left, right) = (most(left), most(right));
    Part {
        split: split.place.clone(),
        left,
        right,
    }
}
