//! The history of a room, merged from MongoDB's documents and from the streams.
//!
//! This module does no I/O: [`Side`] says what it needs to know next, and is told the answer. A test can simulate
//! MongoDB.
//!
//! # Invariants
//! - MongoDB has every message of a stream up to the floor. Messages above the floor may or may not be there. The tail
//!   is what the stream has above the floor; it is read after the floor and before MongoDB. So the union of both,
//!   folded by key, is the log up to the moment when the tail was read. Documents with later places are left out, since
//!   MongoDB may not yet have an earlier message.
//! - With several origins, the tails of their streams are joined into one. Each tail covers its own origin. If a tail
//!   is only a part, no message behind its end is shown, of any origin: an unread message of that tail may lie before
//!   it.
//! - A side is correct as far as both sources were read ([`Side::found`]), and nothing beyond is shown.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Bound,
};

use crate::{
    model::{Epoch, Fingerprint, Place, Region},
    store::{Change, Document, End, Entry, Folded, Replies, Span, What},
};

/// What the streams of all origins have of a room above their floors.
#[derive(Debug)]
pub(super) struct Tail {
    speaks_for: Vec<Stream>,
    /// The entries of each message, by key.
    about: HashMap<String, Vec<Entry>>,
    /// The first place of each message.
    messages: BTreeMap<Place, String>,
    /// The place of each entry.
    places: HashMap<Position, Place>,
    /// Before this place, messages may exist that are neither in the tail nor certainly in MongoDB.
    begins: Option<Place>,
    /// Whether there are more messages behind its end.
    pub(super) more: bool,
}

impl Tail {
    /// The tail of one stream above its floor. `newest` is a sequence that the stream had reached before it was read,
    /// or the floor.
    pub(super) fn new(origin: Region, epoch: Epoch, newest: u64, entries: Vec<Entry>) -> Self {
        let mut tail = Self {
            speaks_for: Vec::new(),
            about: HashMap::new(),
            messages: BTreeMap::new(),
            places: HashMap::new(),
            begins: None,
            more: false,
        };
        let mut horizon = newest;
        for entry in entries {
            let place = entry.place.clone();
            horizon = horizon.max(place.seq);
            let at = (place.origin.clone(), place.epoch, place.seq);
            tail.places.insert(at, place.clone());
            let key = match &entry.what {
                What::Message { key, .. } => key.clone(),
                What::Change { target, .. } => target.clone(),
                What::Nothing(_) => continue,
            };
            let about = tail.about.entry(key.clone()).or_default();
            let again = about
                .iter()
                .any(|known| matches!(known.what, What::Message { .. }));
            if matches!(entry.what, What::Message { .. }) && !again {
                tail.messages.insert(place, key);
            }
            about.push(entry);
        }
        tail.speaks_for.push(Stream {
            origin,
            epoch,
            horizon,
            ends: None,
        });
        tail
    }

    /// Combines the tails of two streams.
    pub(super) fn join(mut self, other: Self) -> Self {
        let mut first: HashMap<String, Place> = HashMap::new();
        for (place, key) in self.messages.into_iter().chain(other.messages) {
            match first.get_mut(&key) {
                // The same message was published in two regions: the first copy counts, as in MongoDB.
                Some(known) => *known = place.min(known.clone()),
                None => {
                    first.insert(key, place);
                }
            }
        }
        self.messages = first.into_iter().map(|(key, place)| (place, key)).collect();
        for (key, entries) in other.about {
            self.about.entry(key).or_default().extend(entries);
        }
        self.places.extend(other.places);
        self.speaks_for.extend(other.speaks_for);
        // Messages may be missing before either beginning.
        self.begins = self.begins.max(other.begins);
        self.more |= other.more;
        self
    }

    /// Marks the tail as a part: messages before its first one may be missing.
    pub(super) fn cut_off(mut self) -> Self {
        self.begins = self.messages.keys().next().cloned();
        self
    }

    /// Marks the tail of one stream as a part: it ends at `horizon`, and there are more messages behind it.
    pub(super) fn ends_at(&mut self, horizon: u64) {
        let last = self.messages.keys().next_back();
        for stream in &mut self.speaks_for {
            stream.horizon = horizon;
            stream.ends = last.cloned();
        }
        self.more = true;
    }

