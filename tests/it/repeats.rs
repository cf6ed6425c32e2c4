//! What is said again: once the stream has forgotten it, in another region, or after it was erased.

use std::{collections::HashSet, time::Duration};

use natter::testing::{
    bus::{Connection, Reader, Stored, message_key},
    client::{CallError, Connection as Client},
    model::{Class, Epoch, RoomId, partition_of},
    subject::{Subjects, rooms_stream},
};
use serde_json::{Value, json};

use crate::support::{
    LONG, dedicated_nats, eventually,
    mesh::{Mesh, SECRET, ask, token},
    mongodb_url, nats_url, natter,
    regions::Regions,
    unique,
};

/// The stream forgets soon what it had.
const FORGETFUL: &str = "[nats]\npartitions = 1\n[streams]\nduplicate_window = \"1s\"\n";

async fn post(mesh: &Mesh, edge: usize, room: &str, user: &str, fields: &Value) -> (u16, Value) {
    let path = format!("/v1/rooms/{room}/messages");
    ask(
        mesh.edges[edge].address,
        ("POST", &path),
        &token(user),
        fields,
    )
    .await
}

/// Says something over HTTP, which is taken.
async fn say(mesh: &Mesh, edge: usize, room: &str, user: &str, fields: &Value) -> Value {
    let (status, answer) = post(mesh, edge, room, user, fields).await;
    assert_eq!(status, 200, "{fields}: {answer}");
    answer
}

/// Waits until the stream has forgotten what was said before this was called.
async fn forgotten(mesh: &Mesh, user: &str) {
    let room = "chat:probe";
    let probe = json!({"id": unique("probe"), "body": 0});
    say(mesh, 0, room, user, &probe).await;
    eventually("the stream forgets", LONG, async || {
        // The probe itself is stored again by then, and taken out.
        match say(mesh, 0, room, user, &probe).await["dup"] == false {
            true => Ok(()),
            false => Err("it knows it".to_owned()),
        }
    })
    .await;
}

/// What the streams of `origin` hold of a room, as the region of `mesh` has them.
async fn stored_of(mesh: &Mesh, origin: &str, room: &str) -> Vec<Stored> {
    let nats = &mesh.config.nats;
    let connection = Connection::open(nats, "test").await.unwrap();
    let reader = Reader::new(connection, nats);
    let origin = natter::testing::model::Region::parse(origin).unwrap();
    let id = RoomId::parse(room).unwrap();
    let part = partition_of(&id, nats.partitions);
    let filter = Subjects::new(&nats.prefix).stored_all(&origin, part, &id);
    let epoch = Epoch::parse("test").unwrap();
    let stream = rooms_stream(&origin, part);
    let (found, pending) = reader.log(&stream, epoch, &filter, 1).await.unwrap();
    assert_eq!(pending, 0);
    found
}

async fn stored(mesh: &Mesh, room: &str) -> Vec<Stored> {
    stored_of(mesh, mesh.config.region().as_str(), room).await
}

async fn page(mesh: &Mesh, room: &str) -> Vec<Value> {
    let page = mesh.get(0, &format!("/v1/rooms/{room}/messages")).await;
    page.unwrap()["messages"].as_array().unwrap().clone()
}

async fn unread(mesh: &Mesh, room: &str, user: &str) -> u64 {
    let body = json!({ "rooms": [room] });
    let address = mesh.edges[0].address;
    let (status, answer) = ask(address, ("POST", "/v1/unread"), &token(user), &body).await;
    assert_eq!(status, 200, "{answer}");
    answer["rooms"][0]["count"].as_u64().unwrap()
}

/// How many follow for who joins with `since`.
async fn replay(mesh: &Mesh, edge: usize, room: &str, since: &str) -> Value {
    let client = mesh.connect(edge, "late").await;
    let fields = json!({ "room": room, "since": since });
    let joined = call(&client, "join", fields).await;
    joined["replay"].clone()
}

async fn call(client: &Client, op: &str, fields: Value) -> Value {
    match client.commands().call(op, &fields).await {
        Ok(reply) => serde_json::from_str(reply.text()).unwrap(),
        Err(CallError::Refused(refusal)) => json!({ "code": refusal.code, "retry": refusal.retry }),
        Err(error) => panic!("{op} {fields}: {error}"),
    }
}

