//! What documents look like to people, that they stay within bounds, and how those of version 1 become those of this one.

use std::time::Duration;

use mongodb::bson::DateTime;
use natter::testing::store::{Migrated, Slot};

use super::*;

impl Own {
    /// Keys of the messages that a person finds.
    async fn keys(&self, filter: Fields) -> Vec<String> {
        let messages = self.database.collection::<Fields>("messages");
        let found = messages.find(filter).sort(doc! { "_id": 1 }).await.unwrap();
        let found: Vec<Fields> = found.try_collect().await.unwrap();
        let key = |fields: &Fields| fields.get_str("_id").unwrap().to_owned();
        found.iter().map(key).collect()
    }

    async fn raw(&self, key: &str) -> Fields {
        let messages = self.database.collection::<Fields>("messages");
        let found = messages.find_one(doc! { "_id": key }).await.unwrap();
        found.unwrap()
    }

    async fn folded(&self, key: &str) -> Folded {
        let found = self.store.get(&[key.to_owned()]).await.unwrap();
        found.into_iter().next().unwrap().folded
    }

    async fn migrate(&self) {
        while self.store.migrate("test").await.unwrap() != Migrated::All {}
    }
}

fn by(user: &str, entry: Entry) -> Entry {
    Entry {
        from: user.to_owned(),
        ..entry
    }
}

fn react(key: &str, on: bool) -> Change {
    Change::React {
        key: key.to_owned(),
        on,
    }
}

fn annotate(name: &str, json: &str) -> Change {
    Change::Annotate(vec![(name.to_owned(), json.to_owned())])
}

