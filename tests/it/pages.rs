//! Pages of history and searches: without a seam between MongoDB and the streams, whichever of them is away.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_nats::{HeaderMap, jetstream};
use futures_util::StreamExt as _;
use natter::testing::{
    auth::{Grant, Right},
    bus::{Connection, Origins, Reader, Streams, consumer_state},
    history::{At, PageAnchor, PageRequest, Pages, entry},
    mesh::provision::connect,
    model::{Class, Region, RoomId},
    store::{Entry, Store},
    subject::{HISTORY_CONSUMER, Subjects, header, rooms_stream},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value, json};

use crate::support::{
    LONG,
    calls::reply,
    centrifugal::Client,
    dedicated_mongod, eventually,
    mesh::{Mesh, token, token_with},
    mongodb_url, nats_url,
    raw::{Answer, Raw, bearer, request},
};

mod remarks;
mod threads;

const ONE_PART: &str = "[nats]\npartitions = 1\n";

async fn get_as(mesh: &Mesh, token: &str, path: &str, headers: &str) -> Answer {
    let headers = format!("{}{headers}", bearer(token));
    request(mesh.edges[0].address, "GET", path, &headers, "").await
}

/// A page as `kim` gets it.
async fn page(mesh: &Mesh, room: &str, query: &str) -> Value {
    let path = format!("/v1/rooms/{room}/messages?{query}");
    let answer = get_as(mesh, &token("kim"), &path, "").await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.json()
}

async fn refused(mesh: &Mesh, path: &str) -> (u16, String) {
    let answer = get_as(mesh, &token("kim"), path, "").await;
    let code = answer.json()["code"].as_str().unwrap().to_owned();
    (answer.status, code)
}