#[tokio::test]
async fn a_message_that_the_stream_has_forgotten_is_shown_and_counted_once() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (2, 1), FORGETFUL).await;
    // What becomes of it meanwhile.
    let rooms = ["plain", "edited", "deleted", "reacted"].map(|name| format!("chat:{name}"));
    let m1 = json!({"id": "m1", "body": "first"});
    let mut starts = Vec::new();
    for room in &rooms {
        let start = say(&mesh, 0, room, "kim", &json!({"id": "m0", "body": 0})).await;
        starts.push(start["cursor"].as_str().unwrap().to_owned());
        say(&mesh, 0, room, "kim", &m1).await;
    }
    let about = |kind: &str, body: &str| json!({"kind": kind, "target": "m1", "body": body});
    say(&mesh, 0, &rooms[1], "kim", &about("edit", "second")).await;
    say(&mesh, 0, &rooms[2], "kim", &about("delete", "")).await;
    say(&mesh, 0, &rooms[3], "kim", &about("reaction", "👍")).await;
    let before: Vec<Vec<Value>> = {
        let pages = rooms.iter().map(|room| page(&mesh, room));
        futures_util::future::join_all(pages).await
    };
    // Three times, from where nobody remembers it: over HTTP, by a session that is in no room, and after a restart.
    for round in 0..3 {
        forgotten(&mesh, "kim").await;
        for room in &rooms {
            let again = match round {
                0 => say(&mesh, 1, room, "kim", &m1).await,
                1 => {
                    let client = mesh.connect(1, "kim").await;
                    let fields = json!({"room": room, "id": "m1", "body": "first"});
                    call(&client, "send", fields).await
                }
                _ => {
                    if room == &rooms[0] {
                        mesh.edges[0].process.kill().await;
                        mesh.edges[0].process.start().await.unwrap();
                    }
                    say(&mesh, 0, room, "kim", &m1).await
                }
            };
            assert_eq!(again["dup"], false, "it was not stored again: {again}");
        }
        for (at, room) in rooms.iter().enumerate() {
            eventually("it is there once", LONG, async || {
                let stored = stored(&mesh, room).await;
                let messages = stored.iter().filter(|one| one.record.class == Class::Msg);
                match messages.count() {
                    2 => Ok(()),
                    n => Err(format!("{n} in {room}")),
                }
            })
            .await;
            assert_eq!(page(&mesh, room).await, before[at], "{room}");
            // One who never read, and who said it has read their own.
            assert_eq!(unread(&mesh, room, "lee").await, 2, "{room}");
            let replayed = stored(&mesh, room).await.len() - 1;
            assert_eq!(
                replay(&mesh, 1, room, &starts[at]).await,
                replayed,
                "{room}"
            );
        }
    }
    // The first is the one that is left.
    for room in &rooms {
        let stored = stored(&mesh, room).await;
        let seqs: Vec<u64> = stored.iter().map(|one| one.record.seq).collect();
        assert_eq!(stored[1].record.id, "m1", "{seqs:?}");
        assert!(seqs[1] < 20, "{seqs:?}");
    }
}

#[tokio::test]
async fn who_resumes_where_a_copy_was_misses_nothing() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (2, 1), FORGETFUL).await;
    let room = "chat:a";
    let m1 = json!({"id": "m1", "body": 1});
    say(&mesh, 0, room, "kim", &m1).await;
    forgotten(&mesh, "kim").await;
    let copy = say(&mesh, 0, room, "kim", &m1).await;
    assert_eq!(copy["dup"], false);
    eventually("the copy is gone", LONG, async || {
        match stored(&mesh, room).await.len() {
            1 => Ok(()),
            n => Err(n.to_string()),
        }
    })
    .await;
    // Its ack has a cursor that stays good, also before anything else is said.
    let at = copy["cursor"].as_str().unwrap();
    assert_eq!(replay(&mesh, 0, room, at).await, 0);
    for n in 0..3 {
        let id = format!("n{n}");
        say(&mesh, 0, room, "kim", &json!({"id": id, "body": n})).await;
    }
    for edge in 0..2 {
        assert_eq!(replay(&mesh, edge, room, at).await, 3, "edge {edge}");
    }
}

