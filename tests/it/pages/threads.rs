//! Threads: the answers to a message, over the streams and MongoDB as one log.

use natter::testing::history::PageAnswer;

use super::*;
use crate::support::regions::Regions;

/// What threads must be: the messages in order, each with the key of what it answers.
#[derive(Default, Clone)]
struct Model(Vec<Said>);

#[derive(Clone)]
struct Said {
    key: String,
    first: Option<String>,
    deleted: bool,
}

impl Model {
    fn say(&mut self, key: &str, first: Option<&str>) {
        // Of a message that is said twice, the first one counts.
        if self.0.iter().all(|said| said.key != key) {
            self.0.push(Said {
                key: key.to_owned(),
                first: first.map(str::to_owned),
                deleted: false,
            });
        }
    }

    fn thread(&self, first: &str) -> Vec<&Said> {
        let answers = self.0.iter();
        answers
            .filter(|said| said.first.as_deref() == Some(first))
            .collect()
    }

    /// The number of answers, and the newest.
    fn replies(&self, first: &str) -> Option<(u64, String)> {
        let mut answers = self.thread(first);
        answers.retain(|said| !said.deleted);
        Some((answers.len() as u64, answers.last()?.key.clone()))
    }
}

/// A message as `<user>/<id>`.
fn name(message: &Value) -> String {
    let text = |field: &str| message[field].as_str().unwrap();
    format!("{}/{}", text("from"), text("id"))
}

fn replies(message: &Value) -> Option<(u64, String)> {
    let replies = &message["replies"];
    assert_eq!(replies["capped"], Value::Null);
    let count = replies["count"].as_u64()?;
    Some((count, name(&replies["last"])))
}

fn messages(page: &PageAnswer) -> Vec<Value> {
    let messages = page.messages.iter();
    messages
        .map(|raw| serde_json::from_str(raw.get()).unwrap())
        .collect()
}

impl Hand {
    async fn put(&self, class: Class, headers: &[(&str, &str)], body: &str) {
        let subjects = Subjects::new(&self.mesh.config.nats.prefix);
        let subject = subjects.publish(&self.region(), 0, &self.room, class);
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let jetstream = jetstream::new(self.client.clone());
        let ack = jetstream.publish_with_headers(subject, map, body.to_owned().into());
        ack.await.unwrap().await.unwrap();
    }

    /// Says and changes things at random, and tells the model.
    async fn talk(&self, model: &mut Model, count: usize, random: &mut StdRng) {
        for _ in 0..count {
            let user = ["kim", "lee/o"][random.random_range(0..2)];
            let id = format!("m{}", random.random_range(0..60));
            let key = format!("{user}/{id}");
            match random.random_range(0..10) {
                0 => {
                    let headers = [
                        (header::FROM, user),
                        (header::ID, &id),
                        (header::KIND, "delete"),
                        (header::TARGET, &key),
                    ];
                    self.put(Class::Ev, &headers, "null").await;
                    for said in model.0.iter_mut().filter(|said| said.key == key) {
                        said.deleted = true;
                    }
                    // A deletion of what is not there yet holds too: no such message is said later.
                    if model.0.iter().all(|said| said.key != key) {
                        model.0.push(Said {
                            key,
                            first: None,
                            deleted: true,
                        });
                    }
                }
                1 => {
                    let headers = [
                        (header::FROM, user),
                        (header::ID, &id),
                        (header::KIND, "edit"),
                        (header::TARGET, &key),
                    ];
                    self.put(Class::Ev, &headers, "\"edited\"").await;
                }
                _ => {
                    if model.0.iter().any(|said| said.key == key && said.deleted) {
                        continue;
                    }
                    // Most answer one of a few, some another one that may not exist, or itself; a bare id is one's own.
                    let first = match random.random_range(0..10) {
                        0..2 => None,
                        2..8 => Some(format!("kim/m{}", random.random_range(0..4))),
                        _ => Some(format!("{user}/m{}", random.random_range(0..80))),
                    };
                    let mut headers = vec![(header::FROM, user), (header::ID, &id)];
                    let bare = first
                        .as_deref()
                        .and_then(|first| first.strip_prefix(&format!("{user}/")));
                    if let Some(first) = bare.or(first.as_deref()) {
                        headers.push((header::REPLY_TO, first));
                    }
                    self.put(Class::Msg, &headers, "\"said\"").await;
                    model.say(&key, first.as_deref());
                }
            }
        }
    }

