//! What is erased is gone: from MongoDB, from the streams, from the edges' memory; also where somebody had it in hand.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use mongodb::bson::{Document as Fields, doc};
use natter::testing::{
    auth::{Grant, Right},
    bus::{Connection, Reader, Stored, StreamState, Streams},
    client::{Connection as Client, Frame},
    history::{entry, status},
    mesh::provision::connect,
    model::{RoomId, RoomScope},
    store::{Erased, Erasure, Store, What},
    subject::{REGIONS_METADATA, Subjects, rooms_stream},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    LONG, eventually,
    mesh::{Mesh, ask, http, token, token_with},
    mongodb_url, nats_url, signal,
};

const ONE_PARTITION: &str = "[nats]\npartitions = 1\n";

/// Longest silence in which a frame is still expected.
const SILENCE: Duration = Duration::from_secs(20);

/// Says something over HTTP.
async fn say(mesh: &Mesh, room: &str, user: &str, fields: Value) {
    let path = format!("/v1/rooms/{room}/messages");
    let address = mesh.edges[0].address;
    let (status, answer) = ask(address, ("POST", &path), &token(user), &fields).await;
    assert_eq!(status, 200, "{answer}");
}

/// Erases until it is done; the answer.
async fn erase(mesh: &Mesh, path: &str, token: &str) -> Value {
    let address = mesh.edges[0].address;
    eventually("it is erased", LONG, async || {
        let (status, answer) = ask(address, ("DELETE", path), token, &Value::Null).await;
        if status == 200 {
            Ok(answer)
        } else {
            Err(format!("{status} {answer}"))
        }
    })
    .await
}

async fn messages(mesh: &Mesh) -> mongodb::Collection<Fields> {
    let client = mongodb::Client::with_uri_str(mesh.config.mongodb.url.expose());
    let database = client.await.unwrap();
    let database = database.database(&mesh.config.mongodb.database);
    database.collection("messages")
}

async fn documents(mesh: &Mesh, filter: Fields) -> Vec<Fields> {
    let found = messages(mesh).await.find(filter).await.unwrap();
    found.try_collect().await.unwrap()
}

/// Everything that the streams hold of rooms.
async fn stored(mesh: &Mesh) -> Vec<Stored> {
    let nats = &mesh.config.nats;
    let connection = Connection::open(nats, "test").await.unwrap();
    let reader = Reader::new(connection, nats);
    let origin = mesh.config.region();
    let mut all = Vec::new();
    for part in 0..nats.partitions {
        let filter = Subjects::new(&nats.prefix).stored_any(&origin, part);
        let epoch = natter::testing::model::Epoch::parse("test").unwrap();
        let (found, pending) = reader
            .log(&rooms_stream(&origin, part), epoch, &filter, 1)
            .await
            .unwrap();
        assert_eq!(pending, 0);
        all.extend(found);
    }
    all
}