/// Publishes as `user`, with the fields of a `send`.
async fn say(mesh: &Mesh, room: &str, user: &str, fields: Value) -> Value {
    let path = format!("/v1/rooms/{room}/messages");
    let headers = bearer(&token(user));
    let address = mesh.edges[0].address;
    let answer = request(address, "POST", &path, &headers, &fields.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn ids(page: &Value) -> Vec<String> {
    let messages = page["messages"].as_array().unwrap();
    let id = |message: &Value| message["id"].as_str().unwrap().to_owned();
    messages.iter().map(id).collect()
}

/// What is before `page`, to the beginning of the room, and it: with pages of random lengths.
async fn back_from(mesh: &Mesh, room: &str, page_: Value, rng: &mut StdRng) -> Vec<Value> {
    let mut all = page_["messages"].as_array().unwrap().clone();
    let mut prev = page_["prev"].as_str().map(str::to_owned);
    while let Some(before) = prev {
        let limit = rng.random_range(1..60);
        let page = page(mesh, room, &format!("before={before}&limit={limit}")).await;
        assert_eq!(page["partial"], Value::Null);
        let messages = page["messages"].as_array().unwrap();
        assert!(!messages.is_empty(), "a page was announced that is empty");
        assert_eq!(page["next"], messages.last().unwrap()["cursor"]);
        all.splice(0..0, messages.iter().cloned());
        prev = page["prev"].as_str().map(str::to_owned);
    }
    all
}

/// `page` and what is after it, to the end.
async fn on_from(mesh: &Mesh, room: &str, page_: Value, rng: &mut StdRng) -> Vec<Value> {
    let mut all = page_["messages"].as_array().unwrap().clone();
    let mut next = page_["next"].as_str().map(str::to_owned);
    while let Some(after) = next {
        let limit = rng.random_range(1..60);
        let page = page(mesh, room, &format!("after={after}&limit={limit}")).await;
        assert_eq!(page["partial"], Value::Null);
        let messages = page["messages"].as_array().unwrap();
        assert!(!messages.is_empty(), "a page was announced that is empty");
        assert_eq!(page["prev"], messages[0]["cursor"]);
        all.extend(messages.iter().cloned());
        next = page["next"].as_str().map(str::to_owned);
    }
    all
}

/// That these are the messages 0, 1, 2, … without a gap or a repeat; how many.
fn consecutive(messages: &[Value]) -> usize {
    for (number, message) in messages.iter().enumerate() {
        assert_eq!(message["id"], json!(format!("m{number}")), "at {number}");
    }
    messages.len()
}

async fn caught_up(mesh: &Mesh) {
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let region = mesh.config.region();
    let streams = Streams::load(connection.clone(), region.clone(), &mesh.config.nats)
        .await
        .unwrap();
    for part in 0..mesh.config.nats.partitions {
        let stream = rooms_stream(&region, part);
        eventually("history has everything", LONG, async || {
            let last = streams.fetch(part).await.unwrap().last_seq;
            match consumer_state(&connection, &stream, HISTORY_CONSUMER, LONG).await {
                Ok(Some(state)) if state.floor >= last => Ok(()),
                other => Err(format!("{other:?} of {last}")),
            }
        })
        .await;
    }
}

/// While messages are said, edited and deleted, and the stream forgets what MongoDB has, pages from everywhere to either
/// end are the log.
#[tokio::test(flavor = "multi_thread")]
async fn pages_have_no_seam_while_the_room_goes_on_and_the_stream_is_trimmed() {
    const MESSAGES: usize = 400;
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let room = "chat:seam";
    let said = Arc::new(AtomicUsize::new(0));

    let (mut socket, count) = (
        Raw::open(mesh.edges[0].address, &token("kim")).await,
        Arc::clone(&said),
    );
    let mut writer_rng = StdRng::seed_from_u64(seed + 1);
    let writer = tokio::spawn(async move {
        // By number: the body, or none when it was deleted.
        let mut model: BTreeMap<usize, Option<Value>> = BTreeMap::new();
        let mut rid = 0;
        let mut send = async |mut fields: Value| {
            rid += 1;
            fields["op"] = json!("send");
            fields["rid"] = json!(rid);
            fields["room"] = json!(room);
            let ack = socket.call(fields).await;
            assert_eq!(ack["op"], "ack", "{ack}");
        };
        for number in 0..MESSAGES {
            let body = json!({ "text": number });
            send(json!({"id": format!("m{number}"), "body": body})).await;
            count.store(number + 1, Ordering::SeqCst);
            model.insert(number, Some(body));
            let target = writer_rng.random_range(0..=number);
            let id = format!("m{target}");
            match writer_rng.random_range(0..8) {
                0 => {
                    let body = json!({ "text": "edited", "at": number });
                    send(json!({"kind": "edit", "target": id, "body": body})).await;
                    if let Some(known @ Some(_)) = model.get_mut(&target) {
                        *known = Some(body);
                    }
                }
                1 => {
                    send(json!({"kind": "delete", "target": id})).await;
                    model.insert(target, None);
                }
                2 => send(json!({"kind": "reaction", "target": id, "body": "👍"})).await,
                _ => {}
            }
        }
        model
    });
    let trimmer = {
        let config = mesh.config.clone();
        let stream = rooms_stream(&config.region(), 0);
        tokio::spawn(async move {
            let connection = Connection::open(&config.nats, "trim").await.unwrap();
            let client = connect(&config.nats).await.unwrap();
            let jetstream = jetstream::new(client).get_stream(&stream).await.unwrap();
            let mut trimmed = 0;
            loop {
                // What is confirmed may go at any time.
                let state = consumer_state(&connection, &stream, HISTORY_CONSUMER, LONG)
                    .await
                    .unwrap();
                let floor = state.map_or(0, |state| state.floor);
                if floor > 0 {
                    trimmed += jetstream.purge().sequence(floor).await.unwrap().purged;
                }
                if trimmed > 100_000 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    eventually("it has begun", LONG, async || {
        match said.load(Ordering::SeqCst) {
            0 => Err("nothing said".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    let mut walks = 0;
    loop {
        let is_over = writer.is_finished();
        let acknowledged = said.load(Ordering::SeqCst);
        let newest = page(&mesh, room, &format!("limit={}", rng.random_range(1..60))).await;
        assert_eq!(newest["next"], Value::Null);
        let back = back_from(&mesh, room, newest, &mut rng).await;
        assert!(consecutive(&back) >= acknowledged, "seed {seed}");

        let first = page(&mesh, room, "after=&limit=7").await;
        assert_eq!(first["prev"], Value::Null);
        let on = on_from(&mesh, room, first, &mut rng).await;
        assert!(consecutive(&on) >= acknowledged, "seed {seed}");

        let at = rng.random_range(0..acknowledged);
        let around = format!("around=m{at}&limit={}", rng.random_range(1..60));
        let around = page(&mesh, room, &around).await;
        assert!(ids(&around).contains(&format!("m{at}")), "seed {seed}");
        let mut all = back_from(&mesh, room, around.clone(), &mut rng).await;
        let on = on_from(&mesh, room, around.clone(), &mut rng).await;
        all.extend(on.into_iter().skip(ids(&around).len()));
        assert!(consecutive(&all) >= acknowledged, "seed {seed}");
        walks += 3;
        if is_over {
            break;
        }
    }
    println!("{walks} walks");
    trimmer.abort();
    let model = writer.await.unwrap();
    let newest = page(&mesh, room, "limit=50").await;
    let all = back_from(&mesh, room, newest, &mut rng).await;
    assert_eq!(consecutive(&all), MESSAGES);
    for (number, message) in all.iter().enumerate() {
        let (body, deleted) = match &model[&number] {
            Some(body) => (body, false),
            None => (&Value::Null, true),
        };
        assert_eq!(&message["body"], body, "seed {seed}: {message}");
        assert_eq!(!message["deleted_at"].is_null(), deleted, "{message}");
    }
}

/// What of a log is where, made by hand.
struct Hand {
    mesh: Mesh,
    room: RoomId,
    client: async_nats::Client,
    reader: Reader,
    origins: Arc<Origins>,
    store: Store,
}

impl Hand {
    async fn new(room: &str) -> Self {
        let toml = format!("{ONE_PART}[mongodb]\nurl = \"{}\"\n", mongodb_url());
        let mesh = Mesh::start(nats_url(), 1, &toml).await;
        let config = &mesh.config;
        let connection = Connection::open(&config.nats, "hand").await.unwrap();
        let origins = Origins::wait_for(&connection, &config.region(), &config.nats).await;
        let store = Store::open(&config.mongodb).await.unwrap();
        store.prepare().await.unwrap();
        Self {
            room: RoomId::parse(room).unwrap(),
            client: connect(&config.nats).await.unwrap(),
            reader: Reader::new(connection, &config.nats),
            origins,
            store,
            mesh,
        }
    }

    fn region(&self) -> Region {
        self.mesh.config.region()
    }

    fn stream(&self) -> String {
        rooms_stream(&self.region(), 0)
    }

    /// Publishes messages `m<from>`, … in order.
    async fn publish(&self, numbers: std::ops::Range<usize>) {
        let subjects = Subjects::new(&self.mesh.config.nats.prefix);
        let subject = subjects.publish(&self.region(), 0, &self.room, Class::Msg);
        let jetstream = jetstream::new(self.client.clone());
        let mut acks = Vec::new();
        for number in numbers {
            let mut headers = HeaderMap::new();
            headers.insert(header::FROM, "kim");
            headers.insert(header::ID, format!("m{number}"));
            headers.insert(header::MSG_ID, format!("{}/kim/m{number}", self.room));
            let published =
                jetstream.publish_with_headers(subject.clone(), headers, number.to_string().into());
            acks.push(published.await.unwrap());
            // The client lets no more than some thousands wait.
            if acks.len() == 1000 {
                for ack in acks.drain(..) {
                    ack.await.unwrap();
                }
            }
        }
        for ack in acks {
            ack.await.unwrap();
        }
    }

    /// A consumer that has confirmed the first `count` messages.
    async fn confirm(&self, count: usize) {
        let stream = jetstream::new(self.client.clone());
        let stream = stream.get_stream(self.stream()).await.unwrap();
        let config = jetstream::consumer::pull::Config {
            durable_name: Some(HISTORY_CONSUMER.to_owned()),
            max_ack_pending: 100_000,
            ..Default::default()
        };
        let consumer = stream
            .get_or_create_consumer(HISTORY_CONSUMER, config)
            .await
            .unwrap();
        if count == 0 {
            return;
        }
        let mut messages = consumer
            .fetch()
            .max_messages(count)
            .messages()
            .await
            .unwrap();
        let mut confirmed = 0;
        while let Some(message) = messages.next().await {
            message.unwrap().double_ack().await.unwrap();
            confirmed += 1;
        }
        assert_eq!(confirmed, count);
    }

    /// The stream's entries, as history takes them.
    async fn entries(&self) -> Vec<Entry> {
        let subjects = Subjects::new(&self.mesh.config.nats.prefix);
        let filter = subjects.stored_any(&self.region(), 0);
        let epoch = self.origins.own().known(0).epoch;
        let (mut entries, mut from): (Vec<Entry>, u64) = (Vec::new(), 1);
        loop {
            let page = self.reader.log(&self.stream(), epoch, &filter, from).await;
            let (stored, pending) = page.unwrap();
            let new = stored
                .into_iter()
                .map(|stored| entry(stored, &self.region(), epoch));
            entries.extend(new);
            if pending == 0 {
                return entries;
            }
            from = entries.last().unwrap().place.seq + 1;
        }
    }

    fn pages(&self, store: Option<Store>) -> Pages {
        let (reader, origins) = (self.reader.clone(), Arc::clone(&self.origins));
        Pages::new(reader, origins, store, &self.mesh.config)
    }

    fn ask(&self, anchor: PageAnchor, limit: usize) -> PageRequest {
        PageRequest {
            room: self.room.clone(),
            anchor,
            limit,
            thread: None,
        }
    }

    fn at(&self, number: usize) -> At {
        At::Key(format!("{}/kim/m{number}", self.room))
    }
}

/// The numbers of the messages of a page, whether it is partial, and its neighbours.
async fn numbers(
    pages: &Pages,
    request: &PageRequest,
) -> (Vec<usize>, bool, Option<String>, Option<String>) {
    let answer = pages.page(request).await.unwrap();
    let number = |json: &str| {
        let message: Value = serde_json::from_str(json).unwrap();
        let id = message["id"].as_str().unwrap();
        id.strip_prefix('m').unwrap().parse().unwrap()
    };
    let messages = answer.messages.iter().map(|raw| number(raw.get()));
    (messages.collect(), answer.partial, answer.prev, answer.next)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_of_the_log_is_in_mongodb_the_pages_are_the_same() {
    const MESSAGES: usize = 60;
    let hand = Hand::new("chat:split").await;
    hand.publish(0..MESSAGES).await;
    let entries = hand.entries().await;
    assert_eq!(entries.len(), MESSAGES);
    hand.confirm(20).await;
    // All that is confirmed, and every third of what is not.
    let written: Vec<Entry> = entries
        .iter()
        .enumerate()
        .filter(|(at, _)| *at < 20 || at % 3 == 0)
        .map(|(_, entry)| entry.clone())
        .collect();
    assert_eq!(hand.store.write(&written).await.unwrap(), []);
    let pages = hand.pages(Some(hand.store.clone()));
    let last = MESSAGES - 1;
    for (anchor, limit, expected, ends) in [
        (PageAnchor::Newest, 5, 55..60, (true, false)),
        (PageAnchor::Newest, 60, 0..60, (false, false)),
        (PageAnchor::Newest, 200, 0..60, (false, false)),
        (PageAnchor::Oldest, 25, 0..25, (false, true)),
        (PageAnchor::Oldest, 60, 0..60, (false, false)),
        (PageAnchor::Before(hand.at(30)), 20, 10..30, (true, true)),
        (PageAnchor::Before(hand.at(10)), 20, 0..10, (false, true)),
        (PageAnchor::Before(hand.at(0)), 20, 0..0, (false, false)),
        (PageAnchor::After(hand.at(15)), 20, 16..36, (true, true)),
        (PageAnchor::After(hand.at(50)), 20, 51..60, (true, false)),
        (PageAnchor::After(hand.at(last)), 20, 0..0, (false, false)),
        (PageAnchor::Around(hand.at(20)), 11, 15..26, (true, true)),
        (PageAnchor::Around(hand.at(1)), 10, 0..10, (false, true)),
        (PageAnchor::Around(hand.at(58)), 10, 50..60, (true, false)),
        (PageAnchor::Around(hand.at(30)), 1, 30..31, (true, true)),
    ] {
        let request = hand.ask(anchor, limit);
        let (found, partial, prev, next) = numbers(&pages, &request).await;
        assert_eq!(found, expected.collect::<Vec<_>>(), "{request:?}");
        assert!(!partial, "{request:?}");
        assert_eq!((prev.is_some(), next.is_some()), ends, "{request:?}");
    }
    // What was just stored is there, without anybody having written it.
    hand.publish(60..61).await;
    let (found, partial, ..) = numbers(&pages, &hand.ask(PageAnchor::Newest, 2)).await;
    assert_eq!((found, partial), (vec![59, 60], false));
    // The stream alone tells the same, and that it may lack something.
    let alone = hand.pages(None);
    for (anchor, limit, expected) in [
        (PageAnchor::Newest, 5, 56..61),
        (PageAnchor::Oldest, 5, 0..5),
        (PageAnchor::Before(hand.at(30)), 5, 25..30),
        (PageAnchor::After(hand.at(30)), 5, 31..36),
        (PageAnchor::Around(hand.at(30)), 5, 28..33),
    ] {
        let request = hand.ask(anchor, limit);
        let (found, partial, ..) = numbers(&alone, &request).await;
        assert_eq!((found, partial), (expected.collect(), true), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn far_behind_pages_are_partial_and_have_no_seam() {
    const MESSAGES: usize = 5600;
    let hand = Hand::new("chat:behind").await;
    hand.publish(0..MESSAGES).await;
    let entries = hand.entries().await;
    hand.confirm(300).await;
    assert_eq!(hand.store.write(&entries[..300]).await.unwrap(), []);
    let client = jetstream::new(hand.client.clone());
    let stream = client.get_stream(hand.stream()).await.unwrap();
    stream.purge().sequence(200).await.unwrap();
    let pages = hand.pages(Some(hand.store.clone()));
    let mut request = hand.ask(PageAnchor::Newest, 200);
    let mut all: Vec<usize> = Vec::new();
    loop {
        let (found, partial, prev, _) = numbers(&pages, &request).await;
        assert!(partial);
        all.splice(0..0, found);
        let Some(prev) = prev else { break };
        request.anchor = PageAnchor::Before(At::Cursor(prev));
    }
    assert_eq!(all, (0..MESSAGES).collect::<Vec<_>>());
    for (anchor, expected) in [
        (PageAnchor::Oldest, 0..200),
        (PageAnchor::After(hand.at(250)), 251..451),
        (PageAnchor::After(hand.at(2000)), 2001..2201),
        (PageAnchor::After(hand.at(5500)), 5501..5600),
        (PageAnchor::Around(hand.at(3000)), 2900..3100),
        (PageAnchor::Around(hand.at(300)), 200..400),
    ] {
        // A message that is in neither part is found by its cursor.
        let request = hand.ask(anchor, 200);
        let anchor = match request.anchor {
            PageAnchor::After(At::Key(key)) => PageAnchor::After(cursor_of(&entries, &key)),
            PageAnchor::Around(At::Key(key)) => PageAnchor::Around(cursor_of(&entries, &key)),
            other => other,
        };
        let request = hand.ask(anchor, 200);
        let (found, partial, ..) = numbers(&pages, &request).await;
        assert_eq!((found, partial), (expected.collect(), true), "{request:?}");
    }
}

fn cursor_of(entries: &[Entry], key: &str) -> At {
    let has = |entry: &&Entry| matches!(&entry.what, natter::testing::store::What::Message { key: own, .. } if own == key);
    let entry = entries.iter().find(has).unwrap();
    let position = entry.place.position(natter::testing::model::Fingerprint(1));
    At::Cursor(natter::testing::model::Cursor::single(position).to_string())
}

/// No worker, no service: what was acknowledged is in the newest page all the same.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_service_pages_reach_as_far_as_the_stream() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let room = "chat:alone";
    for n in 0..5 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("m{n}"), "body": n}),
        )
        .await;
    }
    caught_up(&mesh).await;
    assert_eq!(page(&mesh, room, "").await["partial"], Value::Null);
    mesh.workers[0].process.kill().await;
    for n in 5..10 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("m{n}"), "body": n}),
        )
        .await;
        let newest = page(&mesh, room, "limit=3").await;
        assert_eq!(newest["partial"], true);
        assert_eq!(
            ids(&newest),
            [n - 2, n - 1, n].map(|n| format!("m{n}")),
            "{newest}"
        );
    }
    let edit = json!({"kind": "edit", "target": "m7", "body": "edited"});
    say(&mesh, room, "kim", edit).await;
    let before = page(&mesh, room, "before=m8&limit=2").await;
    assert_eq!(before["messages"][1]["body"], "edited", "{before}");
    assert_eq!(before["partial"], true);
    let (status, code) = refused(&mesh, "/v1/rooms/chat:alone/search?q=hi").await;
    assert_eq!((status, code.as_str()), (503, "unavailable"));
    let answered = mesh
        .metric(0, "natter_history_answered_total", "source=\"streams\"")
        .await;
    assert!(answered >= 6, "{answered}");
    mesh.workers[0].process.start().await.unwrap();
    eventually("it is whole again", LONG, async || {
        let newest = page(&mesh, room, "").await;
        match newest["partial"].is_null() && ids(&newest).len() == 10 {
            true => Ok(()),
            false => Err(newest.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_mongodb_pages_reach_as_far_as_the_stream() {
    let mut mongod = dedicated_mongod().await;
    let toml = format!("{ONE_PART}[mongodb]\nread_timeout = \"500ms\"\n");
    let mesh = Mesh::with_history(nats_url(), &mongod.url(), (1, 1), &toml).await;
    let room = "chat:away";
    for n in 0..5 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("m{n}"), "body": n}),
        )
        .await;
    }
    caught_up(&mesh).await;
    assert_eq!(page(&mesh, room, "").await["partial"], Value::Null);
    mongod.server.kill().await;
    for n in 5..8 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("m{n}"), "body": n}),
        )
        .await;
        let newest = page(&mesh, room, "limit=100").await;
        assert_eq!(newest["partial"], true);
        let expected: Vec<String> = (0..=n).map(|n| format!("m{n}")).collect();
        assert_eq!(ids(&newest), expected);
    }
    mongod.server.restart().await.unwrap();
    eventually("it is whole again", LONG, async || {
        let newest = page(&mesh, room, "").await;
        match newest["partial"].is_null() && ids(&newest).len() == 8 {
            true => Ok(()),
            false => Err(newest.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_that_lead_nowhere_say_so() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    say(&mesh, "chat:a", "kim", json!({"id": "1", "body": 1})).await;
    say(&mesh, "chat:a", "lee", json!({"id": "1", "body": 2})).await;
    let region = &mesh.config.region;
    for (query, status, code) in [
        ("limit=0".to_owned(), 400, "bad_request"),
        ("limit=201".to_owned(), 400, "bad_request"),
        ("limit=x".to_owned(), 400, "bad_request"),
        ("order=up".to_owned(), 400, "bad_request"),
        ("before=1&after=1".to_owned(), 400, "bad_request"),
        ("before=a%20b".to_owned(), 400, "bad_cursor"),
        ("before=".to_owned(), 400, "bad_cursor"),
        ("before=lee/".to_owned(), 400, "bad_id"),
        ("before=2".to_owned(), 400, "bad_id"),
        ("around=nobody/1".to_owned(), 400, "bad_id"),
        (format!("before={region}.zz.7.1"), 400, "bad_cursor"),
        ("before=elsewhere.zz.7.1".to_owned(), 400, "bad_cursor"),
    ] {
        let found = refused(&mesh, &format!("/v1/rooms/chat:a/messages?{query}")).await;
        assert_eq!((found.0, found.1.as_str()), (status, code), "{query}");
    }
    for (path, status, code) in [
        ("/v1/rooms/chat.a/messages", 400, "bad_room"),
        ("/v1/rooms/nowhere:a/messages", 404, "unknown_namespace"),
        ("/v1/rooms/live:a/messages", 400, "bad_request"),
        ("/v1/rooms/live:a/search?q=x", 400, "bad_request"),
        ("/v1/rooms/chat:a/search", 400, "bad_request"),
        ("/v1/rooms/chat:a/search?q=%20", 400, "bad_request"),
        ("/v1/rooms/chat:a/search?q=x&limit=101", 400, "bad_request"),
        ("/v1/rooms/chat:a/search?q=x&before=y", 400, "bad_cursor"),
        ("/v1/rooms/chat:a/search?reply_to=/", 400, "bad_id"),
        ("/v1/search?reply_to=kim/1", 400, "bad_request"),
        ("/v1/search", 400, "bad_request"),
    ] {
        let found = refused(&mesh, path).await;
        assert_eq!((found.0, found.1.as_str()), (status, code), "{path}");
    }
    let first = page(&mesh, "chat:a", "").await;
    let (one, two) = (&first["messages"][0], &first["messages"][1]);
    assert_eq!((&one["from"], &one["body"]), (&json!("kim"), &json!(1)));
    // A bare id is one's own; `order` turns the page around and nothing else.
    let own = page(&mesh, "chat:a", "around=1&limit=1").await;
    assert_eq!(own["messages"][0], *one);
    let others = page(&mesh, "chat:a", "around=lee/1&limit=1").await;
    assert_eq!(others["messages"][0], *two);
    let turned = page(&mesh, "chat:a", "order=desc").await;
    assert_eq!(turned["messages"], json!([two, one]));
    // A room in which nothing was said has an empty page, and the cursor at which it stands is a place.
    let mut socket = Raw::open(mesh.edges[0].address, &token("kim")).await;
    let join = json!({"op": "join", "rid": 1, "room": "chat:empty"});
    let head = socket.call(join).await["head"].as_str().unwrap().to_owned();
    for query in [
        String::new(),
        format!("after={head}"),
        format!("before={head}"),
    ] {
        let empty = page(&mesh, "chat:empty", &query).await;
        assert_eq!(
            empty,
            json!({"room": "chat:empty", "messages": []}),
            "{query}"
        );
    }
    say(&mesh, "chat:empty", "kim", json!({"id": "x", "body": 1})).await;
    let after = page(&mesh, "chat:empty", &format!("after={head}")).await;
    assert_eq!(ids(&after), ["x"]);
    // So is that of a change.
    let fields = json!({"kind": "reaction", "target": "kim/1", "body": "👍"});
    let ack = say(&mesh, "chat:a", "lee", fields).await;
    let cursor = ack["cursor"].as_str().unwrap();
    say(&mesh, "chat:a", "kim", json!({"id": "3", "body": 3})).await;
    let before = page(&mesh, "chat:a", &format!("before={cursor}")).await;
    let reactions = json!({"👍": {"count": 1, "users": ["lee"]}});
    assert_eq!(before["messages"][0]["reactions"], reactions);
    assert_eq!(ids(&before), ["1", "1"]);
    let after = page(&mesh, "chat:a", &format!("after={cursor}")).await;
    assert_eq!(ids(&after), ["3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_make_shorter_pages() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let text = "x".repeat(60_000);
    for n in 0..30 {
        say(
            &mesh,
            "chat:big",
            "kim",
            json!({"id": format!("m{n}"), "body": text}),
        )
        .await;
    }
    let mut all: Vec<String> = Vec::new();
    let mut query = "limit=100".to_owned();
    loop {
        let found = page(&mesh, "chat:big", &query).await;
        assert!(
            (1..=9).contains(&ids(&found).len()),
            "{}",
            ids(&found).len()
        );
        all.splice(0..0, ids(&found));
        let Some(prev) = found["prev"].as_str() else {
            break;
        };
        query = format!("limit=100&before={prev}");
    }
    let expected: Vec<String> = (0..30).map(|n| format!("m{n}")).collect();
    assert_eq!(all, expected);
    let around = page(&mesh, "chat:big", "limit=100&around=m15").await;
    assert!(ids(&around).contains(&"m15".to_owned()));
    assert!(around["prev"].is_string() && around["next"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_room_is_not_sent_again() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let (kim, path) = (token("kim"), "/v1/rooms/chat:tag/messages");
    say(&mesh, "chat:tag", "kim", json!({"id": "1", "body": 1})).await;
    let full = get_as(&mesh, &kim, path, "").await;
    let tag = full.header("etag").unwrap().to_owned();
    assert!(tag.starts_with("w/\""), "{tag}");
    assert_eq!(full.header("cache-control"), Some("private, no-cache"));
    let tag = full
        .head
        .lines()
        .find_map(|line| line.strip_prefix("etag: "));
    let known = format!(
        "If-None-Match: \"x\", {}\r\n",
        tag.unwrap().replacen('w', "W", 1)
    );
    let answered = async || mesh.metric(0, "natter_history_answered_total", "").await;
    let before = answered().await;
    let again = get_as(&mesh, &kim, path, &known).await;
    assert_eq!((again.status, again.body.as_str()), (304, ""));
    assert_eq!(again.header("etag"), full.header("etag"));
    assert_eq!(answered().await, before, "nobody was asked");
    // Another question has another tag.
    let other = format!("{path}?limit=7");
    assert_eq!(get_as(&mesh, &kim, &other, &known).await.status, 200);
    // Who may not read it is not told that it is unchanged.
    let grants = vec![Grant::new("chat:*", &[Right::Read])];
    let lee = token_with("lee", LONG, grants);
    assert_eq!(get_as(&mesh, &lee, path, &known).await.status, 403);
    let edit = json!({"kind": "edit", "target": "1", "body": 2});
    say(&mesh, "chat:tag", "kim", edit).await;
    let edited = get_as(&mesh, &kim, path, &known).await;
    assert_eq!(edited.status, 200);
    assert_eq!(edited.json()["messages"][0]["body"], 2);
    assert_ne!(edited.header("etag"), full.header("etag"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_reads_history_without_holding_up_what_comes_after() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let room = "chat:socket";
    let mut socket = Raw::open(mesh.edges[0].address, &token("kim")).await;
    for n in 0..3 {
        let send = json!({"op": "send", "rid": n, "room": room, "id": format!("m{n}"), "body": n});
        assert_eq!(socket.call(send).await["op"], "ack");
    }
    let history = json!({"op": "history", "rid": 7, "room": room, "limit": 2});
    let reply = socket.call(history.clone()).await;
    assert_eq!(reply["op"], "history");
    assert_eq!(reply["room"], room);
    assert_eq!(ids(&reply), ["m1", "m2"]);
    assert_eq!(reply["prev"], reply["messages"][0]["cursor"]);
    assert_eq!(reply.get("next"), None);
    let before = json!({"op": "history", "rid": 8, "room": room, "before": reply["prev"]});
    let reply = socket.call(before).await;
    assert_eq!(ids(&reply), ["m0"]);
    assert_eq!(reply["next"], reply["messages"][0]["cursor"]);
    // Replies keep their order, many at once.
    for rid in 10..30 {
        socket
            .text(&json!({"op": "history", "rid": rid, "room": room}).to_string())
            .await;
    }
    socket.text(r#"{"op":"ping","rid":30}"#).await;
    for rid in 10..=30 {
        assert_eq!(socket.json().await["rid"], rid);
    }
    for (command, code) in [
        (
            json!({"op": "history", "rid": 1, "room": "live:a"}),
            "bad_request",
        ),
        (
            json!({"op": "history", "rid": 1, "room": "none:a"}),
            "unknown_namespace",
        ),
        (
            json!({"op": "history", "rid": 1, "room": room, "before": "a b"}),
            "bad_cursor",
        ),
        (
            json!({"op": "history", "rid": 1, "room": room, "before": "no/one"}),
            "bad_id",
        ),
        (
            json!({"op": "history", "rid": 1, "room": room, "limit": 201}),
            "bad_request",
        ),
    ] {
        assert_eq!(
            socket.call(command.clone()).await["code"],
            code,
            "{command}"
        );
    }
    let grants = vec![Grant::new("chat:*", &[Right::Read, Right::Write])];
    let lee = token_with("lee", LONG, grants);
    let mut other = Raw::open(mesh.edges[0].address, &lee).await;
    assert_eq!(other.call(history).await["code"], "forbidden");
}

async fn found(mesh: &Mesh, token: &str, path: &str) -> Vec<String> {
    let answer = get_as(mesh, token, path, "").await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    ids(&answer.json())
}

/// Text as it stands in a query.
fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn searches_find_words_and_parts_of_words_in_granted_rooms() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let all = token("kim");
    let texts = [
        ("ko", "안녕하세요 여러분"),
        ("ja", "東京都に住んでいます"),
        ("en", "The quick brown fox jumps"),
        ("other", "nothing of interest"),
    ];
    for (id, text) in texts {
        let fields = json!({"id": id, "body": {"text": text}, "mentions": ["ann"]});
        say(&mesh, "chat:words", "kim", fields).await;
    }
    let answer = json!({"id": "answer", "body": {"text": "fox"}, "reply_to": "kim/en"});
    say(&mesh, "chat:words", "lee", answer).await;
    say(
        &mesh,
        "chat:secret",
        "kim",
        json!({"id": "hidden", "body": {"text": "fox"}}),
    )
    .await;
    caught_up(&mesh).await;
    let search = |query: String| format!("/v1/rooms/chat:words/search?{query}");
    for (query, expected) in [
        (format!("q={}", escaped("안녕")), vec!["ko"]),
        (format!("q={}", escaped("東京")), vec!["ja"]),
        ("q=QUICK".to_owned(), vec!["en"]),
        ("q=fox".to_owned(), vec!["answer", "en"]),
        ("q=fox&from=lee".to_owned(), vec!["answer"]),
        ("mentions=ann&limit=2".to_owned(), vec!["other", "en"]),
        ("reply_to=kim/en".to_owned(), vec!["answer"]),
        (format!("q={}", escaped("$where: || && \"'")), vec![]),
        (format!("q={}", escaped("^.*(f|x)+$")), vec![]),
        (format!("q={}", escaped("{\"$gt\": \"\"}")), vec![]),
    ] {
        let path = search(query);
        assert_eq!(found(&mesh, &all, &path).await, expected, "{path}");
    }
    let words: String = ('a'..='z')
        .chain('0'..='9')
        .map(|c| format!("{c} "))
        .collect();
    for query in [
        "a".repeat(10_000),
        words,
        "&".to_owned(),
        "?!".to_owned(),
        "\u{200d}".to_owned(),
    ] {
        let path = search(format!("q={}", escaped(&query)));
        assert_eq!(
            refused(&mesh, &path).await,
            (400, "bad_request".to_owned()),
            "{query}"
        );
    }
    let answer = get_as(
        &mesh,
        &all,
        &search(format!("q={}&from=kim", escaped("->"))),
        "",
    )
    .await;
    let said = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(
        said.contains("\"->\""),
        "what can't be searched for is not named: {said}"
    );

    // The same over a socket, and as a call of Centrifugo's clients.
    let mut kim = mesh.connect(0, "kim").await;
    let fields = json!({"room": "chat:words", "q": "fox", "from": "lee"});
    let over_socket = reply(&mut kim, "search", fields.clone()).await;
    assert_eq!(over_socket["op"], "search", "{over_socket}");
    assert_eq!(over_socket["messages"][0]["id"], "answer");
    assert_eq!(over_socket["messages"].as_array().unwrap().len(), 1);
    let everywhere = reply(&mut kim, "search", json!({"q": "fox", "limit": 1})).await;
    assert_eq!(everywhere["messages"][0]["id"], "hidden", "{everywhere}");
    assert!(everywhere["next"].is_string(), "{everywhere}");
    let mentioned = json!({"room": "chat:words", "mentions": ["ann"], "limit": 1});
    let mentioned = reply(&mut kim, "search", mentioned).await;
    assert_eq!(mentioned["messages"][0]["id"], "other", "{mentioned}");
    for (wrong, code) in [
        (json!({"room": "chat:words"}), "bad_request"),
        (json!({"q": "x", "mentions": ["ann", "bob"]}), "bad_request"),
        (json!({"q": "x", "reply_to": "kim/en"}), "bad_request"),
        (
            json!({"room": "chat:words", "q": "x", "limit": 101}),
            "bad_request",
        ),
        (json!({"room": "live:a", "q": "x"}), "bad_request"),
    ] {
        let refused = reply(&mut kim, "search", wrong.clone()).await;
        assert_eq!(refused["code"], code, "{wrong}: {refused}");
    }
    let (mut client, _) = Client::connect(&mesh, 0, &all).await;
    let call = json!({"method": "room.search", "data": fields});
    let called = client.call("rpc", call).await["rpc"]["data"].clone();
    assert_eq!(called["messages"], over_socket["messages"], "{called}");

    // Page by page, over all rooms that are granted.
    let mut seen = Vec::new();
    let mut path = "/v1/search?q=fox&limit=1".to_owned();
    loop {
        let answer = get_as(&mesh, &all, &path, "").await.json();
        for message in answer["messages"].as_array().unwrap() {
            let text = |field: &str| message[field].as_str().unwrap().to_owned();
            seen.push((text("room"), text("id")));
        }
        let Some(next) = answer["next"].as_str() else {
            break;
        };
        path = format!("/v1/search?q=fox&limit=1&before={next}");
    }
    let pair = |room: &str, id: &str| (room.to_owned(), id.to_owned());
    assert_eq!(
        seen,
        [
            pair("chat:secret", "hidden"),
            pair("chat:words", "answer"),
            pair("chat:words", "en")
        ]
    );
    let grants = |pattern: &str, right| vec![Grant::new(pattern, &[right])];
    let some = token_with("ann", LONG, grants("chat:words", Right::History));
    assert_eq!(
        found(&mesh, &some, "/v1/search?q=fox").await,
        ["answer", "en"]
    );
    let none = token_with("ann", LONG, grants("*:*", Right::Read));
    for path in [
        "/v1/search?q=fox",
        "/v1/rooms/chat:words/search?q=fox",
        "/v1/rooms/chat:words/messages",
    ] {
        let answer = get_as(&mesh, &none, path, "").await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (403, &json!("forbidden")),
            "{path}"
        );
        let answer = request(mesh.edges[0].address, "GET", path, "", "").await;
        assert_eq!(answer.status, 401, "{path}");
    }
    let elsewhere = get_as(&mesh, &some, "/v1/rooms/chat:secret/search?q=fox", "").await;
    assert_eq!(elsewhere.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_share_the_questions_and_speak_the_protocol_of_micro_services() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 2), ONE_PART).await;
    say(&mesh, "chat:shared", "kim", json!({"id": "1", "body": 1})).await;
    let client = connect(&mesh.config.nats).await.unwrap();
    let subjects = Subjects::new(&mesh.config.nats.prefix);
    let subject = subjects.history(&mesh.config.region(), "page");
    // Of the mesh's own instances: other tests run theirs on the same server.
    let ask = async |verb: &str| {
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.unwrap();
        let to = format!("$SRV.{verb}.natter-history");
        client
            .publish_with_reply(to, inbox, "".into())
            .await
            .unwrap();
        let mut own = Vec::new();
        while own.len() < 2 {
            let answer = tokio::time::timeout(LONG, answers.next());
            let answer = answer.await.expect("two instances answer").unwrap();
            let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
            let endpoints = answer["endpoints"].as_array().unwrap();
            if endpoints
                .iter()
                .any(|endpoint| endpoint["subject"] == subject)
            {
                own.push(answer);
            }
        }
        own
    };
    for info in ask("INFO").await {
        assert_eq!(info["type"], "io.nats.micro.v1.info_response");
        assert_eq!(info["name"], "natter-history");
        assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
        let endpoints = info["endpoints"].as_array().unwrap();
        let names = endpoints
            .iter()
            .map(|endpoint| endpoint["name"].as_str().unwrap());
        let names: Vec<&str> = names.collect();
        assert!(
            names.contains(&"page") && names.contains(&"search"),
            "{names:?}"
        );
    }
    eventually("both have answered", LONG, async || {
        for _ in 0..10 {
            assert_eq!(ids(&page(&mesh, "chat:shared", "").await), ["1"]);
        }
        let asked: Vec<u64> = ask("STATS")
            .await
            .iter()
            .flat_map(|stats| stats["endpoints"].as_array().unwrap().clone())
            .filter(|endpoint| endpoint["name"] == "page")
            .map(|endpoint| endpoint["num_requests"].as_u64().unwrap())
            .collect();
        match asked.iter().all(|asked| *asked > 0) {
            true => Ok(()),
            false => Err(format!("{asked:?}")),
        }
    })
    .await;
    let stats = ask("STATS").await;
    assert!(
        stats[0]["endpoints"][0]["data"]["pages"].is_u64(),
        "{stats:?}"
    );
}