    fn thread(&self, first: &str, anchor: PageAnchor, limit: usize) -> PageRequest {
        PageRequest {
            thread: Some(format!("{}/{first}", self.room)),
            ..self.ask(anchor, limit)
        }
    }

    /// Checks all threads and all numbers of answers.
    async fn check(&self, model: &Model, pages: &Pages, partial: bool, context: &str) {
        let page = pages
            .page(&self.ask(PageAnchor::Newest, 200))
            .await
            .unwrap();
        assert_eq!(page.partial, partial, "{context}");
        let shown = messages(&page);
        assert!(shown.len() > 20, "{context}");
        for message in &shown {
            let name = name(message);
            assert_eq!(
                replies(message),
                model.replies(&name),
                "{context}: {message}"
            );
        }
        for (number, first) in model.0.iter().map(|said| &said.key).enumerate() {
            let thread = model.thread(first);
            let expected: Vec<&str> = thread.iter().map(|said| said.key.as_str()).collect();
            let shown = shown.iter().any(|message| name(message) == *first);
            // Threads without answers are alike.
            if expected.is_empty() && (!shown || number > 9) {
                continue;
            }
            // From either end, and around each answer.
            let mut anchor = PageAnchor::Oldest;
            let mut all = Vec::new();
            loop {
                let page = pages.page(&self.thread(first, anchor, 3)).await.unwrap();
                assert_eq!(page.partial, partial, "{context}");
                all.extend(messages(&page).iter().map(name));
                match page.next {
                    Some(next) => anchor = PageAnchor::After(At::Cursor(next)),
                    None => break,
                }
            }
            assert_eq!(all, expected, "{context}: {first}");
            let (mut anchor, mut all) = (PageAnchor::Newest, Vec::new());
            loop {
                let page = pages.page(&self.thread(first, anchor, 4)).await.unwrap();
                all.splice(0..0, messages(&page).iter().map(name));
                match page.prev {
                    Some(prev) => anchor = PageAnchor::Before(At::Cursor(prev)),
                    None => break,
                }
            }
            assert_eq!(all, expected, "{context}: {first}");
            for (at, answer) in expected.iter().enumerate().step_by(3) {
                let key = At::Key(format!("{}/{answer}", self.room));
                let page = pages
                    .page(&self.thread(first, PageAnchor::Around(key), 3))
                    .await;
                let page = page.unwrap();
                let found: Vec<String> = messages(&page).iter().map(name).collect();
                let from = at.saturating_sub(1).min(expected.len().saturating_sub(3));
                let to = (from + 3).min(expected.len());
                assert_eq!(found, expected[from..to], "{context}: {first}");
                if !partial {
                    assert_eq!(
                        (page.prev.is_some(), page.next.is_some()),
                        (from > 0, to < expected.len())
                    );
                }
            }
        }
    }
}

/// Before the history service ran, in the middle of its work, and after it, threads are the same.
#[tokio::test(flavor = "multi_thread")]
async fn wherever_answers_are_threads_and_their_numbers_are_those_of_the_log() {
    let seed: u64 = rand::random();
    let random = &mut StdRng::seed_from_u64(seed);
    let hand = Hand::new("chat:threads").await;
    let mut model = Model::default();
    hand.talk(&mut model, 160, random).await;
    let (pages, alone) = (hand.pages(Some(hand.store.clone())), hand.pages(None));
    // Without a consumer nothing is known to be in MongoDB, and nothing says so.
    hand.confirm(0).await;
    hand.check(&model, &pages, false, &format!("seed {seed}: before"))
        .await;
    hand.check(&model, &alone, true, &format!("seed {seed}: stream"))
        .await;

    let mut confirmed = 0;
    for confirm in [70, 60] {
        let entries = hand.entries().await;
        let total = confirmed + confirm;
        // What is confirmed is written, and some of what is not; in any order, with repeats.
        let mut written: Vec<Entry> = entries[..total].to_vec();
        written.extend(entries[total..].iter().filter(|_| random.random()).cloned());
        written.extend(entries.iter().take(30).cloned());
        written.shuffle(random);
        for part in written.chunks(17) {
            assert_eq!(hand.store.write(part).await.unwrap(), []);
        }
        let context = format!("seed {seed}: {total} confirmed");
        // Written, and not confirmed yet; then both.
        hand.check(&model, &pages, false, &context).await;
        hand.confirm(confirm).await;
        confirmed = total;
        hand.talk(&mut model, 10, random).await;
        hand.check(&model, &pages, false, &context).await;
        hand.check(&model, &alone, true, &context).await;
    }
    let entries = hand.entries().await;
    assert_eq!(hand.store.write(&entries).await.unwrap(), []);
    hand.confirm(entries.len() - confirmed).await;
    hand.check(&model, &pages, false, &format!("seed {seed}: after"))
        .await;
}

