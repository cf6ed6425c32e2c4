//! What a room's history is: MongoDB's documents, and what the stream has besides.
//!
//! Pure: [`Side`] says what it needs to know next, and is told. So a test can play MongoDB.
//!
//! # Invariants
//! - Everything of the stream up to a floor is in MongoDB; what is above may or may not be. The tail is what the stream has
//!   above the floor, read after the floor was known and before MongoDB is asked. So the union, by key and folded, is what
//!   was said up to the moment at which the tail was read; whatever MongoDB has from after that moment is left out, since
//!   something in front of it may not be there yet.
//! - A side is right as far as both were read ([`Side::found`]), and nothing beyond is told.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
};

use crate::{
    model::{Epoch, Place, Region},
    store::{Document, End, Entry, Folded, Span, What},
};

/// What a stream says of a room above a floor.
#[derive(Debug)]
pub(super) struct Tail {
    origin: Region,
    epoch: Epoch,
    /// The newest sequence that it speaks for.
    horizon: u64,
    /// What was said of each message, by key.
    about: HashMap<String, Vec<Entry>>,
    /// The first place of each message.
    messages: BTreeMap<Place, String>,
    /// The place of each entry.
    places: BTreeMap<u64, Place>,
    /// In front of this place is more that is neither here nor surely in MongoDB.
    begins: Option<Place>,
    /// Behind its end is more.
    pub(super) more: bool,
}

