//! Simulates MongoDB, and compares the pages with the whole log.

use proptest::prelude::*;

use super::*;
use crate::{
    model::RoomId,
    store::{Change, Said},
};

/// The log of a room in one region, and where its entries are stored.
#[derive(Debug, Clone)]
struct World {
    origin: Region,
    /// The whole log, in order.
    log: Vec<Entry>,
    /// MongoDB has everything up to this sequence …
    floor: u64,
    /// … and of the rest, these entries.
    written: Vec<bool>,
    /// The stream has trimmed everything before this sequence.
    first: u64,
    /// The stream's newest sequence when the tail was read.
    last: u64,
    /// The stream's newest sequence when the floor was read.
    newest: u64,
}

fn origin() -> Region {
    Region::parse("seoul").unwrap()
}

fn other() -> Region {
    Region::parse("virginia").unwrap()
}

fn epoch() -> Epoch {
    Epoch::parse("k3").unwrap()
}

fn entries(origin: Region) -> impl Strategy<Value = Vec<Entry>> {
    let what = prop_oneof![
        5 => (0..9_u8, "[0-9]", prop::option::of(0..3_u8)).prop_map(|(id, body, first)| What::Message {
            key: format!("chat:x/kim/{id}"),
            said: Said {
                id: id.to_string(),
                fingerprint: 7,
                body,
                reply_to: None,
                reply_key: first.map(|first| format!("chat:x/kim/{first}")),
                mentions: Vec::new(),
            },
        }),
        2 => (0..9_u8, "[0-9]").prop_map(|(id, body)| What::Change {
            target: format!("chat:x/kim/{id}"),
            change: Change::Edit { body, mentions: None },
        }),
        1 => (0..9_u8).prop_map(|id| What::Change {
            target: format!("chat:x/kim/{id}"),
            change: Change::Delete,
        }),
        1 => Just(What::Nothing("of no interest")),
    ];
    // Sequences have gaps, and several entries can have the same time.
    prop::collection::vec((what, 1..4_u64, 0..2_u64), 0..24).prop_map(move |said| {
        let (mut seq, mut ts) = (0, 1000);
        let entries = said.into_iter().map(|(what, step, later)| {
            seq += step;
            ts += later;
            Entry {
                room: RoomId::parse("chat:x").unwrap(),
                place: Place {
                    ts,
                    origin: origin.clone(),
                    epoch: epoch(),
                    seq,
                },
                original_ts: None,
                from: "kim".to_owned(),
                what,
            }
        });
        entries.collect()
    })
}