    /// The keys of messages that the tail has, or the deletions of.
    pub(super) fn touched(&self) -> Vec<String> {
        let counts = |entry: &Entry| match &entry.what {
            What::Message { .. } => true,
            What::Change { change, .. } => *change == Change::Delete,
            What::Nothing(_) => false,
        };
        let touched = self.about.iter();
        let touched = touched.filter(|(_, entries)| entries.iter().any(counts));
        touched.map(|(key, _)| key.clone()).collect()
    }

    /// Whether the message with the key `key` may be an answer to the one with the key `first`.
    fn answers(&self, key: &str, first: &str) -> bool {
        let mut entries = self.about.get(key).into_iter().flatten();
        entries.any(|entry| match &entry.what {
            What::Message { said, .. } => said.reply_key.as_deref() == Some(first),
            _ => false,
        })
    }

    /// The position of the message at which the tail begins to be complete (`End::Oldest`), or up to which it is.
    pub(super) fn edge(&self, end: End) -> Option<(&Place, Fingerprint)> {
        let (place, key) = match (end, &self.begins, self.ends()) {
            (End::Oldest, Some(begins), _) => self.messages.range(begins..).next(),
            (End::Oldest, None, _) => self.messages.first_key_value(),
            (End::Newest, _, Some(ends)) => self.messages.range(..=ends).next_back(),
            (End::Newest, _, None) => self.messages.last_key_value(),
        }?;
        let mut entries = self.about.get(key).into_iter().flatten();
        entries.find_map(|entry| match &entry.what {
            What::Message { said, .. } if entry.place == *place => {
                Some((place, Fingerprint(said.fingerprint)))
            }
            _ => None,
        })
    }

    /// Whether messages before the tail may be missing, here and in MongoDB.
    pub(super) fn is_cut_off(&self) -> bool {
        self.begins.is_some()
    }

    /// Applies the entries of a message from the tail.
    pub(super) fn fold(&self, key: &str, folded: &mut Folded) {
        for entry in self.about.get(key).into_iter().flatten() {
            folded.apply(entry);
        }
    }

    /// The place of an entry with this sequence, and whether it is a message.
    pub(super) fn at(&self, origin: &Region, epoch: Epoch, seq: u64) -> Option<(Place, bool)> {
        let place = self.places.get(&(origin.clone(), epoch, seq))?;
        Some((place.clone(), self.messages.contains_key(place)))
    }

    /// Whether a message before this place may be missing, in its own stream or in another one.
    fn is_too_new(&self, place: &Place) -> bool {
        self.speaks_for.iter().any(|stream| {
            if (&place.origin, place.epoch) == (&stream.origin, stream.epoch) {
                place.seq > stream.horizon
            } else {
                stream.ends.as_ref().is_some_and(|ends| place > ends)
            }
        })
    }

    /// The first of the places at which a partial tail ends.
    fn ends(&self) -> Option<&Place> {
        let ends = self
            .speaks_for
            .iter()
            .filter_map(|stream| stream.ends.as_ref());
        ends.min()
    }
}

/// One incarnation of an origin's stream.
#[derive(Debug)]
struct Stream {
    origin: Region,
    epoch: Epoch,
    /// The newest sequence that the tail covers.
    horizon: u64,
    /// Where the tail ends, if there are more messages behind it.
    ends: Option<Place>,
}

/// A sequence of a stream.
type Position = (Region, Epoch, u64);

/// How far MongoDB was read.
#[derive(Debug, PartialEq)]
enum Read {
    Nothing,
    To(Place),
    All,
}

/// The messages on one side of a place, nearest first.
#[derive(Debug)]
pub(super) struct Side<'t> {
    tail: &'t Tail,
    /// `Newest`: messages before the place. `Oldest`: messages at the place and after it.
    end: End,
    /// `None`: the end of the log.
    split: Option<Place>,
    wanted: usize,
    /// Only answers to the message with this key.
    thread: Option<&'t str>,
    /// The tail's messages on this side, nearest first.
    keys: Vec<(&'t Place, &'t str)>,
    /// For how many of these the documents are known.
    looked: usize,
    read: Read,
    known: HashMap<String, Folded>,
    /// MongoDB returned less than was requested, because the documents are large. It is enough for a page.
    short: bool,
}

