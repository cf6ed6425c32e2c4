//! Threads: the answers to a message, as pages and as numbers.

use std::collections::HashMap;

use natter::testing::store::Replies;

use super::*;

const INDEX: &str = "IXSCAN { reply_key: 1, room: 1, place: -1, deleted: 1, _id: 1 }";

fn key(room: &RoomId, id: u64) -> String {
    format!("{room}/kim/{id}")
}

/// A message of kim that answers the one with the id `first`.
fn answer(room: &RoomId, seq: u64, first: u64) -> Entry {
    let mut entry = message(room, seq, &text("an answer"));
    if let What::Message { said, .. } = &mut entry.what {
        said.reply_to = Some(format!("kim/{first}"));
        said.reply_key = Some(key(room, first));
    }
    entry
}

fn thread(room: &RoomId, first: u64) -> Span {
    Span {
        thread: Some(key(room, first)),
        ..Span::default()
    }
}

impl Model {
    fn thread(&self, first: &str) -> Vec<Document> {
        let mut answers = self.page();
        answers.retain(|document| {
            let said = &document.folded.base.as_ref().unwrap().said;
            said.reply_key.as_deref() == Some(first)
        });
        answers
    }

    /// The number of answers that are not deleted, and the newest: its place and its key.
    fn replies(&self, first: &str) -> Option<(usize, Place, String)> {
        let mut answers = self.thread(first);
        answers.retain(|document| document.folded.deleted.is_none());
        let last = answers.last()?;
        let place = last.folded.base.as_ref().unwrap().place.clone();
        Some((answers.len(), place, last.key.clone()))
    }
}

fn shown(replies: &Replies) -> (usize, Place, String) {
    assert!(!replies.capped);
    let (place, key) = replies.last.clone().unwrap();
    (replies.count, place, key)
}