fn world(origin: Region) -> impl Strategy<Value = World> {
    entries(origin.clone()).prop_flat_map(move |log| {
        let origin = origin.clone();
        let end = log.last().map_or(0, |entry| entry.place.seq) + 1;
        let written = prop::collection::vec(any::<bool>(), log.len());
        let parts = (0..=end, written, 0..=end, 0..=end, 0..=end);
        parts.prop_map(move |(floor, written, first, newest, last)| World {
            origin: origin.clone(),
            log: log.clone(),
            // The floor never exceeds what was published, and the newest messages are not trimmed.
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
        // Trimmed entries were in MongoDB before.
        seq <= self.floor || seq < self.first || self.written[at]
    }

    fn tail(&self) -> Tail {
        let seen = self.log.iter().filter(|entry| {
            let seq = entry.place.seq;
            seq > self.floor && seq >= self.first && seq <= self.last
        });
        let origin = self.origin.clone();
        Tail::new(origin, epoch(), self.newest, seen.cloned().collect())
    }
}

/// One region, or two. Some messages are published in both.
#[derive(Debug, Clone)]
struct Worlds(Vec<World>);

fn worlds() -> impl Strategy<Value = Worlds> {
    let two = (world(origin()), world(other())).prop_map(|(a, b)| Worlds(vec![a, b]));
    prop_oneof![world(origin()).prop_map(|a| Worlds(vec![a])), two]
}

impl Worlds {
    fn tail(&self) -> Tail {
        self.0.iter().map(World::tail).reduce(Tail::join).unwrap()
    }

    fn places(&self) -> Vec<Place> {
        let entries = self.0.iter().flat_map(|world| &world.log);
        entries.map(|entry| entry.place.clone()).collect()
    }

    fn documents(&self, which: impl Fn(&World, usize) -> bool) -> BTreeMap<String, Folded> {
        let mut documents: BTreeMap<String, Folded> = BTreeMap::new();
        let worlds = self.0.iter();
        let entries =
            worlds.flat_map(|world| world.log.iter().enumerate().map(move |e| (world, e)));
        for (_, (_, entry)) in entries.filter(|(world, (at, _))| which(world, *at)) {
            let key = match &entry.what {
                What::Message { key, .. } => key,
                What::Change { target, .. } => target,
                What::Nothing(_) => continue,
            };
            documents.entry(key.clone()).or_default().apply(entry);
        }
        documents
    }

    /// The messages in order at the moment when the tail was read, with everything known of them.
    fn truth(&self) -> Vec<Folded> {
        let said = |world: &World, at: usize| world.log[at].place.seq <= world.last;
        let known = self.documents(|world, at| said(world, at) || world.is_written(at));
        let is_said = |place: &Place| {
            let mut of = self.0.iter().filter(|world| world.origin == place.origin);
            of.any(|world| place.seq <= world.last)
        };
        let mut messages: Vec<Folded> = known
            .into_values()
            .filter(|folded| {
                folded
                    .base
                    .as_ref()
                    .is_some_and(|base| is_said(&base.place))
            })
            .collect();
        messages.sort_by(|a, b| place(a).cmp(place(b)));
        messages
    }
}

fn place(folded: &Folded) -> &Place {
    &folded.base.as_ref().unwrap().place
}

fn reply_key(folded: &Folded) -> Option<&str> {
    folded.base.as_ref()?.said.reply_key.as_deref()
}

/// The answers to each message among documents.
fn replies(documents: &BTreeMap<String, Folded>) -> HashMap<String, Replies> {
    let mut replies: HashMap<String, Replies> = HashMap::new();
    for (key, folded) in documents.iter().filter(|(_, it)| it.deleted.is_none()) {
        if let Some(first) = reply_key(folded) {
            let replies = replies.entry(first.to_owned()).or_default();
            replies.add(place(folded), key);
        }
    }
    replies
}

/// Simulates MongoDB, which returns at most `most` documents at once.
fn run(side: &mut Side<'_>, documents: &BTreeMap<String, Folded>, most: usize) {
    let document = |key: &String, folded: &Folded| Document {
        key: key.clone(),
        room: RoomId::parse("chat:x").unwrap(),
        folded: folded.clone(),
    };
    for _ in 0..100 {
        let Some(ask) = side.ask() else { return };
        let mut page: Vec<Document> = Vec::new();
        if let Some(Span {
            before,
            after,
            thread,
        }) = &ask.page
        {
            let with_base = documents.iter().filter(|(_, folded)| folded.base.is_some());
            let within = with_base
                .filter(|(_, folded)| thread.is_none() || reply_key(folded) == thread.as_deref());
            let within = within.filter(|(_, folded)| {
                before.as_ref().is_none_or(|before| place(folded) < before)
                    && after.as_ref().is_none_or(|after| place(folded) > after)
            });
            page = within.map(|(key, folded)| document(key, folded)).collect();
            page.sort_by(|a, b| place(&a.folded).cmp(place(&b.folded)));
            if side.end() == End::Newest {
                page.reverse();
            }
        }
        let all = page.len() < ask.limit && page.len() <= most;
        page.truncate(ask.limit.min(most));
        let looked = ask.keys.len().min(most);
        let keys = ask.keys.iter().take(looked);
        let of_keys = keys.filter_map(|key| Some(document(key, documents.get(key)?)));
        let told = Told {
            page,
            all,
            of_keys: of_keys.collect(),
            looked,
        };
        side.tell(&ask, told);
    }
    panic!("it never knows enough");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However the log is split between MongoDB and the stream: each side of each place consists of the nearest
    /// messages without a gap, and as many as were wanted.
    #[test]
    fn pages_are_those_of_the_log(worlds in worlds(), wanted in 1..6_usize, most in 1..9_usize) {
        let truth = worlds.truth();
        let documents = worlds.documents(World::is_written);
        let tail = worlds.tail();
        let places = worlds.places().into_iter();
        let behind = places.clone().map(|place| Place { seq: place.seq + 1, ..place });
        for split in places.chain(behind).map(Some).chain([None]) {
            for end in [End::Newest, End::Oldest] {
                for thread in [None, Some("chat:x/kim/0"), Some("chat:x/kim/1")] {
                    let mut side = Side::new(&tail, end, split.clone(), wanted, thread);
                    run(&mut side, &documents, most);
                    let here = truth.iter().filter(|folded| match (&split, end) {
                        (None, _) => true,
                        (Some(split), End::Newest) => place(folded) < split,
                        (Some(split), End::Oldest) => place(folded) >= split,
                    });
                    let here = here.filter(|it| thread.is_none() || reply_key(it) == thread);
                    let mut here: Vec<&Folded> = here.collect();
                    if end == End::Newest {
                        here.reverse();
                    }
                    let found = side.found();
                    // Of large documents fewer are returned, but at least one, and it is known that there are more.
                    let enough = wanted.min(here.len());
                    let enough = if side.is_short() { enough.min(1) } else { enough };
                    prop_assert!(found.len() >= enough, "{split:?} {end:?} {thread:?}: {found:?}");
                    let here = &here[..found.len()];
                    prop_assert_eq!(&found[..], here, "{:?} {:?} {:?}", split, end, thread);
                }
            }
        }
    }

    /// However the log is split: answers are counted as if all of it were in MongoDB.
    #[test]
    fn answers_are_those_of_the_log(worlds in worlds()) {
        let (tail, documents) = (worlds.tail(), worlds.documents(World::is_written));
        let known = worlds.documents(|world, at| {
            world.log[at].place.seq <= world.last || world.is_written(at)
        });
        let mut truth = replies(&known);
        truth.retain(|first, _| first != "chat:x/kim/2");
        let touched: HashSet<String> = tail.touched().into_iter().collect();
        let (apart, others) = documents.into_iter().partition(|(key, _)| touched.contains(key));
        let outlines: BTreeMap<String, Folded> = apart;
        let outlines = outlines.into_iter().map(|(key, folded)| Document {
            key,
            room: RoomId::parse("chat:x").unwrap(),
            folded,
        });
        let to = HashSet::from(["chat:x/kim/0", "chat:x/kim/1"]);
        let mut found = replies(&others);
        found.retain(|first, _| to.contains(first.as_str()));
        prop_assert_eq!(add_replies(&tail, &to, found, outlines.collect()), truth);
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
        original_ts: None,
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
    // 4 to 6 are neither in MongoDB nor in the tail.
    let entries = vec![message(7, "g"), message(8, "h")];
    let tail = Tail::new(origin(), epoch(), 3, entries).cut_off();
    let mut side = Side::new(&tail, End::Newest, None, 5, None);
    run(&mut side, &documents, usize::MAX);
    let ids: Vec<&str> = side
        .found()
        .into_iter()
        .map(|folded| folded.base.as_ref().unwrap().said.id.as_str())
        .collect();
    assert_eq!(ids, ["h", "g"]);
}

#[test]
fn behind_the_end_of_one_part_nothing_is_told_of_another() {
    let message = |origin: Region, ts: u64, id: &str| Entry {
        room: RoomId::parse("chat:x").unwrap(),
        place: Place {
            ts,
            origin,
            epoch: epoch(),
            seq: ts,
        },
        original_ts: None,
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
    // For seoul, 5 and everything after it was not read; for virginia, everything was read.
    let mut seoul = Tail::new(
        origin(),
        epoch(),
        9,
        vec![message(origin(), 1, "a"), message(origin(), 3, "c")],
    );
    seoul.ends_at(3);
    let virginia = [2, 4, 6].map(|ts| message(other(), ts, &format!("v{ts}")));
    let virginia = Tail::new(other(), epoch(), 6, virginia.to_vec());
    let tail = seoul.join(virginia);
    let mut side = Side::new(&tail, End::Oldest, None, 9, None);
    run(&mut side, &BTreeMap::new(), usize::MAX);
    let places: Vec<u64> = side.found().into_iter().map(|f| place(f).ts).collect();
    assert_eq!(places, [1, 2, 3]);
    assert!(tail.more);
}
