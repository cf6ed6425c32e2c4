//! The store against a real mongod, each test in a database of its own.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document as Fields, doc};
use natter::testing::{
    model::{Epoch, Fingerprint, Place, Position, Region, RoomId, RoomScope},
    store::{
        Change, Document, End, Entry, Folded, MAX_QUERY, RefusedEntry, Said, Search, Span, Store,
        StoreError, What,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

mod documents;
mod threads;
mod uploads;

use crate::support::{LONG, config, dedicated_mongod, eventually, mongodb_url, unique};

/// A store in a database of its own, and that database.
struct Own {
    store: Store,
    database: mongodb::Database,
}

impl Own {
    async fn new() -> Self {
        let own = Self::at(mongodb_url(), &unique("store")).await;
        own.store.prepare().await.unwrap();
        own
    }

    async fn at(url: &str, database: &str) -> Self {
        let mut config = config("").mongodb;
        config.url = serde_json::from_value(url.into()).unwrap();
        config.database = database.to_owned();
        let client = mongodb::Client::with_uri_str(url).await.unwrap();
        Self {
            store: Store::open(&config).await.unwrap(),
            database: client.database(database),
        }
    }

    async fn write(&self, entries: &[Entry]) {
        assert_eq!(self.store.write(entries).await.unwrap(), []);
    }

    async fn all(&self, room: &RoomId, span: &Span, end: End) -> Vec<Document> {
        let (mut span, mut found) = (span.clone(), Vec::new());
        loop {
            let (page, all) = self.store.page(room, &span, end, 1000).await.unwrap();
            let last = page.last().and_then(|last| last.folded.base.clone());
            let last = last.map(|base| base.place);
            match end {
                End::Oldest => span.after = last.or(span.after),
                End::Newest => span.before = last.or(span.before),
            }
            found.extend(page);
            if all {
                return found;
            }
        }
    }

    async fn found(&self, search: &Search) -> Vec<String> {
        let (found, next) = self.store.search(search).await.unwrap();
        assert_eq!(next, None);
        ids(&found)
    }

    /// Keeps what MongoDB says of each command from now on.
    async fn watch(&self) {
        // Without it the collection forgets after the first MiB.
        let create = doc! { "create": "system.profile", "capped": true, "size": 32 << 20 };
        self.database.run_command(create).await.unwrap();
        let watch = doc! { "profile": 2 };
        self.database.run_command(watch).await.unwrap();
    }

    /// What it said of commands on messages.
    async fn watched(&self, op: &str) -> Vec<Fields> {
        let stop = doc! { "profile": 0 };
        self.database.run_command(stop).await.unwrap();
        let filter = doc! { "op": op, "ns": format!("{}.messages", self.database.name()) };
        let profile = self.database.collection::<Fields>("system.profile");
        let found = profile.find(filter).await.unwrap();
        found.try_collect().await.unwrap()
    }
}

fn ids(documents: &[Document]) -> Vec<String> {
    let id = |document: &Document| document.folded.base.as_ref().unwrap().said.id.clone();
    documents.iter().map(id).collect()
}

fn room(name: &str) -> RoomId {
    RoomId::parse(name).unwrap()
}

fn place(origin: &str, ts: u64, seq: u64) -> Place {
    Place {
        ts,
        origin: Region::parse(origin).unwrap(),
        epoch: Epoch::parse("k3").unwrap(),
        seq,
    }
}

fn said(id: &str, body: &str) -> Said {
    Said {
        id: id.to_owned(),
        fingerprint: 0xfeed,
        body: body.to_owned(),
        ..Said::default()
    }
}

/// A message of kim with its sequence as its id.
fn message(room: &RoomId, seq: u64, body: &str) -> Entry {
    let id = seq.to_string();
    Entry {
        room: room.clone(),
        place: place("seoul", 1_763_600_000_000 + seq / 3, seq),
        original_ts: None,
        from: "kim".to_owned(),
        what: What::Message {
            key: format!("{room}/kim/{id}"),
            said: said(&id, body),
        },
    }
}

/// What kim says at `seq` about the message with the id `id`.
fn change(room: &RoomId, seq: u64, id: u64, change: Change) -> Entry {
    let target = format!("{room}/kim/{id}");
    Entry {
        what: What::Change { target, change },
        ..message(room, seq, "")
    }
}

fn edit(body: impl Into<String>) -> Change {
    Change::Edit {
        body: body.into(),
        mentions: None,
    }
}

fn edit_mentioning(body: &str, random: &mut StdRng) -> Change {
    let users = ["$lee", "ann", "a.b"].map(str::to_owned);
    let users = users[..random.random_range(0..4)].to_vec();
    Change::Edit {
        body: body.to_owned(),
        mentions: random.random_bool(0.5).then_some(users),
    }
}

fn text(text: &str) -> String {
    serde_json::json!({ "text": text }).to_string()
}

/// What documents must be.
#[derive(Default)]
struct Model(BTreeMap<String, (RoomId, Folded)>);

impl Model {
    fn of(entries: &[Entry]) -> Self {
        let mut model = Self::default();
        for entry in entries {
            let (What::Message { key, .. } | What::Change { target: key, .. }) = &entry.what else {
                continue;
            };
            let known = model.0.entry(key.clone());
            let (_, folded) = known.or_insert_with(|| (entry.room.clone(), Folded::default()));
            folded.apply(entry);
        }
        model
    }

    /// As documents say it: without what an edit replaced.
    fn documents(&self) -> Vec<Document> {
        let document = |(key, (room, folded)): (&String, &(RoomId, Folded))| {
            let mut folded = folded.clone();
            if let (Some(base), Some(edit)) = (&mut folded.base, &folded.edit) {
                base.said.body.clone_from(&edit.body);
            }
            if let (Some(base), Some((_, users))) = (&mut folded.base, &folded.mentioned) {
                base.said.mentions.clone_from(users);
            }
            Document {
                key: key.clone(),
                room: room.clone(),
                folded,
            }
        };
        self.0.iter().map(document).collect()
    }

    /// Those that are a message, in the order of the room.
    fn page(&self) -> Vec<Document> {
        let mut page = self.documents();
        page.retain(|document| document.folded.base.is_some());
        page.sort_by_key(|document| document.folded.base.as_ref().unwrap().place.clone());
        page
    }
}

/// Texts that mean something to MongoDB, or to how it is spoken to.
const NASTY: [&str; 14] = [
    "kim",
    "❤",
    "❤\u{fe0f}",
    "$from",
    "$$REMOVE",
    "a.b",
    "0",
    "",
    "=",
    "=2E",
    "nul\0",
    "👍",
    "$literal",
    "__proto__",
];

/// Each with a word that can be searched for.
const WORDS: [&str; 4] = ["apple", "birne", "안녕하세요", "りんご"];

fn random_entry(random: &mut StdRng, room: &RoomId, seq: u64) -> Entry {
    let pick = |random: &mut StdRng| NASTY[random.random_range(0..NASTY.len())].to_owned();
    let word = WORDS[random.random_range(0..WORDS.len())];
    let body = serde_json::json!({ "text": format!("$body {word}"), "n": seq }).to_string();
    let number = random.random_range(0..3);
    let key = format!("{room}/$kim/{number}");
    let change = match random.random_range(0..20) {
        0..=5 => None,
        6..=9 => Some(edit_mentioning(&body, random)),
        10 => Some(Change::Delete),
        11..=15 => Some(Change::React {
            key: pick(random),
            on: random.random(),
        }),
        _ => Some(Change::Annotate(
            (0..random.random_range(1..3))
                .map(|_| (pick(random), format!("{{ \"$x\": {seq} }}")))
                .collect(),
        )),
    };
    let origin = ["a", "a-b", "ab"][random.random_range(0..3)];
    let mut said = said(&number.to_string(), &body);
    if random.random() {
        said.reply_to = Some("$lee/1".to_owned());
        said.reply_key = Some(format!("{room}/$lee/1"));
        said.mentions = vec!["$lee".to_owned(), pick(random)];
    }
    Entry {
        room: room.clone(),
        place: place(origin, 1_000 + seq / 8, seq),
        // Some are imported.
        original_ts: random.random::<bool>().then_some(900 + seq),
        from: pick(random),
        what: match change {
            None => What::Message { key, said },
            Some(change) => What::Change {
                target: key,
                change,
            },
        },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_order_any_repeat_and_any_batches_end_as_the_model_says() {
    let own = Own::new().await;
    let seed: u64 = rand::rng().random();
    for case in 0..300 {
        let random = &mut StdRng::seed_from_u64(seed ^ case);
        let room = room(&format!("chat:r{case}"));
        let count = random.random_range(1..24);
        let entries: Vec<Entry> = (1..=count)
            .map(|seq| random_entry(random, &room, seq))
            .collect();
        let mut said = entries.clone();
        for _ in 0..random.random_range(0..count) {
            said.push(entries[random.random_range(0..entries.len())].clone());
        }
        said.shuffle(random);
        let mut rest = said.as_slice();
        while !rest.is_empty() {
            let cut = |rest: &[Entry], random: &mut StdRng| random.random_range(0..=rest.len());
            let (first, after) = rest.split_at(cut(rest, random));
            let (second, after) = after.split_at(cut(after, random).min(8));
            // Two workers at once.
            tokio::join!(own.write(first), own.write(second));
            rest = after;
        }
        let model = Model::of(&entries);
        let keys: Vec<String> = model.0.keys().cloned().collect();
        let mut got = own.store.get(&keys).await.unwrap();
        got.sort_by(|a, b| a.key.cmp(&b.key));
        assert_eq!(got, model.documents(), "seed {seed}, case {case}");
        let page = own.all(&room, &Span::default(), End::Oldest).await;
        assert_eq!(page, model.page(), "seed {seed}, case {case}");
        for word in WORDS {
            let search = Search {
                rooms: RoomScope::one(room.clone()),
                text: word.to_owned(),
                limit: 10,
                ..Search::default()
            };
            let mut expected = model.page();
            expected.retain(|document| {
                let body = document.folded.body();
                body.is_some_and(|body| body.contains(word))
            });
            expected.reverse();
            let (found, _) = own.store.search(&search).await.unwrap();
            assert_eq!(found, expected, "seed {seed}, case {case}, {word}");
        }
    }
}

#[tokio::test]
async fn pages_from_both_ends_are_the_room_and_bodies_come_back_byte_for_byte() {
    let own = Own::new().await;
    let room = room("chat:bodies");
    let deep = format!("{}{}", "[".repeat(500), "]".repeat(500));
    let long = format!("\"{}\"", "가나".repeat((64 << 10) / 6));
    let bodies = [
        " { \"a\" :\t1.0e3,\r\n\"a\": 2 } ",
        r#""\u0000 \ud800""#,
        "\"\u{7f}\"",
        "1E400",
        "\"\"",
        "null",
        r#""$body""#,
        &deep,
        &long,
    ];
    let mut entries: Vec<Entry> = (1..=40)
        .map(|seq| {
            let body = bodies[usize::try_from(seq).unwrap() % bodies.len()];
            message(&room, seq, body)
        })
        .collect();
    // Tombstones are in pages, what is only spoken of is not.
    entries.push(change(&room, 41, 7, Change::Delete));
    entries.push(change(&room, 42, 999, edit("7".to_owned())));
    own.write(&entries).await;
    let model = Model::of(&entries).page();
    assert_eq!(model.len(), 40);
    let place = |document: &Document| document.folded.base.as_ref().unwrap().place.clone();
    for limit in [1, 7, 200] {
        for end in [End::Oldest, End::Newest] {
            let (mut span, mut read) = (Span::default(), Vec::new());
            loop {
                let (page, _) = own.store.page(&room, &span, end, limit).await.unwrap();
                let Some(last) = page.last() else { break };
                match end {
                    End::Oldest => span.after = Some(place(last)),
                    End::Newest => span.before = Some(place(last)),
                }
                read.extend(page);
            }
            if end == End::Newest {
                read.reverse();
            }
            assert_eq!(read, model, "{end:?}, {limit}");
        }
    }
    let span = Span {
        after: Some(place(&model[9])),
        before: Some(place(&model[20])),
        thread: None,
    };
    assert_eq!(own.all(&room, &span, End::Oldest).await, model[10..20]);
    assert_eq!(
        own.store
            .page(&room, &span, End::Oldest, 0)
            .await
            .unwrap()
            .0,
        []
    );
}

#[tokio::test]
async fn the_nearest_message_of_a_position_is_found() {
    let own = Own::new().await;
    let room = room("chat:near");
    let entries = [3, 5, 9].map(|seq| message(&room, seq, "1"));
    own.write(&entries).await;
    let near = async |origin: &str, epoch: &str, seq, end| {
        let position = Position {
            origin: Region::parse(origin).unwrap(),
            epoch: Epoch::parse(epoch).unwrap(),
            seq,
            fingerprint: Fingerprint(0),
        };
        let found = own.store.nearest(&room, &position, end).await.unwrap();
        found.map(|place| place.seq)
    };
    assert_eq!(near("seoul", "k3", 5, End::Oldest).await, Some(5));
    assert_eq!(near("seoul", "k3", 5, End::Newest).await, Some(5));
    assert_eq!(near("seoul", "k3", 6, End::Oldest).await, Some(9));
    assert_eq!(near("seoul", "k3", 6, End::Newest).await, Some(5));
    assert_eq!(near("seoul", "k3", 10, End::Oldest).await, None);
    assert_eq!(near("seoul", "k3", 2, End::Newest).await, None);
    assert_eq!(near("seoul", "k4", 5, End::Oldest).await, None);
    assert_eq!(near("tokyo", "k3", 5, End::Oldest).await, None);
    assert_eq!(near("seoul", "k3", u64::MAX, End::Newest).await, Some(9));
}

#[tokio::test]
async fn searches_find_words_and_parts_of_what_has_no_spaces() {
    let own = Own::new().await;
    let room = room("chat:search");
    let texts = [
        "안녕하세요, 친구 여러분",
        "안과 녕 안",
        "東京都の天気は晴れ",
        "京東",
        "カタカナのテスト",
        "我爱北京天安门",
        "The Café on example.com isn't open",
        "deploy v2.0 👍🏽 now",
        "ｆｕｌｌ ｗｉｄｔｈ ﾊﾝｶｸ",
        "สวัสดีครับ",
        "STRASSE straße",
        "녕안 안녕",
        "ㅋㅋㅠㅠ 네ㄳ",
        "ΚΑΛΗΜΕΡΑ مُحَمَّد шёлк",
        "⭐ 급한 ⬆️",
        "급한 & 바쁜",
    ];
    let entries: Vec<Entry> = (0..)
        .zip(texts)
        .map(|(seq, said)| message(&room, seq, &text(said)))
        .collect();
    own.write(&entries).await;
    for (query, expected) in [
        ("안녕", vec!["11", "0"]),
        ("녕하", vec!["0"]),
        ("안녕 여러분", vec!["0"]),
        ("요", vec!["0"]),
        ("녕", vec!["11", "1", "0"]),
        ("東京", vec!["2"]),
        ("天気", vec!["2"]),
        ("晴れ", vec!["2"]),
        ("京", vec!["5", "3", "2"]),
        ("テスト", vec!["4"]),
        ("カタカナ", vec!["4"]),
        ("北京", vec!["5"]),
        ("天安门", vec!["5"]),
        ("CAFE", vec!["6"]),
        ("café", vec!["6"]),
        ("example.com", vec!["6"]),
        ("example", vec!["6"]),
        ("caf", vec![]),
        ("open deploy", vec![]),
        ("now, deploy!", vec!["7"]),
        ("v2.0", vec!["7"]),
        ("👍", vec!["7"]),
        ("full width", vec!["8"]),
        ("ハンカク", vec!["8"]),
        ("สวัสดี", vec!["9"]),
        ("strasse", vec!["10"]),
        ("北京 example", vec![]),
        // Nothing is an operator, an expression or a field.
        ("AND OR NOT", vec![]),
        ("\"\" () {} $ne", vec![]),
        ("^안녕", vec!["11", "0"]),
        ("안녕.*", vec!["11", "0"]),
        ("{\"$gt\":\"\"}", vec![]),
        ("ㅋㅋ", vec!["12"]),
        ("ㅠㅠ", vec!["12"]),
        ("네", vec!["12"]),
        ("καλημέρα", vec!["13"]),
        ("محمد ШЕЛК", vec!["13"]),
        ("⭐", vec!["14"]),
        ("⬆", vec!["14"]),
        ("⭐ 급한", vec!["14"]),
        ("⏰ 급한", vec![]),
        ("급한", vec!["15", "14"]),
        ("급한 &", vec!["15"]),
    ] {
        let search = Search {
            rooms: RoomScope::one(room.clone()),
            text: query.to_owned(),
            limit: 50,
            ..Search::default()
        };
        assert_eq!(own.found(&search).await, expected, "{query}");
    }
    let long = "안".repeat(MAX_QUERY + 1);
    let words: String = ('a'..='z')
        .chain('α'..='ω')
        .map(|c| format!("{c} "))
        .collect();
    for query in [".*", "-", "&", "\0", "\u{200b}", &long, &words] {
        let search = Search {
            rooms: RoomScope::one(room.clone()),
            text: query.to_owned(),
            limit: 50,
            ..Search::default()
        };
        let refused = own.store.search(&search).await;
        assert!(
            matches!(refused, Err(StoreError::Query(_))),
            "{query}: {refused:?}"
        );
    }
}

#[tokio::test]
async fn searches_stay_in_their_rooms_and_fit_in_all_they_name() {
    let own = Own::new().await;
    let rooms = ["chat:a", "chat:b", "chat-x:a", "live:a"].map(room);
    let mut entries = Vec::new();
    for (seq, room) in (1..).zip(rooms.iter().cycle().take(40)) {
        let mut entry = message(room, seq, &text(if seq % 2 == 0 { "even" } else { "odd" }));
        let What::Message { said, .. } = &mut entry.what else {
            continue;
        };
        if seq % 5 == 0 {
            said.mentions = vec!["lee".to_owned(), "박".to_owned()];
            said.reply_key = Some("chat:a/kim/1".to_owned());
        }
        if seq % 10 == 0 {
            entry.from = "lee".to_owned();
        }
        entries.push(entry);
    }
    own.write(&entries).await;
    let model = |keep: &dyn Fn(&Entry, &Said) -> bool| {
        let kept = entries.iter().rev().filter_map(|entry| match &entry.what {
            What::Message { said, .. } => keep(entry, said).then(|| said.id.clone()),
            _ => None,
        });
        kept.collect::<Vec<String>>()
    };
    let scopes = [
        RoomScope {
            all: true,
            ..RoomScope::default()
        },
        RoomScope::one(rooms[0].clone()),
        RoomScope {
            namespaces: vec!["chat".to_owned()],
            ..RoomScope::default()
        },
        RoomScope {
            rooms: vec![rooms[1].clone(), rooms[3].clone()],
            ..RoomScope::default()
        },
        RoomScope {
            namespaces: vec!["chat".to_owned(), "none".to_owned()],
            rooms: vec![rooms[3].clone()],
            ..RoomScope::default()
        },
        RoomScope::default(),
    ];
    for scope in scopes {
        let base = Search {
            rooms: scope.clone(),
            limit: 50,
            ..Search::default()
        };
        let all = own.found(&base).await;
        assert_eq!(
            all,
            model(&|entry, _| scope.contains(&entry.room)),
            "{scope:?}"
        );
        let by_lee = Search {
            from: Some("lee".to_owned()),
            ..base.clone()
        };
        let expected = model(&|entry, _| scope.contains(&entry.room) && entry.from == "lee");
        assert_eq!(own.found(&by_lee).await, expected, "{scope:?}");
        let even_to_park = Search {
            text: "Even".to_owned(),
            mentions: Some("박".to_owned()),
            reply_to: Some("chat:a/kim/1".to_owned()),
            ..base.clone()
        };
        let expected = model(&|entry, said| {
            let even = entry.place.seq % 2 == 0;
            scope.contains(&entry.room) && even && !said.mentions.is_empty()
        });
        assert_eq!(own.found(&even_to_park).await, expected, "{scope:?}");
    }
}

#[tokio::test]
async fn a_search_goes_on_where_it_stopped_and_finds_each_once() {
    let own = Own::new().await;
    let room = room("chat:pages");
    // All have the pairs of 가나다; every third has them together.
    let entries: Vec<Entry> = (1..=1500)
        .map(|seq| {
            let said = if seq % 3 == 0 {
                "가나다"
            } else {
                "나다 가나"
            };
            message(&room, seq, &text(said))
        })
        .collect();
    own.write(&entries).await;
    for limit in [1, 7, 60] {
        let mut search = Search {
            rooms: RoomScope::one(room.clone()),
            text: "가나다".to_owned(),
            limit,
            ..Search::default()
        };
        let mut read = Vec::new();
        loop {
            let (found, next) = own.store.search(&search).await.unwrap();
            assert!(found.len() <= limit);
            read.extend(ids(&found));
            search.before = next;
            if search.before.is_none() || read.len() >= 120 {
                break;
            }
        }
        let expected: Vec<String> = (1..=500).rev().map(|n| (n * 3).to_string()).collect();
        assert_eq!(read, expected[..read.len()], "limit {limit}");
        assert!(read.len() >= 120, "limit {limit}: {}", read.len());
    }
    // What a deletion or an edit took away is not found.
    own.write(&[
        change(&room, 1501, 1500, Change::Delete),
        change(&room, 1502, 1497, edit(text("else"))),
    ])
    .await;
    let search = Search {
        rooms: RoomScope::one(room.clone()),
        text: "가나다".to_owned(),
        limit: 1,
        ..Search::default()
    };
    let (found, _) = own.store.search(&search).await.unwrap();
    assert_eq!(ids(&found), ["1494"]);
}

#[tokio::test]
async fn every_query_uses_an_index() {
    let own = Own::new().await;
    let rooms = ["chat:a", "chat:b", "live:a"].map(room);
    let entries: Vec<Entry> = (1..)
        .zip(rooms.iter().cycle().take(300))
        .map(|(seq, room)| message(room, seq, &text("안녕하세요 all")))
        .collect();
    own.write(&entries).await;
    own.watch().await;
    let middle = &entries[150].place;
    let bounds = [None, Some(middle.clone())];
    for end in [End::Oldest, End::Newest] {
        for (before, after) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let span = Span {
                before: bounds[before].clone(),
                after: bounds[after].clone(),
                thread: None,
            };
            own.all(&rooms[0], &span, end).await;
        }
        let position = middle.position(Fingerprint(0));
        own.store.nearest(&rooms[0], &position, end).await.unwrap();
    }
    let keys = ["chat:a/kim/1".to_owned(), "chat:a/kim/no".to_owned()];
    own.store.get(&keys).await.unwrap();
    let scopes = [
        RoomScope {
            all: true,
            ..RoomScope::default()
        },
        RoomScope::one(rooms[0].clone()),
        RoomScope {
            namespaces: vec!["chat".to_owned()],
            ..RoomScope::default()
        },
        RoomScope {
            namespaces: vec!["chat".to_owned()],
            rooms: rooms.to_vec(),
            ..RoomScope::default()
        },
        RoomScope {
            rooms: rooms.to_vec(),
            ..RoomScope::default()
        },
    ];
    let mut asked = 0;
    for scope in scopes {
        for words in ["", "안녕", "안녕하세요 all", "안"] {
            for named in 0..8 {
                for before in &bounds {
                    let name = |bit: u8| (named & bit > 0).then(|| "chat:a/kim/1".to_owned());
                    let search = Search {
                        rooms: scope.clone(),
                        text: words.to_owned(),
                        from: name(1),
                        mentions: name(2),
                        reply_to: name(4),
                        before: before.clone(),
                        limit: 10,
                    };
                    own.store.search(&search).await.unwrap();
                    asked += 1;
                }
            }
        }
    }
    let mut plans = BTreeSet::new();
    let queries = own.watched("query").await;
    for query in &queries {
        let plan = query.get_str("planSummary").unwrap().to_owned();
        assert!(plan.starts_with("IXSCAN"), "{plan}: {query}");
        // In one room nothing is sorted: the index has the order. (The beginning of a term is many terms.)
        let command = query.get_document("command").unwrap();
        let filter = command.get_document("filter").unwrap();
        let one_room = filter.get_str("room").is_ok();
        let terms = filter.get_document("terms");
        let beginning = terms.is_ok_and(|terms| terms.contains_key("$elemMatch"));
        if one_room && !beginning {
            assert_ne!(
                query.get("hasSortStage"),
                Some(&Bson::Boolean(true)),
                "{query}"
            );
        }
        // Whatever else is common there, words are looked up, unless the one room is small.
        let names = ["from", "mentions", "reply_key"].map(|name| filter.contains_key(name));
        if filter.contains_key("terms") && !beginning && names == [false; 3] {
            let first = if one_room { "room" } else { "terms" };
            let first = format!("IXSCAN {{ {first}: 1");
            assert!(plan.starts_with(&first), "{plan}: {query}");
        }
        plans.insert(plan);
    }
    let count = queries.len();
    assert!(count >= asked + 11, "{count} queries, {asked} searches");
    eprintln!("{count} queries: {plans:#?}");
}

#[tokio::test]
async fn a_large_room_is_searched_by_its_words() {
    let own = Own::new().await;
    let (large, other) = (room("chat:large"), room("chat:other"));
    let entries: Vec<Entry> = (1..=502)
        .map(|seq| match seq {
            70 => message(&large, seq, &text("rare 안녕하세요")),
            502 => message(&other, seq, &text("rare")),
            _ => message(&large, seq, &text("common")),
        })
        .collect();
    own.write(&entries).await;
    own.watch().await;
    for words in ["rare", "안녕", "common rare"] {
        let search = Search {
            rooms: RoomScope::one(large.clone()),
            text: words.to_owned(),
            limit: 10,
            ..Search::default()
        };
        let (found, next) = own.store.search(&search).await.unwrap();
        let expected = if words == "common rare" { "" } else { "70" };
        assert_eq!(
            (ids(&found).join(" ").as_str(), next),
            (expected, None),
            "{words}"
        );
    }
    for query in own.watched("query").await {
        let plan = query.get_str("planSummary").unwrap();
        assert!(plan.starts_with("IXSCAN { terms: 1"), "{plan}: {query}");
        assert_eq!(query.get("hasSortStage"), None, "{query}");
    }
}

#[tokio::test]
async fn a_refused_document_does_not_keep_the_others_out() {
    let own = Own::new().await;
    let room = room("chat:poison");
    let forbid = |validator: Fields| {
        own.database
            .run_command(doc! { "collMod": "messages", "validator": validator })
    };
    forbid(doc! { "body": { "$ne": "poison" } }).await.unwrap();
    let entries = [
        message(&room, 1, "1"),
        message(&room, 2, "\"poison\""),
        message(&room, 3, "3"),
        // One bad change does not spoil its message, nor the other changes of it.
        message(&room, 4, "4"),
        change(&room, 5, 4, edit("\"poison\"".to_owned())),
        change(
            &room,
            6,
            4,
            Change::React {
                key: "👍".to_owned(),
                on: true,
            },
        ),
        Entry {
            what: What::Nothing("nothing"),
            ..message(&room, 7, "")
        },
        change(&room, 8, 1, edit("\"poison\"".to_owned())),
    ];
    let refused = own.store.write(&entries).await.unwrap();
    let indexes: Vec<usize> = refused.iter().map(|refused| refused.index).collect();
    assert_eq!(indexes, [1, 4, 7], "{refused:?}");
    let RefusedEntry { reason, .. } = &refused[0];
    assert!(reason.contains("121"), "{reason}");
    let taken: Vec<Entry> = [0, 2, 3, 5].map(|index| entries[index].clone()).into();
    let page = own.all(&room, &Span::default(), End::Oldest).await;
    assert_eq!(page, Model::of(&taken).page());
    forbid(doc! {}).await.unwrap();
    own.write(&entries).await;
    let page = own.all(&room, &Span::default(), End::Oldest).await;
    assert_eq!(page, Model::of(&entries).page());
}

#[tokio::test]
async fn what_is_too_large_for_mongodb_is_refused_alone() {
    let own = Own::new().await;
    let room = room("chat:large");
    let large = |bytes: usize| format!("\"{}\"", "x".repeat(bytes));
    let entries = [
        message(&room, 1, "1"),
        message(&room, 2, &large(17 << 20)),
        // More than one command can take.
        message(&room, 3, &large(9 << 20)),
        message(&room, 4, &large(9 << 20)),
        change(&room, 5, 1, edit(large(17 << 20))),
        // Too large together.
        change(
            &room,
            6,
            4,
            Change::Annotate(vec![("a".to_owned(), large(8 << 20))]),
        ),
    ];
    let refused = own.store.write(&entries).await.unwrap();
    let indexes: Vec<usize> = refused.iter().map(|refused| refused.index).collect();
    assert_eq!(indexes, [1, 4, 5], "{refused:?}");
    let page = own.all(&room, &Span::default(), End::Oldest).await;
    let taken: Vec<Entry> = [0, 2, 3].map(|index| entries[index].clone()).into();
    assert!(page == Model::of(&taken).page(), "{:?}", ids(&page));
}

#[tokio::test]
async fn a_redelivered_batch_changes_nothing() {
    let own = Own::new().await;
    let room = room("chat:again");
    let mut entries: Vec<Entry> = (1..=500)
        .map(|seq| message(&room, seq, &text("hello")))
        .collect();
    for seq in 501..=600 {
        entries.push(change(&room, seq, seq - 500, edit(text("bye"))));
    }
    own.write(&entries).await;
    let before = own.all(&room, &Span::default(), End::Oldest).await;
    own.watch().await;
    own.write(&entries).await;
    let updates = own.watched("update").await;
    for update in &updates {
        assert_eq!(update.get_i32("nModified").unwrap(), 0, "{update}");
        assert!(!update.contains_key("keysInserted"), "{update}");
    }
    assert_eq!(updates.len(), 500);
    let inserts = own.watched("insert").await;
    assert!(
        inserts
            .iter()
            .all(|insert| insert.get_i32("ninserted").unwrap() == 0)
    );
    assert_eq!(own.all(&room, &Span::default(), End::Oldest).await, before);
}

#[tokio::test]
async fn preparing_is_repeatable_and_a_newer_schema_is_left_alone() {
    let own = Own::new().await;
    tokio::try_join!(own.store.prepare(), own.store.prepare()).unwrap();
    let meta = own.database.collection::<Fields>("meta");
    let schema = meta.find_one(doc! {}).await.unwrap().unwrap();
    assert_eq!(schema, doc! { "_id": "schema", "version": 2_i64 });
    meta.update_one(doc! {}, doc! { "$set": { "version": 3 } })
        .await
        .unwrap();
    let messages = own.database.collection::<Fields>("messages");
    messages.drop_index("terms").await.unwrap();
    let error = own.store.prepare().await.unwrap_err();
    let newer = matches!(error, StoreError::Schema { found: 3, known: 2 });
    assert!(newer, "{error}");
    let names = messages.list_index_names().await.unwrap();
    assert!(!names.contains(&"terms".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_prepare_an_empty_database_at_once() {
    let name = unique("store");
    let stores = [
        Own::at(mongodb_url(), &name).await,
        Own::at(mongodb_url(), &name).await,
        Own::at(mongodb_url(), &name).await,
    ];
    let prepared = stores.iter().map(|own| own.store.prepare());
    for prepared in futures_util::future::join_all(prepared).await {
        prepared.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_mongodb_did_not_take_is_taken_when_it_is_back() {
    let mut mongod = dedicated_mongod().await;
    let own = Own::at(&mongod.url(), "natter").await;
    own.store.prepare().await.unwrap();
    let room = room("chat:away");
    own.write(&[message(&room, 1, "1")]).await;
    mongod.server.kill().await;
    let entries = [
        message(&room, 1, "1"),
        message(&room, 2, "2"),
        change(&room, 3, 1, edit("3".to_owned())),
    ];
    let away = |error| matches!(error, StoreError::Unavailable(_));
    assert!(away(own.store.write(&entries).await.unwrap_err()));
    assert!(away(own.store.prepare().await.unwrap_err()));
    let span = Span::default();
    let page = own.store.page(&room, &span, End::Oldest, 10).await;
    assert!(away(page.unwrap_err()));
    mongod.server.restart().await.unwrap();
    eventually("the batch is taken", LONG, async || {
        let written = own.store.write(&entries).await;
        written.map_err(|error| error.to_string())
    })
    .await;
    let page = own.all(&room, &Span::default(), End::Oldest).await;
    assert_eq!(page, Model::of(&entries).page());
}

#[tokio::test]
async fn a_connection_string_that_can_not_be_used_is_told_without_its_password() {
    for url in [
        "",
        "http://x",
        "mongodb://kim:se/cret@host/",
        "mongodb://kim:secret",
        "mongodb://kim:se:cret@host/",
    ] {
        let mut config = config("").mongodb;
        config.url = serde_json::from_value(url.into()).unwrap();
        let error = Store::open(&config).await.unwrap_err();
        assert!(matches!(error, StoreError::Url(_)), "{error}");
        assert!(!error.to_string().contains("cret"), "{error}");
    }
}

/// Whatever order copies come in, and however they are batched: all but the first are to be taken out, and none by a repeat.
#[tokio::test]
async fn the_later_places_of_a_message_are_to_be_removed() {
    let own = Own::new().await;
    let region = Region::parse("seoul").unwrap();
    let orders = [
        [1, 2, 3],
        [1, 3, 2],
        [2, 1, 3],
        [2, 3, 1],
        [3, 1, 2],
        [3, 2, 1],
    ];
    for (number, order) in orders.into_iter().enumerate() {
        for together in [1, 2, 3] {
            let room = room(&format!("chat:copies-{number}-{together}"));
            // A place of a stream is one room's.
            let base = 100 * u64::try_from(3 * number + together).unwrap();
            let first = message(&room, base + 1, "1");
            let said = order.map(|seq| Entry {
                place: message(&room, base + seq, "1").place,
                ..first.clone()
            });
            for _ in 0..2 {
                for some in said.chunks(together) {
                    own.write(some).await;
                }
            }
            let shown = own.all(&room, &Span::default(), End::Oldest).await;
            let place = shown[0].folded.base.as_ref().unwrap().place.clone();
            assert_eq!((shown.len(), &place), (1, &first.place), "{order:?}");
            let removals = own.store.removals_of(&region, 1000).await.unwrap();
            let mut of_room: Vec<u64> = removals
                .iter()
                .filter(|one| one.room == room)
                .map(|one| one.place.seq - base)
                .collect();
            of_room.sort_unstable();
            assert_eq!(of_room, [2, 3], "{order:?}, {together} together");
        }
    }
    // Each region does its part, and the last one leaves nothing.
    let all = own.store.removals_of(&region, 1000).await.unwrap();
    let other = Region::parse("virginia").unwrap();
    let regions = [region.clone(), other.clone()];
    for removal in &all {
        own.store.removed(removal, &region, &regions).await.unwrap();
    }
    assert_eq!(own.store.removals_of(&region, 1000).await.unwrap(), []);
    let left = own.store.removals_of(&other, 1000).await.unwrap();
    assert_eq!(left.len(), all.len());
    for removal in &left {
        own.store.removed(removal, &other, &regions).await.unwrap();
    }
    let removals = own.database.collection::<Fields>("removals");
    assert_eq!(removals.count_documents(doc! {}).await.unwrap(), 0);
}

#[tokio::test]
async fn a_change_is_said_again_only_from_another_place() {
    let own = Own::new().await;
    let room = room("chat:again");
    let at = |seq: u64, key: &str| {
        let place = message(&room, seq, "1").place;
        natter::testing::store::Removal::new(place, room.clone(), key)
    };
    let again = async |changes: &[natter::testing::store::Removal]| {
        let again = own.store.said_again(changes).await.unwrap();
        let mut again: Vec<(usize, u64)> =
            again.into_iter().map(|(n, first)| (n, first.seq)).collect();
        again.sort_unstable();
        again
    };
    assert_eq!(again(&[]).await, []);
    assert_eq!(again(&[at(1, "a"), at(2, "b")]).await, []);
    // Given out again, also after a crash.
    assert_eq!(again(&[at(1, "a"), at(2, "b"), at(3, "c")]).await, []);
    assert_eq!(
        again(&[at(4, "a"), at(3, "c"), at(5, "c")]).await,
        [(0, 1), (2, 3)]
    );
    // Of several in one batch the first counts, whatever their order.
    assert_eq!(
        again(&[at(9, "d"), at(8, "d"), at(7, "d")]).await,
        [(0, 7), (1, 7)]
    );
    assert_eq!(again(&[at(7, "d"), at(8, "d")]).await, [(1, 7)]);
}