#[tokio::test]
async fn people_find_messages_by_what_they_say() {
    let own = Own::new().await;
    let room = room("chat:people");
    let bodies = [
        r#"{"text":"hi","n":1}"#,
        r#"{ "text": "hi", "n": 2.5 }"#,
        r#"{"text":"ho","items":[{"sku":"a","price":12345678901}]}"#,
        r#""just a string""#,
        r#"{"text":"hi","$odd":1,"n":18446744073709551615}"#,
    ];
    let mut entries: Vec<Entry> = (1..)
        .zip(bodies)
        .map(|(seq, body)| message(&room, seq, body))
        .collect();
    entries.push(change(&room, 6, 3, edit(r#"{"text":"edited", "k":"v"}"#)));
    entries.push(by("lee", change(&room, 7, 1, react("👍", true))));
    entries.push(by(
        "bot",
        change(&room, 8, 1, annotate("translation", r#"{"ko":"안녕"}"#)),
    ));
    entries.push(change(&room, 9, 4, Change::Delete));
    own.write(&entries).await;
    let key = |n: u64| format!("{room}/kim/{n}");
    let at = |seq: u64| {
        let ms = entries[usize::try_from(seq).unwrap() - 1].place.ts;
        DateTime::from_millis(ms.try_into().unwrap())
    };
    for (filter, expected) in [
        (doc! { "body.text": "hi" }, vec![1, 2, 5]),
        (doc! { "body.text": { "$regex": "^h" } }, vec![1, 2, 5]),
        (doc! { "body.n": 1 }, vec![1]),
        (doc! { "body.n": { "$gt": 2 } }, vec![2, 5]),
        (doc! { "body.text": "edited", "body.k": "v" }, vec![3]),
        (doc! { "body": "just a string" }, vec![]),
        (doc! { "body_json": { "$exists": true } }, vec![2, 3, 5]),
        (doc! { "at": { "$lt": at(3) } }, vec![1, 2]),
        (doc! { "at": at(4), "deleted_at": at(9) }, vec![4]),
        (doc! { "edited_at": { "$gte": at(6) } }, vec![3]),
        (doc! { "reactions.👍.lee.on": true }, vec![1]),
        (
            doc! { "annotations.translation.bot.value.ko": "안녕" },
            vec![1],
        ),
    ] {
        let expected: Vec<String> = expected.into_iter().map(key).collect();
        assert_eq!(own.keys(filter.clone()).await, expected, "{filter}");
    }
    let third = own.raw(&key(3)).await;
    assert!(!third.contains_key("ts"), "{third}");
    let page = own.all(&room, &Span::default(), End::Oldest).await;
    assert_eq!(page, Model::of(&entries).page());
}

/// A random JSON text, as clients write them and as they do not.
fn random_json(random: &mut StdRng, depth: usize) -> String {
    const LEAVES: [&str; 28] = [
        "null",
        "true",
        "0",
        "-0",
        "1",
        "-1",
        "1.0",
        "1.5",
        "1e3",
        "1E-3",
        "-0.0",
        "2147483648",
        "9007199254740993",
        "9223372036854775807",
        "9223372036854775808",
        "123456789012345678901234567890",
        "1e400",
        "0.1",
        r#""""#,
        r#""a\u0000b""#,
        r#""\u00e9""#,
        r#""é""#,
        r#""\n\/""#,
        r#""$body""#,
        r#""\ud83d\ude00""#,
        r#""\ud800""#,
        "[]",
        "{}",
    ];
    const NAMES: [&str; 12] = [
        "a",
        "b",
        "text",
        "",
        "$set",
        "$oid",
        "a.b",
        "0",
        "__proto__",
        r"\u0000",
        "_id",
        "é",
    ];
    let space = |random: &mut StdRng| [" ", "", "", "", "\n", "\t"][random.random_range(0..6)];
    let (before, after) = (space(random), space(random));
    let inner = match random.random_range(0..if depth == 0 { 2 } else { 5 }) {
        0..=1 => LEAVES[random.random_range(0..LEAVES.len())].to_owned(),
        2 => {
            let count = random.random_range(0..4);
            let elements: Vec<String> =
                (0..count).map(|_| random_json(random, depth - 1)).collect();
            format!("[{}]", elements.join(","))
        }
        _ => {
            let count = random.random_range(0..4);
            let members = (0..count).map(|_| {
                let name = NAMES[random.random_range(0..NAMES.len())];
                format!("\"{name}\":{}", random_json(random, depth - 1))
            });
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
    };
    format!("{before}{inner}{after}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_json_comes_back_to_the_letter_from_messages_edits_and_annotations() {
    let room = room("chat:letter");
    let seed: u64 = rand::rng().random();
    let random = &mut StdRng::seed_from_u64(seed);
    let deep = |open: &str, close: &str, depth: usize| {
        format!("{}1{}", open.repeat(depth), close.repeat(depth))
    };
    let mut bodies = vec![
        deep("[", "]", 64),
        deep("[", "]", 65),
        deep("[", "]", 120),
        deep(r#"{"a":"#, "}", 64),
        deep(r#"{"a":"#, "}", 99),
        deep("[", "]", 20_000),
        format!("[{}1]", "1,".repeat(30_000)),
        format!("\"{}\"", "x\u{0}".repeat(1000).replace('\0', r"\u0000")),
    ];
    bodies.extend((0..300).map(|_| random_json(random, 5)));
    let mut entries = Vec::new();
    for (seq, body) in (1..).step_by(4).zip(&bodies) {
        entries.push(message(&room, seq, body));
        entries.push(message(&room, seq + 1, "1"));
        entries.push(change(&room, seq + 2, seq + 1, edit(body)));
        entries.push(change(&room, seq + 3, seq + 1, annotate("a", body)));
    }
    for order in ["together", "one by one", "again"] {
        let target = Own::new().await;
        match order {
            "together" => target.write(&entries).await,
            // Edits and annotations as updates.
            _ => {
                for step in 0..4 {
                    let part: Vec<Entry> = entries.iter().skip(step).step_by(4).cloned().collect();
                    target.write(&part).await;
                }
            }
        }
        if order == "again" {
            target.write(&entries).await;
        }
        let model = Model::of(&entries);
        let keys: Vec<String> = model.0.keys().cloned().collect();
        let mut got = target.store.get(&keys).await.unwrap();
        got.sort_by(|a, b| a.key.cmp(&b.key));
        for (got, expected) in got.iter().zip(model.documents()) {
            assert_eq!(*got, expected, "seed {seed}, {order}");
        }
        assert_eq!(got.len(), keys.len());
    }
}

/// Entries beyond every bound: reactions and annotations of too many names and too many users.
fn too_much(room: &RoomId) -> Vec<Entry> {
    let mut entries = vec![message(room, 1, &text("popular"))];
    let mut seq = 2;
    let mut say = |user: String, change_: Change| {
        entries.push(by(&user, change(room, seq, 1, change_)));
        seq += 1;
    };
    for n in 0..1100 {
        say(format!("user{n:04}"), react("👍", true));
    }
    for n in 0..100 {
        say("zoe".to_owned(), react(&format!("r{n:03}"), true));
        say("ann".to_owned(), react(&format!("r{n:03}"), n % 3 > 0));
        say(
            "user0003".to_owned(),
            react(["👍", "👍\u{fe0f}"][n % 2], n % 5 > 0),
        );
    }
    let large = format!("\"{}\"", "x".repeat(8000));
    for user in 0..30 {
        for name in 0..40 {
            say(
                format!("bot{user:02}"),
                annotate(&format!("n{name:02}"), &large),
            );
        }
    }
    say("bot01".to_owned(), annotate("n00", "1"));
    say("kim".to_owned(), edit(text("edited")));
    entries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_stays_within_bounds_and_is_the_same_in_every_order() {
    let own = Own::new().await;
    let room = room("chat:bounds");
    let entries = too_much(&room);
    let model = Model::of(&entries).documents();
    let key = model[0].key.clone();
    let folded = &model[0].folded;
    assert!(folded.truncated);
    assert_eq!(folded.reactions.iter().count(), 999 + 10);
    assert_eq!(folded.annotations.iter().count(), 8 * 32);
    let seed: u64 = rand::rng().random();
    let random = &mut StdRng::seed_from_u64(seed);
    for round in 0..3 {
        let mut said = entries.clone();
        said.extend_from_within(..entries.len() / 3);
        match round {
            0 => {}
            1 => said.reverse(),
            _ => said.shuffle(random),
        }
        let mut largest = 0;
        for pair in said.chunks(400) {
            let (one, two) = pair.split_at(pair.len() / 2);
            tokio::join!(own.write(one), own.write(two));
            let size = mongodb::bson::serialize_to_vec(&own.raw(&key).await)
                .unwrap()
                .len();
            largest = largest.max(size);
        }
        let got = own.store.get(std::slice::from_ref(&key)).await.unwrap();
        assert!(got == model, "seed {seed}, round {round}");
        // What counts is 2 MiB of annotations; what does not is one batch and the slack.
        assert!(largest < 6 << 20, "seed {seed}, round {round}: {largest}");
        own.database
            .collection::<Fields>("messages")
            .delete_many(doc! {})
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_user_can_not_make_a_document_grow_nor_take_from_others() {
    let own = Own::new().await;
    let room = room("chat:one");
    let mut seq = 3;
    own.write(&[
        message(&room, 1, &text("hi")),
        by(
            "translator",
            change(&room, 2, 1, annotate("translation", r#"{"en":"hello"}"#)),
        ),
        by("lee", change(&room, 3, 1, react("👍", true))),
    ])
    .await;
    let large = format!("\"{}\"", "x".repeat(8000));
    let key = format!("{room}/kim/1");
    let mut largest = 0;
    for _ in 0..12 {
        let mut entries = Vec::new();
        for _ in 0..40 {
            seq += 1;
            entries.push(by(
                "mal",
                change(&room, seq, 1, annotate(&format!("!{seq}"), &large)),
            ));
        }
        for _ in 0..200 {
            seq += 1;
            entries.push(by(
                "mal",
                change(&room, seq, 1, react(&format!("!{seq}"), true)),
            ));
        }
        own.write(&entries).await;
        let size = mongodb::bson::serialize_to_vec(&own.raw(&key).await)
            .unwrap()
            .len();
        largest = largest.max(size);
    }
    // 32 annotations of 8 KB that count, and at most as many of the last batch besides.
    assert!(largest < 600 << 10, "{largest}");
    let folded = own.folded(&key).await;
    assert!(folded.truncated);
    assert_eq!(folded.reactions.iter().count(), 11);
    assert_eq!(folded.annotations.iter().count(), 33);
    let has = |user: &str, name: &str| {
        let reacted = folded
            .reactions
            .iter()
            .any(|(u, n, _)| (u, n) == (user, name));
        reacted
            || folded
                .annotations
                .iter()
                .any(|(u, n, _)| (u, n) == (user, name))
    };
    assert!(has("translator", "translation") && has("lee", "👍"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_and_searches_read_no_more_bytes_than_they_may() {
    let own = Own::new().await;
    let room = room("chat:heavy");
    let body = serde_json::json!({ "text": "heavy", "x": "x".repeat(900 << 10) }).to_string();
    let entries: Vec<Entry> = (1..=30).map(|seq| message(&room, seq, &body)).collect();
    for part in entries.chunks(8) {
        own.write(part).await;
    }
    for end in [End::Oldest, End::Newest] {
        let (mut span, mut read) = (Span::default(), Vec::new());
        loop {
            let (page, all) = own.store.page(&room, &span, end, 50).await.unwrap();
            assert!((1..=4).contains(&page.len()), "{}", page.len());
            let last = page
                .last()
                .unwrap()
                .folded
                .base
                .as_ref()
                .unwrap()
                .place
                .clone();
            match end {
                End::Oldest => span.after = Some(last),
                End::Newest => span.before = Some(last),
            }
            read.extend(ids(&page));
            if all {
                break;
            }
        }
        assert_eq!(read.len(), 30);
    }
    let keys: Vec<String> = (1..=30).map(|n| format!("{room}/kim/{n}")).collect();
    let (some, looked) = own.store.get_first(&keys).await.unwrap();
    assert!(looked < 30 && some.len() == looked, "{looked}");
    assert_eq!(own.store.get(&keys).await.unwrap().len(), 30);
    let mut search = Search {
        rooms: RoomScope::one(room.clone()),
        text: "heavy".to_owned(),
        limit: 100,
        ..Search::default()
    };
    let mut found = Vec::new();
    loop {
        let (some, next) = own.store.search(&search).await.unwrap();
        found.extend(ids(&some));
        search.before = next;
        if search.before.is_none() {
            break;
        }
    }
    assert_eq!(found.len(), 30);
}

#[tokio::test]
async fn what_looks_the_same_is_one_reaction() {
    let own = Own::new().await;
    for (n, (first, second)) in [
        ("👍", "👍\u{fe0f}"),
        ("❤\u{fe0f}", "❤"),
        ("1\u{fe0f}\u{20e3}", "1\u{20e3}"),
        ("❤\u{fe0f}\u{200d}🔥", "❤\u{200d}🔥"),
        ("e\u{301}", "é"),
    ]
    .into_iter()
    .enumerate()
    {
        let room = room(&format!("chat:same{n}"));
        let key = format!("{room}/kim/1");
        let entries = [
            message(&room, 1, "1"),
            by("lee", change(&room, 2, 1, react(first, true))),
            by("ann", change(&room, 3, 1, react(second, true))),
            by("lee", change(&room, 4, 1, react(second, false))),
        ];
        for entry in entries.iter().rev() {
            own.write(std::slice::from_ref(entry)).await;
        }
        let folded = own.folded(&key).await;
        assert_eq!(folded, Model::of(&entries).documents()[0].folded);
        let said = folded.reactions.by_name();
        assert_eq!(said.len(), 1, "{first}");
        let said = said.into_values().next().unwrap();
        assert_eq!(said.iter().filter(|(_, said)| said.on).count(), 1);
        let earliest = said.iter().min_by_key(|(_, said)| &said.first).unwrap().1;
        assert_eq!(earliest.key, first);
    }
}

/// A document as version 1 wrote it.
fn of_version_1(entries: &[Entry]) -> Option<Fields> {
    let ms = |place: &Place| i64::try_from(place.ts).unwrap();
    let (mut body, mut ts) = (None, None);
    let mut fields = Fields::new();
    let (mut edited, mut deleted): (Option<&Place>, Option<&Place>) = (None, None);
    let mut reactions: BTreeMap<(String, String), (&Place, bool)> = BTreeMap::new();
    let mut annotations: BTreeMap<String, (&Place, &str, &str)> = BTreeMap::new();
    for entry in entries {
        let place = &entry.place;
        fields.insert("room", entry.room.as_str());
        match &entry.what {
            What::Message { key, said } => {
                if ts.is_none() {
                    ts = Some(place);
                    fields.extend(doc! {
                        "_id": key, "id": &said.id, "from": &entry.from, "origin": place.origin.as_str(),
                        "epoch": place.epoch.as_str(), "seq": i64::try_from(place.seq).unwrap(),
                        "fp": i32::from(said.fingerprint), "ts": ms(place), "place": place.to_string(),
                        "reply_to": said.reply_to.clone(), "reply_key": said.reply_key.clone(),
                    });
                    if !said.mentions.is_empty() {
                        fields.insert("mentions", said.mentions.clone());
                    }
                    if edited.is_none() {
                        body = Some(said.body.clone());
                    }
                }
            }
            What::Change { target, change } => {
                fields.insert("_id", target);
                match change {
                    Change::Edit { body: to, .. } => {
                        edited = Some(place);
                        body = Some(to.clone());
                    }
                    Change::Delete => deleted = deleted.or(Some(place)),
                    Change::React { key, on } => {
                        reactions.insert((key.clone(), entry.from.clone()), (place, *on));
                    }
                    Change::Annotate(all) => {
                        for (name, json) in all {
                            annotations.insert(name.clone(), (place, &entry.from, json));
                        }
                    }
                }
            }
            What::Nothing(_) => {}
        }
    }
    for name in ["reply_to", "reply_key"] {
        if fields.get(name) == Some(&Bson::Null) {
            fields.remove(name);
        }
    }
    if let Some(deleted) = deleted {
        fields.remove("mentions");
        fields.extend(doc! { "deleted": deleted.to_string(), "deleted_at": ms(deleted) });
        return fields.contains_key("_id").then_some(fields);
    }
    if let Some(body) = body {
        fields.extend(doc! { "body": body, "terms": ["old"] });
    }
    if let Some(edited) = edited {
        fields.extend(doc! { "edited": edited.to_string(), "edited_at": ms(edited) });
    }
    let escaped = |text: &str| {
        let special = |c: char| matches!(c, '.' | '$' | '\0' | '=');
        let escape = |c: char| match special(c) {
            true => format!("={:02X}", u32::from(c)),
            false => c.to_string(),
        };
        let text: String = text.chars().map(escape).collect();
        if text.is_empty() {
            "=".to_owned()
        } else {
            text
        }
    };
    let mut by_key = Fields::new();
    for ((key, user), (place, on)) in reactions {
        let users = by_key
            .entry(escaped(&key))
            .or_insert_with(|| doc! {}.into());
        let said = doc! { "at": place.to_string(), "on": on };
        users
            .as_document_mut()
            .unwrap()
            .insert(escaped(&user), said);
    }
    if !by_key.is_empty() {
        fields.insert("reactions", by_key);
    }
    let mut by_name = Fields::new();
    for (name, (place, from, json)) in annotations {
        by_name.insert(
            escaped(&name),
            doc! { "at": place.to_string(), "from": from, "json": json },
        );
    }
    if !by_name.is_empty() {
        fields.insert("annotations", by_name);
    }
    fields.contains_key("_id").then_some(fields)
}

/// A database of version 1, with what was said in it.
async fn database_of_version_1(seed: u64, rooms: u64) -> (Own, Vec<Entry>) {
    let own = Own::at(mongodb_url(), &unique("store")).await;
    let meta = own.database.collection::<Fields>("meta");
    meta.insert_one(doc! { "_id": "schema", "version": 1_i64 })
        .await
        .unwrap();
    let messages = own.database.collection::<Fields>("messages");
    let mut all = Vec::new();
    for case in 0..rooms {
        let random = &mut StdRng::seed_from_u64(seed ^ case);
        let room = room(&format!("chat:old{case}"));
        let mut of: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
        let mut reacted = BTreeSet::new();
        for seq in 1..random.random_range(2..24) {
            let mut entry = random_entry(random, &room, seq);
            let key = match &mut entry.what {
                What::Message { key, .. } => key.clone(),
                What::Change { target, change } => {
                    match change {
                        // It knew none.
                        Change::Edit { mentions, .. } => *mentions = None,
                        // It kept one user's.
                        Change::Annotate(_) => "bot".clone_into(&mut entry.from),
                        // It knew only where each was said last.
                        Change::React { key, .. } => {
                            if !reacted.insert((target.clone(), key.clone(), entry.from.clone())) {
                                continue;
                            }
                        }
                        Change::Delete => {}
                    }
                    target.clone()
                }
                What::Nothing(_) => continue,
            };
            of.entry(key).or_default().push(entry);
        }
        for mut entries in of.into_values() {
            entries.sort_by(|a, b| a.place.cmp(&b.place));
            for entry in &mut entries {
                // There was no import at that time.
                entry.original_ts = None;
            }
            if let Some(mut old) = of_version_1(&entries) {
                old.insert("note", "of a person");
                messages.insert_one(old).await.unwrap();
                all.extend(entries);
            }
        }
    }
    own.store.prepare().await.unwrap();
    (own, all)
}

impl Own {
    async fn is_what_was_said(&self, entries: &[Entry], when: &str) {
        let model = Model::of(entries);
        let keys: Vec<String> = model.0.keys().cloned().collect();
        let mut got = self.store.get(&keys).await.unwrap();
        got.sort_by(|a, b| a.key.cmp(&b.key));
        let expected = model.documents();
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got, expected, "{when}");
        }
        assert_eq!(got.len(), expected.len(), "{when}");
    }

    async fn old_ones(&self) -> Vec<String> {
        let number = doc! { "$type": "number" };
        let old = ["ts", "edited_at", "deleted_at"].map(|name| doc! { name: number.clone() });
        self.keys(doc! { "$or": old.to_vec() }).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_of_version_1_are_read_updated_and_written_anew() {
    let seed: u64 = rand::rng().random();
    let (own, mut entries) = database_of_version_1(seed, 60).await;
    let when = |when: &str| format!("seed {seed}, {when}");
    assert!(own.old_ones().await.len() > 60);
    own.is_what_was_said(&entries, &when("before")).await;
    // What is said now goes into old documents, and what was said then is given out again.
    let random = &mut StdRng::seed_from_u64(!seed);
    let mut more = Vec::new();
    for case in 0..60 {
        let room = room(&format!("chat:old{case}"));
        more.extend((100..110).map(|seq| random_entry(random, &room, seq)));
    }
    let (first, second) = more.split_at(more.len() / 2);
    own.write(first).await;
    own.write(&entries).await;
    entries.extend_from_slice(first);
    own.is_what_was_said(&entries, &when("updated")).await;
    assert!(!own.old_ones().await.is_empty());
    tokio::join!(own.migrate(), own.write(second));
    entries.extend_from_slice(second);
    own.is_what_was_said(&entries, &when("after")).await;
    assert_eq!(own.old_ones().await, Vec::<String>::new());
    assert_eq!(
        own.keys(doc! { "terms": "old" }).await,
        Vec::<String>::new()
    );
    assert!(!own.keys(doc! { "note": "of a person" }).await.is_empty());
    // Nothing is left to do, and doing it changes nothing.
    assert_eq!(own.store.migrate("other").await.unwrap(), Migrated::All);
    own.store.prepare().await.unwrap();
    assert_eq!(own.store.migrate("other").await.unwrap(), Migrated::All);
    let meta = own.database.collection::<Fields>("meta");
    let schema = meta
        .find_one(doc! { "_id": "schema" })
        .await
        .unwrap()
        .unwrap();
    assert_eq!(schema.get_i64("version").unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_is_killed_goes_on_elsewhere() {
    let seed: u64 = rand::rng().random();
    let (own, entries) = database_of_version_1(seed, 400).await;
    let all = own.old_ones().await.len();
    assert!(all > 600, "{all}");
    // One holds it, and nobody else takes a step.
    let first = own.store.migrate("a").await.unwrap();
    assert!(
        matches!(first, Migrated::Some(renewed) if renewed > 0),
        "{first:?}"
    );
    assert_eq!(own.store.migrate("b").await.unwrap(), Migrated::Elsewhere);
    let left = own.old_ones().await.len();
    assert!(0 < left && left < all, "{left} of {all}");
    // It dies at any point of a step, again and again; what it held is free when its time is over.
    let meta = own.database.collection::<Fields>("meta");
    let mut sample = entries.clone();
    sample.retain(|entry| ["chat:old0", "chat:old7", "chat:old350"].contains(&entry.room.as_str()));
    let mut rounds = 0;
    for holder in 0_u64.. {
        let holder = format!("killed{holder}");
        let free = doc! { "$set": { "due": DateTime::from_millis(0) } };
        meta.update_one(doc! { "_id": "migration" }, free)
            .await
            .unwrap();
        let store = own.store.clone();
        let step = tokio::spawn(async move { store.migrate(&holder).await });
        rounds += 1;
        let cut = Duration::from_micros(200 * rounds * rounds);
        let abort = step.abort_handle();
        let migrated = tokio::time::timeout(cut, step).await;
        abort.abort();
        own.is_what_was_said(&sample, &format!("seed {seed}, killed"))
            .await;
        if matches!(migrated, Ok(Ok(Ok(Migrated::All)))) {
            break;
        }
        assert!(rounds < 500, "it never ends");
    }
    own.is_what_was_said(&entries, &format!("seed {seed}, after"))
        .await;
    assert_eq!(own.old_ones().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_migrate_while_others_write_and_nothing_is_lost() {
    let seed: u64 = rand::rng().random();
    let (own, mut entries) = database_of_version_1(seed, 150).await;
    let random = &mut StdRng::seed_from_u64(!seed);
    let mut more = Vec::new();
    for case in 0..150 {
        let room = room(&format!("chat:old{case}"));
        more.extend((100..112).map(|seq| random_entry(random, &room, seq)));
    }
    more.shuffle(random);
    let meta = own.database.collection::<Fields>("meta");
    let migrating = async |holder: &str| {
        while own.store.migrate(holder).await.unwrap() != Migrated::All {
            // Each takes it from the other.
            let free = doc! { "$set": { "due": DateTime::from_millis(0) } };
            meta.update_one(doc! { "_id": "migration" }, free)
                .await
                .unwrap();
        }
    };
    let writing = async {
        for part in more.chunks(50) {
            own.write(part).await;
        }
    };
    tokio::join!(migrating("a"), migrating("b"), writing);
    entries.extend_from_slice(&more);
    own.is_what_was_said(&entries, &format!("seed {seed}"))
        .await;
    assert_eq!(own.old_ones().await, Vec::<String>::new());
}

#[test]
fn bounds_are_those_that_are_documented() {
    use natter::testing::store::{Annotation, Reaction};
    assert_eq!((Reaction::NAMES, Reaction::USERS), (10, 1000));
    assert_eq!((Annotation::NAMES, Annotation::USERS), (32, 8));
}
