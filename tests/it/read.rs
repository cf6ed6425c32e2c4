//! Read markers: moved, told, merged, kept.

use std::{collections::BTreeMap, time::Duration};

use natter::testing::{
    auth::{Grant, Right},
    client::{CallError, Connection, Endpoint},
    model::{Cursor, RoomId},
    subject::{bucket, bucket_name, marker_key},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::support::{
    self, LONG,
    calls::{command, next, reply},
    eventually,
    mesh::{Mesh, token, token_with},
    raw::{self, bearer},
    signal,
};

const ROOM: &str = "chat:a";

pub(crate) fn seq(cursor: &Value) -> u64 {
    let cursor: Cursor = cursor
        .as_str()
        .unwrap_or_else(|| panic!("no cursor: {cursor}"))
        .parse()
        .unwrap();
    cursor.positions()[0].seq
}

/// The bucket of the markers, as any NATS client sees it.
async fn markers_of(mesh: &Mesh) -> async_nats::jetstream::kv::Store {
    let client = async_nats::connect(&mesh.config.nats.url).await.unwrap();
    let name = bucket_name(bucket::LASTREAD, &mesh.config.region());
    async_nats::jetstream::new(client)
        .get_key_value(name)
        .await
        .unwrap()
}

/// What the key of a user holds.
async fn stored(
    store: &async_nats::jetstream::kv::Store,
    room: &str,
    user: &str,
) -> Option<String> {
    let key = marker_key(&room_id(room), user);
    let value = store.get(key).await.unwrap()?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

fn room_id(room: &str) -> RoomId {
    RoomId::parse(room).unwrap()
}

/// Waits until the key of a user holds `cursor`.
async fn until_stored(mesh: &Mesh, room: &str, user: &str, cursor: &Value) {
    let store = markers_of(mesh).await;
    eventually("the marker is in its bucket", LONG, async || {
        let stored = stored(&store, room, user).await;
        if stored.as_deref() == cursor.as_str() {
            Ok(())
        } else {
            Err(format!("{stored:?} instead of {cursor}"))
        }
    })
    .await;
}

async fn join(connection: &mut Connection, fields: Value) -> Value {
    let joined = reply(connection, "join", fields).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    joined
}

/// Sends `n` messages: the cursors of the room after each.
async fn say(connection: &mut Connection, room: &str, n: usize) -> Vec<Value> {
    let mut cursors = Vec::new();
    for i in 0..n {
        let ack = reply(connection, "send", json!({"room": room, "body": i})).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        cursors.push(ack["cursor"].clone());
    }
    cursors
}

async fn read(connection: &mut Connection, room: &str, cursor: &Value) -> Value {
    reply(connection, "read", json!({"room": room, "cursor": cursor})).await
}

/// The next receipt; messages are passed over.
async fn receipt(connection: &mut Connection) -> Value {
    loop {
        let frame = next(connection).await.json();
        match frame["op"].as_str() {
            Some("read") => return frame,
            Some("msg") => {}
            _ => panic!("{frame}"),
        }
    }
}

/// The receipts among what has come by now: everything that a pong of this connection follows.
async fn receipts_by_now(connection: &mut Connection) -> Vec<Value> {
    let mut frames = command(connection, "ping", json!({})).await;
    frames.retain(|frame| frame["op"] == "read");
    frames
}

#[tokio::test]
async fn a_read_is_told_kept_and_never_goes_back() {
    let mut mesh = Mesh::start(support::nats_url(), 2, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(1, "lee").await;
    let mut deaf = mesh.connect(1, "park").await;
    let joined = join(&mut lee, json!({"room": ROOM, "read": true})).await;
    assert_eq!(joined.get("marker"), None, "{joined}");
    join(&mut deaf, json!({"room": ROOM})).await;
    let mut writer = mesh.connect(0, "writer").await;
    let cursors = say(&mut writer, ROOM, 10).await;

    // Not even a member, and on the other edge.
    let ok = read(&mut kim, ROOM, &cursors[4]).await;
    assert_eq!((&ok["op"], &ok["cursor"]), (&json!("ok"), &cursors[4]));
    let told = receipt(&mut lee).await;
    let expected = json!({"op": "read", "room": ROOM, "user": "kim", "cursor": cursors[4]});
    assert_eq!(told, expected);

    // Lower, and the same again: the higher one is answered, and nobody is told.
    for cursor in [&cursors[2], &cursors[4]] {
        let ok = read(&mut kim, ROOM, cursor).await;
        assert_eq!(ok["cursor"], cursors[4], "{ok}");
    }
    // Beyond the newest message: that is meant.
    let beyond = cursors[9].as_str().unwrap().split('.').collect::<Vec<_>>();
    let beyond = format!("{}.{}.{}.0", beyond[0], beyond[1], u64::MAX);
    let ok = read(&mut kim, ROOM, &json!(beyond)).await;
    assert_eq!(ok["cursor"], cursors[9], "{ok}");
    assert_eq!(receipt(&mut lee).await["cursor"], cursors[9]);
    assert!(receipts_by_now(&mut deaf).await.is_empty());

    // Everywhere, also after the edge that took it is gone.
    for edge in [0, 1] {
        let mut again = mesh.connect(edge, "kim").await;
        let joined = join(&mut again, json!({"room": ROOM, "read": true})).await;
        assert_eq!(joined["marker"], cursors[9], "{joined}");
        let readers = reply(&mut again, "readers", json!({"room": ROOM})).await;
        let readers = readers["readers"].as_array().unwrap();
        let kim = readers.iter().find(|reader| reader["user"] == "kim");
        assert_eq!(kim.unwrap()["cursor"], cursors[9]);
        assert!(kim.unwrap()["at"].as_u64().unwrap() > 1_600_000_000_000);
    }
    until_stored(&mesh, ROOM, "kim", &cursors[9]).await;
    mesh.edges[0].process.kill().await;
    mesh.edges[0].process.start().await.unwrap();
    let mut again = mesh.connect(0, "kim").await;
    let joined = join(&mut again, json!({"room": ROOM})).await;
    assert_eq!(joined["marker"], cursors[9], "{joined}");
}

#[tokio::test]
async fn an_edge_that_drains_writes_what_waits() {
    let mut mesh = Mesh::start(support::nats_url(), 1, "edge.drain_spread = '0s'").await;
    let mut writer = mesh.connect(0, "writer").await;
    let cursors = say(&mut writer, ROOM, 10).await;
    let mut users = Vec::new();
    for n in 0..20 {
        users.push(mesh.connect(0, &format!("user{n}")).await);
    }
    // The first is written at once; the others come while that has its pause.
    for cursor in &cursors[5..] {
        for user in &users {
            let fields = json!({"room": ROOM, "cursor": cursor});
            user.commands().send("read", fields).await.unwrap();
        }
    }
    for user in &mut users {
        for cursor in &cursors[5..] {
            assert_eq!(next(user).await.json()["cursor"], *cursor);
        }
    }
    let status = mesh.edges[0].process.stop().await.unwrap();
    assert!(status.success(), "{status}");
    let store = markers_of(&mesh).await;
    for n in 0..users.len() {
        let value = stored(&store, ROOM, &format!("user{n}")).await;
        assert_eq!(value.as_deref(), cursors[9].as_str(), "user{n}");
    }
}

#[tokio::test]
async fn joins_at_once_read_their_markers_together() {
    const USERS: usize = 200;
    let mesh = Mesh::start(support::nats_url(), 1, "edge.shards = 2").await;
    let mut writer = mesh.connect(0, "writer").await;
    let cursors = say(&mut writer, ROOM, 3).await;
    let mut users = Vec::new();
    for n in 0..USERS {
        let mut user = mesh.connect(0, &format!("user{n}")).await;
        if n % 2 == 0 {
            read(&mut user, ROOM, &cursors[n % 3]).await;
        }
        users.push(user);
    }
    let before = mesh.metric(0, "natter_marker_loads_total", "").await;
    for user in &users {
        let commands = user.commands();
        commands.send("join", json!({"room": ROOM})).await.unwrap();
    }
    for (n, user) in users.iter_mut().enumerate() {
        let joined = next(user).await.json();
        let marker = (n % 2 == 0).then(|| cursors[n % 3].clone());
        assert_eq!(joined.get("marker"), marker.as_ref(), "{joined}");
    }
    let loads = mesh.metric(0, "natter_marker_loads_total", "").await - before;
    println!("{USERS} joins at once read their markers in {loads} requests");
    assert!(loads < USERS as u64 / 2, "{loads}");
}

#[tokio::test]
async fn a_user_reads_on_two_edges_and_the_further_one_counts() {
    let mesh = Mesh::start(support::nats_url(), 2, "edge.shards = 2").await;
    let mut phone = mesh.connect(0, "kim").await;
    let mut laptop = mesh.connect(1, "kim").await;
    let mut writer = mesh.connect(0, "writer").await;
    let cursors = say(&mut writer, ROOM, 10).await;
    // Neither edge has a member in the room: only the bucket tells one what the other did.
    assert_eq!(
        read(&mut phone, ROOM, &cursors[7]).await["cursor"],
        cursors[7]
    );
    assert_eq!(
        read(&mut laptop, ROOM, &cursors[3]).await["cursor"],
        cursors[7]
    );
    assert_eq!(
        read(&mut laptop, ROOM, &cursors[8]).await["cursor"],
        cursors[8]
    );
    join(&mut phone, json!({"room": ROOM, "read": true})).await;
    join(&mut laptop, json!({"room": ROOM, "read": true})).await;
    // Own devices are told too, the one that has read as well.
    read(&mut laptop, ROOM, &cursors[9]).await;
    assert_eq!(receipt(&mut phone).await["cursor"], cursors[9]);
    until_stored(&mesh, ROOM, "kim", &cursors[9]).await;
}

#[tokio::test]
async fn a_message_moves_the_marker_of_its_sender_and_only_its() {
    let mesh = Mesh::start(support::nats_url(), 2, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(1, "lee").await;
    join(&mut lee, json!({"room": ROOM, "read": true})).await;
    let mut writer = mesh.connect(0, "writer").await;
    let first = say(&mut writer, ROOM, 3).await;
    let id = json!({"room": ROOM, "id": "mine", "body": 1});
    let ack = reply(&mut kim, "send", id.clone()).await;
    until_stored(&mesh, ROOM, "kim", &ack["cursor"]).await;
    until_stored(&mesh, ROOM, "writer", &first[2]).await;
    // It is sent again: the answer is the same, and so is the marker.
    say(&mut writer, ROOM, 1).await;
    assert_eq!(reply(&mut kim, "send", id).await["dup"], json!(true));
    // A reaction says nothing of what was read besides; a message over HTTP is a message.
    let reaction = json!({"room": ROOM, "kind": "reaction", "target": "writer/1", "body": "👍"});
    assert_eq!(reply(&mut kim, "send", reaction).await["op"], "ack");
    assert_eq!(unread(&mut kim, ROOM).await, (1, false));
    let path = format!("/v1/rooms/{ROOM}/messages");
    let headers = bearer(&token("kim"));
    let answer = raw::request(
        mesh.edges[1].address,
        "POST",
        &path,
        &headers,
        r#"{"body":2}"#,
    )
    .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    until_stored(&mesh, ROOM, "kim", &answer.json()["cursor"]).await;
    // Whoever got the messages knows it from them: no receipt, not even for a read of what one has said oneself.
    assert_eq!(
        read(&mut kim, ROOM, &ack["cursor"]).await["cursor"],
        answer.json()["cursor"]
    );
    let told = receipts_by_now(&mut lee).await;
    assert!(told.is_empty(), "{told:?}");
    assert_eq!(unread(&mut kim, ROOM).await, (0, false));
}

async fn unread(connection: &mut Connection, room: &str) -> (u64, bool) {
    let answer = reply(connection, "unread", json!({"rooms": [room]})).await;
    let count = &answer["rooms"][0];
    (
        count["count"]
            .as_u64()
            .unwrap_or_else(|| panic!("{answer}")),
        count["capped"] == json!(true),
    )
}

#[tokio::test]
async fn readers_are_paged_in_the_order_of_their_names() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let mut writer = mesh.connect(0, "writer").await;
    let cursors = say(&mut writer, ROOM, 3).await;
    let names = [
        "a",
        "a b",
        "a.b",
        "a/1",
        "b*",
        "kim@example.com",
        "김철수",
        "é",
    ];
    let mut expected: BTreeMap<&str, &Value> = BTreeMap::new();
    for (i, name) in names.iter().enumerate() {
        let mut user = mesh.connect(0, name).await;
        let cursor = &cursors[i % 3];
        assert_eq!(read(&mut user, ROOM, cursor).await["cursor"], *cursor);
        expected.insert(name, cursor);
    }
    expected.insert("writer", &cursors[2]);
    // Another room of the same namespace, and one whose name begins the same.
    for room in ["chat:b", "chat:ab"] {
        let mut user = mesh.connect(0, "elsewhere").await;
        let there = say(&mut user, room, 1).await;
        until_stored(&mesh, room, "elsewhere", &there[0]).await;
    }
    for limit in [1, 2, 3, 8, 9, 10, 1000] {
        let mut found = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let mut ask = json!({"room": ROOM, "limit": limit});
            if let Some(after) = &after {
                ask["after"] = json!(after);
            }
            let page = reply(&mut writer, "readers", ask).await;
            assert_eq!(page["op"], "readers", "{page}");
            let readers = page["readers"].as_array().unwrap();
            assert!(!readers.is_empty() && readers.len() <= limit);
            found.extend(readers.iter().map(|reader| {
                let user = reader["user"].as_str().unwrap().to_owned();
                (user, reader["cursor"].clone())
            }));
            match page.get("next") {
                Some(next) => after = Some(next.as_str().unwrap().to_owned()),
                None => break,
            }
        }
        let found: Vec<(&str, &Value)> = found.iter().map(|(u, c)| (u.as_str(), c)).collect();
        assert_eq!(
            found,
            expected.clone().into_iter().collect::<Vec<_>>(),
            "pages of {limit}"
        );
    }
    let none = reply(&mut writer, "readers", json!({"room": "chat:nobody"})).await;
    assert_eq!(none["readers"], json!([]), "{none}");
}

#[tokio::test]
async fn what_can_not_be_read_is_refused() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let cursors = say(&mut kim, ROOM, 3).await;
    let good = cursors[1].as_str().unwrap();
    let parts: Vec<&str> = good.split('.').collect();
    let changed = |at: usize, to: &str| {
        let mut parts = parts.clone();
        parts[at] = to;
        parts.join(".")
    };
    let little = token_with(
        "lee",
        Duration::from_secs(3600),
        vec![Grant::new(
            "chat:a",
            &[Right::Write, Right::Presence, Right::History],
        )],
    );
    let mut lee = Connection::open(&mesh.endpoint(0), Some(&little))
        .await
        .unwrap();
    let cases = [
        ("chat:a", String::new(), "bad_cursor"),
        ("chat:a", "x".to_owned(), "bad_cursor"),
        ("chat:a", format!("{good}."), "bad_cursor"),
        ("chat:a", changed(1, "zz"), "bad_cursor"),
        ("chat:a", changed(0, "elsewhere"), "bad_cursor"),
        ("chat:a", format!("{good}_zz.k.1.1"), "bad_cursor"),
        ("live:a", good.to_owned(), "bad_request"),
        ("nowhere:a", good.to_owned(), "unknown_namespace"),
        ("chat.a", good.to_owned(), "bad_room"),
    ];
    let address = mesh.edges[0].address;
    for (room, cursor, code) in &cases {
        let error = read(&mut kim, room, &json!(cursor)).await;
        assert_eq!(error["code"], *code, "{room} {cursor}: {error}");
        let path = format!("/v1/rooms/{room}/read");
        let body = json!({"cursor": cursor}).to_string();
        let answer = raw::request(address, "PUT", &path, &bearer(&token("kim")), &body).await;
        assert_eq!(
            answer.json()["code"],
            *code,
            "{room} {cursor}: {}",
            answer.body
        );
    }
    for (op, fields) in [
        ("read", json!({"room": ROOM, "cursor": good})),
        ("readers", json!({"room": ROOM})),
        ("unread", json!({"rooms": ["chat:a"]})),
    ] {
        let error = reply(&mut lee, op, fields).await;
        assert_eq!(error["code"], "forbidden", "{op}: {error}");
    }
    let error = reply(&mut kim, "readers", json!({"room": "live:a"})).await;
    assert_eq!(error["code"], "bad_request", "{error}");
    let error = reply(&mut kim, "readers", json!({"room": "nowhere:a"})).await;
    assert_eq!(error["code"], "unknown_namespace", "{error}");
    // Nothing of that has moved anything.
    let readers = reply(&mut kim, "readers", json!({"room": ROOM})).await;
    assert_eq!(readers["readers"].as_array().unwrap().len(), 1, "{readers}");
    // In a room in which nobody has spoken one can have read all there is.
    let empty = join(&mut kim, json!({"room": "chat:empty"})).await["cursor"].clone();
    let ok = read(&mut kim, "chat:empty", &empty).await;
    assert_eq!(ok["cursor"], empty, "{ok}");
    assert_eq!(unread(&mut kim, "chat:empty").await, (0, false));
}

#[tokio::test]
async fn http_reads_asks_and_counts_like_the_socket() {
    let mesh = Mesh::start(support::nats_url(), 2, "limits.unread_rooms = 3").await;
    let mut writer = mesh.connect(0, "writer").await;
    let mut lee = mesh.connect(1, "lee").await;
    join(&mut lee, json!({"room": ROOM, "read": true})).await;
    let cursors = say(&mut writer, ROOM, 5).await;
    let address = mesh.edges[0].address;
    let kim = bearer(&token("kim"));
    let ask = async |method: &str, path: &str, body: &str| {
        let answer = raw::request(address, method, path, &kim, body).await;
        (answer.status, answer.json())
    };
    let body = json!({"cursor": cursors[2]}).to_string();
    let (status, ok) = ask("PUT", "/v1/rooms/chat%3Aa/read", &body).await;
    assert_eq!((status, &ok), (200, &json!({"cursor": cursors[2]})));
    assert_eq!(receipt(&mut lee).await["cursor"], cursors[2]);
    let (status, readers) = ask("GET", "/v1/rooms/chat:a/readers?limit=1", "").await;
    assert_eq!(status, 200);
    assert_eq!(readers["room"], ROOM);
    assert_eq!(readers["next"], "kim");
    assert_eq!(readers["readers"][0]["cursor"], cursors[2]);
    let (_, readers) = ask("GET", "/v1/rooms/chat:a/readers?after=kim", "").await;
    assert_eq!(readers["readers"][0]["user"], "writer");
    assert_eq!(readers.get("next"), None);
    let body = json!({"rooms": ["chat:a", "live:x", "chat:a"]}).to_string();
    let (status, unread) = ask("POST", "/v1/unread", &body).await;
    let expected = json!({"rooms": [
        {"room": "chat:a", "count": 2}, {"room": "live:x", "count": 0}, {"room": "chat:a", "count": 2},
    ]});
    assert_eq!((status, unread), (200, expected));
    assert_eq!(
        ask("POST", "/v1/unread", r#"{"rooms":[]}"#).await,
        (200, json!({"rooms": []}))
    );
    for (method, path, body, status, code) in [
        (
            "POST",
            "/v1/unread",
            r#"{"rooms":["chat:a","chat:b","chat:c","chat:d"]}"#,
            429,
            "limit",
        ),
        (
            "POST",
            "/v1/unread",
            r#"{"rooms":["chat:a","nowhere:b"]}"#,
            404,
            "unknown_namespace",
        ),
        (
            "POST",
            "/v1/unread",
            r#"{"rooms":["chat.a"]}"#,
            400,
            "bad_room",
        ),
        (
            "POST",
            "/v1/unread",
            r#"{"rooms":"chat:a"}"#,
            400,
            "bad_request",
        ),
        ("POST", "/v1/unread", "{}", 400, "bad_request"),
        ("POST", "/v1/unread", "", 400, "bad_json"),
        ("PUT", "/v1/rooms/chat:a/read", "{}", 400, "bad_request"),
        ("PUT", "/v1/rooms/chat:a/read", "{", 400, "bad_json"),
        ("PUT", "/v1/rooms/chat:%FF/read", "{}", 400, "bad_room"),
        (
            "GET",
            "/v1/rooms/chat:a/readers?limit=0",
            "",
            400,
            "bad_request",
        ),
        (
            "GET",
            "/v1/rooms/chat:a/readers?limit=1001",
            "",
            400,
            "bad_request",
        ),
        (
            "GET",
            "/v1/rooms/chat:a/readers?limit=x",
            "",
            400,
            "bad_request",
        ),
        ("GET", "/v1/rooms/live:a/readers", "", 400, "bad_request"),
        ("GET", "/v1/rooms/chat/readers", "", 400, "bad_room"),
        ("DELETE", "/v1/rooms/chat:a/read", "", 405, "bad_request"),
    ] {
        let (found, error) = ask(method, path, body).await;
        assert_eq!(
            (found, &error["code"]),
            (status, &json!(code)),
            "{method} {path} {body}: {error}"
        );
    }
    let (_, error) = ask("POST", "/v1/unread", r#"{"rooms":["chat:a","nowhere:b"]}"#).await;
    assert!(
        error["message"].as_str().unwrap().contains("nowhere:b"),
        "{error}"
    );
    let nobody = raw::request(address, "GET", "/v1/rooms/chat:a/readers", "", "").await;
    assert_eq!(nobody.status, 401);
    let (_, document) = ask("GET", "/v1/openapi.json", "").await;
    for (path, method) in [
        ("/v1/rooms/{room}/readers", "get"),
        ("/v1/rooms/{room}/read", "put"),
        ("/v1/unread", "post"),
    ] {
        let operation = &document["paths"][path][method];
        let schema =
            &operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"];
        let name = schema
            .as_str()
            .unwrap_or_else(|| panic!("{path}: {operation}"));
        let name = name.rsplit('/').next().unwrap();
        assert!(
            document["components"]["schemas"].get(name).is_some(),
            "{name}"
        );
    }
    // The command refuses what the request does, with the same words.
    let rooms = json!({"rooms": ["chat:a", "chat:b", "chat:c", "chat:d"]});
    assert_eq!(reply(&mut lee, "unread", rooms).await["code"], "limit");
    let error = reply(
        &mut lee,
        "unread",
        json!({"rooms": ["chat:a", "nowhere:b"]}),
    )
    .await;
    assert!(
        error["message"].as_str().unwrap().contains("nowhere:b"),
        "{error}"
    );
}

#[tokio::test]
async fn receipts_that_are_no_receipts_are_dropped_and_counted() {
    let mesh = Mesh::start(support::nats_url(), 1, "edge.shards = 1").await;
    let mut lee = mesh.connect(0, "lee").await;
    join(&mut lee, json!({"room": ROOM, "read": true})).await;
    join(&mut lee, json!({"room": "live:a", "read": true})).await;
    let cursors = say(&mut lee, ROOM, 5).await;
    let good = cursors[3].as_str().unwrap();
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let prefix = &mesh.config.nats.prefix;
    let publish = async |room: &str, from: Option<&str>, payload: &str| {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Natter-Kind", "read");
        if let Some(from) = from {
            headers.insert("Natter-From", from);
        }
        let subject = format!("{prefix}.eph.{room}");
        client
            .publish_with_headers(subject, headers, payload.to_owned().into())
            .await
            .unwrap();
    };
    let epoch = good.split('.').nth(1).unwrap();
    let too_long = "x".repeat(257);
    publish("chat.a", None, good).await;
    publish("chat.a", Some("$sys"), good).await;
    publish("chat.a", Some(&too_long), good).await;
    publish("chat.a", Some("kim"), "").await;
    publish("chat.a", Some("kim"), "nonsense").await;
    publish("chat.a", Some("kim"), &good.replace(epoch, "zz")).await;
    publish("live.a", Some("kim"), good).await;
    // By hand, but valid: from a region's other edges it looks the same.
    publish("chat.a", Some("kim=20=3D"), good).await;
    let told = receipt(&mut lee).await;
    assert_eq!(
        (&told["user"], &told["cursor"]),
        (&json!("kim ="), &cursors[3])
    );
    for (reason, n) in [("malformed", 5), ("epoch", 1), ("ephemeral", 1)] {
        eventually("the dropped ones are counted", LONG, async || {
            let label = format!("reason=\"{reason}\"");
            match mesh.metric(0, "natter_receipt_dropped_total", &label).await {
                found if found == n => Ok(()),
                found => Err(format!("{reason}: {found}")),
            }
        })
        .await;
    }
    assert!(receipts_by_now(&mut lee).await.is_empty());
}

#[tokio::test]
async fn too_many_who_want_receipts_get_none_until_they_are_fewer() {
    let toml = "limits.read_push_max = 2\nedge.shards = 1";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let cursors = say(&mut kim, ROOM, 10).await;
    let mut park = mesh.connect(0, "park").await;
    let mut watching = Vec::new();
    for user in ["a", "b", "c"] {
        let mut connection = mesh.connect(0, user).await;
        join(&mut connection, json!({"room": ROOM, "read": true})).await;
        watching.push(connection);
    }
    for cursor in &cursors[2..5] {
        read(&mut park, ROOM, cursor).await;
    }
    eventually("the receipts were heard", LONG, async || {
        match mesh
            .metric(0, "natter_receipt_dropped_total", "push_max")
            .await
        {
            3 => Ok(()),
            n => Err(format!("{n}")),
        }
    })
    .await;
    let mut left = watching.pop().unwrap();
    assert!(receipts_by_now(&mut left).await.is_empty());
    let rejoined = reply(&mut left, "leave", json!({"room": ROOM})).await;
    assert_eq!(rejoined["op"], "left");
    for connection in &mut watching {
        let told = receipt(connection).await;
        assert_eq!(
            (&told["user"], &told["cursor"]),
            (&json!("park"), &cursors[4])
        );
    }
    read(&mut park, ROOM, &cursors[6]).await;
    for connection in &mut watching {
        assert_eq!(receipt(connection).await["cursor"], cursors[6]);
        assert!(receipts_by_now(connection).await.is_empty());
    }
}

#[tokio::test]
async fn without_nats_reads_are_refused_and_joins_go_on_as_they_can() {
    let mut nats = support::dedicated_nats().await;
    let mesh = Mesh::start(&nats.url(), 1, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(0, "lee").await;
    join(&mut lee, json!({"room": ROOM, "read": true})).await;
    let cursors = say(&mut kim, ROOM, 5).await;
    assert_eq!(
        read(&mut lee, ROOM, &cursors[1]).await["cursor"],
        cursors[1]
    );
    nats.server.kill().await;
    for (op, fields) in [
        ("read", json!({"room": ROOM, "cursor": cursors[3]})),
        ("readers", json!({"room": ROOM})),
        ("unread", json!({"rooms": [ROOM]})),
    ] {
        let error = reply(&mut lee, op, fields).await;
        let expected = (&json!("unavailable"), &json!(true));
        assert_eq!((&error["code"], &error["retry"]), expected, "{op}: {error}");
    }
    nats.server.restart().await.unwrap();
    let ok = eventually("the read goes through", LONG, async || {
        let mut again = mesh.connect(0, "lee").await;
        let ok = read(&mut again, ROOM, &cursors[3]).await;
        if ok["op"] == "ok" {
            Ok(ok)
        } else {
            Err(ok.to_string())
        }
    })
    .await;
    assert_eq!(ok["cursor"], cursors[3]);
    until_stored(&mesh, ROOM, "lee", &cursors[3]).await;
    // The room's table was compared: whoever was there all the time knows it too, from the receipt or the comparison.
    loop {
        let told = receipt(&mut lee).await;
        if told["user"] == "lee" && told["cursor"] == cursors[3] {
            break;
        }
    }
}

/// A device of a user that reads what it is given, in that order, at one of two edges: when the connection ends, it goes
/// to the other one and repeats what was not answered. Tells once the cursor in `tell_after` is answered.
async fn device(
    edges: [Endpoint; 2],
    first: usize,
    room: String,
    cursors: Vec<Value>,
    tell_after: Option<(Value, oneshot::Sender<()>)>,
) {
    let token = token("kim");
    let mut tell_after = tell_after;
    let mut edge = first;
    let mut connection = None;
    for cursor in cursors {
        loop {
            let open = match connection.take() {
                Some(open) => open,
                None => match Connection::open(&edges[edge % 2], Some(&token)).await {
                    Ok(open) => open,
                    Err(_down) => {
                        edge += 1;
                        continue;
                    }
                },
            };
            let fields = json!({"room": room, "cursor": cursor});
            match open.commands().call("read", &fields).await {
                Ok(ok) => {
                    assert!(
                        seq(&ok.json()["cursor"]) >= seq(&cursor),
                        "{cursor}: {}",
                        ok.text()
                    );
                    connection = Some(open);
                    break;
                }
                Err(CallError::Refused(refusal)) if refusal.retry => connection = Some(open),
                Err(CallError::Refused(refusal)) => panic!("{refusal:?}"),
                Err(_gone) => edge += 1,
            }
        }
        if let Some((after, tell)) = tell_after.take() {
            if after == cursor {
                tell.send(()).unwrap();
            } else {
                tell_after = Some((after, tell));
            }
        }
    }
}

/// Watches who reads until the connection ends, or `until` is seen: what was told never goes back.
async fn watch(mut connection: Connection, until: u64) -> Vec<u64> {
    let mut seen: Vec<u64> = Vec::new();
    while let Some(frame) = connection.next().await {
        let frame = frame.json();
        if frame["op"] != "read" || frame["user"] != "kim" {
            continue;
        }
        let at = seq(&frame["cursor"]);
        assert!(
            seen.last().is_none_or(|last| *last < at),
            "{at} after {seen:?}"
        );
        seen.push(at);
        if at == until {
            break;
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_that_read_while_an_edge_is_killed_end_at_the_maximum() {
    const ROUNDS: usize = 8;
    const CURSORS: usize = 40;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut mesh = Mesh::start(support::nats_url(), 2, "").await;
    let edges = [mesh.endpoint(0), mesh.endpoint(1)];
    let mut repaired = 0;
    for round in 0..ROUNDS {
        let room = format!("chat:round{round}");
        let mut writer = mesh.connect(1, "writer").await;
        let cursors = say(&mut writer, &room, CURSORS).await;
        let highest = seq(&cursors[CURSORS - 1]);
        let mut watchers = Vec::new();
        for edge in [1, 0] {
            let mut observer = mesh.connect(edge, "observer").await;
            join(&mut observer, json!({"room": room, "read": true})).await;
            watchers.push(tokio::spawn(watch(observer, highest)));
        }
        // The one that has the highest reads at the edge that dies, right after that was answered, or at any other time.
        let mut lists = [cursors.clone(), cursors[..CURSORS - 1].to_vec()];
        lists.iter_mut().for_each(|list| list.shuffle(&mut rng));
        let [mut phone, laptop] = lists;
        let die_after = if round % 2 == 0 {
            // The worst: nothing comes after it, and it waits behind an earlier write.
            phone.retain(|cursor| *cursor != cursors[CURSORS - 1]);
            phone.push(cursors[CURSORS - 1].clone());
            phone[CURSORS - 1].clone()
        } else {
            phone[rng.random_range(0..CURSORS)].clone()
        };
        let (tell, told) = oneshot::channel();
        let tell_after = Some((die_after, tell));
        let phone = tokio::spawn(device(edges.clone(), 0, room.clone(), phone, tell_after));
        let laptop = tokio::spawn(device(edges.clone(), 1, room.clone(), laptop, None));
        told.await.unwrap();
        mesh.edges[0].process.kill().await;
        for device in [phone, laptop] {
            tokio::time::timeout(LONG, device)
                .await
                .expect("a device hangs")
                .unwrap();
        }
        until_stored(&mesh, &room, "kim", &cursors[CURSORS - 1]).await;
        let mut watchers = watchers.into_iter();
        let survivor = watchers.next().unwrap();
        let seen = tokio::time::timeout(LONG, survivor)
            .await
            .expect("the highest was not told")
            .unwrap();
        assert_eq!(seen.last(), Some(&highest));
        for cut in watchers {
            cut.await.unwrap();
        }
        mesh.edges[0].process.start().await.unwrap();
        for edge in [0, 1] {
            let mut kim = mesh.connect(edge, "kim").await;
            let joined = join(&mut kim, json!({"room": room})).await;
            assert_eq!(
                joined["marker"],
                cursors[CURSORS - 1],
                "round {round}, edge {edge}"
            );
        }
        repaired = mesh.metric(1, "natter_marker_repaired_total", "").await;
    }
    println!("{repaired} markers were written by the edge that had only heard of them");
}

/// Without members in the rooms nobody hears anything: the edges meet in the bucket only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_that_write_the_same_key_never_overwrite_the_higher_marker() {
    const ROUNDS: usize = 10;
    const CURSORS: usize = 30;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mesh = Mesh::start(support::nats_url(), 2, "").await;
    let edges = [mesh.endpoint(0), mesh.endpoint(1)];
    let mut writer = mesh.connect(1, "writer").await;
    let store = markers_of(&mesh).await;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let room = format!("chat:round{round}");
        let cursors = say(&mut writer, &room, CURSORS).await;
        let key = marker_key(&room_id(&room), "kim");
        let mut changes = store.watch(key).await.unwrap();
        let highest = cursors[CURSORS - 1].clone();
        let until = seq(&highest);
        let watched = tokio::spawn(async move {
            let mut last = 0;
            while last < until {
                let change = futures_util::StreamExt::next(&mut changes).await;
                let value = change.expect("the watch goes on").unwrap().value;
                let at = seq(&json!(String::from_utf8(value.to_vec()).unwrap()));
                assert!(at > last, "the key went from {last} to {at}");
                last = at;
            }
        });
        let devices = [0, 1].map(|edge| {
            let mut list = cursors[..CURSORS - edge].to_vec();
            list.shuffle(&mut rng);
            tokio::spawn(device(edges.clone(), edge, room.clone(), list, None))
        });
        rounds.push((room, highest, watched, devices));
    }
    for (room, highest, watched, devices) in rounds {
        for device in devices {
            device.await.unwrap();
        }
        let watched = tokio::time::timeout(LONG, watched).await;
        watched.expect("the highest is not written").unwrap();
        until_stored(&mesh, &room, "kim", &highest).await;
    }
    let of = async |result: &str| {
        let mut sum = 0;
        for edge in [0, 1] {
            let label = format!("result=\"{result}\"");
            sum += mesh
                .metric(edge, "natter_marker_writes_total", &label)
                .await;
        }
        sum
    };
    println!(
        "{} writes, {} conflicts",
        of("written").await,
        of("conflict").await
    );
}

/// The edge is stopped while the key changes and the connection breaks: no receipt can have reached it.
#[tokio::test]
async fn receipts_that_were_missed_are_read_from_the_bucket() {
    let mut nats = support::dedicated_nats().await;
    let mesh = Mesh::start(&nats.url(), 1, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(0, "lee").await;
    join(&mut lee, json!({"room": ROOM, "read": true})).await;
    let cursors = say(&mut lee, ROOM, 6).await;
    read(&mut kim, ROOM, &cursors[1]).await;
    assert_eq!(receipt(&mut lee).await["cursor"], cursors[1]);
    until_stored(&mesh, ROOM, "kim", &cursors[1]).await;
    let edge = mesh.edges[0].process.pid().unwrap();
    signal(edge, Signal::STOP);
    nats.server.kill().await;
    nats.server.restart().await.unwrap();
    let store = markers_of(&mesh).await;
    for (user, at) in [("kim", 4), ("lee", 0), ("park", 2)] {
        let key = marker_key(&room_id(ROOM), user);
        let value = cursors[at].as_str().unwrap().to_owned();
        store.put(key, value.into()).await.unwrap();
    }
    signal(edge, Signal::CONT);
    let mut told = BTreeMap::new();
    while told.len() < 2 {
        let receipt = receipt(&mut lee).await;
        told.insert(
            receipt["user"].as_str().unwrap().to_owned(),
            receipt["cursor"].clone(),
        );
    }
    // Not that of the member itself, which somebody has put back by hand.
    let expected =
        [("kim", 4), ("park", 2)].map(|(user, at)| (user.to_owned(), cursors[at].clone()));
    assert_eq!(told, BTreeMap::from(expected));
    assert!(receipts_by_now(&mut lee).await.is_empty());
}