async fn caught_up(mesh: &Mesh) {
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &mesh.config.nats);
    eventually("history has everything", LONG, async || {
        let status = status(&connection, &reader, &mesh.config).await;
        match &status {
            Ok(status) if status.lag_messages == 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn join(client: &Client, room: &str, since: Option<&str>) -> Value {
    let fields = json!({ "room": room, "since": since });
    let joined = client.commands().call("join", &fields).await.unwrap();
    serde_json::from_str(joined.text()).unwrap()
}

/// The next message that is pushed.
async fn next(client: &mut Client) -> Value {
    loop {
        let frame: Frame = tokio::time::timeout(SILENCE, client.next())
            .await
            .expect("a frame comes")
            .expect("the connection lives");
        let frame: Value = serde_json::from_str(frame.text()).unwrap();
        if frame["op"] == "msg" {
            return frame;
        }
    }
}

fn assert_is_erasure(frame: &Value, user: Option<&str>) {
    assert_eq!(
        (&frame["kind"], &frame["from"]),
        (&json!("erase"), &json!("$natter")),
        "{frame}"
    );
    assert_eq!(frame["body"]["user"].as_str(), user, "{frame}");
    assert!(
        frame["body"]["before"].as_u64() <= frame["ts"].as_u64(),
        "{frame}"
    );
}

#[tokio::test]
async fn an_erased_room_is_gone_everywhere() {
    // One shard, so that who comes back meets the hub that has it all in memory.
    let toml = "[nats]\npartitions = 1\n[edge]\nshards = 1\n";
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), toml).await;
    let (room, other) = ("chat:secret", "chat:other");
    let mut member = mesh.connect(0, "lee").await;
    let since = join(&member, room, None).await["cursor"].clone();
    let since = since.as_str().unwrap();
    say(&mesh, other, "kim", json!({"id": "o1", "body": "stays"})).await;
    say(
        &mesh,
        room,
        "kim",
        json!({"id": "s1", "body": {"text": "비밀"}}),
    )
    .await;
    say(
        &mesh,
        room,
        "lee",
        json!({"id": "s2", "body": {"text": "secret"}}),
    )
    .await;
    say(
        &mesh,
        room,
        "lee",
        json!({"kind": "edit", "target": "s2", "body": "secret too"}),
    )
    .await;
    say(
        &mesh,
        room,
        "kim",
        json!({"kind": "reaction", "target": "lee/gone", "body": "👍"}),
    )
    .await;
    caught_up(&mesh).await;
    assert_eq!(documents(&mesh, doc! { "room": room }).await.len(), 3);
    for _ in 0..4 {
        assert_ne!(next(&mut member).await["kind"], "erase");
    }

    let answer = erase(&mesh, &format!("/v1/rooms/{room}"), &token("mod")).await;
    assert_eq!(
        (&answer["state"], &answer["erased"]),
        (&json!("done"), &json!(4)),
        "{answer}"
    );
    let announced = next(&mut member).await;
    assert_is_erasure(&announced, None);
    assert_eq!(documents(&mesh, doc! { "room": room }).await, []);
    let kept = documents(&mesh, doc! { "room": other }).await;
    assert_eq!(kept.len(), 1);
    let left = stored(&mesh).await;
    let of = |name: &str| left.iter().filter(|one| one.room.as_str() == name).count();
    assert_eq!((of(other), of(room)), (1, 1), "{left:?}");

    // Who comes back is told, and gets nothing of it: neither from memory nor from the stream.
    let mut late = mesh.connect(0, "late").await;
    let joined = join(&late, room, Some(since)).await;
    if joined["reset"] != true {
        assert_eq!(joined["replay"], 1, "{joined}");
        assert_is_erasure(&next(&mut late).await, None);
    }
    let page = |client: &Client| {
        let commands = client.commands().clone();
        async move {
            let page = commands
                .call("history", &json!({ "room": room }))
                .await
                .unwrap();
            serde_json::from_str::<Value>(page.text()).unwrap()
        }
    };
    assert_eq!(page(&late).await["messages"], json!([]));
    // What is said from now on is kept.
    say(&mesh, room, "kim", json!({"id": "s3", "body": "new"})).await;
    assert_eq!(next(&mut member).await["id"], "s3");
    assert_eq!(page(&late).await["messages"][0]["id"], "s3");
    caught_up(&mesh).await;
    assert_eq!(documents(&mesh, doc! { "room": room }).await.len(), 1);
}

#[tokio::test]
async fn an_erased_room_that_was_all_of_its_stream_resets_who_comes_back() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PARTITION).await;
    let room = "chat:only";
    let first = mesh.connect(0, "lee").await;
    let since = join(&first, room, None).await["cursor"].clone();
    for n in 0..3 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("m{n}"), "body": n}),
        )
        .await;
    }
    erase(&mesh, &format!("/v1/rooms/{room}"), &token("mod")).await;
    let late = mesh.connect(0, "late").await;
    let joined = join(&late, room, since.as_str()).await;
    assert_eq!(
        (&joined["reset"], &joined["reason"]),
        (&json!(true), &json!("trimmed")),
        "{joined}"
    );
}