/// The next request to MongoDB.
#[derive(Debug)]
pub(super) struct Ask {
    /// The span of documents to read, if any.
    pub(super) page: Option<Span>,
    /// The maximum number of documents of that span.
    pub(super) limit: usize,
    /// The keys of documents to read besides.
    pub(super) keys: Vec<String>,
}

/// The answer of MongoDB.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The documents of the span, in the order of the end: at least one if there are any.
    pub(super) page: Vec<Document>,
    /// Whether there are no others on this side.
    pub(super) all: bool,
    /// The documents of the first of the keys. A key may have no document.
    pub(super) of_keys: Vec<Document>,
    /// How many of the keys were looked up: at least one.
    pub(super) looked: usize,
}

impl<'t> Side<'t> {
    /// The messages before `split` or from it on, depending on `end`. `wanted` of them are needed.
    /// With `thread`, only answers to the message with that key are.
    pub(super) fn new(
        tail: &'t Tail,
        end: End,
        split: Option<Place>,
        wanted: usize,
        thread: Option<&'t str>,
    ) -> Self {
        let all = (Bound::Unbounded, Bound::Unbounded);
        let messages = |range: (Bound<Place>, Bound<Place>)| {
            let range = tail.messages.range(range);
            let range = range.map(|(place, key)| (place, key.as_str()));
            range.filter(|(_, key)| thread.is_none_or(|first| tail.answers(key, first)))
        };
        let keys = match (end, &split) {
            (End::Newest, None) => messages(all).rev().collect(),
            (End::Newest, Some(split)) => {
                messages((Bound::Unbounded, Bound::Excluded(split.clone())))
                    .rev()
                    .collect()
            }
            (End::Oldest, None) => messages(all).collect(),
            (End::Oldest, Some(split)) => {
                messages((Bound::Included(split.clone()), Bound::Unbounded)).collect()
            }
        };
        Self {
            tail,
            end,
            split,
            wanted,
            thread,
            keys,
            looked: 0,
            read: Read::Nothing,
            known: HashMap::new(),
            short: false,
        }
    }

    /// The end from which documents are read.
    pub(super) fn end(&self) -> End {
        self.end
    }

    /// What must be known next; `None` if enough is known.
    pub(super) fn ask(&self) -> Option<Ask> {
        let all = self.read == Read::All && self.looked == self.keys.len();
        if all || self.is_cut_off() || self.wanted == 0 {
            return None;
        }
        let found = self.found().len();
        if found >= self.wanted || (self.short && found > 0) {
            return None;
        }
        let from = match &self.read {
            Read::All => None,
            Read::Nothing => Some(self.split.clone()),
            Read::To(place) => Some(Some(place.clone())),
        };
        let page = from.map(|from| {
            let thread = self.thread.map(str::to_owned);
            match self.end {
                End::Newest => Span {
                    before: from,
                    after: None,
                    thread,
                },
                // The first read includes the split; a later one begins after the last document read.
                End::Oldest => Span {
                    before: None,
                    after: from.map(|place| match self.read {
                        Read::To(_) => place,
                        Read::Nothing | Read::All => Place {
                            seq: place.seq.saturating_sub(1),
                            ..place
                        },
                    }),
                    thread,
                },
            }
        });
        let keys = self.keys.iter().skip(self.looked).take(self.wanted);
        Some(Ask {
            page,
            limit: self.wanted,
            keys: keys.map(|(_, key)| (*key).to_owned()).collect(),
        })
    }

    /// Whether everything is known up to the end of a partial tail. What lies beyond is not shown anyway.
    fn is_cut_off(&self) -> bool {
        let limit = match self.end {
            End::Newest => self.tail.begins.as_ref(),
            End::Oldest => self.tail.ends(),
        };
        let Some(limit) = limit else {
            return false;
        };
        let read = match &self.read {
            Read::Nothing => false,
            Read::To(place) => self.is_within(limit, place),
            Read::All => true,
        };
        read && self.looked == self.keys.len()
    }