/// Where the streams can't be read as a whole, pages of a thread go on through them, even where it has no answers.
#[tokio::test(flavor = "multi_thread")]
async fn far_apart_answers_are_found_by_going_on() {
    let hand = Hand::new("chat:far").await;
    hand.publish(0..1).await;
    let answer = |id: &'static str| {
        [
            (header::FROM, "lee"),
            (header::ID, id),
            (header::REPLY_TO, "kim/m0"),
        ]
    };
    hand.put(Class::Msg, &answer("a1"), "1").await;
    hand.publish(1..3000).await;
    hand.put(Class::Msg, &answer("a2"), "2").await;
    hand.publish(3000..6000).await;
    hand.confirm(0).await;
    for store in [None, Some(hand.store.clone())] {
        let pages = hand.pages(store);
        for forwards in [true, false] {
            let mut anchor = if forwards {
                PageAnchor::Oldest
            } else {
                PageAnchor::Newest
            };
            let (mut all, mut asked) = (Vec::new(), 0);
            loop {
                let page = pages
                    .page(&hand.thread("kim/m0", anchor, 10))
                    .await
                    .unwrap();
                assert!(page.partial);
                asked += 1;
                assert!(asked < 20, "it has no end");
                all.extend(messages(&page).iter().map(name));
                let on = if forwards { page.next } else { page.prev };
                let Some(on) = on.map(At::Cursor) else { break };
                anchor = if forwards {
                    PageAnchor::After(on)
                } else {
                    PageAnchor::Before(on)
                };
            }
            let expected = if forwards {
                ["lee/a1", "lee/a2"]
            } else {
                ["lee/a2", "lee/a1"]
            };
            assert_eq!(all, expected);
        }
    }
}

/// Two regions, each of which writes its own messages: answers may be in MongoDB before the message that they answer.
#[tokio::test(flavor = "multi_thread")]
async fn answers_of_two_regions_are_one_thread_whichever_is_written_first() {
    const REGIONS: [&str; 2] = ["seoul", "virginia"];
    let toml = format!("mongodb.url = '{}'", mongodb_url());
    let mut regions = Regions::start_with(&REGIONS, &toml, Duration::ZERO).await;
    for region in REGIONS {
        regions.mesh(region).add_edge().await;
    }
    let room = "chat:a";
    say(
        regions.at("seoul"),
        room,
        "kim",
        json!({"id": "1", "body": 1}),
    )
    .await;
    for number in 0..6 {
        let region = regions.at(REGIONS[number % 2]);
        let answer = json!({"id": format!("a{number}"), "body": number, "reply_to": "kim/1"});
        say(region, room, "kim", answer).await;
    }
    // One of seoul is deleted in virginia, and one of virginia in seoul.
    for (number, target) in ["kim/a1", "kim/a2"].into_iter().enumerate() {
        let delete = json!({"kind": "delete", "target": target, "body": null});
        say(regions.at(REGIONS[number]), room, "kim", delete).await;
    }
    let all = async |regions: &Regions, partial: bool| {
        for region in REGIONS {
            let mesh = regions.at(region);
            eventually("the thread is whole", LONG, async || {
                let path = format!("/v1/rooms/{room}/messages");
                let page = mesh.get(0, &path).await?;
                let messages = page["messages"].as_array().ok_or("no messages")?;
                let first = messages
                    .iter()
                    .find(|it| it["id"] == "1")
                    .ok_or("no first")?;
                let thread = mesh.get(0, &format!("{path}?thread=kim/1")).await?;
                let mut answers = ids(&thread);
                answers.sort();
                let whole = answers == ["a0", "a1", "a2", "a3", "a4", "a5"]
                    && first["replies"]["count"] == 4
                    && [&page, &thread]
                        .iter()
                        .all(|it| (it["partial"] == true) == partial);
                whole
                    .then_some(())
                    .ok_or_else(|| format!("{page} {thread}"))
            })
            .await;
        }
    };
    all(&regions, true).await;
    // Answers are written, and what they answer is not yet.
    regions.mesh("virginia").add_worker("/readyz").await;
    caught_up(regions.at("virginia")).await;
    let messages = async |regions: &Regions| {
        let config = &regions.at("seoul").config.mongodb;
        let client = mongodb::Client::with_uri_str(config.url.expose())
            .await
            .unwrap();
        let database = client.database(&config.database);
        let messages = database.collection::<mongodb::bson::Document>("messages");
        let answers = mongodb::bson::doc! { "reply_key": "chat:a/kim/1" };
        let first = mongodb::bson::doc! { "_id": "chat:a/kim/1" };
        let count = async |filter| messages.count_documents(filter).await.unwrap();
        (count(answers).await, count(first).await)
    };
    assert_eq!(messages(&regions).await, (3, 0));
    regions.mesh("seoul").add_worker("/readyz").await;
    caught_up(regions.at("seoul")).await;
    assert_eq!(messages(&regions).await, (6, 1));
    all(&regions, false).await;
}