#[tokio::test]
async fn an_erased_user_is_gone_from_the_rooms_of_the_token_and_others_stay() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let (a, b, c) = ("chat:a", "chat:b", "chat:c");
    // One whose name begins like theirs.
    let (user, escaped) = ("kim/안 녕", "kim%2F%EC%95%88%20%EB%85%95");
    let mut member = mesh.connect(0, "lee").await;
    join(&member, a, None).await;
    for room in [a, b, c] {
        say(&mesh, room, user, json!({"id": "k1", "body": "mine"})).await;
        say(&mesh, room, user, json!({"id": "k2", "body": "mine too"})).await;
        say(
            &mesh,
            room,
            user,
            json!({"kind": "delete", "target": "k2", "body": {}}),
        )
        .await;
        say(
            &mesh,
            room,
            "lee",
            json!({"id": "l1", "body": "lee's", "reply_to": format!("{user}/k1")}),
        )
        .await;
        say(
            &mesh,
            room,
            "kim",
            json!({"id": "x1", "body": "another kim's"}),
        )
        .await;
        say(
            &mesh,
            room,
            user,
            json!({"kind": "reaction", "target": "lee/l1", "body": "👍"}),
        )
        .await;
        say(
            &mesh,
            room,
            "kim",
            json!({"kind": "reaction", "target": "lee/l1", "body": "👍"}),
        )
        .await;
        say(
            &mesh,
            room,
            "kim",
            json!({"kind": "reaction", "target": format!("{user}/k1"), "body": "🎉"}),
        )
        .await;
        say(
            &mesh,
            room,
            user,
            json!({"kind": "annotation", "target": "lee/l1", "body": {"mood": "good"}}),
        )
        .await;
        // About messages that history does not know.
        say(
            &mesh,
            room,
            user,
            json!({"kind": "edit", "target": "unknown", "body": "mine as well"}),
        )
        .await;
    }
    caught_up(&mesh).await;
    let moderator = token_with(
        "mod",
        LONG,
        vec![
            Grant::new(a, &[Right::Erase]),
            Grant::new(b, &[Right::Erase]),
            Grant::new(c, &[Right::Read, Right::History]),
        ],
    );
    let answer = erase(&mesh, &format!("/v1/users/{escaped}/messages"), &moderator).await;
    assert_eq!(answer["state"], "done");
    assert_eq!(answer["erased"], 4, "{answer}");

    for room in [a, b] {
        let mine = doc! { "room": room, "_id": { "$regex": "/kim/안 녕/" } };
        assert_eq!(documents(&mesh, mine).await, [], "{room}");
        let others = documents(&mesh, doc! { "room": room }).await;
        let mut keys: Vec<&str> = others
            .iter()
            .map(|one| one.get_str("_id").unwrap())
            .collect();
        keys.sort_unstable();
        assert_eq!(keys, [format!("{room}/kim/x1"), format!("{room}/lee/l1")]);
        let of_lee = others
            .iter()
            .find(|one| one.get_str("from").unwrap() == "lee")
            .unwrap();
        let text = of_lee.to_string();
        assert!(text.contains("lee's") && text.contains("\"kim\""), "{text}");
        let reactions = of_lee.get_document("reactions").unwrap().to_string();
        assert!(
            !reactions.contains(user) && !text.contains("mood"),
            "{text}"
        );
    }
    assert_eq!(
        documents(&mesh, doc! { "room": c, "from": user })
            .await
            .len(),
        2
    );
    for one in stored(&mesh).await {
        let of_user = one.record.from == user
            || one
                .record
                .target
                .is_some_and(|target| target.starts_with(&format!("{user}/")));
        assert!(
            !of_user || one.room.as_str() == c,
            "{:?} {}",
            one.room,
            one.record.id
        );
    }
    let lees = stored(&mesh).await;
    let lees = lees
        .iter()
        .filter(|one| ["lee", "kim"].contains(&one.record.from.as_str()));
    // Two messages and a reaction a room, and in the room that was left alone another one.
    assert_eq!(lees.count(), 3 * 3 + 1);
    for _ in 0..10 {
        assert_ne!(next(&mut member).await["kind"], "erase");
    }
    assert_is_erasure(&next(&mut member).await, Some(user));
}

/// The streams name a region whose mirrors this service does not have, or not yet.
#[tokio::test]
async fn a_region_that_is_only_named_has_to_erase_too() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PARTITION).await;
    let room = "chat:secret";
    say(&mesh, room, "kim", json!({"id": "s1", "body": "secret"})).await;
    let client = connect(&mesh.config.nats).await.unwrap();
    let stream = rooms_stream(&mesh.config.region(), 0);
    let change = async |what: &str, payload: String| {
        let subject = format!("$JS.API.STREAM.{what}.{stream}");
        let answer = client.request(subject, payload.into()).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert!(answer["error"].is_null(), "{answer}");
        answer
    };
    let mut config = change("INFO", String::new()).await["config"].clone();
    let regions = &mut config["metadata"][REGIONS_METADATA];
    *regions = json!(format!("{},mars", mesh.config.region()));
    change("UPDATE", config.to_string()).await;

    let address = mesh.edges[0].address;
    let path = format!("/v1/rooms/{room}");
    let (status, answer) = ask(address, ("DELETE", &path), &token("mod"), &Value::Null).await;
    assert_eq!(
        (status, &answer["waiting"]),
        (202, &json!(["mars"])),
        "{answer}"
    );
    let waits = doc! { "region": "mars", "state": "running" };
    let found = erasures(&mesh).await.find_one(waits).await.unwrap();
    assert!(found.is_some());
}