impl Tail {
    /// What a stream says above a floor. `newest`: a sequence that it had reached before it was read, or the floor.
    pub(super) fn new(origin: Region, epoch: Epoch, newest: u64, entries: Vec<Entry>) -> Self {
        let mut tail = Self {
            origin,
            epoch,
            horizon: newest,
            about: HashMap::new(),
            messages: BTreeMap::new(),
            places: BTreeMap::new(),
            begins: None,
            more: false,
        };
        for entry in entries {
            let place = entry.place.clone();
            tail.horizon = tail.horizon.max(place.seq);
            tail.places.insert(place.seq, place.clone());
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
        tail
    }

    /// A tail that is only a part: what is in front of its first message may be nowhere.
    pub(super) fn cut_off(mut self) -> Self {
        self.begins = self.messages.keys().next().cloned();
        self
    }

    /// A tail that is only a part: it ends at `horizon`, and there is more behind.
    pub(super) fn ends_at(&mut self, horizon: u64) {
        self.horizon = horizon;
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
    pub(super) fn at(&self, seq: u64) -> Option<(Place, bool)> {
        let place = self.places.get(&seq)?;
        Some((place.clone(), self.messages.contains_key(place)))
    }

    fn is_too_new(&self, place: &Place) -> bool {
        place.seq > self.horizon && (&place.origin, place.epoch) == (&self.origin, self.epoch)
    }
}

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
        }
    }

    /// The end from which documents are to be taken.
    pub(super) fn end(&self) -> End {
        self.end
    }

    /// What it has to know next; `None`: it knows enough.
    pub(super) fn ask(&self) -> Option<Ask> {
        let all = self.read == Read::All && self.looked == self.keys.len();
        if all || self.is_cut_off() || self.wanted == 0 || self.found().len() >= self.wanted {
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
        let (End::Newest, Some(begins)) = (self.end, &self.tail.begins) else {
            return false;
        };
        let read = match &self.read {
            Read::Nothing => false,
            Read::To(place) => place <= begins,
            Read::All => true,
        };
        read && self.looked == self.keys.len()
    }

    /// Takes the answer: a page, in the order of the end, and the documents of the keys as far as there are any.
    pub(super) fn tell(&mut self, ask: &Ask, page: Vec<Document>, of_keys: Vec<Document>) {
        if ask.page.is_some() {
            let last = page
                .last()
                .and_then(|document| document.folded.base.as_ref());
            self.read = match last {
                Some(base) if page.len() >= ask.limit => Read::To(base.place.clone()),
                _ => Read::All,
            };
        }
        let mut documents: HashMap<String, Folded> = of_keys
            .into_iter()
            .map(|document| (document.key, document.folded))
            .collect();
        for key in &ask.keys {
            let mut folded = documents.remove(key).unwrap_or_default();
            self.tail.fold(key, &mut folded);
            self.known.insert(key.clone(), folded);
        }
        self.looked += ask.keys.len();
        for Document {
            key, mut folded, ..
        } in page
        {
            self.tail.fold(&key, &mut folded);
            self.known.insert(key, folded);
        }
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::RoomId,
        store::{Change, Said},
    };

    /// What was said in a room, and what of it is where.
    #[derive(Debug, Clone)]
    struct World {
        /// The whole log, in its order.
        log: Vec<Entry>,
        /// MongoDB has everything up to here …
        floor: u64,
        /// … and these besides.
        written: Vec<bool>,
        /// The stream has lost what is before this.
        first: u64,
        /// The tail was read when this was the newest.
        last: u64,
        /// When the floor was read, it was this.
        newest: u64,
    }

    fn origin() -> Region {
        Region::parse("seoul").unwrap()
    }

    fn epoch() -> Epoch {
        Epoch::parse("k3").unwrap()
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let what = prop_oneof![
            5 => (0..9_u8, "[0-9]").prop_map(|(id, body)| What::Message {
                key: format!("chat:x/kim/{id}"),
                said: Said {
                    id: id.to_string(),
                    fingerprint: 7,
                    body,
                    reply_to: None,
                    reply_key: None,
                    mentions: Vec::new(),
                },
            }),
            2 => (0..9_u8, "[0-9]").prop_map(|(id, body)| What::Change {
                target: format!("chat:x/kim/{id}"),
                change: Change::Edit(body),
            }),
            1 => (0..9_u8).prop_map(|id| What::Change {
                target: format!("chat:x/kim/{id}"),
                change: Change::Delete,
            }),
            1 => Just(What::Nothing("of no interest")),
        ];
        // Sequences have gaps, and several entries can have the same time.
        prop::collection::vec((what, 1..4_u64, 0..2_u64), 0..24).prop_map(|said| {
            let (mut seq, mut ts) = (0, 1000);
            let entries = said.into_iter().map(|(what, step, later)| {
                seq += step;
                ts += later;
                Entry {
                    room: RoomId::parse("chat:x").unwrap(),
                    place: Place {
                        ts,
                        origin: origin(),
                        epoch: epoch(),
                        seq,
                    },
                    from: "kim".to_owned(),
                    what,
                }
            });
            entries.collect()
        })
    }

    fn worlds() -> impl Strategy<Value = World> {
        entries().prop_flat_map(|log| {
            let end = log.last().map_or(0, |entry| entry.place.seq) + 1;
            let written = prop::collection::vec(any::<bool>(), log.len());
            let parts = (0..=end, written, 0..=end, 0..=end, 0..=end);
            parts.prop_map(move |(floor, written, first, newest, last)| World {
                log: log.clone(),
                // Nothing is confirmed that was not said yet, and nothing lost that was just said.
                floor: floor.min(newest).min(last),
                written,
                first: first.min(newest).min(last),
                newest: newest.min(last),
                last,
            })
        })
    }

    impl World {
        fn is_written(&self, at: usize) -> bool {
            let seq = self.log[at].place.seq;
            // What the stream has lost was in MongoDB before.
            seq <= self.floor || seq < self.first || self.written[at]
        }

        fn tail(&self) -> Tail {
            let seen = self.log.iter().filter(|entry| {
                let seq = entry.place.seq;
                seq > self.floor && seq >= self.first && seq <= self.last
            });
            Tail::new(origin(), epoch(), self.newest, seen.cloned().collect())
        }

        fn documents(&self, which: impl Fn(usize) -> bool) -> BTreeMap<String, Folded> {
            let mut documents: BTreeMap<String, Folded> = BTreeMap::new();
            for (_, entry) in self.log.iter().enumerate().filter(|(at, _)| which(*at)) {
                let key = match &entry.what {
                    What::Message { key, .. } => key,
                    What::Change { target, .. } => target,
                    What::Nothing(_) => continue,
                };
                documents.entry(key.clone()).or_default().apply(entry);
            }
            documents
        }

        /// The messages in order, as of the moment at which the tail was read, with all that is known of them.
        fn truth(&self) -> Vec<Folded> {
            let said = |at: usize| self.log[at].place.seq <= self.last;
            let known = self.documents(|at| said(at) || self.is_written(at));
            let mut messages: Vec<Folded> = known
                .into_values()
                .filter(|folded| {
                    let base = folded.base.as_ref();
                    base.is_some_and(|base| base.place.seq <= self.last)
                })
                .collect();
            messages.sort_by(|a, b| place(a).cmp(place(b)));
            messages
        }
    }

    fn place(folded: &Folded) -> &Place {
        &folded.base.as_ref().unwrap().place
    }

    /// Plays MongoDB.
    fn run(side: &mut Side<'_>, documents: &BTreeMap<String, Folded>) {
        let document = |key: &String, folded: &Folded| Document {
            key: key.clone(),
            room: RoomId::parse("chat:x").unwrap(),
            folded: folded.clone(),
        };
        for _ in 0..100 {
            let Some(ask) = side.ask() else { return };
            let mut page: Vec<Document> = Vec::new();
            if let Some(Span { before, after }) = &ask.page {
                let with_base = documents.iter().filter(|(_, folded)| folded.base.is_some());
                let within = with_base.filter(|(_, folded)| {
                    before.as_ref().is_none_or(|before| place(folded) < before)
                        && after.as_ref().is_none_or(|after| place(folded) > after)
                });
                page = within.map(|(key, folded)| document(key, folded)).collect();
                page.sort_by(|a, b| place(&a.folded).cmp(place(&b.folded)));
                if side.end() == End::Newest {
                    page.reverse();
                }
                page.truncate(ask.limit);
            }
            let keys = ask.keys.iter();
            let of_keys = keys.filter_map(|key| Some(document(key, documents.get(key)?)));
            let of_keys = of_keys.collect();
            side.tell(&ask, page, of_keys);
        }
        panic!("it never knows enough");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// However the log is split between MongoDB and the stream: each side of each place begins with the messages that
        /// are nearest to it, without a gap, and none is missing that was wanted.
        #[test]
        fn pages_are_those_of_the_log(world in worlds(), wanted in 1..6_usize) {
            let truth = world.truth();
            let documents = world.documents(|at| world.is_written(at));
            let tail = world.tail();
            let places = world.log.iter().map(|entry| entry.place.clone());
            let behind = places.clone().map(|place| Place { seq: place.seq + 1, ..place });
            for split in places.chain(behind).map(Some).chain([None]) {
                for end in [End::Newest, End::Oldest] {
                    let mut side = Side::new(&tail, end, split.clone(), wanted);
                    run(&mut side, &documents);
                    let here = truth.iter().filter(|folded| match (&split, end) {
                        (None, _) => true,
                        (Some(split), End::Newest) => place(folded) < split,
                        (Some(split), End::Oldest) => place(folded) >= split,
                    });
                    let mut here: Vec<&Folded> = here.collect();
                    if end == End::Newest {
                        here.reverse();
                    }
                    let found = side.found();
                    prop_assert!(found.len() >= wanted.min(here.len()), "{split:?} {end:?}: {found:?}");
                    prop_assert_eq!(&found[..], &here[..found.len()], "{:?} {:?}", split, end);
                }
            }
        }
    }

    #[test]
    fn in_front_of_a_part_of_a_tail_nothing_is_told() {
        let message = |seq: u64, id: &str| Entry {
            room: RoomId::parse("chat:x").unwrap(),
            place: Place {
                ts: 1000 + seq,
                origin: origin(),
                epoch: epoch(),
                seq,
            },
            from: "kim".to_owned(),
            what: What::Message {
                key: format!("chat:x/kim/{id}"),
                said: Said {
                    id: id.to_owned(),
                    fingerprint: 7,
                    body: "1".to_owned(),
                    reply_to: None,
                    reply_key: None,
                    mentions: Vec::new(),
                },
            },
        };
        let mut documents: BTreeMap<String, Folded> = BTreeMap::new();
        for (seq, id) in [(1, "a"), (2, "b"), (3, "c")] {
            let folded = documents.entry(format!("chat:x/kim/{id}")).or_default();
            folded.apply(&message(seq, id));
        }
        // 4 to 6 are neither in MongoDB nor here.
        let entries = vec![message(7, "g"), message(8, "h")];
        let tail = Tail::new(origin(), epoch(), 3, entries).cut_off();
        let mut side = Side::new(&tail, End::Newest, None, 5);
        run(&mut side, &documents);
        let ids: Vec<&str> = side
            .found()
            .into_iter()
            .map(|folded| folded.base.as_ref().unwrap().said.id.as_str())
            .collect();
        assert_eq!(ids, ["h", "g"]);
    }
}