async fn thread(mesh: &Mesh, query: &str) -> Value {
    page(mesh, "chat:a", query).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_read_threads_in_every_protocol() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let room = "chat:a";
    let answer = |id: &str, to: &str| json!({"id": id, "body": {"text": id}, "reply_to": to});
    say(&mesh, room, "kim", json!({"id": "1", "body": 1})).await;
    say(&mesh, room, "kim", json!({"id": "2", "body": 2})).await;
    say(
        &mesh,
        "chat:b",
        "kim",
        json!({"id": "elsewhere", "body": 2}),
    )
    .await;
    // Before and after the history service wrote it.
    for written in [false, true] {
        if !written {
            say(&mesh, room, "lee", answer("a1", "kim/1")).await;
            say(&mesh, room, "kim", answer("a2", "1")).await;
            // An answer to an answer is in the thread of the answer.
            let deep = say(&mesh, room, "ann", answer("b1", "lee/a1")).await;
            assert_eq!(deep["dup"], false);
            // A repeated message, and a reaction that names a message, count nothing.
            assert_eq!(
                say(&mesh, room, "lee", answer("a1", "kim/1")).await["dup"],
                true
            );
            say(
                &mesh,
                room,
                "ann",
                json!({"kind": "reaction", "target": "kim/1", "body": "👍"}),
            )
            .await;
            say(&mesh, room, "lee", answer("a3", "kim/1")).await;
        } else {
            caught_up(&mesh).await;
        }
        let all = thread(&mesh, "").await;
        assert_eq!(ids(&all), ["1", "2", "a1", "a2", "b1", "a3"]);
        let at = |number: usize| &all["messages"][number];
        let last = |number: usize| {
            let message = at(number);
            json!({"id": message["id"], "from": message["from"], "ts": message["ts"]})
        };
        assert_eq!(at(0)["replies"], json!({"count": 3, "last": last(5)}));
        assert_eq!(at(2)["replies"], json!({"count": 1, "last": last(4)}));
        for number in [1, 3, 4, 5] {
            assert_eq!(at(number)["replies"], Value::Null);
        }
        for (query, expected) in [
            ("thread=1", vec!["a1", "a2", "a3"]),
            ("thread=kim/1&limit=2", vec!["a2", "a3"]),
            ("thread=kim%2F1&after=", vec!["a1", "a2", "a3"]),
            ("thread=1&after=&limit=2", vec!["a1", "a2"]),
            ("thread=1&before=lee/a3", vec!["a1", "a2"]),
            ("thread=1&after=1", vec!["a1", "a2", "a3"]),
            ("thread=1&after=2&limit=1", vec!["a1"]),
            ("thread=1&around=a2&limit=1", vec!["a2"]),
            ("thread=1&around=ann/b1&limit=2", vec!["a2", "a3"]),
            ("thread=1&before=2", vec![]),
            ("thread=1&after=lee/a3", vec![]),
            ("thread=1&order=desc&limit=2", vec!["a3", "a2"]),
            ("thread=lee/a1", vec!["b1"]),
            ("thread=2", vec![]),
        ] {
            assert_eq!(ids(&thread(&mesh, query).await), expected, "{query}");
        }
        let first = thread(&mesh, "thread=1&after=&limit=1").await;
        assert_eq!(first["prev"], Value::Null);
        let next = first["next"].as_str().unwrap();
        let second = thread(&mesh, &format!("thread=1&after={next}&limit=1")).await;
        assert_eq!(ids(&second), ["a2"]);
        assert_eq!(second["prev"], second["next"]);
        for query in [
            "thread=nobody",
            "thread=lee/1",
            "thread=elsewhere",
            "thread=chat:b/kim/elsewhere",
            "thread=",
            "thread=a%20b",
            "thread=kim/",
            "thread=1&before=nobody/1",
        ] {
            let found = refused(&mesh, &format!("/v1/rooms/{room}/messages?{query}")).await;
            assert_eq!(found, (400, "bad_id".to_owned()), "{query}");
        }
        let mut socket = Raw::open(mesh.edges[0].address, &token("kim")).await;
        let ask = json!({"op": "history", "rid": 7, "room": room, "thread": "1", "limit": 2});
        let found = socket.call(ask).await;
        assert_eq!(
            (ids(&found), &found["op"]),
            (vec!["a2".into(), "a3".into()], &json!("history"))
        );
        let ask = json!({"op": "history", "rid": 8, "room": room, "thread": "kim/"});
        assert_eq!(socket.call(ask).await["code"], "bad_id");
        let ask = json!({"op": "history", "rid": 9, "room": room, "thread": 1});
        assert_eq!(socket.call(ask).await["code"], "bad_request");
        let (mut client, _) = Client::connect(&mesh, 0, &token("kim")).await;
        let ask = json!({"method": "room.history", "data": {"room": room, "thread": "kim/1"}});
        let found = client.call("rpc", ask).await["rpc"]["data"].clone();
        assert_eq!(ids(&found), ["a1", "a2", "a3"]);
        let found = get_as(
            &mesh,
            &token("kim"),
            "/v1/rooms/chat:a/search?reply_to=1",
            "",
        )
        .await;
        if written {
            assert_eq!(ids(&found.json()), ["a3", "a2", "a1"]);
        }
    }
    // What is deleted is no answer any more, but still has its place in the thread.
    let path = format!("/v1/rooms/{room}/messages");
    let tag = |answer: &Answer| answer.header("etag").unwrap().to_owned();
    let before = tag(&get_as(&mesh, &token("kim"), &path, "").await);
    say(
        &mesh,
        room,
        "lee",
        json!({"kind": "delete", "target": "a3", "body": null}),
    )
    .await;
    let deleted = get_as(&mesh, &token("kim"), &path, "").await;
    assert_ne!(tag(&deleted), before);
    for written in [false, true] {
        if written {
            caught_up(&mesh).await;
        }
        let all = thread(&mesh, "").await;
        let last = &all["messages"][3];
        let replies = &all["messages"][0]["replies"];
        assert_eq!(
            (&replies["count"], &replies["last"]["id"]),
            (&json!(2), &last["id"])
        );
        assert_eq!(ids(&thread(&mesh, "thread=1").await), ["a1", "a2", "a3"]);
    }
    // An erased answer leaves no trace; of an erased message its answers stay.
    let all_rooms = vec![Grant::new("*:*", &[Right::Erase])];
    let moderator = bearer(&token_with("mod", LONG, all_rooms));
    for (user, count, left) in [("lee", json!(1), vec!["a2"]), ("kim", Value::Null, vec![])] {
        let path = format!("/v1/users/{user}/messages");
        eventually("it is erased", LONG, async || {
            let answer = request(mesh.edges[0].address, "DELETE", &path, &moderator, "").await;
            match answer.status {
                200 => Ok(()),
                _ => Err(answer.body),
            }
        })
        .await;
        let all = thread(&mesh, "").await;
        let first = all["messages"]
            .as_array()
            .unwrap()
            .iter()
            .find(|it| it["id"] == "1");
        let replies = first.map_or(Value::Null, |first| first["replies"]["count"].clone());
        assert_eq!(replies, count);
        if !left.is_empty() {
            assert_eq!(ids(&thread(&mesh, "thread=1").await), left);
        }
    }
    assert_eq!(ids(&thread(&mesh, "thread=lee/a1").await), ["b1"]);
    let behind = thread(&mesh, "thread=lee/a1&after=ann/b1").await;
    assert_eq!(behind["messages"], json!([]));
    let gone = refused(&mesh, &format!("/v1/rooms/{room}/messages?thread=kim/1")).await;
    assert_eq!(gone, (400, "bad_id".to_owned()));
}