#[tokio::test]
async fn only_who_may_erase_erases() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let rights = Right::ALL.map(|right| {
        if right == Right::Erase {
            Right::Read
        } else {
            right
        }
    });
    let plain = token_with("kim", LONG, vec![Grant::new("*:*", &rights)]);
    let address = mesh.edges[0].address;
    let status = async |path: &str, token: &str| {
        let (status, answer) = ask(address, ("DELETE", path), token, &Value::Null).await;
        (
            status,
            answer["code"].as_str().unwrap_or_default().to_owned(),
        )
    };
    let refused = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(
        status("/v1/rooms/chat:x/messages", &plain).await,
        refused(403, "forbidden")
    );
    assert_eq!(
        status("/v1/rooms/chat:x", &plain).await,
        refused(403, "forbidden")
    );
    assert_eq!(
        status("/v1/users/kim/messages", &plain).await,
        refused(403, "forbidden")
    );
    assert_eq!(
        status("/v1/rooms/chat:x/messages", "x").await,
        refused(401, "unauthorized")
    );
    let all = token("mod");
    assert_eq!(
        status("/v1/rooms/nowhere:x/messages", &all).await,
        refused(404, "unknown_namespace")
    );
    assert_eq!(
        status("/v1/rooms/live:x/messages", &all).await,
        refused(400, "bad_request")
    );
    assert_eq!(
        status("/v1/rooms/x/messages", &all).await,
        refused(400, "bad_room")
    );
    // Nothing is there, and that is well.
    assert_eq!(
        erase(&mesh, "/v1/rooms/chat:x/messages", &all).await["erased"],
        0
    );
    assert_eq!(
        erase(&mesh, "/v1/users/nobody/messages", &all).await["erased"],
        0
    );
}

/// An erasure of everything of `room` until now that somebody wrote down who is not there any more.
async fn orphan(mesh: &Mesh, room: &str) -> (Store, Erasure) {
    let store = Store::open(&mesh.config.mongodb).await.unwrap();
    let newest = stored(mesh).await.iter().map(|one| one.record.ts).max();
    let erasure = Erasure {
        id: ulid::Ulid::new().to_string(),
        what: Erased::Room(RoomId::parse(room).unwrap()),
        before: vec![newest.unwrap(); usize::from(mesh.config.nats.partitions)],
        by: "mod".to_owned(),
        region: None,
    };
    store
        .record_erasure(&erasure, "who died", Duration::ZERO)
        .await
        .unwrap();
    (store, erasure)
}

async fn erasures(mesh: &Mesh) -> mongodb::Collection<Fields> {
    let messages = messages(mesh).await;
    let database = messages.client().database(&mesh.config.mongodb.database);
    database.collection("erasures")
}

async fn state_of(mesh: &Mesh, erasure: &Erasure) -> String {
    let erasures = erasures(mesh).await;
    let found = erasures
        .find_one(doc! { "_id": &erasure.id })
        .await
        .unwrap();
    found.unwrap().get_str("state").unwrap().to_owned()
}

async fn reaches(mesh: &Mesh, erasure: &Erasure, states: &[&str]) {
    eventually("the erasure goes on", LONG, async || {
        let state = state_of(mesh, erasure).await;
        if states.contains(&state.as_str()) {
            Ok(())
        } else {
            Err(state)
        }
    })
    .await;
}