#[tokio::test]
async fn an_edge_that_remembers_a_message_does_not_store_it_again() {
    let mesh = Mesh::start(nats_url(), 1, FORGETFUL).await;
    let room = "chat:a";
    let kim = mesh.connect(0, "kim").await;
    call(&kim, "join", json!({ "room": room })).await;
    let send = json!({"room": room, "id": "m1", "body": 1});
    let react = json!({"room": room, "id": "r1", "kind": "reaction", "target": "m1", "body": "👍"});
    let (first, reacted) = (
        call(&kim, "send", send.clone()).await,
        call(&kim, "send", react.clone()).await,
    );
    forgotten(&mesh, "kim").await;
    for (fields, first) in [(send, first), (react, reacted)] {
        let again = call(&kim, "send", fields).await;
        let same = ["cursor", "ts"].map(|field| again[field] == first[field]);
        assert_eq!((&again["dup"], same), (&json!(true), [true; 2]), "{again}");
    }
    assert_eq!(stored(&mesh, room).await.len(), 2);
}

#[tokio::test]
async fn a_change_that_is_repeated_changes_nothing() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), FORGETFUL).await;
    let room = "chat:a";
    for id in ["m1", "m2"] {
        say(&mesh, 0, room, "kim", &json!({"id": id, "body": "zero"})).await;
    }
    let change = |id: &str, kind: &str, body: Value| json!({"id": id, "kind": kind, "target": "kim/m1", "body": body});
    let changes = [
        change("e1", "edit", json!("one")),
        change("e2", "edit", json!("two")),
        change("r1", "reaction", json!("👍")),
        change("r2", "reaction", json!({"key": "👍", "remove": true})),
        change("a1", "annotation", json!({"mood": "good"})),
        change("a2", "annotation", json!({"mood": "bad"})),
    ];
    for change in &changes {
        say(&mesh, 0, room, "kim", change).await;
    }
    let before = page(&mesh, room).await;
    forgotten(&mesh, "kim").await;
    for change in [&changes[0], &changes[2], &changes[4]] {
        let again = say(&mesh, 0, room, "kim", change).await;
        assert_eq!(again["dup"], false, "{again}");
    }
    eventually("the copies are gone", LONG, async || {
        match stored(&mesh, room).await.len() {
            8 => Ok(()),
            n => Err(n.to_string()),
        }
    })
    .await;
    assert_eq!(page(&mesh, room).await, before);
    // A new one of the same kind is no copy.
    let edit = change("e3", "edit", json!("three"));
    say(&mesh, 0, room, "kim", &edit).await;
    eventually("it is edited", LONG, async || {
        match &page(&mesh, room).await[0]["body"] {
            body if body == "three" => Ok(()),
            body => Err(body.to_string()),
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_said_in_two_regions_is_counted_once_in_both() {
    const SEOUL: &str = "seoul";
    const VIRGINIA: &str = "virginia";
    let toml = format!("{FORGETFUL}[mongodb]\nurl = \"{}\"\n", mongodb_url());
    let mut regions = Regions::start_with(&[SEOUL, VIRGINIA], &toml, Duration::ZERO).await;
    for region in [SEOUL, VIRGINIA] {
        regions.mesh(region).add_edge().await;
        regions.mesh(region).add_worker("/readyz").await;
    }
    let room = "chat:a";
    let m1 = json!({"id": "m1", "body": 1});
    say(regions.at(SEOUL), 0, room, "kim", &m1).await;
    let again = say(regions.at(VIRGINIA), 0, room, "kim", &m1).await;
    assert_eq!(again["dup"], false, "{again}");
    for region in [SEOUL, VIRGINIA] {
        let mesh = regions.at(region);
        eventually("it is there once", LONG, async || {
            let own = stored_of(mesh, SEOUL, room).await.len();
            match (own, stored_of(mesh, VIRGINIA, room).await.len()) {
                (1, 0) => Ok(()),
                other => Err(format!("{other:?} in {region}")),
            }
        })
        .await;
        assert_eq!(unread(mesh, room, "lee").await, 1, "{region}");
        assert_eq!(page(mesh, room).await.len(), 1, "{region}");
    }
}

/// Whether a message is refused for having been erased, over HTTP and over a socket.
async fn assert_erased(mesh: &Mesh, edge: usize, room: &str, user: &str, fields: &Value) {
    let (status, answer) = post(mesh, edge, room, user, fields).await;
    let expected = (410, &json!("erased"), &json!(false));
    let told = (status, &answer["code"], &answer["retry"]);
    assert_eq!(told, expected, "{room} {user} {fields}: {answer}");
    let client = mesh.connect(edge, user).await;
    let mut fields = fields.clone();
    fields["room"] = json!(room);
    let refused = call(&client, "send", fields.clone()).await;
    assert_eq!(
        refused,
        json!({"code": "erased", "retry": false}),
        "{fields}"
    );
}

async fn erase(mesh: &Mesh, path: &str) {
    let address = mesh.edges[0].address;
    eventually("it is erased", LONG, async || {
        match ask(address, ("DELETE", path), &token("mod"), &Value::Null).await {
            (200, _) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn an_erased_message_is_never_stored_again() {
    let mut nats = dedicated_nats().await;
    let url = nats.url();
    let mut mesh = Mesh::with_history(&url, mongodb_url(), (2, 1), "").await;
    let (room, of_user, other) = ("chat:room", "chat:user", "chat:other");
    let m1 = |body: &str| json!({"id": "m1", "body": body});
    for (room, user) in [
        (room, "kim"),
        (room, "lee"),
        (of_user, "kim"),
        (of_user, "lee"),
        (other, "kim"),
    ] {
        say(&mesh, 0, room, user, &m1("before")).await;
    }
    let reaction = json!({"id": "r1", "kind": "reaction", "target": "lee/m1", "body": "👍"});
    say(&mesh, 0, of_user, "kim", &reaction).await;
    // Enough for several chunks, and some that only MongoDB has.
    let client = async_nats::connect(&url).await.unwrap();
    let id = RoomId::parse(room).unwrap();
    let origin = mesh.config.region();
    let partitions = mesh.config.nats.partitions;
    let subjects = Subjects::new(&mesh.config.nats.prefix);
    let part = partition_of(&id, partitions);
    let subject = subjects.publish(&origin, part, &id, Class::Msg);
    let by_hand = async |id: &str| {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Natter-From", "kim");
        headers.insert("Natter-Id", id);
        headers.insert("Nats-Msg-Id", message_key(room, "kim", id));
        let answer = client.request_with_headers(subject.clone(), headers, "1".into());
        let answer: Value = serde_json::from_slice(&answer.await.unwrap().payload).unwrap();
        answer["seq"].as_u64().unwrap()
    };
    let many: Vec<String> = (0..5000).map(|n| format!("b{n}")).collect();
    for some in many.chunks(250) {
        futures_util::future::join_all(some.iter().map(|id| by_hand(id))).await;
    }
    eventually("MongoDB has them", LONG, async || {
        let path = format!("/v1/rooms/{room}/messages?around=kim/b4999&limit=1");
        match mesh.get(0, &path).await {
            Ok(page) if page["partial"].is_null() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    // At once on the edge that was asked, and wherever it is repeated.
    erase(&mesh, &format!("/v1/rooms/{room}")).await;
    erase(&mesh, "/v1/users/kim/messages").await;
    let edit = json!({"id": "e9", "kind": "edit", "target": "kim/m1", "body": "x"});
    let react = json!({"kind": "reaction", "target": "kim/m1", "body": "👍"});
    let check = async |mesh: &Mesh| {
        for edge in 0..2 {
            // An edge that was started a moment ago, or has just found NATS again, has read what was erased.
            for (room, user) in [
                (room, "kim"),
                (room, "lee"),
                (of_user, "kim"),
                (other, "kim"),
            ] {
                assert_erased(mesh, edge, room, user, &m1("again")).await;
            }
            for id in ["b0", "b1", "b2047", "b2048", "b4096", "b4999"] {
                assert_erased(mesh, edge, room, "kim", &json!({"id": id, "body": 1})).await;
            }
            assert_erased(mesh, edge, of_user, "kim", &edit).await;
            assert_erased(mesh, edge, of_user, "kim", &reaction).await;
            assert_erased(mesh, edge, room, "lee", &react).await;
            assert_erased(mesh, edge, of_user, "lee", &react).await;
        }
    };
    eventually("the other edge has heard of it", LONG, async || match post(
        &mesh,
        1,
        of_user,
        "kim",
        &m1("again"),
    )
    .await
    {
        (410, _) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    check(&mesh).await;
    // The server forgets what it knew of messages that it does not have.
    nats.server.kill().await;
    nats.server.restart().await.unwrap();
    for edge in 0..2 {
        eventually("the edge is back", LONG, async || {
            let probe = json!({"id": unique("p"), "body": 1});
            match post(&mesh, edge, "chat:probe", "lee", &probe).await {
                (200, _) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    check(&mesh).await;
    mesh.edges[1].process.kill().await;
    mesh.edges[1].process.start().await.unwrap();
    check(&mesh).await;
    let mut command = std::process::Command::new(natter());
    command
        .args(["send", room, "again", "--id", "m1", "--user", "kim"])
        .args(["--url", &format!("ws://{}", mesh.edges[0].address)])
        .env("NATTER__AUTH__HS256_SECRET", SECRET)
        .current_dir(mesh.dir());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("erased"),
        "{text}"
    );

    // What is new is taken, and what another says under the same id.
    for (room, user, id) in [
        (room, "kim", "m2"),
        (room, "mia", "m1"),
        (of_user, "mia", "m1"),
    ] {
        say(&mesh, 1, room, user, &json!({"id": id, "body": "new"})).await;
    }
    let again = say(&mesh, 1, of_user, "lee", &m1("before")).await;
    assert_eq!(again["dup"], true, "lee's was not erased there: {again}");

    // Past the edges: the history service takes it out again.
    let seq = by_hand("b7").await;
    assert!(seq > 5000, "the stream knew it");
    eventually("it is gone", LONG, async || {
        let ids: HashSet<String> = {
            let stored = stored(&mesh, room).await.into_iter();
            stored.map(|one| one.record.id).collect()
        };
        match ids.contains("b7") {
            false => Ok(()),
            true => Err(format!("{ids:?}")),
        }
    })
    .await;
    let shown: Vec<Value> = page(&mesh, room).await;
    let ids: Vec<&Value> = shown.iter().map(|one| &one["id"]).collect();
    assert_eq!(ids, [&json!("m2"), &json!("m1")]);
    assert_eq!(shown[1]["from"], "mia");
}

#[tokio::test]
async fn what_comes_back_behind_a_cut_is_gone_after_it() {
    const SEOUL: &str = "seoul";
    const VIRGINIA: &str = "virginia";
    let toml = format!(
        "[nats]\npartitions = 1\n[mongodb]\nurl = \"{}\"\n",
        mongodb_url()
    );
    let mut regions = Regions::start_with(&[SEOUL, VIRGINIA], &toml, Duration::ZERO).await;
    for region in [SEOUL, VIRGINIA] {
        regions.mesh(region).add_edge().await;
        regions.mesh(region).add_worker("/readyz").await;
    }
    let room = "chat:a";
    let m1 = json!({"id": "m1", "body": 1});
    say(regions.at(SEOUL), 0, room, "kim", &m1).await;
    eventually("virginia has it", LONG, async || {
        match page(regions.at(VIRGINIA), room).await.len() {
            1 => Ok(()),
            n => Err(n.to_string()),
        }
    })
    .await;
    regions.cut(VIRGINIA);
    let address = regions.at(SEOUL).edges[0].address;
    let path = format!("/v1/rooms/{room}");
    eventually("seoul has erased it", LONG, async || {
        let (status, answer) = ask(address, ("DELETE", &path), &token("mod"), &Value::Null).await;
        match (status, page(regions.at(SEOUL), room).await.len()) {
            (200 | 202, 0) => Ok(()),
            _ => Err(format!("{status} {answer}")),
        }
    })
    .await;
    // Virginia's edges can't know.
    say(regions.at(VIRGINIA), 0, room, "kim", &m1).await;
    say(
        regions.at(VIRGINIA),
        0,
        room,
        "kim",
        &json!({"id": "m2", "body": 2}),
    )
    .await;
    regions.heal(VIRGINIA);
    for region in [SEOUL, VIRGINIA] {
        let mesh = regions.at(region);
        eventually("it is gone again", LONG, async || {
            let shown = page(mesh, room).await;
            let ids: Vec<String> = shown.iter().map(|one| one["id"].to_string()).collect();
            let mut left = stored_of(mesh, SEOUL, room).await;
            left.extend(stored_of(mesh, VIRGINIA, room).await);
            let messages = left.iter().filter(|one| one.record.class == Class::Msg);
            let messages: Vec<&str> = messages.map(|one| one.record.id.as_str()).collect();
            match (ids == ["\"m2\""], &messages[..]) {
                (true, ["m2"]) => Ok(()),
                _ => Err(format!("{region}: {ids:?}, {messages:?}")),
            }
        })
        .await;
        eventually("it is refused", LONG, async || {
            match post(mesh, 0, room, "kim", &m1).await {
                (410, _) => Ok(()),
                other => Err(format!("{region}: {other:?}")),
            }
        })
        .await;
    }
}