    /// Takes the answer to [`Self::ask`].
    pub(super) fn tell(&mut self, ask: &Ask, told: Told) {
        let Told {
            page,
            all,
            of_keys,
            looked,
        } = told;
        self.short |= !all && page.len() < ask.limit || looked < ask.keys.len();
        if ask.page.is_some() {
            let last = page
                .last()
                .and_then(|document| document.folded.base.as_ref());
            self.read = match last {
                Some(base) if !all => Read::To(base.place.clone()),
                _ => Read::All,
            };
        }
        let mut documents: HashMap<String, Folded> = of_keys
            .into_iter()
            .map(|document| (document.key, document.folded))
            .collect();
        for key in ask.keys.iter().take(looked) {
            let mut folded = documents.remove(key).unwrap_or_default();
            self.tail.fold(key, &mut folded);
            self.known.insert(key.clone(), folded);
        }
        self.looked += looked;
        for Document {
            key, mut folded, ..
        } in page
        {
            self.tail.fold(&key, &mut folded);
            self.known.insert(key, folded);
        }
    }

    /// Whether fewer messages were found than wanted, although there may be more.
    pub(super) fn is_short(&self) -> bool {
        self.short && (self.read != Read::All || self.looked < self.keys.len())
    }

    /// Whether `a` is at least as near as `b`.
    fn is_within(&self, a: &Place, b: &Place) -> bool {
        match self.end {
            End::Newest => a >= b,
            End::Oldest => a <= b,
        }
    }

    /// The messages of this side, nearest first, as far as no message between them can be missing.
    pub(super) fn found(&self) -> Vec<&Folded> {
        if self.read == Read::Nothing || (self.looked == 0 && !self.keys.is_empty()) {
            return Vec::new();
        }
        let mut limits: Vec<&Place> = Vec::new();
        if let Read::To(place) = &self.read {
            limits.push(place);
        }
        if self.looked < self.keys.len() {
            limits.extend(self.keys.get(self.looked - 1).map(|(place, _)| *place));
        }
        if self.end == End::Newest {
            limits.extend(&self.tail.begins);
        }
        let here = |place: &Place| match (&self.split, self.end) {
            (None, _) => true,
            (Some(split), End::Newest) => place < split,
            (Some(split), End::Oldest) => place >= split,
        };
        let mut found: Vec<(&Place, &Folded)> = self
            .known
            .values()
            .filter_map(|folded| Some((folded.base.as_ref()?, folded)))
            .filter(|(base, _)| {
                let first = base.said.reply_key.as_deref();
                self.thread.is_none() || first == self.thread
            })
            .map(|(base, folded)| (&base.place, folded))
            .filter(|(place, _)| here(place) && !self.tail.is_too_new(place))
            .filter(|(place, _)| limits.iter().all(|limit| self.is_within(place, limit)))
            .collect();
        found.sort_by(|(a, _), (b, _)| match self.end {
            End::Newest => b.cmp(a),
            End::Oldest => a.cmp(b),
        });
        found.into_iter().map(|(_, folded)| folded).collect()
    }
}

/// Adds the answers of the tail to those that MongoDB has: `found` without the messages that the tail touches, whose
/// documents are `outlines`.
pub(super) fn add_replies(
    tail: &Tail,
    to: &HashSet<&str>,
    mut found: HashMap<String, Replies>,
    outlines: Vec<Document>,
) -> HashMap<String, Replies> {
    let outlines = outlines.into_iter();
    let mut outlines: HashMap<String, Folded> = outlines
        .map(|document| (document.key, document.folded))
        .collect();
    for key in tail.touched() {
        let mut folded = outlines.remove(&key).unwrap_or_default();
        tail.fold(&key, &mut folded);
        let Some(base) = folded.base.filter(|_| folded.deleted.is_none()) else {
            continue;
        };
        if let Some(first) = base.said.reply_key
            && to.contains(first.as_str())
        {
            found.entry(first).or_default().add(&base.place, &key);
        }
    }
    found.retain(|_, replies| replies.count > 0);
    found
}

#[cfg(test)]
mod tests;