#[tokio::test]
async fn what_a_stopped_worker_had_in_hand_does_not_come_back() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PARTITION).await;
    let (room, other) = ("chat:gone", "chat:stays");
    say(&mesh, other, "kim", json!({"id": "first", "body": 0})).await;
    caught_up(&mesh).await;
    let stopped = mesh.workers[0].process.pid().unwrap();
    signal(stopped, Signal::STOP);
    // The server gives them to the worker that asked for them: it has them, and does not know yet.
    for n in 0..5 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("g{n}"), "body": n}),
        )
        .await;
        say(
            &mesh,
            other,
            "kim",
            json!({"id": format!("s{n}"), "body": n}),
        )
        .await;
    }
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &mesh.config.nats);
    let config = mesh.config.clone();
    let in_hand = async || {
        let status = status(&connection, &reader, &config).await.unwrap();
        status
            .partitions
            .iter()
            .map(|part| part.ack_pending)
            .sum::<u64>()
    };
    eventually(
        "the stopped worker has them",
        LONG,
        async || match in_hand().await {
            10 => Ok(()),
            n => Err(n.to_string()),
        },
    )
    .await;
    mesh.add_worker("/readyz").await;
    let (_store, erasure) = orphan(&mesh, room).await;
    reaches(&mesh, &erasure, &["settling", "done"]).await;
    assert_eq!(documents(&mesh, doc! { "room": room }).await, []);

    signal(stopped, Signal::CONT);
    eventually(
        "it has confirmed what it had",
        LONG,
        async || match in_hand().await {
            0 => Ok(()),
            n => Err(n.to_string()),
        },
    )
    .await;
    let kept = eventually("what stays is there", LONG, async || {
        let kept = documents(&mesh, doc! { "room": other }).await;
        if kept.len() == 6 {
            Ok(kept)
        } else {
            Err(kept.len().to_string())
        }
    });
    kept.await;
    // It wrote them all and took back what was erased before it confirmed, unless it had heard of that before it wrote.
    let address = mesh.workers[0].address;
    let (_, metrics) = http(address, "GET", "/metrics", "", "").await.unwrap();
    let written = metrics.lines().find(|line| {
        line.starts_with("natter_history_written") && line.contains("kind=\"message\"")
    });
    let written: Option<u64> = written.and_then(|line| line.rsplit_once(' ')?.1.parse().ok());
    assert!((6..=11).contains(&written.unwrap()), "{metrics}");
    assert_eq!(documents(&mesh, doc! { "room": room }).await, []);
}

#[tokio::test]
async fn what_a_killed_worker_wrote_last_is_found_by_the_second_look() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PARTITION).await;
    let room = "chat:gone";
    let mut member = mesh.connect(0, "lee").await;
    join(&member, room, None).await;
    for n in 0..3 {
        say(
            &mesh,
            room,
            "kim",
            json!({"id": format!("g{n}"), "body": n}),
        )
        .await;
        next(&mut member).await;
    }
    caught_up(&mesh).await;
    // What a worker has in hand.
    let region = mesh.config.region();
    let streams = Streams::load(
        Connection::open(&mesh.config.nats, "test").await.unwrap(),
        region.clone(),
        &mesh.config.nats,
    );
    let StreamState { epoch, .. } = streams.await.unwrap().known(0);
    let in_hand = stored(&mesh).await.into_iter();
    let in_hand: Vec<_> = in_hand
        .map(|stored| entry(stored, &region, epoch))
        .collect();
    assert!(
        in_hand
            .iter()
            .all(|entry| matches!(entry.what, What::Message { .. }))
    );
    let (store, erasure) = orphan(&mesh, room).await;
    reaches(&mesh, &erasure, &["settling"]).await;
    assert_is_erasure(&next(&mut member).await, None);
    // It writes that, and dies. The second look is due in some minutes; here, when we say so.
    store.write(&in_hand).await.unwrap();
    assert_eq!(documents(&mesh, doc! { "room": room }).await.len(), 3);
    let now = doc! { "$set": { "due": mongodb::bson::DateTime::now() } };
    let erasures = erasures(&mesh).await;
    erasures
        .update_one(doc! { "_id": &erasure.id }, now)
        .await
        .unwrap();
    reaches(&mesh, &erasure, &["done"]).await;
    assert_eq!(documents(&mesh, doc! { "room": room }).await, []);
}

