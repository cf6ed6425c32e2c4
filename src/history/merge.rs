//! What a room's history is: MongoDB's documents, and what the stream has besides.
//!
//! Pure: [`Side`] says what it needs to know next, and is told. So a test can play MongoDB.
//!
//! # Invariants
//! - Everything of the stream up to a floor is in MongoDB; what is above may or may not be. The tail is what the stream has
//!   above the floor, read after the floor was known and before MongoDB is asked. So the union, by key and folded, is what
//!   was said up to the moment at which the tail was read; whatever MongoDB has from after that moment is left out, since
//!   something in front of it may not be there yet.
//! - With several origins there is a tail of each stream, joined into one. Each speaks for its own origin, and what lies beyond
//!   the end of one that is only a part is not told, of whatever origin: something of that one's may lie before it.
//! - A side is right as far as both were read ([`Side::found`]), and nothing beyond is told.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
};

use crate::{
    model::{Epoch, Place, Region},
    store::{Document, End, Entry, Folded, Span, What},
};

/// What the streams of all origins say of a room above their floors.
#[derive(Debug)]
pub(super) struct Tail {
    speaks_for: Vec<Stream>,
    /// What was said of each message, by key.
    about: HashMap<String, Vec<Entry>>,
    /// The first place of each message.
    messages: BTreeMap<Place, String>,
    /// The place of each entry.
    places: HashMap<Position, Place>,
    /// In front of this place is more that is neither here nor surely in MongoDB.
    begins: Option<Place>,
    /// Behind its end is more.
    pub(super) more: bool,
}

impl Tail {
    /// What a stream says above a floor. `newest`: a sequence that it had reached before it was read, or the floor.
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

    /// What this stream and another one say together.
    pub(super) fn join(mut self, other: Self) -> Self {
        let mut first: HashMap<String, Place> = HashMap::new();
        for (place, key) in self.messages.into_iter().chain(other.messages) {
            match first.get_mut(&key) {
                // The same message, published in two regions: the first counts, as in MongoDB.
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
        // In front of either's beginning something may be missing.
        self.begins = self.begins.max(other.begins);
        self.more |= other.more;
        self
    }

    /// A tail that is only a part: what is in front of its first message may be nowhere.
    pub(super) fn cut_off(mut self) -> Self {
        self.begins = self.messages.keys().next().cloned();
        self
    }

    /// A tail of one stream that is only a part: it ends at `horizon`, and there is more behind.
    pub(super) fn ends_at(&mut self, horizon: u64) {
        let last = self.messages.keys().next_back();
        for stream in &mut self.speaks_for {
            stream.horizon = horizon;
            stream.ends = last.cloned();
        }
        self.more = true;
    }

    /// Whether there is something in front of it that is neither here nor surely in MongoDB.
    pub(super) fn is_cut_off(&self) -> bool {
        self.begins.is_some()
    }

    /// Adds what the stream says of a message.
    pub(super) fn fold(&self, key: &str, folded: &mut Folded) {
        for entry in self.about.get(key).into_iter().flatten() {
            folded.apply(entry);
        }
    }

    /// The place of what has this sequence, and whether that is a message.
    pub(super) fn at(&self, origin: &Region, epoch: Epoch, seq: u64) -> Option<(Place, bool)> {
        let place = self.places.get(&(origin.clone(), epoch, seq))?;
        Some((place.clone(), self.messages.contains_key(place)))
    }

    /// Whether something that lies before the place may be missing: of the stream that it is of, or of another one.
    fn is_too_new(&self, place: &Place) -> bool {
        self.speaks_for.iter().any(|stream| {
            if (&place.origin, place.epoch) == (&stream.origin, stream.epoch) {
                place.seq > stream.horizon
            } else {
                stream.ends.as_ref().is_some_and(|ends| place > ends)
            }
        })
    }

    /// The first of the places at which a part ends.
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
    /// The newest sequence that the tail speaks for.
    horizon: u64,
    /// Where the tail ends, if there is more behind.
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

/// The messages on one side of a place, the nearest first.
#[derive(Debug)]
pub(super) struct Side<'t> {
    tail: &'t Tail,
    /// `Newest`: those before the place. `Oldest`: those at it and after it.
    end: End,
    /// `None`: from the end of the log.
    split: Option<Place>,
    wanted: usize,
    /// The tail's messages on this side, the nearest first.
    keys: Vec<(&'t Place, &'t str)>,
    /// How many of them are known.
    looked: usize,
    read: Read,
    known: HashMap<String, Folded>,
    /// MongoDB told less than it was asked, because documents are large: what it told is enough for a page.
    short: bool,
}

/// What MongoDB is to be asked.
#[derive(Debug)]
pub(super) struct Ask {
    /// For documents from an end of a span.
    pub(super) page: Option<Span>,
    /// At most this many.
    pub(super) limit: usize,
    /// And for the documents of these messages.
    pub(super) keys: Vec<String>,
}

/// What MongoDB says.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Documents in the order of the end, at least one if there are any.
    pub(super) page: Vec<Document>,
    /// There are no others on this side.
    pub(super) all: bool,
    /// The documents of the first of the keys, as far as there are any.
    pub(super) of_keys: Vec<Document>,
    /// Of how many keys: of one at least.
    pub(super) looked: usize,
}

impl<'t> Side<'t> {
    /// The side of `split` to which `end` leads, of which `wanted` messages are wanted.
    pub(super) fn new(tail: &'t Tail, end: End, split: Option<Place>, wanted: usize) -> Self {
        let all = (Bound::Unbounded, Bound::Unbounded);
        let messages = |range: (Bound<Place>, Bound<Place>)| {
            let range = tail.messages.range(range);
            range.map(|(place, key)| (place, key.as_str()))
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
            keys,
            looked: 0,
            read: Read::Nothing,
            known: HashMap::new(),
            short: false,
        }
    }

    /// The end from which documents are to be taken.
    pub(super) fn end(&self) -> End {
        self.end
    }

    /// What it has to know next; `None`: it knows enough.
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
        let page = from.map(|from| match self.end {
            End::Newest => Span {
                before: from,
                after: None,
            },
            // What is at the split belongs to this side, and what was read does not come again.
            End::Oldest => Span {
                before: None,
                after: from.map(|place| match self.read {
                    Read::To(_) => place,
                    Read::Nothing | Read::All => Place {
                        seq: place.seq.saturating_sub(1),
                        ..place
                    },
                }),
            },
        });
        let keys = self.keys.iter().skip(self.looked).take(self.wanted);
        Some(Ask {
            page,
            limit: self.wanted,
            keys: keys.map(|(_, key)| (*key).to_owned()).collect(),
        })
    }

    /// Whether all is known up to where the tail is cut off: what is beyond is not told anyway.
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

    /// Takes the answer.
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

    /// Whether there may be more than was found, although it is less than was wanted.
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

    /// The messages of this side, the nearest first, as far as nothing between them can be missing.
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
            .filter_map(|folded| Some((&folded.base.as_ref()?.place, folded)))
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

#[cfg(test)]
mod tests;