fn random_entry(random: &mut StdRng, room: &RoomId, seq: u64) -> Entry {
    let id = random.random_range(0..9);
    let origin = ["a", "a-b", "ab"][random.random_range(0..3)];
    let said = Said {
        // Of a message that is there twice, only the first counts: they may answer different ones, or each other.
        reply_key: random
            .random_bool(0.7)
            .then(|| key(room, random.random_range(0..3))),
        ..said(&id.to_string(), &text("said"))
    };
    let what = match random.random_range(0..10) {
        0..6 => What::Message {
            key: key(room, id),
            said,
        },
        6 => What::Change {
            target: key(room, id),
            change: Change::Delete,
        },
        _ => What::Change {
            target: key(room, id),
            change: edit(text("edited")),
        },
    };
    Entry {
        original_ts: None,
        room: room.clone(),
        place: place(origin, 1_000 + seq / 4, seq),
        from: "kim".to_owned(),
        what,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_are_as_the_model_says_in_any_order_of_writes_with_any_repeats() {
    let own = Own::new().await;
    let seed: u64 = rand::rng().random();
    for case in 0..100 {
        let random = &mut StdRng::seed_from_u64(seed ^ case);
        let room = room(&format!("chat:r{case}"));
        let count = random.random_range(1..40);
        let entries: Vec<Entry> = (1..=count)
            .map(|seq| random_entry(random, &room, seq))
            .collect();
        let mut said = entries.clone();
        for _ in 0..random.random_range(0..count) {
            said.push(entries[random.random_range(0..entries.len())].clone());
        }
        said.shuffle(random);
        // In the middle and at the end.
        let cut = random.random_range(0..said.len());
        for (from, to) in [(0, cut), (cut, said.len())] {
            let (first, second) = said[from..to].split_at((to - from) / 2);
            tokio::join!(own.write(first), own.write(second));
            let model = Model::of(&said[..to]);
            let keys: Vec<String> = (0..9).map(|id| key(&room, id)).collect();
            let replies = own.store.replies(&room, &keys, &[]).await.unwrap();
            for first in &keys {
                let thread = Span {
                    thread: Some(first.clone()),
                    ..Span::default()
                };
                let page = own.all(&room, &thread, End::Oldest).await;
                assert_eq!(page, model.thread(first), "seed {seed}, case {case}");
                let replies = replies.get(first).filter(|replies| replies.count > 0);
                let replies = replies.map(shown);
                assert_eq!(replies, model.replies(first), "seed {seed}, case {case}");
            }
            // Without some answers, whose outlines say the rest.
            let without: Vec<String> = keys.iter().step_by(2).cloned().collect();
            let mut rest = own.store.replies(&room, &keys, &without).await.unwrap();
            for outline in own.store.outlines(&without).await.unwrap() {
                let Some(base) = outline.folded.base else {
                    continue;
                };
                if let (Some(first), None) = (base.said.reply_key, outline.folded.deleted) {
                    rest.entry(first)
                        .or_default()
                        .add(&base.place, &outline.key);
                }
            }
            rest.retain(|_, replies| replies.count > 0);
            let all: HashMap<_, _> = rest.iter().map(|(key, it)| (key, shown(it))).collect();
            let expected = keys
                .iter()
                .filter_map(|key| Some((key, model.replies(key)?)));
            assert_eq!(all, expected.collect(), "seed {seed}, case {case}");
        }
    }
}

#[tokio::test]
async fn threads_use_their_index_and_counting_reads_no_document() {
    let own = Own::new().await;
    let room = room("chat:a");
    let other = super::room("chat:b");
    // Among 1,000 messages, 100 of them with an answer, and as many elsewhere.
    let mut entries = Vec::new();
    for room in [&room, &other] {
        entries.extend((1..=900).map(|seq| message(room, seq, &text("said"))));
        entries.extend((1..=100).map(|n| answer(room, 1000 + n, n)));
        entries.push(change(room, 2000, 1007, Change::Delete));
    }
    own.write(&entries).await;
    own.watch().await;
    let page: Vec<String> = (1..=200).map(|id| key(&room, id)).collect();
    let replies = own.store.replies(&room, &page, &[key(&room, 1008)]).await;
    let there = replies.unwrap().into_values().filter(|it| it.count > 0);
    assert_eq!(there.count(), 98);
    let answers = own.all(&room, &thread(&room, 5), End::Newest).await;
    assert_eq!(ids(&answers), ["1005"]);
    let queries = own.watched("query").await;
    let [counted, read] = queries.as_slice() else {
        panic!("one query for the page, and one for the thread: {queries:?}");
    };
    for query in [counted, read] {
        assert_eq!(query.get_str("planSummary").unwrap(), INDEX, "{query}");
        assert!(query.get("hasSortStage").is_none(), "{query}");
    }
    let number = |query: &Fields, name: &str| match query.get(name).unwrap() {
        Bson::Int32(number) => i64::from(*number),
        other => other.as_i64().unwrap(),
    };
    assert_eq!(number(counted, "docsExamined"), 0, "{counted}");
    // Those that are counted, and where the next key begins.
    assert!(number(counted, "keysExamined") <= 400, "{counted}");
    assert_eq!(number(read, "docsExamined"), 1, "{read}");
}

#[tokio::test]
async fn what_thousands_of_answers_cost_is_bounded() {
    let own = Own::new().await;
    let room = room("chat:a");
    let mut seq = 100;
    let mut entries = Vec::new();
    for (first, answers) in [(1, 3), (2, 2500), (3, 1000), (4, 1001), (5, 2)] {
        entries.extend((0..answers).map(|n| answer(&room, seq + n, first)));
        seq += answers;
    }
    entries.push(change(&room, seq, seq - 1, Change::Delete));
    own.write(&entries).await;
    own.watch().await;
    let page: Vec<String> = (1..=100).map(|id| key(&room, id)).collect();
    let replies = own.store.replies(&room, &page, &[]).await.unwrap();
    let counts = |first: u64| {
        let replies = &replies[&key(&room, first)];
        let (_, last) = replies.last.clone().unwrap();
        let last: u64 = last.rsplit_once('/').unwrap().1.parse().unwrap();
        (replies.count, replies.capped, last)
    };
    assert_eq!(counts(1), (3, false, 102));
    assert_eq!(counts(2), (1000, true, 2602));
    assert_eq!(counts(3), (1000, false, 3602));
    assert_eq!(counts(4), (1000, true, 4603));
    // The last one is deleted.
    assert_eq!(counts(5), (1, false, 4604));
    assert_eq!(replies.len(), 5);
    // One query, and one that counts each by itself.
    let aggregations = own.watched("command").await;
    let parts: Vec<&Fields> = aggregations
        .iter()
        .filter(|it| {
            it.get_document("command")
                .is_ok_and(|it| it.contains_key("aggregate"))
        })
        .collect();
    assert_eq!(parts.len(), 1, "{aggregations:?}");
    let examined = |name: &str| match parts[0].get(name).unwrap() {
        Bson::Int32(number) => i64::from(*number),
        other => other.as_i64().unwrap(),
    };
    assert_eq!(examined("docsExamined"), 0, "{}", parts[0]);
    assert!(examined("keysExamined") <= 4 * 1001 + 200, "{}", parts[0]);
}