#[tokio::test]
async fn what_is_written_is_held_against_the_erasures() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 0), "").await;
    let (room, other) = ("chat:a", "chat:b");
    for room in [room, other] {
        say(&mesh, room, "kim", json!({"id": "1", "body": "kim's"})).await;
        say(&mesh, room, "lee", json!({"id": "1", "body": "lee's"})).await;
        say(
            &mesh,
            room,
            "kim",
            json!({"kind": "reaction", "target": "lee/1", "body": "👍"}),
        )
        .await;
        say(
            &mesh,
            room,
            "lee",
            json!({"kind": "edit", "target": "kim/2", "body": "by a moderator"}),
        )
        .await;
    }
    let region = mesh.config.region();
    let epoch = natter::testing::model::Epoch::parse("k3").unwrap();
    let entries = stored(&mesh).await.into_iter();
    let entries: Vec<_> = entries
        .map(|stored| entry(stored, &region, epoch))
        .collect();
    let store = Store::open(&mesh.config.mongodb).await.unwrap();
    store.prepare().await.unwrap();
    assert_eq!(store.write(&entries).await.unwrap(), []);
    assert_eq!(store.enforce_erasures(&entries).await.unwrap(), 0);
    let newest = entries.iter().map(|entry| entry.place.ts).max().unwrap();
    let erasure = Erasure {
        id: "1".to_owned(),
        what: Erased::User {
            user: "kim".to_owned(),
            scope: RoomScope::one(RoomId::parse(room).unwrap()),
        },
        before: vec![newest; 4],
        by: "mod".to_owned(),
        region: None,
    };
    store.record_erasure(&erasure, "me", LONG).await.unwrap();
    assert_eq!(store.erasures_running().await.unwrap(), 1);
    assert!(
        store
            .claim_erasure(&mesh.config.region(), "another", LONG)
            .await
            .unwrap()
            .is_none()
    );
    // Their message, and what is known of another.
    assert_eq!(store.enforce_erasures(&entries).await.unwrap(), 2);
    let left = documents(&mesh, doc! { "room": room }).await;
    assert_eq!(left.len(), 1);
    assert!(!left[0].to_string().contains("kim"), "{}", left[0]);
    assert_eq!(documents(&mesh, doc! { "room": other }).await.len(), 3);
}

#[tokio::test]
async fn a_room_is_exported_as_it_is() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let room = "chat:export";
    let body = |n: usize| format!("{{ \"n\" : {n}, \"text\":\"안녕 \\u00e9\" }}");
    // More than two pages; the bodies byte for byte.
    for n in 0..450 {
        let message = format!("{{\"id\":\"e{n}\",\"body\":{}}}", body(n));
        let path = format!("/v1/rooms/{room}/messages");
        let headers = format!("Authorization: Bearer {}\r\n", token("kim"));
        let (status, _) = http(mesh.edges[0].address, "POST", &path, &headers, &message)
            .await
            .unwrap();
        assert_eq!(status, 200);
    }
    say(
        &mesh,
        room,
        "kim",
        json!({"kind": "edit", "target": "e1", "body": "edited"}),
    )
    .await;
    say(
        &mesh,
        room,
        "kim",
        json!({"kind": "delete", "target": "e2", "body": {}}),
    )
    .await;
    let url = format!("ws://{}/ws", mesh.edges[0].address);
    let run = async |mesh: &Mesh, token: &str| {
        let args = ["history", "export", room, "--url", &url, "--token", token];
        let output = mesh.command(&args).await.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    caught_up(&mesh).await;
    let (code, lines, said) = run(&mesh, &token("lee")).await;
    assert_eq!((code, said.as_str()), (Some(0), ""));
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 450);
    for (n, line) in lines.iter().enumerate() {
        let message: Value = serde_json::from_str(line).unwrap();
        assert_eq!(message["id"], format!("e{n}"));
        match n {
            1 => assert_eq!(message["body"], "edited"),
            2 => assert!(
                message.get("body").is_none() && message["deleted_at"].is_u64(),
                "{line}"
            ),
            n => assert!(line.contains(&body(n)), "{line}"),
        }
    }
    let reader = token_with("lee", LONG, vec![Grant::new("*:*", &[Right::Read])]);
    let (code, lines, said) = run(&mesh, &reader).await;
    assert_eq!((code, lines.as_str()), (Some(1), ""));
    assert!(said.contains("forbidden"), "{said}");
    // Without the service there is what the streams have, and it says that there may be more.
    mesh.workers[0].process.stop().await;
    let (code, lines, said) = run(&mesh, &token("lee")).await;
    assert_eq!((code, lines.lines().count()), (Some(1), 450), "{said}");
    assert!(said.contains("may be missing"), "{said}");
}
